"""Indexes and a manifest for shards of another program; the tars stay as they are."""

from __future__ import annotations

import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from cfmask.convert import tarscan
from cfmask.convert.labels import IMAGES, LABEL_OPTIONS, Label, group, image_of, label_of, label_of_key, no_images
from cfmask.convert.tables import Classes
from cfmask.data import imagenet, images, shards
from cfmask.errors import UserError
from cfmask.files import remove_leftovers, write_atomically

TOOL = "index_shards"
BAD_SAMPLES = "bad_samples.jsonl"


# --- one shard ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A shard to index. ids: class id by folder (wnid), for labels from keys. settings: what its index depends on."""

    tar: Path
    label: Label
    ids: dict[str, int]
    checksums: bool
    settings: str


def is_indexed(task: Task) -> bool:
    """Whether an index of this very tar and these settings is there."""
    try:
        about = shards.load_index(task.tar).about
        stat = task.tar.stat()
        return (
            (about["bytes"], about["mtime_ns"], about["settings"]) == (stat.st_size, stat.st_mtime_ns, task.settings)
        ) and (bool(about["sha256"]) or not task.checksums)
    except (UserError, OSError, KeyError):
        return False


def index_shard(task: Task) -> int:
    """Scan a shard and write its index; return the tar's size in bytes.

    Raises:
        UserError: it is no whole tar, a label is missing, a member is there twice, or the index cannot be written.
    """
    tar = task.tar
    try:
        with open(tar, "rb", buffering=0) as file:
            stat = os.fstat(file.fileno())
            contents = tarscan.scan(tar)
            index = _index(task, file, contents, stat)
            after = os.stat(tar)
    except OSError as error:
        raise UserError(f"{tar} cannot be read ({error.strerror}).") from None
    if (after.st_size, after.st_mtime_ns) != (stat.st_size, stat.st_mtime_ns):
        raise UserError(f"{tar} changed while it was being read. Wait until its writer is done, then run this again.")
    try:
        shards.write_index(shards.index_path(tar), index)
    except OSError as error:
        raise UserError(f"The index of {tar} cannot be written beside it ({error.strerror}).") from None
    return stat.st_size


def _index(task: Task, file: BinaryIO, contents: tarscan.Contents, stat: os.stat_result) -> shards.Index:
    samples, split = group(task.tar, contents.members)
    keys: list[bytes] = []
    labels: list[int] = []
    first = [0]
    members: list[tarscan.Member] = []
    bad: list[dict[str, Any]] = []
    several = wnids = agreeing = 0
    of_wnid = {wnid: i for i, wnid in enumerate(imagenet.wnids())}
    for key, fields in samples.items():
        image = image_of(fields)
        if image is None:
            reason = f"no image among its members ({', '.join(fields)})"
            bad.append({"name": key, "shard": task.tar.name, "reason": reason})
            continue
        found = label_of(file, key, fields, task.label, task.ids)
        if isinstance(found, str):
            raise UserError(f"Sample {key} of {task.tar} has no label: {found}. {LABEL_OPTIONS}")
        several += sum(name in fields for name in IMAGES) > 1
        wnid = label_of_key(key, of_wnid)
        wnids, agreeing = wnids + (wnid is not None), agreeing + (wnid == found)
        keys.append(key.encode())
        labels.append(found)
        # The first image of a row is what readers take for its image.
        members += [fields[image], *(member for name, member in fields.items() if name != image)]
        first.append(len(members))
    extensions = tuple(dict.fromkeys(member.extension for member in members))
    if len(extensions) > 256:
        raise UserError(
            f"{task.tar} has {len(extensions)} kinds of members, such as {members[-1].name}: a key ends at its first "
            f"dot, so names must not have other dots. Write the shards again with keys without dots."
        )
    numbers = {name: i for i, name in enumerate(extensions)}
    crc32, sha256 = _checksums(file, members, stat.st_size) if task.checksums else ([], "")
    return shards.Index(
        keys=np.array(keys, dtype=np.bytes_),
        labels=np.array(labels, np.int32),
        first=np.array(first, np.int64),
        extensions=extensions,
        extension=np.array([numbers[member.extension] for member in members], np.uint8),
        offset=np.array([member.offset for member in members], np.int64),
        size=np.array([member.size for member in members], np.int64),
        crc32=np.array(crc32, np.uint32),
        about={
            "tool": TOOL,
            "settings": task.settings,
            "bytes": stat.st_size,
            "mtime_ns": stat.st_mtime_ns,
            "sha256": sha256,
            "end": contents.end,
            "bad": bad,
            "split": split,
            "several_images": several,
            "wnids": [agreeing, wnids],
        },
    )


