"""Results as pictures."""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy.special import expit, logit

from cfmask.errors import UserError
from cfmask.report.results import AVERAGE, ModelResult, ResultRow, Results, Split
from cfmask.report.robustness import effective_values, robustness_panels
from cfmask.report.tables import checked_split, signed

# Okabe and Ito's colours that can be told apart with any colour vision, less the yellow, which is faint on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#000000", "#8A8A8A")
_MARKERS = "osD^vPX<>phd*"
_DASHES = ("-", "--", ":", "-.")
_HATCHES = ("", "////", "....", "xxxx")
_WIDTH = 8.0
_LINE = 0.19
"""Inches: of every picture, and of a line of small text."""
_SMALL = 8
"""Points."""


def bar_chart(rows: Sequence[ResultRow], path: Path, split: Split | None = None) -> None:
    """Top-1 as a group of bars a set, with the 95 % interval of one seed, the standard deviation of several.

    Raises:
        UserError: nothing to show, or the picture cannot be written.
    """
    split = checked_split(rows, split)
    plt = pyplot()
    estimates, labels = [row.estimates(split) for row in rows], list(split.columns)
    names = [row.name for row in rows]
    figure, axis = plt.subplots(figsize=(_WIDTH, 3.6 + _legend_height(names)), layout="constrained")
    width = 0.84 / len(rows)
    for i, of_row in enumerate(estimates):
        there = [n for n, label in enumerate(labels) if label in of_row]
        values = [of_row[labels[n]] for n in there]
        places = [n + (i - (len(rows) - 1) / 2) * width for n in there]
        axis.bar(
            places,
            [e.value for e in values],
            width * 0.92,
            yerr=[[max(0.0, e.value - e.low) for e in values], [max(0.0, e.high - e.value) for e in values]],
            error_kw={"elinewidth": 0.9, "capsize": min(3, 14 / len(rows)), "ecolor": "#333333"},
            label=_wrapped(names[i]),
            color=_COLOURS[i % len(_COLOURS)],
            hatch=_HATCHES[i // len(_COLOURS) % len(_HATCHES)],
            edgecolor="white",
            linewidth=0,
        )
        if len(rows) * len(labels) <= 21:  # more would run into each other
            for place, e in zip(places, values, strict=True):
                axis.annotate(
                    f"{e.value:.1f}", (place, e.high), (0, 2), textcoords="offset points", ha="center", fontsize=7
                )
    if AVERAGE in labels:
        axis.axvline(labels.index(AVERAGE) - 0.5, color="#999999", linewidth=0.8, linestyle=":")
    axis.set(xlim=(-0.5, len(labels) - 0.5), ylabel="top-1, %")
    axis.set_xticks(range(len(labels)), [textwrap.fill(label, max(8, 84 // len(labels))) for label in labels])
    axis.tick_params(axis="x", length=0)
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)
    _despine(axis)
    handles, texts = axis.get_legend_handles_labels()
    _legend(figure, handles, texts, title=_whiskers(rows))
    _save(figure, path)


def _whiskers(rows: Sequence[ResultRow]) -> str:
    """What the error bars are."""
    several = [len(row.per_seed) > 1 for row in rows]
    of_one, of_several = "95 % interval over draws of the test set", "standard deviation over seeds"
    if all(several):
        return f"error bars: {of_several}"
    return f"error bars: {of_one}" + (f" (one seed) or {of_several}" if any(several) else "")


def reliability_chart(models: Sequence[ModelResult], path: Path, split: Split | None = None) -> None:
    """For each set, accuracy over confidence by bin (the larger a marker, the more of the samples), and below it the
    expected calibration error of each model.

    Raises:
        UserError: nothing to show, or the picture cannot be written.
    """
    split = checked_split([ResultRow(model.name, (model,)) for model in models], split)
    plt = pyplot()
    from matplotlib.lines import Line2D

    sets = {label: n for label, n in split.columns.items() if n is not None and any(n in m.sets for m in models)}
    columns = 2 if len(sets) == 4 else min(3, len(sets))
    lines = -(-len(sets) // columns)
    errors_height = 0.55 + 0.15 * len(models)
    names = [model.name for model in models]
    figure = plt.figure(figsize=(_WIDTH, lines * (2.75 + errors_height) + _legend_height(names)), layout="constrained")
    grid = figure.add_gridspec(2 * lines, max(columns, 2), height_ratios=[2.75, errors_height] * lines)
    largest = max(m.sets[name].ece for m in models for name in sets.values() if name in m.sets)
    for n, (label, name) in enumerate(sets.items()):
        line, column = divmod(n, columns)
        axis, errors = (figure.add_subplot(grid[2 * line + below, column]) for below in (0, 1))
        axis.plot([0, 100], [0, 100], color="#999999", linewidth=0.8, linestyle="--")
        for i, model in enumerate(models):
            if name not in model.sets:
                continue
            bins = [b for b in model.sets[name].calibration if b[0]]
            total = sum(samples for samples, _, _ in bins)
            x = [100 * confidence / samples for samples, _, confidence in bins]
            y = [100 * correct / samples for samples, correct, _ in bins]
            axis.plot(x, y, color=_colour(i), linestyle=_dashes(i), linewidth=0.9)
            sizes = [3 + 90 * samples / total for samples, _, _ in bins]
            axis.scatter(x, y, sizes, color=_colour(i), marker=_MARKERS[i % len(_MARKERS)], linewidths=0)
            error = 100 * model.sets[name].ece
            errors.barh(
                i, error, 0.75, color=_colour(i), hatch=_HATCHES[i // len(_COLOURS) % len(_HATCHES)], edgecolor="w"
            )
            errors.annotate(f"{error:.1f}", (error, i), (3, 0), textcoords="offset points", va="center", fontsize=7)
        axis.set(xlim=(0, 100), ylim=(0, 100), aspect="equal")
        axis.set_title(label, fontsize=10)
        axis.set_xlabel("confidence, %", fontsize=_SMALL)
        if column == 0:
            axis.set_ylabel("accuracy, %", fontsize=_SMALL)
        errors.set(xlim=(0, 125 * largest or 1), ylim=(len(models) - 0.4, -0.6), yticks=[])
        errors.set_xlabel("ECE, %", fontsize=_SMALL)
        for panel in (axis, errors):
            panel.tick_params(labelsize=7)
            panel.grid(alpha=0.3, axis="both" if panel is axis else "x")
            panel.set_axisbelow(True)
            _despine(panel)
    handles = [
        Line2D([], [], color=_colour(i), linestyle=_dashes(i), marker=_MARKERS[i % len(_MARKERS)], markersize=5)
        for i in range(len(models))
    ]
    _legend(figure, handles, [_wrapped(name) for name in names])
    _save(figure, path)


def sweep_chart(results: Results, path: Path, split: Split | None = None) -> None:
    """What each share α of the fine-tuned model gives: the curve from in-distribution to shifted accuracy, where there
    is both, and each set over α. The chosen α is marked.

    Raises:
        UserError: the models are no mixtures, were not evaluated, or the picture cannot be written.
    """
    split = split or results.split
    mixed = [model for model in results.models if model.alpha is not None]
    if not mixed:
        raise UserError(
            "There is no α to draw over: none of these models is a mixture. Give the results of tools/wise_ft.py."
        )
    models = sorted(mixed, key=lambda model: model.alpha or 0.0)
    rows = [ResultRow(model.name, (model,)) for model in models]
    checked_split(rows, split)
    alphas = [model.alpha or 0.0 for model in models]
    estimates = [row.estimates(split) for row in rows]
    best = None if results.chosen is None else results.models[results.chosen]
    chosen = models.index(best) if best in models else None
    columns = [label for label in split.columns if all(label in e for e in estimates)]
    series = {label: [e[label].value for e in estimates] for label in columns}
    home = next((label for label in columns if split.columns[label] == split.in_distribution), None)
    shifted = AVERAGE if AVERAGE in series else next((c for c in columns if split.columns[c] in split.shifted), None)

    plt = pyplot()
    from matplotlib.lines import Line2D

    both = home is not None and shifted is not None
    height = 3.7 + _legend_height(columns)
    figure, axes = plt.subplots(1, 1 + both, figsize=(_WIDTH, height), squeeze=False, layout="constrained")
    over = axes[0, -1]
    mark, colours = _COLOURS[1], [colour for colour in _COLOURS[:6] if colour != _COLOURS[1]]
    for i, label in enumerate(columns):
        look: dict[str, Any] = {"marker": _MARKERS[i % len(_MARKERS)], "markersize": 4, "linewidth": 1.2}
        if label == home:
            look |= {"color": "#000000", "linewidth": 2.2}
        elif label == AVERAGE:
            look |= {"color": "#5A5A5A", "linewidth": 2.2, "linestyle": "--"}
        elif split.columns[label] in split.others:
            look |= {"color": "#8A8A8A", "linestyle": ":"}
        else:
            look["color"] = colours[i % len(colours)]
        over.plot(alphas, series[label], label=label, **look)
    over.set(xlabel="α, share of the fine-tuned model", xlim=(-0.05, 1.05), ylabel="top-1, %")
    if chosen is not None:
        over.axvline(alphas[chosen], color=mark, linewidth=1, linestyle=(0, (4, 2)), zorder=0)
    if home is not None and shifted is not None:
        curve = axes[0, 0]
        x, y = series[home], series[shifted]
        curve.plot(x, y, "o-", color=_COLOURS[0], markersize=4, linewidth=1.4)
        if chosen is not None:
            curve.plot(x[chosen], y[chosen], "*", color=mark, markersize=14, zorder=3)
        curve.set(xlabel=f"{home}, top-1 %")
        curve.set_ylabel(f"mean of shifted sets ({AVERAGE}), top-1 %" if shifted == AVERAGE else f"{shifted}, top-1 %")
        curve.margins(0.14)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        _despine(axis)
    handles, labels = over.get_legend_handles_labels()
    if chosen is not None:
        handles.append(Line2D([], [], color=mark, marker="*", markersize=11, linestyle=(0, (4, 2)), linewidth=1))
        where = f", on {results.chosen_on}" if results.chosen_on else ""
        labels.append(f"chosen{where}: α = {alphas[chosen]:g}")
    _legend(figure, handles, labels)
    if both:
        _label_points(
            figure, axes[0, 0], x, y, [f"α = {a:g}" if i == 0 else f"{a:g}" for i, a in enumerate(alphas)], chosen
        )
    _save(figure, path)


def _label_points(
    figure: Any, axis: Any, x: Sequence[float], y: Sequence[float], labels: Sequence[str], first: int | None
) -> None:
    """Labels beside the points of a curve: of its ends, of ``first``, and of all others that have room."""
    figure.canvas.draw()  # places are known once the layout is
    figure.set_layout_engine("none")
    scale = 72 / figure.dpi
    places = [(a * scale, b * scale) for a, b in axis.transData.transform(list(zip(x, y, strict=True)))]
    middle = [statistics.fmean(p[d] for p in places) for d in (0, 1)]
    order = [i for i in (first, 0, len(x) - 1) if i is not None]
    taken: list[tuple[float, float]] = []
    for i in dict.fromkeys([*order, *range(len(x))]):
        # Across the curve, on the side away from its middle, and so far that the text is clear of the point.
        before, after = places[max(0, i - 1)], places[min(len(x) - 1, i + 1)]
        across = (before[1] - after[1], after[0] - before[0])
        length = math.hypot(*across)
        across = (across[0] / length, across[1] / length) if length else (0.0, 1.0)
        if sum((places[i][d] - middle[d]) * across[d] for d in (0, 1)) < 0:
            across = (-across[0], -across[1])
        step = 6 + 2.4 * len(labels[i]) * abs(across[0]) + 4 * abs(across[1]) + 3 * (i == first)
        offset = (across[0] * step, across[1] * step)
        place = (places[i][0] + offset[0], places[i][1] + offset[1])
        room = all(abs(place[0] - p[0]) > 22 or abs(place[1] - p[1]) > 10 for p in taken)
        if not room or any(math.dist(place, p) < 8 for p in places):
            continue
        taken.append(place)
        axis.annotate(
            labels[i], (x[i], y[i]), offset, textcoords="offset points", ha="center", va="center", fontsize=_SMALL
        )


def effective_robustness(
    points: Sequence[ResultRow], fit_on: Iterable[str], path: Path, split: Split | None = None
) -> dict[str, dict[str, float]]:
    """A panel a shifted set: accuracy on it over accuracy in distribution, on logit scales, with the line through the
    models ``fit_on``, and y = x. Below, how far each model is above the line.

    Taori et al., Measuring Robustness to Natural Distribution Shifts in Image Classification, NeurIPS 2020; Miller et
    al., Accuracy on the Line, ICML 2021.

    Returns:
        Effective robustness in percentage points, as ``effective_values`` has it.

    Raises:
        UserError: as ``robustness_panels``, or the picture cannot be written.
    """
    fit_on = set(fit_on)
    split = split or Split.of_rows(points)
    panels = robustness_panels(points, [row.name for row in points if row.name in fit_on] + sorted(fit_on), split)
    values = effective_values(panels)
    plt = pyplot()
    from matplotlib.lines import Line2D

    columns = 2 if len(panels) == 4 else min(3, len(panels))
    lines = -(-len(panels) // columns)
    right, room = _number_columns(values)
    names = {name: _wrapped(name, room) for name in values}
    heights = [0.22 + 0.145 * names[name].count("\n") for name in values]
    table_height = sum(heights) + 2 * _LINE
    figure = plt.figure(figsize=(_WIDTH, 2.7 * lines + table_height + 0.35), layout="constrained")
    grid = figure.add_gridspec(lines + 1, max(2, columns), height_ratios=[2.7] * lines + [table_height])
    home = next(label for label, name in split.columns.items() if name == split.in_distribution)
    looks = {
        name: {
            "marker": _MARKERS[i % len(_MARKERS)],
            "color": _colour(i),
            "markerfacecolor": "white" if name in fit_on else _colour(i),
            "markersize": 6,
            "linestyle": "",
        }
        for i, name in enumerate(values)
    }
    for n, (label, panel) in enumerate(panels.items()):
        axis = figure.add_subplot(grid[divmod(n, columns)])
        xs, ys = zip(*panel.points.values(), strict=True)
        lower, upper = min(xs), max(xs)
        margin = 0.08 * (upper - lower)
        ends = [lower - margin, upper + margin]
        fitted = [panel.fit.slope * x + panel.fit.intercept for x in ends]
        bottom, top = min(*ys, *fitted), max(*ys, *fitted)
        for name, (x, y) in panel.points.items():
            axis.plot(x, y, **looks[name], zorder=3)
        axis.plot(ends, fitted, color="#333333", linewidth=1.1)
        axis.plot([-20, 20], [-20, 20], color="#999999", linewidth=0.9, linestyle="--")
        axis.set(xlim=ends, ylim=(bottom - 0.08 * (top - bottom), top + 0.08 * (top - bottom)))
        _percent_ticks(axis.xaxis, ends)
        _percent_ticks(axis.yaxis, axis.get_ylim())
        axis.set_title(label, fontsize=10)
        axis.set_xlabel(f"{home}, top-1 %", fontsize=_SMALL)
        if n % columns == 0:
            axis.set_ylabel("shifted set, top-1 %", fontsize=_SMALL)
        axis.grid(alpha=0.3)
        _despine(axis)
    _robustness_legend(figure.add_subplot(grid[lines, :]), values, names, looks, right, heights)
    figure.legend(
        [
            Line2D([], [], color="#333333", linewidth=1.1),
            Line2D([], [], color="#999999", linewidth=0.9, linestyle="--"),
            Line2D([], [], color="#333333", marker="o", markerfacecolor="white", linestyle=""),
        ],
        ["fit in logits", "y = x", "fitted on"],
        loc="outside upper center",
        ncols=3,
        fontsize=_SMALL,
        frameon=False,
    )
    _save(figure, path)
    return values


def _number_columns(values: Mapping[str, Mapping[str, float]]) -> tuple[dict[str, float], int]:
    """Right edges of the columns of numbers by label, as shares of the picture's width, and how many characters of a
    name fit beside them."""
    character, gap = 0.0082, 0.02
    labels = dict.fromkeys(label for of_model in values.values() for label in of_model)
    right, edge = {}, 1.0
    for label in reversed(labels):
        right[label] = edge
        edge -= gap + character * max(5, len(label))
    return dict(reversed(right.items())), max(20, int((edge - 0.035) / character))


def _robustness_legend(
    axis: Any,
    values: Mapping[str, Mapping[str, float]],
    names: Mapping[str, str],
    looks: Mapping[str, dict[str, Any]],
    right: Mapping[str, float],
    heights: Sequence[float],
) -> None:
    """The models' markers and names, and their numbers: legend and table in one.

    names: wrapped, by name. looks: of markers. right: ``_number_columns``. heights: of the lines, in inches.
    """
    axis.set(xlim=(0, 1), ylim=(sum(heights) + 2 * _LINE, 0))
    axis.set_axis_off()
    axis.text(0.035, _LINE, "effective robustness, points", fontsize=_SMALL, va="center", style="italic")
    for label, x in right.items():
        axis.text(x, _LINE, label, fontsize=_SMALL, va="center", ha="right", style="italic")
    y = 1.7 * _LINE
    axis.plot([0, 1], [y, y], color="#999999", linewidth=0.8)
    for (name, of_model), height in zip(values.items(), heights, strict=True):
        y += height
        axis.plot(0.012, y - height / 2, **looks[name])
        axis.text(0.035, y - height / 2, names[name], fontsize=_SMALL, va="center", linespacing=1.05)
        for label, x in right.items():
            axis.text(x, y - height / 2, signed(of_model.get(label)), fontsize=_SMALL, va="center", ha="right")


def _percent_ticks(axis: Any, limits: Sequence[float]) -> None:
    """Ticks in percent on an axis of logits."""
    from matplotlib.ticker import MaxNLocator

    low, high = (100 * float(expit(limit)) for limit in limits)
    steps: Sequence[float] = MaxNLocator(5).tick_values(low, high)
    if limits[1] - limits[0] > 4:  # equal steps in percent would crowd where percents are close together
        steps = (0.001, 0.01, 0.1, 1, 5, 20, 50, 80, 95, 99, 99.9, 99.99, 99.999)
    ticks = [t for t in steps if low <= t <= high and 0 < t < 100]
    axis.set_ticks([float(logit(t / 100)) for t in ticks], [f"{t:g}" for t in ticks], fontsize=7)


def _colour(i: int) -> str:
    return _COLOURS[i % len(_COLOURS)]


def _dashes(i: int) -> Any:
    return _DASHES[i // len(_COLOURS) % len(_DASHES)]


def _despine(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)


def _wrapped(name: str, width: int = 100) -> str:
    """A name that is too long for a line, on several."""
    return textwrap.fill(name, width)


def _legend_columns(labels: Sequence[str]) -> int:
    """As many as fit beside each other: some 125 characters of small text are as wide as a picture."""
    longest = max(len(line) for label in labels for line in label.split("\n"))
    return max(1, min(len(labels), 4, 125 // (longest + 8)))


def _legend_height(names: Sequence[str]) -> float:
    """Inches that ``_legend`` takes."""
    labels = [_wrapped(name) for name in names]
    lines = sum(label.count("\n") + 1 for label in labels)
    return 0.2 + _LINE * -(-lines // _legend_columns(labels))


def _legend(figure: Any, handles: Sequence[Any], labels: Sequence[str], title: str | None = None) -> None:
    """Below all panels, where it hides nothing."""
    figure.legend(
        handles,
        labels,
        title=title,
        title_fontsize=_SMALL,
        loc="outside lower center",
        ncols=_legend_columns(labels),
        fontsize=_SMALL,
        frameon=False,
        handlelength=2.6,
    )


def _save(figure: Any, path: Path) -> None:
    """Write a picture and forget it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}). Choose another place.") from error
    except ValueError as error:
        raise UserError(f"{path} is no picture that can be written: {error}. Name it .png, .pdf or .svg.") from error
    finally:
        pyplot().close(figure)


def pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
