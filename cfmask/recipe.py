"""The Recipe: frozen dataclasses that define a training run completely.

Defaults are those of appendix A.1 of the paper (Xiao et al., CVPR 2023). This module does not import torch, so that a
launcher can parse, check and print a recipe at once.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, fields
from typing import Any

from cfmask.errors import UserError, did_you_mean
from cfmask.record import Record
from cfmask.settings import AUTO, Data, Method, Model, Optim, Run
from cfmask.urls import is_remote

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
"""By mask and fill: the threshold of object and context masks, the masking rate of random masks."""
GAMMA = {"kd": 30.0, "wise-kd": 1.0}
"""Weight of logit distillation by method: the authors' code has 30 for FT + KD (--w_distill); the paper has 1 for
WiSE-KD (appendix A.3)."""


@dataclass(frozen=True)
class Recipe(Record):
    """Everything that decides a run's result."""

    model: Model = Model()
    method: Method = Method()
    data: Data = Data()
    optim: Optim = Optim()
    run: Run = Run()

    def resolved(self) -> Recipe:
        """This recipe with the paper's values for settings that were not given, checked.

        Raises:
            UserError: a value is out of range, settings contradict each other, or a setting has no effect.
        """
        method = resolve_method(self.method)
        optim = _resolve_optim(self.optim, method)
        best_on = self.run.best_on or ("holdout" if "holdout" in self.data.eval_sets else None)
        return dataclasses.replace(
            self, method=method, optim=optim, run=dataclasses.replace(self.run, best_on=best_on)
        ).checked()

    def checked(self) -> Recipe:
        """This recipe. Raises UserError if its values are out of range or contradict each other."""
        o, r, d = self.optim, self.run, self.data
        for group in (self.model, self.method, d, o, r):
            _check_ranges(group)
        if isinstance(o.micro_batches, str) and o.micro_batches != AUTO:
            raise UserError(f"--micro-batches is {o.micro_batches!r}; it must be a number or {AUTO}.")
        if o.batch_size % o.lanes:
            near = [n for n in range(1, min(o.batch_size, 64) + 1) if o.batch_size % n == 0]
            raise UserError(
                f"--batch-size {o.batch_size} is not a multiple of --lanes {o.lanes}, but every lane gives the same "
                f"number of samples to a batch. Lanes that divide this batch: {', '.join(map(str, near))}."
            )
        if self.method.fill == "multi-fill" and o.batch_size // o.lanes < 2:
            raise UserError(
                f"multi-fill takes patches from other images of a lane, but with --batch-size {o.batch_size} and "
                f"--lanes {o.lanes} a lane has a single image. Use at most {o.batch_size // 2} lanes."
            )
        if r.cuda_graphs == "on" and r.compile:
            raise UserError("--cuda-graphs on and --compile exclude each other. Leave one out.")
        if d.segmentation is not None and not self.method.by_cam:
            raise UserError(
                f"--segmentation would do nothing: it is compared with the masks of a CAM, and {self.method.row} has "
                "none. Leave it out, or choose --mask object or context."
            )
        if not is_remote(d.shards) and (d.cache_dir is not None or d.cache_gb is not None):
            raise UserError("--cache-dir and --cache-gb would do nothing: --shards is a folder, which is not cached.")
        if r.eval_steps is not None and not d.eval_sets:
            raise UserError(f"--eval-steps {r.eval_steps} would do nothing without --eval-sets. Name sets to evaluate.")
        if r.best_on is not None and r.best_on not in d.eval_sets:
            sets = f"({', '.join(d.eval_sets) or 'none are given'})"
            similar = did_you_mean(r.best_on, d.eval_sets)
            raise UserError(
                f"--best-on {r.best_on} would do nothing: it is not one of the --eval-sets {sets}.{similar}"
            )
        if len(set(d.eval_sets)) != len(d.eval_sets):
            raise UserError(f"--eval-sets names a set twice: {' '.join(d.eval_sets)}.")
        return self

    def of_weights(self) -> dict[str, str | int | float | None]:
        """The settings that decide the weights by more than rounding, by "group.name". Model and ensemble are not
        included, because a started run has them as files, nor is the training set, which has a digest."""
        method, optim, run = (dataclasses.asdict(group) for group in (self.method, self.optim, self.run))
        for name in ("micro_batches", "micro_batches_for", "max_skipped_steps"):
            del optim[name]
        del method["ensemble"]
        run = {name: run[name] for name in ("seed", "precision")}
        groups = {"method": method, "optim": optim, "run": run}
        return {f"{group}.{name}": value for group, values in groups.items() for name, value in values.items()}

    def with_choice_of(self, recorded: Recipe) -> Recipe:
        """This recipe, with the number of micro-batches that auto has been resolved to in ``recorded``."""
        if self.optim.micro_batches != AUTO or recorded.optim.micro_batches_for is None:
            return self
        choice = {name: getattr(recorded.optim, name) for name in ("micro_batches", "micro_batches_for")}
        return dataclasses.replace(self, optim=dataclasses.replace(self.optim, **choice))

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """The inverse of ``to_json``.

        Raises:
            UserError: the text is not a recipe, or has settings that this version does not know.
        """
        try:
            raw = json.loads(text)
            if not isinstance(raw, dict):
                raise TypeError("it holds no settings")
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


