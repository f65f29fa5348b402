"""Which locations of data are URLs."""

from __future__ import annotations

from pathlib import Path


def is_remote(where: str | Path) -> bool:
    """Whether ``where`` is a URL that cfmask/data/remote.py reads (http:, https:, pipe:), and not a path."""
    return isinstance(where, str) and where.startswith(("http:", "https:", "pipe:"))
