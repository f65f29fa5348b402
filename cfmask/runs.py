"""The run folder: everything about a run, and all that a resume needs.

RUN/
  recipe.json            what is trained, and how; a folder belongs to one recipe (or evaluation: evaluation.py)
  initial.safetensors    the pre-trained tower and its head: start, teacher, and WiSE-FT's other end
  ensemble.safetensors   wise-kd's other teacher
  log.jsonl              metrics by step
  receipts.jsonl         receipt of the samples that each step consumed (tools/audit.py)
  overlaps.jsonl         how far CAM masks fell on objects, summed from checkpoint to checkpoint (--segmentation)
  bad_samples.jsonl      samples that could not be read, and what stood in for them
  skipped_steps.jsonl    steps left out because a loss or gradient was not finite, and their samples
                         these five are the history of the weights: cut back to the checkpoint on a resume
  tensorboard/           the same as curves
  checkpoints/step-00012345/   model.safetensors, optimizer.safetensors, state.json
  checkpoints/best.json  which epoch's end is best on the held-out set
  model.safetensors      the trained tower and head, when the run is finished
  results.json           final accuracies
  attempts.jsonl         one line a start: job, world size, from which step, why the last one ended
  ended.json             why the latest start ended, until the next one takes it over into attempts.jsonl
  cancelled.json         who ended the run for good, and when: nothing goes on with it before it is resumed by hand
  jobs/                  what the launcher writes: logs of every rank, by job; failure reports
  code/                  the code that its jobs were submitted with
  .owner/                one file, called "free" or after the process that trains here; its time is the heartbeat
"""

from __future__ import annotations

import functools
import getpass
import hashlib
import json
import os
import secrets
import shutil
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfmask.errors import UserError
from cfmask.evaluation import Evaluation, load_evaluation
from cfmask.files import write_atomically
from cfmask.recipe import Recipe, load_recipe
from cfmask.secrets import has_secrets

_RECIPE, _EVALUATION = "recipe.json", "evaluation.json"

# A requeue that resumes where the one before it did has got nowhere; after so many there is no point.
REQUEUES_WITHOUT_PROGRESS = 3

HEARTBEAT_S = 15
DEAD_AFTER_S = 60
"""An owner that was not heard of for so long is dead."""
_PATIENCE_S = 5
_FREE = "free"


def read_lines(path: Path, *, tail: int | None = None) -> list[dict[str, Any]]:
    """The objects of a .jsonl file; a line torn by a kill is left out. No file: no lines.

    Args:
        tail: look at no more than so many bytes at the end.
    """
    try:
        with open(path, "rb") as file:
            if tail is not None:
                file.seek(max(0, os.fstat(file.fileno()).st_size - tail))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return []
    lines = []
    for line in text.splitlines():
        with suppress(ValueError):
            lines.append(json.loads(line))
    return [line for line in lines if isinstance(line, dict)]  # the end of a cut line may be a number


def read_object(path: Path) -> dict[str, Any] | None:
    """The object in a .json file; None if there is none, or it cannot be made out."""
    try:
        found = json.loads(path.read_text(errors="replace"))
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) else None


