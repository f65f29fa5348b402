"""Derives the status of a run from its facts. launch/status.py shows it, and its help lists the states."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from cfmask.log_lines import straggler_of
from cfmask.recipe import Recipe
from cfmask.runtime.attempts import Start, starts_of
from cfmask.runtime.times import duration, local_time, when
from launch.slurm.queue import SacctRecord, SlurmJob
from launch.slurm.reasons import PendingReason, explain
from launch.slurm.states import base_and_flags, is_completing, is_held, is_pending
from launch.state import ends
from launch.state.facts import RunState, SlurmAnswers, in_queue, jobs_in_queue

ENDED = ("never started", "finished", "cancelled", "stopped", "failed", "dead")
"""States that do not change by themselves."""
FAILED = ("failed", "dead")
"""States with an end that nobody has asked for."""
WAITING = ("queued", "requeued")
_NO_RUNNING_JOB = (*ENDED, *WAITING, "unknown")

_PARTS = re.compile(r"(\D*)(\d*)")
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
    """The status of a run.

    run: path of the folder, as the user would type it.
    state: a word or two; launch/status.py lists them.
    step, total_steps: optimizer steps, or images of an evaluation.
    samples_per_s, loss: from the last line of the log.
    eta_s: seconds to the end, while it trains.
    job: id of the job in the queue, or pid of the controller of a local job.
    attempts: number of starts.
    next_start: when the job will probably start, and Slurm's code of the reason why it waits.
    last_end: why the latest start that has ended did.
    notes: what could not be read, and what else is wrong.
    straggler: the slowest rank, if it slows the training down.
    waiting: number of further jobs of the run in the queue (of a chain).
    in_words: the state as a phrase, with the reason: "preempted, starts again in 2 min".
    remedy: what to do if a pending job does not start by itself.
    best_on: the set on which the best epoch is chosen; of an evaluation, val or its first set.
    best_top1: top-1 on that set at the best epoch so far, or of the evaluated model, in percent.
    best_epoch: that epoch, counted from 1; None of an evaluation.
    epochs: number of epochs of the recipe.
    top1: percent by set, at the best epoch.
    nodes: nodes of the running job, as Slurm writes lists of nodes.
    submitted: when it was last submitted (or created, if it never was), ISO 8601.
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
    in_words: str = ""
    remedy: str | None = None
    best_on: str | None = None
    best_top1: float | None = None
    best_epoch: int | None = None
    epochs: int | None = None
    top1: Mapping[str, float] = field(default_factory=dict)
    nodes: str | None = None
    submitted: str = ""

    @property
    def runs(self) -> bool:
        """Whether a job of the run has nodes."""
        return self.state not in _NO_RUNNING_JOB


def newest_first(run_states: Iterable[RunState]) -> list[RunState]:
    """The run that was last submitted first; those of a sweep by name."""
    by_name = sorted(
        run_states, key=lambda each: [(text, int(n or 0)) for text, n in _PARTS.findall(each.run.root.name)]
    )
    return sorted(by_name, key=lambda each: int(each.submitted), reverse=True)


def status_of(run_state: RunState, slurm: SlurmAnswers) -> Status:
    job = in_queue(run_state, slurm)
    state = _state(run_state, slurm, job)
    runs = state in ("running", "cancelling") and run_state.owner is not None
    waits = job if job and is_pending(job.state) and state != "cancelling" else None
    last_end = _last_end(run_state, slurm, state)
    best_on, best = run_state.best or (None, None)
    return Status(
        run=_short(run_state.run.root),
        state=state,
        step=run_state.step,
        total_steps=run_state.last.get("total_steps"),
        samples_per_s=run_state.last.get("samples_per_s"),
        loss=run_state.last.get("loss"),
        eta_s=run_state.eta_s if runs else None,
        job=job.id if job else str(run_state.jobs.controller) if run_state.jobs.controller else None,
        waiting=max(0, len(jobs_in_queue(run_state, slurm)) - 1),
        attempts=len(run_state.attempts),
        straggler=straggler_of(run_state.last) if runs else None,
        next_start=_next_start(waits) if waits else None,
        last_end=last_end,
        notes=(*run_state.notes, *_unconfirmed(run_state)),
        in_words=_waits_in_words(waits, last_end) if waits else _in_words(run_state, state, last_end),
        remedy=_reason(waits, _short(run_state.run.root)).remedy or None if waits else None,
        best_on=best_on,
        best_top1=best.top1[best_on] if best and best_on else None,
        best_epoch=best.epoch or None if best else None,
        epochs=run_state.work.optim.total_epochs if isinstance(run_state.work, Recipe) else None,
        top1=dict(best.top1) if best else {},
        nodes=job.nodes or None if job and not waits else run_state.owner.host if run_state.owner else None,
        submitted=datetime.fromtimestamp(run_state.submitted).astimezone().isoformat(timespec="seconds"),
    )


