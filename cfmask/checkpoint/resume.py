"""Which checkpoint a start of a run resumes from, and what is restored from it.

An I/O error is waited out, then ends the start: what cannot be read now is not lost. A checkpoint that was read and is
not what was written is passed over for the one before it. A run that has had a checkpoint, or has taken steps that one
must have been made of, does not begin again at step 0 unless it is told to (``RunFolder.allow_step_0``).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from cfmask.checkpoint.state import (
    MODEL,
    OPTIMIZER,
    Checkpoint,
    CheckpointDamaged,
    check_missing,
    list_checkpoints,
    read_state,
)
from cfmask.errors import UserError
from cfmask.models.tower import Classifier
from cfmask.optim import MOMENTS, trained_parameters
from cfmask.runtime.files import sha256_of
from cfmask.runtime.patience import patiently
from cfmask.runtime.tensor_files import read_tensors

logger = logging.getLogger(__name__)


def latest(folder: Path, report: Callable[[str], object] = print) -> Checkpoint | None:
    """The newest checkpoint that is whole: state.json is intact and every other file has the sha256 that it gives.

    Args:
        folder: RUN/checkpoints.
        report: called with a sentence for each damaged one that is passed over.

    Raises:
        StorageUnavailable: something could not be read. No checkpoint is passed over for that.
    """
    for path in patiently(lambda: list_checkpoints(folder), str(folder)):
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
