"""Page-locked host memory of the size that is asked for, from and to which a GPU copies asynchronously."""

from __future__ import annotations

import contextlib
import mmap
import weakref

import numpy as np
import torch
from torch import Tensor

_PORTABLE = 1  # cudaHostRegisterPortable: page-locked for all of the process's GPUs


def pinned_bytes(size: int) -> Tensor:
    """(size,) uint8, zeroed, page-locked for as long as the tensor or a view of it is there.

    torch's allocator of such memory rounds every block up to a power of two, which is up to twice of what is needed,
    and keeps it for ever. So this is memory of the process's own, registered with CUDA; where CUDA refuses to, it is
    torch's.
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
