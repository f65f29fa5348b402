"""The origin of an evaluated model: its run, its step, and what chose that step. results.json has it for each model,
and tables print it."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cfmask.checkpoint.state import list_checkpoints, step_of
from cfmask.errors import UserError
from cfmask.evaluation_spec import Evaluation, ZeroShot
from cfmask.models.head import read_info
from cfmask.presets import method_name
from cfmask.recipe import Recipe
from cfmask.runs import RunFolder
from cfmask.runtime.jsonl import read_object

LAST, BEST = "last", "best"
ZERO_SHOT = ZeroShot.make
CHOICES = (LAST, BEST)
"""The checkpoint that a run's folder stands for: that of the last step, or the best on the held-out set."""


@dataclass(frozen=True)
class ModelOrigin:
    """The origin of a model file."""

    file: str
    """Path of the model file."""
    run: str | None = None
    """Folder of its training run; None: it is of no run, or an evaluation made it."""
    step: int | None = None
    """Its optimizer step."""
    chosen: str = "a file of no run"
    """What chose this step, in words: "last", "best on holdout" …"""
    chosen_on: str | None = None
    """The set on which it was chosen, if any."""
    top1: float | None = None
    """Its accuracy on that set, in percent."""
    method: str | None = None
    """What made it: the preset of its run, "zero-shot" where training starts, or the kind of its evaluation."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ModelOrigin:
        known: dict[str, Any] = {name: values[name] for name in cls.__dataclass_fields__ if name in values}
        return cls(**known)


def settled(model: Path) -> Path:
    """The absolute path of a model file, with links resolved except inside its run folder (checkpoints may be a link to
    another disk), because ``origin_of`` finds the run by the path.

    Args:
        model: a file, from ``find_model``.
    """
    file = Path(os.path.abspath(model))
    run = origin_of(file).run
    return file.resolve() if run is None else Path(run).resolve() / file.relative_to(run)


def origin_of(model: str | Path) -> ModelOrigin:
    """The origin of a model file by its path and the run's records; incomplete if these cannot be read.

    Args:
        model: a file, from ``find_model``.
    """
    path = Path(model)
    inside = path.parent.parent.name == "checkpoints" and re.fullmatch(r"step-[0-9]+", path.parent.name) is not None
    run = RunFolder(path.parents[2] if inside else path.parent)
    try:
        work = run.work() if run.has_work() else None
    except UserError:
        work = None
    if isinstance(work, Evaluation):
        return ModelOrigin(str(path), chosen=f"made by {work.make}", method=work.make)
    if work is None:
        return ModelOrigin(str(path))
    if path == run.initial:
        return ModelOrigin(str(path), str(run.root), 0, "where training starts", method=_method_of_start(path))
    if path == run.final:
        step = (read_object(run.results) or {}).get("step")
        found = ModelOrigin(str(path), str(run.root), step, LAST)
    elif inside:
        found = _of_checkpoint(path, run)
    else:
        found = ModelOrigin(str(path), str(run.root), None, "a file in the run folder")
    return replace(found, method=method_name(work))


def _method_of_start(path: Path) -> str:
    with contextlib.suppress(UserError):
        if (info := read_info(path)) and "-soup of " in info.provenance:
            return "soup"
    return ZERO_SHOT


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
    """Whether a path is the folder of a training run, and so stands for one of several checkpoints."""
    run = RunFolder(Path(path))
    return Path(path).is_dir() and run.has_work() and isinstance(run.work(), Recipe)


def checkpoint_note(rows: Mapping[str, Sequence[ModelOrigin]]) -> str:
    """A sentence for a table that names the checkpoints of its rows; "" if none is of a training run.

    Args:
        rows: by name of a row, the origins of its models, one for each seed.
    """
    said: dict[str, str] = {}
    for name, origins in rows.items():
        seeds = []
        for origin in origins:
            step = "an unknown step" if origin.step is None else f"step {origin.step:,}"
            accuracy = "" if origin.top1 is None else f" ({origin.top1:.2f} %)"
            if origin.run is not None:
                seeds.append(f"{step}, {origin.chosen}{accuracy}")
        if seeds:
            said[name] = " / ".join(seeds[:1] if len(set(seeds)) == 1 else seeds)
    if len(said) > 1 and len(set(said.values())) == 1:
        return f"Checkpoints of all trained models: {said.popitem()[1]}."
    return f"Checkpoints: {'; '.join(f'{name}: {words}' for name, words in said.items())}." if said else ""


def short_names(paths: Sequence[str | Path]) -> list[str]:
    """Short distinct names of models: their paths without the parts at either end that all have in common."""
    if len(paths) < 2:
        return [str(path) for path in paths]
    parts = [Path(path).absolute().parts for path in paths]
    most = min(map(len, parts)) - 1
    start = min(most, len(os.path.commonprefix(parts)))
    end = min(most - start, len(os.path.commonprefix([each[::-1] for each in parts])))
    return ["/".join(each[start : len(each) - end]) for each in parts]
