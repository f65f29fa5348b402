"""The settings of an allocation. Each is a flag of the commands that submit jobs; most are keys of the cluster file.
``resolve.py`` combines their values.
"""

from __future__ import annotations

import argparse
import re
import subprocess
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from launch.restarts.policy import RESTARTS_WITHOUT_PROGRESS
from launch.restarts.retries import RETRIES

T = TypeVar("T")

UNLIMITED, PARTITION_TIME = "UNLIMITED", "partition"
"""Values of --time that are not numbers: no limit, and the partition's default."""
GPU_SETTINGS = ("gpus_per_node", "gres", "gpus_per_task", "exclusive")
"""Alternative ways to request the GPUs of a node."""


@dataclass(frozen=True)
class FileType:
    """The type of a value in the cluster file."""

    name: str
    """For error messages."""
    types: tuple[type, ...]


TEXT = FileType("a string", (str,))
NUMBER = FileType("a number", (int, float))
COUNT = FileType("a whole number", (int,))
TEXT_OR_COUNT = FileType("a string or a whole number", (str, int))
TEXTS = FileType("a list of strings", (list,))
TABLE = FileType("a table", (dict,))


# --- readers: the value of a text; a ValueError says what the text should be ----------------------------------------


def _reader(pattern: str, expected: str, convert: Callable[[re.Match[str]], T]) -> Callable[[str], T]:
    """A reader of texts that match a pattern as a whole."""

    def read(given: str) -> T:
        match = re.fullmatch(pattern, given)
        if not match:
            raise ValueError(expected)
        return convert(match)

    return read


def _typed(match: re.Match[str]) -> tuple[str, int]:
    if match[1] and not int(match[2]):
        raise ValueError("a number of GPUs of that type: 0 requests none, and means CPUs")
    return match[1] or "", int(match[2])


_GPUS = r"(?:((?=[\w.+-]*[A-Za-z])[A-Za-z0-9][\w.+-]*):)?(\d+)"
"""[TYPE:]N; examples of types are a100, 2080ti, a100-sxm4-80gb, nvidia_a100_1g.5gb."""

count = _reader(r"0*[1-9]\d*", "a whole number, 1 or more", lambda match: int(match[0]))
count_or_0 = _reader(r"\d+", "a whole number, 0 or more", lambda match: int(match[0]))
gpus = _reader(_GPUS, "a number, or TYPE:NUMBER as in a100:8", _typed)
gpu_gres = _reader(
    f"gpu:{_GPUS}", "gpu:NUMBER or gpu:TYPE:NUMBER (other resources: [sbatch] gres in the cluster file)", _typed
)
gpu_of_task = _reader(
    _GPUS.replace(r"\d+", "0*1"), "1 or TYPE:1: a rank uses one GPU. --tasks-per-node is the number of ranks", _typed
)
whole_nodes = _reader(r"\d+", "the number of GPUs of a node; 0: train on its CPUs", lambda match: ("", int(match[0])))
on_or_off = _reader("on|off", "on or off", lambda match: match[0])
text = _reader(r"[^\s\"'\\]+", "a word", lambda match: match[0])
size = _reader(
    r"\d+([KMGTkmgt][Bb]?)?", "a size in MB, or with a unit as in 480G; 0: all of it", lambda match: match[0]
)
job_id = _reader(r"\d+(_\d+)?", "the number of a job", lambda match: match[0])
wandb_project = _reader(
    r"([\w-]+/)?[\w.-]{1,128}", "PROJECT or ENTITY/PROJECT, of letters, digits, - and _", lambda match: match[0]
)


