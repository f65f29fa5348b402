"""The run folder: everything about a run, and everything that a resume needs.

RUN/
  recipe.json            the recipe; a folder belongs to one recipe (or one evaluation, see evaluation_spec.py)
  initial.safetensors    the pre-trained tower with its head: start, teacher, and zero-shot model of WiSE-FT
  ensemble.safetensors   wise-kd's second teacher
  log.jsonl              metrics by step
  receipts.jsonl         receipt of the samples that each step consumed (tools/audit.py)
  overlaps.jsonl         overlap of CAM masks with objects, summed between checkpoints (--segmentation)
  bad_samples.jsonl      samples that could not be read, and their replacements
  skipped_steps.jsonl    steps skipped because a loss or gradient was not finite, and their samples
  committed.jsonl        step of each complete checkpoint
                         these six are the history of the weights; a resume cuts them back to its checkpoint
  tensorboard/           the metrics as curves
  checkpoints/step-00012345/   model.safetensors, optimizer.safetensors, state.json
  checkpoints/best.json  which epoch end is best on the held-out set
  model.safetensors      the trained tower and head, once the run is finished
  results.json           final accuracies
  attempts.jsonl         one line per start: job, world size, first step, why the previous start ended
  ended.json             why the latest start ended; the next start moves it into attempts.jsonl
  cancelled.json         who cancelled the run, and when; it does not continue until the user resumes it
  from_step_0.json       permission to restart at step 0 after checkpoints were lost; a start removes it
  jobs/                  files of the launcher: logs of every rank by job, failure reports, the command of --notify
  wandb.json, wandb/     state of the upload to Weights & Biases, and its files (launch/notification/wandb_sender.py)
  code/                  the code that its jobs were submitted with
  rendezvous/            where rank 0 can be reached; empty once all ranks have joined (runtime/rendezvous.py)
  .owner/                the process that trains here (runtime/lock.py)
"""

from __future__ import annotations

import getpass
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfmask.checkpoint.best import BestCheckpoint, best_checkpoint
from cfmask.checkpoint.state import list_checkpoints, step_of
from cfmask.errors import UserError, did_you_mean_path
from cfmask.evaluation_spec import Evaluation, load_evaluation
from cfmask.recipe import Recipe
from cfmask.runtime.attempts import AttemptLog, now
from cfmask.runtime.files import write_atomically
from cfmask.runtime.jsonl import cut_lines, read_lines, read_object
from cfmask.runtime.lock import DEAD_AFTER_S, HEARTBEAT_S, PATIENCE_S, FolderLock, LockHeld, Owner
from cfmask.runtime.lock import FOLDER as LOCK_FOLDER
from cfmask.runtime.machine import is_abandoned
from cfmask.runtime.patience import patiently
from cfmask.secrets import has_secrets

_RECIPE, _EVALUATION = "recipe.json", "evaluation.json"


@dataclass(frozen=True)
class History:
    """Progress of a run according to its records; 0: none.

    saved: step of the newest checkpoint that is known to have been complete.
    logged: last step that was taken.
    """

    saved: int
    logged: int


