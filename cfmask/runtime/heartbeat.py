"""A rank's heartbeat: what it is doing, since when, and how long that may take.

The process that computes writes it into memory that it shares with the process that waits for it, which ends a rank
that has stopped making progress (launch/ranks/supervisor.py). A beat takes microseconds, and neither I/O nor a thread:
a rank that is stopped, or that hangs in a driver, needs do nothing to be found.

    heartbeat = Heartbeat()                  before the fork
    heartbeat.activate()                     in the child
    beat("loading data", step=12)            anywhere in the child
    heartbeat.read()                         in the parent

While ranks prepare, torch's own limits hold (``--rendezvous-timeout``, ``--collective-timeout``). Once steps have been
taken, an activity may take as long as ``_FACTOR`` steps, but not less than ``HANG_TIMEOUT_S``.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from collections import deque
from dataclasses import dataclass
from typing import ClassVar

PREPARING, CHECKPOINT = "preparing", "waiting for a checkpoint"
"""Activities that are no part of a step, and may take as long as ranks wait for each other."""
CHECKING = "checking the node"
WAITING = "waiting for other ranks"

_FACTOR = 20
"""A step may take so many times as long as the slowest of the last ``_RECENT``."""
_RECENT = 100
_CHECKING_S = 180.0
_FIRST_STEPS = 5
"""Steps until their time is known: kernels are chosen and compiled, graphs captured, caches filled."""


def _seconds(variable: str, default_min: float) -> float:
    """Of a variable of the job's environment, which is in minutes (launch/allocation/resolve.py)."""
    return 60 * float(os.environ.get(variable) or default_min)


RENDEZVOUS_TIMEOUT_S = _seconds("CFMASK_RENDEZVOUS_TIMEOUT", 30)
COLLECTIVE_TIMEOUT_S = _seconds("CFMASK_COLLECTIVE_TIMEOUT", 30)
"""How long ranks may wait for each other until steps have been taken (cfmask/distributed.py)."""
HANG_TIMEOUT_S = _seconds("CFMASK_HANG_TIMEOUT", 5)
"""How long a rank may go without progress after that, at least; 0: as long as it likes."""


@dataclass(frozen=True)
class Beat:
    """What a rank was doing when it last said so.

    time: ``time.monotonic`` of this machine. step: that it is at; -1 before the first. limit_s: the seconds that the
    activity may take.
    """

    time: float
    step: int
    limit_s: float
    activity: str


class Heartbeat:
    """Of one rank, in memory that a fork shares.

    The first byte counts beats, modulo 256. Beats go to two slots in turns, so that the one before stays whole while a
    beat is written, however long the writer is kept from it. A slot has its beat's count at both ends.
    """

    _LAYOUT: ClassVar = struct.Struct("<Bdqd40sB")
    _active: ClassVar[Heartbeat | None] = None

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)
        self._count = 0
        self._steps: deque[float] = deque(maxlen=_RECENT)
        self._step, self._step_began, self._limit_s = -1, 0.0, COLLECTIVE_TIMEOUT_S
        self._write(PREPARING)

    def activate(self) -> None:
        """From here on ``beat`` writes this one, in this process."""
        Heartbeat._active = self

    @classmethod
    def active(cls) -> Heartbeat | None:
        return cls._active

    def read(self) -> Beat:
        """The latest beat."""
        while True:
            count = self._memory[0]
            begin, moment, step, limit_s, activity, end = self._LAYOUT.unpack_from(self._memory, self._slot(count))
            if begin == end == count == self._memory[0]:
                return Beat(moment, step, limit_s, activity.rstrip(b"\0").decode(errors="replace"))

    @staticmethod
    def _slot(count: int) -> int:
        """Where a beat is in the memory."""
        return 64 + 128 * (count % 2)

    def beat(self, activity: str, step: int | None) -> None:
        if step is not None and step != self._step:
            now = time.monotonic()
            if self._step >= 0 and step == self._step + 1:
                self._steps.append(now - self._step_began)
                self._limit_s = self._limit_of_steps()
            self._step, self._step_began = step, now
        self._write(activity)

    def restart(self) -> None:
        """The next steps are of another kind (another phase, an evaluation): their time is not known yet."""
        self._steps.clear()
        self._step, self._limit_s = -1, COLLECTIVE_TIMEOUT_S

    def _limit_of_steps(self) -> float:
        """Seconds that an activity of a step may take."""
        if len(self._steps) < _FIRST_STEPS:
            return COLLECTIVE_TIMEOUT_S
        return max(HANG_TIMEOUT_S, _FACTOR * max(self._steps)) if HANG_TIMEOUT_S else float("inf")

    def _write(self, activity: str) -> None:
        limit_s = self._limit_s
        if activity in (PREPARING, CHECKPOINT):
            limit_s = RENDEZVOUS_TIMEOUT_S + COLLECTIVE_TIMEOUT_S  # torch's own limits say more, and come first
        elif activity == CHECKING:
            limit_s = _CHECKING_S
        self._count = count = (self._count + 1) % 256
        values = (count, time.monotonic(), self._step, limit_s, activity.encode()[:40], count)
        self._LAYOUT.pack_into(self._memory, self._slot(count), *values)
        self._memory[0] = count


def beat(activity: str, step: int | None = None) -> None:
    """Say what this process is doing from now on.

    Args:
        activity: ``PREPARING`` and ``CHECKPOINT`` may take as long as ranks wait for each other; anything else is part
            of a step.
        step: counted from anywhere, one by one; None: the same as before.
    """
    if (active := Heartbeat.active()) is not None:
        active.beat(activity, step)


def restart_steps() -> None:
    """See ``Heartbeat.restart``."""
    if (active := Heartbeat.active()) is not None:
        active.restart()
