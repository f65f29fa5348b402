"""Where the bytes of one file of a source are, and how they are read.

A plan names a million of them and each process that makes a shard gets its thousand by pickle, so they are small, and
reading one takes nothing but itself: no archive is listed twice.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

from cfmask.errors import UserError


class SourceBytes(Protocol):
    """The bytes of one file of a source.

    path: file on disk that holds them. size: their number, known without reading them; the plan depends on it.
    """

    @property
    def path(self) -> str: ...

    @property
    def size(self) -> int: ...

    def read(self) -> bytes:
        """The bytes.

        Raises:
            UserError: they cannot be read, are damaged, or the file on disk is not the one that was listed.
        """
        ...


class SourceFile(NamedTuple):
    """A file on disk as it was when the source was listed. size: bytes; mtime_ns: time of its last change."""

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
            UserError: the file cannot be opened or read, or it changed since it was listed (also while it was read).
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
                f"The source {self.path} cannot be read ({error.strerror}). Mend that, then run the same command "
                f"again: finished shards are kept."
            ) from None
        if (now.st_size, now.st_mtime_ns) != (self.size, self.mtime_ns):
            raise self.changed("size" if now.st_size != self.size else "time of change")

    def changed(self, what: str) -> UserError:
        return UserError(
            f"The source {self.path} changed since it was listed: its {what} is another. Finished shards are kept, "
            f"and the same command makes the rest; convert from a source that nobody writes to."
        )

    def read(self, offset: int, size: int) -> bytes:
        """Bytes from ``offset`` on. Raises: UserError, as ``opened``."""
        with self.opened() as descriptor:
            data = read_at(descriptor, offset, size)
        if len(data) < size:
            raise self.changed("size")
        return data


def read_at(descriptor: int, offset: int, size: int) -> bytes:
    """``size`` bytes at ``offset``, fewer where the file ends. Raises: OSError."""
    data = os.pread(descriptor, size, offset)
    while len(data) < size and (more := os.pread(descriptor, size - len(data), offset + len(data))):
        data += more  # a file system may give less than was asked for, though most never do
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
"""Methods of compression of zip entries that are read."""

_LOCAL_HEADER = struct.Struct("<4s5H3I2H")


class ZipEntry(NamedTuple):
    """A file in a zip archive, found by its offset.

    offset: of its local header. stored: bytes that it takes in the archive. size: bytes of the file. method: STORED or
    DEFLATED. crc: CRC-32 of the file's bytes.
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
            begins = len(header) == _LOCAL_HEADER.size and header.startswith(b"PK\3\4")
            if begins:
                *_, name_length, extra_length = _LOCAL_HEADER.unpack(header)
                start = self.offset + _LOCAL_HEADER.size + name_length + extra_length
                data = read_at(descriptor, start, self.stored)
        if not begins:
            raise self._damaged("no entry begins there")
        if self.method == DEFLATED:
            try:
                # One byte more than there should be is enough to know; a bomb is not unpacked.
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, self.size + 1)
            except zlib.error as error:
                raise self._damaged(str(error)) from None
        if len(data) != self.size or zlib.crc32(data) != self.crc:
            raise self._damaged("its size or CRC is not the one that the archive's directory names")
        return data

    def _damaged(self, why: str) -> UserError:
        return UserError(
            f"The zip archive {self.path} is damaged: the entry at byte {self.offset} cannot be read ({why}). Download "
            f"or copy it again; finished shards are kept."
        )
