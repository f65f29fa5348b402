"""Submits planned jobs: to Slurm as jobs, arrays or chains, or one after the other to this machine.

A job trains by a Recipe or does an Evaluation; this module treats both alike. Every job runs a copy of the code in its
run folder (snapshot.py), and is recorded in RUN/jobs/submissions.jsonl.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shlex
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfmask.errors import UserError
from cfmask.runs import RunFolder
from cfmask.runtime.jsonl import append_lines, read_lines
from cfmask.secrets import mask_secrets
from launch.allocation.resolve import Allocation
from launch.notification.notify import keep_command
from launch.slurm.site import max_array_members
from launch.slurm.submission import SubmissionUnknown, test_only
from launch.state.processes import ending_signals
from launch.submission import snapshot
from launch.submission.dependencies import ArrayPart, array_id, chained, split_array
from launch.submission.planning import PlannedJob, drop
from launch.submission.sbatch import (
    ENVIRONMENT,
    NO_LIMIT_MIN,
    job_name,
    local_executor,
    send,
    set_environment,
    slurm_executor,
    write_environment,
)

if TYPE_CHECKING:
    import submitit

    from launch.slurm.executor import SlurmExecutor


@dataclass(frozen=True)
class SubmissionBatch:
    """The jobs of one sbatch: a single run, or the members of a sweep as an array.

    A sweep has a folder beside its runs, in which each member's number is a link to its run folder. So one sbatch file
    can name each member's logs and code:

        runs/.sweeps/20261124-100000-4711/
          0 1 2                                  → the run folders
          123_submission.sh 123_0_submitted.pkl  submitit's files; RUN/jobs/ has links to them
    """

    planned: Sequence[PlannedJob]
    sweep: Path | None
    """The folder of the sweep; None for a single run."""

    @classmethod
    def of(cls, planned: Sequence[PlannedJob]) -> SubmissionBatch:
        runs = planned[0].run.root.parent
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-{secrets.token_hex(2)}"
        return cls(planned, runs / ".sweeps" / name if len(planned) > 1 else None)

    def executor(self, allocation: Allocation, digest: str) -> SlurmExecutor:
        """The executor for jobs that run the snapshot with this digest."""
        root = self.planned[0].run.root
        if self.sweep is None:
            return slurm_executor(root / "jobs", job_name(root), shlex.quote(str(root)), digest, allocation)
        member = f'{shlex.quote(str(self.sweep))}/"$SLURM_ARRAY_TASK_ID"'
        name, logs = job_name(root, len(self.planned) - 1), f"{self.sweep}/%a/jobs/%A_%a"
        return slurm_executor(self.sweep, name, member, digest, allocation, logs=logs)

    def link_runs(self) -> None:
        """Make the folder of the sweep."""
        if self.sweep:
            self.sweep.mkdir(parents=True)
            for number, each in enumerate(self.planned):
                (self.sweep / str(number)).symlink_to(os.path.relpath(each.run.root, self.sweep))

    def link_jobs(self, jobs: Sequence[submitit.Job[Any]]) -> None:
        """Link submitit's files into the run folders, which then look as if each run had been submitted by itself."""
        for each, job in zip(self.planned, jobs, strict=True) if self.sweep else ():
            folder = each.run.root / "jobs"
            written = {"submission.sh": job.paths.submission_file, "submitted.pkl": job.paths.submitted_pickle}
            for kind, path in written.items():
                (folder / f"{job.job_id}_{kind}").symlink_to(os.path.relpath(path, folder))


def dry_run(planned: Sequence[PlannedJob], allocation: Allocation, *, chain: int = 0) -> int:
    """Print what would be submitted, and Slurm's answer to it.

    Args:
        chain: As for ``start``.
    """
    where = ", ".join(str(each.run.root) for each in planned)
    if allocation.on_slurm:
        more = ""
        if chain:
            allocation, first = chained(allocation, [], planned[0].behind), planned[:1]
            more = f"A chain of {_jobs(chain)} for each run; this is the first one of {planned[0].run.root}.\n"
        else:
            part, *others = _parts(planned, allocation)
            allocation, first = part.allocation(allocation, []), planned[: len(part.members)]
            if others:
                more = f"{_jobs(len(planned))} as {1 + len(others)} arrays; this is the first one.\n"
        executor = SubmissionBatch.of(first).executor(allocation, snapshot.digest_of(snapshot.REPO))
        text = executor.batch_script(len(first))
        print(mask_secrets(f"\n{more}{text}"))
        if allocation.environment:
            print(f"{ENVIRONMENT} (readable by its owner only) exports {', '.join(allocation.environment)}.\n")
        print(test_only(text))
    print(f"Would run on {allocation} into {where}. Everything checked; nothing was queued.")
    return 0


