"""Flags of commands that do one thing to many items (conversion, verification, segmentation), and what they add up to.

They are those of submit.py, but for the ones that ask for ranks: a task of such an array is one process on one node,
with workers of its own. So the cluster file's nodes, GPUs, cores and network, which are meant for training, do not
count here; its partition, account, qos, wckey, constraint, memory, exclude, setup, [environment], [container],
srun_args, [sbatch] and python do.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cfmask.errors import UserError
from launch.allocation.cluster_file import ClusterFile, load_cluster_file
from launch.allocation.resolve import Allocation, choose_executor, resolve_allocation
from launch.allocation.settings import (
    CLUSTER_HELP,
    GPU_SETTINGS,
    PARTITION_TIME,
    SETTINGS,
    Setting,
    argument_type,
    count,
    gpus,
    job_id,
)

TASKS, TIME_MIN, LOGS = 16, 240, Path("jobs")
"""Defaults."""

_HELP = {
    "cpus_per_task": "cores and worker processes of a task (default: 8)",
    "time": "time limit of a start: minutes, or Slurm's H:MM:SS, D-HH:MM:SS; UNLIMITED; partition: the partition's "
    f"default. A task that needs longer is queued again, and resumes (default: {TIME_MIN}, or the cluster file's if "
    "that is less)",
    "array_parallelism": "tasks that may run at once (default: all)",
    "restarts_without_progress": "automatic restarts in a row, whatever their cause, that a task may have without "
    "finishing an item (default: 3; 0: none)",
}
_FLAGS = (
    *("cpus_per_task", "time", "partition", "account", "qos", "wckey", "constraint", "memory", "exclude", "dependency"),
    *("array_parallelism", "restarts_without_progress"),
)
_FROM_FILE = {
    *("time", "partition", "account", "qos", "wckey", "constraint", "memory", "exclude", "restarts_without_progress"),
    *("setup", "srun_args", "python"),
}


@dataclass(frozen=True)
class Array:
    """What an array is given.

    allocation: of each task: one process on one node.
    tasks: at most so many.
    workers: processes of a task: one a GPU, or one a core.
    logs: gets a folder for the array; nodes must see it.
    """

    allocation: Allocation
    tasks: int
    workers: int
    logs: Path


def add_array_arguments(parser: argparse.ArgumentParser, *, with_gpus: bool = False) -> None:
    """with_gpus: the work is done on GPUs."""
    g = parser.add_argument_group("as a Slurm array", "Where the work is done. Changes nothing about its result.")
    g.add_argument(
        "--executor",
        choices=("local", "slurm", "auto"),
        default="local",
        help="local: processes of this machine; slurm: a job array, which this command follows to its end; auto: slurm "
        "if srun is there, else local (default: local)",
    )
    g.add_argument("--cluster", type=Path, metavar="FILE", help=CLUSTER_HELP)
    g.add_argument(
        "--array", type=argument_type(count), metavar="N", help=f"tasks; they share the items (default: {TASKS})"
    )
    if with_gpus:
        g.add_argument(
            "--gpus-per-task",
            type=argument_type(gpus),
            metavar="[TYPE:]N",
            help="GPUs of a task, with a worker process each; 0: on CPUs (default: 1)",
        )
    for setting in _settings():
        g.add_argument(
            setting.flag,
            type=argument_type(setting.read),
            metavar=setting.metavar,
            help=_HELP.get(setting.name, setting.help).replace("%", "%%"),
        )
    g.add_argument("--after", nargs="+", type=job_id, metavar="JOB", help="start when these jobs have ended well")
    g.add_argument(
        "--logs", type=Path, metavar="DIR", help=f"gets logs and results; nodes must see it (default: {LOGS})"
    )


def _settings() -> list[Setting]:
    return [setting for setting in SETTINGS if setting.name in _FLAGS]


def resolve_array(arguments: argparse.Namespace) -> Array | None:
    """What the flags of ``add_array_arguments`` and the cluster file add up to; None for processes of this machine.

    Raises:
        UserError: there is no Slurm here, the cluster file cannot be used, or a flag would do nothing.
    """
    if choose_executor(arguments) != "slurm":
        own = ["array", "gpus_per_task", "after", "logs", "cluster"]
        names = [*own, *(setting.name for setting in _settings())]
        if given := [name for name in names if getattr(arguments, name, None) is not None]:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise UserError(f"{flags} without --executor slurm would do nothing: add it, or leave them out.")
        return None
    file = load_cluster_file(arguments.cluster)
    ways = {key: value for key, value in file.values.items() if key in GPU_SETTINGS}
    file = replace(file, values={key: value for key, value in file.values.items() if key in _FROM_FILE})
    asked = {each.name: getattr(arguments, each.name, None) if each.name in _FLAGS else None for each in SETTINGS}
    asked |= {"nodes": 1, "gpus_per_node": ("", 0)}
    allocation = resolve_allocation(argparse.Namespace(**asked, executor="slurm", after=arguments.after), file)
    if arguments.time is None:
        allocation = replace(allocation, time=_time(file))
    number = 0
    if hasattr(arguments, "gpus_per_task"):
        allocation = _with_gpus(allocation, arguments.gpus_per_task, ways)
        number = allocation.gpus_per_node
    return Array(
        allocation=allocation,
        tasks=arguments.array or TASKS,
        workers=number or allocation.cpus_per_task,
        logs=(arguments.logs or LOGS).absolute(),
    )


def _time(file: ClusterFile) -> int | str:
    """Of a task, if no flag says it: the file's is meant for training, and longer than a task needs."""
    setting = next(setting for setting in SETTINGS if setting.name == "time")
    limit = setting.read(str(file.values.get("time", TIME_MIN)))
    if limit == PARTITION_TIME:
        return limit
    return min(TIME_MIN, limit) if isinstance(limit, int) else TIME_MIN


def _with_gpus(allocation: Allocation, asked: tuple[str, int] | None, ways: Mapping[str, Any]) -> Allocation:
    """
    Args:
        asked: type and number of a task's GPUs, by flag.
        ways: how the cluster file asks for a node's GPUs. The site may demand this way, and the type.
    """
    way = next(iter(ways), "gpus_per_node")
    setting = next(setting for setting in SETTINGS if setting.name == way)
    of_file, on_node = setting.read(str(ways[way])) if ways else ("", 1)
    gpu_type, number = asked or ("", on_node if way == "exclusive" else 1)
    if number == 0:
        return allocation
    if way == "gpus_per_task" and number > 1:  # there it is the one GPU of a rank
        way = "gpus_per_node"
    return replace(allocation, gpus_from=way, gpu_type=gpu_type or of_file, gpus_per_node=number)
