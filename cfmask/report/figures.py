"""What all charts share: sizes, style, panels, legends, and how a figure is written.

A figure is five inches wide, and its smallest text has 7.5 points: shrunk to half of a column of text (330 pixels of a
README on a screen), letters are seven pixels high.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cfmask.errors import UserError
from cfmask.report.fonts import drawable, fit_fonts
from cfmask.runtime.output import cells

WIDTH = 5.0
"""Width of every figure in inches."""
SMALL = 7.5
"""Size of the smallest text, in points."""
_STYLE: dict[Any, Any] = {
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "axes.grid": True},
    **{"grid.alpha": 0.3, "hatch.linewidth": 0.6, "font.size": 8, "axes.titlesize": 8.5, "axes.labelsize": 8},
    **{"xtick.labelsize": SMALL, "ytick.labelsize": SMALL, "legend.fontsize": 8, "legend.title_fontsize": 8},
    **{"legend.frameon": False, "legend.handlelength": 3.2, "legend.borderpad": 0.2, "legend.columnspacing": 1.2},
    **{"text.parse_math": False},  # a dollar sign in a name is a dollar sign
}
STYLED = style.context(_STYLE, after_reset=True)
"""Decorates functions that draw charts: matplotlib's settings, whatever the user's matplotlibrc says."""


def new_figure(height: float) -> Figure:
    """A figure of this height in inches. Without pyplot, it needs no display and is freed like any object."""
    return Figure(figsize=(WIDTH, height), layout="constrained")


def panels(count: int, height: float = 1.75) -> tuple[Figure, list[Axes]]:
    """A figure of ``count`` panels of this height in inches, in two columns, or in one if there is one panel."""
    columns = min(2, count)
    rows = -(-count // columns)
    figure = new_figure(height * rows)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[count:]:
        axis.remove()
    return figure, axes[:count]


def legend_below(figure: Figure, handles: Sequence[Any], labels: Sequence[str], title: str | None = None) -> None:
    """Add a legend below all panels, in as many columns as fit, and make the figure higher by as much."""
    wrapped = [_filled(drawable(label), 66) for label in labels]
    longest = max(cells(line) for label in wrapped for line in label.split("\n"))
    columns = max(1, min(len(labels), 4, 84 // (longest + 8)))  # 84 characters of this text are as wide as a chart
    lines = -(-sum(label.count("\n") + 1 for label in wrapped) // columns)
    titles = textwrap.wrap(title or "", 84)
    figure.set_figheight(figure.get_figheight() + 0.12 + 0.17 * (lines + len(titles)))
    names = [str(i) for i in range(len(wrapped))]  # matplotlib leaves out names that begin with _
    legend = figure.legend(handles, names, title="\n".join(titles) or None, loc="outside lower center", ncols=columns)
    for text, label in zip(legend.get_texts(), wrapped, strict=True):
        text.set_text(label)


def broken(text: str, width: int) -> str:
    """A name, drawable, in at most three lines of so many letters, broken at blanks, hyphens and underscores. The
    middle of a longer one is left out: the ends of names tell them apart."""
    lines = [""]
    for piece in re.findall(r"[^\s_-]*[\s_-]?", drawable(text)):
        for part in (piece[i : i + width] for i in range(0, len(piece), width)):
            if cells(lines[-1] + part.rstrip()) > width and lines[-1]:
                lines.append("")
            lines[-1] += part
    if len(lines) > 3:
        lines = [*lines[:2], "…" + "".join(lines)[1 - width :]]
    return "\n".join(line.strip() for line in lines)


def _filled(text: str, width: int) -> str:
    """A text in lines of so many letters, of which a wide character counts as two."""
    doubled = "".join(char + "\0" * (cells(char) - 1) for char in text)
    return textwrap.fill(doubled, width).replace("\0", "")


@STYLED
def save(figure: Figure, path: Path, dpi: int = 200) -> None:
    """Write a figure; the ending of the path chooses the format.

    Raises:
        UserError: the file cannot be written, or has an unknown ending.
    """
    if path.suffix[1:].lower() not in figure.canvas.get_supported_filetypes():
        raise UserError(f"{path} has no ending of an image format. Name it .png, .pdf or .svg.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fit_fonts(figure)
        figure.savefig(path, dpi=dpi)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}). Choose another path.") from error
