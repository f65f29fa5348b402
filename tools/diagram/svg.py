"""The diagram as an SVG file that needs nothing else: no script, no font, no style sheet."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterable, Sequence
from html import escape, unescape

from tools.diagram.imports import BASE, CORE, FOUNDATION, RUNTIME, Graph
from tools.diagram.layout import Layout, Link, lay_out, links_of

PAGE, MARGIN, GAP, ROW_GAP = 1120, 14, 22, 58
"""In pixels: width of the page, its margin, and the space between boxes and between layers."""
_LISTED = (CORE, *FOUNDATION)
"""Boxes that list their modules."""
_LINE, _CHARACTER = 14, 6.2
"""Height of a line of listed modules, and the mean width of one of its characters."""
_FILL = {"cfmask": "#e3f2e6", "launch": "#e2ecf9", "tools": "#fdf0dc", "slurm": "#eeeeee"}
_STROKE = {"cfmask": "#3c8d4f", "launch": "#3b6fb6", "tools": "#c2872a", "slurm": "#888888"}
_AGAINST = "#b03030"
_META = re.compile(r'<metadata id="imports">(.*?)</metadata>', re.DOTALL)


def draw(graph: Graph) -> str:
    """The diagram of a graph."""
    return _Drawing(graph).svg()


def drawn_imports(svg: str) -> tuple[set[str], set[tuple[str, str]]]:
    """The boxes of a diagram, and which imports which: also the imports that it has no arrow for."""
    found = _META.search(svg)
    if found is None:
        return set(), set()
    content = json.loads(unescape(found[1]))
    return set(content["boxes"]), {(a, b) for a, b in content["imports"]}


class _Drawing:
    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        names = [name for name in graph.boxes if name not in FOUNDATION]
        inner = PAGE - 2 * MARGIN
        share = (inner - GAP) / 2
        self._widths = {name: self._width(name) for name in names} | dict.fromkeys(FOUNDATION, share)
        self._layout: Layout = lay_out(
            {name: self._widths[name] for name in names},
            links_of(names, graph.edges),
            page=inner,
            gap=GAP,
        )
        self._x = {name: MARGIN + x for name, x in self._layout.x.items()}
        self._heights = {name: self._height(name) for name in graph.boxes}
        self._y: dict[str, float] = {}  # upper edges
        self._rows: dict[str, tuple[float, float]] = {}  # of everything in a layer: its upper and lower edge
        self._foot = self._stack()

    def svg(self) -> str:
        graph = self._graph
        meta = json.dumps({"boxes": sorted(graph.boxes), "imports": sorted(graph.edges)}, ensure_ascii=False)
        rest = [name for name in graph.boxes if name not in FOUNDATION]
        without = [name for name in rest if not any((name, below) in graph.edges for below in FOUNDATION)]
        above = "imported by all boxes above" + (f" except {', '.join(without)}" if without else "")
        height = self._foot + 62
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {PAGE} {height:.0f}" width="{PAGE}" '
            f'height="{height:.0f}" font-family="Helvetica, Arial, DejaVu Sans, sans-serif">',
            "<title>Which package of this repository imports which</title>",
            f'<metadata id="imports">{escape(meta, quote=False)}</metadata>',
            "<defs>",
            *(_arrow_head(name, colour) for name, colour in (("down", "#555555"), ("up", _AGAINST))),
            "</defs>",
            f'<rect width="{PAGE}" height="{height:.0f}" fill="#ffffff"/>',
            *self._links(),
            *(self._box(name) for name in rest),
            self._band(above),
            *(self._box(name) for name in FOUNDATION if name in graph.boxes),
            *self._legend(),
            "</svg>",
        ]
        return "\n".join(parts) + "\n"

    # --- sizes and places -------------------------------------------------------------------------------------------

    def _width(self, name: str) -> float:
        if name in _LISTED:
            return 340.0
        return max(9.0 * len(name) + 22, 142 + self._graph.boxes[name].lines / 100)

    def _listing(self, name: str) -> list[str]:
        if name not in _LISTED:
            return []
        columns = int((self._widths[name] - 24) / _CHARACTER)
        return textwrap.wrap(", ".join(self._graph.boxes[name].modules), columns, break_on_hyphens=False)

    def _height(self, name: str) -> float:
        lines = len(self._listing(name))
        return 46 + (lines * _LINE + 6 if lines else 0)

    def _stack(self) -> float:
        """Fill in ``_y`` and ``_rows``, from the top; the lower edge of it all."""
        y = float(MARGIN)
        for row in reversed(self._layout.layers):
            height = max(self._heights.get(name, 0.0) for name in row)
            for name in row:
                self._rows[name] = (y, y + height)
                if name in self._heights:
                    self._y[name] = y + (height - self._heights[name]) / 2
            y += height + ROW_GAP
        y += -ROW_GAP + 62
        for i, name in enumerate(FOUNDATION):
            self._y[name] = y
            self._x[name] = MARGIN + self._widths[name] / 2 + i * (self._widths[name] + GAP)
        return y + max(self._heights.get(name, 0.0) for name in FOUNDATION)

    # --- what is drawn ----------------------------------------------------------------------------------------------

    def _box(self, name: str) -> str:
        box, top = self._graph.boxes[name], name.partition("/")[0].partition(" ")[0]
        x, y, width, height = self._x[name], self._y[name], self._widths[name], self._heights[name]
        files = f"{len(box.modules)} modules · {box.lines:,} lines"
        imports = sorted((b, n) for (a, b), n in self._graph.edges.items() if a == name)
        hint = f"{name} imports " + (", ".join(f"{b} ({n})" for b, n in imports) or "no other box")
        listed = "".join(
            f'<text x="{x:.1f}" y="{y + 56 + i * _LINE:.1f}" font-size="11" fill="#444444">{escape(line)}</text>'
            for i, line in enumerate(self._listing(name))
        )
        return (
            f'<g text-anchor="middle"><title>{escape(hint)}</title>'
            f'<rect x="{x - width / 2:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="7" '
            f'fill="{_FILL[top]}" stroke="{_STROKE[top]}" stroke-width="1.4"/>'
            f'<text x="{x:.1f}" y="{y + 20:.1f}" font-size="14" font-weight="bold" fill="#1c1c1c">{escape(name)}</text>'
            f'<text x="{x:.1f}" y="{y + 37:.1f}" font-size="11.5" fill="#555555">{files}</text>{listed}</g>'
        )

    def _links(self) -> Iterable[str]:
        leaving = self._ports(lambda link: link.upper, -2)
        coming = self._ports(lambda link: link.lower, 1)
        for link, route in self._layout.routes.items():
            points = [(leaving[link], self._y[link.upper] + self._heights[link.upper])]
            for point in route[1:-1]:
                points += [(self._x[point], edge) for edge in self._rows[point]]
            points.append((coming[link], self._y[link.lower]))
            yield _curve(points, link)

    def _ports(self, end, neighbour: int) -> dict[Link, float]:
        """Where links touch a box, side by side in the order of where they come from or go to."""
        found: dict[str, list[Link]] = {}
        for link in self._layout.routes:
            found.setdefault(end(link), []).append(link)
        places = {}
        for name, links in found.items():
            step = min(26.0, (self._widths[name] - 30) / len(links))
            aims = {link: self._x[self._layout.routes[link][1 if neighbour < 0 else -2]] for link in links}
            for i, link in enumerate(sorted(links, key=aims.__getitem__)):
                places[link] = self._x[name] + (i - (len(links) - 1) / 2) * step
        return places

    def _band(self, text: str) -> str:
        top = self._y[BASE] - 28
        height = max(self._heights.get(name, 0.0) for name in FOUNDATION) + 38
        return (
            f'<rect x="4" y="{top:.1f}" width="{PAGE - 8}" height="{height:.1f}" rx="9" fill="none" stroke="#9a9a9a" '
            f'stroke-dasharray="2 4"/><text x="{PAGE / 2:.0f}" y="{top + 18:.1f}" font-size="12" fill="#555555" '
            f'text-anchor="middle">{escape(text)}</text>'
        )

    def _legend(self) -> Iterable[str]:
        y = self._foot + 40
        both = any((b, a) in self._graph.edges for a, b in self._graph.edges if {a, b} != {BASE, RUNTIME})
        samples: Sequence[tuple[float, Link, str]] = (
            (MARGIN, Link("a", "b", True, False), "imports; imports that follow from other arrows are left out"),
            *(
                [(540.0, Link("a", "b", True, True), "imports in both directions, of different modules")]
                if both
                else []
            ),
        )
        for x, link, text in samples:
            yield _curve([(x, y - 4), (x + 34, y - 4)], link, straight=True)
            yield f'<text x="{x + 44:.0f}" y="{y:.0f}" font-size="12" fill="#333333">{text}</text>'


def _curve(points: Sequence[tuple[float, float]], link: Link, *, straight: bool = False) -> str:
    """Through the points, vertical at each."""
    path = f"M{points[0][0]:.1f} {points[0][1]:.1f}"
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        bend = 0.0 if straight or abs(x0 - x1) < 0.5 else 0.5 * (y1 - y0)
        path += (
            f"L{x1:.1f} {y1:.1f}"
            if not bend
            else f"C{x0:.1f} {y0 + bend:.1f} {x1:.1f} {y1 - bend:.1f} {x1:.1f} {y1:.1f}"
        )
    colour = _AGAINST if link.up else "#555555"
    heads = ('marker-end="url(#up)" ' if link.up else 'marker-end="url(#down)" ') if link.down else ""
    heads += 'marker-start="url(#up)" ' if link.up else ""
    return f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="1.5" {heads}/>'


def _arrow_head(name: str, colour: str) -> str:
    return (
        f'<marker id="{name}" viewBox="0 0 8 8" refX="7.5" refY="4" markerWidth="7" markerHeight="7" '
        f'orient="auto-start-reverse"><path d="M0 0.8 L8 4 L0 7.2 z" fill="{colour}"/></marker>'
    )
