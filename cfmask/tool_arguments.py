"""Arguments that the tools share: how a model, a data set and a device are named, and how models are loaded."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cfmask.models.head import ModelInfo, load_alike
from cfmask.recipe import Method
from cfmask.runs import find_model, load_recipe

if TYPE_CHECKING:  # torch takes seconds to import, and --help needs none of it
    from cfmask.models.tower import Classifier

MODEL_HELP = (
    "model file, run folder (its trained model, or its latest checkpoint's), checkpoint folder, or "
    "RUN/checkpoints/best.json (the best checkpoint's)"
)
DATA_HELP = "folder with a folder of shards a set, or its URL"


def add_compute_arguments(parser: argparse.ArgumentParser, *, batch_size: int = 256) -> None:
    """How images are read and put through a model: changes speed, and no result."""
    parser.add_argument(
        "--batch-size", type=int, default=batch_size, metavar="N", help=f"images at a time (default: {batch_size})"
    )
    parser.add_argument("--loader-workers", type=int, default=2, metavar="N", help="threads that read (default: 2)")
    add_device_argument(parser)


def add_device_argument(parser: argparse.ArgumentParser, *, resolve: bool = True) -> None:
    """resolve: ``auto`` is this machine's; otherwise the caller decides."""
    parser.add_argument(
        "--device",
        type=resolve_device if resolve else str,
        default="auto",
        metavar="DEVICE",
        help="where to compute: cuda, cpu, or auto, a GPU if there is one (default: auto)",
    )


def resolve_device(name: str) -> str:
    """Called when the flags are parsed, and not to print --help: torch takes seconds to import."""
    if name != "auto":
        return name
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def load_models(paths: Sequence[str | Path]) -> tuple[list[Classifier], ModelInfo]:
    """Models of one kind, as the user names them: the same configuration, preprocessing and class list.

    Raises:
        UserError: a path without a model, or models that do not belong together.
    """
    loaded = list(load_alike([find_model(path) for path in paths]))
    return [model for model, _ in loaded], loaded[0][1]


def recorded_method(path: str | Path) -> Method | None:
    """The method of the run that a model is of, by the recipe.json in a folder above it; None for a model of no run."""
    whole = Path(path).resolve()
    recipes = (folder / "recipe.json" for folder in (whole, *whole.parents))
    return next((load_recipe(file).method for file in recipes if file.exists()), None)
