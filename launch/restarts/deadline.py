"""When a start of a job stops by itself, to save its work before the time limit."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping

from launch.slurm.client import SlurmError, show_job
from launch.slurm.texts import seconds

_PATIENCE_S = 10.0
_MARGIN_S = 180.0


def stop_time(limit_min: float | None, slurm_job: str | None) -> float:
    """The stop time on the clock of time.monotonic(). It is infinite if there is no limit or the limit is unknown; then
    only Slurm's USR2 stops the job in time.

    Args:
        limit_min: the time limit; None if there is none, or it is the partition's default.
        slurm_job: job to ask Slurm about if ``limit_min`` is None; None: do not ask.
    """
    if limit_min is not None:
        return time.monotonic() + 60 * limit_min - margin_s(60 * limit_min)
    if slurm_job is None:
        return math.inf
    try:
        limit_s, left_s = limit_and_rest(show_job(slurm_job, patience_s=_PATIENCE_S))
    except (SlurmError, ValueError):  # a container may have no scontrol; Slurm sets this variable since 23.02
        end = os.environ.get("SLURM_JOB_END_TIME", "")
        limit_s = left_s = int(end) - time.time() if end.isdigit() and int(end) else math.inf
    return time.monotonic() + left_s - margin_s(limit_s) if math.isfinite(left_s) else math.inf


def margin_s(limit_s: float) -> float:
    """Time reserved before the limit for a step and a checkpoint."""
    return min(_MARGIN_S, 0.1 * limit_s)


def limit_and_rest(job: Mapping[str, str]) -> tuple[float, float]:
    """The time limit of a running job and what is left of it, in seconds; infinity if there is none.

    Args:
        job: fields of `scontrol show job`.

    Raises:
        ValueError: a field is missing or invalid.
    """
    limit = job.get("TimeLimit", "")
    if limit == "Partition_Limit":  # shown for a partition without a limit
        return math.inf, math.inf
    return seconds(limit), seconds(limit) - seconds(job.get("RunTime", ""))
