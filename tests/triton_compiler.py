"""Compiles Triton kernels for GPUs that are not there, with the very constants that their launchers give them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch

SHARED_MEMORY = {80: 163, 89: 99, 90: 227}
"""KiB that one block may have, by compute capability: A100, L4 and RTX 40, H100."""

_TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


class Launch(NamedTuple):
    kernel: Any
    arguments: tuple
    options: dict[str, Any]


def launches_of(call: Callable[[], object]) -> list[Launch]:
    """The kernels that ``call`` launches, none of which runs."""
    import triton

    found: list[Launch] = []

    def run(self, *arguments, grid, warmup, **options):
        found.append(Launch(self, arguments, options))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.JITFunction, "run", run)
        call()
    return found


def compile_for(launch: Launch, capability: int):
    """What Triton makes of a launch for a GPU of this compute capability."""
    import triton
    from triton.backends.compiler import GPUTarget

    kernel, arguments, options = launch
    given = dict(zip(kernel.arg_names, arguments, strict=False))
    compiler = {name: value for name, value in options.items() if name in ("num_warps", "num_stages")}
    constants = {name: value for name, value in options.items() if name not in compiler}
    signature, aligned = {}, {}
    for place, name in enumerate(kernel.arg_names):
        value = given.get(name)
        if name in constants:
            signature[name] = "constexpr"
        elif isinstance(value, torch.Tensor):
            signature[name] = _TYPES[value.dtype]
            aligned[(place,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1:  # a launch makes a constant of an integer that is 1
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = "i32"
            if value % 16 == 0:
                aligned[(place,)] = [["tt.divisibility", 16]]
    source = triton.compiler.ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=compiler)


@contextmanager
def no_cache(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(folder))
        yield
