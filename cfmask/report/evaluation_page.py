"""The page of an evaluation: RUN/index.html, one file with its tables, pictures, models and their training runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from cfmask.evaluation.model_origin import ModelOrigin
from cfmask.report import page, run_blocks
from cfmask.report.labels import model_names
from cfmask.report.page import Html, Section
from cfmask.report.results import Results, read_results, rows_of
from cfmask.report.summary import note_of
from cfmask.report.tables import html_table
from cfmask.runs import RunFolder
from cfmask.runtime.files import write_atomically

_CAPTIONS = {
    "bars.png": "Top-1 by set",
    "sweep.png": "Top-1 over α, the share of the fine-tuned model",
    "effective-robustness.png": "Accuracy on shifted sets over accuracy in distribution; the line is fitted to the "
    "zero-shot models",
    "reliability.png": "Accuracy over confidence: a calibrated model is on the diagonal",
}


def write_page(run: RunFolder, title: str, names: Sequence[str] = (), pictures: Sequence[Path] = ()) -> None:
    """Write the page of a finished evaluation beside its results. Without sets, do nothing.

    Args:
        names: as for ``summary.show``.
        pictures: files in the folder that this command has written.
    """
    results = read_results(run.root)
    if not results.sets:
        return
    drawn = {path.name: _figure(path) for path in pictures}
    calibration = drawn.pop("reliability.png", None)
    table = html_table(rows_of(results.models, names), results.split, note=note_of(results, names))
    called = _distinct(names or [model.name for model in results.models])
    sections = [
        Section("Accuracy", [table, *drawn.values()]),
        Section("Calibration", [_calibration(results, called), *([calibration] if calibration else [])]),
        Section("Models", [_models(results, names)]),
    ]
    if trained := run_blocks.training_runs(results.origins):
        curves = run_blocks.curves(run.root / "curves.png", list(trained.values()))
        blocks = [*_masks(run.root, results, trained), *curves, *run_blocks.training(trained)]
        sections.append(Section("Training runs", blocks))
    sections.append(Section("Evaluation", _evaluation(run, results)))
    write_atomically(run.root / page.FILE, page.page(f"{title}: {run.root.name}", sections))
    print(run.root / page.FILE)


def _figure(path: Path) -> Html:
    caption = _CAPTIONS[path.name]
    return page.figure(path, caption, f"Chart. {caption}. The tables have the numbers.")


def _calibration(results: Results, names: Sequence[str]) -> Html:
    labels = {label: name for label, name in results.split.columns.items() if name is not None}
    rows = [
        [name, *(f"{100 * model.sets[of].ece:.1f}" if of in model.sets else None for of in labels.values())]
        for name, model in zip(names, results.models, strict=True)
    ]
    return page.table("Expected calibration error in percent; 15 bins of the confidence", ["", *labels], rows)


def _distinct(names: Sequence[str]) -> list[str]:
    """The names, with a number where several models, the seeds of a row, have one name."""
    return [
        f"{name}, no. {names[: i + 1].count(name)}" if names.count(name) > 1 else name for i, name in enumerate(names)
    ]


def _models(results: Results, names: Sequence[str]) -> Html:
    """Which files were evaluated, and what chose them."""
    files = results.evaluation.models
    called = _distinct(names) if len(names) == len(files) else model_names(files)
    origins = results.origins or [ModelOrigin(file, chosen="–") for file in files]
    return run_blocks.models(called, origins) if origins else page.paragraph("–")


def _masks(folder: Path, results: Results, runs: Mapping[str, RunFolder]) -> list[Html]:
    """A contact sheet of the first evaluated model that was trained with masks."""
    evaluation, found = results.evaluation, {str(run.root): run for run in runs.values()}
    for origin in results.origins:
        run = found.get(origin.run or "")
        if run is not None and run.recipe().method.masked:
            return run_blocks.masks(folder / "masks.png", run, Path(origin.file), evaluation.shards, results.sets[0])
    return []


def _evaluation(run: RunFolder, results: Results) -> list[Html]:
    values = {name: value for name, value in dataclasses.asdict(results.evaluation).items() if name != "models"}
    sets = [[name, max(m.sets[name].total for m in results.models if name in m.sets)] for name in results.sets]
    return [
        page.table("Sets", ["set", "images"], [[name, f"{images:,}"] for name, images in sets]),
        page.facts((name.replace("_", " "), run_blocks.text_of(value)) for name, value in values.items()),
        run_blocks.starts({run.root.name: run.starts()}),
    ]
