"""Images whose labels are in a table of paths and labels, not in the names of their folders."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from cfmask.convert import tables
from cfmask.convert.sources.blobs import Blob, SourceBytes, SourceFile
from cfmask.convert.sources.files import SPLITS, LabelledImage, Tree, chosen_tree
from cfmask.convert.sources.listing import Found, Listing, Tick
from cfmask.convert.tables import Classes, TableRow
from cfmask.errors import UserError

NOT_NAMED = "not named in the label file"

_COLUMNS = {
    "path": {
        "path",
        "file",
        "filename",
        "file name",
        "file_name",
        "filepath",
        "file_path",
        "image",
        "image_path",
        "img",
    },
    "label": {"label", "labels", "class", "class_name", "class_id", "target", "category"},
    "split": {"split", "set", "subset", "partition"},
}


class _Line(NamedTuple):
    """A row of a label file. number: of the line. split: "" where the file does not say."""

    number: int
    path: str
    label: str
    split: str


def labels_file_tree(
    source: Path, file: Path, *, split: str | None, classes: Classes | None, tick: Tick
) -> tuple[Tree, Classes]:
    """Images that a CSV or TSV file names: a row `path,label` or `path,label,split` each, or other columns below a row
    of headers that names these.

    A label is the number of a class or its name: one of the class list, or any if there is no list. Without a list,
    numbers have to be 0 … n - 1, each there; names are sorted as Python sorts text.

    Args:
        source: folder or archive that the paths are relative to; with a folder, paths may be absolute and may lead out
            of it. If it is ``file`` itself, they are relative to the folder that the file lies in.
        split: chooses one split of several; names the one there is where the file does not.

    Returns:
        The tree; its class folders are those of the class list, else the labels. The classes.

    Raises:
        UserError: a file that cannot be read as such a table, paths that are not there or there twice, labels that are
            no classes, a split that cannot be told.
    """
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
                f"{file}, line {line.number}: {line.path!r} has a label in line {named[path]} already. Delete one of "
                f"the lines."
            )
        named[path] = line.number
        which = SPLITS.get(line.split.lower(), line.split) or own_split
        if which is None or "/" in which or which.startswith("."):
            raise UserError(
                f"{file}, line {line.number}: nothing says which split {line.path!r} is of"
                f"{f' ({which!r} is no name of one)' if which else ''}: add --split NAME (train, val, …), name the "
                f"file train.csv or val.csv, or add a column `split`."
            )
        images.setdefault(which, []).append(LabelledImage(folders[line.label], path.lstrip("/"), blob))
    if missing:
        raise UserError(
            f"{len(missing)} of the {len(lines)} files that {file} names are not in {source}: {missing[0].path!r} in "
            f"line {missing[0].number} for one. Paths are relative to --source: name the folder that they begin in, "
            f"copy what is missing, or delete the lines."
        )
    for path, found in by_path.items():
        if path not in named:
            listing.leave(found, NOT_NAMED if found.blob.path != str(file) else None)
    return chosen_tree(listing, images, [(name, folder) for name in images for folder, _ in classes], split), classes


def _read(file: Path) -> list[_Line]:
    """The rows of a label file below its header."""
    subject = f"The label file {file}"
    rows = tables.parse_any(tables.read_text(file, "label file"), _fits, subject)
    if not rows:
        raise UserError(f"{subject} is empty: it needs a row `path,label` an image.")
    width = len(rows[0].cells)
    columns = _header(rows[0], subject)
    if columns is not None:
        rows = rows[1:]
    else:
        columns = {"path": 0, "label": 1, **({"split": 2} if len(rows[0].cells) == 3 else {})}
        if other := next((row for row in rows if len(row.cells) == 3 and row.cells[2].lower() not in SPLITS), None):
            raise UserError(
                f"{file}, line {other.number}: the third cell is {other.cells[2]!r}, which is not the name of a split, "
                f"and there is no header. If it is one, add the header path,label,split; if not, a header with another "
                f"name for this column."
            )
    if not rows:
        raise UserError(f"{subject} has a header and no rows.")
    lines = []
    for row in rows:
        if len(row.cells) > width:
            raise UserError(f"{file}, line {row.number}: {len(row.cells)} cells, and the first row has {width}.")
        cells = {name: row.cells[at] if at < len(row.cells) else "" for name, at in columns.items()}
        if not cells["path"] or not cells["label"] or ("split" in columns and not cells["split"]):
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
    """Column numbers by what they hold; None where the first row is no header, so that the columns are in order.

    Raises:
        UserError: a header in which a column is missing or could be two, or rows of other than two or three cells
            without a header.
    """
    found = {
        name: [at for at, cell in enumerate(row.cells) if cell.lower().replace(" ", "_") in names]
        for name, names in _COLUMNS.items()
    }
    if not found["path"] and not (found["label"] and found["split"]):
        if len(row.cells) in (2, 3):
            return None
        raise UserError(
            f"{subject} has rows of {len(row.cells)} cells and no header that says which is the path and which the "
            f"label: add one with the names path, label and, if there is one, split."
        )
    wrong = [name for name, at in found.items() if len(at) > 1 or (not at and name != "split")]
    if wrong:
        raise UserError(
            f"{subject}: its header ({', '.join(row.cells)}) has "
            f"{'no column' if not found[wrong[0]] else 'several columns'} for the {wrong[0]}. Name the one that is "
            f"meant {wrong[0]!r} and the others otherwise."
        )
    return {name: at[0] for name, at in found.items() if at}


def _classes_of(lines: Sequence[_Line], classes: Classes | None, file: Path) -> tuple[dict[str, str], Classes]:
    """The class folder of each label, and the classes."""
    first: dict[str, int] = {}
    for line in lines:
        first.setdefault(line.label, line.number)
    numbers = {label: tables.whole_number(label) for label in first}
    are_numbers = [label for label, number in numbers.items() if number is not None]
    if classes is None:
        odd = [label for label in first if numbers[label] is None]
        if not are_numbers:
            if strange := [label for label in odd if _looks_like_a_number(label)]:
                raise _no_class(file, first[strange[0]], strange[0], "is neither a class number 0, 1, 2, … nor a name")
            names = sorted(first)
            return {name: name for name in names}, tuple((name, name) for name in names)
        if odd:
            other = f"is no class number, and {are_numbers[0]!r} in line {first[are_numbers[0]]} is one"
            raise _no_class(file, first[odd[0]], odd[0], other)
        ids = sorted(number for number in numbers.values() if number is not None)
        if ids != list(range(len(ids))):
            gap = next(i for i, number in enumerate(ids) if number != i)
            raise UserError(
                f"{file} has the class numbers {ids[0]} … {ids[-1]}, and no image of class {gap}: do they count from "
                f"1, or is the file a part of the set? --classes FILE says how many classes there are and which."
            )
        return {label: label for label in first}, tuple((str(i), str(i)) for i in ids)
    # Where classes are called "1", "2", …, a number that is none of these names is no place in the list either.
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
            why = "is no class of the list" if not readings else f"is {' or '.join(sorted(readings))} of the list"
            raise _no_class(file, at, label, why)
        folders[label] = readings.pop()
    return folders, classes


def _looks_like_a_number(label: str) -> bool:
    try:
        float(label)
    except ValueError:
        return False
    return True


def _no_class(file: Path, line: int, label: str, why: str) -> UserError:
    return UserError(
        f"{file}, line {line}: the label {label!r} {why}. Write labels as plain numbers from 0 or as names, and give "
        f"the list of classes with --classes if there is one."
    )


def _normal(found: Found) -> str:
    return posixpath.normpath("/".join(found.parts))


def _look_up(path: str, source: Path, real: Path, by_path: dict[str, Found]) -> tuple[str, SourceBytes | None]:
    """The path in one spelling, relative to the source where it lies in it; the bytes, None if there are none.

    Args:
        real: ``source`` without symbolic links.
    """
    for spelling in (path, path.replace("\\", "/")):  # the latter as Windows writes it
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
