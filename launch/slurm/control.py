"""What is done to jobs: requeued, cancelled, signalled, made eligible. Each is repeated where the controller's answer
was lost, after a look whether it was carried out."""

from __future__ import annotations

from collections.abc import Sequence

from launch.slurm.client import PATIENCE_S, SlurmError, SlurmUnavailable, ask, carry_out, show_job
from launch.slurm.queue import queue
from launch.slurm.states import is_completing, is_pending, is_running

_GONE = ("Invalid job id", "already completing or completed", "already finished")


def requeue(job: str, *, patience_s: float = PATIENCE_S) -> None:
    """Put a job that runs back into the queue; it keeps its id. Called from within the job, it ends this process soon.

    Raises:
        SlurmUnavailable: nobody answers within ``patience_s``.
        SlurmError: Slurm refuses.
    """
    before = _restarts(show_job(job, patience_s=patience_s))

    def is_done() -> bool:
        now = show_job(job, patience_s=0)
        return _restarts(now) > before or is_pending(now.get("JobState", ""))

    carry_out("scontrol", "requeue", job, is_done=is_done, patience_s=patience_s)


def cancel(*jobs: str, signal: str | None = None, patience_s: float = PATIENCE_S) -> None:
    """End jobs for good, or send a signal to their ranks (not to their batch scripts). Jobs that are gone by now are
    left alone.

    Raises:
        SlurmUnavailable: nobody answers within ``patience_s``.
        SlurmError: Slurm refuses: they are another user's.
    """

    if not jobs:
        return
    before = queue(jobs, patience_s=patience_s) if signal else {}

    def is_done() -> bool:
        left = queue(jobs, patience_s=0)
        if signal is None:
            return all(is_completing(job.state) for job in left.values())
        # It cannot be seen whether a signal has arrived. Ranks take one that comes twice for one; a job that has been
        # requeued since must not get it.
        return not any(
            is_running(job.state) and id in before and job.restarts == before[id].restarts for id, job in left.items()
        )

    try:
        options = (f"--signal={signal}",) if signal else ()
        carry_out("scancel", *options, *jobs, is_done=is_done, patience_s=patience_s)
    except SlurmUnavailable:
        raise
    except SlurmError as error:
        if "denied" in str(error) or not any(words in str(error) for words in _GONE):
            raise


def start_now(job: str, *, patience_s: float = PATIENCE_S) -> None:
    """Make a job that waits for its begin time eligible at once: a requeued job is held for about two minutes.

    Raises:
        SlurmError: Slurm refuses, or nobody answers.
    """

    def is_done() -> bool:
        return not is_pending(show_job(job, patience_s=0).get("JobState", ""))

    carry_out("scontrol", "update", f"jobid={job}", "StartTime=now", is_done=is_done, patience_s=patience_s)


def leave_out(job: str, nodes: Sequence[str], *, patience_s: float = PATIENCE_S) -> None:
    """Keep a job that waits from these nodes, and from no others.

    Raises:
        SlurmError: Slurm refuses, or nobody answers.
    """
    ask("scontrol", "update", f"jobid={job}", f"ExcNodeList={','.join(nodes)}", patience_s=patience_s)


def _restarts(record: dict[str, str]) -> int:
    return int(record.get("Restarts") or 0)
