"""Chains: several jobs for one run folder. Slurm starts each job when the one before has ended, successfully or not.

Chains are for sites where a job may not requeue itself. `submit.py --chain N` queues the jobs with
`--dependency=afterany:` on the job before:

    job 12   trains until a warning or until its time limit is near, saves a checkpoint, and ends with exit code 0
    job 13   resumes; …
    job 14   finds the run finished (or cancelled), and ends at once with exit code 0

No job of a chain requeues itself (restarts.py). If Slurm requeues one, after a preemption or the loss of a node, the
job keeps its id, and the later jobs keep waiting. If the run is not finished, the last job ends with an error, so that
jobs that depend on its success (afterok) do not start.

`submit.py --resume RUN --chain N` appends N jobs to those that are queued. A job therefore looks for its successor when
it ends.
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
"""Environment variable with the ids of the chain's earlier jobs, as 12,13. The batch script sets it."""
_PATIENCE_S = 10.0


@dataclass(frozen=True)
class Chain:
    """The chain that this process's job is part of."""

    run: RunFolder
    job: str
    """Id of this process's job."""
    before: tuple[str, ...]
    """Ids of the chain's earlier jobs."""

    @classmethod
    def of_job(cls, run: RunFolder, job: str) -> Chain | None:
        """None if the job is not part of a chain."""
        before = os.environ.get(VARIABLE)
        return None if before is None else cls(run, job, tuple(filter(None, before.split(","))))

    def later_jobs(self) -> list[str]:
        """The run's jobs that are queued behind this one, appended chains included; the first one resumes the run. If
        Slurm cannot be asked, as in a container, the list may include cancelled jobs."""
        # Ordered by id: file times come from several login nodes.
        single = (int(job) for job in read_jobs(self.run).slurm if job.isdigit())
        later = [str(job) for job in sorted(single) if job > int(self.job)]
        with suppress(SlurmError):
            queued = queue(later, patience_s=_PATIENCE_S)
            return [job for job in later if job in queued]
        return later

    def exclude_nodes(self, nodes: Sequence[str]) -> None:
        """Exclude the nodes from all later jobs."""
        for job in self.later_jobs() if nodes else ():
            try:
                exclude_nodes(job, nodes, patience_s=_PATIENCE_S)
            except SlurmError as error:
                logger.info(f"{', '.join(nodes)} cannot be excluded from job {job}: {error}")

    def first_starts(self, attempts: Sequence[dict[str, Any]]) -> dict[str, int]:
        """For each job of the chain up to this one, the number of starts that the jobs before it had.

        Args:
            attempts: Lines of attempts.jsonl.
        """
        starts: dict[str, int] = {}
        for line in attempts:
            job, _, restart = str(line.get("job")).rpartition("-")
            if job in self.before and restart.isdigit():
                starts[job] = max(starts.get(job, 0), int(restart) + 1)
        found, number = {}, 0
        for job in self.before:
            found[job] = number
            # A job that failed before it recorded a start has a log; one that was cancelled in the queue has none.
            number += starts.get(job) or int(any((self.run.root / "jobs").glob(f"{job}_*_log.out")))
        return found | {self.job: number}
