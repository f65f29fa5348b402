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
from launch.slurm.submission import SubmissionUnknown
from launch.state.processes import ending_signals
from launch.submission import snapshot
from launch.submission.dependencies import ArrayPart, array_id, chained, split_array
from launch.submission.feasibility import ask_slurm, expected_start
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
from launch.submission.summary import UNKNOWN, About, progress_of, summary

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


def check_with_slurm(planned: Sequence[PlannedJob], allocation: Allocation, *, chain: int = 0) -> str:
    """Ask Slurm about the first of these jobs, before anything is queued or written.

    Returns:
        When it expects to start it, as a clause; "" without Slurm, or if that is unknown.

    Raises:
        SlurmError: Slurm would refuse the job or could never start it, or does not answer.
    """
    if not allocation.on_slurm:
        return ""
    return expected_start(ask_slurm(_first_script(planned, allocation, chain)[0], allocation))


def _first_script(planned: Sequence[PlannedJob], allocation: Allocation, chain: int) -> tuple[str, str]:
    """The first batch script that ``start`` would submit, and a sentence about the others."""
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
    return executor.batch_script(len(first)), more


def dry_run(planned: Sequence[PlannedJob], allocation: Allocation, about: About, *, chain: int = 0) -> int:
    """Print the work, the batch script that would be submitted, Slurm's answer to it, and the summary. Errors come
    before any of it.

    Args:
        chain: As for ``start``.
    """
    text, more = _first_script(planned, allocation, chain) if allocation.on_slurm else ("", "")
    answer = ask_slurm(text, allocation) if allocation.on_slurm else ""
    print_work(planned)
    if allocation.on_slurm:
        print(mask_secrets(f"\n{more}{text}"))
        if allocation.environment:
            print(f"{ENVIRONMENT} (readable by its owner only) exports {', '.join(allocation.environment)}.\n")
        print(answer + "\n")
    digest = snapshot.digest_of(snapshot.REPO)
    print(summary(planned, [], allocation, about, digest, progress_of(planned[0].run)))
    print("Everything checked; nothing was queued.")
    return 0


def print_work(planned: Sequence[PlannedJob]) -> None:
    """Print the recipes or evaluations."""
    for each in planned:
        print(mask_secrets(each.work.to_json()))


def _jobs(number: int) -> str:
    return f"{number} job" + ("s" if number != 1 else "")


def start(
    planned: Sequence[PlannedJob],
    allocation: Allocation,
    about: About,
    *,
    follow: bool | None = None,
    chain: int = 0,
    pace_s: float = 0.0,
) -> int:
    """Submit jobs whose run folders have been claimed, and print a summary (``summary.py``).

    Args:
        follow: Show progress until the job ends (default: on this machine only).
        chain: The number of jobs for each run, one after the other; 0: a single job.
        pace_s: See ``Job``.

    Returns:
        The exit code of the command.
    """
    if allocation.on_slurm:
        return submit_to_slurm(planned, allocation, about, chain=chain, follow=bool(follow), pace_s=pace_s)
    return run_here(planned, allocation, about, follow=follow is not False, pace_s=pace_s)


# --- on Slurm ---------------------------------------------------------------------------------------------------------


def submit_to_slurm(
    planned: Sequence[PlannedJob],
    allocation: Allocation,
    about: About = UNKNOWN,
    *,
    chain: int = 0,
    follow: bool,
    pace_s: float = 0.0,
) -> int:
    """``start`` on Slurm.

    Raises:
        UserError: Slurm refuses a job. Jobs that it accepted before stay in the queue.
    """
    from launch.state.follow import follow_run

    progress = progress_of(planned[0].run)
    accepted: list[str] = []
    try:
        if chain:
            for number, each in enumerate(planned, 1):
                try:
                    _submit_chain(each, allocation, about, chain, pace_s)
                except BaseException:
                    drop(planned[number:])
                    raise
        else:
            for part in enqueue_all(planned, allocation, pace_s=pace_s):
                accepted += [job.job_id for _, job in part]
    except UserError as error:
        if not accepted:
            raise
        raise UserError(
            f"{error} {len(accepted)} of {len(planned)} runs have been submitted; the same command submits the rest."
        ) from None
    finally:
        if accepted:
            _announce(planned[: len(accepted)], accepted, allocation, about, progress)
    return follow_run(planned[0].run) if follow else 0


def _submit_chain(planned: PlannedJob, allocation: Allocation, about: About, length: int, pace_s: float) -> None:
    """
    Raises:
        UserError: Slurm refuses a job. Those that it has accepted stay in the queue.
    """
    root, progress = shlex.quote(str(planned.run.root)), progress_of(planned.run)
    before: list[str] = []
    try:
        for _ in range(length):
            [job] = enqueue([planned], chained(allocation, before, planned.behind), pace_s=pace_s)
            before.append(job.job_id)
    except UserError as error:
        if not before:
            raise
        raise UserError(
            f"{error} {len(before)} of {length} jobs of the chain were accepted, and stay: {', '.join(before)}. To add "
            f"the others: python launch/submit.py --resume {root} --chain {length - len(before)}"
        ) from None
    finally:
        if before:
            _announce([planned], before[:1], allocation, about, progress)
        if before[1:]:
            print(
                f"then {', '.join(before[1:])}: each resumes the run when the one before has ended, also after "
                f"scancel. To end them all: python launch/cancel.py {root}",
                flush=True,
            )


