"""Sends the history of a run to Weights & Biases (--wandb), from the files of its run folder.

    python launch/notification/wandb_sender.py RUN [ENTITY/]PROJECT      sends what is missing, by hand

In a job this is a process of its own beside rank 0 (launch/ranks/beside_rank_0.py): training does not wait for it, and
continues without it if it fails or hangs. Its only source is log.jsonl, with TensorBoard's names of curves. A start
that is killed repeats steps, so only steps before a committed checkpoint are sent, and the rest when the run has
finished. All starts of a run folder are one run of W&B.

    RUN/wandb.json              by project: the id of the W&B run, and the last step that was sent
    RUN/wandb/                  files of the wandb package
      offline-run-TIME-ID/      of offline mode: `wandb sync RUN/wandb` uploads them in order, as one run

**Each step is sent once, however this process ends.** Online, W&B reports its last step at the start. Offline, wandb
keeps the last 32 KiB of a folder in memory. So steps are written only at the start and at the end of this process, each
time into a new folder, which counts once wandb has closed it. A folder that does not count is removed, and its steps
are written again.

If W&B does not answer or there is no API key, this logs a warning and the start is offline. The next start is online
again if the folders have been synced by then, because their steps come before its own. After an online start that was
killed, only W&B knows which steps it has: then steps wait in log.jsonl until it answers.
"""

from __future__ import annotations

import importlib.util
import json
import logging
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

from cfmask.errors import UserError
from cfmask.log_lines import curves_of, top1_of
from cfmask.presets import preset_of
from cfmask.recipe import Recipe
from cfmask.runs import RunFolder
from cfmask.runtime.command import CommandParser, exits_cleanly
from cfmask.runtime.files import sync, write_atomically
from cfmask.runtime.jsonl import read_lines, read_object
from cfmask.runtime.lock import PATIENCE_S, FolderLock, LockHeld
from cfmask.runtime.logging import log_to_job
from cfmask.runtime.machine import node_name
from cfmask.secrets import mask_secrets
from launch.restarts.of_run import counted_images
from launch.state.facts import read_state

logger = logging.getLogger("launch.notification.wandb_sender")  # also where this module is __main__

VARIABLE = "CFMASK_WANDB"
"""Environment variable of a job that holds its project."""
UNTIL_EOF = "--until-eof"
"""Flag of this program: send until standard input is closed."""

_LOOK_S = 10.0
"""Between two looks for a new checkpoint."""
_INIT_S = 60
"""Within which W&B has to answer at the start."""
_LOCK_S = 300.0
"""How long to wait for another sender of the run, for example one whose node was lost."""
_ENVIRONMENT = {
    "WANDB_SILENT": "true",
    "WANDB_CONSOLE": "off",
    "WANDB_DISABLE_GIT": "true",
    "WANDB_DISABLE_CODE": "true",
    "WANDB__DISABLE_STATS": "true",
    "WANDB__SAVE_REQUIREMENTS": "false",
}
"""Settings of wandb, unless the environment has them. wandb would record this process instead of the run."""

HistoryRow = tuple[int, dict[str, float]]
"""A step, and the values of all curves at this step."""


@dataclass
class SyncState:
    """What RUN/wandb.json has for a project.

    id: of the W&B run.
    sent: the last step that is in W&B, or in a folder that counts.
    folders: the folders of offline mode that count, in order.
    unconfirmed: a start has been online since ``sent`` was written, and may have sent more.
    finished: the results were sent.
    """

    id: str
    sent: int = 0
    folders: tuple[str, ...] = ()
    unconfirmed: bool = False
    finished: bool = False


def is_installed() -> bool:
    """Whether this Python has the package. A folder with that name in the working directory does not count."""
    found = importlib.util.find_spec("wandb")
    return found is not None and found.origin is not None


