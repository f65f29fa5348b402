"""Where an evaluated model comes from: its run, its step, and what chose that step. results.json keeps it for each
model of an evaluation, and tables print it."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cfmask.checkpoint.state import list_checkpoints, step_of
from cfmask.errors import UserError
from cfmask.evaluation_spec import Evaluation
from cfmask.recipe import Recipe
from cfmask.runs import RunFolder
from cfmask.runtime.jsonl import read_object

LAST, BEST = "last", "best"
CHOICES = (LAST, BEST)
"""Which checkpoint of a run is meant by its folder: that of its last step, or the best on its held-out set."""


@dataclass(frozen=True)
class ModelOrigin:
    """The source of a model file.

    file: the model file.
    run: the training run that it is of; None: a file of no run, or a model that an evaluation made.
    step: the optimizer step that it is of.
    chosen: what chose this step, in words: "last", "best on holdout" …
    chosen_on: the set that chose it, if one did.
    top1: its accuracy there, in percent.
    """

    file: str
    run: str | None = None
    step: int | None = None
    chosen: str = "a file of no run"
    chosen_on: str | None = None
    top1: float | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ModelOrigin:
        known: dict[str, Any] = {name: values[name] for name in cls.__dataclass_fields__ if name in values}
        return cls(**known)


def settled(model: Path) -> Path:
    """The path of a model file without links and relative parts, except links inside its run folder (checkpoints on
    another disk): the run is known by where the file lies.

    Args:
        model: a file, as ``find_model`` gives it.
    """
    file = Path(os.path.abspath(model))
    run = origin_of(file).run
    return file.resolve() if run is None else Path(run).resolve() / file.relative_to(run)


def origin_of(model: str | Path) -> ModelOrigin:
    """What is known of a model file by where it lies. Where the run's records cannot be read, less is known.

    Args:
        model: a file, as ``find_model`` gives it.
    """
    path = Path(model)
    inside = path.parent.parent.name == "checkpoints" and re.fullmatch(r"step-[0-9]+", path.parent.name) is not None
    run = RunFolder(path.parents[2] if inside else path.parent)
    try:
        work = run.work() if run.has_work() else None
    except UserError:
        work = None
    if isinstance(work, Evaluation):
        return ModelOrigin(str(path), chosen=f"made by {work.make}")
    if work is None:
        return ModelOrigin(str(path))
    if path == run.final:
        step = (read_object(run.results) or {}).get("step")
        return ModelOrigin(str(path), str(run.root), step, LAST)
    if path == run.initial:
        return ModelOrigin(str(path), str(run.root), 0, "where training starts")
    if not inside:
        return ModelOrigin(str(path), str(run.root), None, "a file in the run folder")
    return _of_checkpoint(path, run)


def _of_checkpoint(path: Path, run: RunFolder) -> ModelOrigin:
    so_far = "" if run.results.exists() else " so far"
    step = step_of(path.parent)
    try:
        best = run.best(verify=False)
        if best.model == path:
            return ModelOrigin(str(path), str(run.root), step, f"best on {best.on}{so_far}", best.on, best.top1)
    except UserError:
        pass
    last = False
    with contextlib.suppress(OSError):
        last = step == max(map(step_of, list_checkpoints(path.parent.parent)), default=step)
    return ModelOrigin(str(path), str(run.root), step, f"{LAST}{so_far}" if last else "named by its path")


def is_training_run(path: str | Path) -> bool:
    """Whether a path is the folder of a training run, whose checkpoint is open to choice."""
    run = RunFolder(Path(path))
    return Path(path).is_dir() and run.has_work() and isinstance(run.work(), Recipe)


def describe(origins: Iterable[ModelOrigin], names: Mapping[str, str]) -> str:
    """A sentence for a table: which checkpoints its figures are of; "" if none is of a training run.

    Args:
        names: what the table calls a model, by its file.
    """
    parts = []
    for origin in origins:
        if origin.run is not None:
            accuracy = "" if origin.top1 is None else f" ({origin.top1:.2f} %)"
            step = "an unknown step" if origin.step is None else f"step {origin.step}"
            parts.append(f"{names.get(origin.file, Path(origin.run).name)}: {step}, {origin.chosen}{accuracy}")
    return f"Checkpoints: {'; '.join(parts)}." if parts else ""


def checkpoint_note(rows: Mapping[str, Sequence[ModelOrigin]]) -> str:
    """A sentence for a table of several seeds: which checkpoints its rows are of; "" if it is not known of any.

    Args:
        rows: by label, the models of training runs that a row is made of, one a seed.
    """
    parts = []
    for label, origins in rows.items():
        steps: dict[str, list[str]] = {}
        for origin in origins:
            steps.setdefault(origin.chosen, []).append("unknown" if origin.step is None else f"{origin.step:,}")
        chosen = "; ".join(f"{how}, step {', '.join(found)}" for how, found in steps.items())
        if chosen:
            parts.append(f"{label}: {chosen}")
    return f"Checkpoints by row and seed — {'. '.join(parts)}." if parts else ""


def short_names(paths: Sequence[str | Path]) -> list[str]:
    """Names that tell models apart: their paths without the parts that all have in common at either end."""
    parts = [list(Path(path).absolute().parts) for path in paths]
    if len(parts) < 2:
        return [str(path) for path in paths]
    while len({each[0] for each in parts}) == 1 and min(map(len, parts)) > 1:
        parts = [each[1:] for each in parts]
    while len({each[-1] for each in parts}) == 1 and min(map(len, parts)) > 1:
        parts = [each[:-1] for each in parts]
    return ["/".join(each) for each in parts]
