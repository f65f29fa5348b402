"""Writing checkpoints beside training: weights and moments are copied while training waits; a thread writes and hashes
the copies and renames the folder."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from cfmask.checkpoint.best import POINTER
from cfmask.checkpoint.image import FileImage, write_hashed
from cfmask.checkpoint.state import (
    MODEL,
    OPTIMIZER,
    STATE,
    Checkpoint,
    CheckpointDamaged,
    CheckpointState,
    encode,
    list_checkpoints,
    read_state,
    step_of,
)
from cfmask.errors import UserError
from cfmask.models.head import ModelInfo
from cfmask.models.tower import Classifier
from cfmask.optim import MOMENTS, trained_parameters
from cfmask.runtime.files import sync, write_atomically
from cfmask.runtime.heartbeat import CHECKPOINT, beat
from cfmask.runtime.jsonl import JsonLines, read_object
from cfmask.runtime.patience import patiently
from cfmask.runtime.rendezvous import COLLECTIVE_TIMEOUT

logger = logging.getLogger(__name__)

_MARGIN_S = 10.0
"""Left of the time that a launcher grants after a stop request: for reporting and requeueing."""
_LONGEST_RETRY_S = 600.0
"""How long writing a checkpoint is retried before a stop if there is no deadline."""


@dataclass(frozen=True)
class Keep:
    """Which checkpoints are kept.

    last: number of the latest ones.
    epoch_steps: those at multiples of this step as well, the ends of epochs.
    best_on: and the one with the best top-1 on this set.
    """

    last: int
    epoch_steps: int | None = None
    best_on: str | None = None


class CheckpointNotWritten(UserError):
    """A checkpoint could not be written; earlier ones are intact."""


class CheckpointWriter:
    """Writes the checkpoints of a run, one at a time. Exists on rank 0, which holds the lock of the run folder.

    A checkpoint that cannot be written is logged as a warning; ``wait`` returns the error. Leaving the context manager
    waits. Folders that a killed writer has left are removed at the start.

    Args:
        resumed: the checkpoint that training resumes from. Later ones are damaged: they do not count, and are replaced
            or removed when training reaches their step.
        minutes: ``overdue`` is true if the latest checkpoint is older than this; 0: never.
        record: file outside of ``folder`` to which the step of each complete checkpoint is appended. If the folder is
            lost, the run must not look as if it had never had a checkpoint.
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
        self._images: dict[str, FileImage] = {}
        self._updates = torch.zeros(())
        self._begun = time.monotonic()
        _remove_leftovers(folder)
        self._intact = _top1_of_intact(folder, resumed.step) if resumed is not None else {}
        if resumed is not None:
            self._warn_of_lost_best(resumed.step)
        self._write_pointer()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *raised: object) -> None:
        self.wait()

    def reserve(self, model: Classifier) -> None:
        """Allocate the memory for checkpoints of a phase. Called once it is known which parameters are trained, because
        it takes too long for ``start``."""
        moments = {f"{moment}.{name}": parameter for name, parameter in trained_parameters(model) for moment in MOMENTS}
        self._images = {
            MODEL: FileImage(model.state_dict(), self._info.to_metadata()),
            OPTIMIZER: FileImage(moments, {}),
        }
        self._updates = torch.zeros((), pin_memory=next(model.parameters()).is_cuda)

    @torch.no_grad()
    def start(self, state: CheckpointState, model: Classifier, optimizer: torch.optim.Optimizer) -> None:
        """Begin the checkpoint of ``state.step``. The model may be changed as soon as this returns.

        Waits for the previous checkpoint, because there is memory for only one. On a GPU the host does not wait for the
        copies: they are queued on the current stream, between the steps taken and those that follow.
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
        self._start_thread(copied)

    def retry(self) -> None:
        """Begin the latest checkpoint again, which could not be written: its copies are still in memory."""
        self.wait()
        self._failure = None
        self._start_thread(None)

    def _start_thread(self, copied: torch.cuda.Event | None) -> None:
        """copied: the event that completes the copies."""
        assert self._state is not None
        self._thread = threading.Thread(
            target=self._write,
            args=(self._state, self._updates, self._images, copied),
            name=f"checkpoint {self._state.step}",
        )
        self._thread.start()

    @property
    def writing(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def overdue(self) -> bool:
        """Whether the latest checkpoint was begun more than ``minutes`` ago, and none is being written."""
        return 0 < self._minutes < (time.monotonic() - self._begun) / 60 and not self.writing

    def wait(self) -> CheckpointNotWritten | None:
        """Wait until no checkpoint is being written.

        Returns:
            Why the latest checkpoint could not be written; None if it was.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None and not isinstance(self._failure, CheckpointNotWritten):
            raise self._failure
        return self._failure

    # The methods below run in the thread.

    def _write(
        self, state: CheckpointState, updates: Tensor, images: dict[str, FileImage], copied: torch.cuda.Event | None
    ) -> None:
        try:
            if copied is not None:
                copied.synchronize()
            self._commit(state, int(updates), images)
            if self._record is not None:
                self._record.add({"step": state.step})
                self._record.write()
            self._intact[state.step] = state.top1
            self._write_pointer()
            self._remove_old(state.step)
        except OSError as error:
            self._failure = CheckpointNotWritten(
                f"The checkpoint of step {state.step} could not be written to {self._folder}: "
                f"{error.strerror or error}. Earlier checkpoints are intact. Free some space (a checkpoint takes "
                f"{_size(images) / 1e9:.2g} GB); all but the latest checkpoint may be deleted."
            )
            self._failure.__cause__ = error
            logger.warning(f"{self._failure}")
        except Exception as error:  # a defect: raised by ``wait``
            self._failure = error

    def _commit(self, state: CheckpointState, updates: int, images: dict[str, FileImage]) -> None:
        final = self._folder / f"step-{state.step:08d}"
        aside = self._folder / f".{final.name}.{os.getpid()}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(self._folder)  # of an earlier checkpoint that failed
            aside.mkdir()
            # A disk that is full to the last byte would cost other files of the run their latest lines.
            if 0 < shutil.disk_usage(self._folder).free < _size(images):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            sha256 = {name: write_hashed(aside / name, image.pieces()) for name, image in images.items()}
            write_hashed(aside / STATE, [encode(state, updates, sha256)])
            sync(aside)
            if final.exists():  # damaged: the resume has passed it over
                remove_checkpoint(final)
            os.replace(aside, final)
            sync(self._folder)
        except OSError:
            shutil.rmtree(aside, ignore_errors=True)
            raise

    def _warn_of_lost_best(self, resumed_step: int) -> None:
        """Warn if the best checkpoint up to the resumed step is lost: best.json will name another one."""
        pointer = read_object(self._folder / POINTER) or {}
        step = pointer.get("step")
        if isinstance(step, int) and step <= resumed_step and step not in self._intact:
            logger.warning(
                f"the checkpoint of step {step}, the best on {pointer.get('set')} with {pointer.get('top1')} %, is "
                "gone or damaged. The run's log still names it: evaluating the run's best checkpoint is refused unless "
                "a later one is better."
            )

    def _write_pointer(self) -> None:
        """Write best.json if it has changed."""
        best = best_of(self._intact, self._keep.best_on)
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
        """Remove checkpoints before ``newest`` that are not to be kept."""
        best = best_of(self._intact, self._keep.best_on)
        kept = to_keep(self._intact, self._keep, best[0] if best else None)
        with contextlib.suppress(OSError):  # the next checkpoint tries again
            for path in list_checkpoints(self._folder):
                step = step_of(path)
                if step < newest and step not in kept:
                    remove_checkpoint(path)
                    self._intact.pop(step, None)


