"""The Recipe: frozen dataclasses that define a training run completely, and presets for the paper's rows.

Defaults are those of appendix A.1 of the paper (Xiao et al., CVPR 2023). Nothing here imports torch, so a
launcher can parse, check and print a recipe in no time. One field is one setting is one command-line flag:
the documentation of both is the ``help`` beside the default.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from cfmask.errors import UserError
from cfmask.record import Record
from cfmask.runtime.patience import patiently
from cfmask.urls import is_remote

# Values that the authors give: threshold for object and context masks, masking rate for random ones.
PAPER_VALUES = {
    ("random", "no-fill"): 0.75,
    ("object", "no-fill"): 0.3,
    ("context", "no-fill"): 0.6,
    ("random", "single-fill"): 0.5,
    ("object", "single-fill"): 0.3,
    ("context", "single-fill"): 0.5,
    ("random", "multi-fill"): 0.5,
    ("object", "multi-fill"): 0.6,
    ("context", "multi-fill"): 0.3,
}
GAMMA = {"kd": 30.0, "wise-kd": 1.0}
"""Weight of the distillation of logits, by method: the authors' code gives it to FT + KD with their --w_distill of 30;
the paper states 1 for WiSE-KD (appendix A.3)."""

AUTO: Literal["auto"] = "auto"
"""Of --micro-batches: to be chosen by the first start (cfmask/training/memory.py)."""


def setting(
    default: Any,
    help: str,
    *,
    flag: str | None = None,
    choices: tuple[str, ...] | None = None,
    recorded: bool = False,
) -> Any:
    """A field with its documentation.

    Args:
        flag: where the command line's name differs from the field's.
        recorded: it has no flag; a run's start writes it.
    """
    return field(default=default, metadata={"help": help, "flag": flag, "choices": choices, "recorded": recorded})


@dataclass(frozen=True)
class Model:
    """What is trained, and where it starts."""

    name: str = setting(
        "ViT-B-32-quickgelu",
        "open_clip model, or the path of an open_clip model configuration (.json); OpenAI weights need a "
        "-quickgelu model",
        flag="--model",
    )
    pretrained: str = setting(
        "openai",
        "open_clip tag, or the path of a checkpoint (open_clip's .pt/.safetensors, or a cfmask model)",
    )
    mean: tuple[float, ...] | None = setting(
        None,
        "mean of the pixels, R G B in 0…1, that --pretrained was trained with, where neither the file, nor an "
        "open_clip_config.json beside it, nor open_clip's tags of the model say it",
    )
    std: tuple[float, ...] | None = setting(None, "standard deviation of the pixels, R G B, to go with --mean")
    head: str | None = setting(
        None,
        "cfmask model file (.safetensors) to take the head from; by default the head in --pretrained, or else "
        "the zero-shot head of the model's own text tower, class names and 80 templates",
    )


@dataclass(frozen=True)
class Method:
    """What is done to a batch."""

    name: str = setting(
        "feature-distillation",
        "what is learned from a batch: the labels, by the head alone (linear-probe), by head and tower (vanilla), by "
        "one and then both (lp-ft); or by both with a term beside it: the pre-trained encoder's features "
        "(feature-distillation: the method), the pre-trained model's logits (kd), or its features and the logits of "
        "a WiSE-FT ensemble (wise-kd)",
        flag="--method",
        choices=("linear-probe", "lp-ft", "vanilla", "kd", "feature-distillation", "wise-kd"),
    )
    mask: str | None = setting(
        None,
        "images that are distilled on: the clean ones (none), or masked at random, where the CAM says that patches "
        "matter (object: the paper's), or where it says that they do not (context)",
        choices=("none", "random", "object", "context"),
    )
    fill: str | None = setting(
        None,
        "what comes in place of masked patches: nothing, patches of one other image, or of another image each "
        "(the paper's: single-fill)",
        choices=("no-fill", "single-fill", "multi-fill"),
    )
    threshold: float | None = setting(
        None, "CAM threshold of object and context masks, in 0…1 (the paper's value for the mask and fill)"
    )
    rate: float | None = setting(
        None, "share of patches that a random mask hides, in 0…1 (the paper's value for the fill)"
    )
    cam: str | None = setting(
        None,
        "class activation map behind object and context masks (the paper's: relevance)",
        choices=("relevance", "grad-cam"),
    )
    first_block: int | None = setting(
        None,
        "first block that relevance uses; later ones only, because early ones are noisy (the paper's: 0, all)",
    )
    beta: float | None = setting(None, "weight β of the feature distillation (the paper's: 30)")
    gamma: float | None = setting(
        None,
        "weight γ of the distillation of logits (kd: 30, as in the authors' code; wise-kd: 1, as in the paper's "
        "appendix A.3)",
    )
    temperature: float | None = setting(None, "temperature of the distillation of logits (the paper's: 10)")
    ensemble: str | None = setting(
        None,
        "the WiSE-FT ensemble that wise-kd learns from: a cfmask model file (tools/wise_ft.py writes it) or a run",
    )

    @property
    def distils(self) -> bool:
        """Whether there is a teacher."""
        return self.name in ("kd", "feature-distillation", "wise-kd")

    @property
    def masked(self) -> bool:
        """Whether there are masked images."""
        return self.mask not in (None, "none")

    @property
    def by_cam(self) -> bool:
        """Whether a CAM decides what is masked."""
        return self.mask in ("object", "context")

    @property
    def row(self) -> str:
        """What it is called in a table, or a folder's name."""
        parts = [self.name]
        if self.distils:
            parts += ["clean"] if not self.masked else [f"{self.mask}-mask", self.fill or "single-fill"]
        return "-".join(parts)


