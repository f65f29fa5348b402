"""The progress and the accuracy of a run, from its log."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from cfmask.checkpoint.best import EpochEnd, epoch_ends
from cfmask.checkpoint.state import is_percent
from cfmask.evaluation_spec import Evaluation
from cfmask.log_lines import top1_of
from cfmask.recipe import Recipe
from cfmask.runs import RunFolder
from cfmask.runtime.jsonl import read_lines, read_object

_TAILS = (1 << 14, 1 << 17)
"""Bytes at the end of the log in which lines with a rate are searched. Few are enough, unless other lines are long."""


def progress_of(
    run: RunFolder, attempts: Sequence[dict[str, Any]] | None = None
) -> tuple[dict[str, Any], float | None]:
    """The last line of the log that has a rate, or {}; and the seconds to the end at the mean rate of the lines that
    the latest start has logged, or None. A start first cuts the log back to its checkpoint. Until then, the log is
    older than the record of the start, and its lines are of earlier starts.

    Args:
        attempts: the lines of attempts.jsonl, if they are known.

    Raises:
        OSError: the log cannot be read.
    """
    log = next(filter(None, ([x for x in read_lines(run.log, tail=size) if _whole(x)] for size in _TAILS)), [])
    attempts = read_lines(run.attempts) if attempts is None else attempts
    began = attempts[-1].get("from_step") if attempts else 0
    lines = [line for line in log if line["samples_per_s"] > 0 and isinstance(began, int) and line["step"] > began]
    if not lines or (attempts and run.log.stat().st_mtime_ns < run.attempts.stat().st_mtime_ns):
        return log[-1] if log else {}, None
    mean = len(lines) / sum(1 / line["samples_per_s"] for line in lines)
    return log[-1], lines[-1]["eta_s"] * lines[-1]["samples_per_s"] / mean


def _whole(line: dict[str, Any]) -> bool:
    return all(isinstance(line.get(name), int | float) for name in ("step", "total_steps", "samples_per_s", "eta_s"))


def evaluations(run: RunFolder, work: Recipe | Evaluation | None, *, finished: bool) -> list[EpochEnd]:
    """The evaluations at epoch ends in the log; of a finished run whose log is lost, the last one; of a finished
    evaluation, the results of its model, or of the chosen one (as of epoch 0). Raises OSError."""
    found = epoch_ends(run.log) if isinstance(work, Recipe) else []
    if found or not finished or work is None:
        return found
    with suppress(KeyError, IndexError, TypeError, ValueError, AttributeError):  # results that were changed by hand
        results = read_object(run.results) or {}
        if isinstance(work, Recipe):
            step, epoch, top1 = results["step"], work.optim.total_epochs, top1_of(results)
        else:
            models = results["models"]
            [model] = [models[results["chosen"]]] if "chosen" in results else models
            step, epoch, top1 = 0, 0, top1_of(model)
        found = [EpochEnd(step, epoch, {name: float(value) for name, value in top1.items() if is_percent(value)})]
    return found
