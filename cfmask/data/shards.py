"""Shards on disk: plain WebDataset tars, an index beside each, one manifest.

    SET/manifest.json             counts, bytes, sha256, class histogram, classes, store, how it was made
    SET/train-000000.tar          .jpg .cls .json members; any WebDataset reader reads it
    SET/train-000000.index.npz    where each member lies: key, offset, size, crc32

The index lets a loader read any sample with one `pread`. It is written after its tar, so an index that is there
vouches for the tar; the manifest is written last and vouches for the set.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import tarfile
import zlib
from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cfmask.errors import UserError
from cfmask.files import sync, write_atomically

FORMAT = "cfmask-shards"
VERSION = 1
MANIFEST = "manifest.json"
_HOW_TO_MAKE = "`python tools/make_shards.py imagenet|folder --source … --out DIR`"


@dataclass(frozen=True)
class Shard:
    """One tar: file name, number of samples, size in bytes, hex sha256 of the whole file."""

    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a converted set (one split) holds.

    classes: (wnid or folder name, display name) by class id. class_counts: samples by class id.
    store: what the image members are; "original" are the source's bytes. made: how the set was made, for the reader.
    """

    root: Path
    split: str
    store: str
    classes: tuple[tuple[str, str], ...]
    class_counts: tuple[int, ...]
    shards: tuple[Shard, ...]
    bad_samples: int = 0
    made: dict[str, Any] = field(default_factory=dict)

    @functools.cached_property
    def sample_counts(self) -> NDArray[np.int64]:
        """Samples of each shard, (S,) int64."""
        return np.array([shard.samples for shard in self.shards], np.int64)

    @functools.cached_property
    def _ends(self) -> NDArray[np.int64]:
        return np.cumsum(self.sample_counts)

    @property
    def num_samples(self) -> int:
        return int(self._ends[-1])

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def num_bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)

    def locate(self, ids: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Shard number and row inside it of global sample ids, each of the shape of ``ids``."""
        ids = np.asarray(ids, np.int64)
        if ids.size and not (0 <= ids.min() and ids.max() < self.num_samples):
            raise IndexError(f"sample ids {ids.min()} … {ids.max()} of a set of {self.num_samples}")
        shard = np.searchsorted(self._ends, ids, side="right")
        return shard, ids - (self._ends - self.sample_counts)[shard]


def index_path(shard: Path) -> Path:
    return shard.with_suffix(".index.npz")


def load_manifest(set_dir: str | Path) -> Manifest:
    """Read SET/manifest.json and check that every shard and index is there, at its size.

    Raises:
        UserError: one paragraph: what is missing or torn, where, and what makes it whole.
    """
    root = Path(set_dir)
    path = root / MANIFEST
    if not root.is_dir():
        raise UserError(f"There is no folder of shards at {root}. Make one with {_HOW_TO_MAKE}.")
    if not path.is_file():
        splits = sorted(child.parent.name for child in root.glob(f"*/{MANIFEST}"))
        if splits:
            found = ", ".join(str(root / split) for split in splits)
            raise UserError(f"{root} is not a set of shards itself; it holds these sets, name one of them: {found}.")
        if any(root.glob("*.tar")):
            raise UserError(
                f"{root} holds tars but no {MANIFEST}: a conversion that was not finished, or shards made by "
                f"another program. Run the same {_HOW_TO_MAKE} again: it makes only what is missing."
            )
        raise UserError(f"{root} holds no {MANIFEST}, so it is not a set of shards. Make one with {_HOW_TO_MAKE}.")
    try:
        raw = json.loads(path.read_text())
        if raw["format"] != FORMAT:
            raise ValueError(f"format {raw['format']!r}")
        version = raw["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} cannot be read as a manifest of shards ({error!r}). Delete it and run the conversion again: "
            f"finished shards are kept, and the manifest is written anew."
        ) from None
    if version != VERSION:
        raise UserError(
            f"{path} has version {version} of the manifest, this program reads version {VERSION}: "
            f"use the program that made it, or convert again into another folder."
        )
    try:
        manifest = Manifest(
            root=root,
            split=raw["split"],
            store=raw["store"],
            classes=tuple((str(wnid), str(name)) for wnid, name in raw["classes"]),
            class_counts=tuple(int(n) for n in raw["class_counts"]),
            shards=tuple(Shard(**shard) for shard in raw["shards"]),
            bad_samples=raw["bad_samples"],
            made=raw["made"],
        )
        if sum(manifest.class_counts) != manifest.num_samples or len(manifest.class_counts) != manifest.num_classes:
            raise ValueError("class histogram and sample count disagree")
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(
            f"{path} is damaged ({error!r}). Delete it and run the conversion again: finished shards are kept, and "
            f"the manifest is written anew."
        ) from None
    for shard in manifest.shards:
        _check_file(root / shard.name, shard.bytes)
    return manifest


def _check_file(tar: Path, expected: int) -> None:
    try:
        size = tar.stat().st_size
    except OSError as error:
        raise UserError(
            f"Shard {tar} of the manifest beside it cannot be found ({error.strerror}). Copy it again from where the "
            f"set came from, or run the conversion again: it makes only what is missing."
        ) from None
    if size != expected:
        raise UserError(
            f"Shard {tar} has {size} bytes on disk, its manifest says {expected}: it is torn or was replaced. Delete "
            f"it and copy it again from where the set came from, or run the conversion again: it makes what is missing."
        )
    if not index_path(tar).is_file():
        raise UserError(
            f"Shard {tar} has no index {index_path(tar).name} beside it. Copy it again from where the set came from, "
            f"or run the conversion again: it makes only what is missing."
        )


def write_manifest(manifest: Manifest) -> None:
    """Write SET/manifest.json aside, then rename. The bytes depend on the manifest alone, not on time or place."""
    raw = {
        "format": FORMAT,
        "version": VERSION,
        "split": manifest.split,
        "store": manifest.store,
        "num_samples": manifest.num_samples,
        "num_bytes": manifest.num_bytes,
        "bad_samples": manifest.bad_samples,
        "made": manifest.made,
        "shards": [shard.__dict__ for shard in manifest.shards],
        "class_counts": manifest.class_counts,
        "classes": manifest.classes,
    }
    write_atomically(manifest.root / MANIFEST, json.dumps(raw, indent=1).encode())


# --- the index of a shard -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Index:
    """Where the members of a shard lie. Row i's members are ``first[i]`` … ``first[i+1] - 1``.

    keys: (n,) bytes strings, utf-8. first: (n + 1,) int64. extensions: names that ``extension`` (m,) points into.
    offset, size: (m,) int64, of a member's data in the tar. crc32: (m,) uint32.
    about: JSON-able facts of the whole shard: bytes, sha256, class_counts, and what the maker adds.
    """

    keys: NDArray[np.bytes_]
    first: NDArray[np.int64]
    extensions: tuple[str, ...]
    extension: NDArray[np.uint8]
    offset: NDArray[np.int64]
    size: NDArray[np.int64]
    crc32: NDArray[np.uint32]
    about: dict[str, Any]

    def __len__(self) -> int:
        return len(self.keys)


def load_index(tar: Path) -> Index:
    """The index beside a shard.

    Raises:
        UserError: it is missing or cannot be read.
    """
    path = index_path(tar)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return Index(
                keys=arrays["keys"],
                first=arrays["first"],
                extensions=tuple(str(arrays["extensions"]).split()),
                extension=arrays["extension"],
                offset=arrays["offset"],
                size=arrays["size"],
                crc32=arrays["crc32"],
                about=json.loads(str(arrays["about"])),
            )
    except Exception as error:  # zipfile, numpy and json each have their own ways to say "damaged"
        raise UserError(
            f"The index {path} cannot be read ({error!r}). Delete it and run the conversion again, or copy it again "
            f"from where the set came from."
        ) from None


def _write_index(path: Path, index: Index) -> None:
    buffer = io.BytesIO()
    np.savez(
        buffer,
        keys=index.keys,
        first=index.first,
        extensions=np.array(" ".join(index.extensions)),
        extension=index.extension,
        offset=index.offset,
        size=index.size,
        crc32=index.crc32,
        about=np.array(json.dumps(index.about, sort_keys=True)),
    )
    write_atomically(path, buffer.getvalue())


_BLOCK = tarfile.BLOCKSIZE


def write_shard(
    tar: Path, samples: Iterable[tuple[str, dict[str, bytes]]], *, num_classes: int, about: dict[str, Any] | None = None
) -> Index:
    """Write a shard and its index. The bytes are a function of the samples alone: no time, user or host is in them.

    The tar is written aside, fsynced and renamed, then its index: whoever is killed on the way leaves no index, and
    whoever finds an index finds the whole tar.

    Args:
        tar: final path.
        samples: (key, {extension: data}) in order; "cls" holds the class id in ASCII. Keys have no dot.
        about: facts that go into the index beside bytes, sha256 and class_counts; or a dict that is filled while
            ``samples`` is consumed.
    """
    keys: list[bytes] = []
    first = [0]
    extensions: dict[str, int] = {}
    members: list[tuple[int, int, int, int]] = []
    class_counts = [0] * num_classes
    digest = hashlib.sha256()
    aside = tar.with_name(f".{tar.name}.part")
    with open(aside, "wb", buffering=1 << 20) as file:
        position = 0

        def put(data: bytes) -> None:
            nonlocal position
            file.write(data)
            digest.update(data)
            position += len(data)

        for key, fields in samples:
            if "." in key:
                raise ValueError(f"a WebDataset key ends at its first dot: {key!r}")
            for name, data in fields.items():
                info = tarfile.TarInfo(f"{key}.{name}")
                info.size, info.mode = len(data), 0o444
                put(info.tobuf(tarfile.USTAR_FORMAT))
                extension = extensions.setdefault(name, len(extensions))
                members.append((extension, position, len(data), zlib.crc32(data)))
                put(data)
                put(b"\0" * (-len(data) % _BLOCK))
            keys.append(key.encode())
            first.append(len(members))
            class_counts[int(fields["cls"])] += 1
        put(b"\0" * (2 * _BLOCK))  # end-of-archive mark
        put(b"\0" * (-position % tarfile.RECORDSIZE))
        file.flush()
        os.fsync(file.fileno())
    index_path(tar).unlink(missing_ok=True)  # an older index must never vouch for the new tar
    os.replace(aside, tar)
    table = np.array(members, np.int64).reshape(-1, 4)
    index = Index(
        keys=np.array(keys, dtype=np.bytes_),
        first=np.array(first, np.int64),
        extensions=tuple(extensions),
        extension=table[:, 0].astype(np.uint8),
        offset=table[:, 1].copy(),
        size=table[:, 2].copy(),
        crc32=table[:, 3].astype(np.uint32),
        about={
            **(about or {}),
            "samples": len(keys),
            "bytes": position,
            "sha256": digest.hexdigest(),
            "class_counts": {str(c): n for c, n in enumerate(class_counts) if n},
        },
    )
    sync(tar.parent)
    _write_index(index_path(tar), index)
    return index


def shard_of_index(tar: Path, index: Index) -> Shard:
    """The manifest's entry of a shard, from its index."""
    about = index.about
    return Shard(name=tar.name, samples=about["samples"], bytes=about["bytes"], sha256=about["sha256"])


def class_counts_of(indexes: Iterable[Index], num_classes: int) -> tuple[int, ...]:
    """Samples by class id over several shards."""
    total: Counter[int] = Counter()
    for index in indexes:
        total.update({int(c): n for c, n in index.about["class_counts"].items()})
    return tuple(total[c] for c in range(num_classes))


# --- reading --------------------------------------------------------------------------------------------------------


class ShardReader:
    """Samples by global id, by offset. Keeps the most recently used ``max_open`` shards open (file and index).

    Not shared between processes; each makes its own.
    """

    def __init__(self, manifest: Manifest, max_open: int = 64):
        self._manifest = manifest
        self._max_open = max_open
        self._open: OrderedDict[int, tuple[int, Index]] = OrderedDict()

    def read(self, sample_id: int) -> dict[str, Any]:
        """One sample: ``__key__`` and ``__url__`` (path of the shard) as str, and each member's bytes by extension.

        Raises:
            UserError: the shard is gone, torn, or the bytes are not those that were written (CRC); names shard and key.
        """
        shards, rows = self._manifest.locate([sample_id])
        shard, row = int(shards[0]), int(rows[0])
        path = self._manifest.root / self._manifest.shards[shard].name
        descriptor, index = self._shard(shard, path)
        key = index.keys[row].decode()
        members = range(int(index.first[row]), int(index.first[row + 1]))
        begin = int(index.offset[members[0]])
        end = int(index.offset[members[-1]] + index.size[members[-1]])
        try:
            data = _pread(descriptor, end - begin, begin)
        except OSError as error:
            raise UserError(f"Sample {key} of shard {path} cannot be read ({error.strerror}).") from None
        sample: dict[str, Any] = {"__key__": key, "__url__": str(path)}
        for member in members:
            start = int(index.offset[member]) - begin
            content = data[start : start + int(index.size[member])]
            if zlib.crc32(content) != int(index.crc32[member]):
                raise UserError(
                    f"Sample {key} of shard {path} is not what was written ({len(content)} bytes, CRC differs): the "
                    f"file is torn or was changed. Delete it and copy it again from where the set came from, or run "
                    f"the conversion again: it makes only what is missing."
                )
            sample[index.extensions[int(index.extension[member])]] = content
        return sample

    def _shard(self, shard: int, path: Path) -> tuple[int, Index]:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        while len(self._open) >= self._max_open:
            os.close(self._open.popitem(last=False)[1][0])
        index = load_index(path)
        expected = self._manifest.shards[shard]
        if index.about["sha256"] != expected.sha256 or len(index) != expected.samples:
            raise UserError(
                f"The index {index_path(path)} belongs to other contents than the manifest names for {path.name}: two "
                f"conversions were mixed. Copy the whole set again, or delete {path.parent} and convert again."
            )
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise UserError(
                f"Shard {path} cannot be opened ({error.strerror}). Copy it again from where the set came from, or "
                f"run the conversion again: it makes only what is missing."
            ) from None
        self._open[shard] = descriptor, index
        return descriptor, index

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1][0])

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _pread(descriptor: int, size: int, offset: int) -> bytes:
    """``size`` bytes at ``offset``, fewer only at the end of the file (a single read may return less at any time)."""
    parts = []
    while size and (part := os.pread(descriptor, size, offset)):
        parts.append(part)
        size, offset = size - len(part), offset + len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
