"""The run folder: everything about a run, and all that a resume needs.

RUN/
  recipe.json            what is trained, and how; a folder belongs to one recipe
  initial.safetensors    the pre-trained tower and its head: start, teacher, and WiSE-FT's other end
  ensemble.safetensors   wise-kd's other teacher
  log.jsonl              metrics by step
  receipts.jsonl         receipt of the samples that each step consumed (tools/audit.py)
  bad_samples.jsonl      samples that could not be read, and what stood in for them
  skipped_steps.jsonl    steps left out because a loss or gradient was not finite, and their samples
                         these four are the history of the weights: cut back to the checkpoint on a resume
  tensorboard/           the same as curves
  checkpoints/step-00012345/   model.safetensors, optimizer.safetensors, state.json
  model.safetensors      the trained tower and head, when the run is finished
  results.json           final accuracies
  attempts.jsonl         one line a start: job, world size, from which step, why the last one ended
  jobs/                  what the launcher writes: logs of every rank, by job
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from cfmask.errors import UserError
from cfmask.files import write_atomically
from cfmask.recipe import Recipe, load_recipe

# A requeue that resumes where the one before it did has got nowhere; after so many there is no point.
REQUEUES_WITHOUT_PROGRESS = 3


_LOCK_PATIENCE_S = 5


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file; a last line torn by a kill is left out. No file: no lines."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


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
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def log(self) -> Path:
        return self.root / "log.jsonl"

    @property
    def receipts(self) -> Path:
        return self.root / "receipts.jsonl"

    @property
    def bad_samples(self) -> Path:
        return self.root / "bad_samples.jsonl"

    @property
    def skipped_steps(self) -> Path:
        return self.root / "skipped_steps.jsonl"

    @property
    def attempts(self) -> Path:
        return self.root / "attempts.jsonl"

    @property
    def _end(self) -> Path:
        return self.root / "ended.json"

    def recipe(self) -> Recipe:
        """Raises UserError if this is no run folder."""
        if not (self.root / "recipe.json").exists():
            raise UserError(f"{self.root} is not a run folder: it has no recipe.json. Check the path.")
        return load_recipe(self.root / "recipe.json")

    def claim(self, recipe: Recipe) -> None:
        """Make the folder, or see that it is this recipe's.

        Raises:
            UserError: it belongs to another recipe, holds something else, or cannot be written.
        """
        existing = self.root / "recipe.json"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            if not existing.exists():
                foreign = [p.name for p in self.root.iterdir() if not p.name.startswith(".")]
                if foreign:
                    raise UserError(
                        f"{self.root} is neither empty nor a run folder (it holds {', '.join(sorted(foreign)[:4])}). "
                        "Give another folder with --run."
                    )
                write_atomically(existing, recipe.to_json())
        except OSError as error:
            raise UserError(f"The run folder {self.root} cannot be written: {error.strerror}. Check --run.") from error
        differences = load_recipe(existing).differences(recipe)
        if differences:
            raise UserError(
                f"{self.root} belongs to another recipe: {'; '.join(differences)} (there → here). Give this run a "
                f"folder of its own with --run, or repeat the settings of {existing}."
            )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder: two jobs cannot train into one. A job that is just dying is waited for.

        Raises:
            UserError: another job holds it.
        """
        with open(self.root / ".lock", "a+") as lock:
            deadline = time.monotonic() + _LOCK_PATIENCE_S
            while not _try_lock(lock):
                if time.monotonic() > deadline:
                    lock.seek(0)
                    raise UserError(
                        f"Another job is training into {self.root} ({lock.read().strip() or 'unknown'}). Wait for it, "
                        "cancel it, or give this run a folder of its own with --run."
                    )
                time.sleep(0.1)
            lock.truncate(0)
            lock.write(f"{os.uname().nodename}, process {os.getpid()}\n")
            lock.flush()
            yield

    def begin_attempt(self, **facts: Any) -> None:
        """Append this start to attempts.jsonl, with why the last one ended."""
        earlier = read_lines(self.attempts)
        if self._end.exists():
            why = json.loads(self._end.read_text())["why"]
            self._end.unlink()
        else:
            why = "killed without notice" if earlier else None
        line = {"attempt": len(earlier) + 1, "started": _now(), **facts, "why_last_ended": why}
        append_lines(self.attempts, [line])

    def end_attempt(self, why: str) -> None:
        write_atomically(self._end, json.dumps({"why": why, "ended": _now()}))

    def stuck(self) -> bool:
        """Whether the latest starts, REQUEUES_WITHOUT_PROGRESS of them and one, all began at the same step."""
        steps = [line.get("from_step") for line in read_lines(self.attempts)][-(REQUEUES_WITHOUT_PROGRESS + 1) :]
        return len(steps) > REQUEUES_WITHOUT_PROGRESS and len(set(steps)) == 1

    def cut_history(self, step: int) -> None:
        """Drop what was logged after ``step``: those steps are about to be taken again."""
        for path in (self.log, self.receipts, self.bad_samples, self.skipped_steps):
            if path.exists():  # written anew even if nothing goes: the last line may be torn
                kept = [line for line in read_lines(path) if line["step"] <= step]
                write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))


def append_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Add objects to a .jsonl file: all, or on a full disk none.

    Raises:
        OSError: they cannot be written.
    """
    with open(path, "ab") as file:
        size = file.tell()
        try:
            file.write("".join(json.dumps(line) + "\n" for line in lines).encode())
            file.flush()
        except OSError:
            os.truncate(path, size)
            raise


def find_model(path: str | Path) -> Path:
    """The model file that a path names: a model file itself, a checkpoint folder, or a run folder (its trained model,
    or its latest checkpoint's while it is not finished).

    Raises:
        UserError: there is none.
    """
    path = Path(path)
    if path.is_file():
        return path
    candidates = [path / "model.safetensors", *sorted(path.glob("checkpoints/step-*/model.safetensors"), reverse=True)]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise UserError(
        f"{path} is neither a model file nor a run or checkpoint folder with a model in it. A model file is "
        "RUN/model.safetensors, RUN/initial.safetensors or RUN/checkpoints/step-…/model.safetensors."
    )


def _try_lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
