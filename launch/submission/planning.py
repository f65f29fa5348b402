"""Submission plans: the jobs that a command submits, with their run folders. Skips runs that already have a job."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace

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

_ASK_S = 20.0
"""How long a submission waits for a controller that does not answer."""


@dataclass(frozen=True)
class PlannedJob:
    """A job that is to be submitted."""

    run: RunFolder
    work: Recipe | Evaluation
    claim: Claim | None = None
    """This command's claim on the run folder, once it has one."""
    behind: tuple[str, ...] = ()
    """Jobs of the run that have to end before this one starts."""


def should_skip(run: RunFolder, *, sweep: bool) -> bool:
    """Whether a run needs no job; prints why.

    Raises:
        UserError: The run already has a job, and is not part of a sweep.
    """
    root = shlex.quote(str(run.root))
    if run.results.exists():
        run.tidy()
        print(f"{run.root} is finished" + (": skipped" if sweep else ""))
        if not sweep:
            from launch.state.follow import print_end  # tqdm

            print_end(run, "", "")
        return True
    if queued := queued_job(run):
        exists = f"Job {queued} already exists for {run.root}"
        remedy = (
            f", and continues by itself. To change something about it, end it first: python launch/cancel.py {root}. "
            "To queue N jobs behind it, each of which resumes the run: python launch/submit.py "
            f"--resume {root} --chain N"
        )
    elif (controller := controller_of(run)) and not is_ending(controller):
        exists = f"Job {controller} on this machine already exists for {run.root}"
        remedy = (
            f". To see its progress: python launch/status.py {root} --follow; to end it: python launch/cancel.py {root}"
        )
    elif sweep and (mark := run.cancelled()):
        print(
            f"{run.root} was cancelled by {mark['by']}: skipped. To resume it: python launch/submit.py --resume {root}"
        )
        return True
    else:
        return False
    if not sweep:
        raise UserError(exists + remedy)
    print(f"{exists}: skipped")
    return True


def behind_its_jobs(planned: PlannedJob) -> PlannedJob:
    """The planned job, to start after the jobs that the run has now.

    Raises:
        UserError: Those jobs are being cancelled, or Slurm cannot be asked.
    """
    run = planned.run
    if run.results.exists() or not (jobs := live_jobs(run)):
        return planned
    if mark := run.cancelled():
        raise UserError(
            f"{run.root} was cancelled by {mark['by']}, and job {_shown(jobs[0])} has not ended yet. Repeat the "
            "command when it has."
        )
    print(f"{run.root}: behind job {', '.join(map(_shown, jobs))}")
    return replace(planned, behind=tuple(job.id for job in jobs))


def claim_run_folders(planned: Sequence[PlannedJob]) -> list[PlannedJob]:
    """Make the run folders, or check that each is for its work and not in use.

    Raises:
        UserError: A folder is for other work or in use. The folders that this command made are removed.
    """
    claimed: list[PlannedJob] = []
    try:
        for each in planned:
            claimed.append(replace(each, claim=take_folder(each.run, each.work)))
            if each.behind:
                continue  # a job of the run holds the folder, or will
            wait_until_gone(each.run)
            with each.run.locked():
                pass  # if another job holds the folder, fail here and not in the queue
            if mark := each.run.clear_cancelled():
                print(f"{each.run.root} was cancelled by {mark['by']}; it is resumed now")
    except BaseException:
        drop(claimed)
        raise
    return claimed


def drop(planned: Sequence[PlannedJob]) -> None:
    """Nothing was submitted: remove the folders that this command made and no other command uses."""
    for each in planned:
        if each.claim is not None:
            each.claim.abandon()


# --- the jobs of a run ------------------------------------------------------------------------------------------------


def queued_job(run: RunFolder) -> str | None:
    """The run's job that runs or waits, with its state; None if there is none. Raises as ``live_jobs``."""
    return next(map(_shown, live_jobs(run)), None)


def live_jobs(run: RunFolder) -> list[SlurmJob]:
    """The run's jobs that run or wait; those that run come first.

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
            return []  # the folder was copied to a machine without Slurm
        raise _cannot_be_asked(run, jobs, "there is no squeue on this machine") from None
    except SlurmError as error:
        raise _cannot_be_asked(run, jobs, str(error)) from None
    # A job that has asked to be requeued is COMPLETING until all its nodes have released it, and then PENDING.
    returns = run_state.comes_back and run_state.cancelled is None
    alive = [job for job in found.values() if returns or not is_completing(job.state)]
    return sorted(alive, key=lambda job: is_pending(job.state))


def _shown(job: SlurmJob) -> str:
    return f"{job.id} ({job.state.lower()})"


def _cannot_be_asked(run: RunFolder, jobs: Jobs, why: str) -> UserError:
    job = f"job {jobs.slurm[-1]}" if jobs.slurm else "a job that was not confirmed"
    return UserError(
        f"{run.root} was submitted to Slurm ({job}), and it is unknown whether one of its jobs is queued or runs: "
        f"{why} Nothing was submitted, because a second job must not be queued. Repeat the command when "
        "squeue answers, on a machine that has it."
    )
