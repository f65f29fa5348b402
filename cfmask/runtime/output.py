"""Standard output of a process that goes on when its log cannot be written: a full disk must not end a training."""

from __future__ import annotations

import sys
from typing import Any, TextIO


class _LenientStream:
    """A text stream that drops what cannot be written."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except OSError:  # there is nowhere to say so
            pass
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def tolerate_lost_output() -> None:
    """Let ``print`` succeed in this process where standard output or error cannot be written, on a full disk say."""
    sys.stdout, sys.stderr = _LenientStream(sys.stdout), _LenientStream(sys.stderr)  # type: ignore[assignment]
