"""Sends the history of a run to Weights & Biases (--wandb), from the files of its run folder.

    python launch/notification/wandb_sender.py RUN [ENTITY/]PROJECT      sends what is missing, by hand

In a job this is a process of its own beside rank 0 (rank_0.py): training does not wait for it, and goes on without it
if it fails or hangs. log.jsonl is its one source, with the names of TensorBoard's curves. A start that is killed takes
steps again, so only those behind a committed checkpoint are sent, and the rest when the run has finished. All starts of
a run folder are one run of W&B.

    RUN/wandb.json              by project: the id of the run there, and the last step that was sent
    RUN/wandb/                  what wandb writes
      offline-run-TIME-ID/      of offline mode: `wandb sync RUN/wandb` uploads them in order, as one run

**Each step once, however this process ends.** Online, W&B itself says at the start which step it has last. Offline,
wandb keeps the last 32 KiB of a folder in memory. So steps are written at the start and at the end of this process
only, each time into a folder of its own, which counts when wandb has closed it. One that does not count is removed, and
its steps are written again.

W&B that does not answer, or has no API key, is a warning, and the start is offline. The next one is online again if
the folders have been synced until then: what they hold comes before its own steps. After a start that was online and
was killed, nobody but W&B knows which steps it has: then steps wait in log.jsonl until it answers.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import secrets
import select
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cfmask.curves import curves_of, top1_of
from cfmask.errors import UserError
from cfmask.files import sync, write_atomically
from cfmask.recipe import Recipe, preset_of
from cfmask.runs import RunFolder
from cfmask.runtime.command import exits_cleanly
from cfmask.runtime.jsonl import read_lines, read_object
from cfmask.runtime.lock import PATIENCE_S, FolderLock, LockHeld
from cfmask.secrets import mask_secrets
from launch.restarts.of_run import counted_images
from launch.state.facts import read_state

VARIABLE = "CFMASK_WANDB"
"""Environment variable in which a job has its project (launch/allocation/resolve.py)."""
UNTIL_EOF = "--until-eof"
"""Of this program: send until standard input is closed."""

_LOOK_S = 10.0
"""Between two looks for a new checkpoint."""
_INIT_S = 60
"""What W&B has to answer at the start."""
_LOCK_S = 300.0
"""How long another sender of the run is waited for: one whose node is lost, say."""
_ENVIRONMENT = {
    "WANDB_SILENT": "true",
    "WANDB_CONSOLE": "off",
    "WANDB_DISABLE_GIT": "true",
    "WANDB_DISABLE_CODE": "true",
    "WANDB__DISABLE_STATS": "true",
    "WANDB__SAVE_REQUIREMENTS": "false",
}
"""Settings of wandb, unless the environment has them: what it would record is this process's, not the run's."""

HistoryRow = tuple[int, dict[str, float]]
"""A step, and the points of all curves there."""


@dataclass
class SyncState:
    """What a run folder keeps of a project.

    id: of the run there.
    sent: the last step that is in W&B, or in a folder that counts.
    folders: of offline mode, in order, that count.
    unconfirmed: a start has been online since ``sent`` was written, and may have sent more.
    finished: the results were sent.
    """

    id: str
    sent: int = 0
    folders: tuple[str, ...] = ()
    unconfirmed: bool = False
    finished: bool = False


def is_installed() -> bool:
    """Whether this Python has wandb. A folder of that name in the working directory is none."""
    found = importlib.util.find_spec("wandb")
    return found is not None and found.origin is not None


class Sender:
    """Of one run and project. For the one process that holds the lock of RUN/wandb."""

    def __init__(self, run: RunFolder, project: str, has_ended: Callable[[float], bool]) -> None:
        """has_ended: waits for so many seconds, and tells whether the run's start has ended."""
        self._run, self._has_ended = run, has_ended
        self._entity, _, self._project = project.rpartition("/")
        self._key, self._path = project, run.root / "wandb.json"
        kept = (read_object(self._path) or {}).get(project)
        self.state = SyncState(**kept) if kept else SyncState(secrets.token_hex(4))

    def send(self) -> None:
        """Send until the start has ended."""
        mode = os.environ.get("WANDB_MODE") or "online"
        if mode == "disabled":
            return
        if mode not in ("offline", "dryrun"):
            if unsynced := self._unsynced():
                _say(f"{unsynced} in {self._run.root / 'wandb'} is not synced, so this start is offline too")
            elif self._send_online():
                return
        self._send_offline()

    # --- online

    def _send_online(self) -> bool:
        """Whether W&B has answered."""
        try:
            there = self._init("online")
        except Exception as error:
            _teardown()
            _say(f"cannot be reached, so this start is offline: {_one_line(error)}")
            return False
        _say(f"{'resumed' if there.resumed else 'new run'} {self._key}, id {self.state.id}")
        self.state.sent = max(0, there.step - 1) if there.resumed else 0
        self.state.unconfirmed = True
        self._save()
        ended = False
        while not ended:
            ended = self._has_ended(_LOOK_S)
            for step, row in self._rows():
                there.log(row, step=step, commit=True)
                self.state.sent = step
        self._finish(there, resumes=self._comes_back())
        self.state.unconfirmed = False
        self._save()
        return True

    # --- offline

    def _send_offline(self) -> None:
        if self.state.unconfirmed:
            _say("which steps it has is not known: they wait in log.jsonl until it answers")
            return
        try:
            self._write_folder(resumes=True)
        except Exception as error:
            _say(f"warning: the history could not be sent, and is tried again at the end: {_one_line(error)}")
        while not self._has_ended(3600):
            pass
        if not self._comes_back():  # else the next start writes what is missing
            self._write_folder(resumes=False)

    def _write_folder(self, *, resumes: bool) -> None:
        """A folder of what was not sent, if there is any. resumes: more is to come."""
        self._remove_incomplete()
        rows, results = self._rows(), self._results()
        if not rows and (results is None or self.state.finished):
            return
        self._wait_for_new_name()
        there = self._init("offline")
        file = Path(there.settings.sync_file)
        for step, row in rows:
            there.log(row, step=step, commit=True)
        self._finish(there, resumes=resumes)
        if file.stat().st_size < sum(
            len(name) for _, row in rows for name in row
        ):  # a full disk is no error of wandb's
            raise OSError(f"{file} was not written to its end")
        with open(file, "rb") as written:
            os.fsync(written.fileno())
        sync(file.parent)
        self.state.sent = rows[-1][0] if rows else self.state.sent
        self.state.folders = (*self.state.folders, file.parent.name)
        self._save()
        _say(f"steps up to {self.state.sent} are in {file.parent}; `wandb sync {file.parents[1]}` uploads them")

    def _folders(self) -> list[Path]:
        return sorted((self._run.root / "wandb").glob(f"offline-run-*-{self.state.id}"))

    def _unsynced(self) -> str | None:
        """A folder that counts and was not uploaded."""
        for folder in self._folders():
            if folder.name in self.state.folders and not list(folder.glob("*.synced")):
                return folder.name
        return None

    def _remove_incomplete(self) -> None:
        for folder in self._folders():
            if folder.name not in self.state.folders:
                shutil.rmtree(folder)

    def _wait_for_new_name(self) -> None:
        """wandb names a folder after the second."""
        while any(time.strftime("run-%Y%m%d_%H%M%S-") in folder.name for folder in self._folders()):
            time.sleep(0.1)

    # --- what is sent

    def _rows(self) -> list[HistoryRow]:
        """What is behind a committed checkpoint, or all of a run that has finished, and was not sent."""
        found: dict[int, dict[str, float]] = {}
        committed = self._committed()  # before the lines are read, which are written before a checkpoint
        if committed is not None and committed <= self.state.sent:
            return []
        for line in read_lines(self._run.log):
            step = line.get("step")
            if isinstance(step, int) and self.state.sent < step and (committed is None or step <= committed):
                found.setdefault(step, {}).update(curves_of(line))
        return sorted(found.items())

    def _committed(self) -> int | None:
        """The step that a start would resume from; None: the run has finished."""
        if self._run.results.exists():
            return None
        if not isinstance(self._run.work(), Recipe):
            return counted_images(self._run.progress)
        return max(
            (line["step"] for line in read_lines(self._run.committed) if isinstance(line.get("step"), int)), default=0
        )

    def _results(self) -> dict[str, Any] | None:
        return read_object(self._run.results)

    def _comes_back(self) -> bool:
        return read_state(self._run).comes_back

    def _init(self, mode: str) -> Any:
        """The run of wandb, with recipe and tags. Raises what wandb does."""
        import wandb

        work = self._run.work()
        if isinstance(work, Recipe):
            tags = [preset_of(work) or work.method.row]
        else:
            tags = ["evaluation", work.make]
        there = wandb.init(
            entity=self._entity or None,
            project=self._project,
            id=self.state.id,
            resume="allow",
            mode=mode,  # type: ignore[arg-type]
            dir=self._run.root,
            name=self._run.root.name,
            tags=tags,
            settings=wandb.Settings(init_timeout=_INIT_S),
        )
        there.config.update(json.loads(mask_secrets(work.to_json())), allow_val_change=True)
        return there

    def _finish(self, there: Any, *, resumes: bool) -> None:
        """End what ``_init`` has begun, and wait until wandb has written or uploaded it. resumes: the run goes on."""
        results = self._results()
        if results is not None:
            there.summary.update({"results": top1_of(results)})
        elif resumes:
            there.mark_preempting()
        there.finish(exit_code=0 if results is not None else 1)
        _teardown()
        self.state.finished = results is not None

    def _save(self) -> None:
        kept = read_object(self._path) or {}
        write_atomically(self._path, json.dumps({**kept, self._key: asdict(self.state)}, indent=2))


