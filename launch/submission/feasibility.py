"""Asks Slurm about a job before it is queued: sbatch accepts some jobs that could never start."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timedelta

from cfmask.errors import did_you_mean
from launch.allocation.nodes import chosen_partitions, fitting_nodes, nodes_of, partition_refusal
from launch.allocation.resolve import Allocation
from launch.slurm import site
from launch.slurm.client import SlurmError, SlurmUnavailable
from launch.slurm.queue import history, host_names, known_jobs
from launch.slurm.submission import test_only

logger = logging.getLogger(__name__)

_NOW, _EVER = timedelta(minutes=2), timedelta(days=365)
_NO_SUCH_NODES = r"node configuration is not available|count per node can not be satisfied|generic resource"
"""Of requests that the nodes cannot meet; the last one if no node has GPUs at all."""


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
        answer, partitions = test_only(text), list[dict[str, str]]()
    except SlurmUnavailable:
        raise
    except SlurmError as error:
        explain_refusal(error, allocation)
        return ""
    with suppress(SlurmError):  # sbatch has accepted the job, so an answer is not waited for
        partitions = site.read_partitions(patience_s=0)
    # Without a partition, the site may choose another one than the default, by the size of the job.
    chosen_by_site = re.search(r" in partition (\S+)", answer)
    wanted = allocation.partition or (chosen_by_site[1] if chosen_by_site else None)
    _check_partitions(chosen_partitions(partitions, wanted), allocation)
    _check_dependency(allocation.dependency or "")
    return answer


def _check_partitions(chosen: Sequence[Mapping[str, str]], allocation: Allocation) -> None:
    """
    Raises:
        SlurmError: Each of the chosen partitions has a limit that the job exceeds. sbatch may queue it nevertheless.
    """
    refusals = [partition_refusal(each, allocation) for each in chosen]
    found = [refusal for refusal in refusals if refusal]
    if found and len(found) == len(chosen):
        never = f"The job could never start: {'; '.join(limit for limit, _ in found)}"
        if not site.qos_may_exceed_partitions():
            raise SlurmError(f"{never}. To change: {found[0][1]}, or another --partition.")
        logger.warning(f"{never}, unless its quality of service allows more.")


def _check_dependency(dependency: str) -> None:
    """
    Raises:
        SlurmError: A job to wait for is unknown. sbatch takes it for one that has ended.
    """
    after = re.findall(r"\bafter\w*:([\d:_+]+)", dependency)
    jobs = sorted({job.partition("+")[0].partition("_")[0] for each in after for job in each.split(":")} - {""})
    if unknown := _unknown_jobs(jobs):
        raise SlurmError(
            f"There is no job {', '.join(unknown)} to wait for: Slurm would start this one at once. Check the number "
            "(`squeue --me`, `sacct -X`), or leave --after or --dependency out."
        )


def _unknown_jobs(jobs: Sequence[str]) -> list[str]:
    """Those that neither the queue nor the history has; none if one of these cannot be asked, or does not show jobs of
    other users. Without accounting, jobs that ended some time ago are unknown, too."""
    try:
        missing = sorted(set(jobs) - known_jobs(jobs))
        if missing and site.hides_jobs():
            return []
        ended = {start.job.partition("_")[0] for start in history(missing)}
    except SlurmError:
        return []
    return sorted(set(missing) - ended)


def explain_refusal(error: SlurmError, allocation: Allocation) -> None:
    """Say why Slurm refuses a job; returns, with a warning, if the job may wait in the queue until nodes work again.

    Raises:
        SlurmError: The error, with what there is, what is requested, and what to change.
    """
    if "invalid partition" in str(error).lower():
        names = [each["PartitionName"] for each in site.read_partitions()]
        unknown = [name for name in (allocation.partition or "").split(",") if name not in names]
        near = "".join(did_you_mean(name, names) for name in unknown[:1])
        raise SlurmError(f"{error}{near} There are {', '.join(names)}.") from None
    if not re.search(_NO_SUCH_NODES, str(error), re.IGNORECASE):
        raise error
    partitions = chosen_partitions(site.read_partitions(), allocation.partition)
    _check_partitions(partitions, allocation)
    own = nodes_of(site.read_nodes(), [each["PartitionName"] for each in partitions])
    fitting, found, change = fitting_nodes(own, allocation) if own else ([], "the partition has no nodes", "")
    if change:
        raise SlurmError(f"{error}: {found}. To change: {change}.") from None
    excluded = set(host_names(allocation.exclude)) if allocation.exclude else set()
    left = [node for node in fitting if node.name not in excluded]
    if own and len(left) < allocation.nodes:
        raise SlurmError(
            f"{error}: {found}, but --exclude {allocation.exclude} leaves {len(left)} of them. To change: --exclude, "
            "or exclude in cluster.toml."
        ) from None
    working = [node for node in left if node.works]
    if len(working) >= allocation.nodes or not left:
        raise SlurmError(f"{error}: {found}{_other_requests(allocation)}.") from None
    states = ", ".join(sorted({node.state for node in left} - {node.state for node in working}))
    logger.warning(
        f"Slurm cannot start the job now, so it will wait: {found}, of which {len(working)} work; the others are "
        f"{states} (`sinfo -R` shows why)."
    )


def _other_requests(allocation: Allocation) -> str:
    """A clause about requests that ``fitting_nodes`` does not know."""
    given: Mapping[str, object] = {"constraint": allocation.constraint, **allocation.sbatch}
    options = " ".join(f"--{name}={value}" for name, value in given.items() if value)
    return f", and it is also asked for {options}: leave this out, or change it" if options else ""


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
