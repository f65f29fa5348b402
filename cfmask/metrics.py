"""Metrics: named numbers that are summed over the ranks by one all-reduce a step, and read a step later.

    reducer.add({"loss": Mean(loss), "samples": Sum(32)})   add the metrics of a micro-batch; any number of times
    reducer.send(step)                                      start the all-reduce of everything that was added
    reducer.receive(before=step)                            read the results of earlier steps

A new metric is one entry in the mapping of ``micro_batch_metrics`` or ``step_metrics``. A ``Mean`` is then logged and
drawn without further code.
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
    """A metric that is summed over micro-batches and ranks, in fp32: counts are exact up to 2**24."""

    value: Tensor | float
    """A number, or a tensor of any shape on the reducer's device or the CPU."""


@dataclass(frozen=True)
class Mean:
    """A metric that is averaged over micro-batches and ranks, all with the same weight."""

    value: Tensor | float
    """As in ``Sum``."""


Metric = Sum | Mean


@dataclass(frozen=True)
class Reduced:
    """The metrics of one step, over all ranks."""

    step: int
    time: float
    """When they were sent, in seconds of ``time.monotonic``."""
    values: dict[str, list[float]]
    """By name, flattened."""
    means: tuple[str, ...]
    """Names of the metrics that are averages."""

    def scalar(self, name: str) -> float:
        """The value of a metric that is a single number."""
        [value] = self.values[name]
        return value


class AsyncMetricReducer:
    """Sums named metrics over the ranks. Neither ``add`` nor ``send`` waits for the device or for other ranks.

    All ranks must add the same names in the same order and send the same steps; they receive the same results.

    On a GPU, a side stream waits for the all-reduce and copies its result into page-locked memory, so the compute
    stream is not held up. ``receive`` waits for the event behind this copy, and not for work that was queued later.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._world_size = dist.get_world_size()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        # Keyed by the names and sizes of a mapping, so that one kernel adds a whole micro-batch.
        self._tensors: dict[_Layout, Tensor] = {}
        self._numbers: dict[_Layout, list[float]] = {}
        self._mean_of: dict[str, int] = {}
        self._in_flight: deque[_InFlight] = deque()
        self._free: list[_HostBuffers] = []

    def add(self, metrics: Mapping[str, Metric]) -> None:
        """Add metrics to the step that is sent next. The caller may change the tensors afterwards."""
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
        """Start the reduction of everything that was added since the last ``send``.

        Raises:
            ValueError: a name was added in two different mappings, sizes, or devices.
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
        """Results in the order of ``send``: of steps before ``before``, or of all. Waits until they are available."""
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
        """Page-locked memory that is not in use; None on the CPU."""
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
    """A reduction that was not read yet. ``flat`` is kept because the side stream reads it."""

    step: int
    time: float
    layout: _Layout
    mean_of: dict[str, int]
    work: dist.Work
    flat: Tensor
    buffers: _HostBuffers | None


# --- what is sent ---------------------------------------------------------------------------------------------------


def micro_batch_metrics(metrics: Metrics, batch: MicroBatch) -> dict[str, Metric]:
    """Metrics of one micro-batch on this rank. accuracy: in percent, on clean images. masked: share of patches."""
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
    """Metrics of one step on this rank.

    Args:
        grad_norm: (), the same on all ranks.
        stop: a request to stop, as for ``stop_metrics``.
        overdue: whether a checkpoint is requested.
    """
    return {"grad_norm": Mean(grad_norm), "overdue": Sum(overdue), **stop_metrics(stop)}


def rank_metrics(seconds: float, rank: int, world_size: int) -> dict[str, Metric]:
    """One value for each rank. seconds: duration of a step without waiting for other ranks (``StepClock``)."""
    own = torch.zeros(world_size)
    own[rank] = seconds
    return {"rank_seconds": Sum(own)}


def stop_metrics(stop: str | None) -> dict[str, Metric]:
    """A rank's request to stop: REQUEUE, QUIT or None. ``stop_of`` combines those of all ranks."""
    return {"quit": Sum(stop == QUIT), "requeue": Sum(stop == REQUEUE)}


def stop_of(reduced: Reduced) -> str | None:
    """QUIT if any rank requests it, else REQUEUE if any does, else None."""
    return QUIT if reduced.scalar("quit") else REQUEUE if reduced.scalar("requeue") else None


@dataclass(frozen=True)
class StepResult:
    """One training step over all ranks."""

    step: int
    time: float
    """When it was queued, in seconds of ``time.monotonic``."""
    samples: int
    """Of the global batch."""
    receipt: int
    """Of these samples."""
    bad: int
    """How many of them replace a sample that could not be read."""
    means: dict[str, float]
    """Averages by name."""
    stop: str | None
    """What the ranks request: REQUEUE, QUIT or None."""
    overdue: bool
    """Whether rank 0 requests a checkpoint."""
    rank_seconds: list[float]
    """Each rank's step time without waiting, if it was sent; else empty."""
    reduced: Reduced
    """All metrics."""

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
        """Whether the step was skipped; ``optim.take_step`` decides by the same number."""
        return not math.isfinite(self.means["grad_norm"])
