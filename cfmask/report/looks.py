"""The look of each method: colour, marker, line style and hatch, the same in every chart.

A look belongs to a method and not to its place in a chart, so a method keeps it whichever others are shown beside it.
Methods of one family share a colour and differ in marker and line style; no two methods share all three. Each can be
told apart without colour as well.
"""

from __future__ import annotations

import re
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any

from cfmask.presets import ALIASES

BLUE, VERMILION, GREEN, ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
PINK, SKY, BLACK, GREY = "#CC79A7", "#56B4E9", "#000000", "#8A8A8A"
COLOURS = (BLUE, VERMILION, GREEN, ORANGE, PINK, SKY, BLACK, GREY)
"""Okabe and Ito's colours, which are distinct for any colour vision, without the yellow, which is faint on white."""
MARKERS = "osD^v*PX<>dphH8"
SOLID, DASHED, DOTTED, DASH_DOT, LONG_DASH, DASH_DOT_DOT = DASHES = (
    (0, ()),
    (0, (4, 1.5)),
    (0, (1, 1.2)),
    (0, (5, 1.5, 1, 1.5)),
    (0, (8, 2)),
    (0, (5, 1.5, 1, 1.5, 1, 1.5)),
)
"""Line styles of matplotlib: offset, and lengths of lines and gaps in line widths."""
_BY_GAPS = (SOLID, LONG_DASH, DASHED, DASH_DOT, DASH_DOT_DOT, DOTTED)
_HATCHES = dict(zip(DASHES, ("", "////", "....", "xxxx", "\\\\\\\\", "++++"), strict=True))


@dataclass(frozen=True)
class Look:
    """How a method is drawn."""

    colour: str
    marker: str
    dash: tuple[int, tuple[float, ...]]

    @property
    def hatch(self) -> str:
        """The hatch of its bars."""
        return _HATCHES[self.dash]

    def line(self, *, markers: bool = True, width: float = 1.3) -> dict[str, Any]:
        """Arguments of matplotlib's ``plot``."""
        above = 2 + 0.1 * _BY_GAPS.index(self.dash)  # of two lines that overlap, both are visible
        style: dict[str, Any] = {"color": self.colour, "linestyle": self.dash, "linewidth": width, "zorder": above}
        return style | ({"marker": self.marker, "markersize": 4} if markers else {})

    def point(self, *, hollow: bool = False) -> dict[str, Any]:
        """Arguments of matplotlib's ``plot`` for a point without a line."""
        face = "white" if hollow else self.colour
        return {"color": self.colour, "marker": self.marker, "markerfacecolor": face, "linestyle": "", "markersize": 5}

    def bar(self) -> dict[str, Any]:
        """Arguments of matplotlib's ``bar``."""
        return {"color": self.colour, "hatch": self.hatch, "edgecolor": "white", "linewidth": 0}


