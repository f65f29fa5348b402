"""A lock on a folder of a shared file system, which need not support flock.

    FOLDER/.owner/     one file, named "free" or after the process that holds the lock: host, machine, pid, job, token

To take the lock, a process renames the file from "free", or from a dead owner's name, to its own name. If several
processes try, the rename succeeds for one of them.

The owner updates the file's times every few seconds: its heartbeat. Other processes observe whether the times change
within a period of their own clock. They do not interpret the times, because clocks of nodes and file servers differ.

Libraries for lock files are not used: they need flock, or they cannot detect that an owner on another machine is dead.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from cfmask.runtime.machine import aside_of, probe_in, process_runs, started_at, this_machine

logger = logging.getLogger(__name__)

HEARTBEAT_S = 15
DEAD_AFTER_S = 60
"""An owner is dead if its heartbeat has not changed for this time."""
PATIENCE_S = 5
FOLDER = ".owner"
_FREE = "free"

FileTimes = tuple[int, int]
"""mtime and ctime of the file, in ns."""


@dataclass(frozen=True)
class Owner:
    """The process that holds a lock.

    host: name of its machine.
    machine: identifies the host, boot and process namespace to which the pid belongs (``this_machine``).
    pid: of the process.
    job: name of its job, or empty.
    age_s: time since its last heartbeat, for messages; inexact if the clocks of machines and file server differ.
    started: when the process started (``started_at``), if known.
    """

    host: str
    machine: str
    pid: int
    job: str
    age_s: float
    started: int | None = None

    @property
    def is_here(self) -> bool:
        """Whether its pid is one of this machine and process namespace."""
        return self.machine == this_machine()

    def has_ended(self) -> bool:
        """Whether the process is known to have ended. False for other machines."""
        if not self.is_here:
            return False
        return not process_runs(self.pid) or self.started not in (None, started_at(self.pid))

    def why_dead(self) -> str | None:
        """Why the owner seems dead; None if it may be alive. For another machine this is a guess from time stamps;
        ``FolderLock.held`` observes the heartbeat before it takes a lock over."""
        if self.has_ended():
            return "has ended"
        return f"has had no heartbeat for {self.age_s:.0f} s" if self.age_s > DEAD_AFTER_S else None

    def __str__(self) -> str:
        return (f"job {self.job}, " if self.job else "") + f"process {self.pid} on {self.host}"


class LockHeld(Exception):
    """A process that is alive holds the lock: ``owner``."""

    def __init__(self, owner: Owner) -> None:
        super().__init__(str(owner))
        self.owner = owner


class FolderLock:
    """The lock of a folder, which has to exist."""

    def __init__(self, root: Path) -> None:
        self._root, self._folder = root, root / FOLDER

    @contextmanager
    def held(
        self,
        job: str = "",
        *,
        heartbeat_s: float = HEARTBEAT_S,
        dead_after_s: float = DEAD_AFTER_S,
        patience_s: float = PATIENCE_S,
        removed: bool = False,
    ) -> Iterator[None]:
        """Hold the lock. The lock of a process of this machine that has ended is taken over at once. An owner on
        another machine is observed until its heartbeat changes, which makes this process raise ``LockHeld``, or has not
        changed for ``dead_after_s``. A holder that has lost its lock, for example because it was suspended for a
        minute, ends its process at once and writes nothing.

        Args:
            job: shown in messages of other processes.
            heartbeat_s: time between two heartbeats of this process.
            dead_after_s: see above.
            patience_s: how long to wait for an owner that is alive.
            removed: whether the folder is removed at the end, with everything in it.

        Raises:
            LockHeld: the owner is alive.
            OSError: the folder cannot be written.
        """
        mine = self._take(job, dead_after_s, patience_s)
        stop = threading.Event()
        beating = threading.Thread(target=self._beat, args=(mine, stop, heartbeat_s), daemon=True)
        beating.start()
        try:
            yield
        finally:
            stop.set()
            beating.join()
            with suppress(OSError):  # a lock that is not released is taken over once this process has ended
                if removed:
                    # Renamed first: a waiting process finds the complete folder or none.
                    gone = aside_of(self._root)
                    os.rename(self._root, gone)
                    shutil.rmtree(gone, ignore_errors=True)
                else:
                    os.rename(mine, self._folder / _FREE)

    def owner(self) -> Owner | None:
        """The holder, alive or dead; None if the lock is free."""
        held = self._held()
        heartbeat = _heartbeat(held) if held else None
        if held is None or heartbeat is None or held.name == _FREE:
            return None
        return self._owner_of(held, heartbeat)

    def _take(self, job: str, dead_after_s: float, patience_s: float) -> Path:
        """Take the lock; returns the lock's file."""
        token = f"{secrets.token_hex(4)}.{started_at(os.getpid())}"
        plain = job.replace(",", "_").replace("/", "_")
        mine = self._folder / ",".join((os.uname().nodename, this_machine(), str(os.getpid()), plain, token))
        began = time.monotonic()
        seen: dict[Path, tuple[FileTimes, float]] = {}  # by owner: latest heartbeat, and when it was first seen
        beats: set[Path] = set()  # owners whose heartbeat has changed
        while True:
            held = self._held()
            heartbeat = _heartbeat(held) if held else None
            if held is None:
                self._make()
                continue
            if heartbeat is None:
                time.sleep(0.01)  # another process has renamed it
                continue
            if held.name == _FREE:
                if _rename(held, mine):
                    return mine
                continue
            owner = self._owner_of(held, heartbeat)
            now = time.monotonic()
            if held not in seen and not owner.is_here:
                logger.info(f"{self._root} is held by {owner}; checking whether it is alive")
            before, since = seen.setdefault(held, (heartbeat, now))
            if heartbeat != before:
                beats.add(held)
                seen[held], since = (heartbeat, now), now
            ended, silent_s = owner.has_ended(), now - since
            if ended or silent_s > dead_after_s:
                if _heartbeat(held) == heartbeat and _rename(held, mine):
                    why = "has ended" if ended else f"has had no heartbeat for {silent_s:.0f} s"
                    logger.info(f"{self._root}: lock taken over from {owner}, which {why}")
                    return mine
                continue
            if (held in beats or owner.is_here) and now - began > patience_s:
                raise LockHeld(owner)
            time.sleep(0.1 if owner.is_here else 0.5)

    def _beat(self, mine: Path, stop: threading.Event, every_s: float) -> None:
        """Update the heartbeat until ``stop`` is set. Ends the process if the lock is lost. Runs in a thread."""
        while not stop.wait(every_s):
            try:
                os.utime(mine)
            except FileNotFoundError:
                if self._lost(mine):
                    logger.error(
                        f"The lock of {self._root} was taken over by {self.owner() or 'another process'}, because this "
                        "process had no heartbeat for too long. It ends now and writes nothing more."
                    )
                    os._exit(1)
            except OSError:
                continue  # a file system that is temporarily unavailable

    def _lost(self, mine: Path) -> bool:
        """Whether the lock's folder has another file. An unmounted folder does not count."""
        try:
            return mine.name not in os.listdir(self._folder)
        except OSError:
            return False

    def _held(self) -> Path | None:
        """The lock's file; None before it is made."""
        try:
            # Opening a folder makes NFS ask the server; looking up a name may not.
            names = os.listdir(self._folder)
        except FileNotFoundError:
            return None
        return self._folder / max(names, key=lambda name: name != _FREE) if names else None

    def _owner_of(self, held: Path, heartbeat: FileTimes) -> Owner:
        age_s = max(0.0, self._clock() - heartbeat[0] / 1e9)
        try:
            host, machine, pid, job, token = held.name.split(",")
            started = token.partition(".")[2]
            return Owner(host, machine, int(pid), job, age_s, int(started) if started else None)
        except ValueError:
            return Owner(held.name, "", 0, "", age_s)

    def _clock(self) -> float:
        """Time of the file system, from a file touched now; this machine's time if none can be written."""
        probe = probe_in(self._root, "clock")
        try:
            probe.touch()
            os.utime(probe)
            return probe.stat().st_mtime
        except OSError:
            return time.time()
        finally:
            with suppress(OSError):
                probe.unlink()

    def _make(self) -> None:
        """Make FOLDER/.owner, free. If several processes try, one succeeds, because a rename cannot replace a non-empty
        folder."""
        aside = probe_in(self._root, "owner")
        try:
            aside.mkdir()
            (aside / _FREE).touch()
            os.rename(aside, self._folder)
        except OSError:
            shutil.rmtree(aside, ignore_errors=True)
            if self._held() is None:
                raise


def _heartbeat(held: Path) -> FileTimes | None:
    """None if the file does not exist. It is opened because that makes NFS ask the server for the times."""
    try:
        descriptor = os.open(held, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        status = os.fstat(descriptor)
        return status.st_mtime_ns, status.st_ctime_ns
    finally:
        os.close(descriptor)


def _rename(held: Path, mine: Path) -> bool:
    """Rename the file; returns whether this process has the lock now."""
    with suppress(FileNotFoundError):  # another process was faster
        if held.name == _FREE:
            os.utime(held)  # a new owner must not appear with an old time
        os.rename(held, mine)
        os.utime(mine)
    return mine.exists()  # NFS may repeat a request that has succeeded, and report an error
