"""The node check at the beginning of every start, before ranks wait for each other. If it fails, the job starts again
without the node (launch/restarts/retries.py).

    GPU            it computes, most of its memory is free, and NVML reports no failed memory
    run folder     a file can be written there and read back
    local disk     there is some space for temporary files
    clock          it agrees with the file system's or the controller's, because the time limit is watched by it

A full disk of the run folder does not fail the check: training reports what it could not write, and continues while it
can.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from cfmask.errors import UserError
from cfmask.runtime.files import disk_is_full
from cfmask.runtime.heartbeat import CHECKING, beat
from cfmask.runtime.machine import node_name, probe_in
from cfmask.runtime.storage import file_clock, free_bytes
from launch.slurm.client import SlurmError
from launch.slurm.site import controller_clock

if TYPE_CHECKING:
    from cfmask.runtime.distributed import DistributedContext

logger = logging.getLogger(__name__)

VARIABLE = "CFMASK_HEALTH_CHECK"
_FREE_SHARE = 0.8
"""The share of a GPU's memory that must be free."""
_LOCAL_BYTES = 256 << 20
_CLOCK_S = 60.0
_TRIES, _PAUSE_S = 4, 5.0
"""Tries of the run folder: a file server that restarts is away for seconds."""


class NodeUnhealthy(UserError):
    """This node cannot take part in the job; another one may."""

    def __init__(self, what: str) -> None:
        super().__init__(f"node {node_name()} is unhealthy: {what}")


def check_node(folder: Path, context: DistributedContext) -> None:
    """Called by every rank. Each checks its GPU, and the first rank of a node checks the rest.

    Args:
        folder: the run's.

    Raises:
        NodeUnhealthy: a check has failed.
    """
    if os.environ.get(VARIABLE) == "off":
        return
    beat(CHECKING)
    if context.local_rank == 0:
        check_clock(check_folder(folder))
        check_local_disk(Path(tempfile.gettempdir()))
    if context.gpu:
        check_gpu(context)


def check_folder(folder: Path) -> tuple[float, float] | None:
    """The result of ``file_clock``; None on a full disk.

    Raises:
        NodeUnhealthy: a file cannot be written or read there.
    """
    for left in reversed(range(_TRIES)):
        try:
            return file_clock(probe_in(folder, "health"))
        except OSError as error:
            if disk_is_full(error):
                return None
            if not left:
                raise NodeUnhealthy(
                    f"{folder} cannot be written and read back ({error.strerror}). Is its file system mounted?"
                ) from error
        time.sleep(_PAUSE_S)
    return None


def check_clock(off: tuple[float, float] | None) -> None:
    """Compare this node's clock with the others.

    Args:
        off: bounds of (file system's clock - this node's), in seconds; None if they are unknown.

    Raises:
        NodeUnhealthy: it is off from the file system's and from the controller's.
    """
    if off is None or (off[0] < _CLOCK_S and off[1] > -_CLOCK_S):
        return
    by = min(off, key=abs)
    try:
        ours = time.time() - controller_clock(patience_s=5)
    except SlurmError:
        ours = 0.0
    if abs(ours) < _CLOCK_S:
        logger.warning(f"the clock of the run folder's file system is off by {by:.0f} s")
        return
    raise NodeUnhealthy(
        f"its clock is off by {ours:.0f} s from the controller's, and by {-by:.0f} s from the file system's. Is its "
        "time service running (chronyc tracking)?"
    )


def check_local_disk(folder: Path) -> None:
    """Raises NodeUnhealthy if the disk has too little space or cannot be written."""
    try:
        free = free_bytes(folder)
        path = probe_in(folder, "health")
        path.touch()
        path.unlink()
    except OSError as error:
        raise NodeUnhealthy(f"its local disk, {folder}, cannot be written ({error.strerror}).") from error
    if free < _LOCAL_BYTES:
        raise NodeUnhealthy(
            f"its local disk, {folder}, has {free >> 20} MiB free; {_LOCAL_BYTES >> 20} MiB are needed for temporary "
            "files. To use another folder, set TMPDIR in [environment] of the cluster file."
        )


def check_gpu(context: DistributedContext) -> None:
    """Raises NodeUnhealthy if the rank's GPU does not compute, is in use, or has failed memory."""
    import torch

    device = context.device
    try:
        numbers = torch.arange(1 << 20, device=device)
        is_right = int((3 * numbers).sum()) == 3 * (1 << 20) * ((1 << 20) - 1) // 2
        free, total = torch.cuda.mem_get_info(device)
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        name = f"GPU {device.index} ({torch.cuda.get_device_name(device)} {uuid})"
    except RuntimeError as error:
        raise NodeUnhealthy(f"GPU {device.index} does not answer: {' '.join(str(error).split())[:300]}") from error
    if not is_right:
        raise NodeUnhealthy(f"{name} computes wrong sums.")
    if free < _FREE_SHARE * total:
        raise NodeUnhealthy(
            f"{name} has {free >> 20} of {total >> 20} MiB free: another process uses it (nvidia-smi). If GPUs are "
            "shared here, give --health-check off."
        )
    if complaint := failed_memory(uuid):
        raise NodeUnhealthy(f"{name}: {complaint}.")


def failed_memory(uuid: str) -> str | None:
    """What NVML reports of failed memory; None if nothing, or if NVML (nvidia-ml-py) is not available."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        gpu = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
        _, _, pending, failed = pynvml.nvmlDeviceGetRemappedRows(gpu)
    except pynvml.NVMLError:  # not supported by this GPU, or not permitted
        return None
    if failed:
        return "rows of its memory have failed, and could not be remapped"
    return "rows of its memory are to be remapped: it needs a reset" if pending else None
