"""Names of runs and models in charts and tables: the preset, and what else is needed to tell them apart. No paths.

Runs that differ in their seed alone are seeds of one line.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfmask.errors import UserError
from cfmask.evaluation.model_origin import ZERO_SHOT, ModelOrigin, origin_of, short_names
from cfmask.evaluation_spec import WiseFT
from cfmask.models.head import ModelInfo, read_info
from cfmask.presets import method_name
from cfmask.recipe import Recipe
from cfmask.runs import RunFolder
from cfmask.runtime.patience import impatient


@dataclass(frozen=True)
class RunGroup:
    """Runs that are one line of a chart."""

    label: str
    """Its name in the legend."""
    runs: tuple[RunFolder, ...]
    """One run, or the seeds of one recipe."""
    recipe: Recipe | None
    """The recipe of the first; None if it has none."""


def run_groups(runs: Sequence[RunFolder]) -> list[RunGroup]:
    """Group the seeds of each recipe, and name each group by its preset. Groups of one preset have in their name the
    settings in which they differ; repeated runs of one recipe and seed by their folders."""
    recipes = [_recipe(run) for run in runs]
    grouped: dict[str, list[int]] = {}
    for i, (run, recipe) in enumerate(zip(runs, recipes, strict=True)):
        key = str(run.root)
        if recipe is not None:
            key = json.dumps([_settings(recipe), recipe.run.log_steps], sort_keys=True)
        grouped.setdefault(key, []).append(i)
    groups: list[list[int]] = []
    for members in grouped.values():
        seeds = {recipe.run.seed for i in members if (recipe := recipes[i])}
        groups += [members] if len(seeds) == len(members) else [[i] for i in members]
    names, settings, found = [], [], []
    for first, *_ in groups:
        recipe = recipes[first]
        found.append(recipe)
        names.append(method_name(recipe) if recipe else runs[first].root.name)
        settings.append(_settings(recipe) if recipe else {})
    labels = _distinct(names, settings, [lambda same: short_names([runs[groups[i][0]].root for i in same])])
    return [
        RunGroup(f"{label} ({len(of)} seeds)" if len(of) > 1 else label, tuple(runs[i] for i in of), recipe)
        for label, of, recipe in zip(labels, groups, found, strict=True)
    ]


def model_names(
    files: Sequence[str | Path], given: Sequence[str] | None = None, *, distinct: bool = False
) -> list[str]:
    """The names that the user gave, or else distinct ones: the preset, "zero-shot", "WiSE-FT, α = 0.5", "soup", or for
    a file of no run its own name. Models of one name differ in what is added to it: architecture, seed and other
    settings, then steps, then paths.

    Args:
        files: model files, from ``run_search.find_model``.
        given: from --names.
        distinct: whether two models may not have one name.

    Raises:
        UserError: another number of names than of models, an empty one, or two equal ones in spite of ``distinct``.
    """
    if given:
        if len(given) != len(files):
            raise UserError(f"--names gives {len(given)} names to {len(files)} models.")
        if not all(map(str.strip, given)):
            raise UserError("--names has an empty name.")
        if distinct and len(set(given)) < len(given):
            raise UserError(f"--names gives one name to several models: {', '.join(given)}. Give each its own.")
        return list(given)
    origins = [origin_of(file) for file in files]
    recipes = [_recipe(RunFolder(Path(origin.run))) if origin.run else None for origin in origins]
    starts = {os.path.realpath(recipe.model.pretrained) for recipe in recipes if recipe is not None}
    names, settings = [], []
    for origin, recipe in zip(origins, recipes, strict=True):
        if recipe is not None and origin.step != 0:
            names.append(method_name(recipe))
            settings.append(_settings(recipe) | {"run.seed": recipe.run.seed})
        else:
            info = _info(origin.file)
            names.append(_untrained(origin, info, starts))
            settings.append({} if info is None else {"model.name": info.name})
    steps = ["" if origin.step is None else f"step {origin.step:,}" for origin in origins]
    return _distinct(
        names, settings, [lambda same: [steps[i] for i in same], lambda same: short_names([files[i] for i in same])]
    )


def _untrained(origin: ModelOrigin, info: ModelInfo | None, starts: Set[str]) -> str:
    """The name of a model that no training run has trained.

    Args:
        starts: files from which the other models were trained.
    """
    made, file = info.provenance if info else "", Path(origin.file)
    if origin.method == WiseFT.make:
        return made.partition(", of ")[0] if made.startswith("WiSE-FT") else "WiSE-FT"
    if origin.method is not None and origin.method.endswith("soup"):
        return "soup"
    if origin.method == ZERO_SHOT or os.path.realpath(file) in starts:
        return ZERO_SHOT
    return file.parent.name if file.stem == "model" else file.stem


def _info(file: str) -> ModelInfo | None:
    try:
        return read_info(file)
    except UserError:
        return None


def _recipe(run: RunFolder) -> Recipe | None:
    """The recipe of a run; None without one, and for an evaluation."""
    try:
        with impatient():  # a name is not worth a wait
            work = run.work() if run.has_work() else None
    except (UserError, OSError):
        return None
    return work if isinstance(work, Recipe) else None


def _settings(recipe: Recipe) -> dict[str, Any]:
    """What two runs have to share, except for the seed, to be seeds of one line."""
    settings = recipe.of_weights()
    del settings["run.seed"]
    names = {"model.name": recipe.model.name, "model.pretrained": recipe.model.pretrained}
    return {**names, "data.shards": recipe.data.shards, "data.train_split": recipe.data.train_split, **settings}


def _distinct(
    names: Sequence[str], settings: Sequence[Mapping[str, Any]], more: Sequence[Callable[[list[int]], list[str]]]
) -> list[str]:
    """The names, with what tells equal ones apart: settings that differ, then what the functions of ``more`` return for
    the indices of equal names, then a number."""

    def differing(same: list[int]) -> list[str]:
        keys = dict.fromkeys(key for i in same for key in settings[i])
        keys = {key: None for key in keys if len({settings[i].get(key) for i in same}) > 1}
        return [
            ", ".join(_said(key, settings[i][key]) for key in keys if settings[i].get(key) is not None) for i in same
        ]

    found = list(names)
    for told_by in (differing, *more, lambda same: [f"no. {n}" for n in range(1, len(same) + 1)]):
        equal: dict[str, list[int]] = {}
        for i, name in enumerate(found):
            equal.setdefault(name, []).append(i)
        for same in equal.values():
            words = told_by(same) if len(same) > 1 else []
            if len(set(words)) > 1:
                for i, word in zip(same, words, strict=True):
                    found[i] = f"{found[i]}, {word}" if word else found[i]
    return found


def _said(key: str, value: Any) -> str:
    """A setting in a legend. Of a path, the last part."""
    if key.startswith(("model.", "data.")):
        return Path(str(value)).stem
    return f"{key.partition('.')[2]} {value}"
