#!/usr/bin/env python3
"""Loss and accuracy curves of runs as one picture.

    python tools/plot_runs.py RUN RUN … --out curves.png

The same values are in RUN/tensorboard and, a line a step, in RUN/log.jsonl.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

try:
    from cfmask.errors import UserError
    from cfmask.runs import RunFolder
    from cfmask.runtime.command import exits_cleanly
    from cfmask.runtime.jsonl import read_lines
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing}. Activate the environment first: source .venv/bin/activate (to create it: README.md).")


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder")
    parser.add_argument(
        "--out", type=Path, default=Path("curves.png"), metavar="FILE", help="picture to write (default: curves.png)"
    )
    arguments = parser.parse_args(argv)
    draw_curves(arguments.out, arguments.runs)
    print(f"written: {arguments.out}")


def draw_curves(out: Path, roots: Sequence[Path]) -> None:
    """Write the picture: cross entropy, feature distillation, training accuracy, accuracy on each set, and how far
    masks fall on objects where that was measured.

    Raises:
        UserError: a run without a log.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    logs = {root: read_lines(RunFolder(root).log) for root in roots}
    for root, lines in logs.items():
        if not lines:
            raise UserError(f"{root} has no log yet: it is no run folder, or its run has taken no step.")
    sets = sorted({name for lines in logs.values() for line in lines for name in line.get("eval", {})})
    rates = {"image_masking_rate": "image", "object_masking_rate": "object", "iou": "IoU"}
    overlapping = any("overlap" in line for lines in logs.values() for line in lines)
    panels = [("ce", "cross entropy"), ("mse", "feature distillation (MSE)"), ("accuracy", "training accuracy, %")]
    columns = len(panels)
    masks_from = columns * (1 + -(-len(sets) // columns))  # a row of their own
    rows = masks_from // columns + overlapping
    figure, axes = plt.subplots(rows, columns, figsize=(4.2 * columns, 3 * rows), squeeze=False, layout="constrained")
    spare = list(axes.flat)
    for (key, title), axis in zip(panels, spare, strict=False):
        for root, lines in logs.items():
            taken = [line for line in lines if "loss" in line]
            axis.plot([x["step"] for x in taken], [x[key] for x in taken], label=root.name, linewidth=1.2)
        axis.set(title=title, xlabel="step")
    for name, axis in zip(sets, spare[len(panels) :], strict=False):
        for root, lines in logs.items():
            scored = [line for line in lines if name in line.get("eval", {})]
            axis.plot(
                [x["step"] for x in scored], [x["eval"][name] for x in scored], "o-", label=root.name, markersize=3
            )
        axis.set(title=f"{name}, top-1 %", xlabel="step")
    for (rate, name), axis in zip(rates.items(), spare[masks_from:], strict=False):
        for root, lines in logs.items():
            points = [(x["step"], _at(x, rate, RunFolder(root))) for x in lines if "overlap" in x]
            axis.plot(*zip(*points, strict=True) if points else ([], []), "o-", label=root.name, markersize=3)
        title = {"IoU": "IoU of mask and object, %"}.get(name, f"{name} masking rate, %")
        axis.set(title=title, xlabel="step; masks at the run's threshold")
    for axis in spare:
        axis.set_axis_off() if not axis.has_data() and not axis.get_title() else axis.grid(alpha=0.3)
    handles, labels = spare[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), fontsize=8)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    plt.close(figure)


def _at(line: dict[str, Any], rate: str, run: RunFolder) -> float:
    """A rate over all groups, in percent, at the threshold that is nearest to what the run masks at."""
    threshold = run.recipe().method.threshold or 0.0
    values = zip(line["thresholds"], line["overlap"]["all"][rate], strict=True)
    found = min(values, key=lambda pair: abs(pair[0] - threshold))[1]
    return float("nan") if found is None else 100 * found


if __name__ == "__main__":
    sys.exit(main())
