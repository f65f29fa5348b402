"""A whole step with its passes as a CUDA graph, beside the same step launched operator by operator.

32 images a GPU is what a batch of 512 leaves each of 16: there the host's launches, not the device, bound the step.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tools.benchmarks.gpu.runner import Section
from tools.benchmarks.gpu.setting import B16, B32, Setting, free_memory, set_arithmetic
from tools.benchmarks.metering import time_calls
from tools.benchmarks.training import HEADLINE, VANILLA, Contender, OurStep

HEAD, FT = ("object-mask-single-fill", HEADLINE), ("ft", VANILLA)
CASES = [
    *((*HEAD, model, batch, True) for model, batch in [(B32, 32), (B16, 32), (B16, 128), (B16, 256)]),
    *((*FT, model, batch, True) for model, batch in [(B32, 32), (B16, 128)]),
    *((*method, B16, 128, False) for method in (HEAD, FT)),
]
"""Name and method, model, batch, whether in deterministic mode."""


def graphs(setting: Setting, section: Section) -> dict[str, Any]:
    rows, result = [], {}
    for name, method, model, batch, deterministic in CASES:
        set_arithmetic("bf16", deterministic=deterministic)
        mode = "deterministic" if deterministic else "fast"
        found = measure(model, batch, Contender("x", "bf16", method), setting)
        cells = [f"{value:.2f}" for value in found.values()]
        rows.append([name, model, batch, mode, *(cells if "graph ms" in found else [*cells, *["needs a GPU"] * 3])])
        result[f"{name} {model} {batch} {mode}"] = found
    header = ["step", "model", "batch", "mode", "ms", "host ms", "with a CUDA graph ms", "host ms", "× faster"]
    section.table(header, rows)
    return result


def measure(model: str, batch: int, contender: Contender, setting: Setting) -> dict[str, float]:
    found: dict[str, float] = {}
    for kind, graphed in (("eager", False), ("graph", True)):
        if graphed and setting.device != "cuda":
            continue
        step = OurStep(setting.materials(model, batch), replace(contender, graphs=graphed))
        timed = time_calls(step, setting.device, times=setting.times(10))
        found |= {f"{kind} ms": 1e3 * timed.device, f"{kind} host ms": 1e3 * timed.host}
        del step
        free_memory(setting.device)
    if "graph ms" in found:
        found["× faster"] = found["eager ms"] / found["graph ms"]
    return found
