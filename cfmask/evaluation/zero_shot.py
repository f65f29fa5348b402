"""The zero-shot classifier: CLIP's image tower, and a head whose rows are embeddings of the class names (Radford et
al., ICML 2021)."""

from __future__ import annotations

from typing import Any

from cfmask.evaluation.counter import SetCounter
from cfmask.evaluation.side_by_side import load_side_by_side
from cfmask.evaluation_spec import ZeroShot
from cfmask.models.head import save_model
from cfmask.models.initial import initial_model
from cfmask.runs import RunFolder


def build(evaluation: ZeroShot, run: RunFolder, classes: tuple[tuple[str, str], ...], device: str) -> None:
    """Write RUN/model.safetensors with a zero-shot head for ``classes``, unless it exists. Rows of the head are saved
    while they are computed; an interrupted build resumes after them.

    Args:
        classes: (folder name, display name) of each.
    """
    if run.final.exists():
        return
    model, info = initial_model(
        evaluation.architecture,
        evaluation.pretrained,
        None,
        classes,
        device,
        mean=evaluation.mean,
        std=evaluation.std,
        kept_rows=run.head_rows,
    )
    save_model(run.final, model, info)
    run.head_rows.unlink(missing_ok=True)


def evaluate(evaluation: ZeroShot, counter: SetCounter, run: RunFolder) -> dict[str, Any]:
    """Count the model that ``build`` wrote. Returns ``sets`` and ``models`` of results.json."""
    models, classes = load_side_by_side([str(run.final)], counter.device)
    counter.check_classes(classes)
    counter.announce(evaluation.sets)
    return counter.results(evaluation.sets, models, [{"name": evaluation.make}])
