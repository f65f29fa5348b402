"""Loss and accuracy of runs over steps."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from cfmask.errors import UserError
from cfmask.recipe import Recipe
from cfmask.report.figures import STYLED, broken, legend_below, panels, save
from cfmask.report.labels import RunGroup, run_groups
from cfmask.report.looks import looks
from cfmask.run_search import is_evaluation
from cfmask.runs import RunFolder
from cfmask.runtime.jsonl import read_lines

Line = dict[str, Any]
"""A line of log.jsonl."""
Value = Callable[[Line, "Recipe | None"], "float | None"]
"""The value that a panel shows, of a line of a run's log and the run's recipe; None: the run has none."""
Points = dict[int, float]
"""Values by step."""

_TRAINING: dict[tuple[str, str], Value] = {
    ("training: cross-entropy", "nats"): lambda line, _: _of_step("ce", line),
    ("training: feature distillation", "MSE"): lambda line, recipe: _of_teacher("mse", line, recipe),
    ("training: logit distillation", "T²·KL, nats"): lambda line, recipe: _of_teacher("kd", line, recipe),
    ("training: accuracy", "top-1, %"): lambda line, _: _of_step("accuracy", line),
}
_MASKS: dict[tuple[str, str], Value] = {
    ("masked share of the image", "%"): lambda line, recipe: _of_masks("image_masking_rate", line, recipe),
    ("masked share of the object", "%"): lambda line, recipe: _of_masks("object_masking_rate", line, recipe),
    ("mask and object", "IoU, %"): lambda line, recipe: _of_masks("iou", line, recipe),
}


@STYLED
def draw_curves(out: Path, runs: Sequence[RunFolder]) -> list[str]:
    """Draw the losses that the runs have, training accuracy, accuracy on each set, and, if measured, how far masks fall
    on objects: a line for each recipe. Seeds of a recipe are one line, the mean of those that have come so far, with a
    band of one standard deviation, over steps that all of these have logged.

    Returns:
        A sentence for each run that is left out, because it has no log, or one that cannot be read.

    Raises:
        UserError: no run has a log, or the file cannot be written.
    """
    logs: dict[Path, list[Line]] = {}
    left_out = []
    for run in runs:
        try:
            if lines := read_lines(run.log):
                logs[run.root] = lines
                continue
            why = "it is an evaluation" if is_evaluation(run) else "it has logged no step yet"
        except OSError as error:
            why = f"{run.log} cannot be read ({error.strerror})"
        left_out.append(f"{run.root} is left out: {why}.")
    if not logs:
        raise UserError(f"There is nothing to draw. {' '.join(left_out)}")
    save(curves_figure(run_groups([run for run in runs if run.root in logs]), logs), out)
    return left_out


def curves_figure(groups: Sequence[RunGroup], logs: Mapping[Path, Sequence[Line]]) -> Figure:
    """The figure of ``draw_curves``.

    Args:
        logs: lines of log.jsonl by run folder.
    """
    sets = dict.fromkeys(name for lines in logs.values() for line in lines for name in line.get("eval", {}))
    of_sets: dict[tuple[str, str], Value] = {(name, "top-1, %"): partial(_of_set, name) for name in sets}
    shown = {
        panel: found
        for panel, value in (_TRAINING | of_sets | _MASKS).items()
        if any(found := [_seeds(group, logs, value) for group in groups])
    }
    if not shown:
        raise UserError("The logs have no finite value to draw: the runs have taken no step that was logged.")
    figure, axes = panels(len(shown))
    styles = looks([group.label for group in groups])
    drawn: set[str] = set()
    for axis, ((title, unit), found) in zip(axes, shown.items(), strict=True):
        for group, look, seeds in zip(groups, styles, found, strict=True):
            if not seeds:
                continue
            everything = sorted(set.union(*map(set, seeds)))
            steps = [step for step in everything if all(step in points or step > max(points) for points in seeds)]
            values = [[points[step] for points in seeds if step in points] for step in steps]
            means = [statistics.fmean(of_step) for of_step in values]
            few = len(steps) <= 12  # markers of more points would hide the line
            axis.plot(steps, means, label=group.label, **look.line(markers=few))
            drawn.add(group.label)
            if len(seeds) > 1:
                sds = [statistics.stdev(of_step) if len(of_step) > 1 else 0.0 for of_step in values]
                low, high = ([m + sign * s for m, s in zip(means, sds, strict=True)] for sign in (-1, 1))
                axis.fill_between(steps, low, high, color=look.colour, alpha=0.2, linewidth=0)
        masks = (title, unit) in _MASKS
        steps_of = "optimizer step" + (" (at the run's threshold)" if masks else "")
        axis.set(title=broken(title, 30), ylabel=unit, xlabel=steps_of)
    several = any(len(group.runs) > 1 for group in groups)
    legend = {group.label: Line2D([], [], **look.line()) for group, look in zip(groups, styles, strict=True)}
    legend_below(
        figure,
        [line for label, line in legend.items() if label in drawn],
        [label for label in legend if label in drawn],
        title="mean over seeds, band: ± 1 standard deviation" if several else None,
    )
    return figure


def _seeds(group: RunGroup, logs: Mapping[Path, Sequence[Line]], value: Value) -> list[Points]:
    """The points of each seed of a group that has any."""
    found = []
    for run in group.runs:
        values = [(line["step"], value(line, group.recipe)) for line in logs[run.root] if "step" in line]
        found.append({step: y for step, y in values if y is not None and math.isfinite(y)})
    return [points for points in found if points]


def _of_step(key: str, line: Line) -> float | None:
    return line.get(key) if "loss" in line else None


def _of_teacher(key: str, line: Line, recipe: Recipe | None) -> float | None:
    """A term of the loss, which the log has as 0 for methods without it."""
    terms = {"mse": ("feature-distillation", "wise-kd"), "kd": ("kd", "wise-kd")}
    if recipe is not None and recipe.method.name not in terms[key]:
        return None
    found = _of_step(key, line)
    return found if found or recipe is not None else None


def _of_set(name: str, line: Line, _: Recipe | None) -> float | None:
    return line.get("eval", {}).get(name)


def _of_masks(rate: str, line: Line, recipe: Recipe | None) -> float | None:
    """A rate over all groups, in percent, at the measured threshold that is nearest to the run's."""
    if "overlap" not in line:
        return None
    threshold = (recipe.method.threshold if recipe else None) or 0.0
    values = zip(line["thresholds"], line["overlap"]["all"][rate], strict=True)
    found = min(values, key=lambda pair: abs(pair[0] - threshold))[1]
    return None if found is None else 100 * found