def _checksums(file: BinaryIO, members: Sequence[tarscan.Member], size: int) -> tuple[list[int], str]:
    """CRC of each member, sha256 of the whole tar, in one pass."""
    crc32 = [0] * len(members)
    digest = hashlib.sha256()
    at = 0

    def read(until: int) -> Iterator[bytes]:
        nonlocal at
        while at < until and (part := os.pread(file.fileno(), min(until - at, 1 << 22), at)):
            digest.update(part)
            at += len(part)
            yield part

    for i in sorted(range(len(members)), key=lambda i: members[i].offset):
        for _ in read(members[i].offset):
            pass
        for part in read(members[i].offset + members[i].size):
            crc32[i] = zlib.crc32(part, crc32[i])
    for _ in read(size):
        pass
    return crc32, digest.hexdigest()


# --- the set --------------------------------------------------------------------------------------------------------


def find_tars(folder: Path) -> list[Path]:
    """The shards of a folder, by name.

    Raises:
        UserError: there are none, some are compressed, they are of several splits or of make_shards, or the folder
            cannot be written to.
    """
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}.")
    tars = sorted(path for path in folder.glob("*.tar") if not path.name.startswith("."))
    packed = sorted(path for path in folder.iterdir() if re.search(r"\.(tgz|tar\.\w+)$", path.name))
    if packed:
        raise UserError(
            f"{packed[0]} is compressed, and samples of a compressed tar cannot be found by offset. Unpack what is "
            f"compressed there (gunzip leaves a .tar; images do not get smaller by it anyway)."
        )
    if not tars:
        inside = sorted({str(path.parent) for path in folder.glob("*/*.tar")})
        where = f"; there are some in {', '.join(inside)}: index each of these" if inside else ""
        raise UserError(f"{folder} holds no .tar files{where}.")
    by_split: dict[str, str] = {}
    for tar in tars:
        words = set(re.split(r"[^a-z]+", tar.name.lower())) & {"train", "val", "valid", "validation", "test"}
        by_split.setdefault(" ".join(sorted(words)), tar.name)
    if len(by_split) > 1:
        raise UserError(
            f"{folder} holds shards of several splits ({', '.join(sorted(by_split.values()))}), and a set is one split "
            f"in one folder. Move each into a folder of its own, or make such folders of symbolic links (mkdir val; ln "
            f"-s ../NAME*.tar val/) and index those."
        )
    _refuse_own(folder, tars)
    if not os.access(folder, os.W_OK):
        raise UserError(
            f"{folder} cannot be written to, and indexes go beside their tars. Make a folder elsewhere with symbolic "
            f"links to them (ln -s {folder}/*.tar .) and index that."
        )
    return tars


def _refuse_own(folder: Path, tars: Sequence[Path]) -> None:
    path = folder / shards.MANIFEST
    try:
        tool = json.loads(path.read_text())["made"].get("tool")
    except FileNotFoundError:
        try:
            tool = shards.load_index(tars[0]).about.get("tool", "make_shards")
        except UserError:
            return
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        raise UserError(f"{path} cannot be read. If it belongs to nobody, delete it and run this again.") from None
    if tool != TOOL:
        raise UserError(
            f"The shards in {folder} have their indexes from {tool}, and labels, classes and checksums with them: use "
            f"them as they are. If they have no manifest, run their conversion again: it makes what is missing."
        )