def _jobs(number: int) -> str:
    return f"{number} job" + ("s" if number != 1 else "")


def start(
    planned: Sequence[PlannedJob],
    allocation: Allocation,
    *,
    follow: bool | None = None,
    chain: int = 0,
    pace_s: float = 0.0,
) -> int:
    """Submit jobs whose run folders have been claimed.

    Args:
        follow: Show progress until the job ends (default: on this machine only).
        chain: The number of jobs for each run, one after the other; 0: a single job.
        pace_s: See ``Job``.

    Returns:
        The exit code of the command.
    """
    if allocation.on_slurm:
        return submit_to_slurm(planned, allocation, chain=chain, follow=bool(follow), pace_s=pace_s)
    return run_here(planned, allocation, follow=follow is not False, pace_s=pace_s)


# --- on Slurm ---------------------------------------------------------------------------------------------------------


def submit_to_slurm(
    planned: Sequence[PlannedJob], allocation: Allocation, *, chain: int = 0, follow: bool, pace_s: float = 0.0
) -> int:
    """``start`` on Slurm.

    Raises:
        UserError: Slurm refuses a job. Jobs that it accepted before stay in the queue.
    """
    from launch.state.follow import follow_run

    submitted = 0
    try:
        if chain:
            for each in planned:
                submitted += 1
                _submit_chain(each, allocation, chain, pace_s)
        else:
            for part in enqueue_all(planned, allocation, pace_s=pace_s):
                for each, job in part:
                    _announce(each.run, job, allocation)
                submitted += len(part)
    except BaseException as error:
        if chain:
            drop(planned[submitted:])
        elif submitted and isinstance(error, UserError):
            raise UserError(
                f"{error} {submitted} of {len(planned)} runs have been submitted; the same command submits the rest."
            ) from None
        raise
    return follow_run(planned[0].run) if follow else 0


def _submit_chain(planned: PlannedJob, allocation: Allocation, length: int, pace_s: float) -> None:
    """
    Raises:
        UserError: Slurm refuses a job. Those that it has accepted stay in the queue.
    """
    root = shlex.quote(str(planned.run.root))
    before: list[str] = []
    try:
        for _ in range(length):
            of_job = chained(allocation, before, planned.behind)
            [job] = enqueue([planned], of_job, pace_s=pace_s, quiet=bool(before))
            if not before:
                _announce(planned.run, job, allocation)
            before.append(job.job_id)
    except UserError as error:
        if not before:
            raise
        raise UserError(
            f"{error} {len(before)} of {length} jobs of the chain were accepted, and stay: {', '.join(before)}. To add "
            f"the others: python launch/submit.py --resume {root} --chain {length - len(before)}"
        ) from None
    if before[1:]:
        print(
            f"then {', '.join(before[1:])}: each resumes the run when the one before has ended, also after scancel. To "
            f"end them all: python launch/cancel.py {root}",
            flush=True,
        )


def enqueue_all(
    planned: Sequence[PlannedJob], allocation: Allocation, *, pace_s: float = 0.0, quiet: bool = False
) -> Iterator[list[tuple[PlannedJob, submitit.Job[Any]]]]:
    """Submit the jobs with as few sbatch as the site's limit on arrays allows. Arguments are those of ``enqueue``.

    Yields:
        The jobs of each sbatch once it has been accepted.

    Raises:
        UserError: Slurm refuses one. Those that it has accepted stay; for the others, see ``enqueue``.
    """
    left, accepted = list(planned), list[str]()
    try:
        for part in _parts(planned, allocation):
            of_part, left = left[: len(part.members)], left[len(part.members) :]
            jobs = enqueue(of_part, part.allocation(allocation, accepted), pace_s=pace_s, quiet=quiet)
            accepted.append(array_id(jobs))
            yield list(zip(of_part, jobs, strict=True))
    except BaseException:
        drop(left)
        raise


def _parts(planned: Sequence[PlannedJob], allocation: Allocation) -> list[ArrayPart]:
    largest = max_array_members() if len(planned) > 1 else None
    return split_array(len(planned), largest, allocation.array_parallelism)


