"""The report of an evaluation: a table on the terminal, and files beside its results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cfmask.data.shards import find_set, manifest_if_there
from cfmask.evaluation.model_origin import ModelOrigin, checkpoint_note
from cfmask.evaluation.selection import known_test_set
from cfmask.report.charts import bar_chart, effective_robustness, reliability_chart
from cfmask.report.labels import model_names
from cfmask.report.results import Results, read_results, rows_of
from cfmask.report.robustness import Line, robustness_table
from cfmask.report.tables import latex_table, markdown_table
from cfmask.runs import RunFolder
from cfmask.runtime.files import write_atomically


def show(run: RunFolder, title: str, names: Sequence[str] = ()) -> list[Path]:
    """Print the table of an evaluation, and write it and charts beside its results. Without sets, do nothing.

    Args:
        names: of the models; models of one name are seeds of one row. By default, as in results.json.

    Returns:
        The charts.
    """
    results = read_results(run.root)
    if not results.sets:
        return []
    rows, note = rows_of(results.models, names), note_of(results, names)
    text = markdown_table(rows, results.split, note=note)
    print(text)
    write_atomically(run.root / "table.md", f"# {title}\n\n{text}\n")
    write_atomically(run.root / "table.tex", latex_table(rows, results.split, note=note) + "\n")
    bars, reliability = run.root / "bars.png", run.root / "reliability.png"
    bar_chart(rows, bars, results.split)
    reliability_chart(rows, reliability, results.split)
    print(f"\n{run.root}: results.json, table.md, table.tex, bars.png, reliability.png")
    return [bars, reliability]


def show_robustness(run: RunFolder, names: Sequence[str], line: Line) -> Path:
    """Print the effective robustness of an evaluation's models, and write it and its chart beside the results.

    Args:
        names: see ``show``.

    Returns:
        The chart.
    """
    results, chart = read_results(run.root), run.root / "effective-robustness.png"
    rows = [*rows_of(results.models, names), *line.published]
    values = effective_robustness(rows, line.backbones, chart, results.split)
    text = robustness_table(values, line.backbones)
    write_atomically(run.root / "effective-robustness.md", text + "\n")
    print(f"\n{text}\n\n{run.root}: effective-robustness.md, {chart.name}")
    return chart


def note_of(results: Results, names: Sequence[str]) -> str:
    """Sentences that say which sets have chosen the models."""
    files = [origin.file for origin in results.origins]
    called = names if len(names) == len(files) else model_names(files)
    by_name: dict[str, list[ModelOrigin]] = {}
    for name, origin in zip(called, results.origins, strict=True):
        by_name.setdefault(name, []).append(origin)
    parts = [checkpoint_note(by_name)]
    for name in sorted({origin.chosen_on for origin in results.origins if origin.chosen_on is not None}):
        if name in results.sets:
            parts.append(f"{name} has chosen a checkpoint: its accuracy on this set is too high.")
        elif known_test_set(name):
            parts.append(f"{name}, which has chosen a checkpoint, is a test set.")
    if results.chosen_on is not None:
        manifest = manifest_if_there(find_set(results.evaluation.shards, results.chosen_on))
        test_set = " (a test set)" if known_test_set(results.chosen_on, manifest) else ""
        parts.append(f"Chosen on {results.chosen_on}{test_set}.")
    return " ".join(filter(None, parts))
