"""Progress in items and bytes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from cfmask.runtime.progress import progress_bar


@contextmanager
def throughput_bar(**settings: Any) -> Iterator[Callable[..., None]]:
    """A progress bar that also shows MB/s. Yields ``advance(items, num_bytes, note="")``."""
    begun, done = time.monotonic(), 0
    with progress_bar(**settings) as bar:

        def advance(items: int, num_bytes: int, note: str = "") -> None:
            nonlocal done
            done += num_bytes
            bar.set_postfix_str(f"{done / 1e6 / (time.monotonic() - begun):.1f} MB/s{note}", refresh=False)
            bar.update(items)

        yield advance


def format_bytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
