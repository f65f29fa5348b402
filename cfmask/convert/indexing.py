"""Makes the index of a shard of another program. The tar is not changed."""

from __future__ import annotations

import hashlib
import json
import os
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from cfmask.convert import tarscan
from cfmask.convert.clip_benchmark import ClassMapping
from cfmask.convert.labels import (
    IMAGES,
    LABEL_OPTIONS,
    LabelSource,
    group,
    image_of,
    label_of,
    label_of_key,
    list_left_out,
    loosely_longer,
)
from cfmask.convert.tables import Classes
from cfmask.data import imagenet, shard_index
from cfmask.errors import UserError


@dataclass(frozen=True)
class IndexTask:
    """A shard to index.

    labels: the place of its labels.
    ids: class id by folder (wnid), for labels from keys.
    class_ids: class id by number in the tar; () if they are equal.
    checksums: read everything.
    settings: what the index depends on besides the tar.
    """

    tar: Path
    labels: LabelSource
    ids: dict[str, int]
    class_ids: tuple[int, ...]
    checksums: bool
    settings: str


def plan_tasks(
    tars: Sequence[Path], labels: LabelSource, classes: Classes, mapping: ClassMapping | None, *, checksums: bool
) -> list[IndexTask]:
    """A task for each shard.

    Args:
        classes: that labels from keys belong to.
        mapping: of the numbers in the tars to class ids; None if they are equal.
    """
    ids: dict[str, int] = {}
    class_ids: tuple[int, ...] = ()
    if labels.place == "key":
        ids = {name: i for i, (name, _) in enumerate(classes)}
    elif mapping is not None:
        class_ids = tuple(accepted[0] for accepted in mapping.ids)
    used = list(ids) or class_ids
    digest = hashlib.sha256(json.dumps(used).encode()).hexdigest()[:16] if used else ""
    settings = json.dumps([*labels, digest])
    return [IndexTask(tar, labels, ids, class_ids, checksums, settings) for tar in tars]


def is_indexed(task: IndexTask) -> bool:
    """Whether an index of this tar, unchanged, and of these settings exists."""
    try:
        index = shard_index.load_index(task.tar)
        about = index.about
        with open(task.tar, "rb", buffering=0) as file:
            # Checksums also cover images, whose changes only the modification time shows.
            return (
                (about["settings"], about["mtime_ns"]) == (task.settings, os.fstat(file.fileno()).st_mtime_ns)
                and (bool(about["sha256"]) or not task.checksums)
                and "frame" in about
                and shard_index.is_current(file.fileno(), index)
            )
    except (UserError, OSError, KeyError):
        return False


def index_shard(task: IndexTask) -> int:
    """Scan a shard and write its index; return the tar's size in bytes."""
    tar = task.tar
    begun = time.time()
    try:
        with open(tar, "rb", buffering=0) as file:
            stat = os.fstat(file.fileno())
            index = _index(task, file, stat, begun)
            frame = shard_index.frame_digest(file.fileno(), index)
            after = os.stat(tar)
    except OSError as error:
        raise UserError(f"{tar} cannot be read ({error.strerror}).") from None
    if (after.st_size, after.st_mtime_ns, after.st_ino) != (stat.st_size, stat.st_mtime_ns, stat.st_ino):
        raise UserError(f"{tar} changed while it was being read. Wait until its writer is done, then run this again.")
    try:
        index = replace(index, about={**index.about, "frame": frame})
        shard_index.write_index(shard_index.index_path(tar), index)
    except OSError as error:
        raise UserError(f"The index of {tar} cannot be written beside it ({error.strerror}).") from None
    return stat.st_size


def _index(task: IndexTask, file: BinaryIO, stat: os.stat_result, begun: float) -> shard_index.Index:
    contents = tarscan.scan(task.tar)
    samples, split = group(task.tar, contents.members)
    left_out = list_left_out(samples, contents.unseen)
    bad = [{"name": name, "shard": task.tar.name, "reason": reason} for name, reason in left_out]
    keys: list[bytes] = []
    labels: list[int] = []
    first = [0]
    members: list[tarscan.Member] = []
    several = wnids = agreeing = 0
    longer = loosely_longer(task.ids)
    of_wnid = {wnid: i for i, wnid in enumerate(imagenet.wnids())}
    unseen = dict(contents.unseen)
    for key, fields in samples.items():
        image = image_of(fields)
        if image is None:
            continue
        found = label_of(file, key, fields, task.labels, task.ids, longer)
        if isinstance(found, str):
            name = f"{key}.{task.labels.place}"
            link = f"; {name} is {unseen[name]}" if name in unseen else ""
            raise UserError(f"Sample {key} of {task.tar} has no label: {found}{link}. {LABEL_OPTIONS}")
        if task.class_ids:
            if found >= len(task.class_ids):
                raise UserError(
                    f"Sample {key} of {task.tar} has the label {found}, but its class list has {len(task.class_ids)} "
                    f"classes, 0 … {len(task.class_ids) - 1}: the list is of another set, or labels count from 1."
                )
            found = task.class_ids[found]
        several += sum(name.rpartition(".")[2] in IMAGES for name in fields) > 1
        wnid = label_of_key(key, of_wnid)
        wnids, agreeing = wnids + (wnid is not None), agreeing + (wnid == found)
        keys.append(key.encode())
        labels.append(found)
        # Readers take the first image member of a row.
        members += [fields[image], *(member for name, member in fields.items() if name != image)]
        first.append(len(members))
    extensions = tuple(dict.fromkeys(member.extension for member in members))
    if len(extensions) > 256:
        raise UserError(
            f"{task.tar} has {len(extensions)} kinds of members, such as {members[-1].name}: a key ends at its first "
            f"dot, so names must have only one. Write the shards again with keys without dots."
        )
    numbers = {name: i for i, name in enumerate(extensions)}
    crc32, sha256 = [0] * len(members) if task.checksums else [], ""
    if task.checksums:
        digest = hashlib.sha256()
        places = [(member.offset, member.size) for member in members]
        for i, data in tarscan.read_members(file, places, stat.st_size, digest):
            crc32[i] = zlib.crc32(data)
        sha256 = digest.hexdigest()
    return shard_index.Index(
        keys=np.array(keys, dtype=np.bytes_),
        labels=np.array(labels, np.int32),
        first=np.array(first, np.int64),
        extensions=extensions,
        extension=np.array([numbers[member.extension] for member in members], np.uint8),
        offset=np.array([member.offset for member in members], np.int64),
        size=np.array([member.size for member in members], np.int64),
        crc32=np.array(crc32, np.uint32),
        about={
            "tool": shard_index.INDEXED_BY,
            "settings": task.settings,
            **shard_index.stamp(stat, now=begun),
            "sha256": sha256,
            "end": contents.end,
            "bad": bad,
            "split": split,
            "several_images": several,
            "wnids": [agreeing, wnids],
        },
    )
