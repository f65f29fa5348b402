"""Who may remove a run folder again: the command that made it, and only while no other command uses it.

Two commands may plan the same new run at once. One makes the folder, by renaming one that was made aside:

    RUN/.claims/HOST-PID-1a2b3c     a file for each command that uses the folder, and has not noted its job yet
    RUN/.removing-HOST-PID/         .claims, renamed by the maker whose job was refused: who comes now waits

A maker that is refused closes the folder by that rename. If nobody else's claim was in there, and nothing shows that
the run is in use, the whole folder is renamed away and deleted; otherwise it stays. A folder without .claims was there
before, or has had a job accepted: no command removes it.
"""

from __future__ import annotations

import glob
import os
import secrets
import shutil
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cfmask.errors import UserError
from cfmask.evaluation_spec import Evaluation
from cfmask.recipe import Recipe
from cfmask.runs import RunFolder
from cfmask.runtime.machine import aside_of, is_abandoned, process_runs
from launch.state.facts import read_jobs

_CLAIMS, _REMOVING = ".claims", ".removing-"
_REMOVED_WITHIN_S = 20.0
_NAME_MAX = 255
_FRESH = {"recipe.json", "evaluation.json", "jobs", "code", ".owner"}
"""All that a command writes before its job is accepted."""


@dataclass(frozen=True)
class Claim:
    """A command's use of a run folder.

    mark: its file in RUN/.claims; None if the folder cannot be removed by any command.
    made: this command made the folder.
    """

    run: RunFolder
    mark: Path | None = None
    made: bool = False

    def keep(self) -> None:
        """The job is noted in the folder, which stays from now on."""
        if self.mark is not None:
            self.mark.unlink(missing_ok=True)
            with suppress(OSError):  # others have claims, or the folder is gone
                self.mark.parent.rmdir()

    def abandon(self) -> None:
        """No job was accepted: remove the folder, if this command made it and nobody else uses it."""
        if self.mark is None:
            return
        self.mark.unlink(missing_ok=True)
        if not self.made:
            return
        root, closed = self.run.root, self.run.root / f"{_REMOVING}{_process()}"
        try:
            os.rename(self.mark.parent, closed)
        except FileNotFoundError:
            return  # another command has had its job accepted
        if any(closed.iterdir()) or _in_use(self.run):
            os.rename(closed, self.mark.parent)
            return
        removed = aside_of(root)
        os.rename(root, removed)
        shutil.rmtree(removed)


def check_path(folder: Path) -> None:
    """Whether a job can have its files in a folder of this path.

    Raises:
        UserError: sbatch, srun or submitit would take its name for something else, or no file system takes it.
    """
    text = str(folder)
    odd = sorted({c for c in text if c in "%\\" or not c.isprintable()})
    if odd:
        raise UserError(
            f"The path {text!r} has {' and '.join(map(repr, odd))} in it. Slurm replaces % in the names of logs, drops "
            "backslashes, and takes no control characters. Give another folder."
        )
    too_long = [part for part in folder.parts if len(part.encode()) > _NAME_MAX]
    if too_long:
        raise UserError(
            f"The name {too_long[0][:40]}… has {len(too_long[0].encode())} bytes; file systems take {_NAME_MAX}. Give "
            "a shorter one."
        )


def take_folder(run: RunFolder, work: Recipe | Evaluation) -> Claim:
    """Make the folder, or see that it is for this work, and say that this command uses it.

    Raises:
        UserError: it belongs to other work, cannot be written, or is being removed by a command that does not end.
    """
    check_path(run.root)
    try:
        claim = _claim(run)
    except OSError as error:
        flag = "--run" if isinstance(work, Recipe) else "--out"
        raise UserError(f"The folder {run.root} cannot be written: {error.strerror}. Check {flag}.") from error
    try:
        run.claim(work)
    except BaseException:
        claim.abandon()
        raise
    return claim


def _claim(run: RunFolder) -> Claim:
    claims = run.root / _CLAIMS
    mark = claims / f"{_process()}-{secrets.token_hex(3)}"
    deadline = time.monotonic() + _REMOVED_WITHIN_S
    while True:
        if not run.root.exists() and _make(run.root, mark):
            _remove_abandoned(run.root)
            return Claim(run, mark, made=True)
        try:
            mark.touch(exist_ok=False)
            return Claim(run, mark)
        except FileNotFoundError:
            pass
        closed = next(run.root.glob(f"{_REMOVING}*"), None)
        if closed is None:
            if run.root.exists() and not claims.exists():
                return Claim(run)
        elif _is_left_behind(closed):
            with suppress(FileNotFoundError):
                os.rename(closed, claims)
        elif time.monotonic() > deadline:
            raise UserError(
                f"{run.root} is being removed by a command that was refused ({closed.name.removeprefix(_REMOVING)}), "
                f"and does not end. If it does not run any more, remove {closed} and give this command again."
            )
        else:
            time.sleep(0.05)


def _make(root: Path, mark: Path) -> bool:
    """Whether this call has made the folder, with ``mark`` in it."""
    root.parent.mkdir(parents=True, exist_ok=True)
    aside = aside_of(root)
    (aside / _CLAIMS).mkdir(parents=True)
    (aside / _CLAIMS / mark.name).touch()
    try:
        os.rename(aside, root)
        return True
    except OSError:
        shutil.rmtree(aside)
        if not root.exists():
            raise
        return False


def _remove_abandoned(root: Path) -> None:
    """Remove what commands that were killed while they made or removed this folder have left beside it."""
    for path in root.parent.glob(f".{glob.escape(root.name)}.*.part"):
        with suppress(OSError):
            if is_abandoned(path, now=root.stat().st_mtime):
                shutil.rmtree(path)


def _in_use(run: RunFolder) -> bool:
    names = {path.name for path in run.root.iterdir() if not path.name.startswith(_REMOVING)}
    if names - _FRESH or (run.root / "jobs/submissions.jsonl").exists() or run.owner() is not None:
        return True
    jobs = read_jobs(run)  # one that Slurm has accepted, or may have
    return bool(jobs.slurm or jobs.unconfirmed)


def _process() -> str:
    return f"{socket.gethostname()}-{os.getpid()}"


def _is_left_behind(closed: Path) -> bool:
    """Whether the command that began to remove the folder was killed on this machine."""
    host, _, pid = closed.name.removeprefix(_REMOVING).rpartition("-")
    return host == socket.gethostname() and pid.isdigit() and not process_runs(int(pid))
