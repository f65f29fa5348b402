"""A run on Slurm seen from outside, for drills: submitted, watched, and asked afterwards what an interruption cost.

Whatever waits is a generator (``Poll``) that yields between two looks: `yield from run.reach(20)` lets other drills go
on until step 20 is logged. One process drives several runs that way.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cfmask.errors import UserError
from cfmask.runs import RunFolder
from cfmask.runtime.jsonl import read_lines
from launch.slurm.client import ask, show_job
from launch.slurm.control import cancel, start_now
from launch.slurm.queue import host_names
from launch.slurm.states import is_over, is_pending
from launch.submission import training
from launch.submission.submit import submissions

Poll = Iterator[None]

_ASK_EVERY_S = 0.5
_SETTLES_S = 5.0


class DrillFailed(Exception):
    """A run did not behave as it has to; the message says how."""


@dataclass(frozen=True)
class Snapshot:
    """What a run folder showed at a time (monotonic seconds).

    starts: lines of attempts.jsonl. step: the last one logged. saved: step of the newest checkpoint.
    """

    time: float
    starts: int
    step: int
    saved: int


@dataclass(frozen=True)
class Fault:
    """What was done to a run, and when (monotonic seconds), in which start and at which step."""

    time: float
    what: str
    starts: int
    step: int


class RunHandle:
    """One run.

    Args:
        run: its folder.
        flags: of submit.py, without --run.
        pace_s: seconds that the run waits at each step.
        patience_s: seconds that anything may take that is waited for, queues included.
    """

    def __init__(self, run: Path, flags: Sequence[str], *, pace_s: float, patience_s: float) -> None:
        self.folder = RunFolder(run)
        self._flags, self._pace_s, self._patience_s = flags, pace_s, patience_s
        self.job = ""
        self.jobs: list[str] = []
        """Those of the run, and others that this drill has submitted."""
        self.snapshots: list[Snapshot] = []
        self.faults: list[Fault] = []
        self.first_steps: list[float] = []
        """Seconds from each start of a job, as Slurm gives it, to its first step."""
        self._asked = 0.0
        self._known: dict[str, str] = {}
        self._restarts = 0
        self._pending_since: float | None = None

    # --- commands -------------------------------------------------------------------------------------------------

    def submit(self, *more: str) -> None:
        """Submit the run, with more flags.

        Raises:
            DrillFailed: submit.py refuses; the message is its own.
        """
        self._submit(["--run", str(self.folder.root), *self._flags, *more])

    def resume(self, *more: str) -> None:
        """submit.py --resume; raises as ``submit`` does."""
        self._submit(["--resume", str(self.folder.root), *more])

    def _submit(self, flags: Sequence[str]) -> None:
        before = len(submissions(self.folder))
        parser = argparse.ArgumentParser("submit.py", allow_abbrev=False)
        training.add_submit_arguments(parser)
        complaints = io.StringIO()
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(complaints):
                training.submit(parser.parse_args([*flags, "--no-follow"]), pace_s=self._pace_s)
        except UserError as error:
            raise DrillFailed(f"`submit.py {shlex.join(flags)}` refuses: {error}") from None
        except SystemExit:  # argparse
            said = complaints.getvalue().strip().rpartition("\n")[2]
            raise DrillFailed(f"`submit.py {shlex.join(flags)}` refuses: {said}") from None
        jobs = [line["job"] for line in submissions(self.folder)[before:]]
        if not jobs:
            raise DrillFailed(f"`submit.py {shlex.join(flags)}` has submitted nothing.")
        self.jobs += jobs
        self.follow(jobs[0])

    def follow(self, job: str) -> None:
        """Watch this job from now on."""
        self.job, self._asked, self._restarts = job, 0.0, 0

    def follow_job_of(self, folder: Path) -> None:
        """Follow the first task of the array that a command, run in this folder, has in the queue; if it has one."""
        for line in ask("squeue", "--noheader", "--format=%F %Z").splitlines():
            array, _, where = line.strip().partition(" ")
            if Path(where) == folder:
                self.follow(f"{array}_0")
                self.jobs.append(array)

    def record_fault(self, what: str) -> None:
        """Note that a fault is injected now."""
        now = self.snapshot()
        self.faults.append(Fault(now.time, what, now.starts, now.step))

    def cancel(self) -> None:
        """End all jobs of this drill that are still there."""
        with contextlib.suppress(UserError):
            if self.jobs:
                cancel(*self.jobs)

    # --- waiting --------------------------------------------------------------------------------------------------

    def reach(self, step: int) -> Poll:
        """Wait until ``step`` is logged by the latest start.

        Raises:
            DrillFailed: the run has finished, its job has ended, or it takes longer than the patience.
        """
        for _ in self.until(f"step {step}"):
            if self.folder.results.exists():
                raise DrillFailed(f"finished before step {step} was seen: a larger --pace leaves more time for faults")
            if self.snapshot().step >= step:
                return
            self._check_alive(f"step {step}")
            yield

    def restart(self) -> Poll:
        """Wait until the job has been requeued once more and runs.

        Raises:
            DrillFailed: it is not requeued.
        """
        self._restarts += 1
        for _ in self.until(f"job {self.job} runs again"):
            came = int(self.job_field("Restarts", "0")) >= self._restarts
            if came and self.job_field("JobState") == "RUNNING":
                return
            self.skip_hold()
            if is_over(self.job_field("JobState")):
                raise DrillFailed(f"job {self.job} was not requeued: it is {self.job_field('JobState')}")
            yield

    def skip_hold(self) -> None:
        """Skip most of the two minutes that Slurm holds a requeued job for. Some seconds are left for its previous
        start to end on all nodes: what is late there would end the new one."""
        now = time.monotonic()
        if not is_pending(self.job_field("JobState")):
            self._pending_since = None
        elif self._pending_since is None:
            self._pending_since = now
        elif now - self._pending_since > _SETTLES_S:
            self._pending_since = now
            with contextlib.suppress(UserError):  # a site that does not let its users: then it takes two minutes
                start_now(self.job)

    def ended(self, state: str, *, within_s: float | None = None, restarts: bool = False) -> Poll:
        """Wait until the job has ended for good.

        Args:
            restarts: it may be requeued on the way.

        Raises:
            DrillFailed: in another state than this, or not ``within_s``.
        """
        for _ in self.until(f"job {self.job} is {state}", within_s):
            found = self.job_field("JobState")
            if found == state:
                return
            if is_over(found):
                raise DrillFailed(f"job {self.job} is {found}, and should be {state}")
            if restarts:
                self.skip_hold()
            yield

    def finish(self, *, restarts: bool = False) -> Poll:
        """Wait for the run's results and its job's end.

        Args:
            restarts: the job may be requeued on the way, any number of times.

        Raises:
            DrillFailed: they do not come.
        """
        for _ in self.until("the run has finished"):
            if self.folder.results.exists():
                break
            if restarts:
                self.skip_hold()
            self._check_alive("the end")
            yield
        yield from self.ended("COMPLETED")

    def wait(self, seconds: float) -> Poll:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            yield

    def until(self, what: str, within_s: float | None = None) -> Iterator[None]:
        """Yield as long as there is patience.

        Raises:
            DrillFailed: there is none left.
        """
        patience = self._patience_s if within_s is None else within_s
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            yield
        raise DrillFailed(f"waited {patience:.0f} s in vain until {what}")

    def _check_alive(self, what: str) -> None:
        state = self.job_field("JobState")
        if is_over(state) and not self.folder.results.exists():
            raise DrillFailed(f"job {self.job} is {state} before {what}; its logs are in {self.folder.root / 'jobs'}")

    # --- looking --------------------------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """The last one that a snapshot shows."""
        return self.snapshots[-1].step if self.snapshots else 0

    def snapshot(self) -> Snapshot:
        """What the run folder shows now; added to ``snapshots``."""
        attempts = read_lines(self.folder.attempts)
        now = Snapshot(
            time=time.monotonic(),
            starts=len(attempts),
            step=self.folder.logged_step() or 0,
            saved=self.folder.saved_step() if attempts else 0,
        )
        if now.starts > len(self.first_steps) and now.step > (attempts[-1]["from_step"] or 0):
            self.first_steps.append(self._seconds_since_start())
        if not self.snapshots or now.time - self.snapshots[-1].time > 0.02:
            self.snapshots.append(now)
        return now

    def _seconds_since_start(self) -> float:
        self._asked = 0.0
        started = self.job_field("StartTime")
        try:
            return max(0.0, time.time() - datetime.fromisoformat(started).timestamp())
        except ValueError:
            return float("nan")

    def job_field(self, name: str, otherwise: str = "") -> str:
        """What the controller knows of the job, as `scontrol show job` names it; asked at most twice a second."""
        if time.monotonic() - self._asked > _ASK_EVERY_S:
            self._known = show_job(self.job)
            self._asked = time.monotonic()
        return self._known.get(name, otherwise)

    def starts(self) -> int:
        """How often Slurm has started the job, as far as was seen: minutes after its end the controller forgets it."""
        return 1 + max(self._restarts, int(self.job_field("Restarts", "0")))

    def nodes(self) -> list[str]:
        self._asked = 0.0
        return host_names(self.job_field("NodeList"))

    def log(self, job: str = "*") -> str:
        """What the ranks of a job, or of all of them, have printed."""
        logs = sorted((self.folder.root / "jobs").glob(f"{job}_*_log.out"))
        return "".join(path.read_text(errors="replace") for path in logs)

    # --- afterwards -----------------------------------------------------------------------------------------------

    def seconds_to_checkpoint(self) -> list[float | None]:
        """For each fault, until a checkpoint of the step that had been reached; None if there was none before the next
        start, or the end."""
        return [seconds_to_checkpoint(self.snapshots, fault) for fault in self.faults]

    def steps_lost(self) -> int:
        """Steps that were taken twice, over all starts."""
        return steps_lost(read_lines(self.folder.attempts))


def seconds_to_checkpoint(snapshots: Sequence[Snapshot], fault: Fault) -> float | None:
    """From a fault to the first checkpoint of the step that it came at, or later, of the same start."""
    for snapshot in snapshots:
        if snapshot.time >= fault.time and snapshot.saved >= fault.step:
            return snapshot.time - fault.time if snapshot.starts == fault.starts else None
    return None


def steps_lost(attempts: Sequence[dict]) -> int:
    """Steps that were taken twice, from attempts.jsonl's lines."""
    return sum(
        max(0, (line.get("last_reached") or 0) - line["from_step"])
        for line in attempts[1:]
        if line.get("from_step") is not None
    )
