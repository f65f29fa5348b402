"""When a start of a job stops by itself, so that it has saved its work before the time limit."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping

from launch.slurm.client import SlurmError, show_job
from launch.slurm.texts import seconds

AT_TIME_LIMIT = ", at the time limit"
"""What a start records behind why it has stopped, to tell it from one that was preempted."""
_PATIENCE_S = 10.0
_MARGIN_S = 180.0


def stop_time(limit_min: float | None, slurm_job: str | None) -> float:
    """On the clock of time.monotonic(); infinity if there is no limit, or nobody knows it: Slurm's USR2 remains.

    Args:
        limit_min: None: there is none, or it is the partition's default.
        slurm_job: the job to ask Slurm about where the limit is not known; None: do not ask.
    """
    if limit_min is not None:
        return time.monotonic() + 60 * limit_min - margin_s(60 * limit_min)
    if slurm_job is None:
        return math.inf
    try:
        limit_s, left_s = limit_and_rest(show_job(slurm_job, patience_s=_PATIENCE_S))
    except (SlurmError, ValueError):  # a container may have no scontrol; Slurm 23.02 and later say it here as well
        end = os.environ.get("SLURM_JOB_END_TIME", "")
        left_s = int(end) - time.time() if end.isdigit() and int(end) else math.inf
        limit_s = left_s
    return time.monotonic() + left_s - margin_s(limit_s) if math.isfinite(left_s) else math.inf


def margin_s(limit_s: float) -> float:
    """Time kept free before the limit, for a step and a checkpoint."""
    return min(_MARGIN_S, 0.1 * limit_s)


def limit_and_rest(job: Mapping[str, str]) -> tuple[float, float]:
    """The time limit of a job that runs, and what is left of it, in seconds; infinity: there is none.

    Args:
        job: as `scontrol show job` has it.

    Raises:
        ValueError: it does not say.
    """
    limit = job.get("TimeLimit", "")
    if limit == "Partition_Limit":  # of one that has no limit of its own
        return math.inf, math.inf
    return seconds(limit), seconds(limit) - seconds(job.get("RunTime", ""))
