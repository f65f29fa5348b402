"""The facts about runs: what their folders say, and what Slurm says about their jobs.

    found, slurm = look_at(runs)          both, with one squeue and at most one sacct
    run_state = read_state(run)           the folder alone

``status.py`` derives the status of a run from them. Nothing here needs torch.
"""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from cfmask.checkpoint.best import EpochEnd, best_epoch_end
from cfmask.errors import UserError
from cfmask.evaluation_spec import Evaluation
from cfmask.recipe import Recipe
from cfmask.runs import RunFolder
from cfmask.runtime.jsonl import read_lines
from cfmask.runtime.lock import Owner
from cfmask.runtime.patience import impatient
from launch.slurm import queue as slurm_queue
from launch.slurm.client import SlurmError
from launch.slurm.queue import SacctRecord, SlurmJob
from launch.slurm.states import is_pending
from launch.slurm.submission import submitted
from launch.state import ends
from launch.state.processes import is_controller
from launch.state.progress import evaluations, progress_of

T = TypeVar("T")

_ANSWER_S = 20.0
"""How long one of Slurm's commands may take, because the user waits for it."""


@dataclass(frozen=True)
class SlurmAnswers:
    """What Slurm says about the jobs of runs.

    queue: pending and running jobs by id; None if Slurm does not answer.
    history: starts of other jobs, in order; empty without accounting.
    """

    queue: Mapping[str, SlurmJob] | None = None
    history: tuple[SacctRecord, ...] = ()


@dataclass(frozen=True)
class Jobs:
    """All jobs that were submitted for a run.

    slurm: ids, the latest last.
    unconfirmed: batch scripts that Slurm may or may not have accepted.
    controller: pid of the controller of a local job on this machine.
    any: whether any job was submitted.
    last_submitted: seconds since the epoch of the latest submission.
    """

    slurm: tuple[str, ...] = ()
    unconfirmed: tuple[Path, ...] = ()
    controller: int | None = None
    any: bool = False
    last_submitted: float | None = None


@dataclass(frozen=True)
class RunState:
    """What a run folder says.

    work: its recipe or evaluation; None if that cannot be read.
    created: seconds since the epoch at which the folder got its recipe; 0 if it has none.
    readable: whether the folder can be read at all.
    finished: whether it has its results.
    cancelled: who cancelled it, and when.
    attempts: lines of attempts.jsonl, one for each start.
    ended: why and when the latest start ended, if it has recorded that.
    owner: the process that trains, if it is alive.
    last: the last line of log.jsonl with a rate.
    eta_s: seconds to the end at the mean rate of the steps of the latest start; None before its first ones.
    saved_step: of the newest checkpoint.
    ends: evaluations at the ends of epochs (``progress.evaluations``).
    notes: what could not be read.
    """

    run: RunFolder
    work: Recipe | Evaluation | None
    created: float
    readable: bool
    finished: bool
    cancelled: dict[str, Any] | None
    attempts: list[dict[str, Any]]
    ended: dict[str, Any] | None
    owner: Owner | None
    last: dict[str, Any]
    eta_s: float | None
    saved_step: int
    ends: list[EpochEnd]
    jobs: Jobs
    notes: tuple[str, ...]

    @property
    def step(self) -> int | None:
        step = max(self.last.get("step", 0), self.saved_step)
        began = any(isinstance(attempt.get("from_step"), int) for attempt in self.attempts)
        return step if step or began else None

    @property
    def best(self) -> tuple[str, EpochEnd] | None:
        """The set on which the best epoch is chosen, and the best epoch so far; None before the first evaluation. Of an
        evaluation: its first set (or val), and its result."""
        if isinstance(self.work, Recipe):
            on, sets, probing = self.work.run.best_on, self.work.data.eval_sets, self.work.optim.probe_epochs or 0
        elif self.work is not None:
            on, sets, probing = None, self.work.sets, -1
        else:
            return None
        on = on or ("val" if "val" in sets else next(iter(sets), ""))
        end = best_epoch_end(self.ends, on, probing)
        return (on, end) if end else None

    @property
    def submitted(self) -> float:
        """When the run was last submitted, or its folder created, in seconds since the epoch."""
        return self.jobs.last_submitted or self.created

    @property
    def last_job(self) -> str | None:
        """The job of the latest recorded start: 12, or 12_3."""
        return str(self.attempts[-1].get("job")).rpartition("-")[0] if self.attempts else None

    @property
    def why_ended(self) -> str:
        """Why the latest start ended; "" if it has not recorded that."""
        return str(self.ended["why"]) if self.ended else ""

    @property
    def comes_back(self) -> bool:
        """Whether the latest start ended in order to be repeated."""
        return ends.comes_back(self.why_ended)

    @property
    def records_its_end(self) -> bool:
        """Whether the folder says that the latest job has ended for good. Slurm may have requeued it nevertheless, for
        example after a preemption."""
        submitted = self.jobs.slurm[-1] if self.jobs.slurm else self.last_job
        return bool(self.ended and not self.jobs.unconfirmed and self.last_job == submitted and not self.comes_back)


