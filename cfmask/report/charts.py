"""Results as charts. ``…_figure`` returns what ``…_chart`` writes to a file."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogitLocator, NullFormatter
from scipy.special import expit

from cfmask.errors import UserError
from cfmask.report.figures import SMALL, STYLED, broken, legend_below, new_figure, panels, save
from cfmask.report.looks import COLOURS, MARKERS, VERMILION, looks
from cfmask.report.results import AVERAGE, ResultRow, Results, Split, rows_of
from cfmask.report.robustness import effective_values, robustness_panels
from cfmask.report.tables import checked_split, signed

FEW_SAMPLES = 25
"""The accuracy of a bin of fewer samples is uncertain by 20 points and more: reliability diagrams show it in grey."""
_FAINT = "#BBBBBB"


def bar_chart(rows: Sequence[ResultRow], path: Path, split: Split | None = None) -> None:
    """Top-1 as a group of bars for each set, with the 95 % interval of one seed, or the standard deviation of several.

    Raises:
        UserError: nothing to show, or the file cannot be written.
    """
    save(bars_figure(rows, split), path)


@STYLED
def bars_figure(rows: Sequence[ResultRow], split: Split | None = None) -> Figure:
    split = checked_split(rows, split)
    labels = list(split.columns)
    figure = new_figure(2.6)
    axis = figure.subplots()
    width = 0.86 / len(rows)
    many = len(rows) * len(labels)
    handles = []
    for i, (row, look) in enumerate(zip(rows, looks([row.method for row in rows]), strict=True)):
        estimates = row.estimates(split)
        found = list(estimates.values())
        bars = axis.bar(
            [labels.index(label) + (i - (len(rows) - 1) / 2) * width for label in estimates],
            [e.value for e in found],
            width * 0.92,
            yerr=[[abs(e.value - e.low) for e in found], [abs(e.high - e.value) for e in found]],
            error_kw={"elinewidth": 0.8, "capsize": min(2.5, 14 / len(rows)), "ecolor": "#333333"},
            label=row.name,
            **look.bar(),
        )
        handles.append(bars)
        if many <= 36:  # the numbers of more bars would overlap
            upright = 0 if many <= 10 else 90
            axis.bar_label(bars, fmt="%.1f", padding=2, fontsize=SMALL, rotation=upright)
    if AVERAGE in labels:
        axis.axvline(labels.index(AVERAGE) - 0.5, color="#999999", linewidth=0.8, linestyle=":")
    axis.set(xlim=(-0.5, len(labels) - 0.5), ylabel="top-1, %")
    axis.margins(y=0.16 if 10 < many <= 36 else 0.06)
    axis.set_xticks(range(len(labels)), [broken(label, max(7, 60 // len(labels))) for label in labels])
    axis.tick_params(axis="x", length=0, labelsize=8)
    axis.grid(False, axis="x")
    several = [len(row.per_seed) > 1 for row in rows]
    of_one, of_several = "95 % interval over draws of the test set", "standard deviation over seeds"
    either = f"{of_one} (one seed) or {of_several}" if any(several) else of_one
    title = f"error bars: {of_several if all(several) else either}"
    legend_below(figure, handles, [row.name for row in rows], title=title)
    return figure


def reliability_chart(rows: Sequence[ResultRow], path: Path, split: Split | None = None) -> None:
    """For each set, accuracy over confidence by bin, and below it the expected calibration error (ECE) of each row.
    Bins add up the samples of all seeds; those of fewer than ``FEW_SAMPLES`` are grey and not connected. The ECE is the
    mean over seeds.

    Raises:
        UserError: nothing to show, or the file cannot be written.
    """
    save(reliability_figure(rows, split), path)


@STYLED
def reliability_figure(rows: Sequence[ResultRow], split: Split | None = None) -> Figure:
    split = checked_split(rows, split)
    sets = {label: name for label, name in split.columns.items() if name and any(name in row.sets for row in rows)}
    columns = min(2, len(sets))
    lines = -(-len(sets) // columns)
    heights = (2.0, 0.5 + 0.15 * len(rows))
    figure = new_figure(lines * sum(heights))
    axes = figure.subplots(2 * lines, columns, height_ratios=heights * lines, squeeze=False)
    for axis in (
        list(axes.T.flat)[2 * len(sets) :] if columns == 1 else axes[-2:, len(sets) - columns * (lines - 1) :].flat
    ):
        axis.remove()
    styles = looks([row.method for row in rows])
    eces = {name: [_ece(row, name) for row in rows] for name in sets.values()}
    largest = max(ece for of_set in eces.values() for ece in of_set if ece is not None)
    grey = False
    for n, (label, name) in enumerate(sets.items()):
        line, column = divmod(n, columns)
        axis, errors = axes[2 * line : 2 * line + 2, column]
        axis.plot([0, 100], [0, 100], color="#999999", linewidth=0.8, linestyle="--")
        for i, (row, look, ece) in enumerate(zip(rows, styles, eces[name], strict=True)):
            if ece is None:
                continue
            samples, correct, confidence = np.sum([model.sets[name].calibration for model in row.per_seed], axis=0).T
            there = samples > 0
            x, y = 100 * confidence[there] / samples[there], 100 * correct[there] / samples[there]
            enough = samples[there] >= FEW_SAMPLES
            axis.plot(x[enough], y[enough], label=row.name, **look.line(width=1.0))
            axis.plot(x[~enough], y[~enough], linestyle="", marker=look.marker, markersize=3, color=_FAINT, zorder=1)
            grey |= not enough.all()
            bar = errors.barh(i, ece, 0.75, **look.bar())
            errors.bar_label(bar, fmt="%.1f", padding=3, fontsize=SMALL)
        axis.set(xlim=(0, 100), ylim=(0, 100), title=broken(label, 30), xlabel="confidence, %", ylabel="accuracy, %")
        errors.set(xlim=(0, 1.25 * largest or 1), ylim=(len(rows) - 0.4, -0.6), yticks=[], xlabel="ECE, %")
    handles = [Line2D([], [], **look.line()) for look in styles]
    note = f"grey: bins of fewer than {FEW_SAMPLES} samples" if grey else None
    legend_below(figure, handles, [row.name for row in rows], title=note)
    return figure


def _ece(row: ResultRow, name: str) -> float | None:
    """Expected calibration error on a set in percent, the mean over seeds; None if it was not evaluated there."""
    return 100 * statistics.fmean(model.sets[name].ece for model in row.per_seed) if name in row.sets else None


def sweep_chart(results: Results, path: Path, split: Split | None = None) -> None:
    """Accuracy over α, the share of the fine-tuned model: a curve for each set, and on the left, if both exist, shifted
    over in-distribution accuracy. The chosen α is marked.

    Raises:
        UserError: the models are no mixtures, were not evaluated, or the file cannot be written.
    """
    save(sweep_figure(results, split), path)


@STYLED
def sweep_figure(results: Results, split: Split | None = None) -> Figure:
    split = split or results.split
    models = sorted((m for m in results.models if m.alpha is not None), key=lambda m: m.alpha or 0.0)
    if not models:
        raise UserError(
            "There is no α to draw over: none of these models is a mixture. Give the results of tools/wise_ft.py."
        )
    rows = rows_of(models)
    checked_split(rows, split)
    alphas = [model.alpha or 0.0 for model in models]
    estimates = [row.estimates(split) for row in rows]
    best = None if results.chosen is None else results.models[results.chosen]
    chosen = models.index(best) if best in models else None
    series = {
        label: [e[label].value for e in estimates] for label in split.columns if all(label in e for e in estimates)
    }
    home = next((label for label in series if split.columns[label] == split.in_distribution), None)
    shifted = AVERAGE if AVERAGE in series else next((c for c in series if split.columns[c] in split.shifted), None)
    both = home is not None and shifted is not None

    figure, axes = panels(1 + both, 2.4)
    over, mark = axes[-1], VERMILION
    colours = [each for each in COLOURS[:6] if each != mark]
    handles = []
    for i, (label, values) in enumerate(series.items()):
        style: dict[str, Any] = {"marker": MARKERS[i % len(MARKERS)], "markersize": 4, "linewidth": 1.2}
        if label == home:
            style |= {"color": "#000000", "linewidth": 2.2}
        elif label == AVERAGE:
            style |= {"color": "#5A5A5A", "linewidth": 2.2, "linestyle": "--"}
        elif split.columns[label] in split.others:
            style |= {"color": "#8A8A8A", "linestyle": ":"}
        else:
            style["color"] = colours[i % len(colours)]
        handles += over.plot(alphas, values, **style)
    over.set(xlabel="α, share of fine-tuned model", xlim=(-0.05, 1.05), ylabel="top-1, %")
    labels = list(series)
    if chosen is not None:
        over.axvline(alphas[chosen], color=mark, linewidth=1, linestyle=(0, (4, 2)), zorder=0)
        handles.append(Line2D([], [], color=mark, marker="*", markersize=11, linestyle=(0, (4, 2)), linewidth=1))
        where = f", on {results.chosen_on}" if results.chosen_on else ""
        labels.append(f"chosen{where}: α = {alphas[chosen]:g}")
    if home is not None and shifted is not None:
        x, y = series[home], series[shifted]
        axes[0].plot(x, y, "o-", color=COLOURS[0], markersize=4, linewidth=1.3)
        if chosen is not None:
            axes[0].plot(x[chosen], y[chosen], "*", color=mark, markersize=12, zorder=3)
        for i in sorted({0, len(x) - 1, *([] if chosen is None else [chosen])}):
            axes[0].annotate(f"α = {alphas[i]:g}", (x[i], y[i]), (6, 6), textcoords="offset points", fontsize=SMALL)
        of_shifted = "mean of shifted sets" if shifted == AVERAGE else shifted
        axes[0].set(xlabel=broken(f"{home}, top-1 %", 30), ylabel=broken(f"{of_shifted}, top-1 %", 34))
        axes[0].margins(0.16)
    legend_below(figure, handles, labels)
    return figure


def effective_robustness(
    points: Sequence[ResultRow], fit_on: Mapping[str, str], path: Path, split: Split | None = None
) -> dict[str, dict[str, float]]:
    """A panel for each shifted set: accuracy on it over accuracy in distribution, on logit scales, with y = x and the
    line that is fitted to the zero-shot models ``fit_on``.

    Args:
        fit_on: see ``robustness_panels``.

    Returns:
        Effective robustness in percentage points (``effective_values``) of the other models.

    Raises:
        UserError: as ``robustness_panels``, or the file cannot be written.
    """
    figure, values = robustness_figure(points, fit_on, split)
    save(figure, path)
    return values


@STYLED
def robustness_figure(
    points: Sequence[ResultRow], fit_on: Mapping[str, str], split: Split | None = None
) -> tuple[Figure, dict[str, dict[str, float]]]:
    split = split or Split.of_rows(points)
    found = robustness_panels(points, fit_on, split)
    values = effective_values(found, fit_on)
    figure, axes = panels(len(found), 1.9)
    home = next(label for label, name in split.columns.items() if name == split.in_distribution)
    styles = {
        row.name: look.point(hollow=row.name in fit_on)
        for row, look in zip(points, looks([row.method for row in points]), strict=True)
    }
    for axis, (label, panel) in zip(axes, found.items(), strict=True):
        for name, (x, y) in panel.points.items():
            axis.plot(expit(x), expit(y), label=name, zorder=3, **styles[name])
        xs, ys = zip(*panel.points.values(), strict=True)
        margin = 0.08 * (max(xs) - min(xs))
        ends = [min(xs) - margin, max(xs) + margin]
        fitted = [panel.fit.slope * x + panel.fit.intercept for x in ends]
        bottom, top = min(*ys, *fitted), max(*ys, *fitted)
        margin = 0.08 * (top - bottom)
        axis.plot(expit(ends), expit(fitted), color="#333333", linewidth=1.1)
        diagonal = expit([min(*ends, bottom), max(*ends, top)])
        axis.plot(diagonal, diagonal, color="#999999", linewidth=0.9, linestyle="--")
        axis.set(xscale="logit", yscale="logit", xlim=expit(ends), ylim=expit([bottom - margin, top + margin]))
        for scale in (axis.xaxis, axis.yaxis):
            scale.set_major_locator(LogitLocator(nbins=4))
            scale.set_major_formatter(lambda share, _: f"{100 * share:.4g}")
            scale.set_minor_formatter(NullFormatter())
        axis.set(xlabel=broken(f"{home}, top-1 %", 30), ylabel=broken(f"{label}, top-1 %", 26))
    shown = [name for name in styles if any(name in panel.points for panel in found.values())]
    handles = [Line2D([], [], **styles[name]) for name in shown]
    handles += [
        Line2D([], [], color="#333333", linewidth=1.1),
        Line2D([], [], color="#999999", linewidth=0.9, linestyle="--"),
    ]
    names = [f"{name}: {_summary(values[name])}" if name in values else name for name in shown]
    title = "points above the line (hollow: zero-shot models that it is fitted to)"
    legend_below(figure, handles, [*names, "fit in logits", "y = x"], title=title)
    return figure, values


def _summary(values: Mapping[str, float]) -> str:
    """The average, or without one the values by set."""
    if AVERAGE in values:
        return f"{AVERAGE} {signed(values[AVERAGE])}"
    return ", ".join(f"{label} {signed(value)}" for label, value in values.items())
