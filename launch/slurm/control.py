"""Requeues, cancels, signals and updates jobs. If the controller's answer is lost, a command is repeated only after a
check whether it was carried out."""

from __future__ import annotations

from collections.abc import Sequence

from launch.slurm.client import PATIENCE_S, SlurmError, SlurmUnavailable, ask, carry_out, show_job
from launch.slurm.queue import queue
from launch.slurm.states import is_completing, is_pending, is_running

_GONE = ("Invalid job id", "already completing or completed", "already finished")


def requeue(job: str, *, patience_s: float = PATIENCE_S) -> None:
    """Put a running job back into the queue; it keeps its id. If this process is part of the job, Slurm ends it soon.

    Raises:
        SlurmUnavailable: There is no answer within ``patience_s``.
        SlurmError: Slurm refuses.
    """
    before = _restarts(show_job(job, patience_s=patience_s))

    def is_done() -> bool:
        now = show_job(job, patience_s=0)
        return _restarts(now) > before or is_pending(now.get("JobState", ""))

    carry_out("scontrol", "requeue", job, is_done=is_done, patience_s=patience_s)


def cancel(*jobs: str, signal: str | None = None, patience_s: float = PATIENCE_S) -> None:
    """End jobs for good. Jobs that have ended are ignored.

    Args:
        signal: Send this signal to the ranks instead (not to the batch script).

    Raises:
        SlurmUnavailable: There is no answer within ``patience_s``.
        SlurmError: Slurm refuses, as for jobs of another user.
    """
    if not jobs:
        return
    before = queue(jobs, patience_s=patience_s) if signal else {}

    def is_done() -> bool:
        left = queue(jobs, patience_s=0)
        if signal is None:
            return all(is_completing(job.state) for job in left.values())
        # Slurm does not show whether a signal has arrived. Ranks treat a repeated one as one, but a job that has been
        # requeued in the meantime must not get it.
        return not any(
            is_running(job.state) and id in before and job.restarts == before[id].restarts for id, job in left.items()
        )

    try:
        options = (f"--signal={signal}",) if signal else ()
        carry_out("scancel", *options, *jobs, is_done=is_done, patience_s=patience_s)
    except SlurmUnavailable:
        raise
    except SlurmError as error:
        if "denied" in str(error) or not any(message in str(error) for message in _GONE):
            raise


def start_now(job: str, *, patience_s: float = PATIENCE_S) -> None:
    """Make a requeued job eligible at once; Slurm would hold it for about two minutes.

    Raises:
        SlurmError: Slurm refuses, or does not answer.
    """

    def is_done() -> bool:
        return not is_pending(show_job(job, patience_s=0).get("JobState", ""))

    carry_out("scontrol", "update", f"jobid={job}", "StartTime=now", is_done=is_done, patience_s=patience_s)


def exclude_nodes(job: str, nodes: Sequence[str], *, patience_s: float = PATIENCE_S) -> None:
    """Replace the list of nodes that a waiting job excludes.

    Raises:
        SlurmError: Slurm refuses, or does not answer.
    """
    ask("scontrol", "update", f"jobid={job}", f"ExcNodeList={','.join(nodes)}", patience_s=patience_s)


def _restarts(record: dict[str, str]) -> int:
    return int(record.get("Restarts") or 0)
