"""Time, FLOPs and memory of what runs on a device.

FLOPs are those of matrix products and convolutions, as torch's counter sees them; the counter's own list leaves out
the CPU's fused attention, which is added here.
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
    """The machine's FLOP/s in a big square matrix product: what a share of the peak is a share of."""
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
    # No size suits every CPU: arithmetic that it does not have takes it a hundred times as long.
    while device == "cpu" and seconds(a) < 0.05:
        size *= 2
        a = torch.randn(size, size).to(dtype)
    return 2 * size**3 / statistics.median(seconds(a) for _ in range(7))


@dataclass(frozen=True)
class Timed:
    """Median seconds of a call: device, until its work is done; host, until it returns."""

    device: float
    host: float


def time_calls(call: Callable[[], object], device: str, *, times: int = 10, warm_up: int = 3) -> Timed:
    """Time a call again and again; between two calls the device is waited for."""
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


def counter() -> flop_counter.FlopCounterMode:
    """torch's counter, which goes through the step operator by operator, with the CPU's fused attention in its list."""

    def forward(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
        return flop_counter.sdpa_flop_count(q, k, v)

    def backward(d_out: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
        return flop_counter.sdpa_backward_flop_count(d_out, q, k, v)

    of_cpu = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: forward,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    return flop_counter.FlopCounterMode(display=False, custom_mapping=of_cpu)


def count_flops(run: Callable[[], object]) -> int:
    with counter() as counting:
        run()
    return counting.get_total_flops()


def start_of_memory(device: str) -> int:
    """What ``peak_memory`` is to be told: bytes that are taken before the first step. Forgets earlier peaks."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return 0
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass  # the peak is that of the process's whole life then
    return _resident("VmRSS")


def peak_memory(device: str, before: int) -> int:
    """Bytes at the peak: on a GPU all that tensors took, weights included; on a CPU what the process's memory grew by
    from the first step on, so gradients and moments, but not the weights."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return _resident("VmHWM") - before


def _resident(what: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(what))
