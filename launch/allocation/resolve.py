"""What a job is given, and how flags and the cluster file add up to it (settings.py has them all).

A setting comes from its flag; else, where a run is resumed, from what it got last; else from the cluster file; else it
has its default. None of this changes what is trained.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cfmask.errors import UserError
from cfmask.urls import is_remote
from launch.allocation.cluster_file import ClusterFile
from launch.allocation.gpus import VISIBLE, first_visible, installed_gpus, visible_gpus
from launch.allocation.settings import DEFAULTS, GPU_SETTINGS, SETTINGS

_FOR_RANKS = (
    *("restarts_without_progress", "retries", "health_check"),
    *("hang_timeout", "rendezvous_timeout", "collective_timeout", "wandb"),
)
"""Settings that ranks find in their environment, as CFMASK_RETRIES."""


@dataclass(frozen=True)
class Allocation:
    """What a job is given, nothing left open.

    gpus_from: of GPU_SETTINGS, how sbatch is asked for the GPUs.
    tasks_per_node: one per GPU; on machines without GPUs as many as asked for.
    time: limit of a start in minutes, UNLIMITED, or PARTITION_TIME.
    again: values of settings that the run gets again when it is resumed, unless flags say otherwise: what flags said,
        and how many ranks there were.
    visible_gpus: of this machine, one for each local rank, as entries for CUDA_VISIBLE_DEVICES.
    mounts: of the container, if there is an image.
    notify: the command that hears of the run's end (notify.py). It may hold a secret, and so is in no variable that a
        job's processes inherit, nor in ``again``.
    chain: of a job of a chain (chain.py), the jobs before it; None: it is no job of one.
    """

    executor: str
    nodes: int
    gpus_per_node: int
    gpu_type: str
    tasks_per_node: int
    cpus_per_task: int
    time: int | str
    again: Mapping[str, Any] = field(default_factory=dict)
    gpus_from: str = "gpus_per_node"
    visible_gpus: tuple[str, ...] = ()
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    wckey: str | None = None
    constraint: str | None = None
    memory: str | None = None
    exclude: str | None = None
    dependency: str | None = None
    chain: tuple[str, ...] | None = None
    array_parallelism: int | None = None
    setup: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    srun_args: tuple[str, ...] = ()
    python: str = ""
    image: str | None = None
    mounts: tuple[str, ...] = ()
    sbatch: Mapping[str, Any] = field(default_factory=dict)
    notify: str | None = field(default=None, repr=False)

    @property
    def time_min(self) -> int | None:
        """The time limit in minutes; None if there is none, or only Slurm knows it."""
        return self.time if isinstance(self.time, int) else None

    @property
    def world_size(self) -> int:
        return self.nodes * self.tasks_per_node

    @property
    def on_slurm(self) -> bool:
        return self.executor == "slurm"

    def __str__(self) -> str:
        kind = "GPU" if self.gpus_per_node else "CPU"
        return f"{self.executor}: {self.nodes} × {self.tasks_per_node} {kind} ranks"


def resolve_allocation(
    arguments: argparse.Namespace, file: ClusterFile, last: Mapping[str, Any] | None = None
) -> Allocation:
    """Add up flags, what a resumed run had last, cluster file and defaults.

    Args:
        last: ``Allocation.again`` of the run's last submission with the same kind of executor.

    Raises:
        UserError: what cannot be allocated, contradicts, or would do nothing.
    """
    executor = choose_executor(arguments)
    flags = {setting.name: getattr(arguments, setting.name) for setting in SETTINGS}
    flags = {name: value for name, value in flags.items() if value is not None}
    if executor != "slurm":
        _refuse_slurm_flags(arguments, flags, executor)
    from_file = _read_file(file) if executor == "slurm" else {}
    layers = (flags, last or {}, from_file)

    def value(name: str) -> Any:
        return next((layer[name] for layer in layers if name in layer), DEFAULTS[name])

    if executor == "slurm":
        # It says which GPUs of a node a job sees; those that are visible here are another matter.
        shown: tuple[str, ...] = ()
        ranks = _ranks(layers, default_gpus=8)
    else:
        installed = installed_gpus()
        visible = visible_gpus(os.environ.get(VISIBLE), installed)
        default_gpus = 0 if installed is None or visible is None else len(visible)
        ranks = _ranks(layers, default_gpus)
        shown = first_visible(ranks.gpus, visible)
    not_again = ("dependency", "array_parallelism", "notify", *GPU_SETTINGS)
    again = {k: v for k, v in {**(last or {}), **flags}.items() if k not in not_again}
    again |= {"nodes": value("nodes"), ranks.gpus_from: ranks.asked, "tasks_per_node": ranks.tasks}
    if executor == "debug" and ranks.tasks > 1:
        raise UserError("--executor debug is one rank in this process. Ask for one GPU or task, or use local.")
    if arguments.after and "dependency" in flags:
        raise UserError("--after and --dependency both say what to wait for. Put all of it into --dependency.")
    limits = {
        f"CFMASK_{name.upper()}": value(name) if isinstance(value(name), str) else f"{value(name):g}"
        for name in _FOR_RANKS
        if value(name) is not None
    }
    _check_beside_rank_0(executor, {name: value(name) for name in ("notify", "wandb") if value(name)})
    image = file.image if executor == "slurm" else None
    # Exactly this one: NCCL alone would take any interface whose name begins so.
    interface = value("interface")
    networks = {"NCCL_SOCKET_IFNAME": f"={interface}", "GLOO_SOCKET_IFNAME": interface} if interface else {}
    return Allocation(
        executor=executor,
        nodes=value("nodes"),
        gpus_per_node=ranks.gpus,
        gpu_type=ranks.gpu_type,
        gpus_from=ranks.gpus_from,
        tasks_per_node=ranks.tasks,
        visible_gpus=shown,
        cpus_per_task=value("cpus_per_task"),
        time=value("time"),
        again=again,
        partition=value("partition"),
        account=value("account"),
        qos=value("qos"),
        wckey=value("wckey"),
        constraint=value("constraint"),
        memory=value("memory"),
        exclude=value("exclude"),
        dependency="afterok:" + ":".join(arguments.after) if arguments.after else value("dependency"),
        array_parallelism=value("array_parallelism"),
        setup=tuple(from_file.get("setup", ())),
        environment={**limits, **networks, **file.environment},
        srun_args=tuple(from_file.get("srun_args", ())),
        python=from_file.get("python") or ("python3" if image else shlex.quote(sys.executable)),
        image=image,
        mounts=file.mounts if executor == "slurm" else (),
        sbatch=file.sbatch if executor == "slurm" else {},
        notify=value("notify"),
    )


def resolve_precision(asked: str, allocation: Allocation | None) -> str:
    """The arithmetic of forward and backward passes; ``auto`` is bf16 on GPUs and fp32 without.

    Args:
        asked: a recipe's or an evaluation's: auto, fp32, tf32 or bf16.
        allocation: where the work is done, which may be another machine than this one; None: in this process.
    """
    if asked != "auto":
        return asked
    if allocation is not None:
        return "bf16" if allocation.gpus_per_node else "fp32"
    return "bf16" if torch_has_gpu() else "fp32"


def torch_has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def check_arithmetic(precision: str, allocation: Allocation | None, *, cuda_graphs: str = "off") -> None:
    """bf16 and --compile work on CPUs too.

    Raises:
        UserError: the job has no GPU, and is asked for what only a GPU does.
    """
    gpus = torch_has_gpu() if allocation is None else allocation.gpus_per_node > 0
    if gpus:
        return
    idle = ["--precision tf32"] * (precision == "tf32") + ["--cuda-graphs on"] * (cuda_graphs == "on")
    if idle:
        where = "this process" if allocation is None else f"the allocation ({allocation})"
        raise UserError(
            f"{' and '.join(idle)} would do nothing: {where} has no GPU. Leave it out, or ask for GPUs with "
            "--gpus-per-node N."
        )


def choose_executor(arguments: argparse.Namespace) -> str:
    """Raises UserError if it is slurm and there is none."""
    if arguments.executor == "auto":
        return "slurm" if shutil.which("srun") else "local"
    if arguments.executor == "slurm" and not shutil.which("sbatch"):
        raise UserError("There is no sbatch on this machine. Run this on a login node, or use --executor local.")
    return str(arguments.executor)


def _refuse_slurm_flags(arguments: argparse.Namespace, flags: Mapping[str, Any], executor: str) -> None:
    why = f"--executor is {executor}" + (" (there is no srun here)" if arguments.executor == "auto" else "")
    if flags.get("nodes", 1) != 1:
        raise UserError(
            f"--nodes {flags['nodes']} needs Slurm, and {why}: one machine is all there is here. Run this where srun "
            "is, or leave --nodes out."
        )
    idle = [setting.flag for setting in SETTINGS if setting.slurm and setting.name in flags and setting.name != "nodes"]
    idle += ["--after"] if arguments.after else []
    if idle:
        raise UserError(f"{', '.join(idle)} would do nothing: it is for Slurm, and {why}. Leave it out.")


def _check_beside_rank_0(executor: str, asked: Mapping[str, Any]) -> None:
    """Refuse what could not be done for --notify and --wandb (rank_0.py)."""
    if executor == "debug" and asked:
        flags = " and ".join(_flag(name) for name in asked)
        raise UserError(f"{flags} would do nothing with --executor debug: no process waits for its rank. Use local.")
    if "wandb" in asked and not wandb_is_installed():
        if executor == "local":
            raise UserError(f"--wandb needs the package wandb: {sys.executable} -m pip install wandb")
        print("warning: --wandb: this Python has no package wandb, which a job's has to have.", file=sys.stderr)


def wandb_is_installed() -> bool:
    """Whether this Python has wandb. A folder of that name in the working directory does not count."""
    found = importlib.util.find_spec("wandb")
    return found is not None and found.origin is not None


def _read_file(file: ClusterFile) -> dict[str, Any]:
    """The file's values, read as their flags would be."""
    values = dict(file.values)
    for setting in SETTINGS:
        if setting.name in values:
            try:
                values[setting.name] = setting.read(str(values[setting.name]))
            except ValueError as error:
                given = file.values[setting.name]
                raise UserError(
                    f"The cluster file {file.path}: {setting.name} is {given!r}, which is not {error}."
                ) from None
    return values


