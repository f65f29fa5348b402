"""The allocation of a job, resolved from flags and the cluster file.

The value of a setting (settings.py) comes from its flag; else, for a resumed run, from the run's last submission; else
from the cluster file; else it is the default. An allocation does not change what is trained.
"""

from __future__ import annotations

import argparse
import logging
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
from launch.allocation.settings import BY_NAME, GPU_SETTINGS, SLURM_ONLY, flag_of
from launch.notification.wandb_sender import is_installed as wandb_is_installed

logger = logging.getLogger(__name__)

_FOR_RANKS = (
    *("restarts_without_progress", "retries", "health_check"),
    *("hang_timeout", "rendezvous_timeout", "collective_timeout", "wandb"),
)
"""Settings that ranks read from their environment, as CFMASK_RETRIES."""
_COPIED = (
    *("nodes", "cpus_per_task", "time", "partition", "account", "qos", "wckey", "constraint", "memory", "exclude"),
    *("array_parallelism", "notify"),
)
"""Settings that are fields of ``Allocation``."""


@dataclass(frozen=True)
class Allocation:
    """What a job gets. Values of the settings (settings.py) have the settings' names."""

    executor: str
    """slurm, local, or debug."""
    nodes: int
    gpus_per_node: int
    gpu_type: str
    """"" for any type."""
    tasks_per_node: int
    """Ranks of a node: one for each GPU, or on CPUs as many as requested."""
    cpus_per_task: int
    time: int | str
    """Time limit of a start in minutes, UNLIMITED, or PARTITION_TIME."""
    again: Mapping[str, Any] = field(default_factory=dict)
    """Settings that the run keeps when it is resumed, unless flags override them: those given by flags, and the number
    of ranks."""
    gpus_from: str = "gpus_per_node"
    """The setting, out of GPU_SETTINGS, by which sbatch is asked for the GPUs."""
    visible_gpus: tuple[str, ...] = ()
    """GPUs of this machine, one for each local rank, as entries of CUDA_VISIBLE_DEVICES."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    wckey: str | None = None
    constraint: str | None = None
    memory: str | None = None
    exclude: str | None = None
    dependency: str | None = None
    chain: tuple[str, ...] | None = None
    """For a job of a chain (chain.py): ids of the jobs before it."""
    array_parallelism: int | None = None
    setup: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    srun_args: tuple[str, ...] = ()
    python: str = ""
    """Shell command that starts Python."""
    image: str | None = None
    """Container image."""
    mounts: tuple[str, ...] = ()
    """Mounts of the container."""
    sbatch: Mapping[str, Any] = field(default_factory=dict)
    """Further options of sbatch."""
    notify: str | None = field(default=None, repr=False)
    """Command that is run at the end of the run (notify.py). It may contain a secret, so it is in no environment
    variable and not in ``again``."""

    @property
    def time_min(self) -> int | None:
        """The time limit in minutes; None without a limit, or if only Slurm knows it."""
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
    """Combine flags, the last submission of a resumed run, the cluster file, and defaults.

    Args:
        last: ``Allocation.again`` of the run's last submission with the same executor.

    Raises:
        UserError: Settings are impossible, contradictory, or without effect.
    """
    executor = choose_executor(arguments)
    on_slurm = executor == "slurm"
    flags = {name: given for name in BY_NAME if (given := getattr(arguments, name)) is not None}
    if not on_slurm:
        _refuse_slurm_flags(arguments, flags, executor)
    from_file = _read_file(file) if on_slurm else {}
    layers = (flags, last or {}, from_file)

    def value(name: str) -> Any:
        return next((layer[name] for layer in layers if name in layer), BY_NAME[name].default)

    visible: Sequence[str] | None = ()
    if on_slurm:  # Slurm decides which GPUs of a node a job sees
        ranks = _ranks(layers, default_gpus=8)
    else:
        installed = installed_gpus()
        visible = visible_gpus(os.environ.get(VISIBLE), installed)
        ranks = _ranks(layers, default_gpus=0 if installed is None or visible is None else len(visible))
    if executor == "debug" and ranks.tasks > 1:
        raise UserError("--executor debug is one rank in this process. Ask for one GPU or task, or use local.")
    if arguments.after and "dependency" in flags:
        raise UserError("--after and --dependency both say what to wait for. Put all of it into --dependency.")
    _check_notify_and_wandb(executor, [name for name in ("notify", "wandb") if value(name)])
    not_again = ("dependency", "array_parallelism", "notify", *GPU_SETTINGS)
    again = {name: given for name, given in {**(last or {}), **flags}.items() if name not in not_again}
    of_ranks = {
        f"CFMASK_{name.upper()}": given if isinstance(given, str) else f"{given:g}"
        for name in _FOR_RANKS
        if (given := value(name)) is not None
    }
    interface = value("interface")
    # "=" selects exactly this interface; otherwise NCCL would use any whose name begins so.
    networks = {"NCCL_SOCKET_IFNAME": f"={interface}", "GLOO_SOCKET_IFNAME": interface} if interface else {}
    image = file.image if on_slurm else None
    return Allocation(
        executor=executor,
        gpus_per_node=ranks.gpus,
        gpu_type=ranks.request[0],
        gpus_from=ranks.gpus_from,
        tasks_per_node=ranks.tasks,
        visible_gpus=() if on_slurm else first_visible(ranks.gpus, visible),
        again=again | {"nodes": value("nodes"), ranks.gpus_from: ranks.request, "tasks_per_node": ranks.tasks},
        dependency="afterok:" + ":".join(arguments.after) if arguments.after else value("dependency"),
        setup=tuple(from_file.get("setup", ())),
        environment={**of_ranks, **networks, **file.environment},
        srun_args=tuple(from_file.get("srun_args", ())),
        python=from_file.get("python") or ("python3" if image else shlex.quote(sys.executable)),
        image=image,
        mounts=file.mounts if on_slurm else (),
        sbatch=file.sbatch if on_slurm else {},
        **{name: value(name) for name in _COPIED},
    )


def choose_executor(arguments: argparse.Namespace) -> str:
    """The executor, with auto resolved.

    Raises:
        UserError: It is slurm, and this machine has no sbatch.
    """
    if arguments.executor == "auto":
        return "slurm" if shutil.which("srun") else "local"
    if arguments.executor == "slurm" and not shutil.which("sbatch"):
        raise UserError("There is no sbatch on this machine. Run this on a login node, or use --executor local.")
    return str(arguments.executor)


def _refuse_slurm_flags(arguments: argparse.Namespace, flags: Mapping[str, Any], executor: str) -> None:
    why = f"--executor is {executor}" + (" (srun is not on the PATH)" if arguments.executor == "auto" else "")
    if flags.get("nodes", 1) != 1:
        raise UserError(
            f"--nodes {flags['nodes']} needs Slurm, and {why}. Run this on a machine that has srun, or leave --nodes "
            "out."
        )
    idle = [flag_of(name) for name in SLURM_ONLY if name in flags]
    idle += ["--after"] if arguments.after else []
    if idle:
        raise UserError(f"{', '.join(idle)} would do nothing: it is for Slurm, and {why}. Leave it out.")


def _check_notify_and_wandb(executor: str, given: Sequence[str]) -> None:
    """Refuse --notify and --wandb if no process could act on them (beside_rank_0.py)."""
    if executor == "debug" and given:
        flags = " and ".join(map(flag_of, given))
        raise UserError(f"{flags} would do nothing with --executor debug: no process waits for its rank. Use local.")
    if "wandb" in given and not wandb_is_installed():
        if executor == "local":
            raise UserError(f"--wandb needs the package wandb: {sys.executable} -m pip install wandb")
        logger.warning("--wandb: this Python does not have the package wandb; the Python of the job must have it.")


def _read_file(file: ClusterFile) -> dict[str, Any]:
    """The file's values, converted as their flags would be."""
    values = dict(file.values)
    for name in values.keys() & BY_NAME.keys():
        try:
            values[name] = BY_NAME[name].read(str(values[name]))
        except ValueError as error:
            raise UserError(
                f"The cluster file {file.path}: {name} is {file.values[name]!r}, which is not {error}."
            ) from None
    return values


