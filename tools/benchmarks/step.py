"""Training steps beside the authors' algorithm: images/s, FLOPs and memory."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import replace

import torch

from cfmask.errors import UserError
from cfmask.presets import PRESETS
from cfmask.recipe import Recipe
from cfmask.session import choose_arithmetic
from tools.benchmarks.fresh_process import DoesNotFit, fresh
from tools.benchmarks.metering import count_flops, measure_matmul
from tools.benchmarks.tables import announce, report, spread
from tools.benchmarks.training import HEADLINE, VANILLA, Case, Contender, Measured, materials, measure_step

STEPS = {
    "cpu": (("ViT-B-32-quickgelu", 32),),
    "cuda": (("ViT-B-16-quickgelu", 128), ("ViT-B-16-quickgelu", 512), ("ViT-L-14-quickgelu", 128)),
}
"""Models and batches that are measured by default."""
WARM_UP = {"cpu": 1, "cuda": 3}
"""Steps before the timed ones."""


def run(arguments: argparse.Namespace) -> str:
    """A table for each model and batch."""
    device = arguments.device
    precision = arguments.precision or ("bf16" if device == "cuda" else "fp32")
    if precision == "tf32" and device == "cpu":
        raise UserError("--precision tf32 needs a GPU. Choose fp32 or bf16 on a CPU.")
    cases = STEPS[device]
    if arguments.model:
        cases = ((arguments.model, cases[0][1]),)
    if arguments.batch_size:
        cases = tuple((model, arguments.batch_size) for model in dict.fromkeys(model for model, _ in cases))
    steps = arguments.steps or (20 if device == "cuda" else 3)
    return "\n\n".join(step_table(Case(m, batch, device), precision, steps, arguments) for m, batch in cases)


def step_table(case: Case, precision: str, steps: int, arguments: argparse.Namespace) -> str:
    # The authors' code runs in fp32, which on a GPU a user turns into TF32 by one line.
    authors = [Contender("as the authors compute it", "tf32" if case.device == "cuda" else "fp32", None)]
    if case.device == "cuda" or precision == "bf16":
        authors.append(Contender("as the authors compute it", "bf16", None))
    contenders = [*ours(precision, arguments.presets, arguments.compiled), *authors]
    announce(f"{case.model}, batch {case.batch}: one forward")
    forward, state = fresh(measure_forward, case)
    peaks: dict[str, list[float]] = {c.precision: [] for c in contenders}
    results: dict[Contender, list[Measured]] = {c: [] for c in contenders}
    for number in range(arguments.rounds):
        turn = f"{case.model}, batch {case.batch}, round {number + 1} of {arguments.rounds}"
        for kind in peaks:
            announce(f"{turn}: a matrix product, {kind}")
            peaks[kind].append(fresh(measure_matmul, case.device, kind))
        for c in list(results):
            announce(f"{turn}: {c.name}, {c.precision}")
            try:
                results[c].append(fresh(measure, case, c, steps, number == 0))
            except DoesNotFit:
                del results[c]

    names = [f"authors, {a.precision}" for a in authors]
    header = [
        *("step", "precision", "images/s", "ms a step", *(f"× {name}" for name in names)),
        *("TFLOP/s", "% of peak", "F", "memory GB", *(f"% of {name}" for name in names)),
    ]
    rows = []
    for c in contenders:
        if c in results:
            cells = cells_of(results[c], [results.get(a, []) for a in authors], case.batch, forward, peaks[c.precision])
        else:
            cells = ["does not fit", *[""] * (len(header) - 3)]
        rows.append([c.name, c.precision, *cells])
    command = f"step --model {case.model} --batch-size {case.batch} --precision {precision} --device {case.device}"
    command += f" --presets {' '.join(arguments.presets)}" if arguments.presets else ""
    matmul = ", ".join(f"{kind} {spread([p / 1e12 for p in of], '{:.3g}')}" for kind, of in peaks.items())
    where = f"torch {torch.__version__}{f', {torch.cuda.get_device_name()}' if case.device == 'cuda' else ''}"
    grown = "all tensors, weights included" if case.device == "cuda" else "growth of the process since its first step"
    notes = [
        f"{where}. {arguments.rounds} rounds of {steps} steps after {WARM_UP[case.device]} untimed, each in a fresh "
        "process; of a round the median step, of rounds median (lowest–highest). A step goes from uint8 images on the "
        "device to updated weights. ×: images/s beside the authors' algorithm, round by round. Deterministic: the "
        "default of a run.",
        f"F: a forward of open_clip's plain tower, {forward / case.batch / 1e9:.4g} GFLOP an image. FLOPs: of matrix "
        "products, convolutions and fused attention in a whole step, counted by torch; sums, activations, AdamW and "
        f"the relevance kernel of GPUs are not counted. Peak: a big square matrix product in each round; "
        f"TFLOP/s: {matmul}.",
        f"Memory: {grown}, at the peak; {state / 1e9:.2f} GB of it are gradients and AdamW's moments in every row.",
    ]
    return report(command, header, rows, notes)


def ours(precision: str, presets: Sequence[str], compiled: bool) -> list[Contender]:
    """cfmask's contenders: the presets that are asked for, or variants of the headline method."""
    if presets:
        methods = {name: PRESETS[name].method for name in presets}
        if "wise-kd" in methods:
            methods["wise-kd"] = replace(methods["wise-kd"], ensemble="its weights")
        return [Contender(name, precision, Recipe(method=of).resolved().method) for name, of in methods.items()]
    return [
        Contender("vanilla FT", precision, VANILLA),
        Contender("cfmask", precision, HEADLINE),
        Contender("cfmask, deterministic", precision, HEADLINE, deterministic=True),
        Contender("cfmask, activations recomputed", precision, HEADLINE, recompute=True),
        *([Contender("cfmask, compiled", precision, HEADLINE, compiled=True)] if compiled else []),
    ]


def measure(case: Case, contender: Contender, steps: int, count: bool) -> Measured:
    choose_arithmetic(contender.precision, deterministic=contender.deterministic)
    return measure_step(materials(case), contender, times=steps, warm_up=WARM_UP[case.device], count=count)


def measure_forward(case: Case) -> tuple[int, int]:
    """FLOPs of one forward of open_clip's tower on the batch, and bytes of gradients and AdamW's moments."""
    m = materials(case)
    with torch.no_grad():  # in training mode: in eval mode torch runs blocks that the counter does not see
        flops = count_flops(lambda: m.student(m.normalise(m.images)))
    return flops, 3 * sum(p.numel() * p.element_size() for p in (*m.student.parameters(), *m.head.parameters()))


def cells_of(
    of: list[Measured], authors: list[list[Measured]], batch: int, forward: int, peaks: list[float]
) -> list[str]:
    flops, memory = of[0].flops, max(m.peak for m in of)
    rate = flops / statistics.median(m.seconds for m in of)
    # Round by round: what slows the machine down for a while slows both down.
    ratios = [[b.seconds / a.seconds for a, b in zip(of, them, strict=True)] if them else [] for them in authors]
    return [
        spread([batch / m.seconds for m in of], "{:.1f}"),
        spread([1e3 * m.seconds for m in of]),
        *(spread(ratio, "{:.2f}") if ratio else "" for ratio in ratios),
        f"{rate / 1e12:.3g}",
        f"{100 * rate / statistics.median(peaks):.0f}",
        f"{flops / forward:.2f}",
        f"{memory / 1e9:.2f}",
        *(f"{100 * memory / max(m.peak for m in them):.0f}" if them else "" for them in authors),
    ]
