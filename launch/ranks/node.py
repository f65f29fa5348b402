"""What can be seen of a node by itself: the shared folder as it sees it, disks, its clock."""

from __future__ import annotations

import os
import time
from pathlib import Path


def write_and_look(folder: Path, name: str) -> tuple[str, list[float]]:
    """``file_clock``, or why that failed."""
    try:
        return "", list(file_clock(folder / name))
    except OSError as error:
        return f"{error.strerror}: {error.filename or folder / name}", []


def file_clock(path: Path) -> tuple[float, float]:
    """Write a file, read it back, and remove it; the bounds of (file system's clock - this machine's), in seconds. A
    time is taken as up to a clock tick old, or a second where a file system has whole ones.

    Raises:
        OSError: that is not possible, or what is read is not what was written.
    """
    before = time.time()
    with open(path, "wb") as file:
        file.write(b"cfmask")
        file.flush()
        os.fsync(file.fileno())
        stamp = os.fstat(file.fileno()).st_mtime_ns
    after = time.time()
    whole = path.read_bytes() == b"cfmask"
    path.unlink()
    if not whole:
        raise OSError(0, "what is read is not what was written", str(path))
    grain = 1.0 if stamp % 1_000_000_000 == 0 else 0.01
    return stamp / 1e9 - after, stamp / 1e9 + grain - before


def free_bytes(folder: Path) -> int:
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize
