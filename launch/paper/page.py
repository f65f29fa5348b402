"""The page of a reproduction: index.html in the plan's folder, one file with the plan and its state, the table beside
the published numbers, pictures, recipes, versions, and the starts of all runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cfmask.recipe import Recipe
from cfmask.report import page, run_blocks
from cfmask.report.page import Html, Section
from cfmask.runs import RunFolder
from cfmask.runtime.attempts import Start
from cfmask.runtime.files import write_atomically
from launch.paper.estimate import estimate
from launch.paper.plan import DONE, HEADLINE, PlanNode
from launch.paper.progress import NodeStatus, count_jobs, kinds_of_jobs, statuses_of
from launch.paper.reproduction import Reproduction
from launch.paper.table import PaperTable, read_table, write_table
from launch.state.facts import look_at
from launch.state.page import interrupted, runs_table
from launch.state.status import ENDED, explained_starts

if TYPE_CHECKING:
    from cfmask.report.robustness import Line

_CAPTIONS = {
    "bars.png": "Top-1 by set",
    "effective-robustness.png": "Accuracy on shifted sets over accuracy in distribution, and the line through "
    "the published zero-shot models",
}


def write_report(reproduction: Reproduction, tflops: float | None, line: Line | None = None) -> None:
    """Write and print the table, and write the page.

    Args:
        tflops: --tflops.
        line: also draw effective robustness, above this line.
    """
    folder = reproduction.setup.folder
    found = read_table(reproduction)
    pictures = write_table(reproduction, found, line) if found else []
    if found is None:
        print("No row of the table has results yet.")
    nodes = list(reproduction.plan.nodes.values())
    run_states, slurm = look_at([reproduction.folder(node.name) for node in nodes], history=True)
    statuses = statuses_of(reproduction, run_states, slurm)
    starts = {
        node.name: explained_starts(run_state, statuses[node.name].status, slurm)
        for node, run_state in zip(nodes, run_states, strict=True)
    }
    sections = [
        Section("Results", _results(folder, found, pictures)),
        Section("Plan", [_plan(reproduction, statuses), *_cost(reproduction, statuses, tflops)]),
        Section("Jobs", _jobs(statuses, starts)),
        *_of_training(reproduction),
        Section("Settings", _settings(reproduction)),
    ]
    text = page.page(f"Reproduction: {folder.name}", sections, lead=_lead(statuses, found))
    write_atomically(folder / page.FILE, text)
    print(folder / page.FILE)


def _lead(statuses: Mapping[str, NodeStatus], found: PaperTable | None) -> list[Html]:
    states = Counter("done" if each.state == DONE else each.status.state for each in statuses.values())
    done = states.pop("done", 0)
    others = "".join(f", {number} {state}" for state, number in states.most_common())
    complete = 0 if found is None else len(found.rows) - len(found.missing)
    rows = f" {complete} of {len(found.rows)} rows of the table are complete." if found else ""
    return [page.paragraph(f"{done} of {count_jobs(len(statuses))} done{others}.{rows}")]


def _results(folder: Path, found: PaperTable | None, pictures: Sequence[Path]) -> list[Html]:
    if found is None:
        return [page.paragraph("No row of the table has results yet.")]
    from cfmask.report.charts import reliability_chart
    from cfmask.report.tables import html_table

    blocks = [html_table(found.rows, found.split, published=found.published, note=found.note)]
    blocks += [
        page.figure(path, _CAPTIONS[path.name], f"Chart. {_CAPTIONS[path.name]}. The table has the numbers.")
        for path in pictures
    ]
    reliability_chart([row for row in found.rows if row.sets], folder / "reliability.png", found.split)
    what = "Accuracy over confidence, over all seeds of each row: a calibrated model is on the diagonal"
    blocks.append(page.figure(folder / "reliability.png", what, f"Line charts for each set. {what}."))
    return blocks


def _plan(reproduction: Reproduction, statuses: Mapping[str, NodeStatus]) -> Html:
    rows = []
    for kind in kinds_of_jobs(reproduction.plan):
        waits = dict.fromkeys(reproduction.plan.nodes[name].kind for name in kind.nodes[0].after)
        name = kind.branches.replace(" ", "\N{NO-BREAK SPACE}") + kind.title
        rows.append([name, kind.state(statuses), kind.work, ", ".join(waits) or None])
    return page.table("Jobs by kind; × is the number of seeds", ["job", "state", "what it does", "waits for"], rows)


def _cost(reproduction: Reproduction, statuses: Mapping[str, NodeStatus], tflops: float | None) -> list[Html]:
    found = estimate(reproduction, statuses, tflops)
    return [page.table("Estimated cost by row", found.header, found.lines), page.paragraph(found.note, note=True)]


def _jobs(statuses: Mapping[str, NodeStatus], starts: Mapping[str, list[Start]]) -> list[Html]:
    """The jobs that have not succeeded at once, and folded, all jobs and all starts."""
    wrong = [
        name
        for name, each in statuses.items()
        if each.state != DONE and each.status.state in ENDED and each.status.state != "never started"
    ]
    blocks = []
    if wrong:
        blocks.append(runs_table("Jobs that have ended without success", wrong, [statuses[n].status for n in wrong]))
    blocks.append(interrupted(starts))
    blocks.append(
        page.folded(
            f"All {count_jobs(len(statuses))}, and their starts",
            runs_table("All jobs", list(statuses), [each.status for each in statuses.values()]),
            run_blocks.starts(starts),
        )
    )
    return blocks


def _of_training(reproduction: Reproduction) -> list[Section]:
    """Curves, recipes and versions of the training runs."""
    trained = {name: node for name, node in reproduction.plan.nodes.items() if isinstance(node.work, Recipe)}
    if not trained:
        return []
    first: dict[str, PlanNode] = {}
    for node in trained.values():
        first.setdefault(node.kind, node)
    recipes = {kind: node.work for kind, node in first.items() if isinstance(node.work, Recipe)}
    there = [run for name in trained if (run := reproduction.folder(name)).has_work()]
    return [
        Section(
            "Training",
            [
                *_masks(reproduction, there),
                *run_blocks.curves(reproduction.setup.folder / "curves.png", there),
                run_blocks.recipes(recipes),
                run_blocks.versions(there),
            ],
        )
    ]


def _masks(reproduction: Reproduction, runs: Sequence[RunFolder]) -> list[Html]:
    """A contact sheet of the method's run, or else of the first finished one with masks."""
    done = [run for run in runs if run.final.exists() and run.recipe().method.masked]
    for run in sorted(done, key=lambda run: not run.root.name.startswith(f"{HEADLINE}-s")):
        out, evaluation = reproduction.setup.folder / "masks.png", reproduction.setup.evaluation
        return run_blocks.masks(out, run, run.final, evaluation.shards, evaluation.sets[0])
    return []


def _settings(reproduction: Reproduction) -> list[Html]:
    base, evaluation = reproduction.base, reproduction.setup.evaluation
    sets = [[name, f"{manifest.num_samples:,}"] for name, manifest in reproduction.materials.there.items()]
    return [
        page.paragraph(reproduction.selection),
        page.facts(
            [
                ("model", base.model.name),
                ("weights", base.model.pretrained),
                ("seeds", run_blocks.text_of(reproduction.setup.seeds)),
                ("checkpoint of a row", reproduction.setup.checkpoint),
                ("shards", base.data.shards),
                ("precision of evaluations", evaluation.precision),
                ("each training job", str(reproduction.allocation)),
                ("folder", reproduction.setup.folder),
            ]
        ),
        page.table("Sets that the jobs read", ["set", "images"], sets),
    ]
