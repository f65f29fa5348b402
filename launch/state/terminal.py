"""Text for terminals: widths in cells, shortened and wrapped lines, colour, and tables that fit."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TextIO

from cfmask.runtime.output import cells

_GAP = "  "
_INDENT = 4
_ROOMY = 20
"""Cells for the last column that optional columns leave free."""
_NAME = 14
"""Cells that the first column keeps before other columns are left out."""
COLOURS = {"red": "31", "green": "32", "yellow": "33", "grey": "90"}


@dataclass(frozen=True)
class Terminal:
    """Where a text is shown.

    width: in cells; None if it is no terminal, and lines may have any length.
    colour: whether escape sequences are understood and wanted.
    """

    width: int | None = None
    colour: bool = False

    @classmethod
    def of(cls, stream: TextIO) -> Terminal:
        """The terminal behind a stream. NO_COLOR (no-color.org) and TERM=dumb switch colours off."""
        if not stream.isatty():
            return cls()
        dumb = os.environ.get("TERM", "dumb") in ("dumb", "")
        return cls(max(20, shutil.get_terminal_size().columns), not dumb and not os.environ.get("NO_COLOR"))

    def paint(self, text: str, colour: str | None) -> str:
        return f"\x1b[{COLOURS[colour]}m{text}\x1b[0m" if self.colour and colour and text else text


PLAIN = Terminal()
"""A file or a pipe."""


def _take(text: str, width: int) -> str:
    """The longest beginning that fits."""
    while cells(text) > width:
        text = text[: max(0, len(text) - max(1, (cells(text) - width) // 2))]
    return text


def shorten(text: str, width: int) -> str:
    """A text of at most ``width`` cells. The middle is left out: the ends of names tell runs apart."""
    if cells(text) <= width:
        return text
    if width < 2:
        return "…"[:width]
    tail = _take(text[::-1], (width - 1) // 2)[::-1]
    return f"{_take(text, width - 1 - cells(tail))}…{tail}"


def pad(text: str, width: int, *, right: bool = False) -> str:
    """Spaces up to a width, behind the text or (``right``) before it."""
    spaces = " " * max(0, width - cells(text))
    return spaces + text if right else text + spaces


def wrap(text: str, width: int | None, indent: int = _INDENT, most: int | None = None) -> list[str]:
    """Indented lines of at most ``width`` cells; at most ``most`` of them."""
    if width is None:
        return [" " * indent + text]
    room, lines, line = max(8, width - indent), list[str](), ""
    for word in text.split():
        if line and cells(line) + 1 + cells(word) > room:
            lines, line = [*lines, line], ""
        line = f"{line} {word}" if line else word
        while cells(line) > room:
            head = _take(line, room)
            lines, line = [*lines, head], line[len(head) :]
    lines += [line] if line else []
    if most is not None and len(lines) > most:
        lines = [*lines[: most - 1], _take(lines[most - 1], room - 1) + "…"]
    return [" " * indent + each for each in lines]


@dataclass(frozen=True)
class Column:
    """A column of a table.

    cells: one for each row; None is shown as a dash.
    right: aligned to the right.
    narrow: the column that replaces it where it does not fit.
    """

    title: str
    cells: Sequence[str | None]
    right: bool = False
    narrow: Column | None = None

    @cached_property
    def texts(self) -> list[str]:
        return ["–" if cell is None else cell for cell in self.cells]

    @cached_property
    def width(self) -> int:
        return max(map(cells, (self.title, *self.texts)))

    @property
    def is_empty(self) -> bool:
        return all(cell is None for cell in self.cells)


@dataclass(frozen=True)
class LastColumn:
    """The last column of a table: a phrase for each row, which is shown below the row if it does not fit.

    short: what the row has in its place, without what the phrase then repeats ("failed: …").
    colours: of the cells.
    """

    title: str
    phrases: Sequence[str]
    short: Sequence[str]
    colours: Sequence[str | None] = ()


def draw_table(
    name: Column,
    columns: Sequence[Column],
    last: LastColumn,
    terminal: Terminal,
    *,
    optional: Sequence[str] = (),
    droppable: Sequence[str] = (),
    below: Sequence[Sequence[str]] = (),
    most: int | None = None,
) -> str:
    """A table whose lines fit the terminal; elsewhere, all columns in full.

    Args:
        name: the first column, which is shortened if necessary.
        optional: titles of columns for wide terminals, the least important first.
        droppable: titles of columns that narrow terminals do without, the least important first.
        below: further texts of each row, on lines of their own.
        most: lines that a phrase below its row may have on a terminal.
    """
    shown, names = list(columns), name.texts
    name_width = name.width
    if terminal.width is not None:
        shown, name_width = _fit(name, columns, last, terminal.width, optional, droppable)
        names = [shorten(each, name_width) for each in names]
    header = [pad(shorten(name.title, name_width), name_width), *(pad(c.title, c.width, right=c.right) for c in shown)]
    used = sum(map(cells, header)) + len(_GAP) * len(header)
    room = None if terminal.width is None else max(0, terminal.width - used)
    fits = [room is None or cells(phrase) <= room for phrase in last.phrases]
    lines = [_GAP.join([*header, last.title if room is None else shorten(last.title, room)]).rstrip()]
    for i, phrase in enumerate(last.phrases):
        row = [pad(names[i], name_width), *(pad(c.texts[i], c.width, right=c.right) for c in shown)]
        cell = phrase if fits[i] else shorten(last.short[i], room or 0)
        lines.append(_GAP.join([*row, terminal.paint(cell, last.colours[i] if last.colours else None)]).rstrip())
        if not fits[i]:
            lines += wrap(phrase.removeprefix(f"{last.short[i]}: "), terminal.width, most=most)
        for text in below[i] if below else ():
            lines += wrap(text, terminal.width)
    return "\n".join(lines)


def _fit(
    name: Column, columns: Sequence[Column], last: LastColumn, width: int, optional: Sequence[str], drop: Sequence[str]
) -> tuple[list[Column], int]:
    """The columns that fit, and the width of the first one."""
    shown = [column for column in columns if not column.is_empty]
    phrase, short = (max(map(cells, (last.title, *texts))) for texts in (last.phrases, last.short))

    def left(first: int) -> int:
        """Cells for the last column."""
        return width - first - sum(column.width + len(_GAP) for column in shown) - len(_GAP)

    for title in optional:
        if left(min(name.width, width // 3)) < min(phrase, _ROOMY):
            shown = [column for column in shown if column.title != title]
    for title in drop:
        if left(min(name.width, _NAME)) < short:
            shown = [
                each for c in shown for each in ([c] if c.title != title else [] if c.narrow is None else [c.narrow])
            ]
    return shown, max(4, min(name.width, name.width + left(name.width) - short))
