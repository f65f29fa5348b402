"""What submitit runs on every rank: tells training its place, turns signals into requests, requeues.

Signal handlers set a flag and do nothing else; training asks for it at every step, and the ranks agree.

    USR2                preemption with a warning, or the scheduler's notice before the time limit → checkpoint, requeue
    time nearly up      watched without any signal, the same
    TERM, INT           scancel, or preempted without a warning → checkpoint; if it is to come back, Slurm sees to it
    RUN/cancelled.json  ended for good (launch/cancel.py), whatever else is asked for → checkpoint
    another rank died   nothing is asked for: the process that waits for this one ends it (launch/jobs/failures.py)

In a process's first second there is no handler yet: the shell that starts it sees to it that USR2 and TERM are ignored
(``batch_script.rank_command``), because a preempted job that a signal ends counts as completed and does not come back.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import submitit

from cfmask.errors import UserError
from cfmask.recipe import Recipe
from cfmask.runs import RunFolder
from launch.jobs import failures as last_words
from launch.jobs.allocation import REQUEUE_ME
from launch.jobs.deadline import stop_time

if TYPE_CHECKING:
    from cfmask.distributed import Place
    from cfmask.session import StopRequest

_LOOK_S = 5
"""Between two looks for RUN/cancelled.json: it reaches a run that no signal can, on another machine say."""
_CONTROLLER_BACK_S = 120
_KILL_WITHIN_S = 300
"""Slurm kills a job that it ends or preempts within its KillWait or GraceTime, which is less than this."""


@dataclass(frozen=True)
class Job:
    """The callable that is pickled: where the run is. What it does stands in the run folder.

    time_limit_min: None: there is none, or only Slurm knows it.
    pace_s: how long it stays at each step's end. A drill's run is to last until it has been disturbed.
    """

    run: Path
    gpus_per_node: int
    time_limit_min: float | None
    pace_s: float = 0.0

    def __call__(self) -> str:
        run = RunFolder(self.run)
        environment = submitit.JobEnvironment()
        chief, slurm = environment.global_rank == 0, environment.cluster == "slurm"
        listener = _Listener(
            deadline=stop_time(self.time_limit_min, None),
            watched=run if chief else None,
            pace_s=self.pace_s,
        )
        listener.install()
        if self.time_limit_min is None and chief and slurm:  # one rank that asks is enough: all stop together
            listener.deadline = stop_time(None, environment.job_id)
        if not self.gpus_per_node:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""

        # Imported late: handlers first, then the seconds that torch takes.
        from cfmask.distributed import Place
        from cfmask.session import FINISHED, QUIT, REQUEUE

        place = Place(
            rank=environment.global_rank,
            world_size=environment.num_tasks,
            local_rank=environment.local_rank,
            nodes=environment.num_nodes,
            attempt=last_words.attempt_name(environment),
            cpus=_cpus(environment.num_tasks // environment.num_nodes),
            gpu=self.gpus_per_node > 0,
        )
        try:
            if chief:  # the others may come to another view, a moment before or after: they hear it from rank 0
                _check_start(run, place, environment.job_id if slurm else None)
            outcome = _work(run, place, listener.request)
        except UserError as error:
            if not run.cancelled():
                raise
            print(error, flush=True)
            sys.exit(0)
        if outcome == FINISHED:
            return outcome
        if slurm and outcome == QUIT:
            # A preempted job that leaves early counts as completed and is not requeued: stay until the KILL.
            deadline = time.monotonic() + _KILL_WITHIN_S
            while not run.cancelled() and time.monotonic() < deadline:
                time.sleep(1)
        if run.cancelled():
            sys.exit(0)
        if outcome == REQUEUE:
            self._requeue(place.rank, environment.job_id, slurm)
        sys.exit(128 + signal.SIGTERM)

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Asked by submitit's own handler, for a signal that comes before ours is installed."""
        return submitit.helpers.DelayedSubmission(self)

    def _requeue(self, rank: int, job_id: str, slurm: bool) -> None:
        """Come back. It stopped with a checkpoint of a step that it took: it gets on, and may do so for ever."""
        if not slurm:
            sys.exit(REQUEUE_ME)
        # A container may have no scontrol.
        if rank == 0 and not (shutil.which("scontrol") and _requeued(job_id)):
            sys.exit(REQUEUE_ME)
        sys.exit(0)


def _work(run: RunFolder, place: Place, stop_request: StopRequest) -> str:
    """Train or evaluate: the folder says which."""

    def failing(error: Exception) -> None:
        last_words.leave(run.root, error)

    work = run.work()
    if isinstance(work, Recipe):
        from cfmask.train import train

        return train(work, run, place, stop_request, failing)
    from cfmask.evaluator import run_evaluation

    return run_evaluation(work, run, place, stop_request, failing)


def _check_start(run: RunFolder, place: Place, slurm_job: str | None) -> None:
    """Rank 0's look at whether to start at all. If not, attempts.jsonl and the other ranks are told.

    Raises:
        UserError: the run is cancelled, or this Slurm job has come back without getting anywhere.
    """
    from cfmask.distributed import call_off

    if told := run.cancelled():
        why = f"not started: cancelled by {told['by']}"
    elif slurm_job and run.stuck(slurm_job):
        why = "not started: given up, this job came back to the same step too often (see attempts.jsonl)"
    else:
        return
    with contextlib.suppress(UserError), run.locked(place.attempt):  # another job's folder is left alone
        run.end_failed(why, job=place.attempt, nodes=place.nodes, world_size=place.world_size)
    call_off(place, run.root / "meeting", why)
    raise UserError(why)


class _Listener:
    """Remembers what signals, the clock and the mark in the run folder ask for.

    watched: the run whose mark is looked for; on one rank, its word is the others' too.
    """

    def __init__(self, deadline: float, watched: RunFolder | None, pace_s: float = 0.0) -> None:
        self.deadline, self._pace_s = deadline, pace_s
        self._watched, self._look_at = watched, 0.0
        self._pid = os.getpid()
        self._requeue = self._quit = False

    def install(self) -> None:
        signal.signal(signal.SIGUSR2, self._on_signal)
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)

    def _on_signal(self, number: int, frame: object) -> None:
        if os.getpid() != self._pid:  # a child inherited this handler
            return
        if number == signal.SIGUSR2:
            self._requeue = True
        else:
            self._quit = True

    def request(self) -> str | None:
        from cfmask.session import QUIT, REQUEUE

        if self._pace_s:
            time.sleep(self._pace_s)
        if self._watched and time.monotonic() > self._look_at:
            self._look_at = time.monotonic() + _LOOK_S
            self._quit = self._quit or self._watched.cancelled() is not None
        if self._quit:
            return QUIT
        if self._requeue or time.monotonic() > self.deadline:
            return REQUEUE
        return None


def _requeued(job_id: str) -> bool:
    """Whether Slurm has taken it. A controller that is away, restarted say, is waited for."""
    deadline = time.monotonic() + _CONTROLLER_BACK_S
    while True:
        done = subprocess.run(["scontrol", "requeue", job_id], capture_output=True, text=True)
        print(done.stdout + done.stderr, end="", flush=True)
        away = "Unable to contact" in done.stderr or "onnection" in done.stderr
        if done.returncode == 0 or not away or time.monotonic() > deadline:
            return done.returncode == 0
        time.sleep(2)


def _cpus(tasks_per_node: int) -> int:
    """Cores for this process: the allocation's, or a fair share of those it may run on."""
    given = os.environ.get("SLURM_CPUS_PER_TASK")
    return int(given) if given else max(1, len(os.sched_getaffinity(0)) // tasks_per_node)
