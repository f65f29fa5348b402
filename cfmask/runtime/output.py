"""Standard output that does not raise errors: for characters that cannot be encoded, after its reader has
ended, and, in a job, for a full disk."""

from __future__ import annotations

import codecs
import os
import select
import sys
import unicodedata
from contextlib import suppress
from typing import Any, TextIO


def escape_unencodable_output() -> None:
    """Let ``print`` write what standard output or error cannot encode: dashes, arrows and bars as ASCII of about the
    same width, others as backslash escapes. File names may be any bytes, and PYTHONIOENCODING or the locale may
    require ASCII. A closed one (``>&-``) is replaced."""
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a caller may have replaced the stream
            stream.reconfigure(errors=_ERRORS)


_ERRORS = "cfmask-ascii"
_ASCII = {
    **dict.fromkeys("–−", "-"),
    **dict.fromkeys("░·…", "."),
    **dict.fromkeys("█▉▊▋▌▍▎▏", "#"),
    "×": "x",
    "→": "->",
}


def _as_ascii(error: UnicodeError) -> tuple[str | bytes, int]:
    if isinstance(error, UnicodeEncodeError) and (plain := _ASCII.get(error.object[error.start])):
        return plain, error.start + 1
    return codecs.backslashreplace_errors(error)


codecs.register_error(_ERRORS, _as_ascii)


def printable(name: str) -> str:
    """A file name as text that can be encoded: bytes that are not UTF-8 become backslash escapes."""
    return name.encode(errors="backslashreplace").decode()


def clean(text: str) -> str:
    """A text on one line, without characters that would move the cursor, reorder the text, or cannot be encoded."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(text.split()))


def cells(text: str) -> int:
    """The width of a text in letters: two for wide characters, such as Chinese ones, none for combining ones."""
    if text.isascii():
        return len(text)
    return sum(
        0
        if unicodedata.combining(c) or unicodedata.category(c) in ("Mn", "Me", "Cf")
        else 2
        if unicodedata.east_asian_width(c) in "WF"
        else 1
        for c in text
    )


def output_is_lost() -> bool:
    """Whether standard output or error cannot be written: its disk is full, or the reader of the pipe has ended."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            return True
        with suppress(OSError):  # a stream without a file
            poll = select.poll()
            poll.register(stream.fileno(), 0)
            if any(event & select.POLLERR for _, event in poll.poll(0)):
                return True
    return False


def silence_output() -> None:
    """Discard all further output: the terminal or the reader of the pipe is gone, and writing would be an error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
        with suppress(OSError):
            os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


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