def wait_for_checkpoint(writer: CheckpointWriter | None) -> CheckpointNotWritten | None:
    """Wait on all ranks until the current checkpoint is complete. No rank may end or request a requeue earlier, because
    a launcher may end the job with its first rank.

    Args:
        writer: on rank 0; None on the others.

    Returns:
        On every rank: why the latest checkpoint could not be written; None if it was.
    """
    beat(CHECKPOINT)
    outcome = [writer.wait() if writer is not None else None]
    dist.broadcast_object_list(outcome)
    return outcome[0]


def insist_on_checkpoint(
    writer: CheckpointWriter | None, seconds_left: Callable[[], float]
) -> CheckpointNotWritten | None:
    """``wait_for_checkpoint``, with retries while there is time: a full quota or a restarting file server often
    recovers within seconds.

    Args:
        seconds_left: until the deadline; called on rank 0 if the first try has failed.
    """
    beat(CHECKPOINT)
    if writer is not None and writer.wait() is not None:
        # The other ranks wait in a collective meanwhile.
        longest_s = min(_LONGEST_RETRY_S, COLLECTIVE_TIMEOUT.total_seconds() / 2)
        give_up_at = time.monotonic() + min(longest_s, seconds_left() - _MARGIN_S)
        pause_s = 1.0
        while writer.wait() is not None and time.monotonic() + pause_s < give_up_at:
            time.sleep(pause_s)
            pause_s = min(10.0, 2 * pause_s)
            logger.info("trying again to write the checkpoint")
            writer.retry()
    return wait_for_checkpoint(writer)


def to_keep(steps: Iterable[int], keep: Keep, best: int | None) -> set[int]:
    """The steps of those checkpoints that are kept."""
    newest_first = sorted(steps, reverse=True)
    epoch_ends = {step for step in newest_first if keep.epoch_steps and step % keep.epoch_steps == 0}
    return {*newest_first[: keep.last], *epoch_ends, *([] if best is None else [best])}


def best_of(top1: Mapping[int, Mapping[str, float]], name: str | None) -> tuple[int, float] | None:
    """Step and top-1 of the checkpoint that is best on a set, the first one among equals; None if none was evaluated.

    Args:
        top1: by step and set.
    """
    scored = [(step, scores[name]) for step, scores in sorted(top1.items()) if name is not None and name in scores]
    return max(scored, key=lambda pair: pair[1], default=None)


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint. It is renamed first, so that a kill leaves nothing that looks like a checkpoint. Raises
    OSError."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.old")
    os.replace(path, aside)
    shutil.rmtree(aside, ignore_errors=True)


def _size(images: Mapping[str, FileImage]) -> int:
    return sum(image.size for image in images.values())


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
        StorageUnavailable: a state.json cannot be read. Counting it as damaged would let it be removed later.
    """
    intact = {}
    for path in patiently(lambda: list_checkpoints(folder), str(folder)):
        with contextlib.suppress(CheckpointDamaged):
            if step_of(path) <= last:
                intact[step_of(path)] = read_state(path).top1
    return intact
