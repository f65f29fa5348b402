"""How planned jobs go out: by one sbatch, as a job or an array of jobs; or one after the other on this machine.

A job trains by a Recipe or does an Evaluation; nothing here depends on which. Every job runs a copy of the code that
lies in its run folder (snapshot.py), and is noted in RUN/jobs/submissions.jsonl.
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from cfmask.errors import UserError
from cfmask.evaluation import Evaluation
from cfmask.recipe import Recipe
from cfmask.runs import RunFolder
from cfmask.runtime.jsonl import append_lines, read_lines
from cfmask.secrets import mask_secrets
from launch.jobs import snapshot
from launch.jobs.allocation import Allocation
from launch.jobs.batch_script import (
    ENVIRONMENT,
    NO_LIMIT_MIN,
    rank_command,
    set_environment,
    slurm_parameters,
    write_environment,
)
from launch.jobs.claims import Claim, take_folder
from launch.jobs.notify import keep_command
from launch.jobs.processes import controller_of, ending_signals, is_ending, wait_until_gone
from launch.jobs.run_state import Jobs, accepted_jobs, read_jobs, read_state
from launch.slurm.client import SlurmError, SlurmMissing, ignored_options
from launch.slurm.queue import queue
from launch.slurm.states import is_completing
from launch.slurm.submission import SubmissionUnknown, test_only

if TYPE_CHECKING:
    import submitit

    from launch.slurm.executor import SlurmExecutor

T = TypeVar("T")
Work = TypeVar("Work", bound=Recipe | Evaluation, covariant=True)

REPO = Path(__file__).resolve().parents[2]
_ASK_S = 20.0
"""How long whoever submits waits for a controller that does not answer."""


@dataclass(frozen=True)
class Planned(Generic[Work]):
    """A job that is to be submitted, and its run folder.

    claim: this command's use of the folder, from ``take_up`` on.
    """

    run: RunFolder
    work: Work
    claim: Claim | None = None


AnyPlanned = Planned[Recipe | Evaluation]


@dataclass(frozen=True)
class Batch:
    """What one sbatch takes: a run, or the members of a sweep as an array.

    A sweep has a folder of its own beside its runs, in which a member's number is a link to its run folder, so that one
    sbatch file can name each member's logs and code:

        runs/.sweeps/20261124-100000-4711/
          0 1 2                                  → the run folders
          123_submission.sh 123_0_submitted.pkl  what submitit writes; RUN/jobs/ has links to it
    """

    planned: Sequence[AnyPlanned]
    sweep: Path | None

    @classmethod
    def of(cls, planned: Sequence[AnyPlanned]) -> Batch:
        runs = planned[0].run.root.parent
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-{secrets.token_hex(2)}"
        return cls(planned, runs / ".sweeps" / name if len(planned) > 1 else None)

    @property
    def folder(self) -> Path:
        """submitit's."""
        return self.sweep or self.planned[0].run.root / "jobs"

    def executor(self, allocation: Allocation, digest: str) -> SlurmExecutor:
        """submitit's executor, which runs the snapshot of this digest."""
        name = f"sweep-{self.sweep.name}" if self.sweep else self.planned[0].run.root.name
        member = f'{shlex.quote(str(self.sweep))}/"$SLURM_ARRAY_TASK_ID"'
        run = member if self.sweep else shlex.quote(str(self.planned[0].run.root))
        logs = f"{self.sweep}/%a/jobs/%A_%a" if self.sweep else None
        return slurm_executor(self.folder, f"cfmask-{name}", run, digest, allocation, logs=logs)

    def link_runs(self) -> None:
        if self.sweep:
            self.sweep.mkdir(parents=True)
            for number, each in enumerate(self.planned):
                (self.sweep / str(number)).symlink_to(os.path.relpath(each.run.root, self.sweep))

    def link_jobs(self, jobs: Sequence[submitit.Job[Any]]) -> None:
        """Let every run's jobs/ show its own, as if it had been submitted by itself."""
        for each, job in zip(self.planned, jobs, strict=True) if self.sweep else ():
            folder = each.run.root / "jobs"
            written = {"submission.sh": job.paths.submission_file, "submitted.pkl": job.paths.submitted_pickle}
            for kind, path in written.items():
                (folder / f"{job.job_id}_{kind}").symlink_to(os.path.relpath(path, folder))


