"""Which of the planned jobs go out: whether a run has a job already, and whose its folder is."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from cfmask.errors import UserError
from cfmask.evaluation_spec import Evaluation
from cfmask.recipe import Recipe
from cfmask.runs import RunFolder
from launch.slurm.client import SlurmError, SlurmMissing
from launch.slurm.queue import SlurmJob, queue
from launch.slurm.states import is_completing, is_pending
from launch.state.facts import Jobs, accepted_jobs, read_jobs, read_state
from launch.state.processes import controller_of, is_ending, wait_until_gone
from launch.submission.claims import Claim, take_folder

Work = TypeVar("Work", bound=Recipe | Evaluation, covariant=True)

_ASK_S = 20.0
"""How long whoever submits waits for a controller that does not answer."""


@dataclass(frozen=True)
class Planned(Generic[Work]):
    """A job that is to be submitted, and its run folder.

    claim: this command's use of the folder, from ``claim_run_folders`` on.
    behind: jobs of the run that are there already, and that have to end before this one starts.
    """

    run: RunFolder
    work: Work
    claim: Claim | None = None
    behind: tuple[str, ...] = ()


AnyPlanned = Planned[Recipe | Evaluation]


def should_skip(run: RunFolder, *, sweep: bool) -> bool:
    """Whether a run needs no job; says why.

    Raises:
        UserError: it is the only one, and has one already.
    """
    if run.results.exists():
        run.tidy()
        print(f"{run.root} is finished" + (": left out" if sweep else f":\n{run.results.read_text()}"))
        return True
    if queued := queued_job(run):
        what = f"Job {queued} is there for {run.root} already"
        if not sweep:
            root = shlex.quote(str(run.root))
            raise UserError(
                f"{what}, and goes on by itself. To change something about it, end it first: python launch/cancel.py "
                f"{root}. To queue N jobs behind it, each of which resumes the run: python launch/submit.py --resume "
                f"{root} --chain N"
            )
        print(f"{what}: left out")
        return True
    if (controller := controller_of(run)) and not is_ending(controller):
        what = f"Job {controller} on this machine is there for {run.root} already"
        if not sweep:
            raise UserError(
                f"{what}. To see its progress: python launch/status.py {shlex.quote(str(run.root))} --follow; to end "
                f"it: python launch/cancel.py {shlex.quote(str(run.root))}"
            )
        print(f"{what}: left out")
        return True
    if sweep and (told := run.cancelled()):
        print(f"{run.root} was cancelled by {told['by']}: left out. To go on with it: submit.py --resume {run.root}")
        return True
    return False


def behind_its_jobs(planned: Planned[Work]) -> Planned[Work]:
    """The same, to start when the run's jobs that are there have ended.

    Raises:
        UserError: they are being cancelled, or Slurm cannot be asked.
    """
    run = planned.run
    if run.results.exists() or not (jobs := live_jobs(run)):
        return planned
    if told := run.cancelled():
        raise UserError(
            f"{run.root} was cancelled by {told['by']}, and job {_shown(jobs[0])} is not gone yet. Give the same "
            "command again when it is."
        )
    print(f"{run.root}: behind job {', '.join(map(_shown, jobs))}")
    return replace(planned, behind=tuple(job.id for job in jobs))


def claim_run_folders(planned: Sequence[Planned[Work]]) -> list[Planned[Work]]:
    """Make the folders, or see that each is for its work and nobody is at it.

    Raises:
        UserError: one of them is another's; those that this command has made are removed again.
    """
    taken: list[Planned[Work]] = []
    try:
        for each in planned:
            taken.append(replace(each, claim=take_folder(each.run, each.work)))
            if each.behind:
                continue  # the folder is held by a job of the run, or will be
            wait_until_gone(each.run)
            with each.run.locked():
                pass  # another job on this folder is refused here rather than in the queue
            if told := each.run.clear_cancelled():
                print(f"{each.run.root} was cancelled by {told['by']}; it goes on now")
    except BaseException:
        drop(taken)
        raise
    return taken


def drop(taken: Sequence[Planned[Any]]) -> None:
    """Nothing was submitted: remove the folders that this command has made and nobody else uses."""
    for each in taken:
        if each.claim is not None:
            each.claim.abandon()


# --- the jobs that a run has ------------------------------------------------------------------------------------------


def queued_job(run: RunFolder) -> str | None:
    """The job of the run that runs or waits, and its state; None if there is none. Raises as ``live_jobs``."""
    return next(map(_shown, live_jobs(run)), None)


def live_jobs(run: RunFolder) -> list[SlurmJob]:
    """The run's jobs that run or wait, those that run first.

    Raises:
        UserError: Slurm may have one, and cannot be asked.
    """
    run_state = read_state(run)
    jobs = read_jobs(run, run_state.attempts)
    if not jobs.slurm and not jobs.unconfirmed:
        return []
    try:
        found = queue(jobs.slurm, patience_s=_ASK_S)
        found |= queue(accepted_jobs(run, jobs, patience_s=_ASK_S), patience_s=_ASK_S)
    except SlurmMissing:
        if run_state.records_its_end:
            return []  # the folder has come to a machine without Slurm
        raise _cannot_be_asked(run, jobs, "there is no squeue on this machine") from None
    except SlurmError as error:
        raise _cannot_be_asked(run, jobs, str(error)) from None
    # One that has asked to be requeued is COMPLETING until all its nodes have let go of it, and PENDING then.
    returns = run_state.comes_back and run_state.cancelled is None
    alive = [job for job in found.values() if returns or not is_completing(job.state)]
    return sorted(alive, key=lambda job: is_pending(job.state))


def _shown(job: SlurmJob) -> str:
    return f"{job.id} ({job.state.lower()})"


def _cannot_be_asked(run: RunFolder, jobs: Jobs, why: str) -> UserError:
    job = f"job {jobs.slurm[-1]}" if jobs.slurm else "a job that was not confirmed"
    return UserError(
        f"{run.root} was submitted to Slurm ({job}), and it is unknown whether a job of it is queued or runs: {why} "
        "Nothing was submitted, because a second job must not be queued. Give the same command again when squeue "
        "answers, on a machine that has it."
    )