_LOOKS = {
    "zero-shot": Look(BLACK, "*", DOTTED),
    "linear-probe": Look(GREY, "P", DASH_DOT_DOT),
    "ft": Look(VERMILION, "s", DASHED),
    "lp-ft": Look(VERMILION, "X", DASH_DOT),
    "wise-ft": Look(ORANGE, "D", DASH_DOT),
    "soup": Look(ORANGE, "h", DOTTED),
    "kd-clean": Look(PINK, "<", SOLID),
    "kd-masked": Look(PINK, ">", DASHED),
    "fd-clean": Look(PINK, "d", DOTTED),
    "wise-kd": Look(PINK, "p", DASH_DOT),
    "object-mask-single-fill": Look(BLUE, "o", SOLID),
    "object-mask-multi-fill": Look(BLUE, "H", DASHED),
    "object-mask-no-fill": Look(BLUE, "8", DOTTED),
    "grad-cam": Look(BLUE, "P", DASH_DOT),
    "released-code": Look(BLUE, "X", LONG_DASH),
    "context-mask-single-fill": Look(GREEN, "^", LONG_DASH),
    "context-mask-multi-fill": Look(GREEN, "p", DASHED),
    "context-mask-no-fill": Look(GREEN, "d", DOTTED),
    "random-mask-single-fill": Look(SKY, "v", DASH_DOT_DOT),
    "random-mask-multi-fill": Look(SKY, "<", DASHED),
    "random-mask-no-fill": Look(SKY, ">", DOTTED),
}
"""By preset, and for models that no preset trains."""
_NAMES = {
    **{name: name for name in _LOOKS},
    **ALIASES,
    **dict.fromkeys(("zeroshot", "pretrained", "pre-trained"), "zero-shot"),
    **dict.fromkeys(("wiseft", "alpha"), "wise-ft"),
    **{"wisekd": "wise-kd", "feature-distillation": "fd-clean"},
    **dict.fromkeys(("this-method", "the-method"), "object-mask-single-fill"),
}
"""Methods by the names that they have in tables and charts: those by which presets can be asked for, and those of
models that no preset trains."""
_FIRST = ("grad-cam", "wise-kd", "wise-ft", "kd-masked")
_LAST = ("released-code", "soup", "zero-shot", "fd-clean", "kd-clean", "lp-ft", "linear-probe", "ft")
"""Of several methods in a name, one of the first counts, or else a mask, or else one of the last, in this order."""


def method_of(name: str) -> str | None:
    """The method that a name in a table or chart stands for: a preset, "zero-shot", "wise-ft" or "soup"; None if it
    names none. "FT", "ft-s0" and "fine-tuning" are the preset ft; a mask without its fill is that with single-fill."""
    text = f"-{_words(name)}-"
    found = [(each, method) for each, method in _NAMES.items() if f"-{_words(each)}-" in text]
    ranks = {method: i for i, method in enumerate((*_FIRST, None, *_LAST))}
    return min(found, key=lambda pair: (ranks.get(pair[1], len(_FIRST)), -len(pair[0])), default=("", None))[1]


def _words(name: str) -> str:
    """The words of a name in lower case, joined by hyphens: "object masks" and "Object-Masked" are object-mask."""
    words = re.sub(r"[^a-z0-9]+", "-", name.lower().replace("α", "alpha")).strip("-")
    return re.sub(r"\bmask(ed|s)\b", "mask", words)


def looks(names: Sequence[str]) -> list[Look]:
    """A look for each line of a chart, all different.

    Args:
        names: preset names or names in tables, see ``method_of``. A second line of one method keeps the method's colour
            and has another marker and line style. A name of no method has a look that the chart does not use otherwise.
    """
    known = [_LOOKS.get(method_of(name) or "") for name in names]
    found: list[Look] = []
    for look in known:
        if look is None or look in found:
            choices = _spare({each.colour for each in known if each}) if look is None else _variants(look)
            used = {*found, *filter(None, known)}
            look = next((each for each in choices if each not in used), choices[0])
        found.append(look)
    return found


_PAIRS = tuple((MARKERS[n % 15], DASHES[(n + n // 30) % 6]) for n in range(len(MARKERS) * len(DASHES)))
"""Each pair of a marker and a line style once. Neighbours differ in both."""


def _variants(look: Look) -> list[Look]:
    """Looks of the same colour."""
    start = _PAIRS.index((look.marker, look.dash)) + 1
    return [Look(look.colour, *pair) for pair in (*_PAIRS[start:], *_PAIRS[:start])]


def _spare(taken: Set[str]) -> list[Look]:
    """All looks. Neighbours differ in everything, and colours that are taken come last."""
    colours = sorted(COLOURS, key=lambda colour: colour in taken)
    return [
        Look(colour, *_PAIRS[(n + i) % len(_PAIRS)]) for n in range(len(_PAIRS)) for i, colour in enumerate(colours)
    ]