def _teardown() -> None:
    """Wait until wandb's own process has ended, and with it what it does."""
    import wandb

    wandb.teardown()


def _say(text: str) -> None:
    print(f"W&B: {mask_secrets(text)}", flush=True)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _stdin_is_closed(seconds: float) -> bool:
    return bool(select.select([sys.stdin], [], [], seconds)[0]) and not os.read(sys.stdin.fileno(), 1)


@exits_cleanly
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(UNTIL_EOF, action="store_true", help="send until standard input is closed, as in a job")
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("project", metavar="[ENTITY/]PROJECT")
    arguments = parser.parse_args(argv)
    run = RunFolder(arguments.run.resolve())
    if not is_installed():
        _say(f"warning: the package wandb is not there for {sys.executable}: nothing is sent. Install it with pip.")
        return 1
    run.work()  # refuses what is no run folder
    os.nice(10)
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    folder = run.root / "wandb"
    try:
        folder.mkdir(exist_ok=True)
        with FolderLock(folder).held(patience_s=_LOCK_S if arguments.until_eof else PATIENCE_S):
            Sender(run, arguments.project, _stdin_is_closed if arguments.until_eof else lambda seconds: True).send()
    except LockHeld as held:
        raise UserError(f"W&B: the history of {run.root} is being sent by {held.owner} already.") from None
    except Exception as error:
        _say(
            f"warning: the history could not be sent: {type(error).__name__}: {_one_line(error)}. Training goes on; "
            "what is missing is sent by the next start, or by launch/notification/wandb_sender.py"
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
