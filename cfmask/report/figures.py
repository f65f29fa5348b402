"""What all charts share: style, colours, legends, and how a figure is written."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from cfmask.errors import UserError

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#000000", "#8A8A8A")
"""Okabe and Ito's colours, which are distinct for any colour vision, without the yellow, which is faint on white."""
MARKERS = "osD^vPX<>phd*"
STYLE: dict[Any, Any] = {
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "axes.grid": True},
    **{"grid.alpha": 0.3, "axes.titlesize": 10, "axes.labelsize": 8, "xtick.labelsize": 7, "ytick.labelsize": 7},
    **{"legend.fontsize": 8, "legend.title_fontsize": 8, "legend.frameon": False, "legend.handlelength": 2.6},
}
"""matplotlib's settings for charts: decorate a function that draws one with ``@rc_context(STYLE)``."""
WIDTH = 8.0
"""Width of a chart in inches."""


def look(i: int, per_colour: Sequence[Any]) -> Any:
    """The value of ``per_colour`` for the i-th model: it changes when the colours are used up."""
    return per_colour[i // len(COLOURS) % len(per_colour)]


def colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]


def marker(i: int) -> str:
    return MARKERS[i % len(MARKERS)]


def new_figure(height: float, width: float = WIDTH) -> Figure:
    """A figure of this size in inches. Without pyplot, it needs no display and is freed like any object."""
    return Figure(figsize=(width, height), layout="constrained")


def legend_below(figure: Figure, handles: Sequence[Any], labels: Sequence[str], title: str | None = None) -> None:
    """Add a legend below all panels, in as many columns as fit, and make the figure higher by as much."""
    wrapped = [textwrap.fill(label, 100) for label in labels]
    longest = max(len(line) for label in wrapped for line in label.split("\n"))
    columns = max(1, min(len(labels), 4, 125 // (longest + 8)))  # 125 characters of small text are as wide as a chart
    lines = -(-sum(label.count("\n") + 1 for label in wrapped) // columns)
    figure.set_figheight(figure.get_figheight() + 0.2 + 0.19 * lines)
    figure.legend(handles, wrapped, title=title, loc="outside lower center", ncols=columns)


def save(figure: Figure, path: Path, dpi: int = 150) -> None:
    """Write a figure; the ending of the path chooses the format.

    Raises:
        UserError: the file cannot be written, or has an unknown ending.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=dpi)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}). Choose another path.") from error
    except ValueError as error:
        raise UserError(f"{path} has no ending of an image format: {error}. Name it .png, .pdf or .svg.") from error