def resolve_method(method: Method) -> Method:
    """The method with the paper's values for settings that were not given.

    Raises:
        UserError: a setting has no effect with this method, or wise-kd has no ensemble.
    """
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
            "beta_relative": features,
            "gamma": logits,
            "temperature": logits,
            "ensemble": method.name == "wise-kd",
        },
        f"--method {method.name}"
        + (f" --mask {method.mask}" if method.mask else "")
        + (f" --cam {method.cam}" if method.cam else ""),
    )
    if None not in (method.beta, method.beta_relative):
        raise UserError("--beta and --beta-relative are weights of the same loss. Leave one out.")
    if method.name == "wise-kd" and method.ensemble is None:
        raise UserError(
            "--method wise-kd learns from a WiSE-FT ensemble: give it with --ensemble FILE. python tools/wise_ft.py "
            "ZERO FINE --alphas 0.5 --out DIR makes one of a zero-shot and a fine-tuned model, DIR/model.safetensors."
        )
    mask = (method.mask or "object") if method.distils else None
    fill = (method.fill or "single-fill") if masked else None
    value = PAPER_VALUES[mask, fill] if mask is not None and fill is not None else None
    cam = (method.cam or "relevance") if by_cam else None
    return dataclasses.replace(
        method,
        mask=mask,
        fill=fill,
        threshold=_default(method.threshold, value) if by_cam else None,
        rate=_default(method.rate, value) if mask == "random" else None,
        cam=cam,
        first_block=(method.first_block or 0) if cam == "relevance" else None,
        beta=_default(method.beta, 30.0) if features and method.beta_relative is None else None,
        gamma=_default(method.gamma, GAMMA[method.name]) if logits else None,
        temperature=_default(method.temperature, 10.0) if logits else None,
    )


def _resolve_optim(optim: Optim, method: Method) -> Optim:
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


def _flag_of(part: Any) -> str:
    return part.metadata["flag"] or "--" + part.name.replace("_", "-")


def _check_ranges(group: Any) -> None:
    for part in fields(group):
        value, allowed = getattr(group, part.name), part.metadata["range"]
        if allowed is not None and isinstance(value, int | float) and not allowed.contains(value):
            raise UserError(f"{_flag_of(part)} is {value}; it must {allowed.text}.")


def _refuse_idle(group: Any, used: dict[str, bool], under: str) -> None:
    """Refuse settings that were given although they have no effect."""
    for part in fields(group):
        if not used.get(part.name, True) and getattr(group, part.name) is not None:
            raise UserError(f"{_flag_of(part)} would do nothing with {under}. Leave it out, or choose another method.")


def _refuse_unknown(given: Any, known: Any, prefix: str = "") -> None:
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise UserError(
            f"Unknown settings in the recipe: {', '.join(prefix + name for name in unknown)}. It was written by "
            "another version of cfmask, or by hand: run the code that it was written with, or remove them."
        )
