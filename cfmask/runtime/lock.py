"""A lock on a folder, for any file system that machines share, with flock or without.

    FOLDER/.owner/     one file, called "free" or after the process that holds the lock: host, machine, pid, job, token

All that ever happens to the file is a rename, from "free" or from a dead owner's name to one's own: of any number of
processes that try, one finds the old name.

The owner sets the file's times every few seconds: its heartbeat. Whoever waits looks whether they CHANGE, by a clock of
its own. What they say is not believed: the clocks of nodes and file servers differ, and are set back.
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
"""An owner whose heartbeat has not changed for so long is dead."""
PATIENCE_S = 5
FOLDER = ".owner"
_FREE = "free"

Heartbeat = tuple[int, int]
"""The file's mtime and ctime, in ns."""


@dataclass(frozen=True)
class Owner:
    """Who holds a folder. machine: host, boot and process namespace within which a pid means something. started: when
    the process did (``started_at``), if it says so. age_s: since its last heartbeat, as far as the clocks of the
    machines and the file server agree: for people."""

    host: str
    machine: str
    pid: int
    job: str
    age_s: float
    started: int | None = None

    @property
    def is_here(self) -> bool:
        """Whether its pid means something to this process."""
        return self.machine == this_machine()

    def has_ended(self) -> bool:
        """Whether it is known to run no more: its machine is this one, and it is not among its processes."""
        if not self.is_here:
            return False
        return not process_runs(self.pid) or self.started not in (None, started_at(self.pid))

    def why_dead(self) -> str | None:
        """What shows, at one look, that it is dead; None if it may live. Of an owner on another machine that is a guess
        from time stamps. Who takes a lock over looks for longer (``FolderLock.held``)."""
        if self.has_ended():
            return "does not run any more"
        return f"was not heard of for {self.age_s:.0f} s" if self.age_s > DEAD_AFTER_S else None

    def __str__(self) -> str:
        return (f"job {self.job}, " if self.job else "") + f"process {self.pid} on {self.host}"


class LockHeld(Exception):
    """A living process holds the lock: ``owner``."""

    def __init__(self, owner: Owner) -> None:
        super().__init__(str(owner))
        self.owner = owner


class FolderLock:
    """The lock of one folder, which has to exist."""

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
        """Hold the lock. An owner on this machine whose process is gone is followed at once. One elsewhere is watched:
        until its heartbeat changes, and this process is refused, or has not changed for ``dead_after_s``. A holder that
        finds itself replaced (it was suspended for a minute, say) ends its process at once and writes nothing.

        Args:
            job: named in what others are told.
            heartbeat_s: between two heartbeats of this process.
            patience_s: how long an owner that lives is waited for.
            removed: at the end the folder goes, with all that it holds.

        Raises:
            LockHeld: its owner lives.
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
            with suppress(OSError):  # not freed, it is taken over from a process that has ended
                if removed:
                    # Renamed first: who waits finds the folder whole or not at all.
                    gone = aside_of(self._root)
                    os.rename(self._root, gone)
                    shutil.rmtree(gone, ignore_errors=True)
                else:
                    os.rename(mine, self._folder / _FREE)

    def owner(self) -> Owner | None:
        """Who holds the lock, alive or dead; None if nobody does."""
        held = self._held()
        heartbeat = _heartbeat(held) if held else None
        if held is None or heartbeat is None or held.name == _FREE:
            return None
        return self._owner_of(held, heartbeat)

    def _take(self, job: str, dead_after_s: float, patience_s: float) -> Path:
        """The file that is this process's now."""
        token = f"{secrets.token_hex(4)}.{started_at(os.getpid())}"
        plain = job.replace(",", "_").replace("/", "_")
        mine = self._folder / ",".join((os.uname().nodename, this_machine(), str(os.getpid()), plain, token))
        began = time.monotonic()
        seen: dict[Path, tuple[Heartbeat, float]] = {}  # of each owner: the latest heartbeat, and since when it is that
        beats: set[Path] = set()  # owners whose heartbeat has changed
        while True:
            held = self._held()
            heartbeat = _heartbeat(held) if held else None
            if held is None:
                self._make()
                continue
            if heartbeat is None:
                time.sleep(0.01)  # renamed meanwhile
                continue
            if held.name == _FREE:
                if _rename(held, mine):
                    return mine
                continue
            owner = self._owner_of(held, heartbeat)
            now = time.monotonic()
            if held not in seen and not owner.is_here:
                logger.info(f"{self._root} was last held by {owner}; waiting to see whether it lives")
            before, since = seen.setdefault(held, (heartbeat, now))
            if heartbeat != before:
                beats.add(held)
                seen[held], since = (heartbeat, now), now
            ended, silent_s = owner.has_ended(), now - since
            if ended or silent_s > dead_after_s:
                if _heartbeat(held) == heartbeat and _rename(held, mine):
                    why = "does not run any more" if ended else f"was not heard of for {silent_s:.0f} s"
                    logger.info(f"{self._root} was held by {owner}, which {why}: taken over")
                    return mine
                continue
            if (held in beats or owner.is_here) and now - began > patience_s:
                raise LockHeld(owner)
            time.sleep(0.1 if owner.is_here else 0.5)

    def _beat(self, mine: Path, stop: threading.Event, every_s: float) -> None:
        """A thread's task until it is told to stop. Ends the process if the lock is lost."""
        while not stop.wait(every_s):
            try:
                os.utime(mine)
            except FileNotFoundError:
                if self._lost(mine):
                    logger.error(
                        f"{self._root} has gone to {self.owner() or 'nobody'}, because this process was not "
                        "heard of for too long. It ends, and writes nothing more."
                    )
                    os._exit(1)
            except OSError:
                continue  # a file system that is away for a while

    def _lost(self, mine: Path) -> bool:
        """Whether the lock's folder is there and has another file: a mount that is away has none at all."""
        try:
            return mine.name not in os.listdir(self._folder)
        except OSError:
            return False

    def _held(self) -> Path | None:
        """The one file there is; None before it is made."""
        try:
            # Listed, not looked up: NFS asks the server when a folder is opened.
            names = os.listdir(self._folder)
        except FileNotFoundError:
            return None
        return self._folder / max(names, key=lambda name: name != _FREE) if names else None

    def _owner_of(self, held: Path, heartbeat: Heartbeat) -> Owner:
        age_s = max(0.0, self._clock() - heartbeat[0] / 1e9)
        try:
            host, machine, pid, job, token = held.name.split(",")
            started = token.partition(".")[2]
            return Owner(host, machine, int(pid), job, age_s, int(started) if started else None)
        except ValueError:
            return Owner(held.name, "", 0, "", age_s)

    def _clock(self) -> float:
        """The time as the file system sees it, from a file touched now; where none can be written, this machine's."""
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
        """FOLDER/.owner, free. Of several processes one makes it: a folder with something in it is not renamed over."""
        aside = probe_in(self._root, "owner")
        try:
            aside.mkdir()
            (aside / _FREE).touch()
            os.rename(aside, self._folder)
        except OSError:
            shutil.rmtree(aside, ignore_errors=True)
            if self._held() is None:
                raise


def _heartbeat(held: Path) -> Heartbeat | None:
    """None if the file is not there. Opened, because that is when NFS asks the server for a file's times."""
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
    """Whether the lock is this process's now."""
    with suppress(FileNotFoundError):  # another was faster
        if held.name == _FREE:
            os.utime(held)  # nobody may see a new owner with the time of the one before
        os.rename(held, mine)
        os.utime(mine)
    return mine.exists()  # on NFS an error may be that of a request repeated after it had succeeded