class Sender:
    """Sends one run to one project. The process must hold the lock of RUN/wandb."""

    def __init__(self, run: RunFolder, project: str, has_ended: Callable[[float], bool]) -> None:
        """has_ended: waits so many seconds, and returns whether the run's start has ended."""
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
                _log(
                    logging.WARNING,
                    f"{unsynced} in {self._run.root / 'wandb'} is not synced, so this start is offline too",
                )
            elif self._send_online():
                return
        self._send_offline()

    # --- online

    def _send_online(self) -> bool:
        """Send online until the start has ended; whether W&B has answered."""
        try:
            wandb_run = self._init("online")
        except Exception as error:
            _teardown()
            _log(logging.WARNING, f"cannot be reached, so this start is offline: {_one_line(error)}")
            return False
        _log(logging.INFO, f"{'resumed' if wandb_run.resumed else 'new run'} {self._key}, id {self.state.id}")
        self.state.sent = max(0, wandb_run.step - 1) if wandb_run.resumed else 0
        self.state.unconfirmed = True
        self._save()
        ended = False
        while not ended:
            ended = self._has_ended(_LOOK_S)
            for step, row in self._rows():
                wandb_run.log(row, step=step, commit=True)
                self.state.sent = step
        self._finish(wandb_run, resumes=self._comes_back())
        self.state.unconfirmed = False
        self._save()
        return True

    # --- offline

    def _send_offline(self) -> None:
        if self.state.unconfirmed:
            _log(logging.WARNING, "which steps it has is not known: they wait in log.jsonl until it answers")
            return
        try:
            self._write_folder(resumes=True)
        except Exception as error:
            _log(logging.WARNING, f"the history could not be sent, and is tried again at the end: {_one_line(error)}")
        while not self._has_ended(3600):
            pass
        if not self._comes_back():  # else the next start writes what is missing
            self._write_folder(resumes=False)

    def _write_folder(self, *, resumes: bool) -> None:
        """Write what was not sent into a new folder. resumes: the run has not ended."""
        self._remove_incomplete()
        rows, results = self._rows(), self._results()
        if not rows and (results is None or self.state.finished):
            return
        self._wait_for_new_name()
        wandb_run = self._init("offline")
        file = Path(wandb_run.settings.sync_file)
        for step, row in rows:
            wandb_run.log(row, step=step, commit=True)
        self._finish(wandb_run, resumes=resumes)
        if file.stat().st_size < sum(len(name) for _, row in rows for name in row):  # wandb does not report a full disk
            raise OSError(f"{file} was not written to its end")
        with open(file, "rb") as written:
            os.fsync(written.fileno())
        sync(file.parent)
        self.state.sent = rows[-1][0] if rows else self.state.sent
        self.state.folders = (*self.state.folders, file.parent.name)
        self._save()
        _log(
            logging.INFO,
            f"steps up to {self.state.sent} are in {file.parent}; `wandb sync {file.parents[1]}` uploads them",
        )

    def _folders(self) -> list[Path]:
        return sorted((self._run.root / "wandb").glob(f"offline-run-*-{self.state.id}"))

    def _unsynced(self) -> str | None:
        """The name of a folder that counts and was not uploaded; None if there is none."""
        for folder in self._folders():
            if folder.name in self.state.folders and not list(folder.glob("*.synced")):
                return folder.name
        return None

    def _remove_incomplete(self) -> None:
        for folder in self._folders():
            if folder.name not in self.state.folders:
                shutil.rmtree(folder)

    def _wait_for_new_name(self) -> None:
        """wandb names a folder after the second at which it is created."""
        while any(time.strftime("run-%Y%m%d_%H%M%S-") in folder.name for folder in self._folders()):
            time.sleep(0.1)

    # --- what is sent

    def _rows(self) -> list[HistoryRow]:
        """What was not sent, up to the committed checkpoint; of a finished run, to its end."""
        found: dict[int, dict[str, float]] = {}
        committed = self._committed()  # before log.jsonl is read, whose lines are written before their checkpoint
        if committed is not None and committed <= self.state.sent:
            return []
        for line in read_lines(self._run.log):
            step = line.get("step")
            if isinstance(step, int) and self.state.sent < step and (committed is None or step <= committed):
                found.setdefault(step, {}).update(curves_of(line))
        return sorted(found.items())

    def _committed(self) -> int | None:
        """The step from which a start would resume; None: the run has finished."""
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
        """Begin a run of wandb, with recipe and tags. Raises what wandb raises."""
        import wandb

        work = self._run.work()
        if isinstance(work, Recipe):
            tags = [preset_of(work) or work.method.row]
        else:
            tags = ["evaluation", work.make]
        wandb_run = wandb.init(
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
        wandb_run.config.update(json.loads(mask_secrets(work.to_json())), allow_val_change=True)
        return wandb_run

    def _finish(self, wandb_run: Any, *, resumes: bool) -> None:
        """End a run of wandb, and wait until it is written or uploaded. resumes: the training run has not ended."""
        results = self._results()
        if results is not None:
            wandb_run.summary.update({"results": top1_of(results)})
        elif resumes:
            wandb_run.mark_preempting()
        wandb_run.finish(exit_code=0 if results is not None else 1)
        _teardown()
        self.state.finished = results is not None

    def _save(self) -> None:
        kept = read_object(self._path) or {}
        write_atomically(self._path, json.dumps({**kept, self._key: asdict(self.state)}, indent=2))


def _teardown() -> None:
    """Wait until wandb's own process has ended."""
    import wandb

    wandb.teardown()


def _log(level: int, text: str) -> None:
    logger.log(level, f"W&B: {mask_secrets(text)}")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _stdin_is_closed(seconds: float) -> bool:
    return bool(select.select([sys.stdin], [], [], seconds)[0]) and not os.read(sys.stdin.fileno(), 1)


@exits_cleanly
def main(argv: list[str] | None = None) -> int:
    parser = CommandParser(__doc__)
    parser.add_argument(UNTIL_EOF, action="store_true", help="send until standard input is closed, as in a job")
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("project", metavar="[ENTITY/]PROJECT")
    arguments = parser.parse_args(argv)
    if arguments.until_eof:
        log_to_job(0, node_name())
    run = RunFolder(arguments.run.resolve())
    if not is_installed():
        _log(
            logging.WARNING,
            f"the package wandb is not installed for {sys.executable}: nothing is sent. Install it with pip.",
        )
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
        _log(
            logging.WARNING,
            f"the history could not be sent: {type(error).__name__}: {_one_line(error)}. Training continues; "
            "what is missing is sent by the next start, or by launch/notification/wandb_sender.py",
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