def matching(runs: Sequence[RunFolder], pattern: str) -> list[RunFolder]:
    """The runs whose names match a shell pattern; one without wildcards matches names that contain it.

    Raises:
        UserError: there is none.
    """
    whole = pattern if any(c in pattern for c in "*?[") else f"*{pattern}*"
    found = [run for run in runs if fnmatch.fnmatchcase(run.root.absolute().name, whole)]
    if not found:
        names = [run.root.absolute().name for run in runs]
        few = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
        raise UserError(f"--match {pattern}: no run has such a name. There are {few}.")
    return found


def look_at(runs: Sequence[RunFolder], *, history: bool = False) -> tuple[list[RunState], SlurmAnswers]:
    """The facts about runs, with one call of squeue and at most one of sacct for all of them.

    Args:
        history: also ask how earlier starts of jobs have ended.
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
    """The same, with jobs that Slurm has accepted although sbatch has not confirmed them."""
    if run_state.finished or not run_state.jobs.unconfirmed:
        return run_state
    try:
        accepted = accepted_jobs(run_state.run, run_state.jobs, patience_s=0)
    except SlurmError:
        return run_state
    jobs = replace(run_state.jobs, slurm=(*run_state.jobs.slurm, *accepted), any=True) if accepted else run_state.jobs
    return replace(run_state, jobs=jobs)


def read_state(run: RunFolder) -> RunState:
    """What a folder says. What cannot be read becomes a note."""
    with impatient():
        return _read_state(run)


def _read_state(run: RunFolder) -> RunState:
    notes: list[str] = []

    def tried(read: Callable[[], T], otherwise: T) -> T:
        try:
            return read()
        except (OSError, UserError) as error:
            notes.append(" ".join(str(error).split()))
            return otherwise

    def attempts() -> list[dict[str, Any]]:
        lines = read_lines(run.attempts)
        if run.attempts.exists() and len(lines) < _lines_in(run.attempts):
            notes.append(f"{run.attempts.name} has a torn line")
        return lines

    def owner() -> Owner | None:
        found = run.owner()
        return None if found is None or found.why_dead() else found

    work = tried(run.work, None)
    finished = tried(run.results.exists, None)
    starts: list[dict[str, Any]] = tried(attempts, [])
    jobs = tried(lambda: read_jobs(run, starts), Jobs())
    nothing: tuple[dict[str, Any], float | None] = ({}, None)
    last, eta_s = tried(lambda: progress_of(run, starts), nothing)
    return RunState(
        run=run,
        work=work,
        created=tried(
            lambda: max(_times(run.root / mark for mark in ("recipe.json", "evaluation.json")), default=0.0), 0.0
        ),
        readable=finished is not None,
        finished=bool(finished),
        cancelled=tried(run.cancelled, None),
        attempts=starts,
        ended=tried(run.ended, None),
        owner=tried(owner, None),
        last=last,
        eta_s=eta_s,
        saved_step=tried(run.saved_step, 0),
        ends=tried(lambda: evaluations(run, work, finished=bool(finished)), []),
        jobs=jobs,
        notes=tuple(dict.fromkeys(notes))[: None if finished is not None else 1],  # one cause, and not for each file
    )


def _times(paths: Iterable[Path]) -> list[float]:
    return [path.stat().st_mtime for path in paths if path.exists()]


def _lines_in(path: Path) -> int:
    return sum(bool(line.strip()) for line in path.read_bytes().splitlines())


def read_jobs(run: RunFolder, attempts: Sequence[dict[str, Any]] = ()) -> Jobs:
    """The jobs of a run, from submitit's files: a pickle for each job, and on Slurm a script for each job or array (12,
    with jobs 12_0, 12_1 …). A sweep has the files of its array in its own folder, and links in the run folders, which
    are missing if it was killed before.

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
        unconfirmed=tuple(path for path in sent if not path.is_symlink()),  # accepted ones are links
        controller=next((pid for pid in local if is_controller(pid, folder)), None),
        any=bool(pickles or members),
        last_submitted=max((*pickles.values(), *scripts.values(), *of_sweeps.values()), default=None),
    )