@dataclass(frozen=True)
class Owner:
    """Who trains into a run folder. machine: host, boot and process namespace within which a pid means something.
    age_s: since its last heartbeat."""

    host: str
    machine: str
    pid: int
    job: str
    age_s: float

    @property
    def is_here(self) -> bool:
        """Whether its pid means something to this process."""
        return self.machine == _this_machine()

    def why_dead(self, dead_after_s: float = DEAD_AFTER_S) -> str | None:
        """What shows that it is dead; None if it lives, as far as can be seen."""
        if self.is_here and not process_runs(self.pid):
            return "does not run any more"
        return f"was not heard of for {self.age_s:.0f} s" if self.age_s > dead_after_s else None

    def __str__(self) -> str:
        return (f"job {self.job}, " if self.job else "") + f"process {self.pid} on {self.host}"


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
    def attempts(self) -> Path:
        return self.root / "attempts.jsonl"

    @property
    def _end(self) -> Path:
        return self.root / "ended.json"

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
        if (self.root / _EVALUATION).exists():
            return load_evaluation(self.root / _EVALUATION)
        if not (self.root / _RECIPE).exists():
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
        differences = found.differences(work) if type(found) is type(work) else [f"no {kind}"]
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
        patience_s: float = _PATIENCE_S,
    ) -> Iterator[None]:
        """Hold the folder: two jobs cannot train into one. A job that is just dying is waited for.

        An owner on this machine whose process is gone is followed at once. One elsewhere is waited for: until it lets
        hear of itself, and this process is refused, or until it has been silent for ``dead_after_s``. A holder that
        finds itself replaced (it was suspended for a minute, say) ends its process at once and writes nothing.

        Args:
            job: named in what others are told.
            heartbeat_s: how often this process lets hear of itself.
            patience_s: how long an owner that lives is waited for.

        Raises:
            UserError: another job holds it, or it cannot be written.
        """
        lock = _Lock(self.root)
        try:
            mine = lock.take(job, dead_after_s, patience_s)
        except OSError as error:
            raise UserError(f"{self.root} cannot be written: {error.strerror} ({error.filename}).") from error
        stop = threading.Event()
        beating = threading.Thread(target=lock.beat, args=(mine, stop, heartbeat_s), daemon=True)
        beating.start()
        try:
            yield
        finally:
            stop.set()
            beating.join()
            lock.free(mine)

    def owner(self) -> Owner | None:
        """Who holds the folder, alive or dead; None if nobody does."""
        return _Lock(self.root).owner()

    def begin_attempt(self, **facts: Any) -> None:
        """Append this start to attempts.jsonl, with why and when the last one ended and which step it had reached."""
        earlier = read_lines(self.attempts)
        ended = self.ended()
        why = ended["why"] if ended else "killed without notice" if earlier else None
        line = {"attempt": len(earlier) + 1, "started": _now(), **facts, "why_last_ended": why}
        if earlier:
            line |= {"last_ended": ended["ended"] if ended else None, "last_reached": self.logged_step()}
        append_lines(self.attempts, [line])
        self._end.unlink(missing_ok=True)

    def end_attempt(self, why: str) -> None:
        """Leave word of why the latest attempt ends. On a full disk that is a warning: the end has its own reason."""
        told = {"why": why, "ended": _now(), "attempt": len(read_lines(self.attempts))}
        try:
            write_atomically(self._end, json.dumps(told))
        except OSError as error:
            print(f"warning: {self._end} cannot be written ({error.strerror}): {why}", flush=True)

    def begun_by(self, job: str) -> bool:
        """Whether the latest attempt is this job's."""
        starts = read_lines(self.attempts)
        return bool(starts) and starts[-1].get("job") == job

    def end_failed(self, why: str, *, job: str, **facts: Any) -> None:
        """End the attempt of this job. One that it has not come to begin is one all the same: it is begun here, with
        ``facts``, so that the end of the one before it stays known."""
        if not self.begun_by(job):
            self.begin_attempt(job=job, **facts, from_step=None)
        self.end_attempt(why)

    def ended(self) -> dict[str, Any] | None:
        """Why and when the latest attempt ended, if it said so: ``why``, ``ended``."""
        found = read_object(self._end)
        if found is None or not {"why", "ended"} <= found.keys():
            return None
        # Killed between the two steps of begin_attempt, the attempt before this one has left it.
        attempts = len(read_lines(self.attempts))
        return found if found.get("attempt", attempts) >= attempts else None

    def stuck(self, job_id: str) -> bool:
        """Whether a job has come back to the same step REQUEUES_WITHOUT_PROGRESS times, and left no checkpoint beyond.

        Asked before a start. What another job did with this run does not count: somebody has submitted it since.
        """
        steps = [
            line["from_step"]
            for line in read_lines(self.attempts)
            if str(line.get("job")).rpartition("-")[0] == job_id and isinstance(line.get("from_step"), int)
        ][-(REQUEUES_WITHOUT_PROGRESS + 1) :]
        return len(steps) > REQUEUES_WITHOUT_PROGRESS and len(set(steps)) == 1 and self.saved_step() <= steps[0]

    def saved_step(self) -> int:
        """The step of the newest checkpoint, whole or not; 0 if there is none."""
        names = [path.name.removeprefix("step-") for path in self.checkpoints.glob("step-*")]
        return max((int(name) for name in names if name.isdigit()), default=0)

    def logged_step(self) -> int | None:
        """The last step in log.jsonl; None before the first."""
        steps = [line["step"] for line in read_lines(self.log, tail=1 << 16) if isinstance(line.get("step"), int)]
        return steps[-1] if steps else None

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
            told = {"by": f"{_user()} on {os.uname().nodename}", "when": _now()}
            try:
                write_atomically(self._cancelled, json.dumps(told))
            except OSError as error:
                raise UserError(f"{self._cancelled} cannot be written: {error.strerror}.") from error

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
        """Drop what was logged after ``step``: those steps are about to be taken again."""
        for path in (self.log, self.receipts, self.overlaps, self.bad_samples, self.skipped_steps):
            if path.exists():  # written anew even if nothing goes: the last line may be torn
                kept = [line for line in read_lines(path) if line["step"] <= step]
                write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))


