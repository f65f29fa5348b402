"""Whether Triton is installed, interprets, and can launch kernels."""

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
"""Dtypes that the kernels read and write. They compute in fp32."""


def jit(kernel: Callable) -> Any:
    """``triton.jit`` if Triton is installed; otherwise the function itself, which must not be called."""
    return kernel if triton is None else triton.jit(kernel)


@jit
def _probe(x):
    tl.store(x, 0.0)


# The type of a decorated kernel shows whether Triton's interpreter runs it (TRITON_INTERPRET=1).
INTERPRETED = triton is not None and not isinstance(_probe, triton.JITFunction)


@functools.cache
def can_launch() -> bool:
    """Whether Triton can launch kernels: it builds its launcher at run time, with a C compiler and Python's headers.
    Warns once if it cannot."""
    try:
        triton.runtime.driver.active.get_current_target()
    except Exception as error:  # of any type: from the compiler, the linker or the driver
        warnings.warn(
            f"Triton cannot launch kernels here ({error}). Plain PyTorch is used instead, which takes more time and "
            "memory. Install a C compiler (gcc, or the one that CC names) and Python's development headers.",
            stacklevel=2,
        )
        return False
    return True


def usable(tensor: Tensor) -> bool:
    """Whether kernels accept this tensor; otherwise the caller computes in plain PyTorch.

    True for DTYPES on a GPU of compute capability 8.0 or more if Triton can launch, and on any device under Triton's
    interpreter (TRITON_INTERPRET=1 before Triton is imported). False inside torch.compile, which makes its own kernels.
    """
    if triton is None or tensor.dtype not in DTYPES or torch.compiler.is_compiling():
        return False
    if INTERPRETED:
        return True
    return tensor.is_cuda and _supported(tensor.device) and can_launch()


@functools.cache
def _supported(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)
