"""Time, FLOPs and memory of calls on a device.

FLOPs are those of matrix products, convolutions and attention, by torch's counter. The counter does not know the CPU's
fused attention, which is added here.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import flop_counter

from cfmask.session import choose_arithmetic


def measure_matmul(device: str, precision: str) -> float:
    """FLOP/s of a big square matrix product, which benchmarks call the peak."""
    choose_arithmetic(precision, deterministic=False)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    times = 20 if device == "cuda" else 1

    def seconds(a: Tensor) -> float:
        wait(device)
        begun = time.perf_counter()
        for _ in range(times):
            a @ a
        wait(device)
        return (time.perf_counter() - begun) / times

    size = 8192 if device == "cuda" else 256
    a = torch.randn(size, size, device=device).to(dtype)
    seconds(a)
    # No size suits every CPU: arithmetic that it emulates takes a hundred times as long.
    while device == "cpu" and seconds(a) < 0.05:
        size *= 2
        a = torch.randn(size, size).to(dtype)
    return 2 * size**3 / statistics.median(seconds(a) for _ in range(7))


@dataclass(frozen=True)
class Timed:
    """Median seconds of a call."""

    device: float
    """Until its work is done."""
    host: float
    """Until it returns."""


def time_calls(call: Callable[[], object], device: str, *, times: int = 10, warm_up: int = 3) -> Timed:
    """Time a call several times. Between two calls the device is waited for."""
    for _ in range(warm_up):
        call()
    wait(device)
    on_device, on_host = [], []
    for _ in range(times):
        if device == "cuda":
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
        begun = time.perf_counter()
        call()
        on_host.append(time.perf_counter() - begun)
        if device == "cuda":
            last.record()
            torch.cuda.synchronize()
            on_device.append(first.elapsed_time(last) / 1e3)
        else:
            on_device.append(on_host[-1])
    return Timed(statistics.median(on_device), statistics.median(on_host))


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def count_flops(run: Callable[[], object]) -> int:
    """FLOPs of a call."""

    def forward(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
        return flop_counter.sdpa_flop_count(q, k, v)

    def backward(d_out: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
        return flop_counter.sdpa_backward_flop_count(d_out, q, k, v)

    of_cpu = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: forward,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    with flop_counter.FlopCounterMode(display=False, custom_mapping=of_cpu) as counting:
        run()
    return counting.get_total_flops()


def start_of_memory(device: str) -> int:
    """Bytes in use before the first step, for ``peak_memory``. Resets the peak."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return 0
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass  # then the peak is that of the process's whole life
    return _resident("VmRSS")


def peak_memory(device: str, before: int) -> int:
    """Bytes at the peak. On a GPU: all tensors, weights included. On a CPU: the growth of the process since
    ``start_of_memory``, so gradients and moments, but not the weights."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return _resident("VmHWM") - before


def _resident(what: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(what))


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed. On the CPU and in cuBLAS only the message tells."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return any(text in str(error) for text in ("can't allocate memory", "not enough memory", "ALLOC_FAILED"))
