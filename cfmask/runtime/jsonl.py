""".jsonl files: an object a line, appended, also on a disk that is full for a while; and small .json files."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from cfmask.runtime.files import write_atomically

logger = logging.getLogger(__name__)


def read_lines(path: Path, *, tail: int | None = None) -> list[dict[str, Any]]:
    """The objects of a .jsonl file; a line torn by a kill is left out. No file: no lines.

    Args:
        tail: look at no more than so many bytes at the end.

    Raises:
        OSError: there is a file, and it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            if tail is not None:
                file.seek(max(0, os.fstat(file.fileno()).st_size - tail))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return []
    lines = []
    for line in text.splitlines():
        with suppress(ValueError):
            lines.append(json.loads(line))
    return [line for line in lines if isinstance(line, dict)]  # the end of a cut line may be a number


def read_object(path: Path) -> dict[str, Any] | None:
    """The object in a .json file; None if there is none, or it cannot be made out."""
    try:
        found = json.loads(path.read_text(errors="replace"))
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def append_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Add objects to a .jsonl file: all, or on a full disk none. A line that a kill has torn stays by itself.

    Raises:
        OSError: they cannot be written.
    """
    # No buffer: what a failed flush leaves in one would be written at close, after the cut.
    with open(path, "ab+", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        torn = file.read() not in (b"", b"\n")
        data = ("\n" * torn + "".join(json.dumps(line) + "\n" for line in lines)).encode()
        try:
            while data:
                data = data[file.write(data) :]
        except OSError:
            os.truncate(path, size)
            raise


def cut_lines(path: Path, step: int) -> None:
    """Drop the lines of a .jsonl file whose ``step`` is beyond a step, and a torn end. On a full disk too: what goes is
    the end of the file, which is cut off in place.

    Raises:
        OSError: it cannot be written.
    """
    try:
        with open(path, "rb") as file:
            lines = file.readlines()
    except FileNotFoundError:
        return
    steps = [_step_of(line) for line in lines]
    end = next((i for i, at in enumerate(steps) if at is not None and at > step), len(lines))
    while end and steps[end - 1] is None:
        end -= 1
    later = [line for line, at in zip(lines[end:], steps[end:], strict=True) if at is not None and at <= step]
    if later:  # never so in a file that one process has written: a line of before behind one of after
        write_atomically(path, b"".join([*lines[:end], *later]))
    elif end < len(lines):
        with open(path, "rb+") as file:
            file.truncate(sum(map(len, lines[:end])))
            os.fsync(file.fileno())


def _step_of(line: bytes) -> int | None:
    """None for a line that is torn or has no step."""
    with suppress(ValueError):
        found = json.loads(line)
        if isinstance(found, dict) and isinstance(found.get("step"), int):
            return found["step"]
    return None


class JsonLines:
    """A .jsonl file that is appended to. Lines that cannot be written are kept, and written with the next ones."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._pending: list[dict[str, Any]] = []

    @property
    def pending(self) -> tuple[dict[str, Any], ...]:
        """Lines that are not in the file yet."""
        return tuple(self._pending)

    def add(self, line: dict[str, Any]) -> None:
        """Remember a line for the next ``write``."""
        self._pending.append(line)

    def extend(self, lines: Iterable[dict[str, Any]]) -> None:
        """Remember lines for the next ``write``."""
        self._pending.extend(lines)

    def write(self) -> None:
        """Append what is pending. A failure is a warning."""
        if not self._pending:
            return
        try:
            append_lines(self.path, self._pending)
            self._pending.clear()
        except OSError as error:
            logger.warning(f"{self.path} cannot be written ({error.strerror}); its lines wait for the next")
