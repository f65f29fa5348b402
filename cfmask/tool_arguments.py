"""Arguments that the tools share for models, data sets and devices, and how models are loaded."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cfmask.models.head import ModelInfo, load_alike
from cfmask.recipe import Method
from cfmask.run_search import find_model
from cfmask.runs import load_recipe

if TYPE_CHECKING:  # torch takes seconds to import, and --help does not need it
    from cfmask.models.tower import Classifier

MODEL_HELP = (
    "model file, run folder (its trained model, or its latest checkpoint's), checkpoint folder, or "
    "RUN/checkpoints/best.json (the best checkpoint's)"
)
NAMES_HELP = "names of the models in tables and pictures (default: their presets)"
DATA_HELP = "folder that holds a folder of shards for each set, or its URL"


def add_compute_arguments(parser: argparse.ArgumentParser, *, batch_size: int = 256) -> None:
    """Flags for reading images and running a model on them. They change the speed, not the result."""
    parser.add_argument(
        "--batch-size", type=int, default=batch_size, metavar="N", help=f"images at a time (default: {batch_size})"
    )
    parser.add_argument("--loader-workers", type=int, default=2, metavar="N", help="reader threads (default: 2)")
    add_device_argument(parser)


def add_device_argument(parser: argparse.ArgumentParser, *, resolve: bool = True) -> None:
    """resolve: replace ``auto`` by this machine's device; otherwise the caller does."""
    parser.add_argument(
        "--device",
        type=resolve_device if resolve else str,
        default="auto",
        metavar="DEVICE",
        help="device to compute on: cuda, cpu, or auto for a GPU if there is one (default: auto)",
    )


def resolve_device(name: str) -> str:
    """The device that ``auto`` means on this machine. Torch is imported here because it takes seconds."""
    if name != "auto":
        return name
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def load_models(paths: Sequence[str | Path]) -> tuple[list[Classifier], ModelInfo]:
    """Models by the paths that the user gives; all with the same configuration, preprocessing and class list.

    Raises:
        UserError: a path has no model, or the models differ in these.
    """
    loaded = list(load_alike([find_model(path) for path in paths]))
    return [model for model, _ in loaded], loaded[0][1]


def recorded_method(path: str | Path) -> Method | None:
    """The method of the run that a model belongs to, from the recipe.json in a folder above it; None without a run."""
    whole = Path(path).resolve()
    recipes = (folder / "recipe.json" for folder in (whole, *whole.parents))
    return next((load_recipe(file).method for file in recipes if file.exists()), None)
