"""Tables in text files: class lists, label files, solution files.

Accepted: UTF-8 with or without a byte order mark, UTF-16 with one; any line ends; cells in double quotes; empty lines
and empty columns at the end. Refused, with a remedy: other encodings, spreadsheets' own formats, unpaired quotes.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from cfmask.data import imagenet
from cfmask.data.shards import load_manifest
from cfmask.errors import UserError

Classes = tuple[tuple[str, str], ...]
"""(class folder or wnid, display name) by class id."""

TAB, SEMICOLON, COMMA = "\t", ";", ","
_SPACES = re.compile("[\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000]")
_INVISIBLE = re.compile("[\u00a0\u1680\u2000-\u200f\u2028-\u202f\u205f\u2060\u3000\ufeff]")
_NOT_TEXT = {
    b"PK\3\4": "a zip archive or an .xlsx or .ods workbook",
    b"\xd0\xcf\x11\xe0": "an .xls workbook",
    b"\x1f\x8b": "compressed with gzip",
    b"PAR1": "a Parquet file",
}


class TableRow(NamedTuple):
    """number: of the line in the file where the row ends, from 1. cells: without empty ones at the end."""

    number: int
    cells: tuple[str, ...]


def read_text(path: Path, what: str) -> str:
    """A text file. what: its name in errors ("class list", …)."""
    try:
        return decode(path.read_bytes(), f"The {what} {path}")
    except OSError as error:
        raise UserError(f"The {what} {path} cannot be read ({error.strerror}).") from None


def decode(data: bytes, subject: str) -> str:
    """Raises: UserError: ``data`` is not text. ``subject`` begins the message."""
    for magic, kind in _NOT_TEXT.items():
        if data.startswith(magic):
            raise UserError(f"{subject} is {kind}, not a text file: export or unpack it as text, tab-separated.")
    utf16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        text = data.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{subject} is neither UTF-8 nor UTF-16 (byte {error.start}): save it as UTF-8 (in Excel: 'CSV UTF-8')."
        ) from None
    if "\0" in text:
        raise UserError(f"{subject} contains NUL characters: save it as UTF-8 (in Excel: 'CSV UTF-8').")
    return text


def parse(text: str, delimiter: str) -> list[TableRow]:
    """The rows of a table, without empty ones; cells without surrounding white space.

    Raises:
        ValueError: a quote is not closed or is followed by more text; the message gives the line.
    """
    rows = []
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for cells in reader:
            cells = [cell.strip() for cell in cells]
            while cells and not cells[-1]:
                cells.pop()
            if cells:
                rows.append(TableRow(reader.line_num, tuple(cells)))
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: {error}") from None
    return rows


def parse_any(text: str, fits: Callable[[Sequence[TableRow]], bool], subject: str) -> list[TableRow]:
    """The rows of a table whose cells are separated by tabs if it contains any; otherwise by the one of semicolons and
    commas with which ``fits`` accepts the rows.

    Returns:
        The rows. If no separator fits, those with the most cells, so that the caller can report the problem.
    """
    readings, problem = [], ""
    for delimiter in [TAB] if TAB in text else [SEMICOLON, COMMA]:
        try:
            readings.append(parse(text, delimiter))
        except ValueError as error:
            problem = str(error)
    fitting = [rows for rows in readings if rows and fits(rows)]
    if problem and not fitting:
        raise UserError(
            f"{subject}, {problem}: a cell that begins with a double quote has to end with one, and quotes inside it "
            f"are doubled."
        )
    if len(fitting) > 1:
        raise UserError(f"{subject} can be read as separated by semicolons and by commas. Separate its cells by tabs.")
    return (fitting or sorted(readings, key=lambda rows: -max((len(row.cells) for row in rows), default=0)))[0]


def whole_number(text: str) -> int | None:
    """The number that consists of ASCII digits without a sign or leading zeros; None for other texts.
    ``int`` would also accept "1_000", "+3", " 3" and digits of other scripts."""
    return int(text) if re.fullmatch(r"0|[1-9][0-9]{0,8}", text) else None


def plain_spaces(text: str) -> str:
    """A name with plain spaces instead of non-breaking and other special ones, so that equal names compare equal.

    Raises:
        ValueError: it contains an invisible character.
    """
    text = _SPACES.sub(" ", text)
    if invisible := _INVISIBLE.search(text):
        raise ValueError(f"{text!r} contains the invisible character U+{ord(invisible[0]):04X}")
    return text


_FOLDER_HEADERS = {"folder", "directory", "class", "class folder", "wnid", "synset", "id", "class id"}
_NAME_HEADERS = {"name", "display name", "class name", "classname", "label", "words"}
_HEADER_WORDS = set(
    "class classes folder directory dir wnid synset id idx index key code number name names classname display label "
    "labels words text title description category human readable string target english".split()
)


def class_list(where: str) -> Classes:
    """(folder, display name) by class id: ImageNet's for ``imagenet``, else those of a folder of shards or of a class
    list. Raises UserError as their readers."""
    if where == "imagenet":
        return imagenet.classes()
    path = Path(where).expanduser()
    return load_manifest(path, check_files=False).classes if path.is_dir() else read_classes(path)


def read_classes(path: Path) -> Classes:
    """A class list: a row `folder, display name` for each class, class 0 first, separated by tabs (or by semicolons or
    commas, as spreadsheets export). A header row is skipped.
    """
    subject = f"The class list {path}"
    text = read_text(path, "class list")
    rows = parse_any(text, lambda rows: all(len(row.cells) == 2 and all(row.cells) for row in rows), subject)
    if rows and len(rows[0].cells) == 2:
        first, second = (" ".join(re.findall(r"[^\W_]+", cell.lower())) for cell in rows[0].cells)
        if first in _FOLDER_HEADERS and second in _NAME_HEADERS:
            rows = rows[1:]
        elif first != second and first and second and {*first.split(), *second.split()} <= _HEADER_WORDS:
            # A header taken for a class would shift all class ids by one.
            raise UserError(
                f"{path}, line {rows[0].number}: {', '.join(map(repr, rows[0].cells))} looks like a header. If it is "
                f"one, delete the line; if it is class 0, give it another display name."
            )
    classes: dict[str, str] = {}
    for number, cells in rows:
        line = f"{path}, line {number}"
        if len(cells) != 2 or not all(cells):
            raise UserError(
                f"{line}: expected a folder, a tab and a display name, got {len(cells)} cells "
                f"({', '.join(map(repr, cells[:4]))})."
            )
        folder, name = cells
        if invisible := _INVISIBLE.search(folder):
            raise UserError(
                f"{line}: the folder {folder!r} contains the character U+{ord(invisible[0]):04X}, which is invisible "
                f"or looks like a space. Write the folder's name as it is on disk."
            )
        if folder in classes:
            raise UserError(f"{line}: the folder {folder!r} has an earlier line.")
        try:
            classes[folder] = plain_spaces(name)
        except ValueError as error:
            raise UserError(f"{line}: the display name {error}. Delete it.") from None
    if not classes:
        raise UserError(f"The class list {path} is empty.")
    return tuple(classes.items())
