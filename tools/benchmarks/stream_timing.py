"""Times a stream of batches, and the processor time that it needs.

Uses the standard library alone: peers run in an environment of their own.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path


def time_stream(batches: Iterator[int], seconds: float) -> dict[str, float]:
    """Read an endless stream of batch sizes for about ``seconds`` after its first batch.

    Returns:
        ``first_batch_s``: seconds to the first batch; ``images``, ``seconds``, ``cpu_seconds``: of the batches after
        it.
    """
    start = time.perf_counter()
    next(batches)
    first, cpu = time.perf_counter(), cpu_seconds()
    images, elapsed = 0, 0.0
    for count in batches:
        images += count
        elapsed = time.perf_counter() - first
        if elapsed >= seconds:
            break
    return {
        "first_batch_s": first - start,
        "images": images,
        "seconds": elapsed,
        "cpu_seconds": cpu_seconds() - cpu,
    }


def cpu_seconds() -> float:
    """User and system time of this process and of all its descendants, whether they have ended or not."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    seconds = sum(usage.ru_utime + usage.ru_stime for usage in usages)
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has just ended
        pid = int(stat.parent.name)
        parents[pid] = int(fields[1])
        ticks[pid] = sum(int(field) for field in fields[11:15])  # its own time, and that of its ended children
    family = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    return seconds + sum(ticks[pid] for pid in family - {os.getpid()}) / os.sysconf("SC_CLK_TCK")
