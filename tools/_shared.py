"""What the tools share: how a model and a data set are named, evaluated with a progress bar, and shown as a table."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from cfmask.data.remote import is_remote, node_cache
from cfmask.data.shards import Manifest, find_set, load_manifest
from cfmask.data.stream import eval_batches
from cfmask.errors import UserError
from cfmask.evaluate import Score, top1
from cfmask.models.head import ModelInfo, load_model
from cfmask.models.tower import Classifier, Normalise
from cfmask.recipe import Method, load_recipe
from cfmask.runs import find_model

MODEL_HELP = "model file, run folder (its trained model, or its latest checkpoint's) or checkpoint folder"
DATA_HELP = "folder with a folder of shards a set, or its URL"


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shards", required=True, metavar="DIR_OR_URL", help=DATA_HELP)
    parser.add_argument("--sets", nargs="+", required=True, metavar="SET", help="folders under --shards to evaluate on")
    add_compute_arguments(parser)


def add_compute_arguments(parser: argparse.ArgumentParser, *, batch_size: int = 256) -> None:
    """How images are read and put through a model: changes speed, and no result."""
    parser.add_argument(
        "--batch-size", type=int, default=batch_size, metavar="N", help=f"images at a time (default: {batch_size})"
    )
    parser.add_argument("--loader-workers", type=int, default=2, metavar="N", help="threads that read (default: 2)")
    add_device_argument(parser)


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: a GPU if any"
    )


def data_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    """Keywords of evaluate_sets from what ``add_data_arguments`` parsed."""
    return {name: getattr(arguments, name) for name in ("shards", "sets", "batch_size", "loader_workers", "device")}


def load_models(paths: Sequence[str | Path]) -> tuple[list[Classifier], ModelInfo]:
    """Models of one kind: the same configuration, preprocessing and class list.

    Raises:
        UserError: a path without a model, or models that do not belong together.
    """
    models, first = [], None
    for path in paths:
        model, info = load_model(find_model(path))
        if first is None:
            first = info
        for what in ("config", "mean", "std", "classes"):
            if getattr(info, what) != getattr(first, what):
                raise UserError(f"{path} and {paths[0]} differ in {what}: they cannot be evaluated side by side.")
        models.append(model)
    assert first is not None
    return models, first


def recorded_method(path: str | Path) -> Method | None:
    """The method of the run that a model is of, by the recipe.json in a folder above it; None for a model of no run."""
    whole = Path(path).resolve()
    recipes = (folder / "recipe.json" for folder in (whole, *whole.parents))
    return next((load_recipe(file).method for file in recipes if file.exists()), None)


def check_classes(manifest: Manifest, info: ModelInfo) -> None:
    """Raises UserError if a set has another class list than a model."""
    if tuple(wnid for wnid, _ in manifest.classes) != info.classes:
        raise UserError(
            f"The set {manifest.root} has {manifest.num_classes} classes, the model {len(info.classes)}, or they "
            "are in another order: labels and answers would not mean the same. Convert the set with the class "
            "list that the model was trained on."
        )


def load_sets(shards: str | Path, sets: Sequence[str], *, check_files: bool = True) -> dict[str, Manifest]:
    """Manifests by name, of sets in a folder or behind a URL.

    Raises:
        UserError: no such set, or (``check_files``) one that is not whole.
    """
    cache = node_cache() if is_remote(shards) else None
    return {name: load_manifest(find_set(shards, name), cache=cache, check_files=check_files) for name in sets}


def evaluate_sets(
    models: Sequence[Classifier],
    info: ModelInfo,
    shards: str | Path,
    sets: Sequence[str],
    *,
    batch_size: int = 256,
    loader_workers: int = 2,
    device: str = "cpu",
) -> dict[str, list[Score]]:
    """Scores by set, in the order of the models; every set is read once.

    Raises:
        UserError: no such set, or one with another class list than the models'.
    """
    for model in models:
        model.to(device).eval()
    normalise = Normalise(info.mean, info.std).to(device)
    manifests = load_sets(shards, sets)
    for manifest in manifests.values():
        check_classes(manifest, info)
    scores = {}
    with tqdm(total=sum(m.num_samples for m in manifests.values()), unit="image", dynamic_ncols=True) as bar:
        for name, manifest in manifests.items():
            bar.set_description(name)
            batches = eval_batches(
                manifest,
                image_size=models[0].image_size,
                batch_size=batch_size,
                rank=0,
                world_size=1,
                loader_workers=loader_workers,
            )

            def counted(batches=batches):
                for batch in batches:
                    yield batch
                    bar.update(len(batch.labels))

            scores[name] = top1(models, normalise, counted(), torch.device(device))
    return scores


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, padded so that it reads well in a terminal."""
    widths = [max(len(line[i]) for line in (header, *rows)) for i in range(len(header))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in rows]
    head = "| " + " | ".join(cell.ljust(w) for cell, w in zip(header, widths, strict=True)) + " |"
    return "\n".join([head, "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines])
