"""Which checkpoint a start of a run resumes from, and what is restored from it.

I/O errors are retried, then end the start: data that cannot be read now is not lost. A checkpoint that was read and
differs from what was written is passed over for the one before it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from cfmask.checkpoint.state import (
    MODEL,
    OPTIMIZER,
    Checkpoint,
    CheckpointDamaged,
    list_checkpoints,
    read_member,
    read_state,
)
from cfmask.errors import UserError
from cfmask.models.tower import Classifier
from cfmask.optim import MOMENTS, trained_parameters
from cfmask.runtime.files import sha256_of
from cfmask.runtime.patience import patiently
from cfmask.runtime.tensor_files import read_tensors


def latest(folder: Path, report: Callable[[str], object] = print) -> Checkpoint | None:
    """The newest intact checkpoint: all of its files have the sha256 that was written.

    Args:
        folder: RUN/checkpoints.
        report: called with a sentence about each damaged checkpoint that is passed over.

    Raises:
        StorageUnavailable: a file could not be read. No checkpoint is passed over for that.
    """
    for path in patiently(lambda: list_checkpoints(folder), str(folder)):
        try:
            return verified(path)
        except CheckpointDamaged as error:
            report(f"{error} Falling back to the one before it.")
    return None


def verified(path: Path) -> Checkpoint:
    """Read all files of a checkpoint and compare their sha256.

    Raises:
        CheckpointDamaged: a file differs from what was written.
        StorageUnavailable: a file could not be read.
    """
    checkpoint = read_state(path)
    for name, digest in checkpoint.sha256.items():
        if patiently(functools.partial(read_member, path, name, sha256_of), str(path / name)) != digest:
            raise CheckpointDamaged.of(path, f"{name} is not what was written")
    return checkpoint


def restore_weights(checkpoint: Checkpoint, model: Classifier) -> None:
    """Load a checkpoint's weights into a model, bitwise identical.

    Raises:
        CheckpointDamaged, StorageUnavailable: see ``verified``.
    """
    model.load_state_dict(_tensors(checkpoint, MODEL))


def restore_optimizer(checkpoint: Checkpoint, model: Classifier, optimizer: torch.optim.Optimizer) -> None:
    """Load a checkpoint's moments into the AdamW of the phase in which it was written, bitwise identical.

    Raises:
        CheckpointDamaged, StorageUnavailable: see ``verified``.
    """
    device = next(model.parameters()).device
    moments = _tensors(checkpoint, OPTIMIZER)
    for name, parameter in trained_parameters(model):
        optimizer.state[parameter] = {
            "step": torch.tensor(float(checkpoint.updates), device=device),
            **{moment: moments[f"{moment}.{name}"].to(device, copy=True) for moment in MOMENTS},
        }


def _tensors(checkpoint: Checkpoint, name: str) -> dict[str, Tensor]:
    """A file's tensors, on the CPU. Each rank compares what it has read with the sha256 that rank 0 has verified."""
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
