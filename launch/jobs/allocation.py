"""What a job is given, and how flags and the cluster file add up to it (settings.py has them all).

A setting comes from its flag; else, where a run is resumed, from what it got last; else from the cluster file; else it
has its default. None of this changes what is trained.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cfmask.errors import UserError
from launch.jobs.cluster_file import ClusterFile
from launch.jobs.gpus import VISIBLE, first_visible, installed_gpus, visible_gpus
from launch.jobs.settings import DEFAULTS, SETTINGS

REQUEUE_ME = 144
"""The exit code of a rank that asks for a requeue, where it cannot do so itself (a container without scontrol): of the
batch script on Slurm, of submitit's local executor here, whose own number it is."""


@dataclass(frozen=True)
class Allocation:
    """What a job is given, nothing left open. tasks_per_node: one per GPU; on machines without GPUs as many as asked
    for. mounts: of the container, if there is an image. again: values of settings that the run gets again when it is
    resumed, unless flags say otherwise: what flags said, and how many ranks there were. visible_gpus: of this machine,
    one for each local rank, as entries for CUDA_VISIBLE_DEVICES."""

    executor: str
    nodes: int
    gpus_per_node: int
    gpu_type: str
    tasks_per_node: int
    cpus_per_task: int
    time_min: int
    again: Mapping[str, Any] = field(default_factory=dict)
    visible_gpus: tuple[str, ...] = ()
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    memory: str | None = None
    exclude: str | None = None
    dependency: str | None = None
    array_parallelism: int | None = None
    setup: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    srun_args: tuple[str, ...] = ()
    python: str = ""
    image: str | None = None
    mounts: tuple[str, ...] = ()
    sbatch: Mapping[str, Any] = field(default_factory=dict)

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
        gpu_type, gpus_per_node, tasks_per_node = _ranks(layers, default_gpus=8)
    else:
        installed = installed_gpus()
        visible = visible_gpus(os.environ.get(VISIBLE), installed)
        default_gpus = 0 if installed is None or visible is None else len(visible)
        gpu_type, gpus_per_node, tasks_per_node = _ranks(layers, default_gpus)
        shown = first_visible(gpus_per_node, visible)
    ranks = {"nodes": value("nodes"), "gpus_per_node": (gpu_type, gpus_per_node), "tasks_per_node": tasks_per_node}
    again = {k: v for k, v in {**(last or {}), **flags}.items() if k not in ("dependency", "array_parallelism")}
    if executor == "debug" and tasks_per_node > 1:
        raise UserError("--executor debug is one rank in this process. Ask for one GPU or task, or use local.")
    if arguments.after and "dependency" in flags:
        raise UserError("--after and --dependency both say what to wait for. Put all of it into --dependency.")
    timeouts = {
        f"CFMASK_{name.upper()}": f"{value(name):g}"
        for name in ("rendezvous_timeout", "collective_timeout")
        if value(name) is not None
    }
    image = file.image if executor == "slurm" else None
    # Exactly this one: NCCL alone would take any interface whose name begins so.
    interface = value("interface")
    networks = {"NCCL_SOCKET_IFNAME": f"={interface}", "GLOO_SOCKET_IFNAME": interface} if interface else {}
    return Allocation(
        executor=executor,
        nodes=value("nodes"),
        gpus_per_node=gpus_per_node,
        gpu_type=gpu_type,
        tasks_per_node=tasks_per_node,
        visible_gpus=shown,
        cpus_per_task=value("cpus_per_task"),
        time_min=value("time"),
        again={**again, **ranks},
        partition=value("partition"),
        account=value("account"),
        qos=value("qos"),
        constraint=value("constraint"),
        memory=value("memory"),
        exclude=value("exclude"),
        dependency="afterok:" + ":".join(arguments.after) if arguments.after else value("dependency"),
        array_parallelism=value("array_parallelism"),
        setup=tuple(from_file.get("setup", ())),
        environment={**timeouts, **networks, **file.environment},
        srun_args=tuple(from_file.get("srun_args", ())),
        python=from_file.get("python") or ("python3" if image else shlex.quote(sys.executable)),
        image=image,
        mounts=file.mounts if executor == "slurm" else (),
        sbatch=file.sbatch if executor == "slurm" else {},
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
    import torch

    return "bf16" if torch.cuda.is_available() else "fp32"


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


def _ranks(layers: Sequence[Mapping[str, Any]], default_gpus: int) -> tuple[str, int, int]:
    """Type and number of a node's GPUs, and its ranks: who says either says both."""
    says = next((s for s in layers if "gpus_per_node" in s or "tasks_per_node" in s), {})
    tasks = says.get("tasks_per_node")
    default = ("", 0 if tasks is not None else default_gpus)
    gpu_type, number = says.get("gpus_per_node", default)
    if tasks is not None and number and tasks != number:
        raise UserError(
            f"--tasks-per-node {tasks} contradicts --gpus-per-node {number}: there is one task for each GPU. Leave "
            "--tasks-per-node out, or give --gpus-per-node 0 to train on CPUs."
        )
    return gpu_type, number, number or tasks or 1


def uncovered(allocation: Allocation, paths: Sequence[Path]) -> list[Path]:
    """Of the paths, those that no mount brings into the container."""
    if not allocation.image:
        return []
    sources = [Path(mount.partition(":")[0]) for mount in allocation.mounts]
    return [path for path in paths if not any(path == source or source in path.parents for source in sources)]
