"""Shards: plain WebDataset tars, an index beside each, one manifest. In a folder, or behind a URL.

    SET/manifest.json                    counts, bytes, sha256, class histogram, classes, store, how it was made
    SET/train-000000.tar                 .jpg .cls .json members; any WebDataset reader reads it
    SET/train-000000.index.safetensors   of each sample: key, class id; of each member: offset, size, crc32

The index lets a loader read any sample with one `pread`. It is written after its tar, so an index that is there
vouches for the tar; the manifest is written last and vouches for the set.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tarfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import safetensors.numpy
from isal.isal_zlib import crc32
from numpy.typing import ArrayLike, NDArray

from cfmask.data import images, remote
from cfmask.errors import UserError
from cfmask.files import sync, write_atomically
from cfmask.runtime.machine import aside_of
from cfmask.secrets import mask_secrets

FORMAT = "cfmask-shards"
VERSION = 2
MANIFEST = "manifest.json"
_HOW_TO_MAKE = "`python tools/make_shards.py imagenet|folder|… --source … --out DIR`"


@dataclass(frozen=True)
class Shard:
    """One tar: file name, number of samples, size in bytes, hex sha256 of the whole file and of its index.

    sha256 is "" where a shard of another maker was indexed without reading it all.
    """

    name: str
    samples: int
    bytes: int
    sha256: str
    index_sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a converted set (one split) holds.

    root: its folder, or the URL of it (``remote.is_remote``), whose files come through ``cache``.
    classes: (wnid or folder name, display name) by class id. class_counts: samples by class id.
    store: what the image members are; "original" are the source's bytes, the others crops of side ``image_size``.
    border: pixels that a reader has to cut off each side before anything else (ObjectNet's originals).
    accepted: class id → all class ids that are right for it, where those are several (ObjectNet).
    bad_samples: images of the source that were left out. made: how the set was made, for the reader.
    """

    root: Path | str
    split: str
    store: str
    classes: tuple[tuple[str, str], ...]
    class_counts: tuple[int, ...]
    shards: tuple[Shard, ...]
    image_size: int | None = None
    border: int = 0
    accepted: dict[int, tuple[int, ...]] = field(default_factory=dict)
    bad_samples: int = 0
    made: dict[str, Any] = field(default_factory=dict)
    cache: remote.Cache | None = field(default=None, compare=False, repr=False)

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

    @functools.cached_property
    def digest(self) -> str:
        """16 hexadecimal digits that two sets share only if their samples are the same, in the same order; as far as
        sizes tell, for shards that were indexed without reading them all."""
        content = [self.classes, self.class_counts, [(s.samples, s.bytes, s.sha256) for s in self.shards]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    def locate(self, ids: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Shard number and row inside it of global sample ids, each of the shape of ``ids``."""
        ids = np.asarray(ids, np.int64)
        if ids.size and not (0 <= ids.min() and ids.max() < self.num_samples):
            raise IndexError(f"sample ids {ids.min()} … {ids.max()} of a set of {self.num_samples}")
        shard = np.searchsorted(self._ends, ids, side="right")
        return shard, ids - (self._ends - self.sample_counts)[shard]

    def place(self, shard: Shard) -> str:
        """Where a shard is, for people: path or URL."""
        return remote.file_url(self.root, shard.name) if isinstance(self.root, str) else str(self.root / shard.name)

    def open_shard(self, shard: Shard) -> BinaryIO:
        """The tar, unbuffered. Raises OSError or UserError."""
        return self._open(shard.name, shard.bytes, shard.sha256)

    def discard_copy(self, shard: Shard) -> None:
        """Of a shard behind a URL: download it again when it is next opened."""
        if self.cache is not None:
            self.cache.discard(remote.file_url(str(self.root), shard.name), sha256=shard.sha256 or None)

    def open_index(self, shard: Shard) -> Index:
        """The index of a shard, checked against the manifest.

        Raises:
            UserError: it is missing, cannot be read, or belongs to other contents.
        """
        name = index_name(shard.name)
        try:
            with self._open(name, None, shard.index_sha256) as file:
                data = file.read()
        except OSError as error:
            raise UserError(
                f"The index {name} of {self.root} cannot be read ({error.strerror}). {_COPY_AGAIN}"
            ) from None
        index = parse_index(data, f"{self.root}: {name}")
        if hashlib.sha256(data).hexdigest() != shard.index_sha256 or len(index) != shard.samples:
            raise UserError(
                f"The index {name} of {self.root} belongs to other contents than the manifest names for {shard.name}: "
                f"two conversions were mixed. Copy the whole set again, or delete it and convert again."
            )
        return index

    def _open(self, name: str, size: int | None, sha256: str) -> BinaryIO:
        if isinstance(self.root, str):
            assert self.cache is not None
            return self.cache.open(remote.file_url(self.root, name), size=size, sha256=sha256 or None)
        return open(self.root / name, "rb", buffering=0)


_COPY_AGAIN = "Copy it again from where the set came from, or run the conversion again: it makes only what is missing."


def index_name(shard: str) -> str:
    return shard.removesuffix(".tar") + ".index.safetensors"


def index_path(shard: Path) -> Path:
    return shard.with_name(index_name(shard.name))


def find_set(where: str | Path, name: str) -> Path | str:
    """The set ``name`` in a folder of sets, or behind a URL of one."""
    return remote.join(str(where), name) if remote.is_remote(where) else Path(where) / name


def load_sets(
    where: str | Path, names: Iterable[str], *, cache: remote.Cache | None = None, check_files: bool = True
) -> dict[str, Manifest]:
    """Manifests by name, of sets in a folder or behind a URL. Arguments are those of ``load_manifest``; behind a URL
    the cache is by default the node's own.

    Raises:
        UserError: no such set, or (``check_files``) one that is not whole.
    """
    if cache is None and remote.is_remote(where):
        cache = remote.node_cache()
    return {name: load_manifest(find_set(where, name), cache=cache, check_files=check_files) for name in names}


def manifest_if_there(where: str | Path) -> Manifest | None:
    """A set's manifest, without a look at its shards; None where there is none, or it cannot be read from here."""
    try:
        return load_manifest(where, check_files=False)
    except UserError:
        return None


def load_manifest(where: str | Path, *, cache: remote.Cache | None = None, check_files: bool = True) -> Manifest:
    """Read SET/manifest.json and check that every shard and index is there, at its size.

    Args:
        where: folder or URL of the set.
        cache: where files behind a URL go; needed to read samples from one.
        check_files: False leaves out the check of a folder's files: thousands of ranks that look at thousands of
            files each bring a file system down, and a shard that is missing is dealt with when it is due.

    Raises:
        UserError: one paragraph: what is missing or torn, where, and what makes it whole.
    """
    if remote.is_remote(where):
        url = remote.file_url(str(where), MANIFEST)
        return _parse_manifest(remote.read(url), url, str(where), cache)
    root = Path(where)
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
                f"{root} holds tars but no {MANIFEST}. If it is a conversion that was not finished, run the same "
                f"{_HOW_TO_MAKE} again: it makes only what is missing. Shards that another program made get their "
                f"manifest with `python tools/index_shards.py {root}`."
            )
        raise UserError(f"{root} holds no {MANIFEST}, so it is not a set of shards. Make one with {_HOW_TO_MAKE}.")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from None
    manifest = _parse_manifest(data, str(path), root, None)
    if check_files:
        for shard in manifest.shards:
            _check_file(root / shard.name, shard.bytes)
    return manifest


def _parse_manifest(data: bytes, shown: str, root: Path | str, cache: remote.Cache | None) -> Manifest:
    try:
        raw = json.loads(data)
        if raw["format"] != FORMAT:
            raise ValueError(f"format {raw['format']!r}")
        version = raw["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{shown} cannot be read as a manifest of shards ({error!r}). Delete it and run the conversion again: "
            f"finished shards are kept, and the manifest is written anew."
        ) from None
    if version != VERSION:
        raise UserError(
            f"{shown} has version {version} of the manifest, this program reads version {VERSION}: "
            f"use the program that made it, or convert again into another folder."
        )
    try:
        manifest = Manifest(
            root=root,
            split=raw["split"],
            store=raw["store"],
            image_size=raw["image_size"],
            border=raw["border"],
            accepted={int(c): tuple(ids) for c, ids in raw["accepted"].items()},
            classes=tuple((str(wnid), str(name)) for wnid, name in raw["classes"]),
            class_counts=tuple(int(n) for n in raw["class_counts"]),
            shards=tuple(Shard(**shard) for shard in raw["shards"]),
            bad_samples=raw["bad_samples"],
            made=raw["made"],
            cache=cache,
        )
        if sum(manifest.class_counts) != manifest.num_samples or len(manifest.class_counts) != manifest.num_classes:
            raise ValueError("class histogram and sample count disagree")
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(
            f"{shown} is damaged ({error!r}). Delete it and run the conversion again: finished shards are kept, and "
            f"the manifest is written anew."
        ) from None
    return manifest


def _check_file(tar: Path, expected: int) -> None:
    try:
        size = tar.stat().st_size
    except OSError as error:
        raise UserError(
            f"Shard {tar} of the manifest beside it cannot be found ({error.strerror}). {_COPY_AGAIN}"
        ) from None
    if size != expected:
        raise UserError(
            f"Shard {tar} has {size} bytes on disk, its manifest says {expected}: it is torn or was replaced. Delete "
            f"it and copy it again from where the set came from, or run the conversion again: it makes what is missing."
        )
    if not index_path(tar).is_file():
        raise UserError(f"Shard {tar} has no index {index_path(tar).name} beside it. {_COPY_AGAIN}")


def write_manifest(manifest: Manifest) -> None:
    """Write SET/manifest.json aside, then rename. The bytes depend on the manifest alone, not on time or place."""
    raw = {
        "format": FORMAT,
        "version": VERSION,
        "split": manifest.split,
        "store": manifest.store,
        "image_size": manifest.image_size,
        "border": manifest.border,
        "accepted": manifest.accepted,
        "num_samples": manifest.num_samples,
        "num_bytes": manifest.num_bytes,
        "bad_samples": manifest.bad_samples,
        "made": manifest.made,
        "shards": [shard.__dict__ for shard in manifest.shards],
        "class_counts": manifest.class_counts,
        "classes": manifest.classes,
    }
    write_atomically(Path(manifest.root) / MANIFEST, json.dumps(raw, indent=1).encode())


# --- the index of a shard -------------------------------------------------------------------------------------------


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
    return parse_index(_index_bytes(tar), str(index_path(tar)))


def _index_bytes(tar: Path) -> bytes:
    path = index_path(tar)
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"The index {path} cannot be read ({error.strerror}). {_COPY_AGAIN}") from None


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
        raise UserError(f"The index {shown} cannot be read ({error!r}). Delete it, then: {_COPY_AGAIN}") from None


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