def enqueue(
    planned: Sequence[PlannedJob], allocation: Allocation, *, pace_s: float = 0.0, quiet: bool = False
) -> list[submitit.Job[Any]]:
    """Submit jobs whose folders have been claimed with one sbatch, and record them in the run folders.

    Args:
        quiet: Do not print which code they run.

    Raises:
        UserError: Slurm refuses. The folders that this command made and no other command uses are removed.
    """
    from launch.ranks.rank import Job

    batch = SubmissionBatch.of(planned)
    work = [Job(each.run.root, allocation.gpus_per_node, allocation.time_min, pace_s) for each in planned]
    try:
        snapshots = [_prepare(each.run, allocation, quiet=quiet) for each in planned]
        for each in planned:
            write_environment(allocation, each.run.root / "jobs")
        batch.link_runs()
        executor = batch.executor(allocation, snapshots[0].digest)
        jobs = send(executor, work)
    except SubmissionUnknown:
        for each in planned:  # there may be a job, which needs its folder
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


# --- on this machine --------------------------------------------------------------------------------------------------


def run_here(planned: Sequence[PlannedJob], allocation: Allocation, *, follow: bool, pace_s: float = 0.0) -> int:
    """``start`` on this machine: one job after the other. After a failure, the next one starts."""
    failed = []
    for each in planned:
        code = run_one_here(each, allocation, follow=follow, pace_s=pace_s)
        if code > 128:  # a signal ends the whole command
            return code
        if code:
            failed.append(each.run)
    if failed and len(planned) > 1:
        print(f"{len(failed)} of {len(planned)} runs did not finish: {', '.join(str(run.root) for run in failed)}")
    return 1 if failed else 0


def run_one_here(planned: PlannedJob, allocation: Allocation, *, follow: bool, pace_s: float = 0.0) -> int:
    """Run a job on this machine.

    Args:
        follow: Show its progress until it has ended; otherwise leave it running.
        pace_s: See ``Job``.

    Returns:
        0 if the job has finished (or was left running), 1 if it failed or was cancelled, 128 + the number of the signal
        that ended it: Ctrl-C, TERM, or HUP.
    """
    import submitit

    from launch.ranks.rank import Job
    from launch.state.follow import follow_local_job, print_end

    set_environment(allocation)
    run = planned.run
    code = _prepare(run, allocation)
    work = Job(run.root, allocation.gpus_per_node, NO_LIMIT_MIN, pace_s)
    if allocation.executor == "debug":
        debug_job = submitit.DebugExecutor(run.root / "jobs").submit(work)
        _record(planned, debug_job.job_id, allocation, code)
        _announce(run, debug_job, allocation)
        with contextlib.suppress(SystemExit):  # raised by a rank that stops
            debug_job.result()
        return print_end(run, debug_job.job_id, "The same command resumes from the last checkpoint.")
    with ending_signals() as received:
        # No time limit: the controller would kill the ranks, and nobody waits for this machine.
        executor = local_executor(run.root / "jobs", code.path, allocation, timeout_min=NO_LIMIT_MIN, followed=follow)
        job = executor.start(work)
        _record(planned, job.job_id, allocation, code)
        _announce(run, job, allocation)
        return follow_local_job(job, run, received) if follow else 0


# --- what a submission leaves in the run folder -----------------------------------------------------------------------


def _prepare(run: RunFolder, allocation: Allocation, *, quiet: bool = False) -> snapshot.Snapshot:
    """Write the code and the notify command into the run folder. Unless ``quiet``, print which code it is, and what
    differs from the code of the run's last submission."""
    kept = snapshot.take(snapshot.REPO, run.root / "code")
    (run.root / "jobs").mkdir(exist_ok=True)
    keep_command(allocation.notify, run)
    if quiet:
        return kept
    print(f"code {kept}")
    last = last_submission(run)
    before = run.root / "code" / last["code"] if last else None
    if before is not None and before.exists() and before != kept.path:
        changed = snapshot.differing_files(before, kept.path)
        print(
            f"The code differs from that of the run's last submission: {', '.join(changed[:5])}"
            f"{' …' if len(changed) > 5 else ''}. To resume with the earlier code: "
            f"python {shlex.quote(str(before / 'launch/submit.py'))} --resume {shlex.quote(str(run.root))}"
        )
    return kept


def _announce(run: RunFolder, job: submitit.Job[Any], allocation: Allocation) -> None:
    print(f"job {job.job_id} on {allocation}\nrun  {run.root}\nlogs {run.root / 'jobs'}", flush=True)


def last_submission(run: RunFolder) -> Mapping[str, Any] | None:
    """The last of ``submissions``; None before the first."""
    return next(reversed(submissions(run)), None)


def submissions(run: RunFolder) -> list[dict[str, Any]]:
    """The run's accepted jobs, each as a dict of job, submitted, code, executor, allocation (``Allocation.again``)."""
    return read_lines(_submissions(run))


def _submissions(run: RunFolder) -> Path:
    return run.root / "jobs" / "submissions.jsonl"


def _record(planned: PlannedJob, job_id: str, allocation: Allocation, code: snapshot.Snapshot) -> None:
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
