"""Blocks of a page about models and runs, from their folders alone: origins, recipes, code and versions, starts,
curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from cfmask.errors import UserError
from cfmask.evaluation.model_origin import ModelOrigin, short_names
from cfmask.recipe import Recipe
from cfmask.report import page
from cfmask.report.page import Html
from cfmask.runs import RunFolder
from cfmask.runtime.attempts import Start
from cfmask.runtime.jsonl import read_object
from cfmask.runtime.times import date_and_time

_OF_ONE_RUN = ("run.seed", "model.pretrained", "method.ensemble", "model.head")
"""Settings that differ between runs of one table by its construction."""


def models(names: Sequence[str], origins: Sequence[ModelOrigin]) -> Html:
    """A table of models: their files, and what chose them.

    Args:
        names: of the models, all different.
    """
    rows = [
        [
            name,
            origin.step,
            origin.chosen,
            origin.chosen_on,
            None if origin.top1 is None else f"{origin.top1:.2f}",
            origin.file,
        ]
        for name, origin in zip(names, origins, strict=True)
    ]
    header = ["model", "step", "chosen", "on", "top-1 % there", "file"]
    return page.table("Models, and which checkpoint they are", header, rows)


def training_runs(origins: Sequence[ModelOrigin]) -> dict[str, RunFolder]:
    """The training runs of models that are still there, by distinct names."""
    runs = [RunFolder(Path(path)) for path in dict.fromkeys(origin.run for origin in origins if origin.run)]
    runs = [run for run in runs if run.has_work() and isinstance(run.work(), Recipe)]
    names = [run.root.name for run in runs]
    if len(set(names)) < len(names):
        names = short_names([run.root for run in runs])
    return dict(zip(names, runs, strict=True))


def training(runs: Mapping[str, RunFolder]) -> list[Html]:
    """Recipes, starts and versions of training runs."""
    return [
        recipes({name: run.recipe() for name, run in runs.items()}),
        starts({name: run.starts() for name, run in runs.items()}),
        versions(list(runs.values())),
    ]


def recipes(by_name: Mapping[str, Recipe]) -> Html:
    """Two tables: the settings in which the recipes differ, and folded, those that all of them share."""
    flat = {name: {k: v for k, v in _flat(recipe).items() if k not in _OF_ONE_RUN} for name, recipe in by_name.items()}
    names = list(next(iter(flat.values()))) if flat else []
    differ = [name for name in names if len({text_of(values[name]) for values in flat.values()}) > 1]
    same = [name for name in names if name not in differ]
    blocks = []
    if differ:
        rows = [[name, *(text_of(values[setting]) for setting in differ)] for name, values in flat.items()]
        header = ["run", *differ]
        blocks.append(page.table("Settings that differ between the recipes", header, rows))
    if same:
        first = next(iter(flat.values()))
        what = "Settings that all recipes share" if len(flat) > 1 else "All settings of the recipe"
        blocks.append(page.folded(what, page.facts((setting, text_of(first[setting])) for setting in same)))
    return page.joined(blocks)


def _flat(recipe: Recipe) -> dict[str, Any]:
    return {f"{group}.{name}": value for group, values in recipe.as_dict().items() for name, value in values.items()}


def text_of(value: Any) -> str:
    """A setting for readers."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(text_of, value)) or "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "–" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def versions(runs: Sequence[RunFolder]) -> Html:
    """A table of the copies of the code with which jobs of the runs were submitted: commit, Python and packages."""
    found: dict[str, tuple[dict[str, Any], list[str]]] = {}
    for run in runs:
        with suppress(OSError):  # the table of states says what cannot be read
            for file in sorted((run.root / "code").glob("*/snapshot.json")):
                info = read_object(file)
                if info and isinstance(info.get("packages"), dict):
                    found.setdefault(str(info.get("digest")), (info, []))[1].append(run.root.name)
    if not found:
        return page.paragraph("No job of these runs was submitted: they have no copy of the code.")
    infos = [info for info, _ in found.values()]
    packages = list(dict.fromkeys(name for info in infos for name in info["packages"]))
    rows: list[list[object]] = [
        ["runs", *(len(names) for _, names in found.values())],
        ["commit", *(str(info.get("commit") or "–")[:12] for info in infos)],
        ["files changed since", *(len(info.get("uncommitted") or ()) for info in infos)],
        ["copied", *(date_and_time(info.get("taken")) for info in infos)],
        ["Python", *(info.get("python") for info in infos)],
        *([name, *(info["packages"].get(name) for info in infos)] for name in packages),
    ]
    return page.table("Code of the jobs; each run folder has a copy", ["code", *found], rows)


def starts(by_run: Mapping[str, Sequence[Start]], caption: str = "Starts of each run, and why they ended") -> Html:
    """A table of all starts, and why each ended."""
    rows: list[list[object]] = []
    for name, of_run in by_run.items():
        for start in of_run:
            facts = start.facts
            about = (facts.get(key) for key in ("job", "nodes", "world_size", "device", "from_step"))
            rows.append(
                [
                    name,
                    facts.get("attempt"),
                    date_and_time(facts.get("started")),
                    *about,
                    start.reached,
                    start.why_ended,
                ]
            )
    if not rows:
        return page.paragraph("None of these runs has started.")
    header = ["run", "start", "began", "job", "nodes", "ranks", "device", "from step", "to step", "why it ended"]
    return page.table(caption, header, rows)


def with_steps(runs: Sequence[RunFolder]) -> list[RunFolder]:
    """Those whose log can be read and has a step."""
    found = []
    for run in runs:
        with suppress(OSError):
            found += [run] if run.logged_step() else []
    return found


def curves(out: Path, runs: Sequence[RunFolder]) -> list[Html]:
    """A figure of loss and accuracy of those runs that have a log; none if no run has one."""
    from cfmask.report.curves import draw_curves
    from cfmask.report.labels import run_groups

    there = with_steps(runs)
    if not there:
        return []
    draw_curves(out, there)
    what = f"Loss and accuracy over steps of {', '.join(group.label for group in run_groups(there))}"
    return [page.figure(out, what, f"Line charts. {what}.")]


def masks(out: Path, run: RunFolder, file: Path, shards: str, name: str) -> list[Html]:
    """A contact sheet of what a run with masks is trained on, drawn on the CPU unless ``out`` is newer than the model;
    nothing for a run without masks.

    Args:
        file: its model file.
        shards, name: the set to take images from.
    """
    method = run.recipe().method
    if not method.masked:
        return []
    try:
        if not out.exists() or out.stat().st_mtime < file.stat().st_mtime:
            from cfmask.data.shards import load_sets
            from cfmask.report.contact_sheet import draw_sheet_of_run

            draw_sheet_of_run(out, file, method, load_sets(shards, [name])[name])
        what = f"Images of {name}, with the masks of {run.root.name}"
        return [page.figure(out, what, f"Contact sheet: image, CAM, mask, donor, counterfactual image. {what}.")]
    except (UserError, OSError) as error:
        return [page.paragraph(f"No contact sheet of {run.root.name}: {error}", note=True)]
