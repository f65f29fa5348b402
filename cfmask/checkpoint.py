"""Checkpoints: written aside, hashed, renamed; a torn one is recognised and the one before it used.

    checkpoints/step-00012345/
      model.safetensors       a model file: any tool takes it
      optimizer.safetensors   exp_avg.<parameter>, exp_avg_sq.<parameter> of the parameters in training
      state.json              step, training set, receipt of what was consumed, updates behind these moments, steps
                              left out, the files' sha256; written last

No random state is kept: order, masks and donors are functions of (seed, epoch, step, lane).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from cfmask.data.receipts import Consumed
from cfmask.errors import UserError
from cfmask.files import save_tensors, sync
from cfmask.models.head import ModelInfo, save_model
from cfmask.models.tower import Classifier
from cfmask.optim import Skips

_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class State:
    """What a run knows beside weights and moments. step: optimizer steps behind it, of all phases. dataset: digest of
    the training set. consumed: of it, so far. skips: steps left out."""

    step: int
    dataset: str
    consumed: Consumed
    skips: Skips = Skips()


@dataclass(frozen=True, kw_only=True)
class Checkpoint(State):
    """A whole, verified checkpoint. updates: the optimizer's own count, which leaves out what was skipped and begins
    with its phase."""

    path: Path
    updates: int


class CheckpointNotWritten(UserError):
    """A checkpoint could not be written; earlier ones are intact."""


def save(
    folder: Path,
    state: State,
    model: Classifier,
    info: ModelInfo,
    optimizer: torch.optim.Optimizer,
    *,
    keep: int,
) -> Path:
    """Write the checkpoint of ``state.step`` under ``folder`` and remove all but the latest ``keep``.

    Raises:
        CheckpointNotWritten: disk full, quota, read-only …; nothing but earlier checkpoints is left behind.
    """
    step = state.step
    final = folder / f"step-{step:08d}"
    aside = folder / f".step-{step:08d}.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".step-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        aside.mkdir()
        save_model(aside / "model.safetensors", model, info)
        moments, updates = _optimizer_state(model, optimizer)
        save_tensors(aside / "optimizer.safetensors", moments)
        digests = {name: _sha256_synced(aside / name) for name in ("model.safetensors", "optimizer.safetensors")}
        told = {
            "step": step,
            "dataset": state.dataset,
            "consumed": state.consumed.to_json(),
            "skips": asdict(state.skips),
            "updates": updates,
            "sha256": digests,
        }
        (aside / "state.json").write_text(json.dumps(told, indent=2))
        sync(aside / "state.json")
        sync(aside)
        if final.exists():  # a torn one that a resume has passed over
            shutil.rmtree(final)
        os.replace(aside, final)
        sync(folder)
    except Exception as error:
        shutil.rmtree(aside, ignore_errors=True)
        reason = _disk_trouble(error)
        if reason is None:
            raise
        raise CheckpointNotWritten(
            f"The checkpoint of step {step} could not be written to {folder}: {reason}. Earlier checkpoints are "
            "intact. Free some space (a checkpoint takes about "
            f"{_bytes_needed(model) / 1e9:.2g} GB), or lower --keep-checkpoints."
        ) from error
    for old in found(folder)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def latest(folder: Path, report=print) -> Checkpoint | None:
    """The newest checkpoint that is whole: every file there, with the sha256 that state.json gives.

    Each torn one passed over is told to ``report`` in a sentence.
    """
    for path in found(folder):
        trouble = _trouble(path)
        if trouble is None:
            return read_state(path)
        report(f"Checkpoint {path} is torn ({trouble}); falling back to the one before it.")
    return None


def read_state(path: Path) -> Checkpoint:
    """What a checkpoint folder's state.json says; the other files are not looked at.

    Raises:
        UserError: it cannot be read.
    """
    try:
        state = json.loads((path / "state.json").read_text())
        return Checkpoint(
            path=path,
            step=state["step"],
            dataset=state["dataset"],
            consumed=Consumed.from_json(state["consumed"]),
            skips=Skips(**state["skips"]),
            updates=state["updates"],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path / 'state.json'} cannot be read ({error!r}).") from None


def restore_weights(checkpoint: Checkpoint, model: Classifier) -> None:
    """Put a checkpoint's weights into a model, bit for bit."""
    device = next(model.parameters()).device
    model.load_state_dict(load_file(checkpoint.path / "model.safetensors", device=str(device)))


def restore_optimizer(checkpoint: Checkpoint, model: Classifier, optimizer: torch.optim.Optimizer) -> None:
    """Put a checkpoint's moments into the AdamW of the phase that it was made in, bit for bit."""
    device = next(model.parameters()).device
    moments = load_file(checkpoint.path / "optimizer.safetensors", device=str(device))
    for name, parameter in _trained(model):
        optimizer.state[parameter] = {
            "step": torch.tensor(float(checkpoint.updates), device=device),
            **{moment: moments[f"{moment}.{name}"] for moment in _MOMENTS},
        }


def _optimizer_state(model: Classifier, optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], int]:
    """Moments by name, and the number of updates, which is the same for all parameters."""
    states = {name: optimizer.state[parameter] for name, parameter in _trained(model)}
    moments = {f"{moment}.{name}": state[moment] for name, state in states.items() for moment in _MOMENTS}
    return moments, int(next(iter(states.values()))["step"])


def _trained(model: Classifier) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def found(folder: Path) -> list[Path]:
    """Checkpoint folders, the newest first, whole or not."""
    return sorted(folder.glob("step-*"), reverse=True)


def _trouble(path: Path) -> str | None:
    try:
        expected = json.loads((path / "state.json").read_text())["sha256"]
        read_state(path)
    except (OSError, ValueError, KeyError, TypeError):  # UserError is a ValueError
        return "state.json is missing or unreadable"
    for name, digest in expected.items():
        try:
            if _sha256_synced(path / name, sync=False) != digest:
                return f"{name} is not what was written"
        except OSError as error:
            return f"{name}: {error.strerror}"
    return None


def _sha256_synced(path: Path, sync: bool = True) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        if sync:
            os.fsync(file.fileno())
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _disk_trouble(error: Exception) -> str | None:
    """What is wrong with the disk, if that is what is wrong. safetensors hides the errno in its message."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES, errno.EFBIG):
        if os.strerror(code) in str(error):
            return os.strerror(code)
    return None


def _bytes_needed(model: Classifier) -> int:
    return 3 * sum(p.numel() * p.element_size() for p in model.parameters())