@dataclass(frozen=True)
class _Ranks:
    """The ranks of a node. asked: the value of ``gpus_from``."""

    gpus_from: str
    asked: tuple[str, int]
    gpus: int
    tasks: int

    @property
    def gpu_type(self) -> str:
        return self.asked[0]


def _ranks(layers: Sequence[Mapping[str, Any]], default_gpus: int) -> _Ranks:
    """The GPUs of a node and its ranks. The first layer that says anything of either says both; but --tasks-per-node
    alone leaves the GPUs to the next one, so that nobody trains on CPUs without having asked for it."""
    for layer in layers:
        given = [_flag(name) for name in GPU_SETTINGS if name in layer]
        if len(given) > 1:
            raise UserError(
                f"{' and '.join(given)} are different ways to ask for the GPUs of a node: give one of them, on the "
                "command line and in the cluster file alike."
            )
    speaking = [layer for layer in layers if "tasks_per_node" in layer or any(n in layer for n in GPU_SETTINGS)]
    ways = [next((name for name in GPU_SETTINGS if name in layer), None) for layer in speaking]
    if not speaking:
        return _Ranks("gpus_per_node", ("", default_gpus), default_gpus, default_gpus or 1)
    way, tasks = ways[0], speaking[0].get("tasks_per_node")
    if way is None and len(ways) > 1 and ways[1] == "gpus_per_task":
        way, asked = ways[1], speaking[1]["gpus_per_task"]
    elif way is not None:
        asked = speaking[0][way]
    elif len(ways) > 1 and ways[1] is not None and (gpus := speaking[1][ways[1]][1]):
        if gpus != tasks:
            raise UserError(
                f"--tasks-per-node {tasks} contradicts {_flag(ways[1])} with {gpus} GPUs, which the cluster file or "
                "the run's last submission asks for: there is one task for each GPU. Give "
                f"--gpus-per-node {tasks}, or --gpus-per-node 0 to train on CPUs."
            )
        way, asked = ways[1], speaking[1][ways[1]]
    else:
        return _Ranks("gpus_per_node", ("", 0), 0, tasks or 1)
    if way == "gpus_per_task":
        if tasks is None:
            raise UserError(
                "--gpus-per-task is the GPU of one rank: say with --tasks-per-node how many ranks, and so GPUs, a "
                "node has."
            )
        return _Ranks(way, tuple(asked), tasks, tasks)
    number = asked[1]
    if tasks is not None and number and tasks != number:
        raise UserError(
            f"--tasks-per-node {tasks} contradicts {_flag(way)} with {number} GPUs: there is one task for each GPU. "
            "Leave --tasks-per-node out, or give --gpus-per-node 0 to train on CPUs."
        )
    return _Ranks(way, tuple(asked), number, number or tasks or 1)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def uncovered(allocation: Allocation, paths: Sequence[Path]) -> list[Path]:
    """Of the paths, those that no mount brings into the container."""
    if not allocation.image:
        return []
    sources = [Path(mount.partition(":")[0]) for mount in allocation.mounts]
    return [path for path in paths if not any(path == source or source in path.parents for source in sources)]


def warn_of_paths_outside(allocation: Allocation, *paths: str | Path) -> None:
    """Say which of the paths (or URLs) that a job uses its container will not have."""
    for path in uncovered(allocation, [Path(path) for path in paths if not is_remote(str(path))]):
        print(
            f"warning: {path} is under none of the container's mounts in the cluster file. Unless the site mounts it "
            "by itself, the job will not find it.",
            file=sys.stderr,
        )
