"""Flags of commands that process many items (conversion, verification, segmentation), and their allocation.

They are the flags of submit.py without those for ranks: a task of an array is one process on one node, with its own
workers. The cluster file's nodes, GPUs, cores and network are meant for training and do not apply; its partition,
account, qos, wckey, constraint, memory, exclude, setup, [environment], [container], srun_args, [sbatch] and python do.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cfmask.errors import UserError
from launch.allocation.cluster_file import load_cluster_file
from launch.allocation.resolve import Allocation, choose_executor, resolve_allocation
from launch.allocation.settings import (
    BY_NAME,
    GPU_SETTINGS,
    PARTITION_TIME,
    add_setting_flags,
    argument_type,
    count,
    flag_of,
    gpus,
)

TASKS, TIME_MIN, LOGS = 16, 240, Path("jobs")
"""Defaults."""

_HELP = {
    "cpus_per_task": "cores and worker processes of a task (default: 8)",
    "time": "time limit of a start: minutes, or Slurm's H:MM:SS, D-HH:MM:SS; UNLIMITED; partition: the partition's "
    f"default. A task that needs longer is requeued, and resumes (default: {TIME_MIN}, or the cluster file's limit if "
    "that is lower)",
    "array_parallelism": "tasks that may run at once (default: all)",
    "restarts_without_progress": "automatic restarts in a row without a further finished item, whatever their cause, "
    "before a task is given up (default: 3; 0: none)",
}
_SITE = ("time", "partition", "account", "qos", "wckey", "constraint", "memory", "exclude", "restarts_without_progress")
_FLAGS = (*_SITE, "cpus_per_task", "dependency", "array_parallelism")
_FROM_FILE = (*_SITE, "setup", "srun_args", "python")


@dataclass(frozen=True)
class Array:
    """The tasks of an array."""

    allocation: Allocation
    """Of each task: one process on one node."""
    tasks: int
    """Their largest number; there are not more tasks than items."""
    workers: int
    """Processes of a task: one for each GPU, or one for each core."""
    logs: Path
    """Gets a folder for the array; nodes must see it."""
    cluster_file: Path | None = None


def add_array_arguments(parser: argparse.ArgumentParser, *, with_gpus: bool = False) -> None:
    """
    Args:
        with_gpus: The work is done on GPUs.
    """
    group = parser.add_argument_group("Slurm array", "Where the work is done. These flags do not change the result.")
    group.add_argument(
        "--executor",
        choices=("local", "slurm", "auto"),
        default="local",
        help="local: processes of this machine; slurm: a job array, which this command follows until it ends; auto: "
        "slurm if srun is on the PATH, else local (default: local)",
    )
    group.add_argument(
        "--array",
        type=argument_type(count),
        metavar="N",
        help=f"number of tasks, which share the items (default: {TASKS})",
    )
    if with_gpus:
        group.add_argument(
            "--gpus-per-task",
            type=argument_type(gpus),
            metavar="[TYPE:]N",
            help="GPUs of a task, with one worker process each; 0: use CPUs (default: 1)",
        )
    add_setting_flags(group, (BY_NAME[name] for name in _FLAGS), _HELP)
    group.add_argument(
        "--logs", type=Path, metavar="DIR", help=f"folder for logs and results that nodes can see (default: {LOGS})"
    )


def resolve_array(arguments: argparse.Namespace) -> Array | None:
    """The array that the flags of ``add_array_arguments`` and the cluster file describe; None: work on this machine.

    Raises:
        UserError: This machine has no Slurm, the cluster file cannot be used, or a flag would do nothing.
    """
    if choose_executor(arguments) != "slurm":
        names = ("array", "gpus_per_task", "after", "logs", *_FLAGS)
        if given := [flag_of(name) for name in names if getattr(arguments, name, None) is not None]:
            raise UserError(f"{', '.join(given)} without --executor slurm would do nothing: add it, or leave them out.")
        return None
    file = load_cluster_file(arguments.cluster)
    gpu_keys = {key: value for key, value in file.values.items() if key in GPU_SETTINGS}
    file = replace(file, values={key: value for key, value in file.values.items() if key in _FROM_FILE})
    settings = dict.fromkeys(BY_NAME) | {name: getattr(arguments, name) for name in _FLAGS}
    settings |= {"nodes": 1, "gpus_per_node": ("", 0)}
    allocation = resolve_allocation(argparse.Namespace(**settings, executor="slurm", after=arguments.after), file)
    if arguments.time is None:
        allocation = replace(allocation, time=_default_time(file.values))
    if hasattr(arguments, "gpus_per_task"):
        allocation = _with_gpus(allocation, arguments.gpus_per_task, gpu_keys)
    return Array(
        allocation=allocation,
        tasks=arguments.array or TASKS,
        workers=allocation.gpus_per_node or allocation.cpus_per_task,
        logs=(arguments.logs or LOGS).absolute(),
        cluster_file=file.path,
    )


def _default_time(values: Mapping[str, Any]) -> int | str:
    """The cluster file's time limit is meant for training, and longer than a task needs."""
    limit = BY_NAME["time"].read(str(values.get("time", TIME_MIN)))
    return limit if limit == PARTITION_TIME else min(TIME_MIN, limit) if isinstance(limit, int) else TIME_MIN


def _with_gpus(allocation: Allocation, given: tuple[str, int] | None, gpu_keys: Mapping[str, Any]) -> Allocation:
    """
    Args:
        given: Type and number of a task's GPUs, from the flag.
        gpu_keys: How the cluster file requests the GPUs of a node. The site may require this way, and the type.
    """
    way = next(iter(gpu_keys), "gpus_per_node")
    of_file, on_node = BY_NAME[way].read(str(gpu_keys[way])) if gpu_keys else ("", 1)
    gpu_type, number = given or ("", on_node if way == "exclusive" else 1)
    if number == 0:
        return allocation
    if way == "gpus_per_task" and number > 1:  # that setting is the GPU of one rank
        way = "gpus_per_node"
    return replace(allocation, gpus_from=way, gpu_type=gpu_type or of_file, gpus_per_node=number)
