"""What submitit runs on every rank: tells the worker its place, turns signals into requests, requeues.

Signal handlers set a flag and do nothing else; the worker asks for it at every step, and the ranks agree.

    USR2            preemption with a warning, or the scheduler's notice before the time limit → checkpoint, requeue
    time nearly up  watched without any signal, the same
    TERM, INT       cancelled, or preempted without a warning → checkpoint; if it is to come back, Slurm sees to it
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import submitit

from cfmask.recipe import load_recipe
from cfmask.runs import RunFolder

_REQUEUE_EXIT = 144  # submitit's local executor starts the tasks again when one ends with this


@dataclass(frozen=True)
class Job:
    """The callable that is pickled: where the run is. What it does stands in the run folder."""

    run: Path
    gpus_per_node: int
    time_limit_min: float

    def __call__(self) -> str:
        listener = _Listener(deadline=time.monotonic() + 60 * self.time_limit_min - self._margin_s())
        listener.install()
        if not self.gpus_per_node:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""

        # Imported late: handlers first, then the seconds that torch takes.
        from cfmask.distributed import Place
        from cfmask.worker import QUIT, REQUEUE, run_worker

        environment = submitit.JobEnvironment()
        slurm = environment.cluster == "slurm"
        place = Place(
            rank=environment.global_rank,
            world_size=environment.num_tasks,
            local_rank=environment.local_rank,
            nodes=environment.num_nodes,
            attempt=f"{environment.job_id}-{os.environ.get('SLURM_RESTART_COUNT', '0')}",
            cpus=_cpus(environment.num_tasks // environment.num_nodes),
            gpu=self.gpus_per_node > 0,
        )
        run = RunFolder(self.run)
        outcome = run_worker(load_recipe(self.run / "recipe.json"), run, place, listener.request)
        if outcome == REQUEUE:
            self._requeue(run, place.rank, environment.job_id, slurm)
        elif outcome == QUIT and slurm:
            # A preempted job that leaves early counts as completed and is not requeued: stay until the KILL.
            time.sleep(300)
            sys.exit(128 + signal.SIGTERM)
        elif outcome == QUIT:
            sys.exit(128 + signal.SIGTERM)
        return outcome

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Asked by submitit's own handler, for a signal that comes before ours is installed."""
        return submitit.helpers.DelayedSubmission(self)

    def _margin_s(self) -> float:
        """Time kept free before the limit, for a step and a checkpoint."""
        return min(180.0, 6 * self.time_limit_min)

    def _requeue(self, run: RunFolder, rank: int, job_id: str, slurm: bool) -> None:
        if run.stuck():
            if rank == 0:
                print("not requeued: the latest starts all began at the same step; see attempts.jsonl", flush=True)
            sys.exit(1)
        if not slurm:
            sys.exit(_REQUEUE_EXIT)
        if rank == 0:
            subprocess.run(["scontrol", "requeue", job_id], check=True)
        sys.exit(0)


class _Listener:
    """Remembers what signals and the clock ask for."""

    def __init__(self, deadline: float) -> None:
        self._deadline = deadline
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
        from cfmask.worker import QUIT, REQUEUE

        if self._quit:
            return QUIT
        if self._requeue or time.monotonic() > self._deadline:
            return REQUEUE
        return None


def _cpus(tasks_per_node: int) -> int:
    """Cores for this process: the allocation's, or a fair share of those it may run on."""
    given = os.environ.get("SLURM_CPUS_PER_TASK")
    return int(given) if given else max(1, len(os.sched_getaffinity(0)) // tasks_per_node)
