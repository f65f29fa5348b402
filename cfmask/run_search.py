"""Finds what the arguments of a command mean: run folders among runs and folders of runs, the model of a path."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from cfmask.checkpoint.best import POINTER
from cfmask.checkpoint.state import list_checkpoints
from cfmask.errors import UserError, did_you_mean_path
from cfmask.evaluation_spec import Evaluation
from cfmask.runs import RunFolder
from cfmask.runtime.patience import patiently

_MARKS = ("recipe.json", "evaluation.json", "attempts.jsonl", "log.jsonl", "checkpoints")
"""A folder with one of these is a run folder."""


def find_runs(paths: Sequence[Path]) -> list[RunFolder]:
    """The run folders among the paths, and those directly inside paths that are folders of runs; each once.

    Args:
        paths: without any, "runs".

    Raises:
        UserError: a path has none, or cannot be read.
    """
    runs: dict[Path, RunFolder] = {}
    for path in paths or [Path("runs")]:
        try:
            if _is_run(path):
                found = [path]
            else:
                found = sorted(child for child in path.iterdir() if child.is_dir() and _may_be_run(child))
        except OSError as error:
            hint = "Check the path." if paths else "Name run folders, or change to the directory of the submission."
            near = did_you_mean_path(path) if paths else ""
            raise UserError(f"{path} cannot be read: {error.strerror}. {hint}{near}") from error
        if not found:
            deeper = ", ".join(_folders_of_runs(path))
            raise UserError(
                f"{path} is neither a run folder nor a folder of runs: it has no recipe.json, nor have its folders. "
                + (f"It has folders of runs: {deeper}." if deeper else "Check the path.")
            )
        for each in found:
            runs.setdefault(each.resolve(), RunFolder(each))
    return list(runs.values())


def _folders_of_runs(folder: Path) -> list[str]:
    """Those in a folder, such as reproductions/ViT-B-32-quickgelu; without those that cannot be read."""
    found = set()
    for run in folder.glob("*/*/"):
        with suppress(OSError):
            if _is_run(run):
                found.add(str(run.parent))
    return sorted(found)


def is_evaluation(run: RunFolder) -> bool:
    """Whether a run folder is of an evaluation; false if it has neither a recipe nor an evaluation, or one that cannot
    be read."""
    with suppress(UserError, OSError):
        return run.has_work() and isinstance(run.work(), Evaluation)
    return False


def _is_run(path: Path) -> bool:
    return any((path / mark).exists() for mark in _MARKS)


def _may_be_run(path: Path) -> bool:
    """Like ``_is_run``; a folder that cannot be read may be one, and its status says that it cannot be read."""
    try:
        return _is_run(path)
    except OSError:
        return True


def find_model(path: str | Path) -> Path:
    """The model file for a path: a model file, a checkpoint folder, a run folder (its trained model, or while it is not
    finished, that of its latest checkpoint), or RUN/checkpoints/best.json (the best checkpoint's model).

    Raises:
        UserError: there is no such model file.
    """
    path = Path(path)
    if path.name == POINTER:
        # Absolute, because "best.json" alone has no parents; not resolved, because RUN/checkpoints may be a link.
        folder = Path(os.path.abspath(path)).parent
        run = RunFolder(folder.parent)
        if folder != run.checkpoints:
            raise UserError(
                f"{path} is not in the folder checkpoints of a run. Give RUN/checkpoints/best.json, or the model file "
                "itself."
            )
        return run.best().model
    if path.is_file():
        return path
    if (path / "model.safetensors").is_file():
        return path / "model.safetensors"
    checkpoints = path / "checkpoints"
    for each in patiently(lambda: list_checkpoints(checkpoints), str(checkpoints)) if checkpoints.is_dir() else ():
        if (each / "model.safetensors").is_file():
            return each / "model.safetensors"
    raise UserError(
        f"{path} is neither a model file nor a run or checkpoint folder with a model in it. A model file is "
        "RUN/model.safetensors, RUN/initial.safetensors or "
        f"RUN/checkpoints/step-…/model.safetensors.{did_you_mean_path(path)}"
    )