def enqueue_all(
    planned: Sequence[PlannedJob], allocation: Allocation, *, pace_s: float = 0.0
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
            jobs = enqueue(of_part, part.allocation(allocation, accepted), pace_s=pace_s)
            accepted.append(array_id(jobs))
            yield list(zip(of_part, jobs, strict=True))
    except BaseException:
        drop(left)
        raise


def _parts(planned: Sequence[PlannedJob], allocation: Allocation) -> list[ArrayPart]:
    largest = max_array_members() if len(planned) > 1 else None
    return split_array(len(planned), largest, allocation.array_parallelism)


def enqueue(planned: Sequence[PlannedJob], allocation: Allocation, *, pace_s: float = 0.0) -> list[submitit.Job[Any]]:
    """Submit jobs whose folders have been claimed with one sbatch, and record them in the run folders.

    Raises:
        UserError: Slurm refuses. The folders that this command made and no other command uses are removed.
    """
    from launch.ranks.rank import Job

    batch = SubmissionBatch.of(planned)
    work = [Job(each.run.root, allocation.gpus_per_node, allocation.time_min, pace_s) for each in planned]
    try:
        snapshots = [_prepare(each.run, allocation) for each in planned]
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


def run_here(
    planned: Sequence[PlannedJob], allocation: Allocation, about: About = UNKNOWN, *, follow: bool, pace_s: float = 0.0
) -> int:
    """``start`` on this machine: one job after the other. After a failure, the next one starts."""
    failed = []
    for each in planned:
        code = run_one_here(each, allocation, about, follow=follow, pace_s=pace_s)
        if code > 128:  # a signal ends the whole command
            return code
        if code:
            failed.append(each.run)
    if failed and len(planned) > 1:
        print(f"{len(failed)} of {len(planned)} runs did not finish: {', '.join(str(run.root) for run in failed)}")
    return 1 if failed else 0


def run_one_here(
    planned: PlannedJob, allocation: Allocation, about: About = UNKNOWN, *, follow: bool, pace_s: float = 0.0
) -> int:
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
    run, progress = planned.run, progress_of(planned.run)
    code = _prepare(run, allocation)
    work = Job(run.root, allocation.gpus_per_node, NO_LIMIT_MIN, pace_s)
    if allocation.executor == "debug":
        debug_job = submitit.DebugExecutor(run.root / "jobs").submit(work)
        _record(planned, debug_job.job_id, allocation, code)
        _announce([planned], [debug_job.job_id], allocation, about, progress)
        with contextlib.suppress(SystemExit):  # raised by a rank that stops
            debug_job.result()
        return print_end(run, debug_job.job_id, "The same command resumes from the last checkpoint.")
    with ending_signals() as received:
        # No time limit: the controller would kill the ranks, and nobody waits for this machine.
        executor = local_executor(run.root / "jobs", code.path, allocation, timeout_min=NO_LIMIT_MIN, followed=follow)
        job = executor.start(work)
        _record(planned, job.job_id, allocation, code)
        _announce([planned], [job.job_id], allocation, about, progress)
        return follow_local_job(job, run, received) if follow else 0


# --- what a submission leaves in the run folder -----------------------------------------------------------------------


def _prepare(run: RunFolder, allocation: Allocation) -> snapshot.Snapshot:
    """Write the code and the notify command into the run folder."""
    kept = snapshot.take(snapshot.REPO, run.root / "code")
    (run.root / "jobs").mkdir(exist_ok=True)
    keep_command(allocation.notify, run)
    return kept


def _announce(
    planned: Sequence[PlannedJob], jobs: Sequence[str], allocation: Allocation, about: About, progress: str
) -> None:
    """Print the summary of accepted jobs, and what differs from the code of a run's submission before."""
    digests = [line["code"] for line in submissions(planned[0].run)]
    code = planned[0].run.root / "code"
    print(summary(planned, jobs, allocation, about, str(snapshot.read(code / digests[-1])), progress), flush=True)
    for each in planned:
        digests = [line["code"] for line in submissions(each.run)[-2:]]
        before, now = (each.run.root / "code" / digest for digest in (digests[0], digests[-1]))
        if before != now and before.exists():
            changed = snapshot.differing_files(before, now)
            print(
                f"The code differs from that of the run's last submission: {', '.join(changed[:5])}"
                f"{' …' if len(changed) > 5 else ''}. To resume with the earlier code: "
                f"python {shlex.quote(str(before / 'launch/submit.py'))} --resume {shlex.quote(str(each.run.root))}"
            )


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
