"""This machine and its processes, and temporary files that are named after the process that writes them."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import secrets
import socket
from pathlib import Path

_ASIDE = re.compile(r"\.(?P<machine>[0-9a-f]{12})-(?P<pid>[0-9]+)-[0-9a-f]{8}(\.part)?")
_ABANDONED_AFTER_S = 3600
"""A temporary file of a process on another machine: it is written in less."""


@functools.cache
def this_machine() -> str:
    """Tells apart machines of one name, boots of one machine, and containers that number processes for themselves."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    return hashlib.sha256((boot + os.readlink("/proc/self/ns/pid")).encode()).hexdigest()[:12]


def node_name() -> str:
    """As Slurm names this machine, which may differ from its host name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def process_runs(pid: int) -> bool:
    """Whether there is such a process on this machine; one that only waits for its parent to notice its end is gone."""
    try:
        os.kill(pid, 0)
        return _stat(pid)[0] not in "ZX"
    except PermissionError:
        return True  # another user's
    except (ProcessLookupError, FileNotFoundError):
        return False


def started_at(pid: int) -> int | None:
    """When a process of this machine started, in clock ticks since boot: tells it from a later one with its number.
    None: there is no such process."""
    try:
        return int(_stat(pid)[19])
    except (ProcessLookupError, FileNotFoundError):
        return None


def _stat(pid: int) -> list[str]:
    # pid (command) state …; the command may hold blanks and parentheses.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def aside_of(path: Path) -> Path:
    """A new name beside ``path`` for a file that will be renamed to it: hidden, and named after this process."""
    return path.with_name(f".{path.name}.{_tag()}.part")


def probe_in(folder: Path, name: str) -> Path:
    """A new hidden name in a folder for a file that is removed at once."""
    return folder / f".{name}.{_tag()}"


def _tag() -> str:
    return f"{this_machine()}-{os.getpid()}-{secrets.token_hex(4)}"


def writer_of(aside: Path) -> tuple[str, int] | None:
    """Machine and pid in the name of a temporary file; None where the name has none."""
    found = _ASIDE.fullmatch(aside.name[max(aside.name.rfind("."), 0) :]) or _ASIDE.search(aside.name)
    return (found["machine"], int(found["pid"])) if found else None


def is_abandoned(path: Path, *, now: float) -> bool:
    """Whether a hidden file or folder is one that a process was killed over.

    Args:
        now: the time, by the clock of the file system.
    """
    writer = writer_of(path)
    if writer is None:
        return False
    machine, pid = writer
    if machine == this_machine():
        return pid != os.getpid() and not process_runs(pid)
    return now - path.stat().st_mtime > _ABANDONED_AFTER_S
