"""The settings of a job's allocation: each is a flag of every command that submits jobs, and most are keys of the
cluster file as well. allocation.py adds up where their values come from.
"""

from __future__ import annotations

import argparse
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.restarts.policy import RESTARTS_WITHOUT_PROGRESS
from launch.restarts.retries import RETRIES

# What a value may be: the words for it in an error, and the TOML types.
TEXT: tuple[str, tuple[type, ...]] = ("a string", (str,))
NUMBER: tuple[str, tuple[type, ...]] = ("a number", (int, float))
COUNT: tuple[str, tuple[type, ...]] = ("a whole number", (int,))
TEXT_OR_COUNT: tuple[str, tuple[type, ...]] = ("a string or a whole number", (str, int))
TEXTS: tuple[str, tuple[type, ...]] = ("a list of strings", (list,))
TABLE: tuple[str, tuple[type, ...]] = ("a table", (dict,))

UNLIMITED, PARTITION_TIME = "UNLIMITED", "partition"
"""Values of --time that are no number: no limit, and the partition's own default."""
GPU_SETTINGS = ("gpus_per_node", "gres", "gpus_per_task", "exclusive")
"""Alternative ways to ask for the GPUs of a node."""


@dataclass(frozen=True)
class Setting:
    """A flag, and a key of the cluster file. read: makes the value of the text, or says in a ValueError what it should
    be. kind: what it may be in the file; None: it cannot stand there. slurm: it does something on Slurm only."""

    name: str
    read: Callable[[str], Any]
    default: Any
    help: str
    metavar: str | None = None
    kind: tuple[str, tuple[type, ...]] | None = TEXT
    slurm: bool = True

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")


def count(text: str) -> int:
    if not re.fullmatch(r"\d+", text) or int(text) < 1:
        raise ValueError("a whole number, 1 or more")
    return int(text)


def count_or_0(text: str) -> int:
    if not re.fullmatch(r"\d+", text):
        raise ValueError("a whole number, 0 or more")
    return int(text)


def minutes(text: str) -> int:
    """A time limit in Slurm's own forms: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S. Seconds count as a minute."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if not match:
        raise ValueError("minutes, or Slurm's H:MM:SS or D-HH:MM:SS")
    days, *parts = (int(part) if part else None for part in match.groups())
    given = [part for part in parts if part is not None]
    if days is None and len(given) < 3:  # M or M:S
        given = [0, *given]
    hours, mins, seconds = (given + [0, 0])[:3]
    total = (days or 0) * 1440 + hours * 60 + mins + (seconds > 0)
    if total < 1:
        raise ValueError("more than nothing")
    return total


def time_limit(text: str) -> int | str:
    """Minutes, UNLIMITED, or PARTITION_TIME."""
    if text.upper() in ("UNLIMITED", "INFINITE"):
        return UNLIMITED
    if text.lower() == PARTITION_TIME:
        return PARTITION_TIME
    try:
        return minutes(text)
    except ValueError as error:
        raise ValueError(f"{error}, {UNLIMITED}, or {PARTITION_TIME} for the partition's default") from None


_GPU_TYPE = r"(?=[\w.+-]*[A-Za-z])[A-Za-z0-9][\w.+-]*"
"""As sites name them: a100, 2080ti, a100-sxm4-80gb, nvidia_a100_1g.5gb."""


def gpus(text: str) -> tuple[str, int]:
    """Slurm's [TYPE:]N: the type, "" if any will do, and the number."""
    match = re.fullmatch(rf"(?:({_GPU_TYPE}):)?(\d+)", text)
    if not match:
        raise ValueError("a number, or TYPE:NUMBER as in a100:8")
    return _typed(match[1], int(match[2]))


def gpu_gres(text: str) -> tuple[str, int]:
    """gpu[:TYPE]:N, as --gres takes it."""
    match = re.fullmatch(rf"gpu:(?:({_GPU_TYPE}):)?(\d+)", text)
    if not match:
        raise ValueError("gpu:NUMBER or gpu:TYPE:NUMBER (other resources: [sbatch] gres in the cluster file)")
    return _typed(match[1], int(match[2]))


def _typed(gpu_type: str | None, number: int) -> tuple[str, int]:
    if gpu_type and not number:
        raise ValueError("a number of GPUs of that type: 0 has none, and means the CPUs")
    return gpu_type or "", number


