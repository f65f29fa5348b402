"""A run on Slurm as an outside observer sees it: a drill submits and watches it, and measures what a fault cost.

Everything that waits is a generator (``Poll``) that yields between two checks: `yield from run.reach(20)` lets other
drills proceed until step 20 is logged. So one process drives several runs.
"""

from __future__ import annotations

import contextlib
import io
import shlex
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cfmask.errors import UserError
from cfmask.runs import RunFolder
from cfmask.runtime.command import CommandParser
from cfmask.runtime.jsonl import read_lines
from launch.slurm.client import ask, show_job
from launch.slurm.control import cancel, start_now
from launch.slurm.queue import host_names
from launch.slurm.states import is_over, is_pending
from launch.slurm.submission import submit
from launch.submission import training
from launch.submission.submit import submissions

Poll = Iterator[None]

_ASK_EVERY_S = 0.5
_SETTLES_S = 5.0
_SIGNAL_RANK = """
rank=
for each in /proc/[0-9]*; do
    variables=$(tr '\\0' '\\n' < $each/environ 2>/dev/null) || continue
    echo "$variables" | grep -qx SLURM_JOB_ID={job} || continue
    echo "$variables" | grep -qx SLURM_PROCID={rank} || continue
    tr '\\0' ' ' < $each/cmdline | grep -q submitit.core._submit && rank="$rank ${{each#/proc/}}"
done
for each in $rank; do
    parent=$(sed 's/.*) //' /proc/$each/stat | cut -d' ' -f2)
    case " $rank " in *" $parent "*) kill -{signal} $each ;; esac
done
"""
"""Signals the child of the two processes of a rank (launch/ranks/supervisor.py): it is the one that trains."""


class DrillFailed(Exception):
    """A run did not behave as required; the message says how."""


@dataclass(frozen=True)
class Snapshot:
    """What a run folder showed at a time."""

    time: float
    """Monotonic seconds."""
    starts: int
    """The number of lines in attempts.jsonl."""
    step: int
    """The last step logged."""
    saved: int
    """The step of the newest checkpoint."""


@dataclass(frozen=True)
class Fault:
    """A fault that was injected into a run."""

    time: float
    """Monotonic seconds."""
    what: str
    starts: int
    """The number of starts at that time."""
    step: int
    """The step that the run was at."""


