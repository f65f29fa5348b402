"""What a checkpoint costs training: how long it stands still, and what it feels of the write beside it.

A model with random weights and AdamW's moments of all of it is checkpointed several times. Meanwhile a loop in Python,
as a training loop is one, looks at the clock all the time: its longest gap is how long the write kept the interpreter,
or the processor, from it. On a busy machine a loop has gaps without any write: they are measured beside it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from cfmask.checkpoint.state import CheckpointState
from cfmask.checkpoint.writer import CheckpointWriter, Keep
from cfmask.data.receipts import DataProgress
from cfmask.models.head import build_tower
from cfmask.models.initial import model_info
from cfmask.models.tower import Classifier
from cfmask.optim import LrAndBetas, Phase, adamw, take_step
from cfmask.recipe import Recipe
from tools.benchmarks.tables import report

CLASSES = 1000
BATCH = 8
HEADER = ["", "median s", "lowest", "highest"]
NOTE = (
    "Weights and both moments of all of them. A loop in Python looks at the clock all the time: its longest gap is how "
    "long a write kept the interpreter, or the processor, from training."
)


def run(arguments: argparse.Namespace) -> str:
    device = arguments.device
    rows = checkpoint_stall(arguments.model, arguments.folder, device=device, rounds=arguments.rounds)
    where = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    return report("checkpoint", None, HEADER, rows, [f"{arguments.model}, {where}, torch {torch.__version__}. {NOTE}"])


def checkpoint_stall(
    model_name: str, folder: Path | None = None, *, device: str = "cpu", rounds: int = 5
) -> list[list[str]]:
    """A row a measurement, in the columns of HEADER, and one with the size.

    Args:
        folder: on the disk that is to be written to; a temporary one by default.
    """
    with tempfile.TemporaryDirectory(dir=folder) as there:
        info = model_info(model_name, classes=tuple(str(i) for i in range(CLASSES)))
        model = Classifier(build_tower(info), nn.Linear(info.config["embed_dim"], CLASSES)).to(device)
        optimizer = adamw(model.parameters(), Phase(0, 1, tower=True, lr=1e-5, weight_decay=0.1), Recipe().optim)
        _step(model, optimizer)
        with CheckpointWriter(Path(there), Keep(1), info) as writer:
            began = time.perf_counter()
            writer.reserve(model)
            reserved = time.perf_counter() - began
            stalls: list[float] = []
            gaps: list[float] = []
            idle_gaps: list[float] = []
            committed: list[float] = []
            for number in range(rounds):
                _step(model, optimizer)
                if device != "cpu":
                    torch.cuda.synchronize()
                began = time.perf_counter()
                writer.start(CheckpointState(number + 1, "", DataProgress()), model, optimizer)
                stalls.append(time.perf_counter() - began)
                gaps.append(_longest_gap(lambda: writer.writing))
                committed.append(time.perf_counter() - began)
                error = writer.wait()
                if error is not None:
                    raise error
                idle_gaps.append(_longest_gap(partial(_before, time.perf_counter() + committed[-1])))
            began = time.perf_counter()
            pixels = torch.randn(BATCH, 3, *model.visual.image_size, device=device)
            model(pixels).logits.square().mean().backward()
            take_step(optimizer, LrAndBetas(1e-5, 0.9), clip_norm=1.0)
            if device != "cpu":
                torch.cuda.synchronize()
            step = time.perf_counter() - began
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


def _step(model: nn.Module, optimizer: torch.optim.AdamW) -> None:
    """An optimizer step from made-up gradients: moments are there, and weights have changed."""
    for parameter in model.parameters():
        parameter.grad = 1e-3 * torch.randn_like(parameter)
    take_step(optimizer, LrAndBetas(1e-5, 0.9), clip_norm=1.0)


def _before(then: float) -> bool:
    return time.perf_counter() < then


def _longest_gap(goes_on: Callable[[], bool]) -> float:
    longest, last = 0.0, time.perf_counter()
    while goes_on():
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    return longest
