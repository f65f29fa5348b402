"""The index beside a shard: the class id of each sample, and the place of its members.

A tar that was changed after it was indexed must be detected, or old labels would be used. Shards that cfmask wrote have
a checksum of every member, including labels, which readers compare (shard_reader.py). Shards of other programs may have
none; their index has a digest of the tar's headers and labels (``frame_digest``).
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
"""The tool in a manifest's ``made`` and an index's ``about``, for shards that another program wrote."""

COPY_AGAIN = (
    "Delete it and copy it again from the set's source, or run the conversion again, which makes what is missing."
)
INDEX_AGAIN = (
    "If the shard was changed on purpose, run tools/index_shards.py on the folder, which reads the labels again. If "
    "not, copy the shard again from its source first."
)


def index_name(shard: str) -> str:
    return shard.removesuffix(".tar") + ".index.safetensors"


def index_path(shard: Path) -> Path:
    return shard.with_name(index_name(shard.name))


@dataclass(frozen=True)
class Index:
    """n samples and their m members. The members of row i are ``first[i]`` … ``first[i+1] - 1``."""

    keys: NDArray[np.bytes_]
    """(n,) UTF-8."""
    labels: NDArray[np.int32]
    """(n,) class ids."""
    first: NDArray[np.int64]
    """(n + 1,)."""
    extensions: tuple[str, ...]
    """Names that ``extension`` refers to."""
    extension: NDArray[np.uint8]
    """(m,)."""
    offset: NDArray[np.int64]
    """(m,) of a member's data in the tar, like ``size``."""
    size: NDArray[np.int64]
    crc32: NDArray[np.uint32]
    """(m,), or (0,) if a shard of another program was indexed without reading all of it."""
    about: dict[str, Any]
    """Facts of the shard for JSON: bytes, sha256, and others."""

    def __len__(self) -> int:
        return len(self.keys)

    @functools.cached_property
    def image(self) -> NDArray[np.int64]:
        """(n,) the image member of each row; -1 for a row without one."""
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
    """Parse the bytes of an index. ``shown``: its name in errors.

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
    """A tar was changed after it was indexed, so the labels of the index may be wrong."""


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
    """Size and times of a tar, for an index's ``about``: a cheap check that the tar was not changed.

    ``now`` is the time before its first byte was read. A tar that changed less than two seconds before gets no time of
    change: file systems have steps of up to that, and a second change within a step would not show.
    """
    changed = status.st_ctime_ns if now - status.st_ctime > 2 else 0
    return {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns, "ctime_ns": changed}


def is_current(descriptor: int, index: Index) -> bool:
    """Whether an open tar of another program still has the labels, keys and offsets of its index.

    A copy, a move or ``chmod`` changes the times of a tar but not its contents, and times can be set. So contents are
    compared unless all times agree.
    """
    status, about = os.fstat(descriptor), index.about
    if status.st_size != about.get("bytes"):
        return False
    times = (status.st_mtime_ns, status.st_ctime_ns)
    if "frame" not in about:  # of an earlier version
        return times[0] == about.get("mtime_ns")
    return times == (about.get("mtime_ns"), about.get("ctime_ns")) or frame_digest(descriptor, index) == about["frame"]


def write_index(path: Path, index: Index) -> None:
    """Write an index atomically. Its bytes depend only on the index.

    The format is safetensors and not npz, because numpy parses headers with ``ast``, which in CPython 3.11 sometimes
    fails in two threads.
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
