"""A step whose passes are a CUDA graph, beside the same step launched operator by operator.

A batch of 512 on 16 GPUs leaves each of them 32 images. There the host's launches bound the step, not the device.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tools.benchmarks.gpu.runner import Section
from tools.benchmarks.gpu.setting import B16, B32, Setting, free_memory, set_arithmetic
from tools.benchmarks.training import HEADLINE, VANILLA, Contender, measure_step

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
    for kind in ("eager", "graph") if setting.device == "cuda" else ("eager",):
        m = setting.materials(model, batch)
        step = measure_step(
            m, replace(contender, graphs=kind == "graph"), times=setting.times(10), warm_up=3, count=False
        )
        found |= {f"{kind} ms": 1e3 * step.seconds, f"{kind} host ms": 1e3 * step.host}
        del m
        free_memory(setting.device)
    if "graph ms" in found:
        found["× faster"] = found["eager ms"] / found["graph ms"]
    return found
