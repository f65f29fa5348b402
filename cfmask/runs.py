"""The run folder: everything about a run, and all that a resume needs.

RUN/
  recipe.json            what is trained, and how; a folder belongs to one recipe (or evaluation: evaluation_spec.py)
  initial.safetensors    the pre-trained tower and its head: start, teacher, and WiSE-FT's other end
  ensemble.safetensors   wise-kd's other teacher
  log.jsonl              metrics by step
  receipts.jsonl         receipt of the samples that each step consumed (tools/audit.py)
  overlaps.jsonl         how far CAM masks fell on objects, summed from checkpoint to checkpoint (--segmentation)
  bad_samples.jsonl      samples that could not be read, and what stood in for them
  skipped_steps.jsonl    steps left out because a loss or gradient was not finite, and their samples
  committed.jsonl        the step of each checkpoint that was written whole
                         these six are the history of the weights: cut back to the checkpoint on a resume
  tensorboard/           the same as curves
  checkpoints/step-00012345/   model.safetensors, optimizer.safetensors, state.json
  checkpoints/best.json  which epoch's end is best on the held-out set
  model.safetensors      the trained tower and head, when the run is finished
  results.json           final accuracies
  attempts.jsonl         one line a start: job, world size, from which step, why the last one ended
  ended.json             why the latest start ended, until the next one takes it over into attempts.jsonl
  cancelled.json         who ended the run for good, and when: nothing goes on with it before it is resumed by hand
  from_step_0.json       leave to begin again at step 0 where checkpoints were lost, until a start has used it
  jobs/                  what the launcher writes: logs of every rank, by job; failure reports; the command of --notify
  wandb.json, wandb/     what was sent to Weights & Biases, and its own files (launch/notification/wandb_sender.py)
  code/                  the code that its jobs were submitted with
  .owner/                who trains here (runtime/lock.py)
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

from cfmask.best_checkpoint import POINTER, BestCheckpoint, best_checkpoint
from cfmask.checkpoint_state import found as found_checkpoints
from cfmask.checkpoint_state import step_of
from cfmask.errors import UserError
from cfmask.evaluation_spec import Evaluation, load_evaluation
from cfmask.files import write_atomically
from cfmask.recipe import Recipe, load_recipe
from cfmask.runtime.attempts import AttemptLog, now
from cfmask.runtime.jsonl import JsonLines, cut_lines, read_lines, read_object
from cfmask.runtime.lock import DEAD_AFTER_S, HEARTBEAT_S, PATIENCE_S, FolderLock, LockHeld, Owner
from cfmask.runtime.lock import FOLDER as LOCK_FOLDER
from cfmask.runtime.machine import is_abandoned
from cfmask.runtime.patience import patiently
from cfmask.secrets import has_secrets

_RECIPE, _EVALUATION = "recipe.json", "evaluation.json"


@dataclass(frozen=True)
class History:
    """How far a run has come, as its records show. saved: the step of the newest checkpoint that is known to have been
    whole. logged: the last step that was taken. 0: none."""

    saved: int
    logged: int


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run folder, and the few files in it that are not weights."""

    root: Path

    @property
    def initial(self) -> Path:
        return self.root / "initial.safetensors"

    @property
    def ensemble(self) -> Path:
        return self.root / "ensemble.safetensors"

    @property
    def final(self) -> Path:
        return self.root / "model.safetensors"

    @property
    def results(self) -> Path:
        return self.root / "results.json"

    @property
    def progress(self) -> Path:
        return self.root / "progress.safetensors"

    @property
    def head_rows(self) -> Path:
        return self.root / "head-rows.safetensors"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def log(self) -> Path:
        return self.root / "log.jsonl"

    @property
    def receipts(self) -> Path:
        return self.root / "receipts.jsonl"

    @property
    def overlaps(self) -> Path:
        return self.root / "overlaps.jsonl"

    @property
    def bad_samples(self) -> Path:
        return self.root / "bad_samples.jsonl"

    @property
    def skipped_steps(self) -> Path:
        return self.root / "skipped_steps.jsonl"

    @property
    def committed(self) -> Path:
        return self.root / "committed.jsonl"

    @property
    def attempts(self) -> Path:
        return self.root / "attempts.jsonl"

    @property
    def _step_0(self) -> Path:
        return self.root / "from_step_0.json"

    @property
    def _cancelled(self) -> Path:
        return self.root / "cancelled.json"

    def recipe(self) -> Recipe:
        """Raises UserError if this is no run folder, or an evaluation's."""
        work = self.work()
        if isinstance(work, Evaluation):
            raise UserError(
                f"{self.root} is the folder of an evaluation, and a training run is needed. Check the path."
            )
        return work

    def has_work(self) -> bool:
        """Whether this is a run folder: of a training or an evaluation."""
        return (self.root / _RECIPE).exists() or (self.root / _EVALUATION).exists()

    def work(self) -> Recipe | Evaluation:
        """What is done here. Raises UserError if this is no run folder."""
        evaluation, recipe = self.root / _EVALUATION, self.root / _RECIPE
        if patiently(lambda: _exists(evaluation), str(evaluation)):
            return load_evaluation(evaluation)
        if not patiently(lambda: _exists(recipe), str(recipe)):
            raise UserError(f"{self.root} is not a run folder: it has no {_RECIPE}. Check the path.")
        return load_recipe(self.root / _RECIPE)

    def claim(self, work: Recipe | Evaluation) -> None:
        """Make the folder, or see that it is this recipe's, or this evaluation's.

        Raises:
            UserError: it belongs to another one, holds something else, or cannot be written.
        """
        kind, flag = ("recipe", "--run") if isinstance(work, Recipe) else ("evaluation", "--out")
        existing = self.root / (_RECIPE if isinstance(work, Recipe) else _EVALUATION)
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            if not existing.exists():
                foreign = [p.name for p in self.root.iterdir() if not p.name.startswith(".")]
                if foreign:
                    raise UserError(
                        f"{self.root} is neither empty nor the folder of this {kind} (it holds "
                        f"{', '.join(sorted(foreign)[:4])}). Give another folder with {flag}."
                    )
                write_atomically(existing, work.to_json(), private=has_secrets(work.to_json()))
        except OSError as error:
            raise UserError(f"The folder {self.root} cannot be written: {error.strerror}. Check {flag}.") from error
        found = self.work()
        if isinstance(work, Recipe) and isinstance(found, Recipe):
            work = work.with_choice_of(found)
        same_kind = isinstance(found, Recipe) == isinstance(work, Recipe)
        differences = found.differences(work) if same_kind else [f"no {kind}"]
        if differences:
            raise UserError(
                f"{self.root} belongs to another {kind}: {'; '.join(differences)} (there → here). Give this one a "
                f"folder of its own with {flag}, or repeat the settings of {existing}."
            )

    def record_recipe(self, recipe: Recipe) -> None:
        """Replace the recipe by one in which a start has chosen what was left open. Raises OSError."""
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
        """Hold the folder: two jobs cannot train into one. A job that is just dying is waited for. Temporary files that
        killed processes have left are removed. Arguments are those of ``FolderLock.held``.

        Raises:
            UserError: another job holds it, or it cannot be written.
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
                    f"Another job is training into {self.root} ({owner}; last heard of {owner.age_s:.0f} s ago). "
                    "Wait for it, cancel it with launch/cancel.py, or give this run a folder of its own with --run."
                ) from None
            except OSError as error:
                raise UserError(f"{self.root} cannot be written: {error.strerror} ({error.filename}).") from error
            self._remove_leftovers()
            yield

    def owner(self) -> Owner | None:
        """Who holds the folder, alive or dead; None if nobody does."""
        return FolderLock(self.root).owner()

    def _remove_leftovers(self) -> None:
        """Remove temporary files that nobody will rename any more. Called by who holds the folder."""
        own = [self.initial, self.ensemble, self.final, self.results, self.progress, self.head_rows, self.attempts]
        own += [self.log, *self._of_weights]
        for path in self.root.glob(".*"):
            with suppress(OSError):
                # What only the holder writes, an earlier holder has left; the rest may be another process's.
                left = any(path.name.startswith(f".{file.name}.") for file in own)
                if left or is_abandoned(path, now=(self.root / LOCK_FOLDER).stat().st_mtime):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _attempt_log(self) -> AttemptLog:
        return AttemptLog(self.root)

    def begin_attempt(self, **facts: Any) -> JsonLines:
        """Record this start, with why and when the last one ended and which step it had reached (``AttemptLog.begin``).
        Raises OSError where the records cannot be read."""
        return self._attempt_log().begin(reached=self.logged_step(), **facts)

    def end_attempt(self, why: str, *, died: dict[str, Any] | None = None) -> None:
        """Record why the latest start ends (``AttemptLog.end``)."""
        self._attempt_log().end(why, died=died)

    def deaths(self, job: str, *, before: str) -> list[dict[str, Any]]:
        """See ``AttemptLog.deaths``."""
        return self._attempt_log().deaths(job, before=before)

    def begun_by(self, job: str) -> bool:
        """Whether the latest start is this one of a job."""
        return self._attempt_log().begun_by(job)

    def end_failed(self, why: str, *, job: str, **facts: Any) -> None:
        """End this start of a job, recorded or not (``AttemptLog.end_failed``)."""
        self._attempt_log().end_failed(why, job=job, reached=self.logged_step(), **facts)

    def ended(self) -> dict[str, Any] | None:
        """Why and when the latest start ended, if it has recorded that: ``why``, ``ended``."""
        return self._attempt_log().ended()

    def saved_step(self) -> int:
        """The step of the newest checkpoint, whole or not; 0 if there is none. Raises OSError."""
        return max(map(step_of, found_checkpoints(self.checkpoints)), default=0)

    def logged_step(self) -> int | None:
        """The last step in log.jsonl; None before the first. Raises OSError."""
        return _last_step(self.log)

    def history(self) -> History:
        """How far the run has come since it last began at step 0. Raises OSError."""
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
        """The run's best checkpoint on its held-out set (``best_checkpoint``, with what it raises)."""
        return best_checkpoint(self.recipe(), self.log, self.checkpoints, verify=verify)

    def has_started(self) -> bool:
        """Whether a start of it has had its models: everything that it needs was in the folder. Raises OSError."""
        return any(isinstance(line.get("from_step"), int) for line in read_lines(self.attempts))

    def allow_step_0(self, allowed: bool = True) -> None:
        """Whether the next start may begin again at step 0, if it finds no whole checkpoint.

        Raises:
            UserError: it cannot be written.
        """
        if allowed:
            self._write_mark(self._step_0)
        else:
            self.clear_step_0()

    def step_0_allowed(self) -> bool:
        """Whether the next start may begin again at step 0. Raises OSError."""
        return _exists(self._step_0)

    def clear_step_0(self) -> None:
        """Take that leave away: a start has used it, or did not need it. Raises OSError."""
        self._step_0.unlink(missing_ok=True)

    def remove_progress(self) -> None:
        """Remove what an evaluation keeps until it is finished. Raises nothing: what stays is removed by the next
        command on the folder."""
        for path in (self.progress, self.head_rows):
            with suppress(OSError):
                path.unlink(missing_ok=True)

    def tidy(self) -> None:
        """If the run is finished and nobody holds the folder, remove what killed processes have left in it: progress
        of an evaluation, claims (launch/submission/claims.py), submitit's pickles of jobs that were never sent."""
        owner = self.owner()
        if owner is None or owner.has_ended():
            with suppress(UserError), self.locked(patience_s=0):
                if self.results.exists():
                    self.remove_progress()
                    shutil.rmtree(self.root / ".claims", ignore_errors=True)
                    for path in self.root.glob(f"jobs/{'[0-9a-f]' * 32}.pkl"):
                        path.unlink(missing_ok=True)

    def drop_results(self) -> None:
        """Let what is finished be done anew."""
        self.results.unlink(missing_ok=True)
        self.final.unlink(missing_ok=True)

    def cancel(self) -> None:
        """Leave the mark that ends the run for good: whoever trains here stops at the next step and does not come back.

        Raises:
            UserError: it cannot be written.
        """
        if self.cancelled() is None:
            self._write_mark(self._cancelled)

    def _write_mark(self, path: Path) -> None:
        told = {"by": f"{_user()} on {os.uname().nodename}", "when": now()}
        try:
            write_atomically(path, json.dumps(told))
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}.") from error

    def cancelled(self) -> dict[str, Any] | None:
        """Who ended this run for good and when (``by``, ``when``); None if nobody did."""
        if not self._cancelled.exists():
            return None
        return {"by": "somebody", "when": None} | (read_object(self._cancelled) or {})

    def clear_cancelled(self) -> dict[str, Any] | None:
        """Let a cancelled run go on; what ``cancelled`` said before."""
        told = self.cancelled()
        self._cancelled.unlink(missing_ok=True)
        return told

    def cut_history(self, step: int) -> None:
        """Drop what was logged after ``step``: those steps are about to be taken again. Raises OSError."""
        for path in (self.log, *self._of_weights):
            cut_lines(path, step)

    @property
    def _of_weights(self) -> tuple[Path, ...]:
        """Beside the log, what belongs to the weights of a step."""
        return self.receipts, self.overlaps, self.bad_samples, self.skipped_steps, self.committed