@dataclass(frozen=True)
class Data:
    """What is read."""

    shards: str = setting(
        "",
        "folder with a folder of shards for each split, as tools/make_shards.py writes it; or its URL: http(s)://…, "
        "or a command that prints a file, such as 'pipe:aws s3 cp s3://bucket/shards/{} -'",
    )
    train_split: str = setting("train", "folder under --shards to train on")
    eval_sets: tuple[str, ...] = setting(
        (), "folders under --shards to evaluate on at each epoch's end; training is the same without"
    )
    segmentation: str | None = setting(
        None,
        "segmentation masks of training images, as tools/validate_masks.py takes them: how far the CAM's masks fall on "
        "objects is then measured in every step and logged at each epoch's end; training is the same without",
    )
    loader_workers: int | None = setting(
        None,
        "data-loader threads per rank; changes speed only, never a sample (one less than the rank has cores, 16 at "
        "most)",
    )
    max_bad_share: float = setting(
        0.001,
        "share of an epoch's samples that may turn out unreadable, others standing in for them, before the run stops; "
        "one always may",
    )
    cache_dir: str | None = setting(
        None,
        "folder on the nodes' own disks for shards that come by URL ($CFMASK_CACHE, else a folder in $TMPDIR)",
    )
    cache_gb: float | None = setting(None, "GB that this folder may take (200)")