def sweep_links(run: RunFolder) -> list[Path]:
    """The links of sweeps to this run: .sweeps/NAME/NUMBER."""
    root = run.root.resolve()
    found: list[Path] = []
    for sweep in (run.root.parent / ".sweeps").glob("*"):
        with suppress(FileNotFoundError):  # left by a refused command
            found += _members(sweep, sweep.stat().st_mtime_ns).get(root, ())
    return found


@functools.lru_cache(maxsize=256)
def _members(sweep: Path, changed: int) -> dict[Path, list[Path]]:
    """Links in a sweep's folder by the run folders that they point to, cached for all of its runs.

    Args:
        changed: mtime of the folder.
    """
    found: dict[Path, list[Path]] = {}
    for link in sweep.iterdir() if sweep.is_dir() else ():
        if link.name.isdigit() and link.is_symlink():
            found.setdefault(link.resolve(), []).append(link)
    return found


def accepted_jobs(run: RunFolder, jobs: Jobs, *, patience_s: float) -> list[str]:
    """The run's jobs that Slurm knows although sbatch has not confirmed them.

    Raises:
        SlurmError: Slurm does not answer.
    """
    members = {link.parent: f"_{link.name}" for link in sweep_links(run)} if jobs.unconfirmed else {}
    return [
        job + members.get(script.parent, "")
        for script in jobs.unconfirmed
        for job in submitted(script, patience_s=patience_s)
    ]


def ask_queue(jobs: Sequence[str]) -> dict[str, SlurmJob] | None:
    """The pending and running ones of the jobs; None if Slurm does not answer."""
    try:
        return slurm_queue.queue(jobs, patience_s=0, answer_s=_ANSWER_S)
    except SlurmError:
        return None


def _ask_history(jobs: Sequence[str]) -> tuple[SacctRecord, ...]:
    """All starts of the jobs; none without accounting, or if it does not answer."""
    try:
        return slurm_queue.history(jobs, patience_s=0, answer_s=_ANSWER_S)
    except SlurmError:
        return ()


def jobs_in_queue(run_state: RunState, slurm: SlurmAnswers) -> list[SlurmJob]:
    """The run's jobs in Slurm's queue: running jobs first, otherwise in the order of submission."""
    jobs = [slurm.queue[job] for job in run_state.jobs.slurm if job in slurm.queue] if slurm.queue else []
    return sorted(jobs, key=lambda job: is_pending(job.state))


def in_queue(run_state: RunState, slurm: SlurmAnswers) -> SlurmJob | None:
    """The run's job in Slurm's queue; a running job comes before a pending one."""
    return next(iter(jobs_in_queue(run_state, slurm)), None)
