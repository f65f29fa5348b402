"""Triton kernels without a GPU: run by Triton's interpreter, or compiled for GPUs that this machine does not have."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from made import REPO

SHARED_MEMORY = {80: 163, 89: 99, 90: 227}
"""KiB that one block may have, by compute capability: A100, L4 and RTX 40, H100."""


def run_interpreted(script: str, results: Path) -> None:
    """Run a script, which writes ``results``, in a process in which Triton's interpreter runs kernels: Triton decides
    that when it is imported, for the whole process."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{REPO}:{os.environ['PYTHONPATH']}"}
    done = subprocess.run([sys.executable, script, results], env=environment, capture_output=True, text=True)
    if "only 0-dimensional arrays can be converted to Python scalars" in done.stderr:
        pytest.skip("the interpreter of this version of Triton needs NumPy before 2.4")
    assert done.returncode == 0, done.stderr


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
    """What Triton makes of a launch for a GPU of this compute capability: its own warm-up, which compiles and does not
    launch, with a driver that claims such a GPU."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class Driver:
        get_current_target = staticmethod(lambda: GPUTarget("cuda", capability, 32))
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)

    launch.kernel.__init__(launch.kernel.fn)  # forget what was compiled for other GPUs
    before = dict(vars(driver))
    driver.set_active(Driver())
    try:
        return launch.kernel.run(*launch.arguments, grid=(1,), warmup=True, **launch.options)
    finally:
        vars(driver).update(before)


@contextmanager
def no_cache(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(folder))
        yield
