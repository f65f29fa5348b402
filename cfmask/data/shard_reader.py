"""Reads samples of a set by their global ids."""

from __future__ import annotations

import bisect
import os
import tarfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from isal.isal_zlib import crc32
from numpy.typing import ArrayLike

from cfmask.data.shard_index import Index, StaleIndex, is_current
from cfmask.data.shards import Manifest
from cfmask.errors import UserError
from cfmask.secrets import mask_secrets

RETRY_S = (0.1, 0.5, 2.0)
"""Waits before a failed read is repeated: a file server returns errors during a failover."""


class SampleError(UserError):
    """A sample that cannot be read or decoded. ``key`` is "" where the shard's index could not be read either."""

    def __init__(self, message: str, *, key: str, shard: str, reason: str):
        super().__init__(message)
        self.key, self.shard, self.reason = key, mask_secrets(shard), mask_secrets(reason)


class Target(NamedTuple):
    """Memory that a member is read into."""

    memory: memoryview
    skip: int = 0
    """Leading bytes that are known and not read."""
    crc: int = 0
    """CRC of these bytes."""


class Scratch:
    """Memory that is reused: new blocks of 150 kB would be mapped, cleared and unmapped each time."""

    def __init__(self) -> None:
        self._memory = bytearray()

    def target(self, _: int, size: int) -> Target:
        if size > len(self._memory):
            self._memory = bytearray(size)
        return Target(memoryview(self._memory)[:size])


_BLOCK = tarfile.BLOCKSIZE
_LABEL_NEAR = 4 * _BLOCK
"""A label that begins within so many bytes after its image is read with it. In shards of cfmask it is the next
member."""


class _OpenShard:
    """A tar and its index. The file is closed with the last reference: one thread may drop it while another reads."""

    def __init__(self, file: BinaryIO, place: str, index: Index):
        self._file, self._descriptor, self._place = file, file.fileno(), place
        # Lists, because taking one number from an array takes longer than reading a block of a file.
        self._image, self._first = index.image.tolist(), index.first.tolist()
        self._offset, self._size, self._crc32 = index.offset.tolist(), index.size.tolist(), index.crc32.tolist()
        self._extension = [index.extensions[i] for i in index.extension]
        self._keys = [key.decode() for key in index.keys.tolist()]
        self._labels = index.labels.tolist()
        self._label_member = [self._label_near(row) for row in range(len(index))] if len(index.crc32) else []

    def _label_near(self, row: int) -> int:
        """The .cls member that lies just after the image of a row; -1 if there is none."""
        image, members = self._image[row], range(self._first[row], self._first[row + 1])
        for member in members if image >= 0 else ():
            behind = self._offset[member] - self._offset[image] - self._size[image]
            if self._extension[member] == "cls" and _BLOCK <= behind <= _LABEL_NEAR and 0 < self._size[member] <= 16:
                return member
        return -1

    def read(self, row: int) -> dict[str, Any]:
        """A sample with all its members. Raises OSError, or UserError if a checksum differs."""
        members = range(self._first[row], self._first[row + 1])
        data = {self._extension[m]: bytes(self._read(m, Scratch().target(0, self._size[m]))) for m in members}
        return {**self._head(row), **data}

    def read_image(self, row: int, target: Callable[[int, int], Target], number: int) -> dict[str, Any]:
        """A sample with only its image, which is read into ``target(number, size)``. Raises as ``read``."""
        sample = self._head(row)
        member = self._image[row]
        if member < 0:
            raise UserError("it has no image among its members")
        label = self._label_member[row] if self._label_member else -1
        sample[self._extension[member]] = self._read(member, target(number, self._size[member]), label)
        return sample

    def _head(self, row: int) -> dict[str, Any]:
        return {"__key__": self._keys[row], "__url__": self._place, "__label__": self._labels[row]}

    def _read(self, member: int, target: Target, label: int = -1) -> memoryview:
        """A member's bytes. With ``label``, the .cls member after it is read with it and checked. That costs a
        kilobyte, and detects a tar whose labels were changed after it was indexed."""
        memory, skip, crc = target
        offset, size = self._offset[member] + skip, self._size[member] - skip
        behind = bytearray(self._offset[label] + self._size[label] - offset - size) if label >= 0 else bytearray()
        done = os.preadv(self._descriptor, [memory, behind], offset)
        if label >= 0 and done < size + len(behind):  # a file system may return less than requested
            behind = bytearray(os.pread(self._descriptor, len(behind), offset + size))
        while done < size and (got := os.preadv(self._descriptor, [memory[done:]], offset + done)):
            done += got
        if done < size or (self._crc32 and crc32(memory, crc) != self._crc32[member]):
            raise UserError("its checksum differs: the file is truncated or was changed")
        if label >= 0:
            self._check_label(label, bytes(behind))
        return memory

    def _check_label(self, member: int, behind: bytes) -> None:
        """Compare the .cls member at the end of ``behind``, and its size in the tar's header, with the index."""
        begin = len(behind) - self._size[member]
        try:
            size = tarfile.nti(behind[begin - _BLOCK :][124:136])  # type: ignore[attr-defined]
            if size == self._size[member] and crc32(behind[begin:]) == self._crc32[member]:
                return
            label = int(behind[begin:])
        except (ValueError, tarfile.HeaderError):
            raise UserError("the checksum of its label differs: the file is truncated or was changed") from None
        raise StaleIndex(
            f"A label in {self._place} begins with {label} and differs from the index (sample "
            f"{self._keys[bisect.bisect_right(self._first, member) - 1]}): the tar was changed after it was indexed"
        )


