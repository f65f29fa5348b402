"""Measurements of the node that this process runs on: shared folder, free space, clock."""

from __future__ import annotations

import os
import time
from pathlib import Path


def write_and_look(folder: Path, name: str) -> tuple[str, list[float]]:
    """The error, or "" and the bounds that ``file_clock`` returns."""
    try:
        return "", list(file_clock(folder / name))
    except OSError as error:
        return f"{error.strerror}: {error.filename or folder / name}", []


def file_clock(path: Path) -> tuple[float, float]:
    """Write a file, read it back, and remove it.

    Returns:
        Bounds of (file system's clock - this machine's clock), in seconds. A time stamp may be one clock tick old, or
        one second if the file system stores whole seconds.

    Raises:
        OSError: A file operation fails, or the file has other content than was written.
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
    """Bytes that this user may still write there."""
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize
