"""The table of an evaluation on the terminal, and beside its results with pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cfmask.data.shards import find_set, manifest_if_there
from cfmask.evaluation.model_origin import describe, short_names
from cfmask.evaluation.selection import known_test_set
from cfmask.report.charts import bar_chart, reliability_chart
from cfmask.report.results import ModelResult, ResultRow, Results, read_results, rows_of
from cfmask.report.tables import latex_table, markdown_table
from cfmask.runs import RunFolder
from cfmask.runtime.files import write_atomically


def show(run: RunFolder, title: str, names: Sequence[str] = ()) -> None:
    """Print the table of an evaluation, and write it beside its results with pictures.

    Args:
        names: of the models, in a table; by default as the results call them.
    """
    results = read_results(run.root)
    if not results.sets:
        return
    rows = named_rows(results, names)
    note = _note(results, names)
    text = markdown_table(rows, results.split, note=note)
    print(text)
    write_atomically(run.root / "table.md", f"# {title}\n\n{text}\n")
    write_atomically(run.root / "table.tex", latex_table(rows, results.split, note=note) + "\n")
    bar_chart(rows, run.root / "bars.png", results.split)
    called = results.models
    if names:
        called = tuple(replace(model, name=name) for model, name in zip(called, names, strict=True))
    reliability_chart(called, run.root / "reliability.png", results.split)
    written = ["results.json", "table.md", "table.tex", "bars.png", "reliability.png"]
    print(f"\n{run.root}: {', '.join(written)}")


def _note(results: Results, names: Sequence[str]) -> str:
    """What has chosen the models of a table, in sentences."""
    files = [origin.file for origin in results.origins]
    called = names if len(names) == len(files) else short_names(files) if files else []
    parts = [describe(results.origins, dict(zip(files, called, strict=True)))]
    chose = {origin.chosen_on for origin in results.origins if origin.chosen_on is not None}
    for name in sorted(chose):
        if name in results.sets:
            parts.append(f"{name} has chosen a checkpoint, which is overrated on it.")
        elif known_test_set(name):
            parts.append(f"{name}, which has chosen a checkpoint, is a test set.")
    if results.chosen_on is not None:
        manifest = manifest_if_there(find_set(results.evaluation.shards, results.chosen_on))
        test_set = " (a test set)" if known_test_set(results.chosen_on, manifest) else ""
        parts.append(f"Chosen on {results.chosen_on}{test_set}.")
    return " ".join(filter(None, parts))


def named_rows(results: Results, names: Sequence[str]) -> list[ResultRow]:
    """A row for each name; models of one name are seeds of it. No names: a row for each model."""
    if not names:
        return rows_of(results)
    found: dict[str, list[ModelResult]] = {}
    for name, model in zip(names, results.models, strict=True):
        found.setdefault(name, []).append(model)
    return [ResultRow(name, per_seed) for name, per_seed in found.items()]
