"""Samples of a set, read by their place in it."""

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
"""Waits before a read that failed is tried again: a file server that is being failed over answers with errors."""


class SampleError(UserError):
    """A sample that cannot be read or decoded. ``key`` is "" where the shard's index could not be read either."""

    def __init__(self, message: str, *, key: str, shard: str, reason: str):
        super().__init__(message)
        self.key, self.shard, self.reason = key, mask_secrets(shard), mask_secrets(reason)


class Target(NamedTuple):
    """Where a member's bytes are read to. skip: leading bytes that are known beforehand and not read; crc: of those."""

    memory: memoryview
    skip: int = 0
    crc: int = 0


class Scratch:
    """Memory that is used again: a fresh 150 kB each time would be mapped, cleared and unmapped each time."""

    def __init__(self) -> None:
        self._memory = bytearray()

    def target(self, _: int, size: int) -> Target:
        if size > len(self._memory):
            self._memory = bytearray(size)
        return Target(memoryview(self._memory)[:size])


_BLOCK = tarfile.BLOCKSIZE
_LABEL_NEAR = 4 * _BLOCK
"""A label that begins so few bytes behind its image is read with it: in our own shards, the member after it."""


class _OpenShard:
    """A tar and its index, closed when nobody uses it any more: one thread may drop it while another reads."""

    def __init__(self, file: BinaryIO, place: str, index: Index):
        self._file, self._descriptor, self._place = file, file.fileno(), place
        # Lists, because taking a single number out of an array takes longer than reading a block of a file.
        self._image, self._first = index.image.tolist(), index.first.tolist()
        self._offset, self._size, self._crc32 = index.offset.tolist(), index.size.tolist(), index.crc32.tolist()
        self._extension = [index.extensions[i] for i in index.extension]
        self._keys = [key.decode() for key in index.keys.tolist()]
        self._labels = index.labels.tolist()
        self._label_member = [self._label_near(row) for row in range(len(index))] if len(index.crc32) else []

    def _label_near(self, row: int) -> int:
        """The .cls member of a row that lies just behind its image; -1 if there is none."""
        image, members = self._image[row], range(self._first[row], self._first[row + 1])
        for member in members if image >= 0 else ():
            behind = self._offset[member] - self._offset[image] - self._size[image]
            if self._extension[member] == "cls" and _BLOCK <= behind <= _LABEL_NEAR and 0 < self._size[member] <= 16:
                return member
        return -1

    def read(self, row: int) -> dict[str, Any]:
        """A sample with all its members. Raises OSError, or UserError for other bytes than were written."""
        members = range(self._first[row], self._first[row + 1])
        data = {self._extension[m]: bytes(self._read(m, Scratch().target(0, self._size[m]))) for m in members}
        return {**self._head(row), **data}

    def read_image(self, row: int, target: Callable[[int, int], Target], number: int) -> dict[str, Any]:
        """A sample with its image alone, read to ``target(number, size)``. Raises as ``read``."""
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
        """A member's bytes. With ``label``, the .cls member behind it is read along and checked: it costs a kB, and a
        tar that got other labels after it was indexed is found."""
        memory, skip, crc = target
        offset, size = self._offset[member] + skip, self._size[member] - skip
        behind = bytearray(self._offset[label] + self._size[label] - offset - size) if label >= 0 else bytearray()
        done = os.preadv(self._descriptor, [memory, behind], offset)
        if label >= 0 and done < size + len(behind):  # a file system may give less than was asked for
            behind = bytearray(os.pread(self._descriptor, len(behind), offset + size))
        while done < size and (got := os.preadv(self._descriptor, [memory[done:]], offset + done)):
            done += got
        if done < size or (self._crc32 and crc32(memory, crc) != self._crc32[member]):
            raise UserError("its bytes are not those that were written: the file is torn or was changed")
        if label >= 0:
            self._check_label(label, bytes(behind))
        return memory

    def _check_label(self, member: int, behind: bytes) -> None:
        """Compare a .cls member, with which ``behind`` ends, and its size in the tar's header with the index."""
        begin = len(behind) - self._size[member]
        try:
            size = tarfile.nti(behind[begin - _BLOCK :][124:136])  # type: ignore[attr-defined]
            if size == self._size[member] and crc32(behind[begin:]) == self._crc32[member]:
                return
            label = int(behind[begin:])
        except (ValueError, tarfile.HeaderError):
            raise UserError("its label is not the one that was written: the file is torn or was changed") from None
        raise StaleIndex(
            f"A label in {self._place} begins with {label}, and its index has another one (sample "
            f"{self._keys[bisect.bisect_right(self._first, member) - 1]}): the tar was changed after it was indexed"
        )


class ShardReader:
    """Samples by global id, by offset. Keeps the most recently used ``max_open`` shards open (file and index).

    Threads may share it.
    """

    def __init__(self, manifest: Manifest, max_open: int = 64):
        self._manifest = manifest
        self._max_open = max_open
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self._lock = threading.Lock()
        # By shard, the file whose contents are known to be those of the index.
        self._current: dict[int, tuple[int, ...]] = {}
        # Shards whose last read failed: waiting once for each of their thousand samples would help nobody.
        self._doubtful: set[int] = set()

    def read(self, sample_id: int) -> dict[str, Any]:
        """A whole sample as webdataset has it: ``__key__``, ``__url__`` (place of the shard), each member's bytes by
        extension; and ``__label__``, the class id.

        Raises:
            SampleError: after RETRY_S: the shard is gone, torn, or the bytes are not those that were written (CRC).
            StaleIndex: after RETRY_S: the shard has other labels than its index.
        """
        [(number, row)] = zip(*self._manifest.locate([sample_id]), strict=True)
        return self._retry(int(number), int(row), lambda opened: opened.read(int(row)))

    def read_images(
        self, sample_ids: ArrayLike, target: Callable[[int, int], Target] | None = None
    ) -> Iterator[dict[str, Any]]:
        """As ``read``, one sample after the other and of its members the image alone; a sample that cannot be read is
        {"__error__": SampleError}.

        Args:
            target: where image number 0, 1, … of the call goes, by number and size in bytes; by default all go to one
                place, where an image is valid until the next one is asked for.

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
                    self._open.pop(number, None)  # a stale file handle stays stale
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
        # Not under the lock: it may be a download. Two threads may open one shard; one of the two is dropped.
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
        """Refuse a tar of another program that was changed since it was indexed. Its checksums, if there are any, are
        the images': its labels are compared once for each file."""
        status = os.fstat(file.fileno())
        identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        if self._current.get(number) != identity:
            if not is_current(file.fileno(), index):
                place = self._manifest.place(self._manifest.shards[number])
                raise StaleIndex(f"{place} was changed after it was indexed: labels and places of its index are old")
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
