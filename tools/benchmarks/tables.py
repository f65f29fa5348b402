"""What benchmarks print: a table under the command that made it, with the machine's name."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import sys
from pathlib import Path

from cfmask.report.tables import table


def spread(values: list[float], form: str = "{:.0f}") -> str:
    return f"{form.format(statistics.median(values))} ({form.format(min(values))}–{form.format(max(values))})"


def say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def report(name: str, source: Path | None, header: list[str], rows: list[list[str]], notes: list[str]) -> str:
    """The table of a benchmark under the command and the machine. source: a tree of class/image, to be described."""
    of = ""
    if source is not None:
        files = [path for path in source.glob("*/*") if path.is_file()]
        of = f" {len(files)} images, {sum(p.stat().st_size for p in files) / max(1, len(files)) / 1e3:.0f} kB each."
    machine = f"{cpu_name()}, {len(os.sched_getaffinity(0))} cores; Python {platform.python_version()}"
    head = f"`python tools/bench.py {name}`, {datetime.date.today()}, {machine}.{of}"
    return "\n\n".join([head, table(header, rows), *notes])


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()
