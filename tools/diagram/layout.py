"""Where the boxes and arrows of a layered diagram are: arrows go down, and few cross.

The method is Sugiyama's: break circles, put boxes into layers, order each layer so that few arrows cross, then place
boxes near what they are joined with. An arrow that spans several layers passes between the boxes of those on its way.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

Edge = tuple[str, str]
_TRIALS = 60
"""Random orders that the search for few crossings starts from."""


@dataclass(frozen=True)
class Link:
    """A line of the diagram.

    upper, lower: the boxes that it joins.
    down, up: whether the upper box imports the lower one, and the reverse.
    """

    upper: str
    lower: str
    down: bool
    up: bool


@dataclass
class Layout:
    """layers: names of boxes and of way points ("upper>lower"), the lowest layer first, each from left to right.
    x: of their centres. routes: what a link passes, from its upper box to its lower one."""

    layers: list[list[str]]
    x: dict[str, float] = field(default_factory=dict)
    routes: dict[Link, list[str]] = field(default_factory=dict)


def order_of(names: Iterable[str], edges: Mapping[Edge, int]) -> list[str]:
    """The names in an order in which few imports go from a later one to an earlier one."""
    order = sorted(names)

    def against(order: Sequence[str]) -> int:
        context = {name: i for i, name in enumerate(order)}
        return sum(n for (a, b), n in edges.items() if a in context and b in context and context[a] > context[b])

    improved = True
    while improved:
        improved = False
        for name in list(order):
            others = [other for other in order if other != name]
            best = min(
                ([*others[:i], name, *others[i:]] for i in range(len(order))),
                key=against,
            )
            if against(best) < against(order):
                order, improved = best, True
    return order


def links_of(names: Iterable[str], edges: Mapping[Edge, int]) -> list[Link]:
    """The lines to draw. An import that goes down and follows from others (a → b → c says that a needs c) has none."""
    context = {name: i for i, name in enumerate(order_of(names, edges))}
    known = {edge for edge in edges if edge[0] in context and edge[1] in context}
    down = {(a, b) for a, b in known if context[a] < context[b]}
    below: dict[str, set[str]] = {}
    for name in sorted(context, key=lambda name: -context[name]):
        near = {b for a, b in down if a == name}
        below[name] = near.union(*(below[b] for b in near))
    implied = {(a, c) for a, c in down if any((a, b) in down and c in below[b] for b in context)}
    pairs = {(a, b) for a, b in down if (a, b) not in implied} | {(b, a) for a, b in known - down}
    return [Link(a, b, (a, b) in known, (b, a) in known) for a, b in sorted(pairs)]


def lay_out(widths: Mapping[str, float], links: Sequence[Link], *, page: float, gap: float) -> Layout:
    """Place boxes of these widths on a page of this width, ``gap`` apart."""
    layer = _layers(widths, links)
    layout = Layout([[] for _ in range(1 + max(layer.values()))])
    for name in sorted(widths):
        layout.layers[layer[name]].append(name)
    for link in links:
        between = range(layer[link.upper] - 1, layer[link.lower], -1)
        points = {height: f"{link.upper}>{link.lower}@{height}" for height in between}
        for height, point in points.items():
            layout.layers[height].append(point)
        layout.routes[link] = [link.upper, *points.values(), link.lower]
    _reduce_crossings(layout)
    _place(layout, widths, page=page, gap=gap)
    return layout


def _layers(names: Iterable[str], links: Sequence[Link]) -> dict[str, int]:
    """Each box is above what it imports. One that fewer boxes lie below than above is right below the lowest of these,
    so that arrows are short."""
    layer = dict.fromkeys(names, 0)
    for _ in layer:
        for link in links:
            layer[link.upper] = max(layer[link.upper], layer[link.lower] + 1)
    for name in sorted(layer, key=lambda name: -layer[name]):
        above = [layer[link.upper] for link in links if link.lower == name]
        if len(above) >= max(1, sum(link.upper == name for link in links)):
            layer[name] = min(above) - 1
    return layer


def _segments(layout: Layout) -> list[Edge]:
    return [segment for route in layout.routes.values() for segment in pairwise(route)]


def _crossings(layers: Sequence[Sequence[str]], segments: Sequence[Edge]) -> float:
    """Pairs of segments that cross; shorter segments decide between equals."""
    context = {name: (height, i, i / len(row)) for height, row in enumerate(layers) for i, name in enumerate(row)}
    by_layer: dict[int, list[tuple[int, int]]] = {}
    stretch = 0.0
    for upper, lower in segments:
        by_layer.setdefault(context[upper][0], []).append((context[upper][1], context[lower][1]))
        stretch += abs(context[upper][2] - context[lower][2])
    crossed = sum(
        (a[0] - b[0]) * (a[1] - b[1]) < 0 for of_layer in by_layer.values() for a in of_layer for b in of_layer
    )
    return crossed + 0.1 * stretch


def _reduce_crossings(layout: Layout) -> None:
    segments = _segments(layout)
    near: dict[str, list[str]] = {}
    for a, b in segments:
        near.setdefault(a, []).append(b)
        near.setdefault(b, []).append(a)
    generator = random.Random(0)
    best = layout.layers
    for _ in range(_TRIALS):
        layers = [generator.sample(row, len(row)) for row in layout.layers]
        for _ in range(6):
            for row in (*layers, *reversed(layers)):
                context = {name: i / max(1, len(of) - 1) for of in layers for i, name in enumerate(of)}
                centre = {n: sum(context[o] for o in near.get(n, [n])) / len(near.get(n, [n])) for n in row}
                row.sort(key=centre.__getitem__)
        layers = _swapped(layers, segments)
        if _crossings(layers, segments) < _crossings(best, segments):
            best = layers
    layout.layers[:] = best


def _swapped(layers: list[list[str]], segments: Sequence[Edge]) -> list[list[str]]:
    """The same, with neighbours exchanged for as long as that helps."""
    cost, before = _crossings(layers, segments), float("inf")
    while cost < before:
        before = cost
        for row in layers:
            for i in range(len(row) - 1):
                row[i], row[i + 1] = row[i + 1], row[i]
                if (now := _crossings(layers, segments)) < cost:
                    cost = now
                else:
                    row[i], row[i + 1] = row[i + 1], row[i]
    return layers


def _place(layout: Layout, widths: Mapping[str, float], *, page: float, gap: float) -> None:
    """Centres: each near the mean of what it is joined with, in order and without overlap."""
    near: dict[str, list[str]] = {}
    for a, b in _segments(layout):
        near.setdefault(a, []).append(b)
        near.setdefault(b, []).append(a)
    x = layout.x
    for row in layout.layers:
        x |= {name: page * (i + 0.5) / len(row) for i, name in enumerate(row)}

    def wanted(name: str) -> float:
        joined = near.get(name, [name])
        # A way point follows other way points: arrows that span many layers are straight.
        weights = [1 if other in widths or name in widths else 8 for other in joined]
        return sum(x[other] * weight for other, weight in zip(joined, weights, strict=True)) / sum(weights)

    for _ in range(100):
        for row in (*layout.layers, *reversed(layout.layers)):
            sizes = [widths.get(name, 0.0) for name in row]
            x |= dict(zip(row, _apart([wanted(name) for name in row], sizes, page=page, gap=gap), strict=True))
    left, right = (min(x[n] - widths.get(n, 0) / 2 for n in x), max(x[n] + widths.get(n, 0) / 2 for n in x))
    for name in x:
        x[name] += (page - left - right) / 2


def _apart(wanted: Sequence[float], sizes: Sequence[float], *, page: float, gap: float) -> list[float]:
    """Centres as near as possible to those wanted (least squares), no two boxes closer than ``gap``: isotonic
    regression, by pooling neighbours that are too close."""
    offsets = [0.0]
    for left, right in pairwise(sizes):
        offsets.append(offsets[-1] + (left + right) / 2 + gap)
    pools: list[tuple[float, int]] = []  # mean, and number of those that it is of
    for value, offset in zip(wanted, offsets, strict=True):
        mean, number = value - offset, 1
        while pools and pools[-1][0] > mean:
            other, many = pools.pop()
            mean, number = (mean * number + other * many) / (number + many), number + many
        pools.append((mean, number))
    low, high = sizes[0] / 2 + gap / 2, page - sizes[-1] / 2 - gap / 2 - offsets[-1]
    starts = [max(low, min(mean, high)) for mean, number in pools for _ in range(number)]
    return [start + offset for start, offset in zip(starts, offsets, strict=True)]
