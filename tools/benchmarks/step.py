"""Training steps beside the authors' way: images/s, FLOPs and memory, and what the time of ours goes to."""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace

import torch

from cfmask.errors import UserError
from cfmask.presets import PRESETS
from cfmask.recipe import Recipe
from cfmask.report import table
from tools.benchmarks.fresh_process import DoesNotFit, fresh
from tools.benchmarks.metering import measure_matmul
from tools.benchmarks.step_measurements import (
    PARTS,
    WARM_UP,
    Forward,
    Measured,
    Parts,
    measure_forward,
    measure_parts,
    measure_step,
)
from tools.benchmarks.tables import report, say, spread
from tools.benchmarks.training import HEADLINE, VANILLA, Case, Contender

# Models and batches whose steps are measured unless a flag says which.
STEPS = {
    "cpu": (("ViT-B-32-quickgelu", 32),),
    "cuda": (("ViT-B-16-quickgelu", 128), ("ViT-B-16-quickgelu", 512), ("ViT-L-14-quickgelu", 128)),
}


def run(arguments: argparse.Namespace) -> str:
    """For each model and batch, a table of contenders and one of what our step's time goes to."""
    device = arguments.device
    precision = arguments.precision or ("bf16" if device == "cuda" else "fp32")
    if precision == "tf32" and device == "cpu":
        raise UserError("TF32 is a GPU's arithmetic. Choose --precision fp32 or bf16 on a CPU.")
    cases = STEPS[device]
    if arguments.model:
        cases = ((arguments.model, cases[0][1]),)
    if arguments.batch_size:
        cases = tuple((model, arguments.batch_size) for model in dict.fromkeys(model for model, _ in cases))
    steps = arguments.steps or (20 if device == "cuda" else 3)
    return "\n\n".join(step_of(Case(model, batch, device, steps), precision, arguments) for model, batch in cases)


def step_of(case: Case, precision: str, arguments: argparse.Namespace) -> str:
    rounds, presets = arguments.rounds, arguments.presets
    # Their code runs in fp32, which on a GPU a user turns into TF32 by one line.
    authors = [Contender("as the authors compute it", "tf32" if case.device == "cuda" else "fp32", None)]
    if case.device == "cuda" or precision == "bf16":
        authors.append(Contender("as the authors compute it", "bf16", None))
    ours = Contender("cfmask", precision, HEADLINE)
    contenders = [
        Contender("vanilla FT", precision, VANILLA),
        ours,
        Contender("cfmask, deterministic", precision, HEADLINE, deterministic=True),
        Contender("cfmask, activations recomputed", precision, HEADLINE, recompute=True),
        *([Contender("cfmask, compiled", precision, HEADLINE, compiled=True)] if arguments.compiled else []),
        *authors,
    ]
    if presets:
        methods = {
            name: replace(PRESETS[name].method, ensemble="its weights") if name == "wise-kd" else PRESETS[name].method
            for name in presets
        }
        contenders = [
            Contender(name, precision, Recipe(method=method).resolved().method) for name, method in methods.items()
        ]
        contenders += authors
    say(f"{case.model}, batch {case.batch}: one forward")
    plain = fresh(measure_forward, case)
    peaks: dict[str, list[float]] = {c.precision: [] for c in contenders}
    results: dict[Contender, list[Measured]] = {c: [] for c in contenders}
    parts: list[Parts] = []
    too_big = set()
    for number in range(rounds):
        turn = f"{case.model}, batch {case.batch}, round {number + 1} of {rounds}"
        for kind in peaks:
            say(f"{turn}: a matrix product, {kind}")
            peaks[kind].append(fresh(measure_matmul, case.device, kind))
        for c in contenders:
            if c in too_big:
                continue
            say(f"{turn}: {c.name}, {c.precision}")
            try:
                results[c].append(fresh(measure_step, case, c, number == 0))
            except DoesNotFit:
                too_big.add(c)
        if ours in contenders and ours not in too_big:
            say(f"{turn}: parts of a step")
            try:
                parts.append(fresh(measure_parts, case, precision, not parts))
            except DoesNotFit as error:
                say(f"parts of a step: {error}")

    names = [f"authors, {a.precision}" for a in authors]
    header = [
        *("step", "precision", "images/s", "ms a step", *(f"× {name}" for name in names)),
        *("TFLOP/s", "% of peak", "F", "memory GB", *(f"% of {name}" for name in names)),
    ]
    rows = []
    for c in contenders:
        if c in too_big:
            rows.append([c.name, c.precision, "does not fit", *[""] * (len(header) - 3)])
            continue
        of = results[c]
        beside = [[] if a in too_big else results[a] for a in authors]
        flops = of[0].flops
        assert flops is not None
        rate = flops / statistics.median(m.seconds for m in of)
        memory = max(m.peak for m in of)
        rows.append(
            [
                c.name,
                c.precision,
                spread([case.batch / m.seconds for m in of], "{:.1f}"),
                spread([1e3 * m.seconds for m in of]),
                *(spread(times_as_fast(of, them), "{:.2f}") if them else "" for them in beside),
                f"{rate / 1e12:.3g}",
                f"{100 * rate / statistics.median(peaks[c.precision]):.0f}",
                f"{flops / plain.flops:.2f}",
                f"{memory / 1e9:.2f}",
                *(f"{100 * memory / max(m.peak for m in them):.0f}" if them else "" for them in beside),
            ]
        )
    command = f"step --model {case.model} --batch-size {case.batch} --precision {precision} --device {case.device}"
    command += f" --presets {' '.join(presets)}" if presets else ""
    notes = [*step_notes(case, rounds, plain, peaks), *parts_of_step(parts, plain)]
    return report(command, None, header, rows, notes)


