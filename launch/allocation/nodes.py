"""Whether partitions have nodes of the size that an allocation requests, whatever the state of these nodes. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from launch.allocation.resolve import Allocation
from launch.slurm.texts import SlurmNode, gpus_of


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
    """The nodes that have the GPUs and CPUs that are requested.

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
        kinds = "; ".join(sorted({node.gres for node in own}))
        found = f"{len(with_gpus)} of {len(own)} nodes have {gpus}, and {a.nodes} are requested; they have {kinds}"
        if not gpus:
            return with_gpus, f"{len(own)} nodes exist, and {a.nodes} are requested", "--nodes, or another --partition"
        change = "another --partition, another type or number of GPUs (--gpus-per-node 0: train on CPUs), or --nodes"
        return with_gpus, found, change
    large = [node for node in with_gpus if node.cpus >= cpus]
    found = f"{len(large)} of {len(own)} nodes have {wanted}; {a.nodes} requested"
    if len(large) >= a.nodes:
        return large, found, ""
    most = sorted((node.cpus for node in with_gpus), reverse=True)[a.nodes - 1]
    each = most // a.tasks_per_node
    fewer = f"--cpus-per-task {each}, or cpus_per_task = {each} in cluster.toml"
    return large, found, f"{fewer if each else f'--tasks-per-node {most}'}: {a.nodes} nodes have {most} CPUs or more"
