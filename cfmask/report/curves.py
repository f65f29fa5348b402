"""Loss and accuracy of runs over steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib import rc_context

from cfmask.errors import UserError
from cfmask.report.figures import STYLE, legend_below, new_figure, save
from cfmask.runs import RunFolder
from cfmask.runtime.jsonl import read_lines

_COLUMNS = 3

Line = dict[str, Any]
"""A line of log.jsonl."""
Value = Callable[[Line, Path], "float | None"]
"""The value that a panel shows, of a line of the log of the run in a folder; None: the line has none."""


@rc_context(STYLE)
def draw_curves(out: Path, roots: Sequence[Path]) -> None:
    """Draw cross entropy, feature distillation, training accuracy, accuracy on each set, and, if measured, how far
    masks fall on objects.

    Args:
        roots: run folders.

    Raises:
        UserError: a run without a log, or the file cannot be written.
    """
    logs = {root: read_lines(RunFolder(root).log) for root in roots}
    for root, lines in logs.items():
        if not lines:
            raise UserError(f"{root} has no log: it is not a run folder, or its run has taken no step yet.")
    everything = [line for lines in logs.values() for line in lines]
    sets = sorted({name for line in everything for name in line.get("eval", {})})
    training: dict[str, Value] = {
        "cross entropy": partial(_of_step, "ce"),
        "feature distillation (MSE)": partial(_of_step, "mse"),
        "training accuracy, %": partial(_of_step, "accuracy"),
    }
    masks: dict[str, Value] = {
        "image masking rate, %": partial(_of_masks, "image_masking_rate"),
        "object masking rate, %": partial(_of_masks, "object_masking_rate"),
        "IoU of mask and object, %": partial(_of_masks, "iou"),
    }
    panels: dict[str, Value] = {**training, **{f"{name}, top-1 %": partial(_of_set, name) for name in sets}}
    if any("overlap" in line for line in everything):
        panels |= masks
    rows = -(-len(panels) // _COLUMNS)
    figure = new_figure(3 * rows, width=4.2 * _COLUMNS)
    axes = figure.subplots(rows, _COLUMNS, squeeze=False).flat
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    for axis, (title, value) in zip(axes, panels.items(), strict=False):
        style: dict[str, Any] = {"linewidth": 1.2} if title in training else {"marker": "o", "markersize": 3}
        for root, lines in logs.items():
            points = [(line["step"], y) for line in lines if (y := value(line, root)) is not None]
            axis.plot(*zip(*points, strict=True) if points else ([], []), label=root.name, **style)
        axis.set(title=title, xlabel="step; masks at the run's threshold" if title in masks else "step")
    legend_below(figure, *axes[0].get_legend_handles_labels())
    save(figure, out, dpi=110)


def _of_step(key: str, line: Line, root: Path) -> float | None:
    return line[key] if "loss" in line else None


def _of_set(name: str, line: Line, root: Path) -> float | None:
    return line.get("eval", {}).get(name)


def _of_masks(rate: str, line: Line, root: Path) -> float | None:
    """A rate over all groups, in percent, at the measured threshold that is nearest to the run's."""
    if "overlap" not in line:
        return None
    threshold = RunFolder(root).recipe().method.threshold or 0.0
    values = zip(line["thresholds"], line["overlap"]["all"][rate], strict=True)
    found = min(values, key=lambda pair: abs(pair[0] - threshold))[1]
    return math.nan if found is None else 100 * found
