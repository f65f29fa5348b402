"""Chains: several jobs on one run folder, each of which Slurm starts when the one before has ended, however it ended.

They are for sites where a job may not requeue itself. `submit.py --chain N` queues N jobs, each with
`--dependency=afterany:` on the one before:

    job 12   trains until its time limit is near or it is warned, saves a checkpoint, and ends with exit code 0
    job 13   resumes; …
    job 14   finds the run finished (or cancelled), and ends at once with exit code 0

No job of a chain requeues itself (policy.py). If Slurm requeues one, because it was preempted or lost a node, the job
keeps its number and the later ones keep waiting. The last job ends with an error if the run is not finished, so that
jobs which depend on its success (afterok) do not start.

`submit.py --resume RUN --chain N` queues N more after the run's queued jobs. So a job looks for the next one when it
ends.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from cfmask.runs import RunFolder
from launch.slurm.client import SlurmError
from launch.slurm.control import exclude_nodes
from launch.slurm.queue import queue
from launch.state.facts import read_jobs

logger = logging.getLogger(__name__)

VARIABLE = "CFMASK_CHAIN"
"""Environment variable with the numbers of the jobs before this one in its chain: 12,13. The batch script sets it."""
_PATIENCE_S = 10.0


@dataclass(frozen=True)
class Chain:
    """The chain of the job that this process is part of.

    job: its number.
    before: the numbers of the jobs before it.
    """

    run: RunFolder
    job: str
    before: tuple[str, ...]

    @classmethod
    def of_job(cls, run: RunFolder, job: str) -> Chain | None:
        """None if the job is not part of a chain."""
        before = os.environ.get(VARIABLE)
        return None if before is None else cls(run, job, tuple(filter(None, before.split(","))))

    def later_jobs(self) -> list[str]:
        """The run's later jobs in the queue, also of a chain that was added to this one; the first of them resumes the
        run. Where Slurm does not answer (a container), some of them may have been cancelled."""
        # Ordered by number, because the clocks of login nodes differ.
        alone = (int(job) for job in read_jobs(self.run).slurm if job.isdigit())
        later = [str(job) for job in sorted(alone) if job > int(self.job)]
        with suppress(SlurmError):
            queued = queue(later, patience_s=_PATIENCE_S)
            return [job for job in later if job in queued]
        return later

    def exclude_nodes(self, nodes: Sequence[str]) -> None:
        """Keep the later jobs from running on these nodes."""
        for job in self.later_jobs() if nodes else ():
            try:
                exclude_nodes(job, nodes, patience_s=_PATIENCE_S)
            except SlurmError as error:
                logger.warning(f"{', '.join(nodes)} cannot be excluded from job {job}: {error}")

    def first_starts(self, attempts: Sequence[dict[str, Any]]) -> dict[str, int]:
        """For this job and each one before it, the number of starts of the jobs before that one, recorded or not.

        Args:
            attempts: lines of attempts.jsonl.
        """
        starts: dict[str, int] = {}
        for line in attempts:
            job, _, restart = str(line.get("job")).rpartition("-")
            if job in self.before and restart.isdigit():
                starts[job] = max(starts.get(job, 0), int(restart) + 1)
        found, number = {}, 0
        for job in self.before:
            found[job] = number
            # A job that failed before it could record anything has a log; one that was cancelled in the queue has none.
            number += starts.get(job) or int(any((self.run.root / "jobs").glob(f"{job}_*_log.out")))
        return found | {self.job: number}