class RunHandle:
    """One run.

    Args:
        run: its folder.
        flags: of submit.py, without --run.
        pace_s: seconds that the run waits at each step.
        patience_s: seconds after which a wait fails, queues included.
    """

    def __init__(self, run: Path, flags: Sequence[str], *, pace_s: float, patience_s: float) -> None:
        self.folder = RunFolder(run)
        self._flags, self._pace_s, self._patience_s = flags, pace_s, patience_s
        self.job = ""
        self.jobs: list[str] = []
        """All jobs that this drill has submitted."""
        self.snapshots: list[Snapshot] = []
        self.faults: list[Fault] = []
        self.first_steps: list[float] = []
        """Seconds from each start of a job, as Slurm gives it, to its first step."""
        self._asked = 0.0
        self._known: dict[str, str] = {}
        self._restarts = 0
        self._pending_since: float | None = None

    # --- commands -----------------------------------------------------------------------------------------------------

    def submit(self, *more: str) -> None:
        """Submit the run, with more flags.

        Raises:
            DrillFailed: submit.py refuses; the message is its own.
        """
        self._submit(["--run", str(self.folder.root), *self._flags, *more])

    def resume(self, *more: str) -> None:
        """submit.py --resume; raises like ``submit``."""
        self._submit(["--resume", str(self.folder.root), *more])

    def _submit(self, flags: Sequence[str]) -> None:
        before = len(submissions(self.folder))
        parser = CommandParser(prog="submit.py")
        training.add_submit_arguments(parser)
        errors = io.StringIO()
        command = f"`submit.py {shlex.join(flags)}`"
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
                training.submit(parser.parse_args([*flags, "--no-follow"]), pace_s=self._pace_s)
        except UserError as error:
            raise DrillFailed(f"{command} refuses: {error}") from None
        except SystemExit:  # argparse
            raise DrillFailed(f"{command} refuses: {errors.getvalue().strip().splitlines()[-1]}") from None
        jobs = [line["job"] for line in submissions(self.folder)[before:]]
        if not jobs:
            raise DrillFailed(f"{command} has submitted nothing.")
        self.jobs += jobs
        self.follow(jobs[0])

    def follow(self, job: str) -> None:
        """Watch this job from now on."""
        self.job, self._asked, self._restarts = job, 0.0, 0

    def follow_job_of(self, folder: Path) -> None:
        """Watch the first task of the array that was submitted from this folder, if the queue has one."""
        for line in ask("squeue", "--noheader", "--format=%F %Z").splitlines():
            array, _, where = line.strip().partition(" ")
            if Path(where) == folder:
                self.follow(f"{array}_0")
                self.jobs.append(array)

    def record_fault(self, what: str) -> None:
        """Record that a fault is injected now."""
        now = self.snapshot()
        self.faults.append(Fault(now.time, what, now.starts, now.step))

    def signal_last_rank(self, signal: str) -> None:
        """Send a signal to the process of the last rank that trains."""
        last = int(read_lines(self.folder.attempts)[-1]["world_size"]) - 1
        there = (f"--jobid={self.job}", "--overlap", "--nodes=1", "--ntasks=1", f"--nodelist={self.nodes()[-1]}")
        ask("srun", *there, "--input=none", "sh", "-c", _SIGNAL_RANK.format(job=self.job, rank=last, signal=signal))

    def preempt(self, arguments: Sequence[str]) -> Poll:
        """Submit a job that takes the run's nodes; wait until the run's job runs again.

        Args:
            arguments: of sbatch, which make the job preempt others.
        """
        nodes = self.nodes()
        wanted = (f"--nodes={len(nodes)}", f"--nodelist={','.join(nodes)}", "--exclusive", "--time=5", *arguments)
        script = self.folder.root.with_name(f".preempts-{uuid.uuid4().hex}.sh")
        script.write_text("#!/bin/sh\nsleep 1\n")
        self.record_fault("preempted")
        try:
            self.jobs.append(submit(script, "--job-name=cfmask-preempts", "--output=/dev/null", *wanted))
        finally:
            script.unlink()  # Slurm has a copy
        yield from self.restart()

    def cancel(self) -> None:
        """Cancel all jobs of this drill that are still queued or running."""
        with contextlib.suppress(UserError):
            cancel(*self.jobs)

    # --- waiting ------------------------------------------------------------------------------------------------------

    def until(self, what: str, holds: Callable[[], bool], within_s: float | None = None) -> Poll:
        """Wait until the condition holds.

        Raises:
            DrillFailed: it does not within ``within_s`` (default: the patience).
        """
        patience = self._patience_s if within_s is None else within_s
        deadline = time.monotonic() + patience
        while not holds():
            if time.monotonic() > deadline:
                raise DrillFailed(f"timed out after {patience:.0f} s waiting until {what}")
            yield

    def wait(self, seconds: float) -> Poll:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            yield

    def reach(self, step: int) -> Poll:
        """Wait until the latest start has logged ``step``.

        Raises:
            DrillFailed: the run finishes or its job ends before.
        """

        def reached() -> bool:
            if self.folder.results.exists():
                raise DrillFailed(f"finished before step {step} was seen: a larger --pace leaves more time for faults")
            return self.snapshot().step >= step or self._check_alive(f"step {step}")

        return self.until(f"step {step}", reached)

    def restart(self) -> Poll:
        """Wait until the job has been requeued once more and runs.

        Raises:
            DrillFailed: it is not requeued.
        """
        self._restarts += 1

        def runs_again() -> bool:
            requeued = int(self.job_field("Restarts", "0")) >= self._restarts
            if requeued and self.job_field("JobState") == "RUNNING":
                return True
            self.skip_hold()
            if is_over(self.job_field("JobState")):
                raise DrillFailed(f"job {self.job} was not requeued: it is {self.job_field('JobState')}")
            return False

        return self.until(f"job {self.job} runs again", runs_again)

    def skip_hold(self) -> None:
        """Skip most of the two minutes for which Slurm holds a requeued job. Some seconds are left for the previous
        start to end on all nodes: a late request to end it would end the new start."""
        now = time.monotonic()
        if not is_pending(self.job_field("JobState")):
            self._pending_since = None
        elif self._pending_since is None:
            self._pending_since = now
        elif now - self._pending_since > _SETTLES_S:
            self._pending_since = now
            with contextlib.suppress(UserError):  # a site may not allow it: then the job waits for two minutes
                start_now(self.job)

    def ended(self, state: str, *, within_s: float | None = None, restarts: bool = False) -> Poll:
        """Wait until the job has ended for good.

        Args:
            restarts: it may be requeued before.

        Raises:
            DrillFailed: it ends in another state, or not ``within_s``.
        """

        def has_ended() -> bool:
            found = self.job_field("JobState")
            if is_over(found) and found != state:
                raise DrillFailed(f"job {self.job} is {found}, and should be {state}")
            if restarts:
                self.skip_hold()
            return found == state

        return self.until(f"job {self.job} is {state}", has_ended, within_s)

    def finish(self, *, restarts: bool = False) -> Poll:
        """Wait for the run's results and its job's end.

        Args:
            restarts: the job may be requeued any number of times before.

        Raises:
            DrillFailed: the job ends without results.
        """

        def has_finished() -> bool:
            if restarts:
                self.skip_hold()
            return self.folder.results.exists() or self._check_alive("the end")

        yield from self.until("the run has finished", has_finished)
        yield from self.ended("COMPLETED")

    def _check_alive(self, what: str) -> bool:
        """Returns False; raises DrillFailed if the job has ended without results."""
        state = self.job_field("JobState")
        if is_over(state) and not self.folder.results.exists():
            raise DrillFailed(f"job {self.job} is {state} before {what}; its logs are in {self.folder.root / 'jobs'}")
        return False

    # --- observing ----------------------------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """The step of the last snapshot."""
        return self.snapshots[-1].step if self.snapshots else 0

    def snapshot(self) -> Snapshot:
        """What the run folder shows now; added to ``snapshots``."""
        attempts = read_lines(self.folder.attempts)
        saved = self.folder.saved_step() if attempts else 0
        now = Snapshot(time.monotonic(), len(attempts), self.folder.logged_step() or 0, saved)
        if now.starts > len(self.first_steps) and now.step > (attempts[-1]["from_step"] or 0):
            self.first_steps.append(self._seconds_since_start())
        if not self.snapshots or now.time - self.snapshots[-1].time > 0.02:
            self.snapshots.append(now)
        return now

    def _seconds_since_start(self) -> float:
        self._asked = 0.0
        try:
            return max(0.0, time.time() - datetime.fromisoformat(self.job_field("StartTime")).timestamp())
        except ValueError:
            return float("nan")

    def job_field(self, name: str, otherwise: str = "") -> str:
        """A field of `scontrol show job`, which is called at most twice a second."""
        if time.monotonic() - self._asked > _ASK_EVERY_S:
            self._known = show_job(self.job)
            self._asked = time.monotonic()
        return self._known.get(name, otherwise)

    def starts(self) -> int:
        """How often Slurm was seen to start the job: the controller forgets it minutes after its end."""
        return 1 + max(self._restarts, int(self.job_field("Restarts", "0")))

    def nodes(self) -> list[str]:
        self._asked = 0.0
        return host_names(self.job_field("NodeList"))

    def log(self, job: str = "*") -> str:
        """The output of the ranks of a job (default: of all jobs)."""
        logs = sorted((self.folder.root / "jobs").glob(f"{job}_*_log.out"))
        return "".join(path.read_text(errors="replace") for path in logs)

    def check_log(self, *texts: str, job: str = "*") -> None:
        """Raises DrillFailed unless the log contains all texts."""
        for text in texts:
            if text not in self.log(job):
                raise DrillFailed(f"the log of job {self.job if job == '*' else job} does not say {text!r}")

    # --- measuring ----------------------------------------------------------------------------------------------------

    def seconds_to_checkpoint(self) -> list[float | None]:
        """For each fault, the seconds until a checkpoint of the step that had been reached; None if the start left no
        such checkpoint."""
        return [seconds_to_checkpoint(self.snapshots, fault) for fault in self.faults]

    def steps_lost(self) -> int:
        """The number of steps that were repeated."""
        return steps_lost(read_lines(self.folder.attempts))


def seconds_to_checkpoint(snapshots: Sequence[Snapshot], fault: Fault) -> float | None:
    """The time from a fault to the first checkpoint of its step or a later one; None if the start left none."""
    for snapshot in snapshots:
        if snapshot.time >= fault.time and snapshot.saved >= fault.step:
            return snapshot.time - fault.time if snapshot.starts == fault.starts else None
    return None


def steps_lost(attempts: Sequence[dict]) -> int:
    """The number of steps that were repeated, from the lines of attempts.jsonl."""
    return sum(
        max(0, (line.get("last_reached") or 0) - line["from_step"])
        for line in attempts[1:]
        if line.get("from_step") is not None
    )
