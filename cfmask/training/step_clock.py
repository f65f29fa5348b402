"""The duration of a step on one rank, without its waits for other ranks. It shows which rank is slow.

All ranks end a step together, so the step's whole duration does not tell them apart. The measurement begins at the end
of the previous step and includes the wait for data. It ends where gradients could first be exchanged: before the last
backward pass under DDP, before the all-reduce with a CUDA graph. On a GPU, two events are recorded on the compute
stream and read once they have passed; the host does not wait for them."""

from __future__ import annotations

import time
from collections import deque

import torch


class StepClock:
    """Measures the steps of one rank. ``end`` may be called several times in a step; the last call counts."""

    def __init__(self, device: torch.device) -> None:
        self._gpu = device.type == "cuda"
        self._began: float | torch.cuda.Event | None = None
        self._ended: float | torch.cuda.Event | None = None
        self._passing: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._seconds, self._steps = 0.0, 0

    def begin(self) -> None:
        """Begin a step, and finish the previous one."""
        self._take()
        self._began, self._ended = self._now(), None

    def end(self) -> None:
        """Mark the point from which this rank may wait for others."""
        self._ended = self._now()

    def mean(self) -> float:
        """Mean seconds of the steps that have ended since the last call; 0 if there are none."""
        while self._passing and self._passing[0][1].query():
            began, ended = self._passing.popleft()
            self._add(began.elapsed_time(ended) / 1000)
        mean = self._seconds / self._steps if self._steps else 0.0
        self._seconds, self._steps = 0.0, 0
        return mean

    def _now(self) -> float | torch.cuda.Event:
        if not self._gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _take(self) -> None:
        began, ended = self._began, self._ended
        if isinstance(began, torch.cuda.Event) and isinstance(ended, torch.cuda.Event):
            self._passing.append((began, ended))
        elif isinstance(began, float) and isinstance(ended, float):
            self._add(ended - began)

    def _add(self, seconds: float) -> None:
        self._seconds += seconds
        self._steps += 1
