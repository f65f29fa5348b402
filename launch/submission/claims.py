"""Claims on run folders: a folder is removed only by the command that made it, and only while no other command uses it.

Two commands may plan the same new run at once. One of them makes the folder, by renaming one that it made aside:

    RUN/.claims/HOST-PID-1a2b3c     one file for each command that uses the folder and has not recorded its job yet
    RUN/.removing-HOST-PID/         .claims, renamed by the maker whose job was refused; other commands wait

A maker that is refused closes the folder by that rename. If it holds no other claim, and nothing else shows that the
run is in use, the whole folder is renamed away and deleted; otherwise it stays. No command removes a folder without
.claims: it existed before, or one of its jobs has been accepted.
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
from cfmask.runs import RunFolder, flag_of
from cfmask.runtime.machine import aside_of, is_abandoned, process_runs
from launch.state.facts import read_jobs

_CLAIMS, _REMOVING = ".claims", ".removing-"
_REMOVED_WITHIN_S = 20.0
_NAME_MAX = 255
_FRESH = {"recipe.json", "evaluation.json", "jobs", "code", ".owner"}
"""Everything that a command writes before its job is accepted."""


@dataclass(frozen=True)
class Claim:
    """A command's use of a run folder."""

    run: RunFolder
    mark: Path | None = None
    """The command's file in RUN/.claims; None if no command may remove the folder."""
    made: bool = False
    """Whether this command made the folder."""

    def keep(self) -> None:
        """The job is recorded in the folder, which stays from now on."""
        if self.mark is not None:
            self.mark.unlink(missing_ok=True)
            with suppress(OSError):  # other commands have claims, or the folder is gone
                self.mark.parent.rmdir()

    def abandon(self) -> None:
        """No job was accepted: remove the folder if this command made it and no other one uses it."""
        if self.mark is None:
            return
        self.mark.unlink(missing_ok=True)
        if not self.made:
            return
        root, closed = self.run.root, self.run.root / f"{_REMOVING}{_process()}"
        try:
            os.rename(self.mark.parent, closed)
        except FileNotFoundError:
            return  # a job of another command was accepted
        if any(closed.iterdir()) or _in_use(self.run):
            os.rename(closed, self.mark.parent)
            return
        removed = aside_of(root)
        os.rename(root, removed)
        shutil.rmtree(removed)


def check_path(folder: Path) -> None:
    """Check that a job can have its files in a folder with this path.

    Raises:
        UserError: sbatch, srun or submitit would change the path, or no file system accepts it.
    """
    path = str(folder)
    odd = sorted({c for c in path if c in "%\\" or not c.isprintable()})
    if odd:
        raise UserError(
            f"The path {path!r} contains {' and '.join(map(repr, odd))}. Slurm replaces % in the names of logs, drops "
            "backslashes, and does not accept control characters. Give another folder."
        )
    too_long = [part for part in folder.parts if len(part.encode()) > _NAME_MAX]
    if too_long:
        raise UserError(
            f"The name {too_long[0][:40]}… has {len(too_long[0].encode())} bytes; file systems accept {_NAME_MAX}. "
            "Give a shorter one."
        )


def check_folder(run: RunFolder, work: Recipe | Evaluation) -> None:
    """``check_path``, and that the folder could be made for this work, or is its own; nothing is written.

    Raises:
        UserError: it could not, belongs to other work, or contains other files.
    """
    check_path(run.root)
    nearest = next(path for path in (run.root, *run.root.parents) if os.path.lexists(path))
    if not (run.results.exists() or (nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK))):
        why = "it is not writable" if nearest.is_dir() else "it is no folder"
        raise UserError(f"The folder {run.root} cannot be made in {nearest}: {why}. Check {flag_of(work)}.")
    run.check_free_for(work)


def take_folder(run: RunFolder, work: Recipe | Evaluation) -> Claim:
    """Make the folder, or check that it is for this work, and claim it for this command.

    Raises:
        UserError: The folder belongs to other work, cannot be written, or is being removed by a command that does not
            end.
    """
    check_path(run.root)
    try:
        claim = _claim(run)
    except OSError as error:
        raise UserError(f"The folder {run.root} cannot be written: {error.strerror}. Check {flag_of(work)}.") from error
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
        with suppress(FileNotFoundError):
            mark.touch(exist_ok=False)
            return Claim(run, mark)
        closed = next(run.root.glob(f"{_REMOVING}*"), None)
        if closed is None:
            if run.root.exists() and not claims.exists():
                return Claim(run)
        elif _is_left_behind(closed):
            with suppress(FileNotFoundError):
                os.rename(closed, claims)
        elif time.monotonic() > deadline:
            raise UserError(
                f"{run.root} is being removed by a command that was refused ({closed.name.removeprefix(_REMOVING)}) "
                f"and does not end. If that command no longer runs, remove {closed} and repeat this one."
            )
        else:
            time.sleep(0.05)


def _make(root: Path, mark: Path) -> bool:
    """Make the folder with ``mark`` in it; False if another command was faster."""
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
    """Remove what commands left beside this folder that were killed while they made or removed it."""
    for path in root.parent.glob(f".{glob.escape(root.name)}.*.part"):
        with suppress(OSError):
            if is_abandoned(path, now=root.stat().st_mtime):
                shutil.rmtree(path)


def _in_use(run: RunFolder) -> bool:
    names = {path.name for path in run.root.iterdir() if not path.name.startswith(_REMOVING)}
    if names - _FRESH or (run.root / "jobs/submissions.jsonl").exists() or run.owner() is not None:
        return True
    jobs = read_jobs(run)  # jobs that Slurm has accepted, or may have
    return bool(jobs.slurm or jobs.unconfirmed)


def _process() -> str:
    return f"{socket.gethostname()}-{os.getpid()}"


def _is_left_behind(closed: Path) -> bool:
    """Whether the command that started to remove the folder was killed on this machine."""
    host, _, pid = closed.name.removeprefix(_REMOVING).rpartition("-")
    return host == socket.gethostname() and pid.isdigit() and not process_runs(int(pid))