@dataclass(frozen=True)
class _Ranks:
    """The GPUs and ranks of a node."""

    gpus_from: str
    request: tuple[str, int]
    """Value of the setting ``gpus_from``: type and number."""
    gpus: int
    tasks: int


def _ranks(layers: Sequence[Mapping[str, Any]], default_gpus: int) -> _Ranks:
    """The GPUs and ranks of a node, by the first layer that has a setting for either. If that layer has only
    --tasks-per-node, the next one decides about GPUs, so that nobody trains on CPUs without having asked for it."""
    for layer in layers:
        given = [flag_of(name) for name in GPU_SETTINGS if name in layer]
        if len(given) > 1:
            raise UserError(
                f"{' and '.join(given)} are different ways to request the GPUs of a node: give one of them, on the "
                "command line and in the cluster file alike."
            )
    ways = [(layer, next((name for name in GPU_SETTINGS if name in layer), None)) for layer in layers]
    ways = [(layer, way) for layer, way in ways if way or "tasks_per_node" in layer]
    if not ways:
        return _Ranks("gpus_per_node", ("", default_gpus), default_gpus, default_gpus or 1)
    tasks = ways[0][0].get("tasks_per_node")
    elsewhere = ways[0][1] is None
    source, way = ways[1] if elsewhere and ways[1:] else ways[0]
    if way is None or (elsewhere and way != "gpus_per_task" and not source[way][1]):
        return _Ranks("gpus_per_node", ("", 0), 0, tasks or 1)
    gpu_type, number = source[way]
    if way == "gpus_per_task":
        if tasks is None:
            raise UserError(
                "--gpus-per-task is the GPU of one rank: say with --tasks-per-node how many ranks, and so GPUs, a "
                "node has."
            )
        return _Ranks(way, (gpu_type, number), tasks, tasks)
    if tasks is not None and number and tasks != number:
        by = ", which the cluster file or the run's last submission requests" if elsewhere else ""
        change = f"Give --gpus-per-node {tasks}" if elsewhere else "Leave --tasks-per-node out"
        raise UserError(
            f"--tasks-per-node {tasks} contradicts {flag_of(way)} with {number} GPUs{by}: there is one task for each "
            f"GPU. {change}, or give --gpus-per-node 0 to train on CPUs."
        )
    return _Ranks(way, (gpu_type, number), number, number or tasks or 1)


