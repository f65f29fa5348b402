"""Asks Slurm about a job before it is queued: sbatch accepts some jobs that no node could ever run."""

from __future__ import annotations

import logging
import re
from datetime import datetime, timedelta

from launch.allocation.nodes import chosen_partitions, fitting_nodes, nodes_of
from launch.allocation.resolve import Allocation
from launch.slurm import site
from launch.slurm.client import SlurmError, SlurmUnavailable
from launch.slurm.submission import test_only

logger = logging.getLogger(__name__)

_NOW, _EVER = timedelta(minutes=2), timedelta(days=365)


def ask_slurm(text: str, allocation: Allocation) -> str:
    """Slurm's answer to a batch script that is not queued: when and where the job would start.

    `sbatch --test-only` says "Requested node configuration is not available" of two kinds of jobs: those that no node
    could ever run, and those whose nodes are down, drained or reserved now. The latter may wait in the queue: this
    function warns and returns "".

    Raises:
        SlurmUnavailable: There is no answer.
        SlurmError: Slurm would refuse the job, or could never start it.
    """
    try:
        return test_only(text)
    except SlurmUnavailable:
        raise
    except SlurmError as error:
        if "not available" not in str(error):
            raise
        nodes = site.read_nodes()
        partitions = [each["PartitionName"] for each in chosen_partitions(site.read_partitions(), allocation.partition)]
        own = nodes_of(nodes, partitions)
        fitting, found, change = fitting_nodes(own, allocation) if own else ([], "the partition has no nodes", "")
        if change:
            raise SlurmError(f"{error}: {found}. To change: {change}.") from None
        working = [node for node in fitting if node.works]
        if len(working) >= allocation.nodes or not fitting:
            raise
        states = ", ".join(sorted({node.state for node in fitting} - {node.state for node in working}))
        logger.warning(
            f"Slurm cannot start the job now, so it will wait: {found}, of which {len(working)} work; the others are "
            f"{states} (`sinfo -R` shows why)."
        )
        return ""


def expected_start(answer: str) -> str:
    """A clause about the time in Slurm's answer, "can start now" or "expected to start at 14:30"; "" without one."""
    match = re.search(r"to start at (\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)", answer)
    if not match:
        return ""
    now, start = datetime.now(), datetime.fromisoformat(match[1])
    if start - now > _EVER:  # Slurm does not know
        return ""
    if start - now < _NOW:
        return "can start now"
    return f"expected to start {start:%H:%M}" + (f" on {start:%d %b}" if start.date() != now.date() else "")
