"""The report of an evaluation: a table on the terminal, and files beside its results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cfmask.data.shards import find_set, manifest_if_there
from cfmask.evaluation.model_origin import ModelOrigin, checkpoint_note, short_names
from cfmask.evaluation.selection import known_test_set
from cfmask.report.charts import bar_chart, reliability_chart
from cfmask.report.results import Results, read_results, rows_of
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
    called = [replace(model, name=name) for model, name in zip(results.models, names, strict=False)]
    reliability_chart(called or results.models, reliability, results.split)
    print(f"\n{run.root}: results.json, table.md, table.tex, bars.png, reliability.png")
    return [bars, reliability]


def note_of(results: Results, names: Sequence[str]) -> str:
    """Sentences that say which sets have chosen the models."""
    files = [origin.file for origin in results.origins]
    called = names if len(names) == len(files) else short_names(files)
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
