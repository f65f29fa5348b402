"""Page-locked host memory of exact sizes, for asynchronous copies from and to a GPU.

PyTorch's allocator of page-locked memory rounds every block up to a power of two: a batch of 512 images of 224 × 224
pixels, 77 MB, takes 134 MB. For memory that is allocated repeatedly, such as batches, ``allocate_exact_sizes`` changes
PyTorch's setting. Memory that lives as long as the run is registered with CUDA by ``pinned_bytes``.
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
"""Earlier versions do not have the setting, or return cached blocks that are smaller than requested
(pytorch/pytorch#192722)."""
_PORTABLE = 1  # cudaHostRegisterPortable: page-locked for all of the process's GPUs


def pinned_bytes(size: int) -> Tensor:
    """(size,) uint8, zeroed and page-locked as long as the tensor or a view of it exists.

    The memory is registered with CUDA; if CUDA refuses, it comes from PyTorch's allocator.
    """
    if size == 0:
        return torch.empty(0, dtype=torch.uint8)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # A fork must not make pages copy-on-write to which the GPU writes.
    memory.madvise(mmap.MADV_DONTFORK)
    array = np.frombuffer(memory, dtype=np.uint8)
    cudart = torch.cuda.cudart()
    address = array.ctypes.data
    if int(cudart.cudaHostRegister(address, size, _PORTABLE)) != 0:
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device="cuda")  # clears the error, which CUDA would report to the next call
        return _allocate(size)
    # An array releases its memory after its finalizers have run. Not at exit, when a copy may still be in progress.
    weakref.finalize(array, _unregister, address).atexit = False
    return torch.from_numpy(array)


def _allocate(size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.uint8, pin_memory=True)


def _unregister(address: int) -> None:
    torch.cuda.cudart().cudaHostUnregister(address)


@functools.cache
def allocate_exact_sizes() -> None:
    """Make PyTorch allocate page-locked blocks of more than 1 MB in the requested size, if its version can. A value in
    PYTORCH_ALLOC_CONF is kept."""
    if torch.__version__ < _SOUND_FROM:  # torch compares it as a version
        return
    present = torch._C._accelerator_getAllocatorSettings()
    if _SETTING not in present:
        torch._C._accelerator_setAllocatorSettings(f"{present},{_SETTING}:1".lstrip(","))