class ShardReader:
    """Reads samples by global id, and keeps the ``max_open`` most recently used shards open. Threads may share it."""

    def __init__(self, manifest: Manifest, max_open: int = 64):
        self._manifest = manifest
        self._max_open = max_open
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self._lock = threading.Lock()
        # Identity of the file, by shard, that was found to match its index.
        self._current: dict[int, tuple[int, ...]] = {}
        # Shards whose last read failed: reads are not repeated for each of their samples.
        self._doubtful: set[int] = set()

    def read(self, sample_id: int) -> dict[str, Any]:
        """A whole sample in webdataset's form: ``__key__``, ``__url__`` (of the shard), and each member's bytes by
        extension; and ``__label__``, the class id.

        Raises:
            SampleError: after RETRY_S, a missing or truncated shard, or a CRC that differs.
            StaleIndex: after RETRY_S, other labels than those of the index.
        """
        [(number, row)] = zip(*self._manifest.locate([sample_id]), strict=True)
        return self._retry(int(number), int(row), lambda opened: opened.read(int(row)))

    def read_images(
        self, sample_ids: ArrayLike, target: Callable[[int, int], Target] | None = None
    ) -> Iterator[dict[str, Any]]:
        """Yield samples as ``read``, with only their images. A sample that cannot be read is {"__error__":
        SampleError}.

        Args:
            target: returns the memory for an image, by its number in this call and its size in bytes. By default all
                images share memory: one is valid until the next is requested.

        Raises:
            StaleIndex: as ``read``.
        """
        place = target or Scratch().target
        rows = zip(*map(np.ndarray.tolist, self._manifest.locate(sample_ids)), strict=True)
        for n, (number, row) in enumerate(rows):
            try:
                yield self._retry(number, row, partial(_OpenShard.read_image, row=row, target=place, number=n))
            except SampleError as error:
                yield {"__error__": error}

    def _retry(self, number: int, row: int, read: Callable[[_OpenShard], dict[str, Any]]) -> dict[str, Any]:
        waits = () if number in self._doubtful else RETRY_S
        for wait in (*waits, None):
            try:
                sample = read(self._shard(number))
                self._doubtful.discard(number)
                return sample
            except (OSError, UserError) as error:
                with self._lock:
                    self._open.pop(number, None)  # a stale file handle would stay stale
                self._manifest.discard_copy(self._manifest.shards[number])
                if wait is None:
                    if isinstance(error, StaleIndex):
                        raise StaleIndex(f"{error}. {self._manifest.remedy}") from None
                    self._doubtful.add(number)
                    raise self._error(number, row, error) from None
                time.sleep(wait)
        raise AssertionError

    def _shard(self, number: int) -> _OpenShard:
        with self._lock:
            if number in self._open:
                self._open.move_to_end(number)
                return self._open[number]
        # Not under the lock, because it may be a download. Two threads may open the same shard; one is dropped.
        shard = self._manifest.shards[number]
        file, index = self._manifest.open_shard(shard), self._manifest.open_index(shard)
        if self._manifest.is_indexed:
            self._check_current(number, file, index)
        opened = _OpenShard(file, self._manifest.place(shard), index)
        with self._lock:
            self._open[number] = opened
            while len(self._open) > self._max_open:
                self._open.popitem(last=False)
        return opened

    def _check_current(self, number: int, file: BinaryIO, index: Index) -> None:
        """Raises StaleIndex if a tar of another program was changed since it was indexed. It has no checksums of
        labels, so this is checked once for each file."""
        status = os.fstat(file.fileno())
        identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        if self._current.get(number) != identity:
            if not is_current(file.fileno(), index):
                place = self._manifest.place(self._manifest.shards[number])
                raise StaleIndex(f"{place} was changed after it was indexed, so its index is outdated")
            self._current[number] = identity

    def _error(self, number: int, row: int, error: Exception) -> SampleError:
        shard = self._manifest.place(self._manifest.shards[number])
        reason = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
        try:
            key = self._manifest.open_index(self._manifest.shards[number]).keys[row].decode()
        except UserError:
            key = ""
        return SampleError(
            f"Sample {key or row} of shard {shard} cannot be read ({reason}). {self._manifest.remedy}",
            key=key,
            shard=shard,
            reason=reason,
        )

    def close(self) -> None:
        with self._lock:
            self._open.clear()

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