def minutes(given: str) -> int:
    """A time limit in Slurm's formats M, M:S, H:M:S, D-H, D-H:M and D-H:M:S. Seconds round up to a minute."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", given)
    if not match:
        raise ValueError("minutes, or Slurm's H:MM:SS or D-HH:MM:SS")
    days, *parts = (None if part is None else int(part) for part in match.groups())
    numbers = [part for part in parts if part is not None]
    if days is None and len(numbers) < 3:  # M or M:S
        numbers.insert(0, 0)
    hours, mins, secs = (numbers + [0, 0])[:3]
    total = (days or 0) * 1440 + hours * 60 + mins + (secs > 0)
    if total < 1:
        raise ValueError("more than nothing")
    return total


def time_limit(given: str) -> int | str:
    """Minutes, UNLIMITED, or PARTITION_TIME."""
    if given.upper() in (UNLIMITED, "INFINITE"):
        return UNLIMITED
    if given.lower() == PARTITION_TIME:
        return PARTITION_TIME
    try:
        return minutes(given)
    except ValueError as error:
        raise ValueError(f"{error}, {UNLIMITED}, or {PARTITION_TIME} for the partition's default") from None


def duration(given: str) -> float:
    """Minutes, above 0."""
    try:
        value = float(given)
    except ValueError:
        value = 0
    if not 0 < value < float("inf"):
        raise ValueError("a number of minutes, above 0")
    return value


def duration_or_0(given: str) -> float:
    return 0.0 if given in ("0", "0.0") else duration(given)


def command(given: str) -> str:
    """A command that sh can parse."""
    complaint = subprocess.run(["sh", "-n", "-c", given], capture_output=True, text=True).stderr.strip()
    if complaint or not given.strip():
        raise ValueError(f"a command of the shell ({complaint or 'it is empty'})")
    return given


_FILE_TYPES: dict[Callable[[str], Any], FileType] = {
    **dict.fromkeys((count, count_or_0, whole_nodes), COUNT),
    **dict.fromkeys((time_limit, gpus, gpu_of_task, size), TEXT_OR_COUNT),
    **dict.fromkeys((duration, duration_or_0), NUMBER),
}
"""Types in the cluster file by reader; the others are TEXT."""


# --- the settings -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """A flag, and a key of the cluster file."""

    name: str
    read: Callable[[str], Any]
    """Returns the value of a text, or raises a ValueError that says what the text should be."""
    metavar: str
    help: str
    default: Any = None

    @property
    def flag(self) -> str:
        return flag_of(self.name)


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


_RANKS = (
    Setting("nodes", count, "N", "number of nodes (default: 1)", 1),
    Setting(
        "gpus_per_node",
        gpus,
        "[TYPE:]N",
        "GPUs of a node, with one rank each (default: 8 on Slurm, else the GPUs of this machine that "
        "CUDA_VISIBLE_DEVICES shows)",
    ),
    Setting("tasks_per_node", count, "N", "ranks of a node that trains on CPUs (default: 1), or with --gpus-per-task"),
)
_FOR_SLURM = (
    Setting("gres", gpu_gres, "gpu[:TYPE]:N", "request the GPUs of a node with sbatch's --gres instead"),
    Setting(
        "gpus_per_task",
        gpu_of_task,
        "[TYPE:]1",
        "request one GPU for each of the --tasks-per-node N ranks, with sbatch's --gpus-per-task",
    ),
    Setting(
        "exclusive",
        whole_nodes,
        "N",
        "request whole nodes with N GPUs each: sbatch gets --exclusive, and no request for GPUs",
    ),
    Setting("cpus_per_task", count, "N", "cores of a rank, for its threads and its data loader (default: 8)", 8),
    Setting(
        "time",
        time_limit,
        "MIN",
        "time limit of one start: minutes, or Slurm's H:MM:SS, D-HH:MM:SS; UNLIMITED; partition: the partition's "
        "default. A run requeues itself before the limit (default: 1440)",
        1440,
    ),
    Setting("partition", text, "NAME", "Slurm partition"),
    Setting("account", text, "NAME", "Slurm account"),
    Setting("qos", text, "NAME", "Slurm quality of service"),
    Setting(
        "wckey",
        text,
        "NAME",
        "Slurm's workload characterization key, if the site checks it (default: the user's default key)",
    ),
    Setting("constraint", text, "LIST", "features that nodes must have"),
    Setting("memory", size, "SIZE", "memory of a node, as for sbatch's --mem: 480G; 0 is all of it"),
    Setting("exclude", text, "NODES", "nodes that the job must not use: n07,n[11-14]"),
    Setting("dependency", text, "LIST", "jobs to wait for, as for sbatch: afterany:123,singleton"),
    Setting("array_parallelism", count, "N", "members of a sweep that may run at once (default: all)"),
    Setting(
        "interface", text, "NAME", "network interface between ranks (sets NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME)"
    ),
)
_SUPERVISION = (
    Setting(
        "restarts_without_progress",
        count_or_0,
        "N",
        "automatic restarts in a row without progress beyond the last checkpoint, whatever their cause, before the "
        f"job is given up (default: {RESTARTS_WITHOUT_PROGRESS}; 0: none)",
    ),
    Setting(
        "retries",
        count_or_0,
        "N",
        "restarts within 24 hours after a rank died or hung, or found its node unhealthy (default: "
        f"{RETRIES}; 0: none). A node on which two ranks have died is excluded",
    ),
    Setting(
        "hang_timeout",
        duration_or_0,
        "MIN",
        "time without progress after which a training rank counts as hung; at least 20 times the time of a step "
        "(default: 5; 0: never)",
    ),
    Setting(
        "health_check",
        on_or_off,
        "on|off",
        "check the nodes at each start: GPUs, run folder, local disk, clock (default: on)",
    ),
    Setting(
        "rendezvous_timeout", duration, "MIN", "time that ranks wait for each other before they train (default: 30)"
    ),
    Setting(
        "collective_timeout",
        duration,
        "MIN",
        "time that ranks wait for each other in a step before the job fails (default: 30)",
    ),
    Setting(
        "notify",
        command,
        "COMMAND",
        "shell command that rank 0 runs in the run folder when the run has finished, failed, was given up, or was "
        "preempted 5 times within 24 hours. Standard input is a JSON object: event, run, job, attempt, step, "
        "total_steps, why, node, time, top1. The command may take 30 s; its exit code does not affect the run",
    ),
    Setting(
        "wandb",
        wandb_project,
        "[ENTITY/]PROJECT",
        "also send the history of log.jsonl, the recipe and the results to Weights & Biases; needs the package wandb",
    ),
)
SETTINGS = (*_RANKS, *_FOR_SLURM, *_SUPERVISION)
SLURM_ONLY = tuple(setting.name for setting in _FOR_SLURM)
"""Settings that have no effect without Slurm."""
BY_NAME = {setting.name: setting for setting in SETTINGS}
RECIPE_KEYS = {"shards": TEXT, "eval_sets": TEXTS}
"""Recipe settings that a cluster file may have: where data is on this cluster. Others belong to the experiment."""
FILE_KEYS = {
    setting.name: _FILE_TYPES.get(setting.read, TEXT) for setting in SETTINGS if setting.name != "dependency"
} | RECIPE_KEYS
"""Keys of the cluster file that are also flags of submit.py, with the types of their values."""


CLUSTER_HELP = (
    "cluster file: settings of the cluster, and the place of its data; flags override it ($CFMASK_CLUSTER, else "
    "./cluster.toml, else ~/.config/cfmask/cluster.toml; template: slurm/cluster.toml)"
)


# --- flags ------------------------------------------------------------------------------------------------------------


def add_allocation_arguments(parser: argparse.ArgumentParser, *, here: bool = False) -> None:
    """
    Args:
        here: The command can do the work in its own process, and does so unless one of these flags is given.
    """
    group = parser.add_argument_group("allocation", "Where the job runs. These flags do not change the results.")
    local = "slurm if srun is on the PATH, else local"
    executors, explained = (
        (
            ("here", "auto", "slurm", "local"),
            f"here: in this process; auto: {local} (default: here; auto with any other of these flags)",
        )
        if here
        else (("auto", "slurm", "local", "debug"), f"auto: {local}; debug: one rank in this process (default: auto)")
    )
    group.add_argument("--executor", choices=executors, default=executors[0], help=explained)
    add_setting_flags(group, SETTINGS)


def add_setting_flags(
    group: argparse._ArgumentGroup, settings: Iterable[Setting], help_texts: Mapping[str, str] | None = None
) -> None:
    """Add --cluster, a flag for each setting, and --after.

    Args:
        help_texts: By name, instead of the settings' own.
    """
    group.add_argument(
        "--cluster",
        type=Path,
        metavar="FILE",
        help=CLUSTER_HELP,
    )
    for setting in settings:
        explained = (help_texts or {}).get(setting.name, setting.help)
        group.add_argument(
            setting.flag, type=argument_type(setting.read), metavar=setting.metavar, help=explained.replace("%", "%%")
        )
    group.add_argument(
        "--after",
        nargs="+",
        type=argument_type(job_id),
        metavar="JOB",
        help="start when these jobs have ended successfully (afterok)",
    )


def given_flags(arguments: argparse.Namespace) -> list[str]:
    """The allocation flags on the command line, without --executor."""
    return [flag_of(name) for name in (*BY_NAME, "after", "cluster") if getattr(arguments, name, None) is not None]


def argument_type(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """For argparse's ``type``: the value, or an error that says what it should be."""

    def checked(given: str) -> Any:
        try:
            return read(given)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{given!r} is not {error}") from None

    return checked
