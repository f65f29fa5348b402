"""Writes a shard and its index, and collects finished shards into the entries of a manifest."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from isal.isal_zlib import crc32

from cfmask.data.shard_index import Index, index_path, load_index, parse_index, read_index, write_index
from cfmask.data.shards import Shard
from cfmask.errors import UserError
from cfmask.runtime.files import sync, write_atomically
from cfmask.runtime.machine import aside_of

BAD_SAMPLES = "bad_samples.jsonl"
_BLOCK = tarfile.BLOCKSIZE


def write_shard(
    tar: Path, samples: Iterable[tuple[str, int, dict[str, bytes]]], *, about: dict[str, Any] | None = None
) -> Index:
    """Write a shard and its index. Their bytes depend on the samples alone: they contain no time, user or host.

    webdataset's ShardWriter stamps the time, writes to the final name and makes no index. Here the tar is written
    aside, fsynced and renamed, then its index: an index that exists proves that its tar is complete.

    Args:
        tar: final path.
        samples: (key, class id, {extension: data}) in order. Keys have no dot.
        about: facts that go into the index beside bytes and sha256; it may be filled while ``samples`` is consumed.

    Raises:
        OSError: it cannot be written. The temporary file is removed, as after any other error.
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
    if committed_about(tar) == index.about:
        # Another writer was faster (a job that was requeued while it still ran). Its index stays in place for readers.
        return index
    index_path(tar).unlink(missing_ok=True)  # an older index must never describe the new tar
    os.replace(aside, tar)
    sync(tar.parent)
    write_index(index_path(tar), index)
    return index


def _header(name: str, size: int) -> bytes:
    """The USTAR header that tarfile makes for a regular file of mode 444, in a tenth of tarfile's time: a million
    images have three million headers."""
    encoded = name.encode()
    if len(encoded) > 100 or size >= 8**11:
        raise ValueError(f"too long for a tar header: {name!r} ({size} bytes)")
    header = bytearray(_HEADER)
    header[: len(encoded)] = encoded
    header[124:135] = b"%011o" % size
    header[148:156] = b"%06o\0 " % sum(header)  # the checksum field counts as blanks
    return bytes(header)


def _empty_header() -> bytes:
    info = tarfile.TarInfo()
    info.mode = 0o444
    header = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    header[148:156] = b" " * 8
    return bytes(header)


_HEADER = _empty_header()


def committed_about(tar: Path) -> dict[str, Any] | None:
    """``about`` of the index of a shard that exists at its full length; None otherwise."""
    try:
        about = load_index(tar).about
        return about if tar.stat().st_size == about["bytes"] else None
    except (UserError, OSError, KeyError):
        return None


def shard_and_index(tar: Path) -> tuple[Shard, Index]:
    """The manifest's entry of a shard, and its index, from the index file."""
    data = read_index(tar)
    index = parse_index(data, str(index_path(tar)))
    digest = hashlib.sha256(data).hexdigest()
    return Shard(tar.name, len(index), index.about["bytes"], index.about["sha256"], digest), index


def class_counts_of(indexes: Iterable[Index], num_classes: int) -> tuple[int, ...]:
    """Samples by class id over several shards."""
    total = np.zeros(num_classes, np.int64)
    for index in indexes:
        total += np.bincount(index.labels, minlength=num_classes)
    return tuple(map(int, total))


def write_bad_samples(folder: Path, issues: Sequence[Mapping[str, Any]]) -> None:
    """Write SET/bad_samples.jsonl, a line for each issue; without issues there is no such file. Raises OSError."""
    if issues:
        write_atomically(folder / BAD_SAMPLES, "".join(json.dumps(issue) + "\n" for issue in issues))
    else:
        (folder / BAD_SAMPLES).unlink(missing_ok=True)


def has_clipped_images(about: Mapping[str, Any]) -> bool:
    """Whether a shard holds 16-bit grey images converted by an earlier release, which clipped values above 255 to
    white. about: of its index."""
    clipped = ("16-bit", "kept, read as RGB")
    return any((issue.get("issue"), issue.get("policy")) == clipped for issue in about.get("issues", ()))
