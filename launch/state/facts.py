"""What there is to know about runs: what their folders say, and what Slurm says about their jobs.

    found, slurm = look_at(runs)          all of it, with one squeue and at most one sacct
    run_state = read_state(run)           a folder alone

What it means is judged in ``run_status.py``. Nothing here needs torch.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from cfmask.errors import UserError
from cfmask.runs import RunFolder
from cfmask.runtime.jsonl import read_lines
from cfmask.runtime.lock import Owner
from launch.slurm import queue as of_slurm
from launch.slurm.client import SlurmError
from launch.slurm.queue import SacctRecord, SlurmJob
from launch.slurm.states import is_pending
from launch.slurm.submission import submitted
from launch.state.processes import is_controller

T = TypeVar("T")

_ANSWER_S = 20.0
"""How long one of Slurm's commands may take: whoever asks for a status waits for it."""
_MARKS = ("recipe.json", "evaluation.json", "attempts.jsonl", "log.jsonl", "checkpoints")
"""One of these makes a run folder."""


@dataclass(frozen=True)
class SlurmAnswers:
    """What Slurm says about the jobs of runs.

    queue: those that are not over, by id; None if Slurm cannot be asked.
    history: starts of the others, in order; empty where there is no accounting.
    """

    queue: Mapping[str, SlurmJob] | None = None
    history: tuple[SacctRecord, ...] = ()


@dataclass(frozen=True)
class Jobs:
    """What was ever submitted.

    slurm: ids, the latest last.
    unconfirmed: batch scripts of which it is not known whether Slurm has accepted them.
    controller: the process on this machine that looks after the ranks of the local executor.
    any: whether anything was.
    """

    slurm: tuple[str, ...] = ()
    unconfirmed: tuple[Path, ...] = ()
    controller: int | None = None
    any: bool = False


@dataclass(frozen=True)
class RunState:
    """What a run folder says.

    finished: it has its results.
    cancelled: who cancelled it, and when.
    attempts: a line a start.
    ended: why and when the latest start ended, if it said so.
    owner: who trains, if it lives.
    last: log.jsonl's last line with a rate.
    notes: what could not be read.
    """

    run: RunFolder
    finished: bool
    cancelled: dict[str, Any] | None
    attempts: list[dict[str, Any]]
    ended: dict[str, Any] | None
    owner: Owner | None
    last: dict[str, Any]
    saved_step: int
    jobs: Jobs
    notes: tuple[str, ...]

    @property
    def step(self) -> int | None:
        step = max(self.last.get("step", 0), self.saved_step)
        began = any(isinstance(attempt.get("from_step"), int) for attempt in self.attempts)
        return step if step or began else None

    @property
    def last_job(self) -> str | None:
        """The one of the latest start that was recorded: 12, or 12_3."""
        return str(self.attempts[-1].get("job")).rpartition("-")[0] if self.attempts else None

    @property
    def says_it_ended(self) -> bool:
        """Whether the folder itself says that the job that was submitted last has ended and was not to come back. Slurm
        may have requeued it all the same: of a preempted job, say."""
        why = str(self.ended["why"]) if self.ended else ""
        submitted = self.jobs.slurm[-1] if self.jobs.slurm else self.last_job
        return bool(why) and not self.jobs.unconfirmed and self.last_job == submitted and not self.comes_back

    @property
    def comes_back(self) -> bool:
        """Whether the latest start ended in order to be repeated."""
        why = str(self.ended["why"]) if self.ended else ""
        back = "requeue" in why or why.startswith("lost a rank") or "starts again" in why or "resumes the run" in why
        return back and "given up" not in why


def find_runs(paths: Sequence[Path]) -> list[RunFolder]:
    """Run folders among the paths, and right below those that are folders of runs.

    Raises:
        UserError: there is none at a path, or it cannot be read.
    """
    runs: list[RunFolder] = []
    for path in paths or [Path("runs")]:
        try:
            if _is_run(path):
                found = [path]
            else:
                found = sorted(child for child in path.iterdir() if child.is_dir() and _is_run(child))
        except OSError as error:
            hint = "Check the path." if paths else "Name run folders, or call this where they were submitted from."
            raise UserError(f"{path} cannot be read: {error.strerror}. {hint}") from error
        if not found:
            raise UserError(
                f"{path} is neither a run folder nor a folder of runs: no recipe.json in it or right below."
            )
        runs += [RunFolder(each) for each in found]
    return runs