def _last_step(path: Path) -> int | None:
    steps = [line["step"] for line in read_lines(path, tail=1 << 16) if isinstance(line.get("step"), int)]
    return steps[-1] if steps else None


def _exists(path: Path) -> bool:
    """Unlike ``Path.exists``, raises OSError where that cannot be told."""
    try:
        os.stat(path)
    except FileNotFoundError:
        return False
    return True


def find_model(path: str | Path) -> Path:
    """The model file that a path names: a model file itself, a checkpoint folder, a run folder (its trained model, or
    its latest checkpoint's while it is not finished), or RUN/checkpoints/best.json (the best checkpoint's).

    Raises:
        UserError: there is none.
    """
    path = Path(path)
    if path.name == POINTER:
        # Absolute: "best.json" alone has no parents. Not resolved: RUN/checkpoints may be a link to another disk.
        folder = Path(os.path.abspath(path)).parent
        run = RunFolder(folder.parent)
        if folder != run.checkpoints:
            raise UserError(
                f"{path} does not lie in the folder checkpoints of a run, whose log and checkpoints tell which is the "
                "best. Name RUN/checkpoints/best.json, or the model file itself."
            )
        return run.best().model
    if path.is_file():
        return path
    if (path / "model.safetensors").is_file():
        return path / "model.safetensors"
    checkpoints = path / "checkpoints"
    for each in patiently(lambda: found_checkpoints(checkpoints), str(checkpoints)) if checkpoints.is_dir() else ():
        if (each / "model.safetensors").is_file():
            return each / "model.safetensors"
    raise UserError(
        f"{path} is neither a model file nor a run or checkpoint folder with a model in it. A model file is "
        "RUN/model.safetensors, RUN/initial.safetensors or RUN/checkpoints/step-…/model.safetensors."
    )


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container that knows no names
        return f"user {os.getuid()}"
