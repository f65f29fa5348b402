"""Derives the status of a run from its facts: a row of the table of launch/status.py, whose help lists the states."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from cfmask.log_lines import straggler_of
from launch.slurm.queue import SacctRecord, SlurmJob
from launch.slurm.states import base_and_flags, is_completing, is_pending
from launch.state import ends
from launch.state.facts import RunState, SlurmAnswers, in_queue, jobs_in_queue

ENDED = ("never started", "finished", "cancelled", "stopped", "failed", "dead")
"""States that do not change by themselves."""

_ENDS = {
    "BOOT_FAIL": "node failed",
    "CANCELLED": "scancel",
    "DEADLINE": "deadline",
    "FAILED": "its job failed",
    "NODE_FAIL": "node failed",
    "OUT_OF_MEMORY": "out of memory",
    "PREEMPTED": "preempted",
    "REQUEUED": "requeued by Slurm or an administrator",
    "TIMEOUT": "time limit",
}


@dataclass(frozen=True)
class Status:
    """A row of the table.

    job: id of the job in the queue, or pid of the controller of a local job.
    attempts: number of starts.
    next_start: when the job will probably start.
    last_end: why the latest start that has ended did.
    straggler: the slowest rank, if it slows the training down.
    waiting: number of further jobs of the run in the queue (of a chain).
    """

    run: str
    state: str
    step: int | None
    total_steps: int | None
    samples_per_s: float | None
    loss: float | None
    eta_s: float | None
    job: str | None
    attempts: int
    next_start: str | None
    last_end: str | None
    notes: tuple[str, ...]
    straggler: str | None = None
    waiting: int = 0


def status_of(run_state: RunState, slurm: SlurmAnswers) -> Status:
    job = in_queue(run_state, slurm)
    state = _state(run_state, slurm, job)
    runs = state in ("running", "cancelling") and run_state.owner is not None
    return Status(
        run=_short(run_state.run.root),
        state=state,
        step=run_state.step,
        total_steps=run_state.last.get("total_steps"),
        samples_per_s=run_state.last.get("samples_per_s"),
        loss=run_state.last.get("loss"),
        eta_s=run_state.last.get("eta_s") if runs else None,
        job=job.id if job else str(run_state.jobs.controller) if run_state.jobs.controller else None,
        waiting=max(0, len(jobs_in_queue(run_state, slurm)) - 1),
        attempts=len(run_state.attempts),
        straggler=straggler_of(run_state.last) if runs else None,
        next_start=_next_start(job) if job and is_pending(job.state) and state != "cancelling" else None,
        last_end=_last_end(run_state, slurm, state),
        notes=(*run_state.notes, *_unconfirmed(run_state)),
    )


def _unconfirmed(run_state: RunState) -> list[str]:
    if run_state.finished or not run_state.jobs.unconfirmed:
        return []
    return [
        "sbatch has not confirmed a job. If it is queued, `squeue --me --format='%i %o'` shows "
        f"{', '.join(path.name for path in run_state.jobs.unconfirmed)}"
    ]


def _state(run_state: RunState, slurm: SlurmAnswers, job: SlurmJob | None) -> str:
    if run_state.finished:
        return "finished"
    trains = _trains(run_state, slurm)
    if run_state.cancelled:
        return "cancelling" if trains or job or run_state.jobs.controller else "cancelled"
    if trains:
        return "running"
    if job and not is_pending(job.state):
        last = run_state.attempts[-1].get("job") if run_state.attempts else None
        if (run_state.ended and last == f"{job.id}-{job.restarts}") or is_completing(job.state):
            return "ending"
        return "starting" if job.state == "RUNNING" else job.state.lower()
    if run_state.jobs.controller:
        return "starting"
    if job:
        return "requeued" if job.restarts else "queued"
    return _end_state(run_state, slurm)


def _trains(run_state: RunState, slurm: SlurmAnswers) -> bool:
    """Whether a process trains. Slurm is asked because a process killed on another node looks alive for a while."""
    if run_state.owner is None:
        return False
    attempt = run_state.owner.job
    job = attempt.rpartition("-")[0] if attempt else run_state.last_job or ""
    if slurm.queue is None or job not in run_state.jobs.slurm:
        return True
    return job in slurm.queue and not is_pending(slurm.queue[job].state)


def _end_state(run_state: RunState, slurm: SlurmAnswers) -> str:
    """The state of a run without a job."""
    why = run_state.why_ended
    if slurm.queue is None and run_state.jobs.slurm and not run_state.records_its_end:
        return "unknown"
    if why:
        return "stopped" if ends.is_stopped(why) or why.startswith("not started: cancelled") else "failed"
    start = _last_start(run_state, slurm)
    if start:
        return {"CANCELLED": "stopped", "FAILED": "failed"}.get(min(base_and_flags(start.state), default=""), "dead")
    if run_state.attempts:
        return "dead"
    if not run_state.jobs.any:
        return "never started"
    return "dead" if run_state.jobs.slurm else "failed"


def _last_end(run_state: RunState, slurm: SlurmAnswers, state: str) -> str | None:
    """Why the latest start that has ended did."""
    if state == "finished":
        return ends.FINISHED
    if run_state.cancelled and state == "cancelled":
        where = f" at step {run_state.step}" if run_state.step else ""
        return f"cancelled{where} by {run_state.cancelled['by']}, {when(run_state.cancelled['when'])}"
    if run_state.ended:
        return run_state.why_ended
    if state in ("running", "starting", "cancelling") and run_state.owner:
        return run_state.attempts[-1].get("why_last_ended") if run_state.attempts else None
    if run_state.attempts:
        return explained(ends.KILLED, run_state.attempts[-1], slurm)
    start = _last_start(run_state, slurm)
    if start:
        return f"{_end_of_start(start)}, before training began"
    return "ended before training began" if state in ("failed", "dead") else None


def _last_start(run_state: RunState, slurm: SlurmAnswers) -> SacctRecord | None:
    """The last start of the latest submitted job."""
    starts = [start for start in slurm.history if run_state.jobs.slurm and start.job == run_state.jobs.slurm[-1]]
    return starts[-1] if starts else None


def explained(why: str, attempt: dict[str, Any], slurm: SlurmAnswers) -> str:
    """The reason of an end; if the start has recorded none, the one that Slurm knows."""
    if why != ends.KILLED:
        return why
    started = _local_time(attempt.get("started"))
    job = str(attempt.get("job")).rpartition("-")[0]
    for start in slurm.history:
        begin, end = _local_time(start.start), _local_time(start.end)
        if start.job == job and started and begin and begin <= started and (end is None or started <= end):
            return f"killed: {_end_of_start(start)}"
    return why


def _end_of_start(start: SacctRecord) -> str:
    word, _, by = start.state.partition(" ")  # CANCELLED by 1000
    return f"{_ENDS.get(word, word.lower())} {by}".strip()


def _next_start(job: SlurmJob) -> str:
    eligible, start = _local_time(job.eligible), _local_time(job.start)
    if eligible and eligible > datetime.now():
        return f"eligible {when(job.eligible)}"
    return f"about {when(job.start)} ({job.reason})" if start else f"({job.reason})"


def _local_time(text: Any) -> datetime | None:
    """Parses 2026-01-31T12:00:00 with or without a time zone; None if it is something else."""
    for form in ("%Y-%m-%dT%H:%M:%S%z", "%Y-%m-%dT%H:%M:%S"):
        try:
            return datetime.strptime(str(text), form).astimezone().replace(tzinfo=None)
        except ValueError:
            continue
    return None


def when(text: Any) -> str:
    """A time, with its date unless that is today."""
    moment = _local_time(text)
    if moment is None:
        return "-"
    return moment.strftime("%H:%M:%S" if moment.date() == datetime.now().date() else "%Y-%m-%d %H:%M")


def _short(root: Path) -> str:
    """The path as the user would type it."""
    root, here = root.resolve(), Path.cwd()
    return str(root.relative_to(here)) if root.is_relative_to(here) else str(root)
