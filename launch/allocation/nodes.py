"""Whether partitions have nodes of the size that an allocation requests, whatever the state of these nodes, and allow
it. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from launch.allocation.resolve import Allocation
from launch.allocation.settings import PARTITION_TIME, UNLIMITED
from launch.slurm.texts import SlurmNode, gpus_of, megabytes, seconds


def chosen_partitions(partitions: Sequence[Mapping[str, str]], wanted: str | None) -> list[Mapping[str, str]]:
    """The partitions that a job may go to: those named (Slurm takes a list), else the default."""
    if wanted:
        return [each for name in wanted.split(",") for each in partitions if each["PartitionName"] == name]
    return [each for each in partitions if each.get("Default") == "YES"]


def nodes_of(nodes: Sequence[SlurmNode], partitions: Iterable[str]) -> list[SlurmNode]:
    """The nodes of the partitions, each once."""
    wanted = set(partitions)
    return list({node.name: node for node in nodes if node.partition in wanted}.values())


def fitting_nodes(own: Sequence[SlurmNode], allocation: Allocation) -> tuple[list[SlurmNode], str, str]:
    """The nodes that have the GPUs, CPUs and memory that are requested.

    Args:
        own: The nodes of the partitions; not empty.

    Returns:
        These nodes; what there is and what is requested; and what to change, "" if there are enough of them.
    """
    a = allocation
    cpus = a.tasks_per_node * a.cpus_per_task
    gpus = f"{a.gpus_per_node} GPUs" + (f" ({a.gpu_type})" if a.gpu_type else "") if a.gpus_per_node else ""
    wanted = " and ".join(filter(None, [gpus, f"{cpus} CPU{'s' if cpus > 1 else ''}"]))
    with_gpus = list(own)
    if a.gpus_from != "exclusive":  # of whole nodes, Slurm need not know the GPUs
        with_gpus = [node for node in own if gpus_of(node.gres, a.gpu_type) >= a.gpus_per_node]
    if len(with_gpus) < a.nodes:
        kinds = "; ".join(sorted({node.gres.replace("(null)", "no GPUs") for node in own}))
        found = f"{len(with_gpus)} of {len(own)} nodes have {gpus}; {a.nodes} requested; they have {kinds}"
        if not gpus:
            return with_gpus, f"{len(own)} nodes exist; {a.nodes} requested", "--nodes, or another --partition"
        change = "another --partition, another type or number of GPUs (--gpus-per-node 0: train on CPUs), or --nodes"
        return with_gpus, found, change
    large = [node for node in with_gpus if node.cpus >= cpus]
    found = f"{len(large)} of {len(own)} nodes have {wanted}; {a.nodes} requested"
    if len(large) >= a.nodes:
        return _with_memory(large, a, found)
    most = sorted((node.cpus for node in with_gpus), reverse=True)[a.nodes - 1]
    each = most // a.tasks_per_node
    fewer = f"--cpus-per-task {each}, or for training cpus_per_task = {each} in cluster.toml"
    have = f"{a.nodes} nodes have" if a.nodes > 1 else "a node has"
    return large, found, f"{fewer if each else f'--tasks-per-node {most}'}: {have} {most} CPUs or more"


def _with_memory(large: list[SlurmNode], a: Allocation, found: str) -> tuple[list[SlurmNode], str, str]:
    """``fitting_nodes`` out of those with enough GPUs and CPUs. A node whose memory is unknown has enough."""
    wanted = megabytes(a.memory or "0") or 0
    fitting = [node for node in large if not node.memory_mb or node.memory_mb >= wanted]
    if not wanted or len(fitting) >= a.nodes:
        return fitting, found, ""
    most = sorted((node.memory_mb for node in large), reverse=True)[a.nodes - 1]
    have = f"{a.nodes} of them have" if a.nodes > 1 else "one of them has"
    return (
        fitting,
        f"{found}, of which {len(fitting)} have {a.memory} of memory",
        f'--memory {most}M, or memory = "{most}M" in cluster.toml: {have} {most} MB or more',
    )


def partition_refusal(partition: Mapping[str, str], allocation: Allocation) -> tuple[str, str] | None:
    """The limit of a partition that a job exceeds, and what to change; None if it exceeds none. sbatch queues such a
    job unless the site sets EnforcePartLimits, and it waits for ever."""
    can_be_shorter = "time-min" in allocation.sbatch  # Slurm shortens the job to fit
    if not can_be_shorter and (refusal := time_refusal(partition, allocation.time)):
        return refusal
    name, most = partition["PartitionName"], partition.get("MaxNodes", UNLIMITED)
    if most.isdigit() and allocation.nodes > int(most):
        return f"{name} allows at most {most} nodes, and --nodes requests {allocation.nodes}", f"--nodes {most}"
    return None


def time_refusal(partition: Mapping[str, str], time: int | str) -> tuple[str, str] | None:
    """``partition_refusal`` because of the time limit.

    Args:
        time: ``Allocation.time``.
    """
    name, most = partition["PartitionName"], partition.get("MaxTime", UNLIMITED)
    minutes = seconds(most) / 60
    if time == PARTITION_TIME or (math.inf if time == UNLIMITED else int(time)) <= minutes:
        return None
    requested = "no limit" if time == UNLIMITED else f"{time} min"
    shorter = f"--time {minutes:.0f}, or time = {minutes:.0f} in cluster.toml"
    found = f"{name} allows at most {most}, and --time requests {requested}"
    return found, f"{shorter}: a run continues over any number of starts"
