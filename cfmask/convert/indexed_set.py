"""A set of shards of another program: which tars and classes it has, and its manifest, from the indexes."""

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
from cfmask.convert.labels import IMAGES, Label, label_of_key, no_images
from cfmask.convert.shard_writer import class_counts_of, shard_and_index
from cfmask.convert.tables import Classes
from cfmask.convert.tarscan import packing
from cfmask.data import benchmarks, imagenet, images, shard_index, shards
from cfmask.errors import UserError
from cfmask.runtime.files import remove_leftovers, write_atomically

logger = logging.getLogger(__name__)

BAD_SAMPLES = "bad_samples.jsonl"
BORDER = 2
"""Pixels of the red frame around ObjectNet's images, which is not part of the picture."""


def find_tars(folder: Path) -> list[Path]:
    """The shards of a folder, by name.

    Raises:
        UserError: there are none, some are compressed, they are of several splits or of make_shards, or the folder
            cannot be written to.
    """
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}.")
    tars = sorted(path for path in folder.glob("*.tar") if not path.name.startswith("."))
    for path in sorted(folder.iterdir()):
        if re.search(r"(?i)\.(tgz|tar|tar\.\w+)$", path.name) and path.suffix != ".tar" and path.is_file():
            _refuse_packed(path)
    if not tars:
        inside = sorted({str(path.parent) for path in folder.glob("*/*.tar")})
        where = f"; there are some in {', '.join(inside)}: index each of these" if inside else ""
        raise UserError(f"{folder} holds no .tar files{where}.")
    if lost := next((tar for tar in tars if not tar.is_file()), None):
        what = "a link to a file that is not there" if lost.is_symlink() else "no file"
        raise UserError(f"{lost} is {what}: get the shard, or take its name out of the folder.")
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
    rows = {match[1]: tar.name for tar in tars if (match := re.search(r"-of-(\d{1,6})\.tar$", tar.name))}
    if len(rows) > 1:
        raise UserError(
            f"{folder} holds shards of several sets ({', '.join(sorted(rows.values()))}), one of which may be left of "
            f"an earlier try: samples would be there twice. Keep one."
        )
    _refuse_own(folder, tars)
    if not os.access(folder, os.W_OK):
        raise UserError(
            f"{folder} cannot be written to, and indexes go beside their tars. Make a folder elsewhere with symbolic "
            f"links to them (ln -s {folder}/*.tar .) and index that."
        )
    return tars


def _check_row(folder: Path, tars: Sequence[Path], mapping: ClassMapping | None) -> None:
    """Name numbers that lack in the names of tars. Raises: UserError: they do in a copy of CLIP-benchmark."""
    if not (missing := missing_numbers(tars, from_zero=mapping is not None)):
        return
    what = (
        f"The tars of {folder} are numbered, and {', '.join(missing[:5])}{' …' if len(missing) > 5 else ''} "
        f"{'is' if len(missing) == 1 else 'are'} not there"
    )
    if mapping is not None:
        raise UserError(f"{what}: the copy is not complete. Get what is missing.")
    logger.info(f"note: {what}. Is the download complete?")


