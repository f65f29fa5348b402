"""Contact sheets: a row for each kind of picture and a column for each sample, so that eight samples are wide rather
than tall. More samples continue below."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath

from cfmask.report.figures import SMALL, STYLED, WIDTH, new_figure
from cfmask.report.fonts import drawable, families

COLUMNS = 8
"""Samples side by side."""
_FEW = 3
"""Up to so many samples are drawn as a row each, which is wide as well."""
_LABELS = 0.72
"""Width of the labels of rows, in inches."""
_LINE = 0.115
"""Height of a line of small text, in inches."""


@dataclass(frozen=True)
class Cell:
    """A picture and the text above it."""

    picture: np.ndarray | str
    """(H, W, 3) uint8, or a text in its place."""
    caption: str = ""


@STYLED
def contact_sheet(labels: Sequence[str], samples: Sequence[Sequence[Cell]], *, note: str = "") -> Figure:
    """A figure of samples, a column each; of few samples, a row each.

    Args:
        labels: of the pictures of a sample.
        samples: the cells of each sample, one for each label.
        note: a text below the samples.
    """
    if len(samples) <= _FEW:
        margin, side = 0.0, WIDTH / max(len(labels), 5)
        rows = [
            (
                "",
                [
                    Cell(cell.picture, f"{label}\n{cell.caption}".strip())
                    for label, cell in zip(labels, sample, strict=True)
                ],
            )
            for sample in samples
        ]
    else:
        margin = _LABELS
        side = (WIDTH - margin) / max(min(len(samples), COLUMNS), 6)
        blocks = [samples[i : i + COLUMNS] for i in range(0, len(samples), COLUMNS)]
        rows = [(label, [sample[i] for sample in block]) for block in blocks for i, label in enumerate(labels)]
    captions = [[wrapped(cell.caption, side * 0.92) for cell in cells] for _, cells in rows]
    heights = [side + _LINE * max(text.count("\n") + 1 if text else 0.2 for text in texts) for texts in captions]
    below = wrapped(note, WIDTH - 0.1, lines=9) if note else ""
    whole = top = sum(heights) + _LINE * (1.4 * below.count("\n") + 2 if below else 0.3)
    figure = new_figure(whole)
    figure.set_layout_engine("none")
    for (label, cells), texts, height in zip(rows, captions, heights, strict=True):
        top -= height
        words = wrapped(label, margin - 0.06)
        figure.text(0.04 / WIDTH, (top + side / 2) / whole, words, va="center", fontsize=SMALL, linespacing=1.1)
        for column, (cell, text) in enumerate(zip(cells, texts, strict=True)):
            box = ((margin + column * side) / WIDTH, top / whole, side * 0.95 / WIDTH, side * 0.95 / whole)
            axis = figure.add_axes(box)
            axis.set_axis_off()
            axis.set_title(text, fontsize=SMALL, pad=1.5, linespacing=1.0)
            if isinstance(cell.picture, str):
                words = wrapped(cell.picture, side * 0.9, lines=5)
                axis.text(0.5, 0.5, words, ha="center", va="center", transform=axis.transAxes, fontsize=SMALL)
            else:
                axis.imshow(cell.picture)
    figure.text(0.04 / WIDTH, 0.04 / whole, below, va="bottom", fontsize=SMALL)
    return figure


def wrapped(text: str, width: float, lines: int = 4) -> str:
    """Small text in lines of so many inches. Words that are wider, and what follows the last line, are cut."""
    found: list[str] = []
    for part in drawable(text).split("\n"):
        line = ""
        for word in part.split():
            if line and _inches(f"{line} {word}") > width:
                found.append(line)
                line = ""
            line = f"{line} {word}".strip()
            for kept in range(len(word) - 3, 0, -1):  # class ids differ in their last digits
                if _inches(line) <= width:
                    break
                line = f"{word[:kept]}…{word[-2:]}"
        found.append(line)
    if len(found) > lines:
        found = [*found[: lines - 1], found[lines - 1].rstrip("…") + "…"]
    return "\n".join(found)


@functools.cache
def _inches(text: str) -> float:
    fonts = FontProperties(family=families(text))
    return float(TextPath((0, 0), text, size=SMALL, prop=fonts).get_extents().width) / 72 if text.strip() else 0.0


def heat_map(picture: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """A picture (H, W, 3) uint8 under a map (h, w) of values in 0…1, which covers its upper left pixels."""
    shown = picture.copy()
    height, width = heat.shape
    colours = 255 * colormaps["inferno"](heat)[..., :3]
    shown[:height, :width] = (0.4 * shown[:height, :width] + 0.6 * colours).astype(np.uint8)
    return shown


def hatched(picture: np.ndarray, where: np.ndarray) -> np.ndarray:
    """A picture (H, W, 3) uint8 under grey stripes where the mask (H, W) is set, with a black and white outline, which
    is visible on photographs and on drawings, on white and on black."""
    shown = picture.copy()
    stripe = np.where(stripes(picture, share=0.5), 216, 64)[where]
    shown[where] = (0.35 * shown[where] + 0.65 * stripe[:, None]).astype(np.uint8)
    width = max(1, len(picture) // 100)
    inner = _without_edge(where, width)
    shown[where & ~inner] = 0
    shown[inner & ~_without_edge(inner, width)] = 255
    return shown


def stripes(picture: np.ndarray, *, share: float, falling: bool = False) -> np.ndarray:
    """(H, W) bool: pixels on rising diagonal stripes that cover this share of a picture."""
    period = max(4, len(picture) // 14)
    y, x = np.indices(picture.shape[:2])
    return ((x - y if falling else x + y) % period) < share * period


def _without_edge(where: np.ndarray, width: int) -> np.ndarray:
    """A mask without so many pixels along its edge. The edge of the picture is none of the mask."""
    for _ in range(width):
        whole = np.pad(where, 1, constant_values=True)
        where = where & whole[2:, 1:-1] & whole[:-2, 1:-1] & whole[1:-1, 2:] & whole[1:-1, :-2]
    return where


def pixels_of(mask: np.ndarray, patch: int, size: int) -> np.ndarray:
    """A mask of patches (rows, columns) as one of pixels (size, size). Pixels that no patch covers are not masked."""
    whole = np.zeros((size, size), bool)
    grid = mask.repeat(patch, 0).repeat(patch, 1)
    whole[: grid.shape[0], : grid.shape[1]] = grid
    return whole
