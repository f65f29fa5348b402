"""How long a checkpoint stops training, and how much its write delays Python beside it.

While a checkpoint is written, a loop reads the clock as often as it can. Its longest gap is how long the write kept the
interpreter or the processor from training. A busy machine has gaps without a write too, which are measured beside it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from cfmask.checkpoint.state import CheckpointState
from cfmask.checkpoint.writer import CheckpointWriter, Keep
from cfmask.data.receipts import DataProgress
from cfmask.optim import LrAndBetas, take_step
from tools.benchmarks.metering import wait
from tools.benchmarks.tables import report
from tools.benchmarks.training import plain_step, plain_training

BATCH = 8
HEADER = ["", "median s", "lowest", "highest"]
NOTE = (
    "Weights and both moments of all of them. A loop in Python reads the clock: its longest gap is how long a write "
    "kept the interpreter, or the processor, from training."
)


def run(arguments: argparse.Namespace) -> str:
    device = arguments.device
    rows = checkpoint_stall(arguments.model, arguments.folder, device=device, rounds=arguments.rounds)
    where = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    return report("checkpoint", HEADER, rows, [f"{arguments.model}, {where}, torch {torch.__version__}. {NOTE}"])


def checkpoint_stall(
    model_name: str, folder: Path | None = None, *, device: str = "cpu", rounds: int = 5
) -> list[list[str]]:
    """A row for each measurement, in the columns of HEADER, and one for the size.

    Args:
        folder: a folder on the disk to write to; a temporary one by default.
    """
    stalls: list[float] = []
    gaps: list[float] = []
    idle_gaps: list[float] = []
    committed: list[float] = []
    with tempfile.TemporaryDirectory(dir=folder) as there:
        info, model, optimizer = plain_training(model_name, device, BATCH)
        with CheckpointWriter(Path(there), Keep(1), info) as writer:
            reserved = _seconds(lambda: writer.reserve(model))
            for number in range(rounds):
                for parameter in model.parameters():  # so that weights and moments have changed
                    parameter.grad = 1e-3 * torch.randn_like(parameter)
                take_step(optimizer, LrAndBetas(1e-5, 0.9), clip_norm=1.0)
                wait(device)
                began = time.perf_counter()
                writer.start(CheckpointState(number + 1, "", DataProgress()), model, optimizer)
                stalls.append(time.perf_counter() - began)
                gaps.append(_longest_gap(lambda: writer.writing))
                committed.append(time.perf_counter() - began)
                error = writer.wait()
                if error is not None:
                    raise error
                end = time.perf_counter() + committed[-1]
                idle_gaps.append(_longest_gap(lambda end=end: time.perf_counter() < end))  # type: ignore[misc]
            step = _seconds(lambda: plain_step(model, optimizer, BATCH))
            size = sum(path.stat().st_size for path in Path(there).glob("step-*/*"))
    rows = {
        "memory reserved, once a phase": [reserved],
        "start(): training stands still": stalls,
        "longest gap of a loop beside the write": gaps,
        "the same without a write": idle_gaps,
        "until it is on the disk": committed,
        f"for scale: a step on {BATCH} images, no CAM, no teacher": [step],
    }
    cells = [[name, *(f"{of(values):.3f}" for of in (statistics.median, min, max))] for name, values in rows.items()]
    return [*cells, ["size, GB", f"{size / 1e9:.2f}", "", ""]]


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _longest_gap(going_on: Callable[[], bool]) -> float:
    longest, last = 0.0, time.perf_counter()
    while going_on():
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    return longest
