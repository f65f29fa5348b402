"""The index beside a shard: where the members of each sample lie, and its class id.

A tar that was changed since it was indexed has to be found, or its old labels would be used. Our own shards have a
checksum of every member, labels included, which readers compare (shard_reader.py). Shards of other programs may have
none: their index holds a digest of the tar's headers and labels (``frame_digest``).
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from cfmask.data import images
from cfmask.errors import UserError
from cfmask.runtime.files import write_atomically

INDEXED_BY = "index_shards"
"""Maker, in a manifest's ``made`` and in an index's ``about``, of indexes of shards that another program wrote."""

COPY_AGAIN = (
    "Delete it and copy it again from where the set came from, or run the conversion again: it makes what is missing."
)
INDEX_AGAIN = (
    "If the shard was changed on purpose, run tools/index_shards.py on the folder again, which reads the labels anew; "
    "if not, get the shard again from where it came from first."
)


def index_name(shard: str) -> str:
    return shard.removesuffix(".tar") + ".index.safetensors"


def index_path(shard: Path) -> Path:
    return shard.with_name(index_name(shard.name))


@dataclass(frozen=True)
class Index:
    """Where the members of a shard lie. Row i's members are ``first[i]`` … ``first[i+1] - 1``.

    keys: (n,) bytes strings, utf-8. labels: (n,) int32 class ids. first: (n + 1,) int64. extensions: names that
    ``extension`` (m,) points into. offset, size: (m,) int64, of a member's data in the tar. crc32: (m,) uint32, or (0,)
    where a shard of another maker was indexed without reading it all.
    about: JSON-able facts of the whole shard: bytes, sha256, and what the maker adds.
    """

    keys: NDArray[np.bytes_]
    labels: NDArray[np.int32]
    first: NDArray[np.int64]
    extensions: tuple[str, ...]
    extension: NDArray[np.uint8]
    offset: NDArray[np.int64]
    size: NDArray[np.int64]
    crc32: NDArray[np.uint32]
    about: dict[str, Any]

    def __len__(self) -> int:
        return len(self.keys)

    @functools.cached_property
    def image(self) -> NDArray[np.int64]:
        """(n,) the member that is each row's image; -1 where a row has none."""
        is_image = np.isin(self.extension, [i for i, name in enumerate(self.extensions) if name in images.MEMBERS])
        members = np.flatnonzero(is_image)
        at = np.searchsorted(members, self.first[:-1])
        found = np.append(members, np.iinfo(np.int64).max)[at]
        return np.where(found < self.first[1:], found, -1)


def load_index(tar: Path) -> Index:
    """The index beside a shard.

    Raises:
        UserError: it is missing or cannot be read.
    """
    return parse_index(read_index(tar), str(index_path(tar)))


def read_index(tar: Path) -> bytes:
    path = index_path(tar)
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"The index {path} cannot be read ({error.strerror}). {COPY_AGAIN}") from None


def parse_index(data: bytes, shown: str) -> Index:
    """The index whose file has these bytes; ``shown`` is its name in errors.

    Raises:
        UserError: it cannot be read.
    """
    try:
        arrays = safetensors.numpy.load(data)
        facts = json.loads(arrays["facts"].tobytes())
        keys = arrays["keys"]
        return Index(
            keys=keys.view(f"S{keys.shape[1]}").reshape(-1),
            labels=arrays["labels"],
            first=arrays["first"],
            extensions=tuple(facts["extensions"]),
            extension=arrays["extension"],
            offset=arrays["offset"],
            size=arrays["size"],
            crc32=arrays["crc32"],
            about=facts["about"],
        )
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"The index {shown} cannot be read ({error!r}). {COPY_AGAIN}") from None


class StaleIndex(UserError):
    """A tar is not the one that its index was made of, so the index's labels may be wrong."""


def frame_digest(descriptor: int, index: Index) -> str:
    """Hex sha256 of all that an open tar has beside the data of images and texts: headers, .cls and .json members, end
    mark. Two tars with the same one have the same labels, keys and offsets. Reads a few kB a sample.

    Raises:
        OSError: the tar cannot be read.
    """
    digest = hashlib.sha256()
    labels = [number for number, name in enumerate(index.extensions) if name in ("cls", "json")]
    data = np.flatnonzero(~np.isin(index.extension, labels))
    data = data[np.argsort(index.offset[data], kind="stable")]
    size = os.fstat(descriptor).st_size
    starts, ends = index.offset[data], index.offset[data] + index.size[data]
    at = 0
    for start, end in zip([*starts.tolist(), size], [*ends.tolist(), size], strict=True):
        while at < start and (part := os.pread(descriptor, min(start - at, 1 << 20), at)):
            digest.update(part)
            at += len(part)
        at = end
    digest.update(b"%d" % size)
    return digest.hexdigest()


def stamp(status: os.stat_result, *, now: float) -> dict[str, int]:
    """What tells cheaply that a tar has not changed since it was indexed: an entry of an index's ``about``.

    A tar that changed less than two seconds before ``now``, the time before its first byte was read, gets no time of
    change: file systems count time in steps of up to that, and a second change in one step would not show.
    """
    changed = status.st_ctime_ns if now - status.st_ctime > 2 else 0
    return {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns, "ctime_ns": changed}


def is_current(descriptor: int, index: Index) -> bool:
    """Whether an open tar of another program has the labels, keys and offsets that its index says.

    A copy, a move or ``chmod`` changes the times of a tar, not its contents; and times can be set. So times are only
    believed where all agree, and where not, the contents are compared.
    """
    status, about = os.fstat(descriptor), index.about
    if status.st_size != about.get("bytes"):
        return False
    times = (status.st_mtime_ns, status.st_ctime_ns)
    if "frame" not in about:  # of an earlier version
        return times[0] == about.get("mtime_ns")
    return times == (about.get("mtime_ns"), about.get("ctime_ns")) or frame_digest(descriptor, index) == about["frame"]


def write_index(path: Path, index: Index) -> None:
    """Write aside, then rename. The bytes depend on the index alone.

    safetensors, not npz: numpy parses an array's header with the module ast, which in CPython 3.11 fails now and then
    when two threads use it.
    """
    facts = json.dumps({"extensions": index.extensions, "about": index.about}, sort_keys=True)
    keys = index.keys.astype(np.bytes_)
    arrays: dict[str, NDArray[Any]] = {
        "keys": keys.view(np.uint8).reshape(len(keys), keys.dtype.itemsize),
        "labels": index.labels,
        "first": index.first,
        "extension": index.extension,
        "offset": index.offset,
        "size": index.size,
        "crc32": index.crc32,
        "facts": np.frombuffer(facts.encode(), np.uint8),
    }
    write_atomically(path, safetensors.numpy.save(arrays))
