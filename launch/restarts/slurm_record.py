"""What Slurm says about the job that this process is part of: whether it was preempted, and when it will be killed."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from launch.slurm.client import SlurmError, SlurmUnavailable, ask, show_job, version
from launch.slurm.site import read_config
from launch.slurm.states import is_running
from launch.slurm.texts import parse_records, seconds

logger = logging.getLogger(__name__)

REQUEUES_PREEMPTED = (24, 5)
"""The first version of Slurm that requeues a preempted job which ends within its grace time."""
_KILL_WAIT_S = 30.0
"""Slurm's default of KillWait, the time between TERM and KILL for a job that it ends."""


@dataclass(frozen=True)
class JobRecord:
    """A job that runs, or that ended a moment ago."""

    state: str
    """As `scontrol show job` names it; "" if Slurm no longer knows the job."""
    preempted: bool = False
    """It was chosen for preemption, and is in its grace time."""
    slurm_requeues: bool = False
    """If it is preempted, Slurm requeues it when its batch script ends."""
    end_time: float | None = None
    """Unix time at which Slurm kills it or has ended it; for a preempted job, the end of its grace time."""

    @classmethod
    def of(cls, shown: Mapping[str, str], *, slurm: tuple[int, int], preempt_mode: str) -> JobRecord:
        """
        Args:
            shown: fields of `scontrol show job`.
            slurm: version of Slurm, such as (22, 5).
            preempt_mode: of the job's partition or QOS, such as "REQUEUE", "GANG,REQUEUE" or "CANCEL".
        """
        return cls(
            state=shown.get("JobState", ""),
            preempted=_unix_time(shown.get("PreemptTime")) is not None,
            slurm_requeues=slurm >= REQUEUES_PREEMPTED
            and "REQUEUE" in preempt_mode.upper()
            and shown.get("Requeue") != "0",
            end_time=_unix_time(shown.get("EndTime")),
        )

    @property
    def is_live(self) -> bool:
        """Whether the job runs, and Slurm has not begun to end or requeue it."""
        return is_running(self.state)


def _unix_time(text: str | None) -> float | None:
    """Converts 2026-11-24T12:00:00 in local time; None for "None", "N/A" and "Unknown"."""
    try:
        return datetime.fromisoformat(text or "").timestamp()
    except ValueError:
        return None


def slurm_record(job: str, *, patience_s: float = 10.0) -> JobRecord | None:
    """The record of a job; None if Slurm does not answer.

    Raises:
        SlurmError: Slurm's commands fail for another reason.
    """
    try:
        shown = show_job(job, patience_s=patience_s)
        number = version(patience_s=patience_s)
        record = JobRecord.of(shown, slurm=number, preempt_mode="REQUEUE")
        if record.preempted and record.slurm_requeues:
            return JobRecord.of(shown, slurm=number, preempt_mode=_preempt_mode(shown, patience_s))
        return record
    except SlurmError as error:
        logger.warning(f"the state of job {job} cannot be read from Slurm: {error}")
        if isinstance(error, SlurmUnavailable):
            return None
        raise


def _preempt_mode(shown: Mapping[str, str], patience_s: float) -> str:
    """PreemptMode of the job's QOS or partition, whichever PreemptType names."""
    config = read_config(patience_s=patience_s)
    default = config.get("PreemptMode", "")
    try:
        if config.get("PreemptType") == "preempt/qos":
            query = ("sacctmgr", "--noheader", "--parsable2", "show", "qos", shown.get("QOS", ""), "format=PreemptMode")
            mode = ask(*query, patience_s=0).strip()
            return default if mode.lower() in ("", "cluster") else mode
        show_partition = ("scontrol", "--oneliner", "show", "partition", shown.get("Partition", ""))
        partition = ask(*show_partition, patience_s=patience_s)
        return next(iter(parse_records(partition, first="PartitionName")), {}).get("PreemptMode", default)
    except SlurmError:  # no database, or the partition was removed
        return default


def seconds_left(job: JobRecord | None, now: float, *, kill_wait_s: float = _KILL_WAIT_S) -> float:
    """Seconds until Slurm kills the job's processes. Without an answer of Slurm, the least that is possible.

    Args:
        now: Unix time.
    """
    if job is None or not job.state:
        return kill_wait_s
    end = now if job.end_time is None else job.end_time
    if not job.is_live:  # TERM was sent at its end time
        return max(0.0, min(kill_wait_s, end + kill_wait_s - now))
    return max(0.0, end - now) if job.end_time is not None else float("inf")


def read_kill_wait_s() -> float:
    """The site's KillWait, or Slurm's default."""
    try:
        return seconds(read_config(patience_s=0)["KillWait"])
    except (SlurmError, ValueError, KeyError):
        return _KILL_WAIT_S