# --- checks against an allocation -------------------------------------------------------------------------------------


def resolve_precision(asked: str, allocation: Allocation | None) -> str:
    """The precision of forward and backward passes; ``auto`` is bf16 on GPUs and fp32 without.

    Args:
        asked: auto, fp32, tf32 or bf16.
        allocation: Where the work is done; None: in this process.
    """
    return {True: "bf16", False: "fp32"}[_has_gpus(allocation)] if asked == "auto" else asked


def check_arithmetic(precision: str, allocation: Allocation | None, *, cuda_graphs: str = "off") -> None:
    """Refuse settings that need a GPU if there is none. bf16 and --compile also work on CPUs."""
    idle = ["--precision tf32"] * (precision == "tf32") + ["--cuda-graphs on"] * (cuda_graphs == "on")
    if idle and not _has_gpus(allocation):
        where = "this process" if allocation is None else f"the allocation ({allocation})"
        raise UserError(
            f"{' and '.join(idle)} would do nothing: {where} has no GPU. Leave it out, or ask for GPUs with "
            "--gpus-per-node N."
        )


def _has_gpus(allocation: Allocation | None) -> bool:
    return torch_has_gpu() if allocation is None else allocation.gpus_per_node > 0


def torch_has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def uncovered(allocation: Allocation, paths: Sequence[Path]) -> list[Path]:
    """The paths that are under none of the container's mounts."""
    if not allocation.image:
        return []
    sources = [Path(mount.partition(":")[0]) for mount in allocation.mounts]
    return [path for path in paths if not any(path == source or source in path.parents for source in sources)]


def warn_of_paths_outside(allocation: Allocation, *paths: str | Path) -> None:
    """Warn about paths that the job uses and its container does not mount. URLs are ignored."""
    for path in uncovered(allocation, [Path(path) for path in paths if not is_remote(str(path))]):
        logger.warning(
            f"{path} is under none of the container's mounts in the cluster file. Unless the site mounts it by itself, "
            "the job will not find it."
        )
