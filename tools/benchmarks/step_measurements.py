"""What `tools/bench.py step` measures, each in one function that runs in a process of its own (``fresh``)."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cfmask.losses import classification, feature_distillation
from cfmask.masking.cam import build_cam
from cfmask.masking.fills import Draws
from cfmask.models.tower import Classifier, Normalise
from cfmask.session import autocast, choose_arithmetic
from cfmask.step import counterfactual
from tools.benchmarks.metering import count_flops, counter, peak_memory, start_of_memory, wait
from tools.benchmarks.training import (
    HEADLINE,
    Case,
    Contender,
    Materials,
    OurStep,
    materials,
    our_optimizer,
    their_step,
    update,
)

WARM_UP = {"cpu": 1, "cuda": 3}
PARTS = (
    "clean forward",
    "CAM backward",
    "clean backward",
    "masks and fill",
    "teacher forward",
    "masked forward",
    "masked backward",
    "clip and AdamW",
)


@dataclass(frozen=True)
class Measured:
    """seconds: of a step; peak: bytes, see ``peak_memory``; flops: of a step, None where they were not asked for."""

    seconds: float
    peak: int
    flops: int | None


@dataclass(frozen=True)
class Parts:
    """Each of PARTS in the headline method's step. seconds: step by step; flops: None where they were not asked for."""

    seconds: list[dict[str, float]]
    flops: dict[str, float] | None


@dataclass(frozen=True)
class Forward:
    """What all contenders share. flops: F; relevance: those of the relevance kernel in a step of ours, which the
    counter does not see; state: bytes of gradients and AdamW's moments; gpu: its name, or nothing."""

    flops: int
    relevance: int
    state: int
    gpu: str


def measure_step(case: Case, contender: Contender, count: bool) -> Measured:
    """Time and memory of a contender's steps, and what one more step computes."""
    choose_arithmetic(contender.precision, deterministic=contender.deterministic)
    m = materials(case)
    step = their_step(m, contender) if contender.method is None else OurStep(m, contender)
    before = start_of_memory(case.device)
    for _ in range(WARM_UP[case.device]):
        step()
    wait(case.device)
    begun = time.perf_counter()
    for _ in range(case.steps):
        step()
    wait(case.device)
    seconds = (time.perf_counter() - begun) / case.steps
    return Measured(seconds, peak_memory(case.device, before), count_flops(step) if count else None)


def measure_parts(case: Case, precision: str, count: bool) -> Parts:
    """Time of the headline method's step part by part, and what the parts of one more compute."""
    choose_arithmetic(precision, deterministic=False)
    m = materials(case)
    model, teacher = Classifier(m.student, m.head), Classifier(m.teacher, copy.deepcopy(m.head))
    optimizer = our_optimizer(model)

    def clock() -> float:
        wait(case.device)
        return time.perf_counter()

    def take(meter: Callable[[], float]) -> dict[str, float]:
        scope = autocast(torch.device(case.device), precision)
        return step_in_parts(
            model, teacher, m.normalise, m.images, m.labels, m.draws, scope, lambda: update(optimizer), meter
        )

    for _ in range(WARM_UP[case.device]):
        take(clock)
    seconds = [take(clock) for _ in range(case.steps)]
    if not count:
        return Parts(seconds, None)
    with counter() as counting:
        return Parts(seconds, take(counting.get_total_flops))


def step_in_parts(
    model: Classifier,
    teacher: Classifier,
    normalise: Normalise,
    images: Tensor,
    labels: Tensor,
    draws: Draws,
    scope: torch.autocast,
    update: Callable[[], object],
    meter: Callable[[], float],
) -> dict[str, float]:
    """``training_step`` of the headline method, call by call as it makes them, and the update.

    Returns:
        By how much the meter, read after each of PARTS, went on in it.
    """
    readings = [meter()]
    with scope:
        cam_hook = build_cam(HEADLINE)
        assert cam_hook is not None
        features = model.encode(normalise(images), cam=cam_hook)
        logits = model.classify(features)
        readings.append(meter())
        cam = cam_hook.compute(logits.gather(1, labels[:, None]).squeeze(1))
        readings.append(meter())
        classification(logits, labels).backward(inputs=list(model.visual.parameters()))
        readings.append(meter())
        pixels = normalise(counterfactual(images, cam, draws, HEADLINE, model.patch_size).images)
        readings.append(meter())
        with torch.no_grad():
            wanted = teacher(pixels)
        readings.append(meter())
        seen = model(pixels, clean_features=features.detach())
        loss = classification(seen.clean_logits, labels)
        loss = loss + (HEADLINE.beta or 0.0) * feature_distillation(seen.features, wanted.features)
        readings.append(meter())
        loss.backward()
        readings.append(meter())
    update()
    readings.append(meter())
    return {part: after - before for part, (before, after) in zip(PARTS, itertools.pairwise(readings), strict=True)}


def measure_forward(case: Case) -> Forward:
    """F: the FLOPs of one forward of open_clip's own tower on the batch."""
    m = materials(case)
    with torch.no_grad():  # in train mode: in eval mode torch would run blocks that the counter does not see
        flops = count_flops(lambda: m.student(m.normalise(m.images)))
    trained = [*m.student.parameters(), *m.head.parameters()]
    return Forward(
        flops=flops,
        relevance=_relevance_flops(m),
        state=3 * sum(p.numel() * p.element_size() for p in trained),
        gpu=torch.cuda.get_device_name() if case.device == "cuda" else "",
    )


def _relevance_flops(m: Materials) -> int:
    """What cfmask.kernels.relevance_kernel multiplies: q kᵀ twice and dO vᵀ, the last block for one query only."""
    length, width = m.student.positional_embedding.shape
    queries = (len(m.student.transformer.resblocks) - 1) * length + 1
    return 3 * 2 * len(m.images) * queries * length * width
