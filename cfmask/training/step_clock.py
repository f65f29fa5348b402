"""How long a rank works at a step by itself, without the time in which it waits for the others: a straggler is seen.

All ranks end a step together, so its time says nothing about a rank. What is measured begins where the step before has
ended, with the wait for data, and ends where the first gradients could be exchanged: before the last backward pass
under DDP, before the all-reduce where the passes are a CUDA graph. On a GPU two events are recorded on the compute
stream and read when they have passed; nobody waits for them.
"""

from __future__ import annotations

import time
from collections import deque

import torch


class StepClock:
    """Of one rank. ``begin`` and ``end`` once a step or more: the last ``end`` of a step counts."""

    def __init__(self, device: torch.device) -> None:
        self._gpu = device.type == "cuda"
        self._began: float | torch.cuda.Event | None = None
        self._ended: float | torch.cuda.Event | None = None
        self._passing: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._seconds, self._steps = 0.0, 0

    def begin(self) -> None:
        """A step begins; the one before is over."""
        self._take()
        self._began, self._ended = self._now(), None

    def end(self) -> None:
        """From here on this rank may wait for others."""
        self._ended = self._now()

    def mean(self) -> float:
        """Seconds a step, over those that have passed since the last call; 0 if there is none."""
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
