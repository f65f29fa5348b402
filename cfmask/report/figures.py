"""What all charts share: sizes, style, panels, legends, and how a figure is written.

A figure is five inches wide, and its smallest text has 7.5 points: shrunk to half of a column of text (330 pixels of a
README on a screen), letters are seven pixels high.
"""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cfmask.errors import UserError

WIDTH = 5.0
"""Width of every figure in inches."""
SMALL = 7.5
"""Size of the smallest text, in points."""
STYLE: dict[Any, Any] = {
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "axes.grid": True},
    **{"grid.alpha": 0.3, "hatch.linewidth": 0.6, "font.size": 8, "axes.titlesize": 8.5, "axes.labelsize": 8},
    **{"xtick.labelsize": SMALL, "ytick.labelsize": SMALL, "legend.fontsize": 8, "legend.title_fontsize": 8},
    **{"legend.frameon": False, "legend.handlelength": 3.2, "legend.borderpad": 0.2, "legend.columnspacing": 1.2},
}
"""matplotlib's settings for charts: decorate a function that draws one with ``@rc_context(STYLE)``."""


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
    wrapped = [textwrap.fill(label, 66) for label in labels]
    longest = max(len(line) for label in wrapped for line in label.split("\n"))
    columns = max(1, min(len(labels), 4, 84 // (longest + 8)))  # 84 characters of this text are as wide as a chart
    lines = -(-sum(label.count("\n") + 1 for label in wrapped) // columns)
    titles = textwrap.wrap(title or "", 84)
    figure.set_figheight(figure.get_figheight() + 0.12 + 0.17 * (lines + len(titles)))
    figure.legend(handles, wrapped, title="\n".join(titles) or None, loc="outside lower center", ncols=columns)


def save(figure: Figure, path: Path, dpi: int = 200) -> None:
    """Write a figure; the ending of the path chooses the format.

    Raises:
        UserError: the file cannot be written, or has an unknown ending.
    """
    if not path.suffix:
        raise UserError(f"{path} has no ending of an image format. Name it .png, .pdf or .svg.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from")  # of a name in a script without a font
            figure.savefig(path, dpi=dpi)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}). Choose another path.") from error
    except ValueError as error:
        raise UserError(f"{path} has no ending of an image format: {error}. Name it .png, .pdf or .svg.") from error
