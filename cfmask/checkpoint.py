"""Writing checkpoints: copied while training stands still, written aside, hashed and renamed while it goes on.
``resume.py`` reads them.

    checkpoints/
      step-00012345/
        model.safetensors       a model file: any tool takes it
        optimizer.safetensors   exp_avg.<parameter>, exp_avg_sq.<parameter> of the parameters in training
        state.json              what the run knows beside these, and their sha256 (checkpoint_state.py); written last
      best.json                 step, set and top1 of the epoch's end that is best on the held-out set
      .step-00012399.4711       one that is being written, or that goes: renamed when it is whole, before it is removed

No random state is kept: order, masks and donors are functions of (seed, epoch, step, lane).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import struct
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cfmask.best_checkpoint import POINTER
from cfmask.checkpoint_state import (
    MODEL,
    OPTIMIZER,
    STATE,
    Checkpoint,
    CheckpointDamaged,
    CheckpointState,
    encode,
    found,
    read_state,
    step_of,
)
from cfmask.errors import UserError
from cfmask.files import sync, write_atomically
from cfmask.models.head import ModelInfo
from cfmask.models.tower import Classifier
from cfmask.optim import MOMENTS, trained_parameters
from cfmask.runtime.jsonl import JsonLines, read_object
from cfmask.runtime.patience import patiently
from cfmask.runtime.pinned import pinned_bytes

logger = logging.getLogger(__name__)

# Written and hashed in pieces, during which other threads run.
_PIECE = 1 << 22
_SAFETENSORS_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}


@dataclass(frozen=True)
class Keep:
    """Which checkpoints stay. last: so many of the latest. epoch_steps: and every multiple of it, the epochs' ends.
    best_on: and the one with the best top-1 on this set."""

    last: int
    epoch_steps: int | None = None
    best_on: str | None = None


class CheckpointNotWritten(UserError):
    """A checkpoint could not be written; earlier ones are intact."""


# --- writing ----------------------------------------------------------------------------------------------------


class Writer:
    """Writes the checkpoints of a run beside its training, one at a time.

    ``start`` costs training a copy of weights and moments; a thread writes what was copied. A checkpoint that cannot be
    written is a warning; that the latest one is not there, ``wait`` tells. Leaving it as a context manager waits.

    One process has it: the one that holds the run folder's lock. What a killed one has left is removed here.

    Args:
        resumed: the checkpoint that training goes on from. Any beyond it was passed over as torn: it counts as none,
            and goes when training has come to its step.
        minutes: after so many without a checkpoint ``overdue`` tells; 0: never.
        record: where the step of every checkpoint is noted when it is whole, outside of ``folder``: a folder that is
            gone must not look like a run that has not begun.
    """

    def __init__(
        self,
        folder: Path,
        keep: Keep,
        info: ModelInfo,
        *,
        resumed: Checkpoint | None = None,
        minutes: float = 0,
        record: JsonLines | None = None,
    ) -> None:
        self._folder, self._keep, self._info, self._minutes = folder, keep, info, minutes
        self._record = record
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None
        self._state: CheckpointState | None = None
        self._images: dict[str, _Image] = {}
        self._updates = torch.zeros(())
        self._begun = time.monotonic()
        _remove_leftovers(folder)
        self._whole = _top1_of_intact(folder, resumed.step) if resumed is not None else {}
        if resumed is not None:
            self._warn_of_lost_best(resumed.step)
        self._point_at_best()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *raised: object) -> None:
        self.wait()

    def reserve(self, model: Classifier) -> None:
        """Take the memory for checkpoints of a phase, once it is clear what is trained. It takes a while, which
        ``start`` is to be spared."""
        moments = {f"{moment}.{name}": parameter for name, parameter in trained_parameters(model) for moment in MOMENTS}
        self._images = {
            MODEL: _Image(model.state_dict(), self._info.to_metadata()),
            OPTIMIZER: _Image(moments, {}),
        }
        self._updates = torch.zeros((), pin_memory=next(model.parameters()).is_cuda)

    @torch.no_grad()
    def start(self, state: CheckpointState, model: Classifier, optimizer: torch.optim.Optimizer) -> None:
        """Begin the checkpoint of ``state.step``; the model may be changed as soon as this returns.

        Waits for the one before it, if that is still being written: memory for one is all there is. On a GPU nothing
        else is waited for, not even by the host for the copies: they are queued on the current stream, behind the steps
        that were taken and before those that follow, which cannot overwrite what is copied. There they take their
        bytes' time on the link to the host.
        """
        self.wait()
        self._failure = None
        self._begun = time.monotonic()
        moments, updates = _optimizer_state(model, optimizer)
        self._images[MODEL].fill(model.state_dict())
        self._images[OPTIMIZER].fill(moments)
        self._updates.copy_(updates, non_blocking=True)
        copied = None
        if next(model.parameters()).is_cuda:
            copied = torch.cuda.Event(blocking=True)
            copied.record()
        self._state = state
        self._begin_write(copied)

    def retry(self) -> None:
        """Begin once more the latest checkpoint, which was not written: what was copied for it is still in memory."""
        assert self._state is not None
        self.wait()
        self._failure = None
        self._begin_write(None)

    def _begin_write(self, copied: torch.cuda.Event | None) -> None:
        """copied: is waited for before what was copied is read."""
        assert self._state is not None
        self._thread = threading.Thread(
            target=self._write,
            args=(self._state, self._updates, self._images, copied),
            name=f"checkpoint {self._state.step}",
        )
        self._thread.start()

    @property
    def writing(self) -> bool:
        """Whether one is under way."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def overdue(self) -> bool:
        """Whether the latest checkpoint was begun more than ``minutes`` ago, and is not being written still."""
        return 0 < self._minutes < (time.monotonic() - self._begun) / 60 and not self.writing

    def wait(self) -> CheckpointNotWritten | None:
        """Until nothing is under way.

        Returns:
            Why the latest checkpoint is not there; None if it is.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None and not isinstance(self._failure, CheckpointNotWritten):
            raise self._failure
        return self._failure

    # What follows is done by the thread.

    def _write(
        self, state: CheckpointState, updates: Tensor, images: dict[str, _Image], copied: torch.cuda.Event | None
    ) -> None:
        try:
            if copied is not None:
                copied.synchronize()
            self._commit(state, int(updates), images)
            if self._record is not None:
                self._record.add({"step": state.step})
                self._record.write()
            self._whole[state.step] = state.top1
            self._point_at_best()
            self._remove_old(state.step)
        except OSError as error:
            self._failure = CheckpointNotWritten(
                f"The checkpoint of step {state.step} could not be written to {self._folder}: "
                f"{error.strerror or error}. Earlier checkpoints are intact. Free some space (a checkpoint takes "
                f"{_size(images) / 1e9:.2g} GB); any but the latest may go."
            )
            self._failure.__cause__ = error
            logger.warning(f"{self._failure}")
        except Exception as error:  # a defect: raised where somebody waits
            self._failure = error

    def _commit(self, state: CheckpointState, updates: int, images: dict[str, _Image]) -> None:
        final = self._folder / f"step-{state.step:08d}"
        aside = self._folder / f".{final.name}.{os.getpid()}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(self._folder)  # of one before, which an error did not let go
            aside.mkdir()
            # Not begun if it cannot end: a disk that is full to the last byte would cost others a line of their logs.
            if 0 < shutil.disk_usage(self._folder).free < _size(images):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            sha256 = {name: _write_hashed(aside / name, image.pieces()) for name, image in images.items()}
            _write_hashed(aside / STATE, [encode(state, updates, sha256)])
            sync(aside)
            if final.exists():  # a torn one that a resume has passed over
                remove(final)
            os.replace(aside, final)
            sync(self._folder)
        except OSError:
            shutil.rmtree(aside, ignore_errors=True)
            raise

    def _warn_of_lost_best(self, resumed_step: int) -> None:
        """Say so if the best checkpoint of the steps up to the resumed one is gone: best.json will name another."""
        was = read_object(self._folder / POINTER) or {}
        step = was.get("step")
        if isinstance(step, int) and step <= resumed_step and step not in self._whole:
            logger.warning(
                f"the checkpoint of step {step}, the best on {was.get('set')} with {was.get('top1')} %, is "
                "gone or damaged. The run's log still names it: evaluating the run's best checkpoint is refused unless "
                "a later one is better."
            )

    def _point_at_best(self) -> None:
        """Write best.json, if it does not say so already."""
        best = best_of(self._whole, self._keep.best_on)
        if best is None:
            return
        pointer = self._folder / POINTER
        contents = json.dumps({"step": best[0], "set": self._keep.best_on, "top1": best[1]}) + "\n"
        try:
            if not pointer.exists() or pointer.read_text() != contents:
                write_atomically(pointer, contents)
        except OSError as error:
            logger.warning(f"{pointer} cannot be written ({error.strerror}); the next checkpoint tries again")

    def _remove_old(self, newest: int) -> None:
        """Of those before ``newest``, which is whole, remove what is not to stay: never it, nor any beyond it."""
        best = best_of(self._whole, self._keep.best_on)
        stay = to_keep(self._whole, self._keep, best[0] if best else None)
        with contextlib.suppress(OSError):  # tried again after the next one
            for path in found(self._folder):
                step = step_of(path)
                if step < newest and step not in stay:
                    remove(path)
                    self._whole.pop(step, None)


def to_keep(steps: Iterable[int], keep: Keep, best: int | None) -> set[int]:
    """Of these checkpoints, the steps of those that stay."""
    newest_first = sorted(steps, reverse=True)
    epochs_ends = {step for step in newest_first if keep.epoch_steps and step % keep.epoch_steps == 0}
    return {*newest_first[: keep.last], *epochs_ends, *([] if best is None else [best])}


def best_of(top1: Mapping[int, Mapping[str, float]], name: str | None) -> tuple[int, float] | None:
    """Step and top-1 of the checkpoint that is best on a set, the first of equals; None where none was evaluated on it.

    Args:
        top1: of each step, by set.
    """
    scored = [(step, of[name]) for step, of in sorted(top1.items()) if name is not None and name in of]
    return max(scored, key=lambda pair: pair[1], default=None)


class _Image:
    """A safetensors file in memory: what is copied into its tensors is what will be written.

    The same tensors and metadata make the same bytes, which safetensors' own writer does not promise.

    Args:
        like: names, shapes, types and device of what will be copied. For a GPU's the memory is page-locked, so that
            ``fill`` does not wait.
    """

    def __init__(self, like: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
        end = 0
        for name in sorted(like, key=lambda name: (-like[name].element_size(), name)):  # so all are aligned
            tensor = like[name]
            begin, end = end, end + tensor.numel() * tensor.element_size()
            header[name] = {
                "dtype": _SAFETENSORS_NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [begin, end],
            }
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._header = struct.pack("<Q", len(text)) + text
        pinned = any(tensor.is_cuda for tensor in like.values())
        # Zeroed, so that the memory is there before it is needed: torch.zeros would leave that to the first copy.
        self._data = pinned_bytes(end) if pinned else torch.empty(end, dtype=torch.uint8).zero_()
        self._tensors = {
            name: self._data[slice(*header[name]["data_offsets"])].view(tensor.dtype).view(tensor.shape)
            for name, tensor in like.items()
        }

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self._header) + len(self._data)

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy tensors in. Copies from a GPU are queued on the current stream and not waited for."""
        for name, there in self._tensors.items():
            there.copy_(tensors[name], non_blocking=True)

    def pieces(self) -> Iterator[bytes | memoryview]:
        """The file, from its beginning to its end."""
        yield self._header
        data = self._data.numpy().data
        for begin in range(0, len(data), _PIECE):
            yield data[begin : begin + _PIECE]


