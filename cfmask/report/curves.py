"""Loss and accuracy of runs over steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context

from cfmask.errors import UserError
from cfmask.report.figures import STYLE, legend_below, new_figure, save
from cfmask.runs import RunFolder
from cfmask.runtime.jsonl import read_lines

_COLUMNS = 3
_TRAINING = {"ce": "cross entropy", "mse": "feature distillation (MSE)", "accuracy": "training accuracy, %"}
_OVERLAP = {
    "image_masking_rate": "image masking rate, %",
    "object_masking_rate": "object masking rate, %",
    "iou": "IoU of mask and object, %",
}


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
    sets = sorted({name for lines in logs.values() for line in lines for name in line.get("eval", {})})
    overlapping = any("overlap" in line for lines in logs.values() for line in lines)
    rows = 1 + -(-len(sets) // _COLUMNS) + overlapping
    figure = new_figure(3 * rows, width=4.2 * _COLUMNS)
    axes = figure.subplots(rows, _COLUMNS, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()

    def draw(axis: Any, title: str, is_point: Callable[[dict], bool], value: Callable, *, xlabel: str = "step") -> None:
        style: dict[str, Any] = {"linewidth": 1.2} if axis in axes[0] else {"marker": "o", "markersize": 3}
        for root, lines in logs.items():
            points = [(line["step"], value(line, root)) for line in lines if is_point(line)]
            axis.plot(*zip(*points, strict=True) if points else ([], []), label=root.name, **style)
        axis.set_axis_on()
        axis.set(title=title, xlabel=xlabel)

    for axis, (key, title) in zip(axes[0], _TRAINING.items(), strict=True):
        draw(axis, title, lambda line: "loss" in line, lambda line, _, key=key: line[key])
    for axis, name in zip(axes[1:].flat, sets, strict=False):
        is_point = lambda line, name=name: name in line.get("eval", {})  # noqa: E731
        draw(axis, f"{name}, top-1 %", is_point, lambda line, _, name=name: line["eval"][name])
    if overlapping:
        for axis, (rate, title) in zip(axes[-1], _OVERLAP.items(), strict=True):
            value = lambda line, root, rate=rate: _at_threshold(line, rate, RunFolder(root))  # noqa: E731
            draw(axis, title, lambda line: "overlap" in line, value, xlabel="step; masks at the run's threshold")
    legend_below(figure, *axes[0, 0].get_legend_handles_labels())
    save(figure, out, dpi=110)


def _at_threshold(line: dict[str, Any], rate: str, run: RunFolder) -> float:
    """A rate over all groups, in percent, at the measured threshold that is nearest to the run's."""
    threshold = run.recipe().method.threshold or 0.0
    values = zip(line["thresholds"], line["overlap"]["all"][rate], strict=True)
    found = min(values, key=lambda pair: abs(pair[0] - threshold))[1]
    return float("nan") if found is None else 100 * found
