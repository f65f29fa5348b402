"""The GPUs of this machine that CUDA_VISIBLE_DEVICES shows, counted without starting CUDA.

torch.cuda.device_count() counts at most one MIG device, and starts CUDA if NVML is missing: a launcher would then hold
a context on each GPU. So the installed GPUs are read from `nvidia-smi -L`, and the variable by CUDA's rules:

    not set            all GPUs
    "", "-1"           none
    "0,2", "1abc"      numbers; what follows the digits of an entry is ignored
    "GPU-8932f937,…"   UUIDs, or prefixes that match one GPU only
    "MIG-…,…"          MIG devices, by UUID or by the older MIG-GPU-UUID/INSTANCE/INSTANCE

The list ends before the first entry of another kind than the first one, or that matches no device. A list that names a
GPU twice is empty.

A process sees one MIG device only, and NCCL refuses two ranks on one GPU. So each rank gets one MIG device, and further
MIG devices of the same GPU are skipped.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cfmask.errors import UserError

VISIBLE = "CUDA_VISIBLE_DEVICES"
DEVICES = Path("/dev")
_DEVICE_FILES = ("nvidia[0-9]*", "dxg", "kfd")
"""Of drivers for GPUs: NVIDIA's, that of Windows' Linux, AMD's."""
_RANKS = "CFMASK_LOCAL_GPUS"
_LOCAL_RANK = "SUBMITIT_LOCAL_LOCALID"


@dataclass(frozen=True)
class Gpu:
    """A GPU of this machine."""

    uuid: str
    """"GPU-…"."""
    mig: tuple[str, ...] = ()
    """Ids of its MIG devices, "MIG-…"; empty for a GPU that is not partitioned."""


def installed_gpus() -> tuple[Gpu, ...] | None:
    """This machine's GPUs, in nvidia-smi's order; None if there are device files and no nvidia-smi to ask."""
    if not shutil.which("nvidia-smi"):
        return None if _has_device_files() else ()
    return parse_listing(subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout)


def _has_device_files() -> bool:
    return any(any(DEVICES.glob(files)) for files in _DEVICE_FILES)


def parse_listing(text: str) -> tuple[Gpu, ...]:
    """The GPUs in the output of `nvidia-smi -L`."""
    found: list[Gpu] = []
    for line in text.splitlines():
        if whole := re.match(r"GPU \d+: .*\(UUID: (GPU-[^)]+)\)", line):
            found.append(Gpu(whole[1]))
        elif found and (part := re.match(r"\s+MIG .*\(UUID: (MIG-[^)]+)\)", line)):
            found[-1] = Gpu(found[-1].uuid, (*found[-1].mig, part[1]))
    return tuple(found)


def visible_gpus(value: str | None, installed: Sequence[Gpu] | None) -> tuple[str, ...] | None:
    """The GPUs that ranks may use, as entries for CUDA_VISIBLE_DEVICES.

    Args:
        value: Value of CUDA_VISIBLE_DEVICES; None if it is not set.
        installed: This machine's GPUs; None if they are unknown, and entries are not checked.

    Returns:
        One entry for each rank, in the order of the list; None if the number of GPUs is unknown.
    """
    if value is None:
        return None if installed is None else tuple(str(number) for number in range(len(installed)))
    if value.startswith("GPU-"):
        return _entries(value, lambda entry: _gpu_of_uuid(entry, installed))
    if value.startswith("MIG-"):
        entries = _entries(value, lambda entry: _mig_device(entry, installed))
        first_of_gpu = {_gpu_of_mig_device(entry, installed): entry for entry in reversed(entries)}
        return tuple(entry for entry in entries if entry in first_of_gpu.values())
    numbers = _entries(value, lambda entry: _number(entry, installed))
    return tuple(_digits(entry) for entry in numbers)