def _waits_in_words(job: SlurmJob, last_end: str | None) -> str:
    """The state of a pending job: why it waits, and until when if that is known. One that needs a user's or
    administrator's action has no such time: Slurm shows the one from which it could start."""
    cause = ends.cause_of_requeue(last_end or "") if job.restarts else ""
    if _reason(job).remedy:
        waits = f"waits in the queue: {_reason(job).why}"
        return f"{cause}, {waits}" if cause else waits
    if (left := _seconds_until(job.eligible)) > 0:
        return (
            f"{cause}, starts again in {duration(left)} or later" if cause else f"starts in {duration(left)} or later"
        )
    waits = f"waits in the queue: {_reason(job).why}"
    start = f"; starts in about {duration(left)}" if (left := _seconds_until(job.start)) > 0 else ""
    return f"{cause}, {waits}{start}" if cause else f"{waits}{start}"


def _reason(job: SlurmJob, run: str = "RUN") -> PendingReason:
    """Why a pending job waits. A held job may have a state that says so in place of a reason."""
    held = job.reason in ("", "None") and is_held(job.state)
    return explain("job requeued in held state" if held else job.reason, job=job.id, run=shlex.quote(run))


def _seconds_until(text: str) -> float:
    """0 if it is over, or no time."""
    moment = local_time(text)
    return max(0.0, (moment - datetime.now()).total_seconds()) if moment else 0.0


def _in_words(run_state: RunState, state: str, last_end: str | None) -> str:
    if state == "unknown":
        return "unknown: " + ("Slurm does not answer here" if run_state.readable else "the folder cannot be read")
    if state in (*ENDED, "ending") and last_end:
        end = " ".join(last_end.split())
        return end if end.startswith(state) else f"{state}: {end}"
    return state


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
    if not run_state.readable:
        return "unknown"
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
    started = local_time(attempt.get("started"))
    job = str(attempt.get("job")).rpartition("-")[0]
    for start in slurm.history:
        begin, end = local_time(start.start), local_time(start.end)
        if start.job == job and started and begin and begin <= started and (end is None or started <= end):
            return f"killed: {_end_of_start(start)}"
    return why


def explained_starts(run_state: RunState, status: Status, slurm: SlurmAnswers) -> list[Start]:
    """All recorded starts. Where one has not recorded why it ended, Slurm's reason is given. Steps after the last one
    that a start has logged are in the range of the next start."""
    starts = starts_of(run_state.attempts, run_state.ended)
    found = [replace(each, why_ended=explained(str(each.why_ended), each.facts, slurm)) for each in starts[:-1]]
    runs = status.state in ("running", "cancelling")
    return found + [
        replace(each, reached=run_state.step, why_ended=None if runs else status.last_end) for each in starts[-1:]
    ]


def _end_of_start(start: SacctRecord) -> str:
    word, _, by = start.state.partition(" ")  # CANCELLED by 1000
    return f"{_ENDS.get(word, word.lower())} {by}".strip()


def _next_start(job: SlurmJob) -> str:
    eligible, start = local_time(job.eligible), local_time(job.start)
    if eligible and eligible > datetime.now():
        return f"eligible {when(job.eligible)}"
    return f"about {when(job.start)} ({job.reason})" if start else f"({job.reason})"


def _short(root: Path) -> str:
    """The path as the user would type it; of the working directory, in full, because "." is no name."""
    root, here = root.resolve(), Path.cwd()
    return str(root.relative_to(here)) if here in root.parents else str(root)
