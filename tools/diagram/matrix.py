"""Draw imports as a matrix: an SVG file that needs no script, font or style sheet.

Rows and columns are the boxes, in an order in which imports point forward as far as possible. The cell in row A and
column B has the number of imports from A into B, so imports lie right of the diagonal. A cell left of the diagonal is
red: two boxes import each other.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from html import escape, unescape

from tools.diagram.imports import Graph

PAGE, MARGIN, LABELS, HEADER, RIGHT = 1000, 14, 330, 160, 40
"""In pixels: width of the page, its margin, width of the row labels, height of the column labels, and
the room that the last column label needs on the right."""
ROW = 27
"""Height of a row, in pixels."""
_FORWARD, _BACKWARD = "#3b6fb6", "#b03030"
_SHADE = {"cfmask": "#e3f2e6", "launch": "#e2ecf9", "tools": "#fdf0dc", "slurm": "#eeeeee"}
_METADATA = re.compile(r'<metadata id="imports">(.*?)</metadata>', re.DOTALL)


def order_of(names: Iterable[str], edges: Mapping[tuple[str, str], int]) -> list[str]:
    """The names in an order in which few imports point backward."""
    order = sorted(names)

    def backward(order: list[str]) -> int:
        place = {name: i for i, name in enumerate(order)}
        return sum(n for (a, b), n in edges.items() if place.get(a, -1) > place.get(b, math.inf))

    improved = True
    while improved:
        improved = False
        for name in list(order):
            others = [other for other in order if other != name]
            best = min(([*others[:i], name, *others[i:]] for i in range(len(order))), key=backward)
            if backward(best) < backward(order):
                order, improved = best, True
    return order


def draw(graph: Graph) -> str:
    """The matrix of a graph, as SVG."""
    names = order_of(graph.boxes, graph.edges)
    column = (PAGE - 2 * MARGIN - LABELS - RIGHT) / len(names)
    height = HEADER + ROW * len(names) + 44
    metadata = json.dumps({"boxes": sorted(graph.boxes), "imports": sorted(graph.edges)}, ensure_ascii=False)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {PAGE} {height}" width="{PAGE}" height="{height}" '
        'font-family="Helvetica, Arial, DejaVu Sans, sans-serif">',
        "<title>Which package of this repository imports which</title>",
        f'<metadata id="imports">{escape(metadata, quote=False)}</metadata>',
        f'<rect width="{PAGE}" height="{height}" fill="#ffffff"/>',
    ]
    for i, name in enumerate(names):
        x, y = MARGIN + LABELS + i * column, HEADER + i * ROW
        box, shade = graph.boxes[name], _SHADE[re.split(r"[/ ]", name)[0]]
        width = PAGE - 2 * MARGIN - RIGHT
        parts += [
            f'<g><title>{escape(", ".join(box.modules))}</title><rect x="{MARGIN}" y="{y}" width="{width}" '
            f'height="{ROW - 2}" fill="{shade}"/>',
            _text(MARGIN + 24, y + 17, str(i + 1), size=11, anchor="end", colour="#777777"),
            _text(MARGIN + 32, y + 17, name, size=13, weight="bold"),
            _text(
                MARGIN + LABELS - 8, y + 17, f"{len(box.modules)} modules · {box.lines:,} lines", size=11, anchor="end"
            ),
            "</g>",
            f'<g transform="translate({x + column / 2 + 4:.1f} {HEADER - 8}) rotate(-65)">{_text(0, 0, name, size=12)}'
            "</g>",
            f'<rect x="{x:.1f}" y="{y}" width="{column - 2:.1f}" height="{ROW - 2}" fill="#bbbbbb"/>',
        ]
    place = {name: i for i, name in enumerate(names)}
    most = max(graph.edges.values(), default=1)
    for (a, b), count in graph.edges.items():
        x, y = MARGIN + LABELS + place[b] * column, HEADER + place[a] * ROW
        colour = _FORWARD if place[a] < place[b] else _BACKWARD
        strength = 0.25 + 0.6 * math.log1p(count) / math.log1p(most)
        parts.append(
            f'<g class="cell"><title>{escape(f"{a} imports {b}: {count}")}</title><rect x="{x:.1f}" y="{y}" '
            f'width="{column - 2:.1f}" height="{ROW - 2}" fill="{colour}" fill-opacity="{strength:.2f}"/>'
            + _text(x + column / 2 - 1, y + 17, str(count), size=11, anchor="middle")
            + "</g>"
        )
    legend = "The package of a row imports that of a column: number of imports. Red: two packages import each other."
    return "\n".join([*parts, _text(MARGIN, height - 16, legend, size=12), "</svg>"]) + "\n"


def drawn_imports(svg: str) -> tuple[set[str], set[tuple[str, str]]]:
    """The boxes of a drawing, and the pairs of boxes with imports."""
    found = _METADATA.search(svg)
    if found is None:
        return set(), set()
    content = json.loads(unescape(found[1]))
    return set(content["boxes"]), {(a, b) for a, b in content["imports"]}


def _text(
    x: float,
    y: float,
    text: str,
    *,
    size: float,
    anchor: str = "start",
    weight: str = "normal",
    colour: str = "#222222",
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" font-weight="{weight}" '
        f'fill="{colour}">{escape(text)}</text>'
    )