def slurm_executor(
    folder: Path, name: str, run: str, digest: str, allocation: Allocation, *, logs: str | None = None
) -> SlurmExecutor:
    """submitit's executor, for jobs that run the snapshot of this digest.

    Args:
        folder: gets what submitit writes.
        name: of the job.
        run: the folder that has the job's code/ and jobs/, as a word of the shell.
        logs: beginning of the logs' paths, with sbatch's patterns; by default they lie in ``folder``.
    """
    from launch.slurm.executor import SlurmExecutor

    parameters = slurm_parameters(allocation, name, f"{run}/jobs")
    if logs:
        parameters["srun_args"].append(f"--output={logs}_%t_log.out")
        parameters["additional_parameters"]["output"] = f"{logs}_0_log.out"
    executor = SlurmExecutor(
        folder, max_num_timeout=1000, python=rank_command(allocation.python, f"{run}/code/{digest}")
    )
    executor.update_parameters(**parameters)
    return executor


# --- before a job goes out --------------------------------------------------------------------------------------------


def left_out(run: RunFolder, *, sweep: bool) -> bool:
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
            raise UserError(
                f"{what}, and goes on by itself. To change something about it, end it first: python launch/cancel.py "
                f"{shlex.quote(str(run.root))}"
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


def take_up(planned: Sequence[Planned[Work]]) -> list[Planned[Work]]:
    """Make the folders, or see that each is for its work and nobody is at it.

    Raises:
        UserError: one of them is another's; those that this command has made are removed again.
    """
    taken: list[Planned[Work]] = []
    try:
        for each in planned:
            taken.append(replace(each, claim=take_folder(each.run, each.work)))
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


def after(allocation: Allocation, jobs: Sequence[str]) -> Allocation:
    """The same for a job that starts when these have ended well, beside what it is to wait for anyway.

    A job that is preempted or requeued keeps its number, and has not ended. Of one that has failed, Slurm takes those
    that wait for it out of the queue: without --kill-on-invalid-dep they would wait for ever.
    """
    if not jobs:
        return allocation
    waits = ",".join(filter(None, [allocation.dependency, "afterok:" + ":".join(jobs)]))
    return replace(allocation, dependency=waits, sbatch={**allocation.sbatch, "kill-on-invalid-dep": "yes"})


def dry_run(planned: Sequence[AnyPlanned], allocation: Allocation) -> int:
    """Print what would be submitted, and what Slurm says to it."""
    where = ", ".join(str(each.run.root) for each in planned)
    if allocation.on_slurm:
        executor = Batch.of(planned).executor(allocation, snapshot.digest_of(REPO))
        text = executor.batch_script(len(planned))
        print(mask_secrets(f"\n{text}"))
        if allocation.environment:
            print(f"{ENVIRONMENT} (readable by its owner only) exports {', '.join(allocation.environment)}.\n")
        print(test_only(text))
    print(f"Would run on {allocation} into {where}. Everything checked; nothing was queued.")
    return 0


# --- on Slurm ---------------------------------------------------------------------------------------------------------


def submit_to_slurm(planned: Sequence[AnyPlanned], allocation: Allocation, *, follow: bool, pace_s: float = 0.0) -> int:
    """One sbatch for all of them, and progress until the job ends, if that is wanted. pace_s: see ``Job``."""
    from launch.jobs.follow import follow_run

    jobs = enqueue(planned, allocation, pace_s=pace_s)
    for each, job in zip(planned, jobs, strict=True):
        _announce(each.run, job, allocation)
    return follow_run(planned[0].run) if follow else 0


def enqueue(
    planned: Sequence[AnyPlanned],
    allocation: Allocation,
    *,
    pace_s: float = 0.0,
    tell: Callable[[str], object] = print,
) -> list[submitit.Job[Any]]:
    """One sbatch for all of them, whose folders have been taken up; their jobs, noted in the run folders.

    Args:
        tell: hears of the code that they run.

    Raises:
        UserError: Slurm does not take it. Folders that this command has made, and nobody else uses, are gone again.
    """
    from launch.jobs.rank import Job

    batch = Batch.of(planned)
    work = [Job(each.run.root, allocation.gpus_per_node, allocation.time_min, pace_s) for each in planned]
    try:
        snapshots = [keep_code(each.run, tell) for each in planned]
        for each in planned:
            jobs_folder = each.run.root / "jobs"
            jobs_folder.mkdir(exist_ok=True)
            write_environment(allocation, jobs_folder)
            keep_command(allocation.notify, each.run)
        batch.link_runs()
        executor = batch.executor(allocation, snapshots[0].digest)
        jobs = send(executor, work)
    except SubmissionUnknown:
        for each in planned:  # a job may be there, and finds its folder
            if each.claim is not None:
                each.claim.keep()
        raise
    except (UserError, OSError):
        if batch.sweep:
            shutil.rmtree(batch.sweep, ignore_errors=True)
        drop(planned)
        raise
    batch.link_jobs(jobs)
    for each, job, code in zip(planned, jobs, snapshots, strict=True):
        _record(each, job.job_id, allocation, code)
    return jobs


def send(executor: SlurmExecutor, work: Sequence[Callable[[], Any]]) -> list[submitit.Job[Any]]:
    """One sbatch.

    Raises:
        SlurmError: Slurm does not take it.
    """
    _tell_of_ignored_options()
    return _undisturbed(lambda: executor.submit_array(work))


@functools.cache
def _tell_of_ignored_options() -> None:
    """Once a command, which may submit many jobs."""
    if ignored := ignored_options():
        print(
            f"note: {', '.join(ignored)} in the environment: ignored. Flags and the cluster file say what a job gets.",
            file=sys.stderr,
        )


# --- on this machine --------------------------------------------------------------------------------------------------


def run_here(planned: Sequence[AnyPlanned], allocation: Allocation, *, follow: bool) -> int:
    """One after the other, on this machine; one that fails does not keep the others."""
    failed = []
    for each in planned:
        code = run_one_here(each, allocation, follow=follow)
        if code > 128:  # a signal is for all of them
            return code
        if code:
            failed.append(each.run)
    if failed and len(planned) > 1:
        print(f"{len(failed)} of {len(planned)} runs did not finish: {', '.join(str(run.root) for run in failed)}")
    return 1 if failed else 0


def run_one_here(planned: AnyPlanned, allocation: Allocation, *, follow: bool) -> int:
    """One, on this machine.

    Args:
        follow: show its progress until it has ended; else it is left to itself.

    Returns:
        0 if it is finished (or left to itself), 1 if it failed or was cancelled, 128 + the number of the signal that
        ended it: Ctrl-C, TERM, or HUP.
    """
    import submitit

    from launch.jobs.follow import follow_local_job, tell_end
    from launch.jobs.local import local_executor
    from launch.jobs.rank import Job

    set_environment(allocation)
    run = planned.run
    code = keep_code(run)
    (run.root / "jobs").mkdir(exist_ok=True)
    keep_command(allocation.notify, run)
    work = Job(run.root, allocation.gpus_per_node, NO_LIMIT_MIN)
    if allocation.executor == "debug":
        job = submitit.DebugExecutor(run.root / "jobs").submit(work)
        _record(planned, job.job_id, allocation, code)
        _announce(run, job, allocation)
        with contextlib.suppress(SystemExit):  # a rank's way to stop
            job.result()
        return tell_end(run, job.job_id, "The same command resumes from the last checkpoint.")
    with ending_signals() as received:
        # The controller counts the time down and kills: there is no queue to give the machine back to.
        executor = local_executor(run.root / "jobs", code.path, allocation, timeout_min=NO_LIMIT_MIN, followed=follow)
        job = executor.start(work)
        _record(planned, job.job_id, allocation, code)
        _announce(run, job, allocation)
        return follow_local_job(job, run, received) if follow else 0


def _announce(run: RunFolder, job: submitit.Job[Any], allocation: Allocation) -> None:
    print(f"job {job.job_id} on {allocation}\nrun  {run.root}\nlogs {run.root / 'jobs'}", flush=True)


def keep_code(run: RunFolder, tell: Callable[[str], object] = print) -> snapshot.Snapshot:
    """The present code, in the run folder; tells what is different from what the run had last."""
    kept = snapshot.take(REPO, run.root / "code")
    tell(f"code {kept}")
    last = last_submission(run)
    before = run.root / "code" / last["code"] if last else None
    if before is not None and before.exists() and before != kept.path:
        changed = snapshot.differing_files(before, kept.path)
        tell(
            f"The code is not what this run had last: {', '.join(changed[:5])}{' …' if len(changed) > 5 else ''}. To "
            f"go on with that one: python {shlex.quote(str(before / 'launch/submit.py'))} --resume "
            f"{shlex.quote(str(run.root))}"
        )
    return kept


def last_submission(run: RunFolder) -> Mapping[str, Any] | None:
    """job, submitted, code, executor, allocation (``Allocation.again``); None before the first."""
    lines = read_lines(_submissions(run))
    return lines[-1] if lines else None


def queued_job(run: RunFolder) -> str | None:
    """The job of the run that waits or runs, and its state; None if there is none.

    Raises:
        UserError: Slurm may have one, and cannot be asked.
    """
    run_state = read_state(run)
    jobs = read_jobs(run, run_state.attempts)
    if not jobs.slurm and not jobs.unconfirmed:
        return None
    try:
        found = queue(jobs.slurm, patience_s=_ASK_S)
        found |= queue(accepted_jobs(run, jobs, patience_s=_ASK_S), patience_s=_ASK_S)
    except SlurmMissing:
        if run_state.says_it_ended:
            return None  # the folder has come to a machine without Slurm
        raise _cannot_be_asked(run, jobs, "there is no squeue on this machine") from None
    except SlurmError as error:
        raise _cannot_be_asked(run, jobs, str(error)) from None
    # One that has asked to be requeued is COMPLETING until all its nodes have let go of it, and PENDING then.
    returns = run_state.comes_back and run_state.cancelled is None
    alive = [job for job in found.values() if returns or not is_completing(job.state)]
    return next((f"{job.id} ({job.state.lower()})" for job in alive), None)


def _cannot_be_asked(run: RunFolder, jobs: Jobs, why: str) -> UserError:
    job = f"job {jobs.slurm[-1]}" if jobs.slurm else "a job that was not confirmed"
    return UserError(
        f"{run.root} was submitted to Slurm ({job}), and it is unknown whether a job of it is queued or runs: {why} "
        "Nothing was submitted, because a second job must not be queued. Give the same command again when squeue "
        "answers, on a machine that has it."
    )


def _submissions(run: RunFolder) -> Path:
    return run.root / "jobs" / "submissions.jsonl"


def _record(planned: AnyPlanned, job_id: str, allocation: Allocation, code: snapshot.Snapshot) -> None:
    line = {
        "job": job_id,
        "submitted": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "code": code.digest,
        "executor": allocation.executor,
        "allocation": allocation.again,
    }
    append_lines(_submissions(planned.run), [line])
    if planned.claim is not None:
        planned.claim.keep()


def _undisturbed(submit: Callable[[], T]) -> T:
    """Ctrl-C is for this process: sbatch would die of it."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return submit()
    finally:
        signal.signal(signal.SIGINT, before)