def missing_numbers(tars: Sequence[Path], *, from_zero: bool) -> list[str]:
    """Names that lack in a row of tars whose names differ in a number alone; [] for names of another kind."""
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
    elif high - low > 10 * len(tars):  # no row, but names with a number in them
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
            f"{path} is {f'compressed ({kind})' if kind else 'compressed by its name, and empty'}, and samples of a "
            f"compressed tar cannot be found by offset. Unpack what is compressed there; images do not get smaller by "
            f"it anyway."
        )
    if is_tar:
        raise UserError(
            f"{path} is a tar by its contents and not by its name. If it is a whole shard, rename it so that it ends "
            f"in .tar; if it is a part of a download, finish that, or take it out of the folder."
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
        raise UserError(f"{path} cannot be read. If it belongs to nobody, delete it and run this again.") from None
    if tool != shard_index.INDEXED_BY:
        raise UserError(
            f"The shards in {folder} have their indexes from {tool}, and labels, classes and checksums with them: use "
            f"them as they are. If they have no manifest, run their conversion again: it makes what is missing."
        )


def choose_classes(
    given: Classes | None, label: Label, mapping: ClassMapping | None, indexes: dict[Path, shard_index.Index]
) -> Classes:
    """The class list that goes into the manifest.

    ImageNet's without being asked for only where something says so: a mapping, wnids in the keys that agree with the
    labels, or a sample of each of the labels 0 … 999.

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
        reasons = [entry["reason"] for index in indexes.values() for entry in index.about["bad"]]
        raise no_images(next(iter(indexes)).parent, next(iter(reasons), ""))
    agreeing, wnids = np.sum([index.about["wnids"] for index in indexes.values()], axis=0)
    if given or mapping or label.source == "key":
        return classes
    if wnids and agreeing == wnids and max(every) < len(classes):
        return classes
    if not wnids and every == set(range(len(classes))):
        logger.info("There is a sample of each label 0 … 999: they are taken for ImageNet's classes.")
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


def _check_keys(classes: Classes, indexes: dict[Path, shard_index.Index], label_asked: bool) -> None:
    """Compare labels with keys that begin with a class's name, of some hundred samples a shard.

    Raises:
        UserError: most of these keys are of another class, and nobody asked for the labels.
    """
    # "3_12" is a number of something as often as a class called 3.
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
    if not other or len(named) == 1:  # all keys may begin with "train_" where one class is called train
        return
    (key, label), *_ = other
    what = (
        f"{len(other)} of {compared} keys begin with the name of another class than that of their label, such as {key} "
        f"with the label {label}, which is {classes[label][0]}"
    )
    if 2 * len(other) > compared and not label_asked:
        raise UserError(
            f"{what}. The class list is in another order than the labels, or the labels count from 1. Give the list in "
            f"the order of the labels, or take the labels from the keys with --label-from key. If the labels are right "
            f"all the same, say so with --label-from cls or json."
        )
    logger.info(f"note: {what}")


def commit(
    folder: Path,
    split: str,
    tars: Sequence[Path],
    given: Classes | None,
    label: Label,
    *,
    mapping: ClassMapping | None = None,
    label_asked: bool = False,
    allow_count_mismatch: bool = False,
) -> shards.Manifest:
    """The list of bad samples and the manifest, from the indexes.

    Args:
        label_asked: ``label`` was asked for by a flag, so that keys that say other classes are no reason to refuse.

    Raises:
        UserError: as ``choose_classes``; the set has a benchmark's name and is no whole copy of it, or has its classes
            and another name; or the folder cannot be written to.
    """
    entries = {tar: shard_and_index(tar) for tar in tars}
    indexes = {tar: index for tar, (_, index) in entries.items()}
    _check_row(folder, tars, mapping)
    _refuse_copies(indexes)
    bad = [entry for index in indexes.values() for entry in index.about["bad"]]
    classes = choose_classes(given, label, mapping, indexes)
    if mapping is None and label.source != "key":
        _check_keys(classes, indexes, label_asked)
    made: dict[str, Any] = {
        "tool": shard_index.INDEXED_BY,
        "label_from": label.source,
        "label_field": label.field,
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
            logger.info(f"{count} {what}")
    if bad:
        logger.info(f"{len(bad)} samples have no image and are left out; {folder / BAD_SAMPLES} lists them")
    return manifest


def _refuse_copies(indexes: dict[Path, shard_index.Index]) -> None:
    """Raises: UserError: two tars are one ("00000 (1).tar"): its samples would count twice."""
    first: dict[str, Path] = {}
    for tar, index in indexes.items():
        other = first.setdefault(index.about["frame"], tar)
        # Tars of images of one size may differ in their pixels alone.
        if other != tar and len(index) and filecmp.cmp(tar, other, shallow=False):
            raise UserError(
                f"{other} and {tar} have the same contents: samples would be there twice. Move one of them out."
            )


def _samples_sha256(indexes: Iterable[shard_index.Index]) -> str:
    """Of all keys and labels: sets that differ in these alone are different sets."""
    digest = hashlib.sha256()
    for index in indexes:
        digest.update(b"\0".join([*index.keys.tolist(), index.labels.astype("<i4").tobytes()]))
    return digest.hexdigest()


def _check_benchmark(manifest: shards.Manifest, mapping: ClassMapping | None, allow: bool) -> None:
    """Refuse what would be evaluated by other rules than the set that it is, or is no whole copy of it."""
    if mapping is not None and mapping.name and manifest.split != mapping.name:
        raise UserError(
            f"The classes of {manifest.root} are {mapping.name}'s ({mapping.source}), and its name, which says how it "
            f"is evaluated, is {manifest.split}. Give --split {mapping.name}, and let the folder have that name among "
            f"your sets: a link will do (ln -s {manifest.root} SHARDS/{mapping.name})."
        )
    deviations = benchmarks.deviations_of(manifest)
    if not deviations:
        return
    what = f"{manifest.root} has {'; '.join(deviations)} for the set {manifest.split}"
    if not allow and manifest.split in [benchmark.name for benchmark in benchmarks.SHIFTED]:
        raise UserError(
            f"{what}: it is not a whole copy of it, and accuracies on it would not be comparable. Get what is missing; "
            f"--allow-count-mismatch takes it as it is, and says so in the manifest."
        )
    logger.info(f"note: {what}")
    manifest.made["count_mismatch"] = deviations


def _border(indexes: dict[Path, shard_index.Index]) -> int:
    """The width of the red frame around ObjectNet's images, as some of them show.

    Raises:
        UserError: some have it and some do not.
    """
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
            f"Of {len(known)} images of {next(iter(indexes)).parent}, {sum(known)} have ObjectNet's red frame and the "
            f"others do not: copies of two kinds are mixed. Take one of them."
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
