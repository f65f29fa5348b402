"""Page-locked host memory of the size that is asked for, from and to which a GPU copies asynchronously.

PyTorch's allocator of page-locked memory rounds every block up to a power of two: a batch of 512 images of 224 × 224
pixels, 77 MB, takes 134 MB. For what comes and goes, such as batches, its own setting ends that where PyTorch has it
(``allocate_exact_sizes``); what lives as long as the run is registered with CUDA here (``pinned_bytes``).
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import weakref

import numpy as np
import torch
from torch import Tensor

_SETTING = "pinned_max_round_threshold_mb"
_SOUND_FROM = "2.14"
"""Earlier versions do not have the setting, or hand out cached blocks that are smaller than what is asked for
(pytorch/pytorch#192722)."""
_PORTABLE = 1  # cudaHostRegisterPortable: page-locked for all of the process's GPUs


def pinned_bytes(size: int) -> Tensor:
    """(size,) uint8, zeroed, page-locked for as long as the tensor or a view of it is there.

    It is memory of the process's own, registered with CUDA; where CUDA refuses to, it is PyTorch's.
    """
    if size == 0:
        return torch.empty(0, dtype=torch.uint8)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # A process that is forked must not make pages copy-on-write that the GPU writes to.
    memory.madvise(mmap.MADV_DONTFORK)
    array = np.frombuffer(memory, dtype=np.uint8)
    cudart = torch.cuda.cudart()
    address = array.ctypes.data
    if int(cudart.cudaHostRegister(address, size, _PORTABLE)) != 0:
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device="cuda")  # CUDA remembers the refusal, and would give it to the next call that asks
        return _allocate(size)
    # Before the memory is given back: an array drops what it lies in after its finalizers have run. Not at the end of
    # the process, when a copy may be under way and all is given back anyway.
    weakref.finalize(array, _unregister, address).atexit = False
    return torch.from_numpy(array)


def _allocate(size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.uint8, pin_memory=True)


def _unregister(address: int) -> None:
    torch.cuda.cudart().cudaHostUnregister(address)


@functools.cache
def allocate_exact_sizes() -> None:
    """From now on, page-locked blocks of more than 1 MB are as large as they are asked to be, where PyTorch can do it.

    What PYTORCH_ALLOC_CONF says of this setting stays.
    """
    if torch.__version__ < _SOUND_FROM:  # torch compares it as a version
        return
    present = torch._C._accelerator_getAllocatorSettings()
    if _SETTING not in present:
        torch._C._accelerator_setAllocatorSettings(f"{present},{_SETTING}:1".lstrip(","))
