"""Standard output that cannot end a process: neither by a character that it cannot encode nor, in a training, by a disk
that is full."""

from __future__ import annotations

import sys
from typing import Any, TextIO


def escape_unencodable_output() -> None:
    """Let ``print`` write a backslash escape for what the encoding of standard output or error cannot express: names of
    files may be any bytes, and PYTHONIOENCODING or the locale may ask for a strict encoding or for ASCII."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not where a caller replaced it
            stream.reconfigure(errors="backslashreplace")


def printable(name: str) -> str:
    """The name of a file as text that can be encoded, whatever bytes it is of on disk: those that are not UTF-8 become
    backslash escapes."""
    return name.encode(errors="backslashreplace").decode()


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
    escape_unencodable_output()
    sys.stdout, sys.stderr = _LenientStream(sys.stdout), _LenientStream(sys.stderr)  # type: ignore[assignment]
