"""Which checkpoint of a run is best on its held-out set.

The authors evaluate the epoch end with the best top-1 on the held-out images, the first one among equals. The run's log
has the accuracy of every epoch end. So a best checkpoint that was deleted, damaged or never written is an error, and
the second best does not silently take its place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from cfmask.checkpoint.state import MODEL, CheckpointDamaged, is_percent, list_checkpoints, read_state
from cfmask.errors import UserError
from cfmask.recipe import Recipe
from cfmask.runtime.files import sha256_of
from cfmask.runtime.jsonl import read_lines
from cfmask.runtime.patience import patiently

POINTER = "best.json"
"""In RUN/checkpoints: names the best checkpoint. As the path of a model it means that checkpoint's model."""


@dataclass(frozen=True)
class BestCheckpoint:
    """The best epoch end of a run so far.

    model: its model file.
    step: its optimizer step.
    on: the set that it is best on.
    top1: its accuracy on that set, in percent.
    """

    model: Path
    step: int
    on: str
    top1: float


@dataclass(frozen=True)
class EpochEnd:
    """An evaluation at the end of an epoch, as log.jsonl has it.

    step: optimizer step.
    epoch: passes over the training set so far.
    top1: percent by set.
    """

    step: int
    epoch: int
    top1: Mapping[str, float]


def epoch_ends(log: Path) -> list[EpochEnd]:
    """The evaluations at epoch ends in a run's log. Those between epoch ends (--eval-steps) have a fractional epoch and
    no checkpoint, and are left out. Raises OSError."""
    found = []
    for line in read_lines(log, having='"eval"'):
        top1, epoch, step = line.get("eval"), line.get("epoch"), line.get("step")
        if isinstance(top1, dict) and isinstance(epoch, int) and isinstance(step, int):
            found.append(EpochEnd(step, epoch, {on: float(of) for on, of in top1.items() if is_percent(of)}))
    return found


def best_epoch_end(ends: Iterable[EpochEnd], on: str, probe_epochs: int = 0) -> EpochEnd | None:
    """The epoch end with the highest top-1 on a set, the first one among equals; None if none was evaluated on it.

    Args:
        probe_epochs: epochs at the beginning that train only the head, and are no candidates.
    """
    candidates = [end for end in ends if end.epoch > probe_epochs and on in end.top1]
    return max(candidates, key=lambda end: (end.top1[on], -end.step), default=None)


def epoch_end_scores(recipe: Recipe, log: Path, checkpoints: Path) -> dict[int, float]:
    """Top-1 in percent on the set ``best_on`` at epoch ends, by step: from the log, and where it lacks a line, from
    checkpoints. The epochs of lp-ft that train only the head are excluded.

    Args:
        log: RUN/log.jsonl.
        checkpoints: RUN/checkpoints.

    Raises:
        StorageUnavailable: a file could not be read.
    """
    on, probing = recipe.run.best_on or "", recipe.optim.probe_epochs or 0
    ends = [end for end in patiently(lambda: epoch_ends(log), str(log)) if on in end.top1]
    excluded = {end.step for end in ends if end.epoch <= probing}
    scores = {end.step: end.top1[on] for end in ends if end.epoch > probing}
    for path in patiently(lambda: list_checkpoints(checkpoints), str(checkpoints)):
        with contextlib.suppress(CheckpointDamaged):
            state = read_state(path)
            if on in state.top1 and state.step not in excluded:
                scores.setdefault(state.step, state.top1[on])
    return scores


def best_checkpoint(recipe: Recipe, log: Path, checkpoints: Path, *, verify: bool = True) -> BestCheckpoint:
    """The best checkpoint of a run according to its log.

    Args:
        recipe: the run's.
        log: RUN/log.jsonl.
        checkpoints: RUN/checkpoints.
        verify: whether the model file is read and its sha256 compared.

    Raises:
        UserError: the run chooses no best checkpoint or has none yet, or the best one is missing or damaged.
        StorageUnavailable: a file could not be read.
    """
    run, on = checkpoints.parent, recipe.run.best_on
    if on is None:
        raise UserError(
            f"{run} has no best checkpoint: it was trained without a set to choose on. Evaluate its last one "
            "(--checkpoint last), or train with --eval-sets holdout."
        )
    scores = epoch_end_scores(recipe, log, checkpoints)
    if not scores:
        raise UserError(
            f"{run} has no best checkpoint yet: no end of an epoch has an accuracy on {on}. Wait for the end of an "
            "epoch, or evaluate its last checkpoint (--checkpoint last)."
        )
    step = max(scores, key=lambda each: (scores[each], -each))
    path = checkpoints / f"step-{step:08d}"
    others = (
        f"It was the best on {on} ({scores[step]:.2f} %), and no other one replaces it automatically. Restore it, "
        f"train the run again, or choose another one: --checkpoint last, or the path of a folder in {checkpoints}."
    )
    try:
        state = read_state(path) if path.is_dir() else None
        if state is None:
            raise UserError(
                f"The best checkpoint of {run}, {path.name}, is missing: it was deleted, was never written, or is "
                f"being written by a run that is still training. {others}"
            )
        if verify and patiently(lambda: sha256_of(path / MODEL), str(path / MODEL)) != state.sha256[MODEL]:
            raise CheckpointDamaged.of(path, f"{MODEL} is not what was written")
    except CheckpointDamaged as error:
        raise UserError(f"{error} {others}") from None
    if state.top1.get(on, scores[step]) != scores[step]:  # checkpoints of early versions have no accuracies
        raise UserError(
            f"{path} and {log} disagree on the accuracy on {on} after step {step} ({state.top1.get(on)} % and "
            f"{scores[step]} %): one of the two belongs to another run. Name the checkpoint to evaluate by its path, "
            "or train the run again."
        )
    return BestCheckpoint(path / MODEL, step, on, scores[step])
