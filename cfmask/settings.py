"""The settings of a recipe, in groups.

Each field is one setting and one command-line flag, documented by the help text beside its default, which is that of
appendix A.1 of the paper. Fields whose default is None get the value in parentheses from ``Recipe.resolved``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

AUTO: Literal["auto"] = "auto"
"""Value of --micro-batches: the first start chooses their number (cfmask/training/memory.py)."""


@dataclass(frozen=True)
class _Range:
    """Which values a number may have.

    text: completes "it must".
    contains: whether a value is allowed.
    """

    text: str
    contains: Callable[[float], bool]


_FROM_0 = _Range("be at least 0", lambda value: value >= 0)
_FROM_1 = _Range("be at least 1", lambda value: value >= 1)
_POSITIVE = _Range("be a finite number above 0", lambda value: 0 < value < math.inf)
_NOT_NEGATIVE = _Range("be a finite number, 0 or more", lambda value: 0 <= value < math.inf)
_SHARE = _Range("lie in [0, 1)", lambda value: 0 <= value < 1)


def setting(
    default: Any,
    help: str,
    *,
    flag: str | None = None,
    choices: tuple[str, ...] | None = None,
    range: _Range | None = None,
    recorded: bool = False,
) -> Any:
    """A field with its documentation.

    Args:
        flag: the command-line flag, if it differs from the field's name.
        choices: allowed values of a text.
        range: allowed values of a number.
        recorded: whether a start of the run writes the field, instead of a flag.
    """
    metadata = {"help": help, "flag": flag, "choices": choices, "range": range, "recorded": recorded}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Model:
    """The model that is trained, and the weights from which it starts."""

    name: str = setting(
        "ViT-B-32-quickgelu",
        "open_clip model, or path of an open_clip model configuration (.json); OpenAI weights need a -quickgelu model",
        flag="--model",
    )
    pretrained: str = setting(
        "openai", "open_clip tag, or path of a checkpoint (open_clip's .pt/.safetensors, or a cfmask model file)"
    )
    mean: tuple[float, ...] | None = setting(
        None,
        "mean of the pixels, R G B in 0…1, with which --pretrained was trained; needed only if neither the file, nor "
        "an open_clip_config.json beside it, nor open_clip's tags give it",
    )
    std: tuple[float, ...] | None = setting(
        None, "standard deviation of the pixels, R G B in 0…1, with which --pretrained was trained; needs --mean"
    )
    head: str | None = setting(
        None,
        "cfmask model file (.safetensors) from which the head is taken; by default the head in --pretrained, or else a "
        "zero-shot head from the model's own text tower, the class names and 80 templates",
    )


@dataclass(frozen=True)
class Method:
    """What is learned from a batch."""

    name: str = setting(
        "feature-distillation",
        "linear-probe: labels, training only the head; vanilla: labels, training head and tower; lp-ft: first "
        "linear-probe, then vanilla; feature-distillation (the paper's method): labels, and the pre-trained encoder's "
        "features; kd: labels, and the pre-trained model's logits; wise-kd: labels, the pre-trained encoder's "
        "features, and the logits of a WiSE-FT ensemble",
        flag="--method",
        choices=("linear-probe", "lp-ft", "vanilla", "kd", "feature-distillation", "wise-kd"),
    )
    mask: str | None = setting(
        None,
        "images that are used for distillation; none: the images themselves; random: with random patches masked; "
        "object (the paper's): with the patches masked that matter according to the CAM; context: with all others",
        choices=("none", "random", "object", "context"),
    )
    fill: str | None = setting(
        None,
        "what replaces masked patches; no-fill: nothing; single-fill (the paper's): patches of one other image; "
        "multi-fill: patches of a different image each",
        choices=("no-fill", "single-fill", "multi-fill"),
    )
    threshold: float | None = setting(
        None, "CAM threshold of object and context masks, in [0, 1) (the paper's value for mask and fill)", range=_SHARE
    )
    rate: float | None = setting(
        None, "share of patches that a random mask covers, in [0, 1) (the paper's value for the fill)", range=_SHARE
    )
    cam: str | None = setting(
        None,
        "class activation map of object and context masks (relevance, the paper's)",
        choices=("relevance", "grad-cam"),
    )
    first_block: int | None = setting(
        None,
        "first transformer block that relevance uses, from 0; early blocks are noisy (0, the paper's: all blocks)",
        range=_FROM_0,
    )
    beta: float | None = setting(None, "weight β of feature distillation (30, the paper's)", range=_NOT_NEGATIVE)
    beta_relative: float | None = setting(
        None,
        "in place of --beta, for features of another scale than CLIP's: weight of the squared error relative to the "
        "teacher's feature, |student - teacher|² / |teacher|². β corresponds to β times the mean square "
        "of the features, which tools/build_head.py --class-means prints (none)",
        range=_NOT_NEGATIVE,
    )
    gamma: float | None = setting(
        None,
        "weight γ of logit distillation (kd: 30, as in the authors' code; wise-kd: 1, as in the paper's appendix A.3)",
        range=_NOT_NEGATIVE,
    )
    temperature: float | None = setting(None, "temperature of logit distillation (10, the paper's)", range=_POSITIVE)
    ensemble: str | None = setting(
        None, "WiSE-FT ensemble that teaches wise-kd: a cfmask model file (tools/wise_ft.py makes one), or a run folder"
    )

    @property
    def mse_weight(self) -> float:
        """Weight of feature distillation, of a resolved method; 0 without."""
        return (self.beta if self.beta_relative is None else self.beta_relative) or 0.0

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
        """Whether a CAM decides which patches are masked."""
        return self.mask in ("object", "context")

    @property
    def row(self) -> str:
        """Its name in tables and folders."""
        parts = [self.name]
        if self.distils:
            parts += ["clean"] if not self.masked else [f"{self.mask}-mask", self.fill or "single-fill"]
        return "-".join(parts)


@dataclass(frozen=True)
class Data:
    """The sets that are read."""

    shards: str = setting(
        "",
        "folder that has a folder of shards for each split, as tools/make_shards.py writes it; or its URL: "
        "http(s)://…, or a command that prints a file, such as 'pipe:aws s3 cp s3://bucket/shards/{} -'",
    )
    train_split: str = setting("train", "folder in --shards that is trained on")
    eval_sets: tuple[str, ...] = setting(
        (), "folders in --shards that are evaluated at the end of each epoch; they do not change training"
    )
    segmentation: str | None = setting(
        None,
        "segmentation masks of training images, in a form that tools/validate_masks.py accepts; the overlap of CAM "
        "masks with objects is then measured in each step and logged at the end of each epoch; training is not changed",
    )
    loader_workers: int | None = setting(
        None,
        "data-loader threads per rank; they change speed only, never a sample (cores of the rank - 1, at most 16)",
        range=_FROM_0,
    )
    max_bad_share: float = setting(
        0.001,
        "share of an epoch's samples that may be unreadable before the run stops; such samples are replaced by others; "
        "one is always allowed",
        range=_SHARE,
    )
    cache_dir: str | None = setting(
        None,
        "folder on the nodes' local disks that caches shards read by URL ($CFMASK_CACHE, else a folder in $TMPDIR)",
    )
    cache_gb: float | None = setting(None, "largest size of the shard cache, in GB (200)", range=_POSITIVE)


@dataclass(frozen=True)
class Optim:
    """How weights are updated (appendix A.1: AdamW, warm-up, cosine to 0, one clipping per step)."""

    epochs: int = setting(10, "passes over the training set", range=_FROM_1)
    batch_size: int = setting(512, "samples of an optimizer step, over all ranks", range=_FROM_1)
    lanes: int = setting(
        16,
        "lanes that a batch consists of; donors come from the sample's own lane; the number of ranks must divide it",
        range=_FROM_1,
    )
    micro_batches: int | Literal["auto"] = setting(
        1,
        "parts into which a rank's share of a batch is split, to save memory; auto: as few as the GPU with the least "
        "free memory allows, measured before the first step and recorded in the run's recipe for this number of ranks "
        "(1 on CPUs)",
        range=_FROM_1,
    )
    micro_batches_for: int | None = setting(
        None, "number of ranks for which --micro-batches auto was resolved; none if a number was given", recorded=True
    )
    lr: float | None = setting(
        None,
        "peak learning rate (3e-5; if only the head is trained 1e-3, or 3e-5 in the authors' code)",
        range=_POSITIVE,
    )
    schedule: str = setting(
        "cosine",
        "learning-rate schedule; cosine: linear warm-up, then a cosine to 0; one-cycle: as in the authors' code, up "
        "and down by cosines, while AdamW's β1 goes from 0.95 to 0.85 and back",
        choices=("cosine", "one-cycle"),
    )
    warmup_steps: int | None = setting(None, "steps of linear warm-up from 0 to the peak (500)", range=_FROM_0)
    probe_epochs: int | None = setting(
        None,
        "lp-ft: epochs of its first phase, which trains only the head and comes before --epochs (10)",
        range=_FROM_1,
    )
    probe_lr: float | None = setting(None, "lp-ft: peak learning rate of its first phase (1e-3)", range=_POSITIVE)
    weight_decay: float | None = setting(
        None, "AdamW's weight decay of all parameters (0.1; none if only the head is trained)", range=_NOT_NEGATIVE
    )
    beta1: float | None = setting(None, "AdamW's β1 (0.9)", flag="--adam-beta1", range=_SHARE)
    beta2: float = setting(0.999, "AdamW's β2", flag="--adam-beta2", range=_SHARE)
    eps: float = setting(1e-8, "AdamW's ε", flag="--adam-eps", range=_POSITIVE)
    clip_norm: float = setting(1.0, "L2 norm to which gradients are clipped, once per optimizer step", range=_POSITIVE)
    max_skipped_steps: int = setting(
        10,
        "steps in a row that may be skipped because a loss or gradient is not finite, before the run stops",
        range=_FROM_0,
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
        """Whether a start on this number of ranks has to choose the number of micro-batches."""
        return self.micro_batches == AUTO or self.micro_batches_for not in (None, world_size)


@dataclass(frozen=True)
class Run:
    """How the run is executed."""

    seed: int = setting(0, "seed of sample order, masks and donors (the paper's: 0, 1, 2)", range=_FROM_0)
    precision: str = setting(
        "auto",
        "arithmetic of the passes; weights are always fp32; tf32: fp32 with matrix products in TF32, on GPUs that "
        "support it; auto: bf16 on GPUs, fp32 on CPUs",
        choices=("auto", "fp32", "tf32", "bf16"),
    )
    activation_checkpointing: bool = setting(
        False, "recompute activations in the backward passes: a fraction of the memory, a third more time"
    )
    compile: bool = setting(
        False, "compile the teacher's and the masked passes with torch.compile (takes a minute at the start)"
    )
    cuda_graphs: str = setting(
        "auto",
        "launch the passes of a micro-batch as one CUDA graph, which saves time if a GPU has few images; gradients are "
        "then averaged after the backward pass instead of during it; auto: on GPUs, up to 128 images a micro-batch",
        choices=("auto", "on", "off"),
    )
    deterministic: bool = setting(
        True, "use deterministic kernels; without them a resumed run is identical only up to rounding"
    )
    checkpoint_steps: int = setting(
        500, "optimizer steps between checkpoints; the end of each epoch has one as well", range=_FROM_1
    )
    checkpoint_minutes: float = setting(
        15.0, "longest time between checkpoints in minutes; 0: only steps decide", range=_NOT_NEGATIVE
    )
    keep_checkpoints: int = setting(2, "number of latest checkpoints that are kept", range=_FROM_1)
    keep_epochs: bool = setting(True, "keep the checkpoints of all epoch ends")
    eval_steps: int | None = setting(
        None,
        "optimizer steps between evaluations on the --eval-sets, in addition to those at epoch ends; they do not "
        "change training (none)",
        range=_FROM_1,
    )
    best_on: str | None = setting(
        None,
        "one of the --eval-sets: the checkpoint of the epoch end with the best top-1 on it is kept, and named by "
        "checkpoints/best.json (holdout, if it is one of the --eval-sets)",
    )
    log_steps: int = setting(10, "optimizer steps between lines in log.jsonl", range=_FROM_1)
