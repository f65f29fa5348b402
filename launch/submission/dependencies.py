"""What jobs wait for: other jobs, the job before them in a chain, and earlier parts of an array that was split.

A job array has at most MaxArraySize members. Longer lists of jobs are submitted as several arrays of about the same
size:

    for part in split_array(len(work), max_array_members(), allocation.array_parallelism):
        of_part = part.allocation(allocation, accepted)
        accepted.append(array_id(send(slurm_executor(…, of_part), [work[i] for i in part.members])))

`%N` of an array limits its own members only, so the arrays share N: no more than N members run at once. With more than
N arrays, N of them start, and each of the others waits until an earlier one has ended.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from cfmask.errors import UserError
from launch.allocation.resolve import Allocation

if TYPE_CHECKING:
    import submitit


def after_success(allocation: Allocation, jobs: Sequence[str]) -> Allocation:
    """The allocation of a job that also waits until these jobs have ended successfully.

    A job that is preempted or requeued keeps its id, and has not ended. If one fails, Slurm removes the waiting job
    from the queue; without --kill-on-invalid-dep it would wait forever.
    """
    if not jobs:
        return allocation
    return replace(_after(allocation, "afterok", jobs), sbatch={**allocation.sbatch, "kill-on-invalid-dep": "yes"})


def after_end(allocation: Allocation, jobs: Sequence[str]) -> Allocation:
    """The allocation of a job that also waits until these jobs have ended, successfully or not."""
    return _after(allocation, "afterany", jobs) if jobs else allocation


def chained(allocation: Allocation, before: Sequence[str], behind: Sequence[str]) -> Allocation:
    """The allocation of the next job of a chain. All of its jobs keep --dependency: if that cannot be satisfied, the
    next job must not start because the one before was removed from the queue.

    Args:
        before: The chain's jobs so far.
        behind: The jobs that the first one waits for.
    """
    return replace(after_end(allocation, before[-1:] or behind), chain=tuple(before))


def _after(allocation: Allocation, kind: str, jobs: Sequence[str]) -> Allocation:
    given = allocation.dependency
    if given is not None and "?" in given:
        raise UserError(
            f"--dependency {shlex.quote(given)} waits for any one of several jobs, and cannot be combined with further "
            "jobs to wait for: Slurm takes either all (,) or any (?). Write it with commas."
        )
    return replace(allocation, dependency=",".join(filter(None, [given, f"{kind}:{':'.join(jobs)}"])))


@dataclass(frozen=True)
class ArrayPart:
    """One of the arrays that a list of jobs is split into."""

    members: range
    """Positions in the list."""
    parallelism: int | None = None
    """How many of them may run at once; None for all."""
    behind: int | None = None
    """Index of the part that has to end before this one starts."""

    def allocation(self, whole: Allocation, accepted: Sequence[str]) -> Allocation:
        """The allocation of the members.

        Args:
            whole: Allocation of the list of jobs.
            accepted: Ids of the parts before this one.
        """
        waits = [] if self.behind is None else [accepted[self.behind]]
        return replace(after_end(whole, waits), array_parallelism=self.parallelism)


def split_array(number: int, largest: int | None, parallelism: int | None) -> list[ArrayPart]:
    """Split a list of this many jobs into arrays.

    Args:
        largest: Largest number of members of an array; None for any number. Below 1 there are no arrays: each part is a
            single job.
        parallelism: How many of all jobs may run at once; None for all.
    """
    count = 1 if largest is None else -(-number // max(1, largest))
    abreast = count if parallelism is None else min(count, parallelism)
    bounds = [number * part // count for part in range(count + 1)]

    def share(part: int) -> int | None:
        return None if parallelism is None else parallelism // abreast + (part % abreast < parallelism % abreast)

    return [
        ArrayPart(range(*bounds[part : part + 2]), share(part), part - abreast if part >= abreast else None)
        for part in range(count)
    ]


def array_id(jobs: Sequence[submitit.Job[Any]]) -> str:
    """The id of the array that the jobs are members of, or of the single job."""
    return jobs[0].job_id.partition("_")[0]