@dataclass(frozen=True)
class Optim:
    """How weights move (appendix A.1: AdamW, warm-up, cosine to 0, one clipping per step)."""

    epochs: int = setting(10, "passes over the training set")
    batch_size: int = setting(512, "samples of one optimizer step, over all ranks")
    lanes: int = setting(
        16,
        "lanes a batch is made of; donors come from a sample's own lane; the number of ranks must divide it",
    )
    micro_batches: int | Literal["auto"] = setting(
        1,
        "parts that a rank's share of a batch is split into, to need less memory; auto: as few as fit the GPU with the "
        "least free memory, measured before the first step and kept in the run's recipe for as many ranks (1 on CPUs)",
    )
    micro_batches_for: int | None = setting(
        None, "number of ranks that --micro-batches auto was resolved for; none if a number was given", recorded=True
    )
    lr: float | None = setting(
        None, "peak learning rate (3e-5; 1e-3 where only the head is trained, 3e-5 there too in the authors' code)"
    )
    schedule: str = setting(
        "cosine",
        "learning-rate schedule: linear warm-up, cosine to 0 (cosine); or as in the authors' code, up and down by "
        "cosines while AdamW's β1 goes from 0.95 to 0.85 and back (one-cycle)",
        choices=("cosine", "one-cycle"),
    )
    warmup_steps: int | None = setting(None, "steps of linear warm-up from 0 to the peak (500)")
    probe_epochs: int | None = setting(None, "lp-ft: passes in which the head alone is trained, before --epochs (10)")
    probe_lr: float | None = setting(None, "lp-ft: peak learning rate of these (1e-3)")
    weight_decay: float | None = setting(
        None, "AdamW's weight decay, on all parameters (0.1; where only the head is trained there is none)"
    )
    beta1: float | None = setting(None, "AdamW's β1 (0.9)", flag="--adam-beta1")
    beta2: float = setting(0.999, "AdamW's β2", flag="--adam-beta2")
    eps: float = setting(1e-8, "AdamW's ε", flag="--adam-eps")
    clip_norm: float = setting(1.0, "L2 norm that gradients are clipped to, once per optimizer step")
    max_skipped_steps: int = setting(
        10, "steps in a row that may be left out, because a loss or gradient is not finite, before the run stops"
    )

    @property
    def total_epochs(self) -> int:
        return self.epochs + (self.probe_epochs or 0)

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of a step, once their number is known."""
        assert not isinstance(self.micro_batches, str), "--micro-batches auto is resolved before the first step"
        return self.micro_batches

    def is_open_for(self, world_size: int) -> bool:
        """Whether a start on so many ranks has to choose the number of micro-batches."""
        return self.micro_batches == AUTO or self.micro_batches_for not in (None, world_size)


@dataclass(frozen=True)
class Run:
    """How the run behaves."""

    seed: int = setting(0, "seed of sample order, masks and donors (the paper's: 0, 1, 2)")
    precision: str = setting(
        "auto",
        "arithmetic of the passes, weights stay fp32; tf32: fp32 with matrix products in TF32, on GPUs that have it; "
        "auto: bf16 with GPUs, fp32 without",
        choices=("auto", "fp32", "tf32", "bf16"),
    )
    activation_checkpointing: bool = setting(
        False, "compute activations again in the backward passes: a fraction of the memory, a third more time"
    )
    compile: bool = setting(
        False, "run the teacher's and the masked passes through torch.compile (a minute at the start)"
    )
    cuda_graphs: str = setting(
        "auto",
        "launch a micro-batch's passes as one CUDA graph: no time is lost to launching kernels where a GPU has few "
        "images, but gradients are averaged after the backward pass and not during it; auto: up to 128 images a "
        "micro-batch on a GPU",
        choices=("auto", "on", "off"),
    )
    deterministic: bool = setting(
        True, "kernels that give the same bits every time; without them a resumed run is the same up to rounding only"
    )
    checkpoint_steps: int = setting(500, "optimizer steps between checkpoints; each epoch's end has one as well")
    checkpoint_minutes: float = setting(15.0, "minutes after which there is one in any case; 0: steps alone decide")
    keep_checkpoints: int = setting(2, "how many of the latest checkpoints stay")
    keep_epochs: bool = setting(True, "and those of epochs' ends, all of them")
    eval_steps: int | None = setting(
        None,
        "optimizer steps between evaluations on the --eval-sets, beside those at epochs' ends; training is the same "
        "without (none)",
    )
    best_on: str | None = setting(
        None,
        "and of epochs' ends the one with the best top-1 on this of the --eval-sets, which checkpoints/best.json names "
        "(holdout, if it is one of them)",
    )
    log_steps: int = setting(10, "optimizer steps between lines in log.jsonl")


@dataclass(frozen=True)
class Recipe(Record):
    """Everything that decides a run's result. ``resolved`` fills in what depends on other settings."""

    model: Model = Model()
    method: Method = Method()
    data: Data = Data()
    optim: Optim = Optim()
    run: Run = Run()

    def resolved(self) -> Recipe:
        """The same recipe with the paper's values where nothing was said, checked.

        Raises:
            UserError: a value out of range, a setting that would do nothing under this method, a batch that
                lanes do not divide.
        """
        method = _resolved_method(self.method)
        optim = _resolved_optim(self.optim, method)
        best_on = self.run.best_on or ("holdout" if "holdout" in self.data.eval_sets else None)
        return dataclasses.replace(
            self, method=method, optim=optim, run=dataclasses.replace(self.run, best_on=best_on)
        ).checked()

    def checked(self) -> Recipe:
        """This recipe, if its numbers make sense; see ``resolved``."""
        o, r, d = self.optim, self.run, self.data
        for name, value, low in (
            ("--epochs", o.epochs, 1),
            ("--batch-size", o.batch_size, 1),
            ("--lanes", o.lanes, 1),
            ("--micro-batches", None if isinstance(o.micro_batches, str) else o.micro_batches, 1),
            ("--warmup-steps", o.warmup_steps, 0),
            ("--probe-epochs", o.probe_epochs, 1),
            ("--max-skipped-steps", o.max_skipped_steps, 0),
            ("--checkpoint-steps", r.checkpoint_steps, 1),
            ("--keep-checkpoints", r.keep_checkpoints, 1),
            ("--log-steps", r.log_steps, 1),
            ("--eval-steps", r.eval_steps, 1),
            ("--loader-workers", d.loader_workers, 0),
            ("--seed", r.seed, 0),
        ):
            if value is not None and value < low:
                raise UserError(f"{name} is {value}; it must be at least {low}.")
        if isinstance(o.micro_batches, str) and o.micro_batches != AUTO:
            raise UserError(f"--micro-batches is {o.micro_batches!r}; it must be a number or {AUTO}.")
        for name, number in (
            ("--lr", o.lr),
            ("--probe-lr", o.probe_lr),
            ("--adam-eps", o.eps),
            ("--clip-norm", o.clip_norm),
        ):
            if number is not None and not (number > 0 and math.isfinite(number)):
                raise UserError(f"{name} is {number}; it must be a finite number above 0.")
        for name, number in (("--adam-beta1", o.beta1), ("--adam-beta2", o.beta2)):
            if number is not None and not 0 <= number < 1:
                raise UserError(f"{name} is {number}; it must lie in [0, 1).")
        if o.weight_decay is not None and not (o.weight_decay >= 0 and math.isfinite(o.weight_decay)):
            raise UserError(f"--weight-decay is {o.weight_decay}; it must be a finite number, 0 or more.")
        if o.batch_size % o.lanes:
            near = [n for n in _divisors(o.batch_size) if n <= 64]
            raise UserError(
                f"--batch-size {o.batch_size} is not a multiple of --lanes {o.lanes}: every lane gives the same "
                f"number of samples to a batch. Lanes that divide this batch: {', '.join(map(str, near))}."
            )
        if self.method.fill == "multi-fill" and o.batch_size // o.lanes < 2:
            raise UserError(
                f"multi-fill takes patches from other images of a lane, and --batch-size {o.batch_size} with "
                f"--lanes {o.lanes} puts a single image in each. Use at most {o.batch_size // 2} lanes."
            )
        if r.cuda_graphs == "on" and r.compile:
            raise UserError(
                "--cuda-graphs on and --compile exclude each other: a compiled pass is not captured. Leave one out."
            )
        if not 0 <= d.max_bad_share < 1:
            raise UserError(f"--max-bad-share is {d.max_bad_share}; it must lie in [0, 1).")
        if d.segmentation is not None and not self.method.by_cam:
            raise UserError(
                f"--segmentation would do nothing: it is compared with the masks of a CAM, and {self.method.row} has "
                "none. Leave it out, or choose --mask object or context."
            )
        if not is_remote(d.shards) and (d.cache_dir is not None or d.cache_gb is not None):
            raise UserError("--cache-dir and --cache-gb would do nothing: --shards is a folder, and read in place.")
        if d.cache_gb is not None and not 0 < d.cache_gb < math.inf:
            raise UserError(f"--cache-gb is {d.cache_gb}; it must be a finite number above 0.")
        if not 0 <= r.checkpoint_minutes < math.inf:
            raise UserError(f"--checkpoint-minutes is {r.checkpoint_minutes}; it must be a finite number, 0 or more.")
        if r.eval_steps is not None and not d.eval_sets:
            raise UserError(
                f"--eval-steps {r.eval_steps} would do nothing without --eval-sets: say what to evaluate on."
            )
        if r.best_on is not None and r.best_on not in d.eval_sets:
            raise UserError(f"--best-on {r.best_on} would do nothing: it is not one of the --eval-sets.")
        if len(set(d.eval_sets)) != len(d.eval_sets):
            raise UserError(f"--eval-sets names a set twice: {' '.join(d.eval_sets)}.")
        return self

    def of_weights(self) -> dict[str, str | int | float | None]:
        """The settings that decide the weights by more than rounding, by "group.name". Not among them: the model and
        the ensemble, which are files of the run folder once it has started, and the training set, which has a digest.
        """
        method, optim, run = (dataclasses.asdict(group) for group in (self.method, self.optim, self.run))
        for name in ("micro_batches", "micro_batches_for", "max_skipped_steps"):
            del optim[name]
        del method["ensemble"]
        run = {name: run[name] for name in ("seed", "precision")}
        groups = {"method": method, "optim": optim, "run": run}
        return {f"{group}.{name}": value for group, values in groups.items() for name, value in values.items()}

    def with_choice_of(self, recorded: Recipe) -> Recipe:
        """This recipe with the number of micro-batches that ``recorded`` has, where auto has led to that number."""
        if self.optim.micro_batches != AUTO or recorded.optim.micro_batches_for is None:
            return self
        choice = {name: getattr(recorded.optim, name) for name in ("micro_batches", "micro_batches_for")}
        return dataclasses.replace(self, optim=dataclasses.replace(self.optim, **choice))

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """The inverse of ``to_json``.

        Raises:
            UserError: not a recipe, or one with settings that this version does not know.
        """
        try:
            raw = json.loads(text)
            groups: dict[str, Any] = {f.name: f.default for f in fields(cls)}
            _refuse_unknown(raw, groups)
            built = {}
            for name, group in groups.items():
                values = raw.get(name, {})
                _refuse_unknown(values, {f.name for f in fields(group)}, prefix=f"{name}.")
                values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
                built[name] = type(group)(**values)
            return cls(**built)
        except (json.JSONDecodeError, TypeError, AttributeError) as error:
            raise UserError(f"This is not a recipe as cfmask writes it ({error}).") from error


