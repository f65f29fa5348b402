"""Finds a rank that makes no progress, in the process that waits for it, and asks it for the stacks of its threads.

The heartbeat (cfmask/runtime/heartbeat.py) says how long a rank may take. Beside it, a process that is stopped
(SIGSTOP, Ctrl-Z) for ``HANG_TIMEOUT_S`` hangs, whatever it was doing; one that a debugger has attached to does not. The
time in which this process was stopped itself, because Slurm has suspended the job, does not count.
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
"""A longer pause between two looks: this process did not run either."""
_STACKS_WITHIN_S = 2.0
_STACKS_BYTES = 20_000
_DUMP = signal.SIGQUIT


@dataclass(frozen=True)
class Hang:
    """What a rank that makes no progress was doing. state: of its process, a letter as in ps."""

    beat: Beat
    silent_s: float
    state: str

    @property
    def error(self) -> str:
        """One line."""
        at = f"at step {self.beat.step}, " if self.beat.step >= 0 else ""
        how = {"T": "its process is stopped (SIGSTOP)", "D": "it waits in the kernel, for a disk or a driver"}
        state = how.get(self.state)
        return (
            f"hung: {at}{self.beat.activity}, no progress for {self.silent_s:.0f} s"
            + (f"; {state}" if state else "")
            + " (--hang-timeout)"
        )


class HangWatch:
    """Of one rank. Made before the fork; ``begin_in_child`` in the child, ``begin`` in the parent."""

    def __init__(self) -> None:
        self.heartbeat = Heartbeat()
        self._stacks = os.memfd_create("stacks")
        self._pid = 0
        self._since = self._looked_at = time.monotonic()
        self._stopped_since: float | None = None

    def begin_in_child(self) -> None:
        self.heartbeat.activate()
        faulthandler.register(_DUMP, file=self._stacks, all_threads=True)

    def begin(self, pid: int) -> None:
        """pid: the child's."""
        self._pid = pid

    def look(self) -> Hang | None:
        """None while the rank makes progress, or may still do so. To be called every second or so."""
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
        """What the rank is doing now, taken for a hang."""
        beat = self.heartbeat.read()
        return Hang(beat, time.monotonic() - max(beat.time, self._since), self._state())

    def stacks(self) -> str:
        """The Python stacks of the rank's threads; "" if it does not answer within 2 s, as where it hangs in the
        kernel. One that was stopped is stopped again."""
        stopped = self._state() == "T"
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, _DUMP)
            os.kill(self._pid, signal.SIGCONT)  # one that is stopped takes no signal before
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
