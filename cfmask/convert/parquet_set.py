"""The images of a set in Parquet files: which split and class each row is of, and where its bytes will be unpacked."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cfmask.convert.class_names import class_ids_of_names, is_list
from cfmask.convert.sources.blobs import Blob
from cfmask.convert.sources.files import SPLITS, LabelledImage, Tree
from cfmask.convert.sources.listing import IMAGE_SUFFIXES, Absent, Listing
from cfmask.convert.sources.parquet import ParquetPart, list_parquet, read_parts
from cfmask.convert.tables import Classes
from cfmask.convert.unpacking import Unpack, read_record, unpack_of
from cfmask.data import benchmarks, imagenet
from cfmask.errors import UserError

_WNID = re.compile(r"(?<![0-9A-Za-z])n\d{8}(?!\d)")
_NO_LABEL = (None, -1)
NO_LABEL = "rows without a label"
NO_BYTES = "a row without the bytes of its image"


@dataclass(frozen=True)
class ParquetSet:
    """What the files hold.

    tree: sizes of images are estimates where a file was never unpacked. Rows without a label stay out.
    classes, class_ids: as a Collection's.
    unpack: one for each file that images of ``tree`` are in.
    """

    tree: Tree
    classes: Classes
    class_ids: dict[str, int]
    unpack: tuple[Unpack, ...]


def parquet_set(
    listing: Listing,
    folder: Path,
    *,
    kind: str,
    split: str | None,
    classes: Classes | None,
    image_column: str | None,
    label_column: str | None,
    partial: bool,
) -> ParquetSet:
    """A set in Parquet files.

    Rows without a label (null or -1, as all of ImageNet's test set has) stay out. For a set of ImageNet's classes,
    labels are mapped to its class ids by the names that the files give them, or by the wnids in the images' paths where
    they give none; in both cases wnids in paths must agree.

    Args:
        folder: that the images are or will be unpacked in.
        kind: imagenet, one of the shifted sets, or folder: a set of classes of its own.
        split: chooses one split of several; names the one there is where no file does.
        classes: folder; class list.
        image_column, label_column, partial: as ``read_parts``.

    Raises:
        UserError: as ``read_parts``; labels whose classes nothing tells, or that contradict paths; no labels; a split
            that cannot be told.
    """
    source = listing.source
    if kind == benchmarks.OBJECTNET.name:
        raise UserError(
            f"{source} holds Parquet files, and ObjectNet is converted from its own archive: its mapping files say "
            f"which of ImageNet's classes each of its folders is."
        )

    def is_wanted(name: str) -> bool:
        """Whether files of this split are to be read. Names that are no split's may be the chosen one."""
        name = SPLITS.get(name.lower(), name)
        return split in (None, name) or name not in SPLITS.values()

    files = list_parquet(listing)
    parts = read_parts(files, is_wanted, image_column=image_column, label_column=label_column, partial=partial)
    for part in parts:
        for _ in range(sum(label in _NO_LABEL for label in part.labels)):
            listing.stays_out.add((Path(part.file.path).name,), NO_LABEL)
    parts = [part for part in parts if any(label not in _NO_LABEL for label in part.labels)]
    if not parts:
        raise UserError(f"No row of the Parquet files of {source} has a label (all are -1 or null).")
    by_split = _by_split(source, parts, kind, split)
    chosen = [part for of_split in by_split.values() for part in of_split]
    if kind == "folder":
        folder_of, classes = _own_classes(source, chosen, classes)
    else:
        folder_of, classes = _imagenet_classes(source, chosen, kind), imagenet.classes()
    class_ids = {folder: i for i, (folder, _) in enumerate(classes)}
    if kind != "folder":
        _check_paths(chosen, folder_of)
    images: dict[str, list[LabelledImage]] = {}
    absent: dict[str, list[LabelledImage]] = {}
    for name, of_split in by_split.items():
        taken: set[tuple[str, str]] = set()
        found = sorted(
            (image for part in of_split for image in _images(part, folder, folder_of, taken)),
            key=lambda image: (image.folder, image.file),
        )
        images[name] = [image for image in found if not isinstance(image.blob, Absent)]
        absent[name] = [image for image in found if isinstance(image.blob, Absent)]
    folders = sorted({image.folder for found in images.values() for image in found})
    empty = {}
    if kind == "folder":
        for name, found in images.items():
            full = {image.folder for image in found}
            empty[name] = sorted(folder for folder, _ in classes if folder not in full)
    tree = Tree(images, folders, empty, absent, listing.stays_out)
    return ParquetSet(tree, classes, class_ids, tuple(unpack_of(part, folder) for part in chosen))


def _by_split(source: Path, parts: list[ParquetPart], kind: str, split: str | None) -> dict[str, list[ParquetPart]]:
    by_name: dict[str, list[ParquetPart]] = {}
    for part in parts:
        by_name.setdefault(SPLITS.get(part.split.lower(), part.split), []).append(part)
    for name, of_split in by_name.items():
        if len(names := sorted({part.split for part in of_split})) > 1:
            raise UserError(f"{source} has the split {name} twice, as {' and as '.join(names)}: name the files of one.")
    there = ", ".join(sorted(by_name))
    if kind not in ("folder", "imagenet"):
        if len(by_name) > 1:
            raise UserError(
                f"{source} has the splits {there}, and {kind} is one set: name the file or folder of that one as "
                f"--source."
            )
        return {kind: parts}
    known = set(SPLITS.values())
    if len(by_name) == 1 and split is not None and not known & set(by_name):
        return {split: parts}
    if split is not None:
        if split not in by_name:
            raise UserError(f"{source} has no split {split!r}; it has: {there}.")
        return {split: by_name[split]}
    if kind == "imagenet" and (strange := sorted(set(by_name) - {"train", "val"})):
        raise UserError(
            f"{source} has files of {strange[0]!r}, and nothing says whether they are the training or the validation "
            f"set: add --split train or --split val, with the folder or file of that set alone as --source."
        )
    return dict(sorted(by_name.items()))


# --- classes --------------------------------------------------------------------------------------------------------


def _labels(parts: Sequence[ParquetPart]) -> Iterator[tuple[int | str, str | None]]:
    """Label and path of each row that has a label."""
    for part in parts:
        for label, path in zip(part.labels, part.paths, strict=True):
            if label is not None and label != -1:
                yield label, path


def _named(parts: Sequence[ParquetPart]) -> tuple[str, ...] | None:
    """Names of the labels 0, 1, …; None if nothing gives them any. Raises: UserError: labels beyond them."""
    columns = parts[0].columns
    if columns.names is None:
        return None
    highest, lowest = (choose(label for label, _ in _labels(parts) if isinstance(label, int)) for choose in (max, min))
    if lowest < 0 or highest >= len(columns.names):
        raise UserError(
            f"{parts[0].file.path} and the files of its set name {len(columns.names)} classes and have the labels "
            f"{lowest} … {highest}: labels and names do not belong together. Download the set again."
        )
    return columns.names


def _own_classes(
    source: Path, parts: Sequence[ParquetPart], listed: Classes | None
) -> tuple[dict[int | str, str], Classes]:
    """Class folder by label, and all classes, of a set of classes of its own."""
    labels = {label for label, _ in _labels(parts)}
    if names := _named(parts):
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(f"{parts[0].file.path} names two classes {twice!r}: nothing could tell them apart.")
        return dict(enumerate(names)), listed or tuple((name, name) for name in names)
    if all(isinstance(label, str) for label in labels):
        texts = sorted(map(str, labels))
        return {text: text for text in texts}, listed or tuple((text, text) for text in texts)
    if listed is None:
        raise UserError(
            f"The labels of {source} are numbers, and no metadata says which classes they are. Give the class list "
            f"with --classes FILE: a line `name<TAB>display name` a class, class 0 first."
        )
    strange = sorted(label for label in labels if not (isinstance(label, int) and 0 <= label < len(listed)))
    if strange:
        raise UserError(
            f"{source} has the label {strange[-1]}, and the class list has {len(listed)} classes, from 0 on."
        )
    return {i: folder for i, (folder, _) in enumerate(listed)}, listed


def _imagenet_classes(source: Path, parts: Sequence[ParquetPart], kind: str) -> dict[int | str, str]:
    """Wnid by label, of a set of ImageNet's classes."""
    numbers = kind == benchmarks.IMAGENET_V2.name
    used = {label for label, _ in _labels(parts)}
    texts = sorted(label for label in used if isinstance(label, str))
    folder_of: dict[int | str, str]
    remedy = f"Use a copy whose labels are wnids. If it is not {kind}, `make_shards.py folder` converts it."
    if names := _named(parts):
        lists = (range(len(imagenet.wnids())), [imagenet.wnids().index(wnid) for wnid in benchmarks.wnids(kind)])
        ids: Sequence[int] | None = next((ids for ids in lists if is_list(names, ids)), None)
        if ids is None:
            where = f"The metadata of {parts[0].file.path}"
            ids = class_ids_of_names(names, wordnet=True, numbers=numbers, where=where, remedy=remedy)
        folder_of = {label: imagenet.wnids()[i] for label, i in enumerate(ids) if label in used}
    elif len(texts) == len(used):
        where = f"The column {parts[0].columns.label} of {parts[0].file.path}"
        ids = class_ids_of_names(texts, wordnet=True, numbers=numbers, where=where, remedy=remedy)
        folder_of = {text: imagenet.wnids()[i] for text, i in zip(texts, ids, strict=True)}
    else:
        folder_of = _by_paths(source, parts)
    if strangers := sorted(set(folder_of.values()) - set(benchmarks.wnids(kind))):
        raise UserError(
            f"{source} has images of the class {strangers[0]}, which is not one of the {len(benchmarks.wnids(kind))} "
            f"classes of {kind}. Is this {kind}?"
        )
    return folder_of


def _by_paths(source: Path, parts: Sequence[ParquetPart]) -> dict[int | str, str]:
    """Wnid by label, of labels without names, as the images' paths have it: each path has to name one."""
    found: dict[int | str, set[str]] = {}
    for label, path in _labels(parts):
        found.setdefault(label, set()).update(_wnids_in(path) or {""})
    if any("" in wnids for wnids in found.values()):
        raise UserError(
            f"The labels of {source} are numbers, and neither metadata nor the images' paths say which classes they "
            f"are: their order would be a guess. Use a copy whose files name the classes (the hub's do, in the "
            f"metadata key 'huggingface')."
        )
    # More than one wnid is a contradiction, which _check_paths reports.
    folder_of = {label: min(wnids) for label, wnids in found.items()}
    if len(set(folder_of.values())) < len(folder_of):
        raise UserError(f"In {source}, images of one class have several labels, by their paths: labels are damaged.")
    return folder_of


def _wnids_in(path: str | None) -> set[str]:
    return {wnid for wnid in _WNID.findall(path or "") if wnid in imagenet.wnid_set()}


def _check_paths(parts: Sequence[ParquetPart], folder_of: dict[int | str, str]) -> None:
    """Raises: UserError: an image's path names another class than its label."""
    for part in parts:
        for label, path in _labels([part]):
            if _wnids_in(path) - {folder_of[label]}:
                raise UserError(
                    f"{part.file.path} contradicts itself: the image {path} has the label {label}, which is the class "
                    f"{folder_of[label]} by its name. One of them is of another class order; use another copy."
                )


# --- images ---------------------------------------------------------------------------------------------------------


def _images(
    part: ParquetPart, unpacked_in: Path, folder_of: dict[int | str, str], taken: set[tuple[str, str]]
) -> Iterator[LabelledImage]:
    """The labelled images of a file. taken: names by class that rows before have."""
    unpacked = read_record(unpack_of(part, unpacked_in))
    estimate = Blob(part.file, 0, part.num_bytes // max(1, len(part.labels)))
    for row, (label, path) in enumerate(zip(part.labels, part.paths, strict=True)):
        if label is None or label == -1:
            continue
        blob = unpacked.blobs[row] if unpacked else estimate
        extension = unpacked.extensions[row] if unpacked else ""
        place = f"{part.split}-{part.number:05d}-{row:06d}"
        name = re.split(r"[/\\]", path or "")[-1] or place
        stem, suffix = os.path.splitext(name)
        if suffix.lower() not in IMAGE_SUFFIXES:
            stem, suffix = name, f".{extension}" if extension else ""
        folder, name = folder_of[label], f"{stem}{suffix}"
        if (folder, name) in taken:
            name = f"{stem}-{place}{suffix}"
        taken.add((folder, name))
        yield LabelledImage(folder, name, blob or Absent(f"{part.file.path}, row {row}", NO_BYTES))
