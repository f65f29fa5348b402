""".jsonl files, with one object per line and tolerance for full disks; and small .json files."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from cfmask.runtime.files import write_atomically

logger = logging.getLogger(__name__)


def read_lines(path: Path, *, tail: int | None = None, having: str = "") -> list[dict[str, Any]]:
    """The objects of a .jsonl file, without lines that a kill has truncated; empty if the file does not exist.

    Args:
        tail: read only this many bytes at the end.
        having: parse only lines that contain this text, which is much faster if few do.

    Raises:
        OSError: the file exists and cannot be read.
    """
    try:
        with open(path, "rb") as file:
            if tail is not None:
                file.seek(max(0, os.fstat(file.fileno()).st_size - tail))
            data = file.read()
    except FileNotFoundError:
        return []
    lines = []
    for line in (_lines_with(having.encode(), data) if having else data).decode(errors="replace").splitlines():
        with suppress(ValueError, RecursionError):
            lines.append(json.loads(line))
    return [line for line in lines if isinstance(line, dict)]  # the rest of a truncated line may be a number


def _lines_with(text: bytes, data: bytes) -> bytes:
    """The lines of ``data`` that contain ``text``."""
    found, at = [], data.find(text)
    while at >= 0:
        begin, end = data.rfind(b"\n", 0, at) + 1, data.find(b"\n", at)
        end = len(data) if end < 0 else end
        found.append(data[begin:end])
        at = data.find(text, end)
    return b"\n".join(found)


def read_object(path: Path) -> dict[str, Any] | None:
    """The object in a .json file; None if the file does not exist or contains no object. Raises OSError."""
    try:
        found = json.loads(path.read_text(errors="replace"))
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def finite(values: dict[str, Any]) -> dict[str, Any]:
    """The values for programs that read JSON strictly, which has no NaN and no infinity: None in their place."""
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in values.items()}


def append_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Append objects to a .jsonl file: all of them, or none if the disk is full. A truncated last line stays separate.

    Raises:
        OSError: the lines cannot be written.
    """
    # Without a buffer, because close would write what a failed flush has left in it.
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
    """Remove the lines of a .jsonl file whose ``step`` is greater than ``step``, and a truncated end. This works on a
    full disk as well, because the end of the file is cut off in place.

    Raises:
        OSError: the file cannot be written.
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
    if later:  # lines out of order, which a single writer never produces
        write_atomically(path, b"".join([*lines[:end], *later]))
    elif end < len(lines):
        with open(path, "rb+") as file:
            file.truncate(sum(map(len, lines[:end])))
            os.fsync(file.fileno())


def _step_of(line: bytes) -> int | None:
    """None for a line that is truncated or has no step."""
    with suppress(ValueError):
        found = json.loads(line)
        if isinstance(found, dict) and isinstance(found.get("step"), int):
            return found["step"]
    return None


class JsonLines:
    """A .jsonl file for appending. Lines that cannot be written are kept, and written with the next ones."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._pending: list[dict[str, Any]] = []

    @property
    def pending(self) -> tuple[dict[str, Any], ...]:
        """Lines that are not in the file yet."""
        return tuple(self._pending)

    def add(self, line: dict[str, Any]) -> None:
        """Keep a line for the next ``write``."""
        self._pending.append(line)

    def extend(self, lines: Iterable[dict[str, Any]]) -> None:
        """Keep lines for the next ``write``."""
        self._pending.extend(lines)

    def write(self) -> None:
        """Append pending lines. If that fails, a warning is logged."""
        if not self._pending:
            return
        try:
            append_lines(self.path, self._pending)
            self._pending.clear()
        except OSError as error:
            logger.warning(f"{self.path} cannot be written ({error.strerror}); its lines are kept for the next write")
