"""The table and the chart of completed drills."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cfmask.runtime.jsonl import read_lines
from launch.drills.environment import STEPS, Drill
from launch.drills.runner import DrillResult
from launch.drills.scenarios import UNDISTURBED

_HEADER = (
    *("drill", "fault", "starts", "steps lost", "to checkpoint (s)", "start to first step (s)", "took (s)", "verdict"),
)


def table(results: Sequence[DrillResult], skipped: Sequence[tuple[Drill, str]]) -> str:
    """A Markdown table with a row for each drill.

    Args:
        skipped: drills that were not done, and why.
    """
    rows: list[Sequence[str]] = []
    for result in results:
        run, drill = result.run, result.drill
        passed = "bitwise identical" if drill.same_ranks else "same samples, same loss"
        verdict = "; ".join(result.problems) or ("–" if drill is UNDISTURBED else passed)
        took = f"{result.took_s:.0f}"
        if drill.trains:
            starts, lost = str(len(read_lines(run.folder.attempts))), str(run.steps_lost())
            measured = (starts, lost, _span(run.seconds_to_checkpoint()), _span(run.first_steps))
        else:
            measured = (str(run.starts()), "–", "–", "–")
        rows.append((drill.name, drill.what, *measured, took, verdict))
    rows += [(drill.name, drill.what, *[""] * 5, f"not done: {why}") for drill, why in skipped]
    return "\n".join("| " + " | ".join(row) + " |" for row in (_HEADER, ["---"] * len(_HEADER), *rows))


def _span(seconds: Sequence[float | None]) -> str:
    """The minimum and the maximum; "–" if there are no values."""
    known = [f"{s:.1f}" for s in sorted(s for s in seconds if s is not None)]
    return "–" if not known else known[0] if known[0] == known[-1] else f"{known[0]} … {known[-1]}"


def draw(results: Sequence[DrillResult], path: Path) -> None:
    """Plot steps, faults and checkpoints over time, with a panel for each drill."""
    from matplotlib.figure import Figure  # takes a second to import

    from cfmask.report.figures import save

    columns = min(3, len(results))
    rows = -(-len(results) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.4 * rows), layout="tight")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axis, result in zip(axes.flat, results, strict=False):
        snapshots = result.run.snapshots
        began = snapshots[0].time
        times = [snapshot.time - began for snapshot in snapshots]
        axis.fill_between(times, [snapshot.saved for snapshot in snapshots], step="post", alpha=0.25, label="saved")
        axis.plot(times, [snapshot.step for snapshot in snapshots], drawstyle="steps-post", label="step", linewidth=1.2)
        for fault in result.run.faults:
            axis.axvline(fault.time - began, color="tab:red", linewidth=1, linestyle="--")
            axis.text(fault.time - began, STEPS, fault.what, color="tab:red", fontsize=6, rotation=90, va="top")
        axis.set_title(result.drill.name + (" ✗" if result.problems else ""), fontsize=9)
        axis.tick_params(labelsize=7)
    for axis in list(axes.flat)[len(results) :]:
        axis.axis("off")
    figure.supxlabel("seconds", fontsize=8)
    axes[0][0].legend(fontsize=7, loc="lower right")
    save(figure, path, dpi=130)
