"""Finds run folders: what a command is given may be runs, or folders of runs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from cfmask.errors import UserError, did_you_mean_path
from cfmask.evaluation_spec import Evaluation
from cfmask.runs import RunFolder

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
            raise UserError(
                f"{path} is neither a run folder nor a folder of runs: it has no recipe.json, nor have its folders. "
                "Check the path."
            )
        for each in found:
            runs.setdefault(each.resolve(), RunFolder(each))
    return list(runs.values())


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
