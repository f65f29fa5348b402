"""What it costs a step to watch ranks: heartbeats, the clock of a rank's own time, and the times of all ranks, which
are reduced with the metrics. All are measured in one process, in turns with a training step."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist

from cfmask.metrics import AsyncMetricReducer, rank_metrics
from cfmask.recipe import Recipe
from cfmask.runtime.heartbeat import WAITING, Heartbeat, beat
from cfmask.training.step_clock import StepClock
from tools.benchmarks.tables import report
from tools.benchmarks.training import plain_step, plain_training

HEADER = ["", "median µs a step", "lowest", "highest", "of a step"]
BATCH, RANKS, STEPS = 8, 64, 1000


def run(arguments: argparse.Namespace) -> str:
    device = torch.device(arguments.device)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        measured = measure(arguments.model, device, arguments.rounds)
    finally:
        dist.destroy_process_group()
    of_step = statistics.median(measured[_STEP])
    rows = []
    for name, values in measured.items():
        numbers = [f"{of(values):.1f}" for of in (statistics.median, min, max)]
        rows.append([name, *numbers, f"{100 * statistics.median(values) / of_step:.3f} %"])
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    return report("watch", HEADER, rows, [f"{arguments.model}, {where}, torch {torch.__version__}."])


_STEP = f"a step on {BATCH} images, no CAM, no teacher"


def measure(model_name: str, device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Microseconds a step, by what is measured, for each round."""
    _, model, optimizer = plain_training(model_name, str(device), BATCH)
    log_steps = Recipe().run.log_steps
    clock, reducer = StepClock(device), AsyncMetricReducer(device)
    Heartbeat().activate()
    train = partial(plain_step, model, optimizer, BATCH)

    def heartbeats(step: int) -> None:
        beat("loading data", step)
        beat("computing", step)
        beat(WAITING)
        beat(WAITING, step)

    def rank_clock(step: int) -> None:
        clock.begin()
        clock.end()
        if step % log_steps == 0:
            clock.mean()

    def rank_times(step: int) -> None:
        """Fill in the metrics. Their reduction happens anyway, and 256 more bytes in it do not show."""
        if step % log_steps == 0:
            reducer.add(rank_metrics(0.1, 0, RANKS))

    def watched() -> None:
        beat("loading data", 1)
        clock.begin()
        beat("computing", 1)
        clock.end()
        beat(WAITING)
        train()
        beat(WAITING, 1)

    watching = {
        "heartbeats": heartbeats,
        "clock of the rank's own time": rank_clock,
        f"times of {RANKS} ranks, every {log_steps} steps": rank_times,
    }
    found: dict[str, list[float]] = {name: [] for name in (*watching, "all of it", _STEP, "the same, watched")}
    for _ in range(rounds):  # in turns, because a busy machine slows all of them down
        for name, call in watching.items():
            found[name].append(_microseconds(partial(_take_steps, call)) / STEPS)
        found["all of it"].append(sum(found[name][-1] for name in watching))
        found[_STEP].append(_microseconds(train))
        found["the same, watched"].append(_microseconds(watched))
    return found


def _take_steps(call: Callable[[int], None]) -> None:
    for step in range(STEPS):
        call(step)


def _microseconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return 1e6 * (time.perf_counter() - began)
