"""A step with torch.compile beside the eager one: time, first step, number of graphs."""

from __future__ import annotations

import time
import warnings
from functools import partial
from typing import Any

import torch

from tools.benchmarks.gpu.runner import Section
from tools.benchmarks.gpu.setting import B16, Setting, free_memory, set_arithmetic
from tools.benchmarks.metering import peak_memory, start_of_memory, time_calls, wait
from tools.benchmarks.training import HEADLINE, Contender, OurStep

MODEL, BATCH = B16, 128


def compiled(setting: Setting, section: Section) -> dict[str, Any]:
    """Write the table and the compiler's warnings, then fail if nothing was compiled."""
    set_arithmetic("bf16", deterministic=False)
    if setting.dry:
        without_compiler()
        section.note("In a dry run, graphs are traced but not compiled, because compiling takes a minute on a CPU.")
    rows, result = [], {}
    for name in ("eager", "compiled"):
        free_memory(setting.device)
        torch._dynamo.utils.counters.clear()
        step = OurStep(setting.materials(MODEL, BATCH), Contender("x", "bf16", HEADLINE, compiled=name == "compiled"))
        before = start_of_memory(setting.device)
        begun = time.perf_counter()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            step()
            wait(setting.device)
        first = time.perf_counter() - begun
        timed = time_calls(step, setting.device, times=setting.times(8), warm_up=setting.times(3))
        peak = peak_memory(setting.device, before)
        traced = torch._dynamo.utils.counters["stats"].get("unique_graphs", 0)
        found = {"first s": first, "ms": 1e3 * timed.device, "host ms": 1e3 * timed.host, "peak GB": peak / 1e9}
        rows.append([name, *(f"{value:.2f}" for value in found.values()), traced])
        result[name] = {**found, "graphs": traced}
        for one in {str(w.message)[:300] for w in said if "compile" in str(w.message)}:
            section.note(one)
        del step
    section.table([f"{MODEL}, batch {BATCH}", "first step s", "ms", "host ms", "memory GB", "graphs"], rows)
    assert result["compiled"]["graphs"], "nothing was compiled"
    return result


def without_compiler() -> None:
    """Have torch.compile run traced graphs as they are, in this process."""
    real = torch.compile

    def traced(function: Any = None, **options: Any) -> Any:
        options["backend"] = "aot_eager"
        return partial(traced, **options) if function is None else real(function, **options)

    torch.compile = traced  # type: ignore[assignment]