def _is_run(path: Path) -> bool:
    return any((path / mark).exists() for mark in _MARKS)


def look_at(runs: Sequence[RunFolder], *, history: bool = False) -> tuple[list[RunState], SlurmAnswers]:
    """All there is to know about runs, with one call of squeue and at most one of sacct for all of them.

    Args:
        history: ask also how earlier starts of jobs have ended.
    """
    found = [_with_accepted(read_state(run)) for run in runs]
    queue = ask_queue(sorted({job for each in found if not each.finished for job in each.jobs.slurm}))
    if queue is None:
        return found, SlurmAnswers()
    silent: set[str] = set()
    for run_state in found:
        waits = any(job in queue for job in run_state.jobs.slurm)
        if history or not (run_state.finished or waits or run_state.ended or run_state.owner):
            silent.update(run_state.jobs.slurm)
    return found, SlurmAnswers(queue, _ask_history(sorted(silent)))


def _with_accepted(run_state: RunState) -> RunState:
    """The same, with the jobs that Slurm has accepted and sbatch has not confirmed among the others."""
    if run_state.finished or not run_state.jobs.unconfirmed:
        return run_state
    try:
        accepted = accepted_jobs(run_state.run, run_state.jobs, patience_s=0)
    except SlurmError:
        return run_state
    jobs = replace(run_state.jobs, slurm=(*run_state.jobs.slurm, *accepted), any=True) if accepted else run_state.jobs
    return replace(run_state, jobs=jobs)


def read_state(run: RunFolder) -> RunState:
    """What a folder says, whatever state it is in."""
    notes: list[str] = []

    def tried(read: Callable[[], T], otherwise: T) -> T:
        try:
            return read()
        except (OSError, UserError) as error:
            notes.append(" ".join(str(error).split()))
            return otherwise

    def work() -> None:
        run.work()

    def attempts() -> list[dict[str, Any]]:
        lines = read_lines(run.attempts)
        if run.attempts.exists() and len(lines) < _lines_in(run.attempts):
            notes.append(f"{run.attempts.name} has a torn line")
        return lines

    def last() -> dict[str, Any]:
        return ([line for line in read_lines(run.log, tail=1 << 16) if _whole(line)] or [{}])[-1]

    def owner() -> Owner | None:
        found = run.owner()
        return None if found is None or found.why_dead() else found

    tried(work, None)
    starts: list[dict[str, Any]] = tried(attempts, [])
    jobs = tried(lambda: read_jobs(run, starts), Jobs())
    return RunState(
        run=run,
        finished=tried(run.results.exists, False),
        cancelled=tried(run.cancelled, None),
        attempts=starts,
        ended=tried(run.ended, None),
        owner=tried(owner, None),
        last=tried(last, {}),
        saved_step=tried(run.saved_step, 0),
        jobs=jobs,
        notes=tuple(dict.fromkeys(notes)),
    )


def _lines_in(path: Path) -> int:
    return sum(bool(line.strip()) for line in path.read_bytes().splitlines())


