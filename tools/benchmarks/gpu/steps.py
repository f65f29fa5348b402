"""Training steps of cfmask beside vanilla fine-tuning and the authors' algorithm: time, share of the peak, memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch

from tools.benchmarks.gpu.runner import Section
from tools.benchmarks.gpu.setting import B16, B32, L14, Setting, free_memory, set_arithmetic
from tools.benchmarks.metering import count_flops, measure_matmul, out_of_memory
from tools.benchmarks.training import HEADLINE, VANILLA, Contender, Materials, Measured, copied, measure_step

VANILLA_FT = Contender("vanilla FT", "bf16", VANILLA)
OURS = Contender("cfmask", "bf16", HEADLINE)
DETERMINISTIC = Contender("cfmask, deterministic", "bf16", HEADLINE, deterministic=True)
GRAPHED = replace(OURS, name="cfmask, CUDA graph", graphs=True)
AS_TRAINED = replace(DETERMINISTIC, name="cfmask, deterministic, CUDA graph", graphs=True)
VANILLA_GRAPHED = replace(VANILLA_FT, name="vanilla FT, CUDA graph", graphs=True)
VANILLA_AS_TRAINED = replace(VANILLA_GRAPHED, name="vanilla FT, deterministic, CUDA graph", deterministic=True)
VANILLA_DETERMINISTIC = replace(VANILLA_FT, name="vanilla FT, deterministic", deterministic=True)
VANILLAS = (VANILLA_FT, VANILLA_DETERMINISTIC, VANILLA_GRAPHED, VANILLA_AS_TRAINED)
RECOMPUTED = Contender("cfmask, activations recomputed", "bf16", HEADLINE, recompute=True)
IN_TF32 = Contender("cfmask", "tf32", HEADLINE)
AUTHORS = (Contender("authors", "tf32", None), Contender("authors", "bf16", None))
HEADER = [
    *("step", "precision", "images/s", "ms", "host ms", "TFLOP/s", "% of peak", "F", "memory GB", "× vanilla's time"),
    *(f"× authors, {a.precision}" for a in AUTHORS),
    *(f"% of authors' memory, {a.precision}" for a in AUTHORS),
]
NEEDS_GPU, FAILED = "needs a GPU", "failed"
peak = cache(measure_matmul)


def step_table(model: str, batch: int, contenders: Sequence[Contender], setting: Setting, section: Section) -> dict:
    """Measure contenders from one state, and add their table to the report at once."""
    peaks = {p: peak(setting.device, p) for p in dict.fromkeys(c.precision for c in contenders)}
    # On the host, so that it takes no memory of the device.
    m = copied(setting.materials(model, batch), "cpu")
    found: dict[Contender, Measured | str] = {}
    for contender in contenders:
        found[contender] = measure(m, contender, setting)
        print(model, batch, contender, found[contender], flush=True)
    one = copied(replace(m, images=m.images[:1], labels=m.labels[:1]), setting.device)
    with torch.no_grad():
        forward = count_flops(lambda: one.student(one.normalise(one.images))) * len(m.images)
    rows = [row_of(contender, found, len(m.images), forward, peaks) for contender in contenders]
    section.note(
        f"{model}, batch {len(m.images)}. A big square product reaches "
        f"{', '.join(f'{rate / 1e12:.3g} TFLOP/s in {p}' for p, rate in peaks.items())}; F, a forward of the plain "
        f"tower, is {forward / len(m.images) / 1e9:.4g} GFLOP an image."
    )
    section.table(HEADER, rows)
    return {
        f"{model} {batch} {c.name}, {c.precision}": vars(f) if isinstance(f, Measured) else f for c, f in found.items()
    }


def measure(m: Materials, contender: Contender, setting: Setting) -> Measured | str:
    """The contender's step, or the reason why it was not measured."""
    if contender.graphs and setting.device != "cuda":
        return NEEDS_GPU
    free_memory(setting.device)
    set_arithmetic(contender.precision, deterministic=contender.deterministic)
    try:
        times, warm_up = setting.times(8), setting.times(3)
        return measure_step(copied(m, setting.device), contender, times=times, warm_up=warm_up)
    except (RuntimeError, MemoryError) as error:
        print(f"{contender}: {error}", flush=True)
        return "does not fit" if out_of_memory(error) else f"{FAILED}: {str(error).splitlines()[0][:120]}"


def row_of(
    contender: Contender, found: dict[Contender, Measured | str], batch: int, forward: int, peaks: dict[str, float]
) -> list[str]:
    of = found[contender]
    if isinstance(of, str):
        return [contender.name, contender.precision, of, *[""] * (len(HEADER) - 3)]
    rate = of.flops / of.seconds

    def beside(other: Contender, form: str, value: Any) -> str:
        them = found.get(other)
        return form.format(value(them)) if isinstance(them, Measured) else ""

    # The fastest vanilla step in the same mode, if there is one.
    vanillas = [(v, f) for v in VANILLAS if isinstance(f := found.get(v), Measured)]
    alike = [(v, f) for v, f in vanillas if v.deterministic == contender.deterministic] or vanillas
    vanilla = min(alike, key=lambda of: of[1].seconds)[0] if alike else VANILLA_FT

    return [
        contender.name,
        contender.precision,
        f"{batch / of.seconds:.0f}",
        f"{1e3 * of.seconds:.1f}",
        f"{1e3 * of.host:.1f}",
        f"{rate / 1e12:.3g}",
        f"{100 * rate / peaks[contender.precision]:.1f}",
        f"{of.flops / forward:.2f}",
        f"{of.peak / 1e9:.2f}",
        beside(vanilla, "{:.2f}", lambda them: of.seconds / them.seconds),
        *(beside(a, "{:.2f}", lambda them: them.seconds / of.seconds) for a in AUTHORS),
        *(beside(a, "{:.0f}", lambda them: 100 * of.peak / them.peak if them.peak else math.nan) for a in AUTHORS),
    ]


def steps(setting: Setting, section: Section, *, tables: Sequence[tuple[str, int, Sequence[Contender]]]) -> dict:
    """A table for each model and batch.

    Raises:
        AssertionError: a step failed for another reason than memory. All tables are written first.
    """
    result: dict[str, Any] = {}
    for model, batch, contenders in tables:
        result |= step_table(model, batch, contenders, setting, section)
    failed = [name for name, of in result.items() if isinstance(of, str) and of.startswith(FAILED)]
    assert not failed, f"failed: {'; '.join(failed)}"
    return result


SMALL_BATCH = (OURS, DETERMINISTIC, GRAPHED, AS_TRAINED, VANILLA_FT, VANILLA_GRAPHED, VANILLA_AS_TRAINED, *AUTHORS)
SMALL = partial(
    steps,
    tables=[
        (B16, 128, SMALL_BATCH + (RECOMPUTED, IN_TF32)),
        (B32, 32, SMALL_BATCH),
    ],
)
LARGE = partial(steps, tables=[(B16, 512, (OURS, DETERMINISTIC, VANILLA_FT, VANILLA_DETERMINISTIC, *AUTHORS))])
L14_STEPS = partial(steps, tables=[(L14, 128, (OURS, DETERMINISTIC, VANILLA_FT))])
