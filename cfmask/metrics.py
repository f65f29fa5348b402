"""Metrics: named numbers that one all-reduce a step adds up over the ranks, and that are read a step later.

    reducer.add({"loss": Mean(loss), "samples": Sum(32)})   of a micro-batch; any number of times
    reducer.send(step)                                      starts the all-reduce of what was added
    reducer.receive(before=step)                            results of earlier steps

A new metric is one entry in the mapping that is added (``micro_batch_metrics``, ``step_metrics``): it crosses the
ranks, and a ``Mean`` is logged and drawn, without another line of code.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from cfmask.data import receipts
from cfmask.data.stream import MicroBatch
from cfmask.session import QUIT, REQUEUE
from cfmask.step import Metrics


@dataclass(frozen=True)
class Sum:
    """A metric that is added up over micro-batches and ranks.

    value: a number, or a tensor of any shape, on the reducer's device or the CPU. It is added up in fp32, so counts
        are exact up to 2**24.
    """

    value: Tensor | float


@dataclass(frozen=True)
class Mean:
    """A metric that is averaged over micro-batches and ranks, each with the same weight. value: as in ``Sum``."""

    value: Tensor | float


Metric = Sum | Mean


@dataclass(frozen=True)
class Reduced:
    """What was sent under one number, over all ranks.

    time: when it was sent, in seconds of ``time.monotonic``.
    values: by name, flattened.
    means: names of those that are averages.
    """

    step: int
    time: float
    values: dict[str, list[float]]
    means: tuple[str, ...]

    def scalar(self, name: str) -> float:
        """The value of a metric that is a single number."""
        [value] = self.values[name]
        return value


class AsyncMetricReducer:
    """Adds named metrics up over the ranks. Neither ``add`` nor ``send`` waits for the device or for other ranks.

    All ranks add the same names in the same order and send the same steps; each receives the same results.

    On a GPU a side stream waits for the all-reduce and copies its result into page-locked memory, so that the compute
    stream is not held up; ``receive`` waits for the event behind this copy and for nothing that was queued later.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._world_size = dist.get_world_size()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        # Values by the names and sizes that were added together, so that micro-batches are added up in one kernel.
        self._tensors: dict[_Layout, Tensor] = {}
        self._numbers: dict[_Layout, list[float]] = {}
        self._mean_of: dict[str, int] = {}
        self._in_flight: deque[_InFlight] = deque()
        self._free: list[_HostBuffers] = []

    def add(self, metrics: Mapping[str, Metric]) -> None:
        """Add metrics to those of the step that is sent next. Tensors may be changed as soon as this returns."""
        tensors: dict[str, Tensor] = {}
        numbers: dict[str, list[float]] = {}
        for name, metric in metrics.items():
            value = metric.value
            if not isinstance(value, Tensor):
                numbers[name] = [float(value)]
            elif value.device.type == self._device.type:
                tensors[name] = value.detach().reshape(-1).float()
            else:
                numbers[name] = value.reshape(-1).tolist()  # on the CPU: nothing to wait for
            if isinstance(metric, Mean):
                self._mean_of[name] = self._mean_of.get(name, 0) + self._world_size
        if tensors:
            layout = tuple((name, tensor.numel()) for name, tensor in tensors.items())
            flat = torch.cat(list(tensors.values()))
            self._tensors[layout] = self._tensors[layout] + flat if layout in self._tensors else flat
        if numbers:
            layout = tuple((name, len(values)) for name, values in numbers.items())
            values = [value for of_name in numbers.values() for value in of_name]
            before = self._numbers.get(layout, [0.0] * len(values))
            self._numbers[layout] = [a + b for a, b in zip(before, values, strict=True)]

    def send(self, step: int) -> None:
        """Start the reduction of what was added since the last one.

        Raises:
            ValueError: a name was added as one kind of value and as another (on the device, on the CPU, or of two
                sizes, or in two different mappings).
        """
        layout = tuple(entry for of_mapping in (*self._tensors, *self._numbers) for entry in of_mapping)
        if len({name for name, _ in layout}) < len(layout):
            raise ValueError(f"metrics of step {step} were added in different ways: {', '.join(n for n, _ in layout)}")
        numbers = [value for values in self._numbers.values() for value in values]
        buffers = self._buffers(len(numbers), sum(size for _, size in layout))
        if buffers is None:
            flat = torch.cat([*self._tensors.values(), torch.tensor(numbers, dtype=torch.float32)])
        else:
            buffers.numbers.copy_(torch.tensor(numbers, dtype=torch.float32))
            flat = torch.cat([*self._tensors.values(), buffers.numbers.to(self._device, non_blocking=True)])
        work = dist.all_reduce(flat, async_op=True)
        assert work is not None
        if buffers is not None:
            with torch.cuda.stream(self._stream):
                work.wait()  # the side stream waits, not the host
                buffers.results.copy_(flat, non_blocking=True)
                buffers.copied.record()
        self._in_flight.append(_InFlight(step, time.monotonic(), layout, self._mean_of, work, flat, buffers))
        self._tensors, self._numbers, self._mean_of = {}, {}, {}

    def receive(self, before: int | None = None) -> list[Reduced]:
        """What was sent, in the order in which it was sent: of steps before ``before``, or of all. Waits for these."""
        received = []
        while self._in_flight and (before is None or self._in_flight[0].step < before):
            received.append(self._read(self._in_flight.popleft()))
        return received

    def _read(self, sent: _InFlight) -> Reduced:
        if sent.buffers is None:
            sent.work.wait()
            flat = sent.flat.tolist()
        else:
            sent.buffers.copied.synchronize()
            flat = sent.buffers.results.tolist()
            self._free.append(sent.buffers)
        values, begin = {}, 0
        for name, size in sent.layout:
            number = sent.mean_of.get(name, 1)
            values[name] = [value / number for value in flat[begin : begin + size]]
            begin += size
        means = tuple(name for name, _ in sent.layout if name in sent.mean_of)
        return Reduced(sent.step, sent.time, values, means)

    def _buffers(self, numbers: int, results: int) -> _HostBuffers | None:
        """Page-locked memory that no copy uses any more; None on the CPU."""
        if self._stream is None:
            return None
        while self._free:
            buffers = self._free.pop()
            if (len(buffers.numbers), len(buffers.results)) == (numbers, results):
                return buffers
        return _HostBuffers(torch.empty(numbers, pin_memory=True), torch.empty(results, pin_memory=True))


