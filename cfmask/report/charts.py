"""Results as charts."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.lines import Line2D
from matplotlib.ticker import LogitLocator, NullFormatter, PercentFormatter
from scipy.special import expit

from cfmask.errors import UserError
from cfmask.report.figures import COLOURS, STYLE, colour, legend_below, look, marker, new_figure, save
from cfmask.report.results import AVERAGE, ModelResult, ResultRow, Results, Split, rows_of
from cfmask.report.robustness import effective_values, robustness_panels
from cfmask.report.tables import checked_split, signed

_DASHES = ("-", "--", ":", "-.")
_HATCHES = ("", "////", "....", "xxxx")


@rc_context(STYLE)
def bar_chart(rows: Sequence[ResultRow], path: Path, split: Split | None = None) -> None:
    """Top-1 as a group of bars for each set, with the 95 % interval of one seed, or the standard deviation of several.

    Raises:
        UserError: nothing to show, or the file cannot be written.
    """
    split = checked_split(rows, split)
    labels = list(split.columns)
    figure = new_figure(3.6)
    axis = figure.subplots()
    width = 0.84 / len(rows)
    for i, row in enumerate(rows):
        estimates = row.estimates(split)
        found = list(estimates.values())
        bars = axis.bar(
            [labels.index(label) + (i - (len(rows) - 1) / 2) * width for label in estimates],
            [e.value for e in found],
            width * 0.92,
            yerr=[[abs(e.value - e.low) for e in found], [abs(e.high - e.value) for e in found]],
            error_kw={"elinewidth": 0.9, "capsize": min(3, 14 / len(rows)), "ecolor": "#333333"},
            label=row.name,
            color=colour(i),
            hatch=look(i, _HATCHES),
            edgecolor="white",
            linewidth=0,
        )
        if len(rows) * len(labels) <= 21:  # the numbers of more bars would overlap
            axis.bar_label(bars, fmt="%.1f", padding=2, fontsize=7)
    if AVERAGE in labels:
        axis.axvline(labels.index(AVERAGE) - 0.5, color="#999999", linewidth=0.8, linestyle=":")
    axis.set(xlim=(-0.5, len(labels) - 0.5), ylabel="top-1, %")
    axis.set_xticks(range(len(labels)), [textwrap.fill(label, max(8, 84 // len(labels))) for label in labels])
    axis.tick_params(axis="x", length=0, labelsize=9)
    axis.grid(False, axis="x")
    several = [len(row.per_seed) > 1 for row in rows]
    of_one, of_several = "95 % interval over draws of the test set", "standard deviation over seeds"
    either = f"{of_one} (one seed) or {of_several}" if any(several) else of_one
    legend_below(
        figure, *axis.get_legend_handles_labels(), title=f"error bars: {of_several if all(several) else either}"
    )
    save(figure, path)


@rc_context(STYLE)
def reliability_chart(models: Sequence[ModelResult], path: Path, split: Split | None = None) -> None:
    """For each set, accuracy over confidence by bin (larger markers stand for more samples), and below it the expected
    calibration error of each model.

    Raises:
        UserError: nothing to show, or the file cannot be written.
    """
    split = checked_split(rows_of(models), split)
    sets = {label: name for label, name in split.columns.items() if name and any(name in m.sets for m in models)}
    lines, columns = _grid(len(sets))
    heights = (2.75, 0.55 + 0.15 * len(models))
    figure = new_figure(lines * sum(heights))
    axes = figure.subplots(2 * lines, columns, height_ratios=heights * lines, squeeze=False)
    largest = max(m.sets[name].ece for m in models for name in sets.values() if name in m.sets)
    for axis in axes.flat[:]:
        axis.set_axis_off()
    for n, (label, name) in enumerate(sets.items()):
        line, column = divmod(n, columns)
        axis, errors = axes[2 * line : 2 * line + 2, column]
        axis.plot([0, 100], [0, 100], color="#999999", linewidth=0.8, linestyle="--")
        for i, model in enumerate(models):
            if name not in model.sets:
                continue
            result = model.sets[name]
            bins = [b for b in result.calibration if b[0]]
            x = [100 * confidence / samples for samples, _, confidence in bins]
            y = [100 * correct / samples for samples, correct, _ in bins]
            axis.plot(x, y, color=colour(i), linestyle=look(i, _DASHES), linewidth=0.9)
            sizes = [3 + 90 * samples / result.total for samples, _, _ in bins]
            axis.scatter(x, y, sizes, color=colour(i), marker=marker(i), linewidths=0)
            bar = errors.barh(i, 100 * result.ece, 0.75, color=colour(i), hatch=look(i, _HATCHES), edgecolor="w")
            errors.bar_label(bar, fmt="%.1f", padding=3, fontsize=7)
        axis.set(xlim=(0, 100), ylim=(0, 100), aspect="equal", title=label, xlabel="confidence, %")
        axis.set_ylabel("" if column else "accuracy, %")
        errors.set(xlim=(0, 125 * largest or 1), ylim=(len(models) - 0.4, -0.6), yticks=[], xlabel="ECE, %")
        for panel in (axis, errors):
            panel.set_axis_on()
    handles = [
        Line2D([], [], color=colour(i), linestyle=look(i, _DASHES), marker=marker(i), markersize=5)
        for i in range(len(models))
    ]
    legend_below(figure, handles, [model.name for model in models])
    save(figure, path)


def _grid(panels: int) -> tuple[int, int]:
    """Lines and columns of a grid of panels; two columns at least, so that a single panel does not fill the page."""
    columns = 2 if panels in (1, 2, 4) else 3
    return -(-panels // columns), columns


@rc_context(STYLE)
def sweep_chart(results: Results, path: Path, split: Split | None = None) -> None:
    """Accuracy over α, the share of the fine-tuned model: a curve for each set, and on the left, if both exist, shifted
    over in-distribution accuracy. The chosen α is marked.

    Raises:
        UserError: the models are no mixtures, were not evaluated, or the file cannot be written.
    """
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

    figure = new_figure(3.7)
    axes = figure.subplots(1, 1 + both, squeeze=False)[0]
    over, mark = axes[-1], COLOURS[1]
    colours = [each for each in COLOURS[:6] if each != mark]
    for i, (label, values) in enumerate(series.items()):
        style: dict[str, Any] = {"marker": marker(i), "markersize": 4, "linewidth": 1.2}
        if label == home:
            style |= {"color": "#000000", "linewidth": 2.2}
        elif label == AVERAGE:
            style |= {"color": "#5A5A5A", "linewidth": 2.2, "linestyle": "--"}
        elif split.columns[label] in split.others:
            style |= {"color": "#8A8A8A", "linestyle": ":"}
        else:
            style["color"] = colours[i % len(colours)]
        over.plot(alphas, values, label=label, **style)
    over.set(xlabel="α, share of the fine-tuned model", xlim=(-0.05, 1.05), ylabel="top-1, %")
    handles, labels = over.get_legend_handles_labels()
    if chosen is not None:
        over.axvline(alphas[chosen], color=mark, linewidth=1, linestyle=(0, (4, 2)), zorder=0)
        handles.append(Line2D([], [], color=mark, marker="*", markersize=11, linestyle=(0, (4, 2)), linewidth=1))
        where = f", on {results.chosen_on}" if results.chosen_on else ""
        labels.append(f"chosen{where}: α = {alphas[chosen]:g}")
    if home is not None and shifted is not None:
        x, y = series[home], series[shifted]
        axes[0].plot(x, y, "o-", color=COLOURS[0], markersize=4, linewidth=1.4)
        if chosen is not None:
            axes[0].plot(x[chosen], y[chosen], "*", color=mark, markersize=14, zorder=3)
        for i in sorted({0, len(x) - 1, *([] if chosen is None else [chosen])}):
            axes[0].annotate(f"α = {alphas[i]:g}", (x[i], y[i]), (6, 6), textcoords="offset points", fontsize=8)
        of_shifted = f"mean of shifted sets ({AVERAGE})" if shifted == AVERAGE else shifted
        axes[0].set(xlabel=f"{home}, top-1 %", ylabel=f"{of_shifted}, top-1 %")
        axes[0].margins(0.16)
    legend_below(figure, handles, labels)
    save(figure, path)


@rc_context(STYLE)
def effective_robustness(
    points: Sequence[ResultRow], fit_on: Iterable[str], path: Path, split: Split | None = None
) -> dict[str, dict[str, float]]:
    """A panel for each shifted set: accuracy on it over accuracy in distribution, on logit scales, with y = x and the
    line that is fitted to the models ``fit_on``. The legend has each model's distance from the line.

    Returns:
        Effective robustness in percentage points (``effective_values``).

    Raises:
        UserError: as ``robustness_panels``, or the file cannot be written.
    """
    fit_on = set(fit_on)
    split = split or Split.of_rows(points)
    panels = robustness_panels(points, [row.name for row in points if row.name in fit_on] + sorted(fit_on), split)
    values = effective_values(panels)
    lines, columns = _grid(len(panels))
    figure = new_figure(2.7 * lines)
    axes = figure.subplots(lines, columns, squeeze=False)
    home = next(label for label, name in split.columns.items() if name == split.in_distribution)
    styles: dict[str, dict[str, Any]] = {
        name: {
            "marker": marker(i),
            "color": colour(i),
            "markerfacecolor": "white" if name in fit_on else colour(i),
            "linestyle": "",
        }
        for i, name in enumerate(values)
    }
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for n, (axis, (label, panel)) in enumerate(zip(axes.flat, panels.items(), strict=False)):
        for name, (x, y) in panel.points.items():
            axis.plot(expit(x), expit(y), **styles[name], zorder=3)
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
            scale.set_major_locator(LogitLocator(nbins=5))
            scale.set_major_formatter(PercentFormatter(1, symbol=""))
            scale.set_minor_formatter(NullFormatter())
        axis.set(title=label, xlabel=f"{home}, top-1 %", ylabel="" if n % columns else "shifted set, top-1 %")
    figure.legend(
        [
            Line2D([], [], color="#333333", linewidth=1.1),
            Line2D([], [], color="#999999", linewidth=0.9, linestyle="--"),
            Line2D([], [], color="#333333", marker="o", markerfacecolor="white", linestyle=""),
        ],
        ["fit in logits", "y = x", "fitted on"],
        loc="outside upper center",
        ncols=3,
    )
    legend_below(
        figure,
        [Line2D([], [], **style) for style in styles.values()],
        [f"{n}: {', '.join(f'{label} {signed(v)}' for label, v in of.items())}" for n, of in values.items()],
        title="effective robustness, points",
    )
    save(figure, path)
    return values
