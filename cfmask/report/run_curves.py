"""Curves of runs over their steps: loss, accuracy, and how far masks fall on objects."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cfmask.errors import UserError
from cfmask.report.charts import pyplot
from cfmask.runs import RunFolder
from cfmask.runtime.jsonl import read_lines

COLUMNS = 3
LOSSES = {"ce": "cross entropy", "mse": "feature distillation (MSE)", "accuracy": "training accuracy, %"}
MASK_RATES = {
    "image_masking_rate": "image masking rate, %",
    "object_masking_rate": "object masking rate, %",
    "iou": "IoU of mask and object, %",
}
Points = list[tuple[float, float]]


def draw_run_curves(out: Path, runs: Sequence[Path]) -> None:
    """Write a picture with a panel for each loss, each evaluated set, and each mask rate that was measured.

    Raises:
        UserError: a run without a log.
    """
    logs = {RunFolder(root): read_lines(RunFolder(root).log) for root in runs}
    for run, lines in logs.items():
        if not lines:
            raise UserError(f"{run.root} has no log yet: it is not a run folder, or its run has taken no step.")
    panels = list(_panels(logs))
    plt = pyplot()
    rows = -(-len(panels) // COLUMNS)
    figure, axes = plt.subplots(rows, COLUMNS, figsize=(4.2 * COLUMNS, 3 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (title, xlabel, points_of, style) in zip(axes.flat, panels, strict=False):
        if not title:  # an empty place at the end of a row
            axis.set_axis_off()
            continue
        for run, points in points_of.items():
            axis.plot(*(zip(*points, strict=True) if points else ([], [])), style, label=run.root.name, **_LINE)
        axis.set(title=title, xlabel=xlabel)
        axis.grid(alpha=0.3)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), fontsize=8)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    plt.close(figure)


_LINE = {"linewidth": 1.2, "markersize": 3}
Panel = tuple[str, str, dict[RunFolder, Points], str]


def _panels(logs: dict[RunFolder, list[dict[str, Any]]]) -> Iterator[Panel]:
    """Title, x label, points of each run, and style of each panel."""
    for key, title in LOSSES.items():
        yield title, "step", {r: [(x["step"], x[key]) for x in of if "loss" in x] for r, of in logs.items()}, "-"
    sets = sorted({name for lines in logs.values() for line in lines for name in line.get("eval", {})})
    for name in sets:
        scored = {
            run: [(x["step"], x["eval"][name]) for x in lines if name in x.get("eval", {})]
            for run, lines in logs.items()
        }
        yield f"{name}, top-1 %", "step", scored, "o-"
    if any("overlap" in line for lines in logs.values() for line in lines):
        for _ in range(-len(sets) % COLUMNS):
            yield "", "", {}, ""
        for rate, title in MASK_RATES.items():
            points = {
                run: [(x["step"], _at_threshold(x, rate, run)) for x in lines if "overlap" in x]
                for run, lines in logs.items()
            }
            yield title, "step; masks at the run's threshold", points, "o-"


def _at_threshold(line: dict[str, Any], rate: str, run: RunFolder) -> float:
    """A rate over all groups, in percent, at the measured threshold that is nearest to the run's."""
    threshold = run.recipe().method.threshold or 0.0
    values = zip(line["thresholds"], line["overlap"]["all"][rate], strict=True)
    found = min(values, key=lambda pair: abs(pair[0] - threshold))[1]
    return float("nan") if found is None else 100 * found