_BLOCK = tarfile.BLOCKSIZE


def write_shard(
    tar: Path, samples: Iterable[tuple[str, int, dict[str, bytes]]], *, about: dict[str, Any] | None = None
) -> Index:
    """Write a shard and its index. The bytes are a function of the samples alone: no time, user or host is in them.

    The tar is written aside, fsynced and renamed, then its index: whoever is killed on the way leaves no index, and
    whoever finds an index finds the whole tar.

    Args:
        tar: final path.
        samples: (key, class id, {extension: data}) in order. Keys have no dot.
        about: facts that go into the index beside bytes and sha256; it may be filled while ``samples`` is consumed.

    Raises:
        OSError: it cannot be written. What was written aside is removed, as after any other error.
    """
    aside = aside_of(tar)
    try:
        return _write_shard(tar, aside, samples, about)
    finally:
        aside.unlink(missing_ok=True)


def _write_shard(
    tar: Path, aside: Path, samples: Iterable[tuple[str, int, dict[str, bytes]]], about: dict[str, Any] | None
) -> Index:
    keys: list[bytes] = []
    first = [0]
    extensions: dict[str, int] = {}
    members: list[tuple[int, int, int, int]] = []
    labels: list[int] = []
    digest = hashlib.sha256()
    with open(aside, "wb", buffering=1 << 20) as file:
        position = 0

        def put(data: bytes) -> None:
            nonlocal position
            file.write(data)
            digest.update(data)
            position += len(data)

        for key, label, fields in samples:
            if "." in key:
                raise ValueError(f"a WebDataset key ends at its first dot: {key!r}")
            for name, data in fields.items():
                put(_header(f"{key}.{name}", len(data)))
                extension = extensions.setdefault(name, len(extensions))
                members.append((extension, position, len(data), crc32(data)))
                put(data)
                put(b"\0" * (-len(data) % _BLOCK))
            keys.append(key.encode())
            first.append(len(members))
            labels.append(label)
        put(b"\0" * (2 * _BLOCK))  # end-of-archive mark
        put(b"\0" * (-position % tarfile.RECORDSIZE))
        file.flush()
        os.fsync(file.fileno())
    table = np.array(members, np.int64).reshape(-1, 4)
    index = Index(
        keys=np.array(keys, dtype=np.bytes_),
        labels=np.array(labels, np.int32),
        first=np.array(first, np.int64),
        extensions=tuple(extensions),
        extension=table[:, 0].astype(np.uint8),
        offset=table[:, 1].copy(),
        size=table[:, 2].copy(),
        crc32=table[:, 3].astype(np.uint32),
        about={**(about or {}), "bytes": position, "sha256": digest.hexdigest()},
    )
    if vouched_for(tar) == index.about:
        # Another writer was faster (a job that was requeued while it still ran): to take its index away, even for a
        # moment, would only harm whoever reads it.
        return index
    index_path(tar).unlink(missing_ok=True)  # an older index must never vouch for the new tar
    os.replace(aside, tar)
    sync(tar.parent)
    write_index(index_path(tar), index)
    return index


