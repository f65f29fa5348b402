"""What is given to sbatch: an executor for jobs, what they wait for, and arrays that are larger than the site allows.

    for part in split_array(len(work), max_array_members(), allocation.array_parallelism):
        here = part.allocation(allocation, accepted)
        accepted.append(array_id(send(slurm_executor(…, here), [work[i] for i in part.members])))

An array has MaxArraySize members at most; more go out as several arrays of about the same size. `%N` of an array counts
its own members only, so the arrays share N out among them: no more than N members run at once. Where there are more
arrays than N, N of them run, and each of the others begins when an earlier one has ended.
"""

from __future__ import annotations

import functools
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cfmask.errors import UserError
from launch.allocation.resolve import Allocation
from launch.slurm.client import ignored_options
from launch.submission.batch_script import rank_command, slurm_parameters

if TYPE_CHECKING:
    import submitit

    from launch.slurm.executor import SlurmExecutor

T = TypeVar("T")


def slurm_executor(
    folder: Path, name: str, run: str, digest: str, allocation: Allocation, *, logs: str | None = None
) -> SlurmExecutor:
    """submitit's executor, for jobs that run the snapshot of this digest.

    Args:
        folder: gets what submitit writes.
        name: of the job.
        run: the folder that has the job's code/ and jobs/, as a word of the shell.
        logs: beginning of the logs' paths, with sbatch's patterns; by default they lie in ``folder``.
    """
    from launch.slurm.executor import SlurmExecutor

    parameters = slurm_parameters(allocation, name, f"{run}/jobs")
    if logs:
        parameters["srun_args"].append(f"--output={logs}_%t_log.out")
        parameters["additional_parameters"]["output"] = f"{logs}_0_log.out"
    executor = SlurmExecutor(
        folder, max_num_timeout=1000, python=rank_command(allocation.python, f"{run}/code/{digest}")
    )
    executor.update_parameters(**parameters)
    return executor


def send(executor: SlurmExecutor, work: Sequence[Callable[[], Any]]) -> list[submitit.Job[Any]]:
    """One sbatch.

    Raises:
        SlurmError: Slurm does not take it.
    """
    _tell_of_ignored_options()
    return _undisturbed(lambda: executor.submit_array(work))


@functools.cache
def _tell_of_ignored_options() -> None:
    """Once a command, which may submit many jobs."""
    if ignored := ignored_options():
        print(
            f"note: {', '.join(ignored)} in the environment: ignored. Flags and the cluster file say what a job gets.",
            file=sys.stderr,
        )


def _undisturbed(submit: Callable[[], T]) -> T:
    """Ctrl-C is for this process: sbatch would die of it."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return submit()
    finally:
        signal.signal(signal.SIGINT, before)


# --- what a job waits for ---------------------------------------------------------------------------------------------


def after_success(allocation: Allocation, jobs: Sequence[str]) -> Allocation:
    """The same for a job that starts when these have ended well, beside what it is to wait for anyway.

    A job that is preempted or requeued keeps its number, and has not ended. Of one that has failed, Slurm takes those
    that wait for it out of the queue: without --kill-on-invalid-dep they would wait for ever.
    """
    if not jobs:
        return allocation
    waiting = _after(allocation, "afterok", jobs)
    return replace(waiting, sbatch={**allocation.sbatch, "kill-on-invalid-dep": "yes"})


def after_end(allocation: Allocation, jobs: Sequence[str]) -> Allocation:
    """The same for a job that starts when these have ended in whatever way, beside what it is to wait for anyway."""
    return _after(allocation, "afterany", jobs) if jobs else allocation


def _after(allocation: Allocation, kind: str, jobs: Sequence[str]) -> Allocation:
    given = allocation.dependency
    if given is not None and "?" in given:
        raise UserError(
            f"--dependency {shlex.quote(given)} waits for any one of several, and cannot be joined with jobs that are "
            "to be waited for as well: Slurm takes either all (,) or any (?). Write it with commas."
        )
    return replace(allocation, dependency=",".join(filter(None, [given, f"{kind}:{':'.join(jobs)}"])))


# --- arrays -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ArrayPart:
    """One of the arrays that a list of jobs goes out as.

    members: their places in the list.
    parallelism: how many of them may run at once; None: all.
    behind: the part, by its number, that has to end before this one begins; None: it waits for none.
    """

    members: range
    parallelism: int | None = None
    behind: int | None = None

    def allocation(self, whole: Allocation, accepted: Sequence[str]) -> Allocation:
        """That of the members.

        Args:
            whole: of the list of jobs.
            accepted: ids of the parts before this one.
        """
        waits = [] if self.behind is None else [accepted[self.behind]]
        return replace(after_end(whole, waits), array_parallelism=self.parallelism)


def split_array(number: int, largest: int | None, parallelism: int | None) -> list[ArrayPart]:
    """The arrays that this number of jobs goes out as.

    Args:
        largest: the most members that an array may have; None: any number. Below 1, there are no arrays: parts are of
            one job.
        parallelism: how many of all jobs may run at once; None: all.
    """
    count = 1 if largest is None else -(-number // max(1, largest))
    abreast = count if parallelism is None else min(count, parallelism)
    bounds = [number * part // count for part in range(count + 1)]
    return [
        ArrayPart(
            members=range(bounds[part], bounds[part + 1]),
            parallelism=None if parallelism is None else _share(parallelism, abreast, part % abreast),
            behind=part - abreast if part >= abreast else None,
        )
        for part in range(count)
    ]


def _share(whole: int, among: int, which: int) -> int:
    return whole // among + (which < whole % among)


def array_id(jobs: Sequence[submitit.Job[Any]]) -> str:
    """Of the array that jobs are members of, or of the one job."""
    return jobs[0].job_id.partition("_")[0]