def times_as_fast(ours: list[Measured], theirs: list[Measured]) -> list[float]:
    """Round by round: what slows the machine down for a while slows both."""
    return [b.seconds / a.seconds for a, b in zip(ours, theirs, strict=True)]


def step_notes(case: Case, rounds: int, plain: Forward, peaks: dict[str, list[float]]) -> list[str]:
    on_gpu = case.device == "cuda"
    matmul = ", ".join(f"{kind} {spread([p / 1e12 for p in of], '{:.3g}')}" for kind, of in peaks.items())
    notes = [
        f"torch {torch.__version__}{f', {plain.gpu}' if on_gpu else ''}. {rounds} rounds of {case.steps} steps "
        f"after {WARM_UP[case.device]} untimed, each in a fresh process; median (lowest–highest). A step goes from "
        "uint8 images on the device to updated weights; the device is waited for at the ends of a round only. ×: "
        "images/s beside the authors' way, round by round. Deterministic: as a run trains unless told otherwise.",
        f"F: a forward of open_clip's plain tower, {plain.flops / case.batch / 1e9:.4g} GFLOP an image. FLOPs: of "
        "matrix products, convolutions and fused attention in a whole step, counted by torch; sums, activations and "
        f"AdamW are not. Peak: a big square matrix product, in its turn in every round; TFLOP/s: {matmul}.",
    ]
    if on_gpu:
        share = plain.relevance / plain.flops
        notes.append(f"Nor is the relevance kernel counted, where it runs: {share:.2f} F of a cfmask step.")
        what = "what tensors take at the peak: weights of student and teacher"
    else:
        what = "what the process has grown by at the peak since before its first step: activations"
    notes.append(f"Memory: {what}, and {plain.state / 1e9:.2f} GB of gradients and AdamW's moments in every row.")
    return notes


def parts_of_step(parts: list[Parts], plain: Forward) -> list[str]:
    if not parts:
        return []
    steps = [step for some in parts for step in some.seconds]
    flops = parts[0].flops
    assert flops is not None
    rows = []
    for name in PARTS:
        shares = [100 * step[name] / sum(step.values()) for step in steps]
        milliseconds = spread([1e3 * step[name] for step in steps], "{:.1f}")
        rows.append([name, milliseconds, f"{statistics.median(shares):.1f}", f"{flops[name] / plain.flops:.2f}"])
    sums = spread([1e3 * sum(step.values()) for step in steps], "{:.1f}")
    rows.append(["all", sums, "100", f"{sum(flops.values()) / plain.flops:.2f}"])
    return [
        table(["part of cfmask's step", "ms", "% of the step", "F"], rows),
        "The same calls with a wait for the device after each part, which on a GPU makes their sum longer than a step. "
        "Masks and fill: with the normalisation of what they give.",
    ]