def read_jobs(run: RunFolder, attempts: Sequence[dict[str, Any]] = ()) -> Jobs:
    """From what submitit leaves: a pickle a job, and on Slurm a script a job, or one for an array (12, with jobs 12_0,
    12_1 …). A sweep has those of its array in its own folder, and links to them in the run folders unless it was killed
    on the way.

    Raises:
        OSError: the folder cannot be read.
    """
    folder = run.root / "jobs"
    links = sweep_links(run)
    pickles, scripts = (
        {path.name.removesuffix(end): path.lstat().st_mtime for path in folder.glob(f"*{end}")}
        for end in ("_submitted.pkl", "_submission.sh")
    )
    of_sweeps = {
        f"{path.name.partition('_')[0]}_{link.name}": path.lstat().st_mtime
        for link in links
        for path in link.parent.glob("*_submission.sh")
    }
    begun = {str(attempt.get("job")).rpartition("-")[0] for attempt in attempts}
    members = {
        job: pickles.get(job, of_sweeps.get(job, 0.0))
        for job in pickles.keys() | begun | of_sweeps.keys()
        if re.fullmatch(r"\d+_\d+", job)
    }
    alone = {job: when for job, when in scripts.items() if job.isdigit() and f"{job}_0" not in pickles}
    local = [int(job) for job in pickles if job.isdigit() and job not in scripts]
    sent = [path for each in (folder, *(link.parent for link in links)) for path in each.glob(".submission_file_*.sh")]
    submitted = alone | members
    return Jobs(
        slurm=tuple(sorted(submitted, key=lambda job: submitted[job])),
        unconfirmed=tuple(path for path in sent if not path.is_symlink()),  # of one that was accepted it is a link
        controller=next((pid for pid in local if is_controller(pid, folder)), None),
        any=bool(pickles or members),
    )


def sweep_links(run: RunFolder) -> list[Path]:
    """Where sweeps have this run as a member: .sweeps/NAME/NUMBER."""
    root = run.root.resolve()
    found: list[Path] = []
    for sweep in (run.root.parent / ".sweeps").glob("*"):
        with suppress(FileNotFoundError):  # of a command that was refused
            found += _members(sweep, sweep.stat().st_mtime_ns).get(root, ())
    return found


@functools.lru_cache(maxsize=256)
def _members(sweep: Path, changed: int) -> dict[Path, list[Path]]:
    """Links in a sweep's folder by the run folders that they lead to. Read once for all of its runs.

    Args:
        changed: when the folder was, as its mtime says.
    """
    found: dict[Path, list[Path]] = {}
    for link in sweep.iterdir() if sweep.is_dir() else ():
        if link.name.isdigit() and link.is_symlink():
            found.setdefault(link.resolve(), []).append(link)
    return found


def accepted_jobs(run: RunFolder, jobs: Jobs, *, patience_s: float) -> list[str]:
    """The run's jobs of which sbatch has not said that they were accepted, and Slurm knows.

    Raises:
        SlurmError: Slurm cannot be asked.
    """
    members = {link.parent: f"_{link.name}" for link in sweep_links(run)} if jobs.unconfirmed else {}
    return [
        job + members.get(script.parent, "")
        for script in jobs.unconfirmed
        for job in submitted(script, patience_s=patience_s)
    ]


def _whole(line: dict[str, Any]) -> bool:
    return all(isinstance(line.get(name), int | float) for name in ("step", "total_steps", "samples_per_s", "eta_s"))


def ask_queue(jobs: Sequence[str]) -> dict[str, SlurmJob] | None:
    """Those of the jobs that are not over; None if Slurm cannot be asked."""
    try:
        return of_slurm.queue(jobs, patience_s=0, answer_s=_ANSWER_S)
    except SlurmError:
        return None


def _ask_history(jobs: Sequence[str]) -> tuple[SacctRecord, ...]:
    """All starts of the jobs; nothing where there is no accounting, or it does not answer."""
    try:
        return of_slurm.history(jobs, patience_s=0, answer_s=_ANSWER_S)
    except SlurmError:
        return ()


def jobs_in_queue(run_state: RunState, slurm: SlurmAnswers) -> list[SlurmJob]:
    """The run's jobs in Slurm's queue, those that run before those that wait, else in the order of their submission."""
    jobs = [slurm.queue[job] for job in run_state.jobs.slurm if job in slurm.queue] if slurm.queue else []
    return sorted(jobs, key=lambda job: is_pending(job.state))


def in_queue(run_state: RunState, slurm: SlurmAnswers) -> SlurmJob | None:
    """The run's job in Slurm's queue, one that runs before one that waits."""
    return next(iter(jobs_in_queue(run_state, slurm)), None)
