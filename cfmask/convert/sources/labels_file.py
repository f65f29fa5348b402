"""Images whose labels are in a table of paths and labels, not in the names of their folders."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from cfmask.convert import tables
from cfmask.convert.request import Request
from cfmask.convert.sources.files import SPLITS, LabelledImage, SourceImages, source_images
from cfmask.convert.sources.listing import FoundFile, Listing, Tick
from cfmask.convert.tables import Classes, TableRow
from cfmask.data.blobs import Blob, SourceBytes, SourceFile
from cfmask.errors import UserError

NOT_NAMED = "not named in the label file"

_COLUMNS = {
    "path": "path file filename file_name filepath file_path image image_path img".split(),
    "label": "label labels class class_name class_id target category".split(),
    "split": "split set subset partition".split(),
}
"""Headers, in small letters and with underscores, by column."""


class _Line(NamedTuple):
    """A row of a label file. number: of the line. split: "" where the file does not give it."""

    number: int
    path: str
    label: str
    split: str


def labels_file_images(request: Request, file: Path, classes: Classes | None, tick: Tick) -> SourceImages:
    """Images named by a CSV or TSV file with the columns path and label, optionally split; in this order, or with a
    header that names them.

    A label is a class number or a class name. With a class list, it has to be one of the list. Without one, numbers
    have to be 0 … n - 1, each used; names are sorted as Python sorts text.

    Paths are relative to the source. If it is a folder, they may be absolute and may lead out of it; if it is ``file``
    itself, they are relative to the file's folder.
    """
    source, split = request.source, request.split
    lines = _read(file)
    folders, classes = _classes_of(lines, classes, file)
    alone = source == file
    source = file.parent if alone else source
    real = source.resolve()
    listing = Listing(source, tick)
    by_path = {} if alone else {_normal(found): found for found in listing}
    images: dict[str, list[LabelledImage]] = {}
    named: dict[str, int] = {}
    missing: list[_Line] = []
    own_split = SPLITS.get(file.stem.lower()) or split
    for line in lines:
        path, blob = _look_up(line.path, source, real, by_path)
        if blob is None:
            missing.append(line)
            continue
        if path in named:
            raise UserError(
                f"{file}, line {line.number}: {line.path!r} already has a label in line {named[path]}. Delete one of "
                f"the lines."
            )
        named[path] = line.number
        which = SPLITS.get(line.split.lower(), line.split) or own_split
        if which is None or "/" in which or which.startswith("."):
            raise UserError(
                f"{file}, line {line.number}: the split of {line.path!r} is unknown"
                f"{f' ({which!r} is not a valid name)' if which else ''}. Add --split NAME (train, val, …), name the "
                f"file train.csv or val.csv, or add a column `split`."
            )
        images.setdefault(which, []).append(LabelledImage(folders[line.label], path.lstrip("/"), blob))
    if missing:
        raise UserError(
            f"{len(missing)} of the {len(lines)} files named in {file} are not in {source}, such as "
            f"{missing[0].path!r} in line {missing[0].number}. Paths are relative to --source: name the folder that "
            f"they start in, copy the missing files, or delete the lines."
        )
    for path, found in by_path.items():
        if path not in named:
            listing.ignore(found, NOT_NAMED if found.blob.path != str(file) else None)
    seen = [(name, folder) for name in images for folder, _ in classes]
    return source_images(listing, images, seen, split=split, classes=classes)


def _read(file: Path) -> list[_Line]:
    """The rows of a label file below its header."""
    subject = f"The label file {file}"
    rows = tables.parse_any(tables.read_text(file, "label file"), _fits, subject)
    if not rows:
        raise UserError(f"{subject} is empty: it needs a row `path,label` for each image.")
    width = len(rows[0].cells)
    columns = _header(rows[0], subject)
    if columns is not None:
        rows = rows[1:]
    else:
        columns = {"path": 0, "label": 1, **({"split": 2} if len(rows[0].cells) == 3 else {})}
        if other := next((row for row in rows if len(row.cells) == 3 and row.cells[2].lower() not in SPLITS), None):
            raise UserError(
                f"{file}, line {other.number}: the third cell is {other.cells[2]!r}, which is not a known split, and "
                f"there is no header. If it is a split, add the header path,label,split; otherwise add a header with "
                f"another name for this column."
            )
    if not rows:
        raise UserError(f"{subject} has a header and no rows.")
    lines = []
    for row in rows:
        if len(row.cells) > width:
            raise UserError(f"{file}, line {row.number}: {len(row.cells)} cells, but the first row has {width}.")
        cells = {name: row.cells[at] if at < len(row.cells) else "" for name, at in columns.items()}
        if not all(cells.values()):
            raise UserError(
                f"{file}, line {row.number}: expected {', '.join(columns)}, got {','.join(row.cells)[:80]!r}."
            )
        try:
            label = tables.plain_spaces(cells["label"])
        except ValueError as error:
            raise UserError(f"{file}, line {row.number}: the label {error}. Delete it.") from None
        lines.append(_Line(row.number, cells["path"], label, cells.get("split", "")))
    return lines


def _fits(rows: Sequence[TableRow]) -> bool:
    return all(2 <= len(row.cells) <= len(rows[0].cells) for row in rows)


def _header(row: TableRow, subject: str) -> dict[str, int] | None:
    """The index of each column; None if the first row is not a header, so that columns are in the default order."""
    found = {
        name: [at for at, cell in enumerate(row.cells) if cell.lower().replace(" ", "_") in names]
        for name, names in _COLUMNS.items()
    }
    if not found["path"] and not (found["label"] and found["split"]):
        if len(row.cells) in (2, 3):
            return None
        raise UserError(
            f"{subject} has rows of {len(row.cells)} cells and no header that names the columns path and label. Add a "
            f"header with the names path, label and, if there is one, split."
        )
    wrong = [name for name, at in found.items() if len(at) > 1 or (not at and name != "split")]
    if wrong:
        raise UserError(
            f"{subject}: its header ({', '.join(row.cells)}) has "
            f"{'no column' if not found[wrong[0]] else 'several columns'} for the {wrong[0]}. Name exactly one column "
            f"{wrong[0]!r}."
        )
    return {name: at[0] for name, at in found.items() if at}


def _classes_of(lines: Sequence[_Line], classes: Classes | None, file: Path) -> tuple[dict[str, str], Classes]:
    """The class folder of each label, and the classes."""
    first: dict[str, int] = {}
    for line in lines:
        first.setdefault(line.label, line.number)
    numbers = {label: tables.whole_number(label) for label in first}
    if classes is None:
        return _classes_without_list(first, numbers, file)
    # In a list of classes called "1", "2", …, a number that is not one of these names is not a class id either.
    named_by_number = any(tables.whole_number(name) not in (None, i) for i, of in enumerate(classes) for name in of)
    by_name: dict[str, set[str]] = {}
    for folder, name in classes:
        by_name.setdefault(folder, set()).add(folder)
        by_name.setdefault(name, set()).add(folder)
    folders = {}
    for label, at in first.items():
        number = numbers[label]
        readings = set(by_name.get(label, ()))
        if number is not None and number < len(classes) and (readings or not named_by_number):
            readings.add(classes[number][0])
        if len(readings) != 1:
            why = "may mean " + " or ".join(sorted(readings)) if readings else "is not a class of the list"
            raise _not_a_class(file, at, label, why)
        folders[label] = readings.pop()
    return folders, classes


def _classes_without_list(
    first: dict[str, int], numbers: dict[str, int | None], file: Path
) -> tuple[dict[str, str], Classes]:
    """As ``_classes_of``. first: line of each label. numbers: each label as a class number, or None."""
    ids = sorted(number for number in numbers.values() if number is not None)
    names = sorted(label for label in first if numbers[label] is None)
    if not ids:
        if number := next((label for label in first if _looks_like_a_number(label)), None):
            raise _not_a_class(file, first[number], number, "is neither a class number 0, 1, 2, … nor a name")
        return {name: name for name in names}, tuple((name, name) for name in names)
    if names:
        name = min(names, key=first.__getitem__)
        example = next(label for label in first if numbers[label] is not None)
        why = f"is not a class number, but {example!r} in line {first[example]} is one"
        raise _not_a_class(file, first[name], name, why)
    if ids != list(range(len(ids))):
        gap = next(i for i, number in enumerate(ids) if number != i)
        raise UserError(
            f"{file} has the class numbers {ids[0]} … {ids[-1]}, but no image of class {gap}. Do they count from 1, or "
            f"is the file a part of the set? Give the list of classes with --classes FILE."
        )
    return {label: label for label in first}, tuple((str(i), str(i)) for i in ids)


def _looks_like_a_number(label: str) -> bool:
    try:
        float(label)
    except ValueError:
        return False
    return True


def _not_a_class(file: Path, line: int, label: str, why: str) -> UserError:
    return UserError(
        f"{file}, line {line}: the label {label!r} {why}. Write labels as plain numbers from 0 or as names, and give "
        f"the list of classes with --classes if there is one."
    )


def _normal(found: FoundFile) -> str:
    return posixpath.normpath("/".join(found.parts))


def _look_up(path: str, source: Path, real: Path, by_path: dict[str, FoundFile]) -> tuple[str, SourceBytes | None]:
    """The normalized path, relative to the source if it lies in it; and the bytes, None if the file does not exist.

    Args:
        real: ``source`` without symbolic links.
    """
    for spelling in (path, path.replace("\\", "/")):  # the latter for paths from Windows
        normal = posixpath.normpath(spelling)
        if normal.startswith("/"):
            base = next((base for base in (source, real) if Path(normal).is_relative_to(base)), None)
            normal = normal if base is None else os.path.relpath(normal, base)
        if normal in by_path:
            return normal, by_path[normal].blob
        try:
            if source.is_dir() and os.path.isfile(source / normal):
                return normal, Blob.whole(SourceFile.listed(source / normal))
        except (OSError, ValueError):
            pass
    return path, None
