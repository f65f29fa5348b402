"""This machine, its processes, and the names of temporary files, which contain the writing process."""

from __future__ import annotations

import errno
import functools
import hashlib
import os
import re
import secrets
import socket
from pathlib import Path

_ASIDE = re.compile(r"\.(?P<machine>[0-9a-f]{12})-(?P<pid>[0-9]+)-[0-9a-f]{8}(\.part)?")
_ABANDONED_AFTER_S = 3600
"""Age after which a temporary file of a process on another machine is abandoned; writing takes less."""


@functools.cache
def this_machine() -> str:
    """Identifies the boot and the process namespace: the pids of two processes are comparable if this is equal."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    return hashlib.sha256((boot + os.readlink("/proc/self/ns/pid")).encode()).hexdigest()[:12]


def node_name() -> str:
    """Slurm's name of this machine, which may differ from the host name; the host name outside of Slurm."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def process_runs(pid: int) -> bool:
    """Whether a process of this machine is running. A zombie is not."""
    try:
        os.kill(pid, 0)
        return _stat(pid)[0] not in "ZX"
    except PermissionError:
        return True  # another user's
    except (ProcessLookupError, FileNotFoundError):
        return False


def started_at(pid: int) -> int | None:
    """When a process of this machine started, in clock ticks since boot; None if there is no such process. It tells
    processes with the same pid apart.

    psutil's ``create_time`` is not used: it adds the boot time, which changes with the system clock.
    """
    try:
        return int(_stat(pid)[19])
    except (ProcessLookupError, FileNotFoundError):
        return None


def _stat(pid: int) -> list[str]:
    # pid (command) state …; the command may contain blanks and parentheses.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def aside_of(path: Path) -> Path:
    """A new hidden path beside ``path``, for a file that will be renamed to it. Raises OSError if ``path`` has no name,
    as "." and "/" have none."""
    if not path.name:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    return path.with_name(f".{path.name}.{_tag()}.part")


def probe_in(folder: Path, name: str) -> Path:
    """A new hidden path in a folder, for a file that is removed at once."""
    return folder / f".{name}.{_tag()}"


def _tag() -> str:
    return f"{this_machine()}-{os.getpid()}-{secrets.token_hex(4)}"


def writer_of(aside: Path) -> tuple[str, int] | None:
    """Machine and pid in the name of a temporary file; None for other names."""
    found = _ASIDE.fullmatch(aside.name[max(aside.name.rfind("."), 0) :]) or _ASIDE.search(aside.name)
    return (found["machine"], int(found["pid"])) if found else None


def is_abandoned(path: Path, *, now: float) -> bool:
    """Whether a file or folder is a temporary one whose writer was killed.

    Args:
        now: time of the file system.
    """
    writer = writer_of(path)
    if writer is None:
        return False
    machine, pid = writer
    if machine == this_machine():
        return pid != os.getpid() and not process_runs(pid)
    return now - path.stat().st_mtime > _ABANDONED_AFTER_S