def _header(name: str, size: int) -> bytes:
    """A USTAR header as tarfile makes it of a regular file of mode 444, in a tenth of its time: a million images have
    three million headers."""
    encoded = name.encode()
    if len(encoded) > 100 or size >= 8**11:
        raise ValueError(f"too long for a tar header: {name!r} ({size} bytes)")
    header = bytearray(_HEADER)
    header[: len(encoded)] = encoded
    header[124:135] = b"%011o" % size
    header[148:156] = b"%06o\0 " % sum(header)  # of all bytes, the checksum's own taken as blanks
    return bytes(header)


def _empty_header() -> bytes:
    info = tarfile.TarInfo()
    info.mode = 0o444
    header = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    header[148:156] = b" " * 8
    return bytes(header)


_HEADER = _empty_header()


def vouched_for(tar: Path) -> dict[str, Any] | None:
    """``about`` of the index of a shard that is there at its full length; None if it is not."""
    try:
        about = load_index(tar).about
        return about if tar.stat().st_size == about["bytes"] else None
    except (UserError, OSError, KeyError):
        return None


def shard_and_index(tar: Path) -> tuple[Shard, Index]:
    """The manifest's entry of a shard, and its index, from the index's file.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    data = _index_bytes(tar)
    index = parse_index(data, str(index_path(tar)))
    digest = hashlib.sha256(data).hexdigest()
    return Shard(tar.name, len(index), index.about["bytes"], index.about["sha256"], digest), index


def class_counts_of(indexes: Iterable[Index], num_classes: int) -> tuple[int, ...]:
    """Samples by class id over several shards."""
    total = np.zeros(num_classes, np.int64)
    for index in indexes:
        total += np.bincount(index.labels, minlength=num_classes)
    return tuple(map(int, total))


# --- reading --------------------------------------------------------------------------------------------------------

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
        sample[self._extension[member]] = self._read(member, target(number, self._size[member]))
        return sample

    def _head(self, row: int) -> dict[str, Any]:
        return {"__key__": self._keys[row], "__url__": self._place, "__label__": self._labels[row]}

    def _read(self, member: int, target: Target) -> memoryview:
        memory, skip, crc = target
        offset, size = self._offset[member] + skip, self._size[member] - skip
        done = os.preadv(self._descriptor, [memory], offset)
        while done < size and (got := os.preadv(self._descriptor, [memory[done:]], offset + done)):
            done += got
        if done < size or (self._crc32 and crc32(memory, crc) != self._crc32[member]):
            raise UserError("its bytes are not those that were written: the file is torn or was changed")
        return memory


class ShardReader:
    """Samples by global id, by offset. Keeps the most recently used ``max_open`` shards open (file and index).

    Threads may share it.
    """

    def __init__(self, manifest: Manifest, max_open: int = 64):
        self._manifest = manifest
        self._max_open = max_open
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self._lock = threading.Lock()
        # Shards whose last read failed: waiting once for each of their thousand samples would help nobody.
        self._doubtful: set[int] = set()

    def read(self, sample_id: int) -> dict[str, Any]:
        """A whole sample as webdataset has it: ``__key__``, ``__url__`` (place of the shard), each member's bytes by
        extension; and ``__label__``, the class id.

        Raises:
            SampleError: after RETRY_S: the shard is gone, torn, or the bytes are not those that were written (CRC).
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
        opened = _OpenShard(file, self._manifest.place(shard), index)
        with self._lock:
            self._open[number] = opened
            while len(self._open) > self._max_open:
                self._open.popitem(last=False)
        return opened

    def _error(self, number: int, row: int, error: Exception) -> SampleError:
        shard = self._manifest.place(self._manifest.shards[number])
        reason = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
        try:
            key = self._manifest.open_index(self._manifest.shards[number]).keys[row].decode()
        except UserError:
            key = ""
        return SampleError(
            f"Sample {key or row} of shard {shard} cannot be read ({reason}). {_COPY_AGAIN}",
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
