"""The output of benchmarks: a table below the command and the machine that it is of."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from cfmask.report.tables import table


def spread(values: Sequence[float], form: str = "{:.0f}") -> str:
    """Median (lowest–highest)."""
    return f"{form.format(statistics.median(values))} ({form.format(min(values))}–{form.format(max(values))})"


def announce(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def report(command: str, header: list[str], rows: list[list[str]], notes: list[str], source: Path | None = None) -> str:
    """A table below the command, the date, the machine and, where there is one, the source of images."""
    machine = f"{cpu_name()}, {len(os.sched_getaffinity(0))} cores; Python {platform.python_version()}"
    head = f"`python tools/bench.py {command}`, {datetime.date.today()}, {machine}."
    if source is not None:
        sizes = [path.stat().st_size for path in source.glob("*/*") if path.is_file()]
        head += f" {len(sizes)} images, {statistics.fmean(sizes) / 1e3:.0f} kB each."
    return "\n\n".join([head, table(header, rows), *notes])


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()
