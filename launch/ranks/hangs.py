"""Detects in the supervisor that a rank makes no progress, and gets the stacks of its threads.

The heartbeat (cfmask/runtime/heartbeat.py) carries the time that a rank may take. In addition, a rank whose process is
stopped (SIGSTOP, Ctrl-Z) for ``HANG_TIMEOUT_S`` counts as hung during any activity, unless a debugger is attached. Time
in which the supervisor was stopped itself, because Slurm has suspended the job, does not count.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from cfmask.runtime.heartbeat import HANG_TIMEOUT_S, Beat, Heartbeat

_SUSPENDED_S = 5.0
"""After a longer pause between two looks, the supervisor did not run either."""
_STACKS_WITHIN_S = 2.0
_STACKS_BYTES = 20_000
_DUMP = signal.SIGQUIT


@dataclass(frozen=True)
class Hang:
    """What a rank that makes no progress was doing.

    beat: its last heartbeat.
    silent_s: time since then.
    state: of its process, a letter as in ps.
    """

    beat: Beat
    silent_s: float
    state: str

    @property
    def error(self) -> str:
        """One line."""
        at = f"at step {self.beat.step}, " if self.beat.step >= 0 else ""
        how = {"T": "its process is stopped (SIGSTOP)", "D": "it waits in the kernel for a disk or a driver"}
        state = how.get(self.state)
        return (
            f"hung: {at}{self.beat.activity}, no progress for {self.silent_s:.0f} s"
            + (f"; {state}" if state else "")
            + " (--hang-timeout)"
        )


class HangWatch:
    """Watches one rank. Created before the fork; then call ``begin_in_child`` in the child, ``begin`` in the parent."""

    def __init__(self) -> None:
        self.heartbeat = Heartbeat()
        self._stacks = os.memfd_create("stacks")
        self._pid = 0
        self._since = self._looked_at = time.monotonic()
        self._stopped_since: float | None = None

    def begin_in_child(self) -> None:
        self.heartbeat.activate()
        faulthandler.register(_DUMP, file=self._stacks, all_threads=True)

    def begin(self, child: int) -> None:
        self._pid = child

    def look(self) -> Hang | None:
        """None while the rank makes progress or has time left. Call it every few seconds."""
        now = time.monotonic()
        state = self._state()
        if now - self._looked_at > _SUSPENDED_S or state == "t":
            self._since, self._stopped_since = now, None
        self._looked_at = now
        if state != "T":
            self._stopped_since = None
        elif self._stopped_since is None:
            self._stopped_since = now
        beat = self.heartbeat.read()
        silent_s = now - max(beat.time, self._since)
        stopped_s = now - self._stopped_since if self._stopped_since is not None else 0.0
        if silent_s > beat.limit_s or (HANG_TIMEOUT_S and stopped_s > HANG_TIMEOUT_S):
            return self.hang()
        return None

    def hang(self) -> Hang:
        """What the rank is doing now, whether it hangs or not."""
        beat = self.heartbeat.read()
        return Hang(beat, time.monotonic() - max(beat.time, self._since), self._state())

    def stacks(self) -> str:
        """The Python stacks of the rank's threads; "" if it does not answer within 2 s, for example because it hangs in
        the kernel. A process that was stopped is stopped again."""
        stopped = self._state() == "T"
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, _DUMP)
            os.kill(self._pid, signal.SIGCONT)  # a stopped process handles no other signal
        deadline, size = time.monotonic() + _STACKS_WITHIN_S, 0
        while time.monotonic() < deadline:
            time.sleep(0.1)
            before, size = size, os.fstat(self._stacks).st_size
            if size and size == before:
                break
        if stopped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGSTOP)
        return os.pread(self._stacks, _STACKS_BYTES, 0).decode(errors="replace")

    def _state(self) -> str:
        with contextlib.suppress(OSError):
            # pid (command) state …
            return Path(f"/proc/{self._pid}/stat").read_text().rpartition(")")[2].split()[0]
        return ""
