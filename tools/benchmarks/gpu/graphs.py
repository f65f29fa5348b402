"""A step's passes replayed as one CUDA graph, beside the same passes launched one by one.

32 images a GPU is what a batch of 512 leaves each of 16: there the host's launches, not the device, bound the step.
"""

from __future__ import annotations

from typing import Any

import torch

from tools.benchmarks.gpu.runner import Section
from tools.benchmarks.gpu.setting import B16, B32, Setting, free_memory, set_arithmetic
from tools.benchmarks.metering import time_calls
from tools.benchmarks.training import HEADLINE, Contender, OurStep

CASES = [(B32, 32), (B16, 32)]


def graphs(setting: Setting, section: Section) -> dict[str, Any]:
    set_arithmetic("bf16", deterministic=False)
    rows, result = [], {}
    for model, batch in CASES:
        found = measure(model, batch, setting)
        cells = [f"{value:.2f}" for value in found.values()]
        rows.append([model, batch, *(cells if "graph ms" in found else [*cells, "needs a GPU", ""])])
        result[f"{model} {batch}"] = found
        free_memory(setting.device)
    section.table(["model", "batch", "eager ms", "host ms", "CUDA graph ms", "× faster"], rows)
    return result


def measure(model: str, batch: int, setting: Setting) -> dict[str, float]:
    step = OurStep(setting.materials(model, batch), Contender("x", "bf16", HEADLINE))

    def eager() -> None:
        step.add_gradients()
        step.model.zero_grad(set_to_none=True)

    timed = time_calls(eager, setting.device, times=setting.times(10))
    found = {"eager ms": 1e3 * timed.device, "host ms": 1e3 * timed.host}
    if setting.device == "cuda":
        found["graph ms"] = 1e3 * time_calls(capture(step).replay, setting.device).device
        found["× faster"] = found["eager ms"] / found["graph ms"]
    return found


def capture(step: OurStep) -> torch.cuda.CUDAGraph:
    """The passes of a step as a graph that adds its gradients to the same memory at every replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step.add_gradients(cache_casts=False)
            step.model.zero_grad(set_to_none=True)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step.add_gradients(cache_casts=False)
    return graph