def _resolved_method(method: Method) -> Method:
    by_cam = method.by_cam or (method.distils and method.mask is None)  # object is the default
    logits, features = method.name in ("kd", "wise-kd"), method.name in ("feature-distillation", "wise-kd")
    masked = method.masked or by_cam
    _refuse_idle(
        method,
        {
            "mask": method.distils,
            "fill": masked,
            "threshold": by_cam,
            "rate": method.mask == "random",
            "cam": by_cam,
            "first_block": by_cam and method.cam != "grad-cam",
            "beta": features,
            "gamma": logits,
            "temperature": logits,
            "ensemble": method.name == "wise-kd",
        },
        " ".join(
            [f"--method {method.name}"]
            + ([f"--mask {method.mask}"] if method.mask else [])
            + ([f"--cam {method.cam}"] if method.cam else [])
        ),
    )
    mask = (method.mask or "object") if method.distils else None
    chosen_fill = (method.fill or "single-fill") if masked else None
    value = PAPER_VALUES[mask, chosen_fill] if mask is not None and chosen_fill is not None else None
    cam = (method.cam or "relevance") if by_cam else None
    resolved = dataclasses.replace(
        method,
        mask=mask,
        fill=chosen_fill,
        threshold=_default(method.threshold, value) if by_cam else None,
        rate=_default(method.rate, value) if mask == "random" else None,
        cam=cam,
        first_block=(method.first_block or 0) if cam == "relevance" else None,
        beta=_default(method.beta, 30.0) if features else None,
        gamma=_default(method.gamma, GAMMA[method.name]) if logits else None,
        temperature=_default(method.temperature, 10.0) if logits else None,
    )
    for name in ("threshold", "rate"):
        number = getattr(resolved, name)
        if number is not None and not 0 <= number < 1:
            raise UserError(f"--{name} is {number}; it must lie in [0, 1).")
    for name in ("beta", "gamma"):
        number = getattr(resolved, name)
        if number is not None and not (number >= 0 and math.isfinite(number)):
            raise UserError(f"--{name} is {number}; it must be a finite number, 0 or more.")
    if resolved.temperature is not None and not (resolved.temperature > 0 and math.isfinite(resolved.temperature)):
        raise UserError(f"--temperature is {resolved.temperature}; it must be a finite number above 0.")
    if resolved.first_block is not None and resolved.first_block < 0:
        raise UserError(f"--first-block is {resolved.first_block}; blocks are counted from 0.")
    if method.name == "wise-kd" and method.ensemble is None:
        raise UserError(
            "--method wise-kd learns from a WiSE-FT ensemble: give it with --ensemble FILE. python tools/wise_ft.py "
            "ZERO FINE --alphas 0.5 --out DIR makes one of a zero-shot and a fine-tuned model, DIR/model.safetensors."
        )
    return resolved


