"""Time of a step on the device by kind of kernel, operator and kernel, and the share of time that the device idles."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tools.benchmarks.gpu.runner import Section
from tools.benchmarks.gpu.setting import B16, B32, Setting, free_memory, set_arithmetic
from tools.benchmarks.metering import wait
from tools.benchmarks.training import HEADLINE, Contender, OurStep

CASES = [(B16, 512), (B32, 32)]
STEPS, WARM_UP, SHOWN = 2, 3, 18

KINDS = (
    ("relevance kernel", r"\b(_log_sum_exp|_column_sums)"),
    ("fused add and norm", r"\b_add_norm"),
    ("fused QuickGELU", r"\b_bias_quick_gelu"),
    ("join of q, k, v gradients", r"\b_join"),
    ("attention", r"flash|fmha|sdpa|attention"),
    ("optimizer", r"[Aa]dam|multi_tensor"),
    ("NCCL", r"nccl"),
    ("convolution", r"conv|wgrad|dgrad|fprop|im2col"),
    ("matrix product", r"gemm|nvjet|cutlass|xmma|cublas|splitK|gemv"),
    ("layer norm", r"layer_norm|LayerNorm|GammaBeta"),
    ("SiLU", r"silu"),
    ("reduction", r"reduce_kernel|softmax|nll_loss|Reduce"),
    ("copy, cast, cat", r"copy|Cat|memcpy|Memcpy|Memset|fill|Fill"),
    ("other elementwise", r"elementwise|index|gather|scatter"),
)
"""Kinds of kernels. The first pattern that the name matches decides."""


def profile(setting: Setting, section: Section) -> dict[str, Any]:
    set_arithmetic("bf16", deterministic=False)
    result = {}
    for model, batch in CASES:
        step = OurStep(setting.materials(model, batch), Contender("x", "bf16", HEADLINE))
        trace = setting.work / f"{model}-{batch}.trace.json"
        events = record(step, trace, setting)
        result[f"{model} {batch}"] = describe(f"{model}, batch {batch}", events, setting, section)
        del step
        free_memory(setting.device)
    if setting.dry:
        section.note("Without a GPU there are no kernels. These are operators on the CPU.")
    return result


def record(step: Callable[[], object], trace: Path, setting: Setting) -> list[dict[str, Any]]:
    """Events of STEPS steps in Chrome's trace format."""
    for _ in range(WARM_UP):
        step()
    wait(setting.device)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if setting.device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(STEPS):
            step()
        wait(setting.device)
    profiler.export_chrome_trace(str(trace))
    return json.loads(trace.read_text())["traceEvents"]


def describe(name: str, events: list[dict[str, Any]], setting: Setting, section: Section) -> dict[str, Any]:
    """Write the tables of a trace. Returns its figures for a step: ms, launches, idle share, ms by kind of kernel."""
    operators = {e["args"].get("External id"): e["name"] for e in events if e.get("cat") == "cpu_op" and "args" in e}
    kinds = ("cpu_op",) if setting.dry else ("kernel", "gpu_memcpy", "gpu_memset")
    work = [e for e in events if e.get("cat") in kinds]
    assert work, "there are no kernels in the trace"
    wall = max(e["ts"] + e["dur"] for e in work) - min(e["ts"] for e in work)
    idle = 1 - busy(work) / wall
    by_kind: dict[str, list[float]] = {}
    by_operator: dict[str, list[float]] = {}
    by_kernel: dict[str, list[float]] = {}
    for e in work:
        operator = operators.get(e.get("args", {}).get("External id"), "?")
        for found, key in ((by_kind, kind_of(e["name"])), (by_operator, operator), (by_kernel, e["name"][:110])):
            found.setdefault(key, []).append(e["dur"] / STEPS / 1e3)
    total = sum(map(sum, by_kind.values()))
    section.note(
        f"{name}: {wall / STEPS / 1e3:.2f} ms a step, {len(work) / STEPS:.0f} launches a step, the device idles "
        f"{100 * idle:.1f} % of the time."
    )
    for what, found in (("kind", by_kind), ("launched by", by_operator), ("kernel", by_kernel)):
        top = sorted(found.items(), key=lambda item: -sum(item[1]))[:SHOWN]
        rows = [[k, f"{sum(v):.2f}", f"{100 * sum(v) / total:.1f}", f"{len(v) / STEPS:.0f}"] for k, v in top]
        section.table([what, "ms a step", "%", "calls a step"], rows)
    return {
        "ms": wall / STEPS / 1e3,
        "launches": len(work) / STEPS,
        "idle": idle,
        "kinds": {kind: sum(of) for kind, of in by_kind.items()},
    }


def kind_of(kernel: str) -> str:
    """The kind of a kernel, by its name."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, kernel)), "other")


def busy(work: list[dict[str, Any]]) -> float:
    """Microseconds in which at least one event was under way."""
    total, reached = 0.0, 0.0
    for e in sorted(work, key=lambda e: e["ts"]):
        end = e["ts"] + e["dur"]
        total += max(0.0, end - max(reached, e["ts"]))
        reached = max(reached, end)
    return total
