"""Which checkpoint a start of a run resumes from, and what is restored from it.

An I/O error is waited out, then ends the start: what cannot be read now is not lost. A checkpoint that was read and is
not what was written is passed over for the one before it. A run that has had a checkpoint, or has taken steps that one
must have been made of, does not begin again at step 0 unless it is told to (``RunFolder.allow_step_0``).
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from cfmask.checkpoint_state import (
    MODEL,
    OPTIMIZER,
    Checkpoint,
    CheckpointDamaged,
    Input,
    check_missing,
    found,
    read_state,
)
from cfmask.errors import UserError
from cfmask.files import read_tensors, sha256_of
from cfmask.models.tower import Classifier
from cfmask.optim import MOMENTS, trained_parameters
from cfmask.runs import RunFolder
from cfmask.runtime.patience import patiently

logger = logging.getLogger(__name__)


def latest(folder: Path, report: Callable[[str], object] = print) -> Checkpoint | None:
    """The newest checkpoint that is whole: state.json is intact and every other file has the sha256 that it gives.

    Args:
        folder: RUN/checkpoints.
        report: called with a sentence for each damaged one that is passed over.

    Raises:
        StorageUnavailable: something could not be read. No checkpoint is passed over for that.
    """
    for path in patiently(lambda: found(folder), str(folder)):
        try:
            return verified(path)
        except CheckpointDamaged as error:
            report(f"{error} Falling back to the one before it.")
    return None


def verified(path: Path) -> Checkpoint:
    """A checkpoint, all of whose files have been read and are what was written.

    Raises:
        CheckpointDamaged: one of them is not.
        StorageUnavailable: one of them could not be read.
    """
    checkpoint = read_state(path)
    for name, digest in checkpoint.sha256.items():
        if patiently(functools.partial(_member_sha256, path, name), str(path / name)) != digest:
            raise CheckpointDamaged.of(path, f"{name} is not what was written")
    return checkpoint


def _member_sha256(path: Path, name: str) -> str:
    try:
        return sha256_of(path / name)
    except FileNotFoundError:
        check_missing(path, name)
        raise


def check_progress(run: RunFolder, resumed: Checkpoint | None, epoch_steps: int, checkpoint_steps: int) -> None:
    """Refuse to begin again at step 0 where the run has come further; warn where newer checkpoints were lost.

    The log runs ahead of the checkpoints: the steps since the last one are lost when a run is killed. So that a log
    exists says nothing. What does: a checkpoint that was noted when it was committed, a start that resumed from one,
    and steps beyond the second checkpoint that was due, which is begun only when the first one has ended.

    Args:
        resumed: the checkpoint that was chosen.

    Raises:
        UserError: there is no checkpoint, the run has come further, and beginning again was not allowed.
        StorageUnavailable: the run's history could not be read.
    """
    history = patiently(run.history, f"The history of {run.root}")
    if resumed is not None:
        if resumed.step < history.saved:
            logger.warning(
                f"{run.root} has had a checkpoint of step {history.saved}, which is gone or damaged. It "
                f"resumes from step {resumed.step}."
            )
        return
    dues = (step for step in itertools.count(1) if step % epoch_steps == 0 or step % checkpoint_steps == 0)
    _, second_due = next(dues), next(dues)
    if run.step_0_allowed() or not (history.saved or history.logged > second_due):
        return
    shows = f"a checkpoint of step {history.saved}" if history.saved else f"steps up to {history.logged}"
    raise UserError(
        f"{run.root} has no whole checkpoint in {run.checkpoints}, and its history shows {shows}. If a file system is "
        "not mounted, mount it and start again; if the folder was moved or deleted, bring it back. To begin again at "
        f"step 0, which discards what its logs show: python launch/submit.py --resume {run.root} --from-step-0"
    )


def check_inputs(run: RunFolder, checkpoint: Checkpoint, inputs: Mapping[str, Input]) -> None:
    """Refuse to continue a checkpoint with other settings or teachers than it was trained with.

    Args:
        inputs: those of this start (``train_setup.inputs_of``). What only one of the two knows is not compared: it was
            written by another version.

    Raises:
        UserError: naming what differs.
    """
    differences = [
        f"{name}: {was} → {inputs[name]}"
        for name, was in checkpoint.inputs.items()
        if name in inputs and inputs[name] != was
    ]
    if differences:
        raise UserError(
            f"{run.root} was trained with other settings or model files up to {checkpoint.path.name} than it has now: "
            f"{'; '.join(differences)} (checkpoint → now). recipe.json or the file was changed or damaged since: put "
            "back what the checkpoint says, or begin a new run."
        )


def restore_weights(checkpoint: Checkpoint, model: Classifier) -> None:
    """Put a checkpoint's weights into a model, bit for bit.

    Raises:
        CheckpointDamaged, StorageUnavailable: as ``verified``.
    """
    model.load_state_dict(_tensors(checkpoint, MODEL))


def restore_optimizer(checkpoint: Checkpoint, model: Classifier, optimizer: torch.optim.Optimizer) -> None:
    """Put a checkpoint's moments into the AdamW of the phase that it was made in, bit for bit.

    Raises:
        CheckpointDamaged, StorageUnavailable: as ``verified``.
    """
    device = next(model.parameters()).device
    moments = _tensors(checkpoint, OPTIMIZER)
    for name, parameter in trained_parameters(model):
        optimizer.state[parameter] = {
            "step": torch.tensor(float(checkpoint.updates), device=device),
            **{moment: moments[f"{moment}.{name}"].to(device) for moment in MOMENTS},
        }


def _tensors(checkpoint: Checkpoint, name: str) -> dict[str, Tensor]:
    """A file's tensors on the CPU, read by this rank and compared with what rank 0 has verified."""
    path = checkpoint.path / name
    try:
        tensors, digest = patiently(lambda: read_tensors(path), str(path))
    except (FileNotFoundError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise CheckpointDamaged.of(checkpoint.path, f"{name}: {error}") from None
    if digest != checkpoint.sha256[name]:
        raise CheckpointDamaged.of(checkpoint.path, f"{name} is not what was written")
    return tensors