def first_visible(wanted: int, visible: Sequence[str] | None) -> tuple[str, ...]:
    """The first ``wanted`` of this machine's visible GPUs. If these are unknown (None), the ranks will find out.

    Raises:
        UserError: Fewer GPUs are visible.
    """
    if visible is None:
        return tuple(str(number) for number in range(wanted))
    if wanted <= len(visible):
        return tuple(visible[:wanted])
    value = os.environ.get(VISIBLE)
    there = f"{len(visible)} GPU{'' if len(visible) == 1 else 's'}"
    if not (shutil.which("nvidia-smi") or _has_device_files()):
        found = f"It has no GPU with a driver: there is neither nvidia-smi nor {DEVICES}/nvidia0"
    elif value is None:
        found = f"nvidia-smi -L lists {there} ({VISIBLE} is not set)"
    else:
        found = f'{VISIBLE} is "{value}", which shows {there}: the list ends before an entry that matches no GPU'
        found += ", and NCCL takes one MIG device of a GPU" * value.startswith("MIG-")
    fewer = f"--gpus-per-node {len(visible)}" if visible else "--gpus-per-node 0, to train on CPUs"
    raise UserError(
        f"--gpus-per-node {wanted} requests more GPUs than this machine shows. {found}. Request {fewer}"
        + (f", or change {VISIBLE}." if value is not None else ".")
    )


def for_ranks(entries: Sequence[str]) -> list[str]:
    """The prefix of a rank's command that passes ``entries``, one for each local rank."""
    return ["env", f"{_RANKS}={','.join(entries)}"] if entries else []


def show_to_rank(environment: MutableMapping[str, str] = os.environ) -> None:
    """In a rank that was started with ``for_ranks``: set CUDA_VISIBLE_DEVICES before CUDA is initialised.

    Every rank sees all whole GPUs and uses that of its local rank, so that NCCL knows the machine's topology.
    """
    listed = environment.pop(_RANKS, None)
    if listed is None:
        return
    entries = listed.split(",")
    environment[VISIBLE] = entries[int(environment[_LOCAL_RANK])] if listed.startswith("MIG-") else listed


def _entries(value: str, identify: Callable[[str], str | None]) -> tuple[str, ...]:
    """The entries before the first one that matches no device; none if two match the same."""
    entries: dict[str, str] = {}
    for entry in value.split(","):
        named = identify(entry)
        if named is None:
            break
        if named in entries:
            return ()
        entries[named] = entry
    return tuple(entries.values())


def _digits(entry: str) -> str:
    """The number at the beginning of an entry, as C's strtol reads it; "" if there is none."""
    match = re.match(r"\s*\+?([0-9]+)", entry)
    return str(int(match[1])) if match else ""


def _number(entry: str, installed: Sequence[Gpu] | None) -> str | None:
    digits = _digits(entry)
    known = bool(digits) and (installed is None or int(digits) < len(installed))
    return digits if known else None


def _gpu_of_uuid(entry: str, installed: Sequence[Gpu] | None) -> str | None:
    if not entry.startswith("GPU-"):
        return None
    return entry if installed is None else _only(entry, [gpu.uuid for gpu in installed])


def _mig_device(entry: str, installed: Sequence[Gpu] | None) -> str | None:
    if not entry.startswith("MIG-"):
        return None
    if installed is None:
        return entry
    older = _uuid_in(entry)
    if older is not None:  # recent drivers accept this form, and list the other one
        return entry if any(gpu.uuid == older for gpu in installed) else None
    return _only(entry, [device for gpu in installed for device in gpu.mig])


def _gpu_of_mig_device(entry: str, installed: Sequence[Gpu] | None) -> str:
    """The GPU that a MIG device belongs to; the device itself if that is unknown."""
    if older := _uuid_in(entry):
        return older
    return next((g.uuid for g in installed or () for device in g.mig if device.startswith(entry)), entry)


def _uuid_in(mig_device: str) -> str | None:
    match = re.match(r"MIG-(GPU-[^/]+)/\d+/\d+$", mig_device)
    return match[1] if match else None


def _only(prefix: str, ids: Sequence[str]) -> str | None:
    """The only id with this prefix; None if there is none, or several."""
    found = [each for each in ids if each.startswith(prefix)]
    return found[0] if len(found) == 1 else None