_Layout = tuple[tuple[str, int], ...]  # name and number of values of each metric


@dataclass(frozen=True)
class _HostBuffers:
    """Page-locked memory of one reduction on a GPU, and the event behind the copy of its result."""

    numbers: Tensor
    results: Tensor
    # Blocking: the host sleeps while it waits, and leaves its core to the threads that load data.
    copied: torch.cuda.Event = field(default_factory=lambda: torch.cuda.Event(blocking=True))


@dataclass(frozen=True)
class _InFlight:
    """A reduction that was not read yet. flat is kept until then: the side stream reads it."""

    step: int
    time: float
    layout: _Layout
    mean_of: dict[str, int]
    work: dist.Work
    flat: Tensor
    buffers: _HostBuffers | None


# --- what is sent ---------------------------------------------------------------------------------------------------


def micro_batch_metrics(metrics: Metrics, batch: MicroBatch) -> dict[str, Metric]:
    """Of one micro-batch on this rank. accuracy is in percent, on clean images; masked is a share of patches."""
    return {
        "loss": Mean(metrics.loss),
        "ce": Mean(metrics.ce),
        "kd": Mean(metrics.kd),
        "mse": Mean(metrics.mse),
        "accuracy": Mean(100 * metrics.correct / metrics.samples),
        "masked": Mean(metrics.masked),
        "samples": Sum(metrics.samples),
        "receipt": Sum(batch.receipt),
        "bad": Sum(len(batch.bad)),
    }


def step_metrics(grad_norm: Tensor, *, stop: str | None, overdue: bool) -> dict[str, Metric]:
    """Of one step on this rank. grad_norm: (), the same on all ranks. stop, overdue: what the rank asks for."""
    return {"grad_norm": Mean(grad_norm), "overdue": Sum(overdue), **stop_metrics(stop)}


def rank_metrics(seconds: float, rank: int, world_size: int) -> dict[str, Metric]:
    """What each rank says of itself, side by side. seconds: of a step, by itself (``StepClock``)."""
    own = torch.zeros(world_size)
    own[rank] = seconds
    return {"rank_seconds": Sum(own)}


def stop_metrics(stop: str | None) -> dict[str, Metric]:
    """A rank's request to stop: REQUEUE, QUIT or None. ``stop_of`` reads the ranks' together."""
    return {"quit": Sum(stop == QUIT), "requeue": Sum(stop == REQUEUE)}


def stop_of(reduced: Reduced) -> str | None:
    """What the ranks ask for together: QUIT if one does, else REQUEUE if one does, else None."""
    return QUIT if reduced.scalar("quit") else REQUEUE if reduced.scalar("requeue") else None


@dataclass(frozen=True)
class StepResult:
    """One training step over all ranks.

    time: when it was queued, in seconds of ``time.monotonic``.
    samples: of the whole batch.
    receipt: of these samples.
    bad: how many of them replace a sample that could not be read.
    means: averages, by name.
    stop: what a rank asked for: REQUEUE, QUIT or None.
    overdue: whether rank 0 asked for a checkpoint.
    rank_seconds: of a step, each rank by itself, where it was sent; else nothing.
    reduced: all that was sent.
    """

    step: int
    time: float
    samples: int
    receipt: int
    bad: int
    means: dict[str, float]
    stop: str | None
    overdue: bool
    rank_seconds: list[float]
    reduced: Reduced

    @classmethod
    def of(cls, reduced: Reduced) -> StepResult:
        return cls(
            step=reduced.step,
            time=reduced.time,
            samples=int(reduced.scalar("samples")),
            receipt=receipts.from_digits(reduced.values["receipt"]),
            bad=int(reduced.scalar("bad")),
            means={name: reduced.scalar(name) for name in reduced.means},
            stop=stop_of(reduced),
            overdue=bool(reduced.scalar("overdue")),
            rank_seconds=reduced.values.get("rank_seconds", []),
            reduced=reduced,
        )

    @property
    def skipped(self) -> bool:
        """Whether the step was left out; ``optim.take_step`` decides by the same number."""
        return not math.isfinite(self.means["grad_norm"])
