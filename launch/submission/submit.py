"""How planned jobs go out: to Slurm as a job, as arrays or as chains; or one after the other on this machine.

A job trains by a Recipe or does an Evaluation; nothing here depends on which. Every job runs a copy of the code that
lies in its run folder (snapshot.py), and is noted in RUN/jobs/submissions.jsonl.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
from launch.submission.batch_script import ENVIRONMENT, NO_LIMIT_MIN, set_environment, write_environment
from launch.submission.planning import AnyPlanned, drop
from launch.submission.sbatch import ArrayPart, after_end, array_id, send, slurm_executor, split_array

if TYPE_CHECKING:
    import submitit

    from launch.slurm.executor import SlurmExecutor

REPO = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class SubmissionBatch:
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
    def of(cls, planned: Sequence[AnyPlanned]) -> SubmissionBatch:
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


def dry_run(planned: Sequence[AnyPlanned], allocation: Allocation, *, chain: int = 0) -> int:
    """Print what would be submitted, and what Slurm says to it. chain: see ``submit_to_slurm``."""
    where = ", ".join(str(each.run.root) for each in planned)
    if allocation.on_slurm:
        if chain:
            allocation, first = chained(allocation, [], planned[0].behind), planned[:1]
            more = f"A chain of {_jobs(chain)} for each run; this is the first one of {planned[0].run.root}.\n"
        else:
            parts = list(_parts(planned, allocation))
            allocation, first = parts[0].allocation(allocation, []), planned[: len(parts[0].members)]
            more = f"{_jobs(len(planned))} as {len(parts)} arrays; this is the first one.\n" if parts[1:] else ""
        executor = SubmissionBatch.of(first).executor(allocation, snapshot.digest_of(REPO))
        text = executor.batch_script(len(first))
        print(mask_secrets(f"\n{more}{text}"))
        if allocation.environment:
            print(f"{ENVIRONMENT} (readable by its owner only) exports {', '.join(allocation.environment)}.\n")
        print(test_only(text))
    print(f"Would run on {allocation} into {where}. Everything checked; nothing was queued.")
    return 0


def _jobs(number: int) -> str:
    return f"{number} job" + ("s" if number != 1 else "")


# --- on Slurm ---------------------------------------------------------------------------------------------------------


def submit_to_slurm(
    planned: Sequence[AnyPlanned], allocation: Allocation, *, chain: int = 0, follow: bool, pace_s: float = 0.0
) -> int:
    """Submit them, and show progress until the job ends, if that is wanted.

    Args:
        chain: so many jobs for each, one after the other; 0: one.
        pace_s: see ``Job``.
    """
    from launch.state.follow import follow_run

    if chain:
        for number, each in enumerate(planned):
            try:
                _submit_chain(each, allocation, chain, pace_s)
            except BaseException:
                drop(planned[number + 1 :])
                raise
    else:
        submitted = 0
        try:
            for part in enqueue_all(planned, allocation, pace_s=pace_s):
                for each, job in part:
                    _announce(each.run, job, allocation)
                submitted += len(part)
        except UserError as error:
            if not submitted:
                raise
            raise UserError(
                f"{error} {submitted} of {len(planned)} runs have been submitted; the same command submits the rest."
            ) from None
    return follow_run(planned[0].run) if follow else 0


def _submit_chain(planned: AnyPlanned, allocation: Allocation, length: int, pace_s: float) -> None:
    """Raises UserError if Slurm does not take all of them. Those that it took stay."""
    root = shlex.quote(str(planned.run.root))
    before: list[str] = []
    try:
        for _ in range(length):
            job_allocation = chained(allocation, before, planned.behind)
            [job] = enqueue([planned], job_allocation, pace_s=pace_s, tell=(lambda line: None) if before else print)
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


def chained(allocation: Allocation, before: Sequence[str], behind: Sequence[str]) -> Allocation:
    """That of the next job of a chain.

    Args:
        before: the jobs of the chain that have been submitted.
        behind: what the first one waits for. --dependency is for all of them: while it does not hold, the end of a job
            that was taken out of the queue must not start the next one.
    """
    return replace(after_end(allocation, before[-1:] or behind), chain=tuple(before))


def enqueue_all(
    planned: Sequence[AnyPlanned],
    allocation: Allocation,
    *,
    pace_s: float = 0.0,
    tell: Callable[[str], object] = print,
) -> Iterator[list[tuple[AnyPlanned, submitit.Job[Any]]]]:
    """As few sbatch as the site's limit on arrays allows; yields the jobs of each when it has been accepted. Arguments
    are those of ``enqueue``.

    Raises:
        UserError: Slurm does not take one. What it took before stays; for the others, see ``enqueue``.
    """
    left, accepted = list(planned), list[str]()
    try:
        for part in _parts(planned, allocation):
            here, left = left[: len(part.members)], left[len(part.members) :]
            jobs = enqueue(here, part.allocation(allocation, accepted), pace_s=pace_s, tell=tell)
            accepted.append(array_id(jobs))
            yield list(zip(here, jobs, strict=True))
    except BaseException:
        drop(left)
        raise


def _parts(planned: Sequence[AnyPlanned], allocation: Allocation) -> list[ArrayPart]:
    largest = max_array_members() if len(planned) > 1 else None
    return split_array(len(planned), largest, allocation.array_parallelism)


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
    from launch.ranks.rank import Job

    batch = SubmissionBatch.of(planned)
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


# --- on this machine --------------------------------------------------------------------------------------------------


def run_here(planned: Sequence[AnyPlanned], allocation: Allocation, *, follow: bool, pace_s: float = 0.0) -> int:
    """One after the other, on this machine; one that fails does not keep the others."""
    failed = []
    for each in planned:
        code = run_one_here(each, allocation, follow=follow, pace_s=pace_s)
        if code > 128:  # a signal is for all of them
            return code
        if code:
            failed.append(each.run)
    if failed and len(planned) > 1:
        print(f"{len(failed)} of {len(planned)} runs did not finish: {', '.join(str(run.root) for run in failed)}")
    return 1 if failed else 0


def run_one_here(planned: AnyPlanned, allocation: Allocation, *, follow: bool, pace_s: float = 0.0) -> int:
    """One, on this machine.

    Args:
        follow: show its progress until it has ended; else it is left to itself.
        pace_s: see ``Job``.

    Returns:
        0 if it is finished (or left to itself), 1 if it failed or was cancelled, 128 + the number of the signal that
        ended it: Ctrl-C, TERM, or HUP.
    """
    import submitit

    from launch.ranks.rank import Job
    from launch.state.follow import follow_local_job, print_end
    from launch.submission.local import local_executor

    set_environment(allocation)
    run = planned.run
    code = keep_code(run)
    (run.root / "jobs").mkdir(exist_ok=True)
    keep_command(allocation.notify, run)
    work = Job(run.root, allocation.gpus_per_node, NO_LIMIT_MIN, pace_s)
    if allocation.executor == "debug":
        job = submitit.DebugExecutor(run.root / "jobs").submit(work)
        _record(planned, job.job_id, allocation, code)
        _announce(run, job, allocation)
        with contextlib.suppress(SystemExit):  # a rank's way to stop
            job.result()
        return print_end(run, job.job_id, "The same command resumes from the last checkpoint.")
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
    """The last of ``submissions``; None before the first."""
    lines = submissions(run)
    return lines[-1] if lines else None


def submissions(run: RunFolder) -> list[dict[str, Any]]:
    """Each job of the run that was accepted: job, submitted, code, executor, allocation (``Allocation.again``)."""
    return read_lines(_submissions(run))


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
