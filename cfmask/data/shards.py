"""Sets of shards: WebDataset tars, an index beside each, and a manifest; in a folder, or behind a URL.

    SET/manifest.json                    counts, bytes, sha256, class histogram, classes, store, how it was made
    SET/train-000000.tar                 .jpg .cls .json members; any WebDataset reader reads it
    SET/train-000000.index.safetensors   key and class id of each sample; offset, size and crc32 of each member

With the index, a loader reads any sample by one `pread`; webdataset itself reads a tar only from its beginning. An
index is written after its tar, and the manifest after everything else: if they exist, what they describe is complete.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cfmask import urls
from cfmask.data import remote
from cfmask.data.shard_index import COPY_AGAIN, INDEX_AGAIN, INDEXED_BY, Index, index_name, index_path, parse_index
from cfmask.errors import UserError, did_you_mean, did_you_mean_path
from cfmask.runtime.files import write_atomically

FORMAT = "cfmask-shards"
VERSION = 2
MANIFEST = "manifest.json"
_HOW_TO_MAKE = "`python tools/make_shards.py imagenet|folder|… --source … --out DIR`"


@dataclass(frozen=True)
class Shard:
    """One tar of a set."""

    name: str
    """File name."""
    samples: int
    bytes: int
    sha256: str
    """Hex digest of the file; "" if a shard of another program was indexed without reading all of it."""
    index_sha256: str
    """Hex digest of its index."""


@dataclass(frozen=True)
class Manifest:
    """The contents of a set (one split)."""

    root: Path | str
    """Its folder, or its URL (``urls.is_remote``)."""
    split: str
    store: str
    """What image members are: images.ORIGINAL, the source's bytes; or crops, images.CROP_JPEG or images.CROP_RAW."""
    classes: tuple[tuple[str, str], ...]
    """(wnid or folder name, display name) by class id."""
    class_counts: tuple[int, ...]
    """Samples by class id."""
    shards: tuple[Shard, ...]
    image_size: int | None = None
    """Side of crops."""
    border: int = 0
    """Pixels to cut off each side before anything else (ObjectNet's originals)."""
    accepted: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """All class ids that are right for a class id, if there are several (ObjectNet)."""
    bad_samples: int = 0
    """Images of the source that were left out."""
    made: dict[str, Any] = field(default_factory=dict)
    """How the set was made."""
    cache: remote.Cache | None = field(default=None, compare=False, repr=False)
    """For files behind a URL."""

    @property
    def is_indexed(self) -> bool:
        """Whether the tars were written by another program, and indexed."""
        return self.made.get("tool") == INDEXED_BY

    @property
    def remedy(self) -> str:
        """What to do about a missing or wrong file of the set."""
        return INDEX_AGAIN if self.is_indexed else COPY_AGAIN

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
        """16 hexadecimal digits. Equal digests mean the same samples in the same order; for shards that were indexed
        without reading all of them, the same keys, labels and sizes."""
        content: list[Any] = [self.classes, self.class_counts, [(s.samples, s.bytes, s.sha256) for s in self.shards]]
        if self.is_indexed and "samples_sha256" in self.made:
            content.append(self.made["samples_sha256"])
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    def locate(self, ids: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Shard number, and row in the shard, of global sample ids; both have the shape of ``ids``."""
        ids = np.asarray(ids, np.int64)
        if ids.size and not (0 <= ids.min() and ids.max() < self.num_samples):
            raise IndexError(f"sample ids {ids.min()} … {ids.max()} of a set of {self.num_samples}")
        shard = np.searchsorted(self._ends, ids, side="right")
        return shard, ids - (self._ends - self.sample_counts)[shard]

    def place(self, shard: Shard) -> str:
        """Path or URL of a shard, for messages."""
        return urls.file_url(self.root, shard.name) if isinstance(self.root, str) else str(self.root / shard.name)

    def open_shard(self, shard: Shard) -> BinaryIO:
        """The tar, unbuffered. Raises OSError or UserError."""
        return self._open(shard.name, shard.bytes, shard.sha256)

    def discard_copy(self, shard: Shard) -> None:
        """Download a shard behind a URL again when it is next opened."""
        if self.cache is not None:
            self.cache.discard(urls.file_url(str(self.root), shard.name), sha256=shard.sha256 or None)

    def open_index(self, shard: Shard) -> Index:
        """The index of a shard, checked against the manifest.

        Raises:
            UserError: it is missing, cannot be read, or is that of another shard.
        """
        name = index_name(shard.name)
        try:
            with self._open(name, None, shard.index_sha256) as file:
                data = file.read()
        except OSError as error:
            raise UserError(
                f"The index {name} of {self.root} cannot be read ({error.strerror}). {self.remedy}"
            ) from None
        index = parse_index(data, f"{self.root}: {name}")
        if hashlib.sha256(data).hexdigest() != shard.index_sha256 or len(index) != shard.samples:
            raise UserError(
                f"The index {name} of {self.root} differs from the manifest's entry for {shard.name}: files of two "
                f"conversions were mixed. "
                + (self.remedy if self.is_indexed else "Copy the whole set again, or delete it and convert again.")
            )
        return index

    def _open(self, name: str, size: int | None, sha256: str) -> BinaryIO:
        if isinstance(self.root, str):
            assert self.cache is not None
            return self.cache.open(urls.file_url(self.root, name), size=size, sha256=sha256 or None)
        return open(self.root / name, "rb", buffering=0)


def find_set(where: str | Path, name: str) -> Path | str:
    """The path or URL of the set ``name`` in a folder of sets."""
    return urls.join(str(where), name) if urls.is_remote(where) else Path(where) / name


def load_sets(
    where: str | Path, names: Iterable[str], *, cache: remote.Cache | None = None, check_files: bool = True
) -> dict[str, Manifest]:
    """Manifests of sets in a folder or behind a URL, by name. Arguments are those of ``load_manifest``; the default
    cache is the node's.

    Raises:
        UserError: a missing set, or (with ``check_files``) an incomplete one.
    """
    if cache is None and urls.is_remote(where):
        cache = remote.node_cache()
    return {name: load_manifest(find_set(where, name), cache=cache, check_files=check_files) for name in names}


def manifest_if_there(where: str | Path) -> Manifest | None:
    """The manifest of a set, without a check of its shards; None if it cannot be read."""
    try:
        return load_manifest(where, check_files=False)
    except UserError:
        return None


def _why_no_folder(root: Path) -> str:
    """The error of a set whose folder does not exist."""
    if store := next((part for part in root.parts if part in ("s3:", "gs:", "az:", "hdfs:")), None):
        return f"{store}// URLs are read by a command that prints a file, as in `{urls.EXAMPLE}`."
    missing = f"There is no folder of shards at {root}."
    if (root.parent / MANIFEST).is_file():
        return f"{missing} {root.parent} is a set itself: give the folder of the sets, {root.parent.parent}."
    others = sorted(path.parent.name for path in root.parent.glob(f"*/{MANIFEST}"))
    there = f" {root.parent} has {', '.join(others)}." if others else ""
    near = did_you_mean(root.name, others) or did_you_mean_path(root.parent) or did_you_mean_path(root)
    return f"{missing}{near}{there} Make one with {_HOW_TO_MAKE}."


def load_manifest(where: str | Path, *, cache: remote.Cache | None = None, check_files: bool = True) -> Manifest:
    """Read SET/manifest.json, and check that every shard has its size and an index.

    Args:
        where: folder or URL of the set.
        cache: for files behind a URL; needed to read samples.
        check_files: check the files of a folder. Ranks do not: thousands of ranks that check thousands of files would
            overload a file system, and a missing shard is handled when its samples are read.

    Raises:
        UserError: a missing or damaged file, and what to do about it.
    """
    if urls.is_remote(where):
        url = urls.file_url(str(where), MANIFEST)
        return _parse_manifest(remote.read(url), url, str(where), cache)
    root = Path(where)
    path = root / MANIFEST
    if not root.is_dir():
        raise UserError(_why_no_folder(root))
    if not path.is_file():
        splits = sorted(child.parent.name for child in root.glob(f"*/{MANIFEST}"))
        if splits:
            found = ", ".join(str(root / split) for split in splits)
            raise UserError(f"{root} is not a set of shards but holds several. Give one of them: {found}.")
        if any(root.glob("*.tar")):
            raise UserError(
                f"{root} holds tars but no {MANIFEST}. If a conversion was interrupted, run the same {_HOW_TO_MAKE} "
                f"again: it makes only what is missing. If another program wrote the shards, index them with "
                f"`python tools/index_shards.py {shlex.quote(str(root))}`."
            )
        raise UserError(f"{root} holds no {MANIFEST}, so it is not a set of shards. Make one with {_HOW_TO_MAKE}.")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from None
    manifest = _parse_manifest(data, str(path), root, None)
    if check_files:
        for shard in manifest.shards:
            _check_file(root / shard.name, shard.bytes, manifest.remedy)
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
            f"finished shards are kept, and the manifest is written again."
        ) from None
    if version != VERSION:
        raise UserError(
            f"{shown} has version {version} of the manifest, and this program reads version {VERSION}. Use the program "
            f"that made it, or convert again into another folder."
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
            f"the manifest is written again."
        ) from None
    return manifest


def _check_file(tar: Path, expected: int, remedy: str) -> None:
    try:
        size = tar.stat().st_size
    except OSError as error:
        raise UserError(f"Shard {tar} of the manifest cannot be found ({error.strerror}). {remedy}") from None
    if size != expected:
        raise UserError(
            f"Shard {tar} has {size} bytes, and {expected} in the manifest: it is truncated or was replaced. {remedy}"
        )
    if not index_path(tar).is_file():
        raise UserError(f"Shard {tar} has no index {index_path(tar).name} beside it. {remedy}")


def write_manifest(manifest: Manifest) -> None:
    """Write SET/manifest.json atomically. Its bytes depend only on the manifest."""
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