def _resolved_optim(optim: Optim, method: Method) -> Optim:
    head_only, two_phases = method.name == "linear-probe", method.name == "lp-ft"
    one_cycle = optim.schedule == "one-cycle"
    _refuse_idle(
        optim,
        {
            "probe_epochs": two_phases,
            "probe_lr": two_phases,
            "weight_decay": not head_only,
            "warmup_steps": not one_cycle,
            "beta1": not one_cycle,
        },
        f"--method {method.name}" + (f" --schedule {optim.schedule}" if one_cycle else ""),
    )
    return dataclasses.replace(
        optim,
        lr=_default(optim.lr, 1e-3 if head_only else 3e-5),
        probe_epochs=_default(optim.probe_epochs, 10) if two_phases else None,
        probe_lr=_default(optim.probe_lr, 1e-3) if two_phases else None,
        weight_decay=None if head_only else _default(optim.weight_decay, 0.1),
        warmup_steps=None if one_cycle else _default(optim.warmup_steps, 500),
        beta1=None if one_cycle else _default(optim.beta1, 0.9),
    )


def _default(value: Any, otherwise: Any) -> Any:
    return otherwise if value is None else value


def _refuse_idle(group: Any, used: dict[str, bool], under: str) -> None:
    """Refuse settings that were given and would do nothing."""
    for part in fields(group):
        if not used.get(part.name, True) and getattr(group, part.name) is not None:
            flag = part.metadata["flag"] or "--" + part.name.replace("_", "-")
            raise UserError(f"{flag} would do nothing with {under}. Leave it out, or choose another method.")


