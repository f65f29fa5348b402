"""What submitit runs on every rank: gives training its place in the job, turns signals into stop requests, and asks the
restart policy whether the job comes back.

Signal handlers only set a flag. Training looks for it at every step, and the ranks agree.

    USR2                preemption with a warning, or Slurm's notice before the time limit → checkpoint, requeue
    time limit is near  watched without any signal, the same
    TERM, INT           scancel, or a preemption without a warning; Slurm is asked which → checkpoint
    RUN/cancelled.json  cancelled by launch/cancel.py, which overrides the others → checkpoint
    another rank died   no request: the supervisor ends this rank (supervisor.py)

After the checkpoint, rank 0 follows launch/restarts/policy.py; the other ranks just end.

In the first second of the process there are no handlers, and the shell that starts it ignores USR2 and TERM
(``sbatch.rank_command``): a rank that a signal kills would make the job fail.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import submitit

from cfmask.errors import UserError
from cfmask.recipe import Recipe
from cfmask.runs import RunFolder
from launch.ranks import health, supervisor
from launch.restarts.deadline import stop_time
from launch.restarts.of_run import restarts_of, saved_progress
from launch.restarts.policy import Cause, GivenUp, Restarts
from launch.state.ends import AT_TIME_LIMIT

if TYPE_CHECKING:
    from cfmask.runtime.distributed import DistributedContext
    from cfmask.session import StopRequest

logger = logging.getLogger(__name__)

_NOTICE_EARLIER_S = 60.0
"""Slurm's USR2 before the time limit comes at most so much earlier than the deadline."""
_LOOK_S = 5
"""Between two looks for RUN/cancelled.json, which also reaches a run on another machine."""


