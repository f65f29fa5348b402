"""What every Triton kernel of this package shares: whether Triton is there, interprets, and can launch."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, and builds of torch for the CPU alone
    triton = tl = None

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What the kernels read and write. They compute in fp32."""


def jit(kernel: Callable) -> Any:
    """``triton.jit`` where there is Triton; otherwise the function itself, which nobody may call."""
    return kernel if triton is None else triton.jit(kernel)


@jit
def _probe(x):
    tl.store(x, 0.0)


# What the decorator made of a kernel says for certain whether Triton's interpreter runs it (TRITON_INTERPRET=1).
INTERPRETED = triton is not None and not isinstance(_probe, triton.JITFunction)


@functools.cache
def can_launch() -> bool:
    """Whether Triton can launch anything: it builds its launcher at run time, with a C compiler and Python's headers.

    Warns once if it cannot.
    """
    try:
        triton.runtime.driver.active.get_current_target()
    except Exception as error:  # whatever the compiler, the linker or the driver has to say
        warnings.warn(
            f"Triton cannot launch kernels here; plain PyTorch takes their place, in more time and memory: {error}. "
            "Triton needs a C compiler (gcc, or what CC names) and Python's development headers.",
            stacklevel=2,
        )
        return False
    return True


def usable(tensor: Tensor) -> bool:
    """Whether kernels can take this tensor: else the caller computes in plain PyTorch.

    True for one of DTYPES on a GPU that Triton supports (compute capability 8.0 and up), or on any device under
    Triton's interpreter (TRITON_INTERPRET=1 before Triton is imported). Where Triton is installed and cannot launch,
    it warns once and is False. Inside torch.compile it is False: the compiler makes kernels of its own.
    """
    if triton is None or tensor.dtype not in DTYPES or torch.compiler.is_compiling():
        return False
    if INTERPRETED:
        return True
    return tensor.is_cuda and _supported(tensor.device) and can_launch()


@functools.cache
def _supported(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)
