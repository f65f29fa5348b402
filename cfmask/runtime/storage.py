"""What this machine sees of a file system: its free space, and how far its clock is from this machine's."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path


def file_clock(path: Path) -> tuple[float, float]:
    """Write a file, read it back and remove it, to compare the clocks of the file system and of this machine.

    Returns:
        The bounds of (file system's clock - this machine's), in seconds. A timestamp may be a clock tick old, or a
        second on a file system that stores whole seconds.

    Raises:
        OSError: the file cannot be written, or its content differs from what was written.
    """
    before = time.time()
    with open(path, "wb") as file:
        file.write(b"cfmask")
        file.flush()
        os.fsync(file.fileno())
        stamp = os.fstat(file.fileno()).st_mtime_ns
    after = time.time()
    intact = path.read_bytes() == b"cfmask"
    path.unlink()
    if not intact:
        raise OSError(0, "the file read back differs from the file written", str(path))
    resolution = 1.0 if stamp % 1_000_000_000 == 0 else 0.01
    return stamp / 1e9 - after, stamp / 1e9 + resolution - before


def free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free