class _Lock:
    """A lock for any file system that machines share, with flock or without: RUN/.owner has one file, and the holder is
    who that is named after.

    All that ever happens to it is a rename, from "free" or from a dead owner's name to one's own: of any number of
    processes that try, one finds the old name. The file's time is its owner's heartbeat, and is compared with that of
    another file only: the clocks of nodes differ.
    """

    def __init__(self, root: Path) -> None:
        self._root, self._folder = root, root / ".owner"

    def take(self, job: str, dead_after_s: float, patience_s: float) -> Path:
        """The file that is this process's now. Raises UserError if the lock's owner lives."""
        me = (os.uname().nodename, _this_machine(), str(os.getpid()), job, secrets.token_hex(4))
        mine = self._folder / ",".join(me)
        began = time.monotonic()
        first: dict[Path, float] = {}  # the heartbeat of each owner when it was first seen
        while True:
            held = self._held()
            heartbeat = _mtime(held) if held else None
            if held is None:
                self._make()
            elif heartbeat is None:
                continue  # renamed meanwhile
            elif held.name == _FREE:
                if _rename(held, mine):
                    return mine
            else:
                owner = self._owner_of(held, heartbeat)
                if why_dead := owner.why_dead(dead_after_s):
                    if _rename(held, mine):
                        print(f"{self._root} was held by {owner}, which {why_dead}: taken over", flush=True)
                        return mine
                    continue
                if held not in first and not owner.is_here:
                    print(f"{self._root} was last held by {owner}; waiting to see whether it lives", flush=True)
                lives = heartbeat > first.setdefault(held, heartbeat) or owner.is_here
                if lives and time.monotonic() - began > patience_s:
                    raise UserError(
                        f"Another job is training into {self._root} ({owner}; last heard of {owner.age_s:.0f} s ago). "
                        "Wait for it, cancel it with launch/cancel.py, or give this run a folder of its own with --run."
                    )
                time.sleep(0.1 if owner.is_here else 0.5)

    def beat(self, mine: Path, stop: threading.Event, every_s: float) -> None:
        """Let hear of this process until it is told to stop; a thread's task. Ends the process if the lock is lost."""
        while not stop.wait(every_s):
            try:
                os.utime(mine)
            except FileNotFoundError:
                print(
                    f"error: {self._root} has gone to {self.owner() or 'nobody'}, because this process was not heard "
                    "of for too long. It ends, and writes nothing more.",
                    flush=True,
                )
                os._exit(1)
            except OSError:
                continue  # a file system that is away for a while

    def free(self, mine: Path) -> None:
        with suppress(FileNotFoundError):
            os.rename(mine, self._folder / _FREE)

    def owner(self) -> Owner | None:
        held = self._held()
        heartbeat = _mtime(held) if held else None
        if held is None or heartbeat is None or held.name == _FREE:
            return None
        return self._owner_of(held, heartbeat)

    def _held(self) -> Path | None:
        """The one file there is; None before it is made."""
        try:
            # Listed, not looked up: NFS asks the server when a folder is opened.
            names = os.listdir(self._folder)
        except FileNotFoundError:
            return None
        return self._folder / max(names, key=lambda name: name != _FREE) if names else None

    def _owner_of(self, held: Path, heartbeat: float) -> Owner:
        age_s = max(0.0, self._clock() - heartbeat)
        try:
            host, machine, pid, job, _ = held.name.split(",")
            return Owner(host, machine, int(pid), job, age_s)
        except ValueError:
            return Owner(held.name, "", 0, "", age_s)

    def _clock(self) -> float:
        """The time as the file system sees it, from a file touched now; where none can be written, this machine's."""
        probe = self._root / f".clock.{secrets.token_hex(4)}"
        try:
            probe.touch()
            os.utime(probe)
            return probe.stat().st_mtime
        except OSError:
            return time.time()
        finally:
            with suppress(OSError):
                probe.unlink()

    def _make(self) -> None:
        """RUN/.owner, free. Of several processes one makes it: a folder with something in it is not renamed over."""
        aside = self._root / f".owner.{secrets.token_hex(4)}"
        aside.mkdir()
        (aside / _FREE).touch()
        try:
            os.rename(aside, self._folder)
        except OSError:
            shutil.rmtree(aside, ignore_errors=True)
            if self._held() is None:
                raise


def _rename(held: Path, mine: Path) -> bool:
    """Whether the lock is this process's now."""
    with suppress(FileNotFoundError):  # another was faster
        os.utime(held)  # before it is renamed: nobody may see a new owner with the old one's heartbeat
        os.rename(held, mine)
    return mine.exists()  # on NFS an error may be that of a request repeated after it had succeeded


def append_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Add objects to a .jsonl file: all, or on a full disk none. A line that a kill has torn stays by itself.

    Raises:
        OSError: they cannot be written.
    """
    # No buffer: what a failed flush leaves in one would be written at close, after the cut.
    with open(path, "ab+", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        torn = file.read() not in (b"", b"\n")
        data = ("\n" * torn + "".join(json.dumps(line) + "\n" for line in lines)).encode()
        try:
            while data:
                data = data[file.write(data) :]
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


def process_runs(pid: int) -> bool:
    """Whether there is such a process on this machine; one that only waits for its parent to notice its end is gone."""
    try:
        os.kill(pid, 0)
        # pid (command) state …
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except PermissionError:
        return True  # another user's
    except (ProcessLookupError, FileNotFoundError):
        return False


@functools.cache
def _this_machine() -> str:
    """Tells apart machines of one name, boots of one machine, and containers that number processes for themselves."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    return hashlib.sha256((boot + os.readlink("/proc/self/ns/pid")).encode()).hexdigest()[:12]


def _mtime(path: Path) -> float | None:
    """None if it is not there. Opened, because that is when NFS asks the server for a file's times."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        return os.fstat(descriptor).st_mtime
    finally:
        os.close(descriptor)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container that knows no names
        return f"user {os.getuid()}"


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
