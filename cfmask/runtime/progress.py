"""Progress of what takes minutes or hours: a bar of a command, log records of a job."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from cfmask.runtime.logging import is_job
from cfmask.runtime.times import duration

logger = logging.getLogger(__name__)

_LOG_S = 30.0
"""Between two log records of a job's progress."""


class _LogRecords(tqdm):
    """A bar that is logged and not drawn: "imagenet-r: 12800/30000, 850.0 samples/s, ETA 20 s"."""

    monitor_interval = 0  # no thread that draws
    disable: bool

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings | {"mininterval": _LOG_S, "miniters": 1, "delay": 1e-9, "file": io.StringIO()})

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        now = self.format_dict
        rate = now["rate"] or (now["n"] - now["initial"]) / max(now["elapsed"], 1e-3)
        left = f", ETA {duration((now['total'] - now['n']) / rate)}" if now["total"] and rate else ""
        name = f"{now['prefix'].removesuffix(': ')}: " if now["prefix"] else ""
        of_total = f"/{now['total']}" if now["total"] else ""
        postfix = f", {now['postfix']}" if now["postfix"] else ""
        logger.info(f"{name}{now['n']}{of_total}, {rate:.1f} {now['unit'].strip()}/s{left}{postfix}")

    def close(self) -> None:
        if not self.disable:
            self.display()
        self.disable = True  # tqdm's own would draw the bar once more
        self._decr_instances(self)


def progress_bar(**settings: Any) -> tqdm:
    """A tqdm bar. On a terminal it is redrawn ten times a second; in a file, one line is added every ten seconds; in a
    job, there is a log record every 30 seconds and at the end."""
    if is_job():
        return _LogRecords(**settings)
    return tqdm(**settings, mininterval=0.1 if sys.stderr.isatty() else 10, dynamic_ncols=True)


@contextmanager
def progress_stages(total: int) -> Iterator[Callable[[str], object]]:
    """A progress bar for work in ``total`` stages. Call what it yields with a stage's name when the stage begins."""
    begun = iter(range(total))
    with progress_bar(total=total, unit=" stages") as bar:

        def begin(name: str) -> None:
            bar.update(next(begun) - bar.n)
            bar.set_description(name)

        yield begin
        bar.update(total - bar.n)