@dataclass(frozen=True)
class Job:
    """The pickled callable. What to do is read from the run folder.

    run: the run folder.
    time_limit_min: None if there is none, or only Slurm knows it.
    pace_s: pause at the end of each step, with which a drill makes a run last.
    """

    run: Path
    gpus_per_node: int
    time_limit_min: float | None
    pace_s: float = 0.0

    def __call__(self) -> str:
        run = RunFolder(self.run)
        environment = submitit.JobEnvironment()
        restarts = restarts_of(run, environment)
        is_main_process = environment.global_rank == 0
        listener = _Listener(
            deadline=stop_time(self.time_limit_min, None),
            watched=run if is_main_process else None,
            pace_s=self.pace_s,
        )
        listener.install()
        on_slurm = environment.cluster == "slurm"
        if self.time_limit_min is None and is_main_process and on_slurm:  # one rank suffices: all stop together
            listener.deadline = stop_time(None, environment.job_id)
        if not self.gpus_per_node:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""

        # After the handlers are installed, because importing torch takes seconds.
        with _importing():
            from cfmask.runtime.distributed import DistributedContext
            from cfmask.runtime.heartbeat import PREPARING, beat
            from cfmask.runtime.rendezvous import CalledOff
            from cfmask.session import FINISHED, REQUEUE

        context = DistributedContext(
            rank=environment.global_rank,
            world_size=environment.num_tasks,
            local_rank=environment.local_rank,
            nodes=environment.num_nodes,
            attempt=restarts.attempt,
            cpus=_cpus(environment.num_tasks // environment.num_nodes),
            gpu=self.gpus_per_node > 0,
        )
        beat(PREPARING)
        try:
            if is_main_process:  # on rank 0 alone: others could see another state a moment before or after
                _check_start(run, context, restarts)
            health.check_node(run.root, context)
            outcome = _work(run, context, listener.request, restarts)
        except CalledOff as called_off:
            if called_off.failed:
                raise
            logger.info(called_off)
            sys.exit(0)
        if outcome == FINISHED:
            if is_main_process:
                run.tidy()
            return outcome
        if not is_main_process:
            sys.exit(0)
        cause = Cause.WARNED if outcome == REQUEUE else Cause.TERMINATED
        if cause is Cause.WARNED and listener.is_near_deadline() and (ended := run.ended()):
            run.end_attempt(ended["why"] + AT_TIME_LIMIT)
        try:
            code = restarts.after_stop(cause, saved_progress(run), lambda: run.cancelled() is not None)
        except GivenUp as given_up:
            run.end_attempt(str(given_up))
            raise
        sys.stdout.flush()
        sys.exit(code)

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Called on rank 0 by submitit's own handler, for a USR2 that comes before ours is installed. It would requeue
        the job against the restart policy, so this does not return. Nothing has been computed yet."""
        run = RunFolder(self.run)
        restarts = restarts_of(run, submitit.JobEnvironment())
        code = restarts.after_stop(Cause.WARNED, saved_progress(run), lambda: run.cancelled() is not None)
        sys.stdout.flush()
        os._exit(code)


def _work(run: RunFolder, context: DistributedContext, stop_request: StopRequest, restarts: Restarts) -> str:
    """Train or evaluate, as the run folder says."""

    def failing(error: Exception) -> None:
        supervisor.write_failure(run.root, error)

    work = run.work()
    if isinstance(work, Recipe):
        with _importing():
            from cfmask.training.train import train

        return train(work, run, context, stop_request, failing, restarts.seconds_left)
    with _importing():
        from cfmask.evaluation.worker import run_evaluation

    return run_evaluation(work, run, context, stop_request, failing)


@contextlib.contextmanager
def _importing() -> Iterator[None]:
    """Import without garbage collection, and exclude the imported objects from later collections.

    The modules of torch and open_clip are a million permanent objects. Scanning them takes a fifth of the import's
    time, and later 0.2 s at each full collection, in the middle of a step.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _check_start(run: RunFolder, context: DistributedContext, restarts: Restarts) -> None:
    """Called on rank 0. If the job must not start, record that in attempts.jsonl and call off the other ranks; a
    finished run gets no record.

    Raises:
        CalledOff: the run is finished or cancelled, or the budget of restarts is spent.
    """
    from cfmask.runtime.rendezvous import CalledOff, call_off

    failed, is_recorded = False, True
    if run.results.exists():
        # From Slurm 24.05 on, a job that was preempted just before its run finished starts again.
        reason, is_recorded = f"not started: {run.root} is finished", False
        run.tidy()
    elif cancelled := run.cancelled():
        reason = f"not started: cancelled by {cancelled['by']}"
    else:
        try:
            restarts.check_start(saved_progress(run))
            return
        except GivenUp as given_up:
            reason, failed = f"not started: {given_up}", True
    if is_recorded:
        with contextlib.suppress(UserError), run.locked(context.attempt):  # unless another job holds the lock
            run.end_failed(reason, job=context.attempt, nodes=context.nodes, world_size=context.world_size)
    call_off(run.rendezvous, context.attempt, reason, failed=failed)
    raise CalledOff(reason, failed=failed)


class _Listener:
    """Collects stop requests from signals, the clock and RUN/cancelled.json.

    Args:
        deadline: when to stop for the time limit, on the clock of time.monotonic().
        watched: the run whose cancelled.json is looked for; None on ranks other than 0, which stop with it.
        pace_s: see ``Job``.
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

    def is_near_deadline(self) -> bool:
        """Whether a requested stop is due to the time limit. Slurm's notice comes at about the same time."""
        return time.monotonic() > self.deadline - _NOTICE_EARLIER_S

    def request(self) -> str | None:
        from cfmask.session import QUIT, REQUEUE

        if self._pace_s:
            time.sleep(self._pace_s)
        if self._watched and time.monotonic() > self._look_at:
            self._look_at = time.monotonic() + _LOOK_S
            with contextlib.suppress(OSError):  # looked for again
                self._quit = self._quit or self._watched.cancelled() is not None
        if self._quit:
            return QUIT
        if self._requeue or time.monotonic() > self.deadline:
            return REQUEUE
        return None


def _cpus(tasks_per_node: int) -> int:
    """Cores for this process: those of the allocation, or an equal share of the available ones."""
    given = os.environ.get("SLURM_CPUS_PER_TASK")
    return int(given) if given else max(1, len(os.sched_getaffinity(0)) // tasks_per_node)
