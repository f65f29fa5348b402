"""Progress bars of commands that run for minutes or hours."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def progress_bar(**settings: Any) -> tqdm:
    """A tqdm bar that is redrawn ten times a second on a terminal, and every ten seconds in a file, as a new line."""
    return tqdm(**settings, mininterval=0.1 if sys.stderr.isatty() else 10, dynamic_ncols=True)