def _size(images: Mapping[str, _Image]) -> int:
    return sum(image.size for image in images.values())


def _write_hashed(path: Path, pieces: Iterable[bytes | memoryview]) -> str:
    """Write a file to the disk; returns the sha256 of what was meant to be written."""
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for piece in pieces:
            file.write(piece)
            digest.update(piece)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def remove(path: Path) -> None:
    """Remove a checkpoint; killed meanwhile, none is left that looks like one. Raises OSError."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.old")
    os.replace(path, aside)
    shutil.rmtree(aside, ignore_errors=True)


def _remove_leftovers(folder: Path) -> None:
    for leftover in folder.glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    for leftover in folder.glob(".best.json.*"):
        with contextlib.suppress(OSError):
            leftover.unlink()


def _optimizer_state(model: Classifier, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], Tensor]:
    """Moments by name, and the number of updates, (), which is the same for all parameters; on the device."""
    states = {name: optimizer.state[parameter] for name, parameter in trained_parameters(model)}
    moments = {f"{moment}.{name}": state[moment] for name, state in states.items() for moment in MOMENTS}
    return moments, next(iter(states.values()))["step"]


def _top1_of_intact(folder: Path, last: int) -> dict[int, Mapping[str, float]]:
    """Top-1 of the checkpoints up to a step whose state.json is intact.

    Raises:
        StorageUnavailable: one cannot be read. It would be removed later as one that does not count.
    """
    intact = {}
    for path in patiently(lambda: found(folder), str(folder)):
        with contextlib.suppress(CheckpointDamaged):
            if step_of(path) <= last:
                intact[step_of(path)] = read_state(path).top1
    return intact
