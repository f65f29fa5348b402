"""The progress of a run, from the end of its log."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cfmask.runs import RunFolder
from cfmask.runtime.jsonl import read_lines


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
    log = [line for line in read_lines(run.log, tail=1 << 16) if _whole(line)]
    attempts = read_lines(run.attempts) if attempts is None else attempts
    began = attempts[-1].get("from_step") if attempts else 0
    lines = [line for line in log if line["samples_per_s"] > 0 and isinstance(began, int) and line["step"] > began]
    if not lines or (attempts and run.log.stat().st_mtime_ns < run.attempts.stat().st_mtime_ns):
        return log[-1] if log else {}, None
    mean = len(lines) / sum(1 / line["samples_per_s"] for line in lines)
    return log[-1], lines[-1]["eta_s"] * lines[-1]["samples_per_s"] / mean


def _whole(line: dict[str, Any]) -> bool:
    return all(isinstance(line.get(name), int | float) for name in ("step", "total_steps", "samples_per_s", "eta_s"))
