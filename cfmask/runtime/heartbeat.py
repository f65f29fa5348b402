"""A rank's heartbeat: what it is doing, since when, and how long that may take.

The rank writes it into memory that it shares with its supervising process, which ends a rank that makes no progress
(launch/ranks/supervisor.py). A beat takes microseconds and uses neither I/O nor a thread, so that a rank that is
stopped or hangs in a driver is detected.

    heartbeat = Heartbeat()                  before the fork
    heartbeat.activate()                     in the child
    beat("loading data", step=12)            anywhere in the child
    heartbeat.read()                         in the parent

While ranks prepare, torch's own limits apply (``--rendezvous-timeout``, ``--collective-timeout``). Once steps have been
taken, an activity may take as long as ``_FACTOR`` steps, but at least ``HANG_TIMEOUT_S``.
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
"""Activities outside of steps, which may take as long as ranks wait for each other."""
CHECKING = "checking the node"
WAITING = "waiting for other ranks"

_FACTOR = 20
"""A step may take this many times the slowest of the last ``_RECENT`` steps."""
_RECENT = 100
_CHECKING_S = 180.0
_FIRST_STEPS = 5
"""Number of steps after which their time is known. The first ones compile kernels, capture graphs and fill caches."""


def _seconds(variable: str, default_min: float) -> float:
    """Value of an environment variable that gives minutes (launch/allocation/resolve.py)."""
    return 60 * float(os.environ.get(variable) or default_min)


RENDEZVOUS_TIMEOUT_S = _seconds("CFMASK_RENDEZVOUS_TIMEOUT", 30)
COLLECTIVE_TIMEOUT_S = _seconds("CFMASK_COLLECTIVE_TIMEOUT", 30)
"""How long ranks wait for each other before the first steps (cfmask/runtime/rendezvous.py)."""
HANG_TIMEOUT_S = _seconds("CFMASK_HANG_TIMEOUT", 5)
"""Shortest time without progress after which a rank counts as hung; 0: never."""


@dataclass(frozen=True)
class Beat:
    """The latest activity of a rank.

    time: when it began, by ``time.monotonic`` of this machine.
    step: current step; -1 before the first.
    limit_s: seconds that the activity may take.
    activity: its name.
    """

    time: float
    step: int
    limit_s: float
    activity: str


class Heartbeat:
    """The heartbeat of one rank, in memory that a fork shares.

    The first byte counts beats, modulo 256. Beats are written to two slots alternately, so that the previous beat stays
    readable while the next one is written. A slot has the count at both ends.
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
        """Let ``beat`` write this heartbeat from now on, in this process."""
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
        """Offset of a beat in the memory."""
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
        """Forget the time of steps, because the next ones are of another kind (another phase, an evaluation)."""
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
            limit_s = RENDEZVOUS_TIMEOUT_S + COLLECTIVE_TIMEOUT_S  # torch's own limits come first, with better errors
        elif activity == CHECKING:
            limit_s = _CHECKING_S
        self._count = count = (self._count + 1) % 256
        values = (count, time.monotonic(), self._step, limit_s, activity.encode()[:40], count)
        self._LAYOUT.pack_into(self._memory, self._slot(count), *values)
        self._memory[0] = count


def beat(activity: str, step: int | None = None) -> None:
    """Report what this process is doing from now on.

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
