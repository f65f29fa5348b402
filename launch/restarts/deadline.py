"""When a start of a job stops by itself, early enough to save its work before the time limit."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping

from launch.slurm.client import SlurmError, show_job
from launch.slurm.texts import seconds

AT_TIME_LIMIT = ", at the time limit"
"""Appended to the recorded reason of a stop, to tell it from a preemption."""
_PATIENCE_S = 10.0
_MARGIN_S = 180.0


def stop_time(limit_min: float | None, slurm_job: str | None) -> float:
    """When to stop, on the clock of time.monotonic(). Infinity without a known limit: then Slurm's USR2 is the warning.

    Args:
        limit_min: None if there is no limit, or the partition's default applies.
        slurm_job: The job to ask Slurm about if ``limit_min`` is None; None not to ask.
    """
    if limit_min is not None:
        return time.monotonic() + 60 * limit_min - _margin_s(60 * limit_min)
    if slurm_job is None:
        return math.inf
    try:
        limit_s, left_s = _limit_and_rest(show_job(slurm_job, patience_s=_PATIENCE_S))
    except (SlurmError, ValueError):  # no scontrol, as in a container; Slurm 23.02 and later also set a variable
        end = os.environ.get("SLURM_JOB_END_TIME", "")
        limit_s = left_s = int(end) - time.time() if end.isdigit() and int(end) else math.inf
    return time.monotonic() + left_s - _margin_s(limit_s) if math.isfinite(left_s) else math.inf


def _margin_s(limit_s: float) -> float:
    """Time before the limit that is reserved for a step and a checkpoint."""
    return min(_MARGIN_S, 0.1 * limit_s)


def _limit_and_rest(job: Mapping[str, str]) -> tuple[float, float]:
    """The time limit of a running job and the time that is left, in seconds; infinity without a limit.

    Args:
        job: The record that `scontrol show job` prints.

    Raises:
        ValueError: The record does not say.
    """
    limit = job.get("TimeLimit", "")
    if limit == "Partition_Limit":  # shown for a job without a limit of its own
        return math.inf, math.inf
    return seconds(limit), seconds(limit) - seconds(job.get("RunTime", ""))