class _PathInRun:
    """A file or folder of a run folder, as an attribute of ``RunFolder``."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, run: RunFolder, _: type) -> Path:
        return run.root / self._name


@dataclass(frozen=True)
class RunFolder(AttemptLog):
    """Paths of a run folder, and access to the files in it that are not weights.

    root: the folder.
    """

    initial = _PathInRun("initial.safetensors")
    ensemble = _PathInRun("ensemble.safetensors")
    final = _PathInRun("model.safetensors")
    results = _PathInRun("results.json")
    progress = _PathInRun("progress.safetensors")
    head_rows = _PathInRun("head-rows.safetensors")
    checkpoints = _PathInRun("checkpoints")
    log = _PathInRun("log.jsonl")
    receipts = _PathInRun("receipts.jsonl")
    overlaps = _PathInRun("overlaps.jsonl")
    bad_samples = _PathInRun("bad_samples.jsonl")
    skipped_steps = _PathInRun("skipped_steps.jsonl")
    committed = _PathInRun("committed.jsonl")
    rendezvous = _PathInRun("rendezvous")
    _step_0 = _PathInRun("from_step_0.json")
    _cancelled = _PathInRun("cancelled.json")

    def recipe(self) -> Recipe:
        """The recipe. Raises UserError if this is not the folder of a training run."""
        work = self.work()
        if isinstance(work, Evaluation):
            raise UserError(
                f"{self.root} is the folder of an evaluation, but a training run is needed. Check the path."
            )
        return work

    def has_work(self) -> bool:
        """Whether this is the folder of a training run or an evaluation."""
        return (self.root / _RECIPE).exists() or (self.root / _EVALUATION).exists()

    def work(self) -> Recipe | Evaluation:
        """The recipe or evaluation. Raises UserError if this is not a run folder."""
        evaluation, recipe = self.root / _EVALUATION, self.root / _RECIPE
        if patiently(lambda: _exists(evaluation), str(evaluation)):
            return load_evaluation(evaluation)
        if not patiently(lambda: _exists(recipe), str(recipe)):
            near = did_you_mean_path(self.root) or " Check the path."
            raise UserError(f"{self.root} is not a run folder: it has no {_RECIPE}.{near}")
        return load_recipe(self.root / _RECIPE)

    def claim(self, work: Recipe | Evaluation) -> None:
        """Create the folder for a recipe or evaluation, or check that it belongs to it.

        Raises:
            UserError: the folder belongs to another one, contains other files, or cannot be written.
        """
        existing = self.root / _layout(work)[0]
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self.check_free_for(work)
            if not existing.exists():
                write_atomically(existing, work.to_json(), private=has_secrets(work.to_json()))
        except OSError as error:
            raise UserError(
                f"The folder {self.root} cannot be written: {error.strerror}. Check {flag_of(work)}."
            ) from error
        self.check_free_for(work)  # another command may have been faster

    def check_free_for(self, work: Recipe | Evaluation) -> None:
        """Check that the folder, if it exists, is empty or belongs to a recipe or evaluation.

        Raises:
            UserError: it does not.
            OSError: it cannot be listed.
        """
        name, kind, flag = _layout(work)
        if not (self.root / name).exists():
            foreign = [p.name for p in self.root.iterdir() if p.name[0] != "."] if self.root.exists() else []
            if foreign:
                raise UserError(
                    f"{self.root} is neither empty nor the folder of this {kind} (it contains "
                    f"{', '.join(sorted(foreign)[:4])}). Choose another folder with {flag}."
                )
            return
        found = self.work()
        if isinstance(work, Recipe) and isinstance(found, Recipe):
            work = work.with_choice_of(found)
        same_kind = isinstance(found, Recipe) == isinstance(work, Recipe)
        differences = found.differences(work) if same_kind else [f"no {kind}"]
        if differences:
            raise UserError(
                f"{self.root} belongs to another {kind}: {'; '.join(differences)} (there → here). Choose another "
                f"folder with {flag}, or repeat the settings of {self.root / name}."
            )

    def record_recipe(self, recipe: Recipe) -> None:
        """Replace the recipe by one in which a start has resolved ``auto``. Raises OSError."""
        write_atomically(self.root / _RECIPE, recipe.to_json(), private=has_secrets(recipe.to_json()))

    @contextmanager
    def locked(
        self,
        job: str = "",
        *,
        heartbeat_s: float = HEARTBEAT_S,
        dead_after_s: float = DEAD_AFTER_S,
        patience_s: float = PATIENCE_S,
    ) -> Iterator[None]:
        """Lock the folder, so that no other job trains into it, and remove the temporary files of killed processes. The
        arguments are those of ``FolderLock.held``.

        Raises:
            UserError: another job holds the folder, or it cannot be written.
        """
        with ExitStack() as stack:
            try:
                stack.enter_context(
                    FolderLock(self.root).held(
                        job, heartbeat_s=heartbeat_s, dead_after_s=dead_after_s, patience_s=patience_s
                    )
                )
            except LockHeld as held:
                owner = held.owner
                raise UserError(
                    f"Another job is training into {self.root} ({owner}; last heartbeat {owner.age_s:.0f} s ago). "
                    "Wait for it, cancel it with launch/cancel.py, or choose another folder with --run."
                ) from None
            except OSError as error:
                raise UserError(f"{self.root} cannot be written: {error.strerror} ({error.filename}).") from error
            self._remove_leftovers()
            yield

    def owner(self) -> Owner | None:
        """The process that holds the lock, alive or dead; None if it is free."""
        return FolderLock(self.root).owner()

    def _remove_leftovers(self) -> None:
        """Remove the temporary files of killed processes. Called by the holder of the lock."""
        own = [self.initial, self.ensemble, self.final, self.results, self.progress, self.head_rows, self.attempts]
        own += [self.log, *self._histories]
        for path in self.root.glob(".*"):
            with suppress(OSError):
                # Only holders of the lock write these files; other temporary files may be in use.
                left = any(path.name.startswith(f".{file.name}.") for file in own)
                if left or is_abandoned(path, now=(self.root / LOCK_FOLDER).stat().st_mtime):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()

    def saved_step(self) -> int:
        """Step of the newest checkpoint, intact or not; 0 if there is none. Raises OSError."""
        return max(map(step_of, list_checkpoints(self.checkpoints)), default=0)

    def logged_step(self) -> int | None:
        """The last step in log.jsonl; None before the first. Raises OSError."""
        return _last_step(self.log)

    def history(self) -> History:
        """Progress since the run last began at step 0. Raises OSError."""
        starts = [line for line in read_lines(self.attempts) if isinstance(line.get("from_step"), int)]
        begun = max((i for i, line in enumerate(starts) if line["from_step"] == 0), default=-1)
        since = starts[begun + 1 :]
        committed = [line["step"] for line in read_lines(self.committed) if isinstance(line.get("step"), int)]
        reached = [line["last_reached"] for line in since if isinstance(line.get("last_reached"), int)]
        logged = [_last_step(self.log) or 0, _last_step(self.receipts) or 0]
        return History(
            saved=max([self.saved_step(), *committed, *(line["from_step"] for line in since)]),
            logged=max([*logged, *reached]),
        )

    def best(self, *, verify: bool = True) -> BestCheckpoint:
        """The best checkpoint on the held-out set; see ``best_checkpoint``."""
        return best_checkpoint(self.recipe(), self.log, self.checkpoints, verify=verify)

    def has_started(self) -> bool:
        """Whether a start has begun to train, so that all models are in the folder. Raises OSError."""
        return any(isinstance(line.get("from_step"), int) for line in read_lines(self.attempts))

    def allow_step_0(self, allowed: bool = True) -> None:
        """Set whether the next start may restart at step 0 if it finds no intact checkpoint.

        Raises:
            UserError: the folder cannot be written.
        """
        if allowed:
            self._write_mark(self._step_0)
        else:
            self.clear_step_0()

    def step_0_allowed(self) -> bool:
        """Whether the next start may restart at step 0. Raises OSError."""
        return _exists(self._step_0)

    def clear_step_0(self) -> None:
        """Withdraw the permission of ``allow_step_0``. Raises OSError."""
        self._step_0.unlink(missing_ok=True)

    def remove_progress(self) -> None:
        """Remove the intermediate results of an evaluation. If that fails, the next command on the folder does it."""
        for path in (self.progress, self.head_rows):
            with suppress(OSError):
                path.unlink(missing_ok=True)

    def tidy(self) -> None:
        """If the run is finished and the lock is free, remove what killed processes have left: intermediate results of
        an evaluation, claims (launch/submission/claims.py), submitit's pickles of jobs that were not submitted."""
        owner = self.owner()
        if owner is None or owner.has_ended():
            with suppress(UserError), self.locked(patience_s=0):
                if self.results.exists():
                    self.remove_progress()
                    shutil.rmtree(self.root / ".claims", ignore_errors=True)
                    for path in self.root.glob(f"jobs/{'[0-9a-f]' * 32}.pkl"):
                        path.unlink(missing_ok=True)

    def drop_results(self) -> None:
        """Remove the results, so that a finished run can be repeated."""
        self.results.unlink(missing_ok=True)
        self.final.unlink(missing_ok=True)

    def cancel(self) -> None:
        """Mark the run as cancelled: its job stops at the next step and is not requeued.

        Raises:
            UserError: the folder cannot be written.
        """
        if self.cancelled() is None:
            self._write_mark(self._cancelled)

    def _write_mark(self, path: Path) -> None:
        mark = {"by": f"{_user()} on {os.uname().nodename}", "when": now()}
        try:
            write_atomically(path, json.dumps(mark))
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}.") from error

    def cancelled(self) -> dict[str, Any] | None:
        """Who cancelled the run and when (``by``, ``when``); None if it is not cancelled."""
        if not self._cancelled.exists():
            return None
        return {"by": "somebody", "when": None} | (read_object(self._cancelled) or {})

    def clear_cancelled(self) -> dict[str, Any] | None:
        """Remove the mark of ``cancel``; returns what ``cancelled`` returned before."""
        mark = self.cancelled()
        self._cancelled.unlink(missing_ok=True)
        return mark

    def cut_history(self, step: int) -> None:
        """Remove the lines after ``step`` from all histories, because these steps are repeated. Raises OSError."""
        for path in (self.log, *self._histories):
            cut_lines(path, step)

    @property
    def _histories(self) -> tuple[Path, ...]:
        """Histories of the weights, besides the log."""
        return self.receipts, self.overlaps, self.bad_samples, self.skipped_steps, self.committed


def _layout(work: Recipe | Evaluation) -> tuple[str, str, str]:
    """The file of a recipe or evaluation in its folder, its kind in words, and the flag that names the folder."""
    return (_RECIPE, "recipe", "--run") if isinstance(work, Recipe) else (_EVALUATION, "evaluation", "--out")


def flag_of(work: Recipe | Evaluation) -> str:
    """The flag that names the folder of a recipe or evaluation."""
    return _layout(work)[2]


def _last_step(path: Path) -> int | None:
    steps = [line["step"] for line in read_lines(path, tail=1 << 16) if isinstance(line.get("step"), int)]
    return steps[-1] if steps else None


def _exists(path: Path) -> bool:
    """``Path.exists`` that raises OSError if the answer is unknown."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe file.

    Raises:
        UserError: the file cannot be read, or is not a recipe.
    """
    try:
        text = patiently(lambda: Path(path).read_text(errors="replace"), str(path))
    except OSError as error:
        raise UserError(f"The recipe {path} cannot be read: {error.strerror}.") from error
    try:
        return Recipe.from_json(text)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container without user names
        return f"user {os.getuid()}"