def _refuse_unknown(given: Any, known: Any, prefix: str = "") -> None:
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise UserError(
            f"Unknown settings in the recipe: {', '.join(prefix + name for name in unknown)}. It was written by "
            "another version of cfmask, or by hand; run the code it was written with, or remove them."
        )


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


# A preset is a row of the paper's tables, or what the authors' code does in its place.
PRESETS: dict[str, Recipe] = {
    "linear-probe": Recipe(method=Method(name="linear-probe")),
    "lp-ft": Recipe(method=Method(name="lp-ft")),
    "ft": Recipe(method=Method(name="vanilla")),
    "kd-clean": Recipe(method=Method(name="kd", mask="none")),
    "kd-masked": Recipe(method=Method(name="kd", mask="object", fill="single-fill")),
    "fd-clean": Recipe(method=Method(mask="none")),
    **{
        f"{mask}-mask-{chosen_fill}": Recipe(method=Method(mask=mask, fill=chosen_fill))
        for mask in ("random", "object", "context")
        for chosen_fill in ("no-fill", "single-fill", "multi-fill")
    },
    "grad-cam": Recipe(method=Method(mask="object", fill="single-fill", cam="grad-cam")),
    "wise-kd": Recipe(method=Method(name="wise-kd", mask="object", fill="single-fill")),
    # The authors' code: the method, unless --method names another. Its learning rate is the same whatever is trained,
    # and it has no autocast. (Their PyTorch 1.11 multiplied matrices in TF32 on Ampere GPUs: --precision tf32.) Of
    # lp-ft, the first phase's --probe-lr stays to be said: a setting that one method has is not for a preset of all.
    "released-code": Recipe(optim=Optim(schedule="one-cycle", lr=3e-5), run=Run(precision="fp32")),
}


def preset_of(recipe: Recipe) -> str | None:
    """The preset that a resolved recipe has the method of, and what else the preset decides (schedule, learning rate,
    precision); None if flags have changed these."""
    for name, preset in PRESETS.items():
        decided = (preset.method.name, preset.optim.schedule, preset.optim.lr, preset.run.precision)
        found = (recipe.method.name, recipe.optim.schedule, recipe.optim.lr, recipe.run.precision)
        if all(ours in (None, "auto", theirs) for ours, theirs in zip(decided, found, strict=True)):
            method = dataclasses.replace(preset.method, ensemble=recipe.method.ensemble)
            if _resolved_method(method) == recipe.method:
                return name
    return None


def load_recipe(path: str | Path) -> Recipe:
    """The recipe in a file.

    Raises:
        UserError: no such file, or not a recipe.
    """
    try:
        return Recipe.from_json(patiently(Path(path).read_text, str(path)))
    except OSError as error:
        raise UserError(f"No recipe can be read from {path}: {error.strerror}.") from error