def gpu_of_task(text: str) -> tuple[str, int]:
    """[TYPE:]1."""
    try:
        found = gpus(text)
    except ValueError:
        found = ("", 0)
    if found[1] != 1:
        raise ValueError("1 or TYPE:1: a rank computes on one GPU. How many there are is --tasks-per-node")
    return found


def whole_nodes(text: str) -> tuple[str, int]:
    """N: how many GPUs a node has."""
    if not re.fullmatch(r"\d+", text):
        raise ValueError("the number of GPUs of a node; 0: train on its CPUs")
    return "", int(text)


def patience(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0
    if not 0 < value < float("inf"):
        raise ValueError("a number of minutes, above 0")
    return value


def patience_or_0(text: str) -> float:
    return 0.0 if text in ("0", "0.0") else patience(text)


def on_or_off(text: str) -> str:
    if text not in ("on", "off"):
        raise ValueError("on or off")
    return text


def text(value: str) -> str:
    if not value or re.search(r"[\s\"'\\]", value):
        raise ValueError("a word")
    return value


def command(text: str) -> str:
    """One that sh can read."""
    complaint = subprocess.run(["sh", "-n", "-c", text], capture_output=True, text=True).stderr.strip()
    if complaint or not text.strip():
        raise ValueError(f"a command of the shell ({complaint or 'it is empty'})")
    return text


def wandb_project(text: str) -> str:
    if not re.fullmatch(r"([\w-]+/)?[\w.-]{1,128}", text):
        raise ValueError("PROJECT or ENTITY/PROJECT, of letters, digits, - and _")
    return text


SETTINGS = (
    Setting("nodes", count, 1, "machines (default: 1)", "N", COUNT),
    Setting(
        "gpus_per_node",
        gpus,
        None,
        "GPUs of a machine, one task each (default: 8 on Slurm, else those of this machine that CUDA_VISIBLE_DEVICES "
        "shows)",
        "[TYPE:]N",
        TEXT_OR_COUNT,
        slurm=False,
    ),
    Setting("gres", gpu_gres, None, "the same, asked for with sbatch's --gres", "gpu[:TYPE]:N", TEXT),
    Setting(
        "gpus_per_task",
        gpu_of_task,
        None,
        "with --tasks-per-node N: N GPUs of a machine, asked for with sbatch's --gpus-per-task",
        "[TYPE:]1",
        TEXT_OR_COUNT,
    ),
    Setting(
        "exclusive",
        whole_nodes,
        None,
        "whole machines with N GPUs each, which are not asked for: sbatch gets --exclusive alone",
        "N",
        COUNT,
    ),
    Setting(
        "tasks_per_node",
        count,
        None,
        "ranks of a machine that trains on CPUs (default: 1), or that has --gpus-per-task",
        "N",
        COUNT,
        slurm=False,
    ),
    Setting("cpus_per_task", count, 8, "cores of a rank, for its threads and its data loader (default: 8)", "N", COUNT),
    Setting(
        "time",
        time_limit,
        1440,
        "time limit of one start: minutes, or Slurm's H:MM:SS, D-HH:MM:SS; UNLIMITED; partition: the partition's "
        "default. A run requeues itself before it (default: 1440)",
        "MIN",
        kind=TEXT_OR_COUNT,
    ),
    Setting("partition", text, None, "Slurm partition", "NAME"),
    Setting("account", text, None, "Slurm account", "NAME"),
    Setting("qos", text, None, "Slurm quality of service", "NAME"),
    Setting(
        "wckey",
        text,
        None,
        "Slurm's workload characterization key, where a site checks it (default: your default key)",
        "NAME",
    ),
    Setting("constraint", text, None, "features that nodes must have", "LIST"),
    Setting(
        "memory",
        text,
        None,
        "memory of a node, as for sbatch's --mem: 480G; 0 is all of it",
        "SIZE",
        kind=TEXT_OR_COUNT,
    ),
    Setting("exclude", text, None, "nodes to stay away from: n07,n[11-14]", "NODES"),
    Setting("dependency", text, None, "what to wait for, as for sbatch: afterany:123,singleton", "LIST", None),
    Setting("array_parallelism", count, None, "members of a sweep that may run at once (default: all)", "N", COUNT),
    Setting(
        "interface", text, None, "network interface that ranks talk on (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME)", "NAME"
    ),
    Setting(
        "restarts_without_progress",
        count_or_0,
        None,
        "automatic restarts in a row, whatever their cause, that a job may have without progress beyond its last "
        f"checkpoint (default: {RESTARTS_WITHOUT_PROGRESS}; 0: none)",
        "N",
        COUNT,
        slurm=False,
    ),
    Setting(
        "retries",
        count_or_0,
        None,
        "restarts within 24 hours after a rank that died, hung, or found its node unhealthy (default: "
        f"{RETRIES}; 0: none). A node on which two ranks have died is left out",
        "N",
        COUNT,
        slurm=False,
    ),
    Setting(
        "hang_timeout",
        patience_or_0,
        None,
        "how long a rank that trains may go without progress; at least 20 times as long as its steps take (default: 5; "
        "0: for ever)",
        "MIN",
        NUMBER,
        slurm=False,
    ),
    Setting(
        "health_check",
        on_or_off,
        None,
        "whether each start checks its nodes first: GPUs, run folder, local disk, clock (default: on)",
        "on|off",
        slurm=False,
    ),
    Setting(
        "rendezvous_timeout",
        patience,
        None,
        "how long ranks wait for each other before they train (default: 30)",
        "MIN",
        NUMBER,
        slurm=False,
    ),
    Setting(
        "collective_timeout",
        patience,
        None,
        "how long ranks wait for each other in a step before the job is given up (default: 30)",
        "MIN",
        NUMBER,
        slurm=False,
    ),
    Setting(
        "notify",
        command,
        None,
        "run by sh in the run folder, on rank 0, when the run has finished or failed, was given up, or was preempted 5 "
        "times within 24 hours, with a JSON object on standard input: event, run, job, attempt, step, total_steps, "
        "why, node, time, top1. It may take 30 s. How it ends changes nothing about the run",
        "COMMAND",
        slurm=False,
    ),
    Setting(
        "wandb",
        wandb_project,
        None,
        "send the history of log.jsonl, the recipe and the results to Weights & Biases, too; needs the package wandb",
        "[ENTITY/]PROJECT",
        slurm=False,
    ),
)

DEFAULTS = {setting.name: setting.default for setting in SETTINGS}
RECIPE_KEYS = {"shards": TEXT, "eval_sets": TEXTS}
"""What a cluster file may say of a recipe: where data is on this cluster. The rest of a recipe is an experiment's."""
FILE_KEYS = {setting.name: setting.kind for setting in SETTINGS if setting.kind is not None} | RECIPE_KEYS
"""Keys of the cluster file that are flags of submit.py too, with what their values may be."""


CLUSTER_HELP = (
    "cluster file with values for these flags, and more ($CFMASK_CLUSTER, else ./cluster.toml, else "
    "~/.config/cfmask/cluster.toml; template: slurm/cluster.toml)"
)


def add_allocation_arguments(parser: argparse.ArgumentParser, *, here: bool = False) -> None:
    """here: the work may be done in this process, and is, unless one of these flags is given."""
    g = parser.add_argument_group("allocation", "Where the job runs. Changes nothing about what comes of it.")
    if here:
        executors: tuple[str, ...] = ("here", "auto", "slurm", "local")
        said = "here: this process; auto: slurm if srun is there, else local (default: here, and auto with --nodes or "
        said += "any other of these flags)"
    else:
        executors = ("auto", "slurm", "local", "debug")
        said = "auto: slurm if srun is there, else local; debug: one rank in this process (default: auto)"
    g.add_argument("--executor", choices=executors, default=executors[0], help=said)
    g.add_argument(
        "--cluster",
        type=Path,
        metavar="FILE",
        help=CLUSTER_HELP,
    )
    for setting in SETTINGS:
        g.add_argument(
            setting.flag,
            type=argument_type(setting.read),
            metavar=setting.metavar,
            default=None,
            help=setting.help.replace("%", "%%"),
        )
    g.add_argument(
        "--after", nargs="+", type=job_id, metavar="JOB", help="start when these jobs have ended well (afterok)"
    )


def given_flags(arguments: argparse.Namespace) -> list[str]:
    """Flags of an allocation that the command line has."""
    given = [setting.flag for setting in SETTINGS if getattr(arguments, setting.name) is not None]
    return given + [f"--{name}" for name in ("after", "cluster") if getattr(arguments, name)]


def argument_type(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """For argparse's ``type``: the value, or the error with what it should be."""

    def checked(word: str) -> Any:
        try:
            return read(word)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{word!r} is not {error}") from None

    return checked


def job_id(word: str) -> str:
    if not re.fullmatch(r"\d+(_\d+)?", word):
        raise argparse.ArgumentTypeError(f"{word!r} is not the number of a job")
    return word