def choose_classes(given: Classes | None, label: Label, indexes: dict[Path, shards.Index]) -> Classes:
    """The class list that goes into the manifest.

    ImageNet's without being asked for only where something says so: wnids in the keys that agree with the labels, or a
    sample of each of the labels 0 … 999.

    Raises:
        UserError: nothing says which classes the labels are, or a label is outside the list.
    """
    classes = given or imagenet.classes()
    every: set[int] = set()
    for tar, index in indexes.items():
        every.update(np.unique(index.labels).tolist())
        if (outside := np.flatnonzero(index.labels >= len(classes))).size and given:
            row = int(outside[0])
            raise UserError(
                f"Sample {index.keys[row].decode()} of {tar} has the label {index.labels[row]}, and --classes has "
                f"classes 0 … {len(classes) - 1}: it is another list, or the labels count from 1."
            )
    if not every:
        raise no_images(next(iter(indexes)).parent)
    agreeing, wnids = np.sum([index.about["wnids"] for index in indexes.values()], axis=0)
    if given or label.source == "key":
        return classes
    if wnids and agreeing == wnids and max(every) < len(classes):
        return classes
    if not wnids and every == set(range(len(classes))):
        print("There is a sample of each label 0 … 999: they are taken for ImageNet's classes.")
        return classes
    why = (
        f"{wnids - agreeing} of {wnids} keys have a wnid whose place in ImageNet's list is another than the label"
        if agreeing != wnids
        else "nothing says which classes they are"
    )
    raise UserError(
        f"The labels are {min(every)} … {max(every)}, and {why}. Give a class list with --classes FILE (a line "
        f"`folder<TAB>display name` a class, class 0 first), or --classes imagenet if they are ImageNet's in its "
        f"order; the indexes are kept, so it takes a moment."
    )


def commit(folder: Path, split: str, tars: Sequence[Path], given: Classes | None, label: Label) -> shards.Manifest:
    """The list of bad samples and the manifest, from the indexes."""
    entries = {tar: shards.shard_and_index(tar) for tar in tars}
    indexes = {tar: index for tar, (_, index) in entries.items()}
    bad = [entry for index in indexes.values() for entry in index.about["bad"]]
    classes = choose_classes(given, label, indexes)
    checksums = all(shard.sha256 for shard, _ in entries.values())
    manifest = shards.Manifest(
        root=folder,
        split=split,
        store=images.ORIGINAL,
        classes=classes,
        class_counts=shards.class_counts_of(indexes.values(), len(classes)),
        shards=tuple(shard for shard, _ in entries.values()),
        bad_samples=len(bad),
        made={"tool": TOOL, "label_from": label.source, "label_field": label.field, "checksums": checksums},
    )
    try:
        if bad:
            write_atomically(folder / BAD_SAMPLES, "".join(json.dumps(entry) + "\n" for entry in bad))
        else:
            (folder / BAD_SAMPLES).unlink(missing_ok=True)
        shards.write_manifest(manifest)
        for names in ("*.index.safetensors.*", f"{shards.MANIFEST}.*", f"{BAD_SAMPLES}.*"):
            remove_leftovers(folder, names)  # the folder is another program's: only what is ours
    except OSError as error:
        raise UserError(f"The manifest of {folder} cannot be written ({error.strerror}).") from None
    for what, entry in (
        ("samples are split by others in the tar: our reader puts them together, WebDataset itself would not", "split"),
        (f"samples have several images: the first of {', '.join(IMAGES)} is used", "several_images"),
    ):
        if count := sum(index.about[entry] for index in indexes.values()):
            print(f"{count} {what}")
    if bad:
        print(f"{len(bad)} samples have no image and are left out; {folder / BAD_SAMPLES} lists them")
    return manifest
