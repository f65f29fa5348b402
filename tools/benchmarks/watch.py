"""What it costs a step that ranks are watched: heartbeats, the clock of a rank's own time, and the times of all ranks
that cross with the metrics. Measured one after the other in one process, beside a training step of the same process."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn

from cfmask.metrics import AsyncMetricReducer, rank_metrics
from cfmask.models.head import build_tower
from cfmask.models.initial import model_info
from cfmask.models.tower import Classifier
from cfmask.optim import LrAndBetas, Phase, adamw, take_step
from cfmask.recipe import Recipe
from cfmask.runtime.heartbeat import WAITING, Heartbeat, beat
from cfmask.training.step_clock import StepClock
from tools.benchmarks.tables import report

HEADER = ["", "median µs a step", "lowest", "highest", "of a step"]
CLASSES, BATCH, RANKS, STEPS = 1000, 8, 64, 1000


def run(arguments: argparse.Namespace) -> str:
    device = torch.device(arguments.device)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        step = _train_step(arguments.model, device)
        rounds = {
            "heartbeats": _beats(),
            "clock of the rank's own time": _clock(device),
            f"times of {RANKS} ranks, every {Recipe().run.log_steps} steps": _times(device),
        }
        measured: dict[str, list[float]] = {name: [] for name in rounds}
        steps: list[float] = []
        watched: list[float] = []
        clock = StepClock(device)
        for _ in range(arguments.rounds):  # in turns: a busy machine is busy for all of them
            for name, do in rounds.items():
                measured[name].append(do())
            steps.append(_timed(step))
            watched.append(_timed(lambda: _watched(step, clock)))
    finally:
        dist.destroy_process_group()
    of_step = statistics.median(steps)
    all_of_it = [sum(each) for each in zip(*measured.values(), strict=True)]
    rows = [_row(name, values, of_step) for name, values in {**measured, "all of it": all_of_it}.items()]
    rows.append(_row(f"a step on {BATCH} images, no CAM, no teacher", steps, of_step))
    rows.append(_row("the same, watched", watched, of_step))
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    return report("watch", None, HEADER, rows, [f"{arguments.model}, {where}, torch {torch.__version__}."])


def _timed(do: Callable[[], object]) -> float:
    """Microseconds."""
    began = time.perf_counter()
    do()
    return 1e6 * (time.perf_counter() - began)


def _watched(step: Callable[[], None], clock: StepClock) -> None:
    beat("loading data", 1)
    clock.begin()
    beat("computing", 1)
    clock.end()
    beat(WAITING)
    step()
    beat(WAITING, 1)


def _row(name: str, values: list[float], of_step: float) -> list[str]:
    numbers = [f"{of(values):.1f}" for of in (statistics.median, min, max)]
    return [name, *numbers, f"{100 * statistics.median(values) / of_step:.3f} %"]


def _per_step(do: Callable[[int], object]) -> Callable[[], float]:
    """Measures what is done at a step: microseconds."""
    return lambda: _timed(lambda: [do(step) for step in range(STEPS)]) / STEPS


def _beats() -> Callable[[], float]:
    Heartbeat().activate()

    def do(step: int) -> None:
        beat("loading data", step)
        beat("computing", step)
        beat(WAITING)
        beat(WAITING, step)

    return _per_step(do)


def _clock(device: torch.device) -> Callable[[], float]:
    clock = StepClock(device)

    def do(step: int) -> None:
        clock.begin()
        clock.end()
        if step % Recipe().run.log_steps == 0:
            clock.mean()

    return _per_step(do)


def _times(device: torch.device) -> Callable[[], float]:
    """Added to what is reduced anyway: 256 bytes more in one reduction of so many are not seen."""
    reducer = AsyncMetricReducer(device)

    def do(step: int) -> None:
        if step % Recipe().run.log_steps == 0:
            reducer.add(rank_metrics(0.1, 0, RANKS))

    return _per_step(do)


def _train_step(model_name: str, device: torch.device) -> Callable[[], None]:
    info = model_info(model_name, classes=tuple(str(i) for i in range(CLASSES)))
    model = Classifier(build_tower(info), nn.Linear(info.config["embed_dim"], CLASSES)).to(device)
    optimizer = adamw(model.parameters(), Phase(0, 1, tower=True, lr=1e-5, weight_decay=0.1), Recipe().optim)
    pixels = torch.randn(BATCH, 3, *model.visual.image_size, device=device)

    def step() -> None:
        model(pixels).logits.square().mean().backward()
        take_step(optimizer, LrAndBetas(1e-5, 0.9), clip_norm=1.0)
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()

    step()
    return step
