"""Standard output that does not raise errors: for characters that cannot be encoded and, in a job, for a full disk."""

from __future__ import annotations

import sys
from typing import Any, TextIO


def escape_unencodable_output() -> None:
    """Let ``print`` write backslash escapes for characters that standard output or error cannot encode. File names may
    be any bytes, and PYTHONIOENCODING or the locale may require ASCII."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a caller may have replaced the stream
            stream.reconfigure(errors="backslashreplace")


def printable(name: str) -> str:
    """A file name as text that can be encoded: bytes that are not UTF-8 become backslash escapes."""
    return name.encode(errors="backslashreplace").decode()


class _LenientStream:
    """A text stream that ignores write errors."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except OSError:  # there is no place to report it
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
    """Let ``print`` succeed in this process even if standard output or error cannot be written, as on a full disk."""
    escape_unencodable_output()
    sys.stdout, sys.stderr = _LenientStream(sys.stdout), _LenientStream(sys.stderr)  # type: ignore[assignment]
