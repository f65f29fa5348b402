"""The images of a set in Parquet files: the split and class of each row, and where its bytes will be unpacked."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from cfmask.convert.class_names import class_ids_of_names, is_list
from cfmask.convert.request import Request
from cfmask.convert.sources.files import SPLITS, LabelledImage, SourceImages, source_images
from cfmask.convert.sources.imagenet import wnids_in
from cfmask.convert.sources.listing import Listing, Tick, is_image
from cfmask.convert.sources.parquet_files import ParquetTable, list_parquet, read_tables
from cfmask.convert.sources.unpacking import UnpackTask, read_record, unpack_folder
from cfmask.convert.tables import Classes
from cfmask.data import benchmarks, imagenet
from cfmask.data.blobs import Absent, Blob
from cfmask.errors import UserError

_NO_LABEL = (None, -1)
NO_LABEL = "rows without a label"
NO_BYTES = "a row without the bytes of its image"

Label = int | str


def parquet_images(request: Request, classes: Classes | None, tick: Tick) -> SourceImages:
    """The images of a set in Parquet files. Sizes are estimates for files that were not unpacked yet.

    Rows without a label (null or -1, as all of ImageNet's test set has) are ignored. For a set of ImageNet's classes,
    labels are mapped to class ids by the class names in the files, or by the wnids in the images' paths if there are no
    names; in both cases wnids in paths must agree.
    """
    source, kind, split = request.source, request.kind, request.split
    for flag in ("labels", "devkit", "mappings"):
        if getattr(request, flag):
            raise UserError(f"--{flag} would do nothing: {source} holds Parquet files, which contain their labels.")
    if kind == benchmarks.OBJECTNET.name:
        raise UserError(
            f"{source} holds Parquet files, but ObjectNet has to be converted from its own archive, whose mapping "
            f"files relate its folders to ImageNet's classes."
        )

    def is_wanted(name: str) -> bool:
        """A name that is not a known split may be the chosen one."""
        name = SPLITS.get(name.lower(), name)
        return split in (None, name) or name not in SPLITS.values()

    listing = Listing(source, tick)
    tables = read_tables(list_parquet(listing), is_wanted, request)
    for table in tables:
        for _ in range(sum(label in _NO_LABEL for label in table.labels)):
            listing.ignored.add((Path(table.file.path).name,), NO_LABEL)
    tables = [table for table in tables if any(label not in _NO_LABEL for label in table.labels)]
    if not tables:
        raise UserError(f"No row of the Parquet files of {source} has a label (all are -1 or null).")
    by_split = _by_split(source, tables, kind, split)
    chosen = [table for of_split in by_split.values() for table in of_split]
    if kind == "folder":
        folder_of, classes = _own_classes(source, chosen, classes)
    else:
        folder_of, classes = _imagenet_classes(source, chosen, kind), imagenet.classes()
        _check_paths(chosen, folder_of)
    folder = unpack_folder(request.out, kind, source)
    images: dict[str, list[LabelledImage]] = {}
    for name, of_split in by_split.items():
        taken: set[tuple[str, str]] = set()
        images[name] = [image for table in of_split for image in _images(table, folder, folder_of, taken)]
    seen = [(name, of_class) for name in images for of_class, _ in classes] if kind == "folder" else []
    found = source_images(listing, images, seen, split=None, classes=classes)
    found.unpack = tuple(UnpackTask.of(table, folder) for table in chosen)
    return found


def _by_split(source: Path, tables: list[ParquetTable], kind: str, split: str | None) -> dict[str, list[ParquetTable]]:
    by_name: dict[str, list[ParquetTable]] = {}
    for table in tables:
        by_name.setdefault(SPLITS.get(table.split.lower(), table.split), []).append(table)
    for name, of_split in by_name.items():
        if len(names := sorted({table.split for table in of_split})) > 1:
            raise UserError(
                f"{source} has the split {name} twice, as {' and as '.join(names)}: name the files of one as --source."
            )
    there = ", ".join(sorted(by_name))
    if kind not in ("folder", "imagenet"):
        if len(by_name) > 1:
            raise UserError(
                f"{source} has the splits {there}, but {kind} is one set: name the file or folder of that set as "
                f"--source."
            )
        return {kind: tables}
    if len(by_name) == 1 and split is not None and not set(SPLITS.values()) & set(by_name):
        return {split: tables}
    if split is not None:
        if split not in by_name:
            raise UserError(f"{source} has no split {split!r}; it has: {there}.")
        return {split: by_name[split]}
    if kind == "imagenet" and (unknown := sorted(set(by_name) - {"train", "val"})):
        raise UserError(
            f"{source} has files of {unknown[0]!r}, and whether they are the training or the validation set is "
            f"unknown: add --split train or --split val, with the folder or file of that set alone as --source."
        )
    return by_name


# --- classes --------------------------------------------------------------------------------------------------------


def _labels(tables: Sequence[ParquetTable]) -> Iterator[tuple[Label, str | None]]:
    """Label and path of each row that has a label."""
    for table in tables:
        for label, path in zip(table.labels, table.paths, strict=True):
            if label is not None and label != -1:
                yield label, path


def _named(tables: Sequence[ParquetTable]) -> tuple[str, ...] | None:
    """Names of the labels 0, 1, …; None without names. Raises: UserError: a label has no name."""
    names = tables[0].columns.names
    if names is None:
        return None
    numbers = {label for label, _ in _labels(tables) if isinstance(label, int)}
    if min(numbers) < 0 or max(numbers) >= len(names):
        raise UserError(
            f"{tables[0].file.path} names {len(names)} classes, but its set has the labels {min(numbers)} … "
            f"{max(numbers)}: labels and names do not belong together. Download the set again."
        )
    return names


def _own_classes(
    source: Path, tables: Sequence[ParquetTable], listed: Classes | None
) -> tuple[dict[Label, str], Classes]:
    """Class folder by label, and all classes, of a set with classes of its own."""
    labels = {label for label, _ in _labels(tables)}
    if names := _named(tables):
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(f"{tables[0].file.path} gives two classes the same name, {twice!r}.")
        return dict(enumerate(names)), listed or tuple((name, name) for name in names)
    if all(isinstance(label, str) for label in labels):
        texts = sorted(map(str, labels))
        return {text: text for text in texts}, listed or tuple((text, text) for text in texts)
    if listed is None:
        raise UserError(
            f"The labels of {source} are numbers, and its metadata does not name the classes. Give the class list with "
            f"--classes FILE: a line `name<TAB>display name` for each class, class 0 first."
        )
    if invalid := sorted(label for label in labels if not (isinstance(label, int) and 0 <= label < len(listed))):
        raise UserError(
            f"{source} has the label {invalid[-1]}, but the class list has {len(listed)} classes, counted from 0."
        )
    return {i: folder for i, (folder, _) in enumerate(listed)}, listed


def _imagenet_classes(source: Path, tables: Sequence[ParquetTable], kind: str) -> dict[Label, str]:
    """Wnid by label, of a set of ImageNet's classes."""
    numbers = kind == benchmarks.IMAGENET_V2.name
    used = {label for label, _ in _labels(tables)}
    texts = sorted(label for label in used if isinstance(label, str))
    folder_of: dict[Label, str]
    remedy = f"Use a copy whose labels are wnids. If it is not {kind}, `make_shards.py folder` converts it."
    if names := _named(tables):
        lists = (range(len(imagenet.wnids())), [imagenet.wnids().index(wnid) for wnid in benchmarks.wnids(kind)])
        ids: Sequence[int] | None = next((ids for ids in lists if is_list(names, ids)), None)
        if ids is None:
            where = f"The metadata of {tables[0].file.path}"
            ids = class_ids_of_names(names, wordnet=True, numbers=numbers, where=where, remedy=remedy)
        folder_of = {label: imagenet.wnids()[i] for label, i in enumerate(ids) if label in used}
    elif len(texts) == len(used):
        where = f"The column {tables[0].columns.label} of {tables[0].file.path}"
        ids = class_ids_of_names(texts, wordnet=True, numbers=numbers, where=where, remedy=remedy)
        folder_of = {text: imagenet.wnids()[i] for text, i in zip(texts, ids, strict=True)}
    else:
        folder_of = _by_paths(source, tables)
    if unknown := sorted(set(folder_of.values()) - set(benchmarks.wnids(kind))):
        raise UserError(
            f"{source} has images of the class {unknown[0]}, which is not one of the {len(benchmarks.wnids(kind))} "
            f"classes of {kind}. Is this {kind}?"
        )
    return folder_of


def _by_paths(source: Path, tables: Sequence[ParquetTable]) -> dict[Label, str]:
    """Wnid by label, of labels without names, from the images' paths: each path has to contain one."""
    found: dict[Label, set[str]] = {}
    for label, path in _labels(tables):
        found.setdefault(label, set()).update(wnids_in(path or "") or {""})
    if any("" in wnids for wnids in found.values()):
        raise UserError(
            f"The labels of {source} are numbers, and neither metadata nor the images' paths name their classes: their "
            f"order would be a guess. Use a copy whose files name the classes (the hub's do, in the metadata key "
            f"'huggingface')."
        )
    # More than one wnid is a contradiction, which _check_paths reports.
    folder_of = {label: min(wnids) for label, wnids in found.items()}
    if len(set(folder_of.values())) < len(folder_of):
        raise UserError(f"In {source}, images of one class have several labels, by their paths: labels are damaged.")
    return folder_of


def _check_paths(tables: Sequence[ParquetTable], folder_of: dict[Label, str]) -> None:
    """Raises: UserError: an image's path names another class than its label."""
    for table in tables:
        for label, path in _labels([table]):
            if set(wnids_in(path or "")) - {folder_of[label]}:
                raise UserError(
                    f"{table.file.path} contradicts itself: the image {path} has the label {label}, which is the class "
                    f"{folder_of[label]} by its name. The path or the label is of another class order; use another "
                    f"copy."
                )


# --- images ---------------------------------------------------------------------------------------------------------


def _images(
    table: ParquetTable, folder: Path, folder_of: dict[Label, str], taken: set[tuple[str, str]]
) -> Iterator[LabelledImage]:
    """The labelled images of a file. taken: (class folder, name) of the images of earlier files."""
    unpacked = read_record(UnpackTask.of(table, folder))
    estimate = Blob(table.file, 0, table.num_bytes // max(1, len(table.labels)))
    for row, (label, path) in enumerate(zip(table.labels, table.paths, strict=True)):
        if label is None or label == -1:
            continue
        blob = unpacked.blobs[row] if unpacked else estimate
        extension = unpacked.extensions[row] if unpacked else ""
        place = f"{table.split}-{table.number:05d}-{row:06d}"
        name = re.split(r"[/\\]", path or "")[-1] or place
        stem, suffix = os.path.splitext(name)
        if not is_image(name):
            stem, suffix = name, f".{extension}" if extension else ""
        class_folder, name = folder_of[label], f"{stem}{suffix}"
        if (class_folder, name) in taken:
            name = f"{stem}-{place}{suffix}"
        taken.add((class_folder, name))
        yield LabelledImage(class_folder, name, blob or Absent(f"{table.file.path}, row {row}", NO_BYTES))
