"""Byte ranges of files on disk: a whole file, a member of a tar, an entry of a zip archive.

A conversion plan holds a million of them, and each worker process receives its share by pickle. They are therefore
small, and reading one needs no other object: no archive is listed twice.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from cfmask.errors import UserError


class SourceFile(NamedTuple):
    """A file on disk as it was when it was listed.

    path: absolute, or relative to the working directory.
    size: in bytes.
    mtime_ns: time of the last change.
    """

    path: str
    size: int
    mtime_ns: int

    @classmethod
    def listed(cls, path: str | Path) -> SourceFile:
        """Raises: OSError."""
        return cls.of(path, os.stat(path))

    @classmethod
    def of(cls, path: str | Path, status: os.stat_result) -> SourceFile:
        return cls(str(path), status.st_size, status.st_mtime_ns)

    @contextmanager
    def opened(self) -> Iterator[int]:
        """A file descriptor for reading.

        Raises:
            UserError: the file cannot be opened or read, or it changed between its listing and the end of the block.
        """
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                yield descriptor
                now = os.fstat(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise UserError(
                f"The source {self.path} cannot be read ({error.strerror}). Make it readable, then run the same "
                f"command again: finished work is kept."
            ) from None
        if (now.st_size, now.st_mtime_ns) != (self.size, self.mtime_ns):
            raise self._changed("size" if now.st_size != self.size else "modification time")

    def _changed(self, what: str) -> UserError:
        return UserError(
            f"The source {self.path} changed since it was listed: its {what} differs. Use a source that nobody writes "
            f"to, and run the same command again: finished work is kept."
        )

    def read(self, offset: int, size: int) -> bytes:
        """``size`` bytes from ``offset``. Raises: UserError, as ``opened``."""
        with self.opened() as descriptor:
            data = read_at(descriptor, offset, size)
        if len(data) < size:
            raise self._changed("size")
        return data


def read_at(descriptor: int, offset: int, size: int) -> bytes:
    """``size`` bytes at ``offset``, fewer at the end of the file. Raises: OSError."""
    data = os.pread(descriptor, size, offset)
    while len(data) < size and (more := os.pread(descriptor, size - len(data), offset + len(data))):
        data += more  # some network file systems return fewer bytes than requested
    return data


class Blob(NamedTuple):
    """``size`` bytes at ``offset`` of a file: a whole file, or a member of a tar (or of a tar in a tar)."""

    file: SourceFile
    offset: int
    size: int

    @classmethod
    def whole(cls, file: SourceFile) -> Blob:
        return cls(file, 0, file.size)

    @property
    def path(self) -> str:
        return self.file.path

    def read(self) -> bytes:
        return self.file.read(self.offset, self.size)


STORED, DEFLATED = 0, 8
"""Compression methods of zip entries that can be read."""

_LOCAL_HEADER = struct.Struct("<4s5H3I2H")


class ZipEntry(NamedTuple):
    """A file in a zip archive. ``zipfile`` would read the archive's directory again in each process.

    offset: of its local header.
    stored: bytes that it takes in the archive.
    size: bytes of the file.
    method: STORED or DEFLATED.
    crc: CRC-32 of the file's bytes.
    """

    file: SourceFile
    offset: int
    stored: int
    size: int
    method: int
    crc: int

    @property
    def path(self) -> str:
        return self.file.path

    def read(self) -> bytes:
        data = b""
        with self.file.opened() as descriptor:
            header = read_at(descriptor, self.offset, _LOCAL_HEADER.size)
            is_entry = len(header) == _LOCAL_HEADER.size and header.startswith(b"PK\3\4")
            if is_entry:
                *_, name_length, extra_length = _LOCAL_HEADER.unpack(header)
                start = self.offset + _LOCAL_HEADER.size + name_length + extra_length
                data = read_at(descriptor, start, self.stored)
        if not is_entry:
            raise self._damaged("no local header")
        if self.method == DEFLATED:
            try:
                # One byte more than expected proves a wrong size without unpacking a decompression bomb.
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, self.size + 1)
            except zlib.error as error:
                raise self._damaged(str(error)) from None
        if len(data) != self.size or zlib.crc32(data) != self.crc:
            raise self._damaged("wrong size or CRC")
        return data

    def _damaged(self, why: str) -> UserError:
        return UserError(
            f"The zip archive {self.path} is damaged: its entry at byte {self.offset} cannot be read ({why}). Download "
            f"it again, then run the same command: finished work is kept."
        )


class Absent(NamedTuple):
    """Replaces the bytes of a file that has a name but no bytes, such as a dangling link. why: the reason, in words."""

    path: str
    why: str

    @property
    def size(self) -> int:
        return 0

    def read(self) -> bytes:
        raise UserError(f"{self.path} cannot be read: it is {self.why}.")


SourceBytes = Blob | ZipEntry | Absent
"""The bytes of one file of a source. ``read`` raises UserError if they cannot be read, are damaged or have changed."""
