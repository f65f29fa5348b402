"""What a rank of doctor.py's probe finds out about its node without the other ranks."""

from __future__ import annotations

import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from cfmask.data.remote import cache_folder
from cfmask.runtime.storage import file_clock, free_bytes
from launch.checks.report import ProbeReport

if TYPE_CHECKING:
    from cfmask.runtime.distributed import DistributedContext

PACKAGES = ("torch", "torchvision", "open_clip_torch", "webdataset", "submitit", "numpy", "safetensors", "simplejpeg")


def inspect_node(report: ProbeReport, folder: Path, needed: Sequence[str]) -> None:
    """Fill in what can be seen without torch and without other ranks.

    Args:
        folder: the probe's, on the shared file system.
        needed: paths that have to be readable.
    """
    report.python, report.executable = platform.python_version(), sys.executable
    report.packages = {name: _version(name) for name in PACKAGES}
    report.usable = sorted(os.sched_getaffinity(0))
    report.quota, report.memory = control_group_limits(Path("/proc/self/cgroup").read_text(), _read_control)
    report.missing = [path for path in needed if not os.access(path, os.R_OK)]
    report.infiniband = sorted(path.name for path in Path("/sys/class/infiniband").glob("*"))
    report.shared_error, report.clock = write_and_compare_clocks(folder, f".rank-{report.rank}")
    report.free = free_bytes(folder)
    kind = ["stat", "--file-system", "--format=%T", str(folder)]
    report.file_system = subprocess.run(kind, capture_output=True, text=True).stdout.strip()
    report.cache = str(cache_folder())
    cache = Path(report.cache).absolute()
    existing = next(path for path in (cache, *cache.parents) if path.exists())
    report.cache_free = free_bytes(existing)
    report.cache_error = "" if os.access(existing, os.W_OK) else f"{existing} is not writable"


def write_and_compare_clocks(folder: Path, name: str) -> tuple[str, list[float]]:
    """``file_clock`` of a file in the folder, or the error that prevented it."""
    try:
        return "", list(file_clock(folder / name))
    except OSError as error:
        return f"{error.strerror}: {error.filename or folder / name}", []


def control_group_limits(listed: str, read: Callable[[str, str, str], str | None]) -> tuple[float | None, int | None]:
    """The CPU time, in cores, and the bytes of memory that this process's control groups allow; None: no limit.

    psutil does not read control groups.

    Args:
        listed: the content of /proc/self/cgroup.
        read: returns a file of a group by controller ("" in version 2), path of the group, and name of the file.
    """
    quotas, memories = [math.inf], [math.inf]
    for line in listed.splitlines():
        _, controllers, path = line.split(":", 2)
        parts = [part for part in path.split("/") if part]
        for group in ("/".join(parts[:depth]) for depth in range(len(parts) + 1)):  # limits of parents apply as well
            if not controllers:
                quota, period, *_ = *(read("", group, "cpu.max") or "max").split(), "100000"
                limit = (read("", group, "memory.max") or "max").strip()
            else:
                quota, period = "max", ""
                if "cpu" in controllers.split(","):
                    quota, period = (read("cpu", group, f"cpu.cfs_{of}_us") or "-1" for of in ("quota", "period"))
                in_group = "memory" in controllers.split(",")
                limit = ((in_group and read("memory", group, "memory.limit_in_bytes")) or "max").strip()
            if quota != "max" and int(quota) > 0:
                quotas.append(int(quota) / int(period))
            if limit != "max" and int(limit) < 1 << 60:  # version 1 writes the largest number for "no limit"
                memories.append(int(limit))
    cores, memory = min(quotas), min(memories)
    return (None if math.isinf(cores) else cores), (None if math.isinf(memory) else int(memory))


def _read_control(controller: str, group: str, name: str) -> str | None:
    try:
        return (Path("/sys/fs/cgroup") / controller / group / name).read_text()
    except OSError:
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def inspect_gpus(report: ProbeReport, context: DistributedContext) -> None:
    """Fill in the GPUs that this rank sees, and which one is its own."""
    import torch

    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        report.gpus.append(
            {
                "name": properties.name,
                "uuid": str(getattr(properties, "uuid", f"{report.node} {number}")),
                "memory": properties.total_memory,
                "capability": list(torch.cuda.get_device_capability(number)),
            }
        )
    own = context.device.index
    report.gpu = report.gpus[own]["uuid"]
    report.gpus[own]["free"] = torch.cuda.mem_get_info(own)[0]  # only its own: other ranks use theirs already


def enable_nccl_log(path: Path) -> None:
    os.environ.update(NCCL_DEBUG="INFO", NCCL_DEBUG_SUBSYS="INIT,NET", NCCL_DEBUG_FILE=str(path))


def nccl_transport(log: str) -> str:
    """The network, devices, interfaces and channels that NCCL uses, from its log."""

    def all_of(pattern: str) -> Iterator[str]:
        return (match.strip() for match in dict.fromkeys(re.findall(pattern, log)))

    parts = [
        *(f"network {name}" for name in all_of(r"Using network (.+)")),
        *(re.sub(r"\[\d+\]", "", using) for using in all_of(r"NET/\w+ ?: Using (.+)")),
    ]
    channels = sorted(set(re.sub(r"/\d+", "", each) for each in all_of(r" via ([A-Z0-9]+(?:/[\w()-]+)*)")))
    return "; ".join([*parts, *([f"channels via {', '.join(channels)}"] if channels else [])])
