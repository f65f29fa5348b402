"""Progress bars of commands that run for minutes or hours."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm


def progress_bar(**settings: Any) -> tqdm:
    """A tqdm bar. On a terminal it is redrawn ten times a second; in a file, one line is added every ten seconds."""
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
