"""A set of shards of another program: its tars, its classes, and its manifest, which is made from the indexes."""

from __future__ import annotations

import filecmp
import hashlib
import json
import logging
import os
import re
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cfmask.convert.clip_benchmark import ClassMapping
from cfmask.convert.labels import IMAGES, LabelSource, label_of_key, no_images
from cfmask.convert.shard_writer import BAD_SAMPLES, class_counts_of, shard_and_index, write_bad_samples
from cfmask.convert.sources.objectnet import BORDER
from cfmask.convert.tables import Classes
from cfmask.convert.tarscan import packing
from cfmask.data import benchmarks, imagenet, images, shard_index, shards
from cfmask.errors import UserError, did_you_mean_path
from cfmask.runtime.files import remove_leftovers

logger = logging.getLogger(__name__)


def find_tars(folder: Path) -> list[Path]:
    """The shards of a folder, by name."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder of shards (.tar).{did_you_mean_path(folder)}")
    tars = sorted(path for path in folder.glob("*.tar") if not path.name.startswith("."))
    for path in sorted(folder.iterdir()):
        if re.search(r"(?i)\.(tgz|tar|tar\.\w+)$", path.name) and path.suffix != ".tar" and path.is_file():
            _refuse_packed(path)
    if not tars:
        inside = sorted({str(path.parent) for path in folder.glob("*/*.tar")})
        where = f". Its subfolders do: index each of {', '.join(inside)}" if inside else ""
        raise UserError(f"{folder} holds no .tar files{where}.")
    if lost := next((tar for tar in tars if not tar.is_file()), None):
        what = "a link to a file that does not exist" if lost.is_symlink() else "not a file"
        raise UserError(f"{lost} is {what}: get the shard, or remove the entry from the folder.")
    by_split: dict[str, str] = {}
    for tar in tars:
        words = set(re.split(r"[^a-z]+", tar.name.lower())) & {"train", "val", "valid", "validation", "test"}
        by_split.setdefault(" ".join(sorted(words)), tar.name)
    if len(by_split) > 1:
        raise UserError(
            f"{folder} holds shards of several splits ({', '.join(sorted(by_split.values()))}), but a set is one "
            f"split. Move each into a folder of its own, or make such folders with symbolic links (mkdir val; ln -s "
            f"../NAME*.tar val/) and index those."
        )
    rows = {match[1]: tar.name for tar in tars if (match := re.search(r"-of-(\d{1,6})\.tar$", tar.name))}
    if len(rows) > 1:
        raise UserError(
            f"{folder} holds shards of several sets ({', '.join(sorted(rows.values()))}), perhaps from an earlier "
            f"attempt: samples would occur twice. Keep one."
        )
    _refuse_own(folder, tars)
    if not os.access(folder, os.W_OK):
        raise UserError(
            f"{folder} is read-only, but indexes are written beside their tars. Make a folder elsewhere with symbolic "
            f"links to the tars (ln -s {folder}/*.tar .) and index that."
        )
    return tars


def _check_row(folder: Path, tars: Sequence[Path], mapping: ClassMapping | None) -> None:
    """Report gaps in the numbering of the tars. Raises: UserError: there are gaps in a copy of CLIP-benchmark."""
    if not (missing := missing_numbers(tars, from_zero=mapping is not None)):
        return
    what = f"{folder} has numbered tars, but not {', '.join(missing[:5])}{' …' if len(missing) > 5 else ''}"
    if mapping is not None:
        raise UserError(f"{what}: the copy is not complete. Download the missing tars.")
    logger.info(f"note: {what}. Is the download complete?")


def missing_numbers(tars: Sequence[Path], *, from_zero: bool) -> list[str]:
    """Names missing from a series of tars whose names differ only in a number; [] for other names."""
    matches = [re.fullmatch(r"(.*?)(\d{1,9})((?:-of-\d{1,6})?)\.tar", tar.name) for tar in tars]
    numbers = {int(match[2]): len(match[2]) for match in matches if match}
    around = {(match[1], match[3]) for match in matches if match}
    if len(numbers) < len(tars) or len(around) != 1:
        return []
    [(prefix, suffix)] = around
    low, high, width = min(numbers), max(numbers), min(numbers.values())
    start = 0 if from_zero else min(low, 1)
    if suffix:
        high = max(high, int(suffix.removeprefix("-of-")) - 1 + start)
    elif high - low > 10 * len(tars):  # names with a number in them, not a series
        return []
    return [f"{prefix}{n:0{width}d}{suffix}.tar" for n in range(start, high + 1) if n not in numbers]


def _refuse_packed(path: Path) -> None:
    try:
        with open(path, "rb") as file:
            start = file.read(8)
        kind = packing(start)
        is_tar = kind is None and tarfile.is_tarfile(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from None
    if kind or not start:
        raise UserError(
            f"{path} is {f'compressed ({kind})' if kind else 'compressed by its name, and empty'}; samples of a "
            f"compressed tar cannot be read by offset. Unpack the compressed tars; compression does not make images "
            f"smaller."
        )
    if is_tar:
        raise UserError(
            f"{path} is a tar by its content but not by its name. If it is a complete shard, rename it to end in .tar; "
            f"if it is an unfinished download, finish it or move it out of the folder."
        )


def _refuse_own(folder: Path, tars: Sequence[Path]) -> None:
    path = folder / shards.MANIFEST
    try:
        tool = json.loads(path.read_text())["made"].get("tool")
    except FileNotFoundError:
        try:
            tool = shard_index.load_index(tars[0]).about.get("tool", "make_shards")
        except UserError:
            return
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        raise UserError(f"{path} cannot be read. Delete it if no program needs it, and run this again.") from None
    if tool != shard_index.INDEXED_BY:
        raise UserError(
            f"The shards in {folder} were indexed by {tool}, with labels, classes and checksums: use them as they are. "
            f"If they have no manifest, run their conversion again: it makes the missing files."
        )


def choose_classes(
    given: Classes | None, labels: LabelSource, mapping: ClassMapping | None, indexes: dict[Path, shard_index.Index]
) -> Classes:
    """The class list for the manifest.

    Without --classes it is ImageNet's, if there is evidence for it: a mapping, wnids in the keys that agree with the
    labels, or a sample of each of the labels 0 … 999.
    """
    classes = given or imagenet.classes()
    every: set[int] = set()
    for tar, index in indexes.items():
        every.update(np.unique(index.labels).tolist())
        if (outside := np.flatnonzero(index.labels >= len(classes))).size and given:
            row = int(outside[0])
            raise UserError(
                f"Sample {index.keys[row].decode()} of {tar} has the label {index.labels[row]}, but --classes has "
                f"classes 0 … {len(classes) - 1}: the list is of another set, or labels count from 1."
            )
    if not every:
        reasons = [entry["reason"] for index in indexes.values() for entry in index.about["bad"]]
        raise no_images(next(iter(indexes)).parent, next(iter(reasons), ""))
    agreeing, wnids = np.sum([index.about["wnids"] for index in indexes.values()], axis=0)
    if given or mapping or labels.place == "key":
        return classes
    if wnids and agreeing == wnids and max(every) < len(classes):
        return classes
    if not wnids and every == set(range(len(classes))):
        logger.info("There is a sample of each label 0 … 999: assuming ImageNet's classes.")
        return classes
    why = (
        f"{wnids - agreeing} of {wnids} keys have a wnid whose class id in ImageNet's list differs from the label"
        if agreeing != wnids
        else "their classes are unknown"
    )
    raise UserError(
        f"The labels are {min(every)} … {max(every)}, and {why}. Give a class list with --classes FILE (a line "
        f"`folder<TAB>display name` for each class, class 0 first), or --classes imagenet if they are ImageNet's in "
        f"its order. The indexes are kept, so this takes a moment."
    )


def _check_keys(classes: Classes, indexes: dict[Path, shard_index.Index], label_asked: bool) -> None:
    """Compare labels with keys that begin with a class name, for up to 200 samples of each shard."""
    # "3_12" need not mean a class called 3.
    ids = {folder: i for i, (folder, _) in enumerate(classes) if not folder.isdecimal()}
    named: set[int] = set()
    compared, other = 0, []
    for index in indexes.values():
        for row in np.unique(np.linspace(0, len(index) - 1, 200).astype(int)).tolist() if len(index) else ():
            key, label = index.keys[row].decode(), int(index.labels[row])
            if (of_key := label_of_key(key, ids)) is not None:
                compared += 1
                named.add(of_key)
                if of_key != label:
                    other.append((key, label))
    if not other or len(named) == 1:  # if a class is called train, all keys may begin with "train_"
        return
    (key, label), *_ = other
    what = (
        f"{len(other)} of {compared} keys begin with the name of another class than their label's, such as {key} with "
        f"the label {label}, which is {classes[label][0]}"
    )
    if 2 * len(other) > compared and not label_asked:
        raise UserError(
            f"{what}. The class list is not in the order of the labels, or labels count from 1. Give the list in the "
            f"order of the labels, or take labels from the keys with --label-from key. If the labels are correct, "
            f"confirm them with --label-from cls or json."
        )
    logger.info(f"note: {what}")


def commit(
    folder: Path,
    split: str,
    tars: Sequence[Path],
    given: Classes | None,
    labels: LabelSource,
    *,
    mapping: ClassMapping | None = None,
    label_asked: bool = False,
    allow_count_mismatch: bool = False,
) -> shards.Manifest:
    """Write the list of bad samples and the manifest, from the indexes.

    Args:
        given: class list given by a flag.
        label_asked: ``labels`` was chosen by a flag, so keys that name other classes are only reported.
    """
    entries = {tar: shard_and_index(tar) for tar in tars}
    indexes = {tar: index for tar, (_, index) in entries.items()}
    _check_row(folder, tars, mapping)
    _refuse_copies(indexes)
    bad = [entry for index in indexes.values() for entry in index.about["bad"]]
    classes = choose_classes(given, labels, mapping, indexes)
    if mapping is None and labels.place != "key":
        _check_keys(classes, indexes, label_asked)
    made: dict[str, Any] = {
        "tool": shard_index.INDEXED_BY,
        "label_from": labels.place,
        "label_field": labels.field,
        "checksums": all(shard.sha256 for shard, _ in entries.values()),
        "samples_sha256": _samples_sha256(indexes.values()),
    }
    border = 0
    if mapping is not None:
        made["class_ids"] = [ids[0] for ids in mapping.ids]
        if mapping.name == benchmarks.OBJECTNET.name:
            border = _border(indexes)
            made["border_removed_before"] = not border
    manifest = shards.Manifest(
        root=folder,
        split=split,
        store=images.ORIGINAL,
        border=border,
        accepted={} if mapping is None else mapping.accepted,
        classes=classes,
        class_counts=class_counts_of(indexes.values(), len(classes)),
        shards=tuple(shard for shard, _ in entries.values()),
        bad_samples=len(bad),
        made=made,
    )
    _check_benchmark(manifest, mapping, allow_count_mismatch)
    try:
        write_bad_samples(folder, bad)
        shards.write_manifest(manifest)
        for names in ("*.index.safetensors.*", f"{shards.MANIFEST}.*", f"{BAD_SAMPLES}.*"):
            remove_leftovers(folder, names)  # only our own files: the folder is another program's
    except OSError as error:
        raise UserError(f"The manifest of {folder} cannot be written ({error.strerror}).") from None
    for what, entry in (
        ("samples are interleaved in the tar: our reader joins their members, WebDataset's would not", "split"),
        (f"samples have several images: the first of {', '.join(IMAGES)} is used", "several_images"),
    ):
        if count := sum(index.about[entry] for index in indexes.values()):
            logger.info(f"{count} {what}")
    if bad:
        logger.info(f"{len(bad)} samples have no image and are left out: see {folder / BAD_SAMPLES}")
    return manifest


def _refuse_copies(indexes: dict[Path, shard_index.Index]) -> None:
    """Raises: UserError: two tars are copies ("00000 (1).tar"): their samples would count twice."""
    first: dict[str, Path] = {}
    for tar, index in indexes.items():
        other = first.setdefault(index.about["frame"], tar)
        # Tars with the same headers and labels may differ in their pixels.
        if other != tar and len(index) and filecmp.cmp(tar, other, shallow=False):
            raise UserError(
                f"{other} and {tar} have the same content: samples would occur twice. Move one of them out."
            )


def _samples_sha256(indexes: Iterable[shard_index.Index]) -> str:
    """A hash of all keys and labels: sets that differ only in these are different sets."""
    digest = hashlib.sha256()
    for index in indexes:
        digest.update(b"\0".join([*index.keys.tolist(), index.labels.astype("<i4").tobytes()]))
    return digest.hexdigest()


def _check_benchmark(manifest: shards.Manifest, mapping: ClassMapping | None, allow: bool) -> None:
    """Refuse a set that would be evaluated by the rules of another one, or is not a complete copy of a benchmark."""
    if mapping is not None and mapping.name and manifest.split != mapping.name:
        raise UserError(
            f"The classes of {manifest.root} are {mapping.name}'s ({mapping.source}), but the set is called "
            f"{manifest.split}, and the name decides how it is evaluated. Give --split {mapping.name}, and use that "
            f"name for the folder among your sets; a link will do (ln -s {manifest.root} SHARDS/{mapping.name})."
        )
    deviations = benchmarks.deviations_of(manifest)
    if not deviations:
        return
    what = f"{manifest.root} has {'; '.join(deviations)} for the set {manifest.split}"
    if not allow and manifest.split in [benchmark.name for benchmark in benchmarks.SHIFTED]:
        raise UserError(
            f"{what}: it is not a complete copy, and accuracies on it would not be comparable. Get the missing files; "
            f"--allow-count-mismatch takes it as it is, and records the counts in the manifest."
        )
    logger.info(f"note: {what}")
    manifest.made["count_mismatch"] = deviations


def _border(indexes: dict[Path, shard_index.Index]) -> int:
    """The width of the red frame around ObjectNet's images, judged by four images of each shard."""
    framed = []
    for tar, index in indexes.items():
        with open(tar, "rb") as file:
            for row in np.unique(np.linspace(0, len(index) - 1, 4).astype(int)) if len(index) else ():
                member = index.image[row]
                file.seek(int(index.offset[member]))
                framed.append(_has_red_frame(file.read(int(index.size[member]))))
    known = [has for has in framed if has is not None]
    if any(known) and not all(known):
        raise UserError(
            f"Of {len(known)} images of {next(iter(indexes)).parent}, only {sum(known)} have ObjectNet's red frame: "
            f"two kinds of copies are mixed. Use one of them."
        )
    return BORDER if any(known) else 0


def _has_red_frame(data: bytes) -> bool | None:
    """None if the image cannot be read."""
    try:
        with images.opened(data) as image:
            pixels = np.array(image.convert("RGB"))
    except UserError:
        return None
    ring = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    red, green, blue = np.median(ring, axis=0)
    return bool(red > 180 and green < 80 and blue < 80)
