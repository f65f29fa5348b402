"""Models as they are, evaluated side by side: each set is read once for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cfmask.errors import UserError
from cfmask.evaluation.counter import SetCounter
from cfmask.evaluation_spec import Evaluation
from cfmask.models.head import ModelInfo, load_model
from cfmask.models.tower import Classifier, Normalise


def evaluate(evaluation: Evaluation, counter: SetCounter) -> dict[str, Any]:
    """Count all models on all sets. Returns ``sets`` and ``models`` of results.json."""
    models, classes = load_side_by_side(evaluation.models, counter.device)
    counter.check_classes(classes)
    counter.announce(evaluation.sets)
    return counter.results(evaluation.sets, models, [{"name": path} for path in evaluation.models])


def load_side_by_side(
    paths: Sequence[str], device: torch.device
) -> tuple[list[tuple[Classifier, Normalise]], tuple[str, ...]]:
    """Load models of any architecture that share input size and class list.

    Returns:
        The models on the device with their normalisation of pixels, and the class list.

    Raises:
        UserError: models with different input sizes or class lists.
    """
    loaded: list[tuple[Classifier, Normalise]] = []
    first: tuple[Classifier, ModelInfo] | None = None
    for path in paths:
        model, info = load_model(path)
        first = first or (model, info)
        if info.classes != first[1].classes:
            raise UserError(f"{path} and {paths[0]} differ in classes. Evaluate them in two commands.")
        if model.image_size != first[0].image_size:
            raise UserError(
                f"{path} takes images of {model.image_size} pixels, {paths[0]} of {first[0].image_size}, but sets are "
                "read once for all models. Evaluate them in two commands."
            )
        loaded.append((model.to(device).eval().requires_grad_(False), Normalise(info.mean, info.std).to(device)))
    assert first is not None
    return loaded, first[1].classes
