"""A run on Slurm seen from outside, for drills: submitted, watched, disturbed, and asked afterwards what it cost.

Waiting is a generator's business: `yield from stage.reach(20)` gives others their turn until step 20 is logged, so that
several stages are played by one process.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import shlex
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cfmask.errors import UserError
from cfmask.runs import RunFolder, read_lines
from launch.checks.cluster import parse_records
from launch.jobs import training
from launch.jobs.submission import last_submission

Act = Iterator[None]

SLURM_AWAY = ("Unable to contact", "Connection refused", "Socket timed out")
_ASK_EVERY_S = 0.5
_ANSWER_S = 60.0
"""How long one of Slurm's commands may take, and a controller that is away be asked again."""
_SETTLES_S = 5.0
_OVER = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "OUT_OF_MEMORY", "TIMEOUT")
"""States of a job that does not come back."""


class Trouble(Exception):
    """What did not go as it has to; a sentence."""


@dataclass(frozen=True)
class Moment:
    """What a run folder showed at a time (monotonic seconds): starts, the last step logged, the newest checkpoint."""

    time: float
    starts: int
    step: int
    saved: int


@dataclass(frozen=True)
class Disturbance:
    """When something was done to a run (monotonic seconds), what, in which start and at which step."""

    time: float
    what: str
    starts: int
    step: int


class Stage:
    """One run.

    Args:
        flags: of submit.py, without --run.
        pace_s: how long the run stays at each step.
        patience_s: how long anything may take that is waited for, queues included.
    """

    def __init__(self, run: Path, flags: Sequence[str], *, pace_s: float, patience_s: float) -> None:
        self.run = RunFolder(run)
        self._flags, self._pace_s, self._patience_s = flags, pace_s, patience_s
        self.job = ""
        self.jobs: list[str] = []
        """Those of the run, and others that this drill has submitted."""
        self.moments: list[Moment] = []
        self.disturbances: list[Disturbance] = []
        self.first_steps: list[float] = []
        """Seconds from each start of a job, as Slurm gives it, to its first step."""
        self._asked = 0.0
        self._known: dict[str, str] = {}
        self._restarts = 0
        self._pending_since: float | None = None

    # --- acting ---------------------------------------------------------------------------------------------------

    def submit(self, *more: str) -> None:
        """Raises Trouble with submit.py's own words if it refuses."""
        self._submit(["--run", str(self.run.root), *self._flags, *more])

    def resume(self, *more: str) -> None:
        """submit.py --resume; as ``submit``."""
        self._submit(["--resume", str(self.run.root), *more])

    def _submit(self, flags: Sequence[str]) -> None:
        parser = argparse.ArgumentParser("submit.py", allow_abbrev=False)
        training.add_submit_arguments(parser)
        arguments = parser.parse_args([*flags, "--no-follow"])
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                training.submit(arguments, pace_s=self._pace_s)
        except UserError as error:
            raise Trouble(f"`submit.py {shlex.join(flags)}` refuses: {error}") from None
        submission = last_submission(self.run)
        if submission is None:
            raise Trouble(f"`submit.py {shlex.join(flags)}` has submitted nothing.")
        self.job, self._asked, self._restarts = submission["job"], 0.0, 0
        self.jobs.append(self.job)

    def disturb(self, what: str) -> None:
        """Note that something is done now."""
        now = self.look()
        self.disturbances.append(Disturbance(now.time, what, now.starts, now.step))

    # --- waiting --------------------------------------------------------------------------------------------------

    def reach(self, step: int) -> Act:
        """Wait until ``step`` is logged by the latest start.

        Raises:
            Trouble: the run has finished, or its job is gone, or nothing happens.
        """
        for _ in self.until(f"step {step}"):
            if self.run.results.exists():
                raise Trouble(f"finished before step {step} was seen: a larger --pace gives more time to disturb it")
            if self.look().step >= step:
                return
            self._see_that_it_lives(f"step {step}")
            yield

    def restart(self) -> Act:
        """Wait until the job has come back once more and runs.

        Raises:
            Trouble: it does not come back.
        """
        self._restarts += 1
        for _ in self.until(f"job {self.job} has come back"):
            came = int(self.job_field("Restarts", "0")) >= self._restarts
            if came and self.job_field("JobState") == "RUNNING":
                return
            self.hurry()
            if self.job_field("JobState") in _OVER:
                raise Trouble(f"job {self.job} did not come back: it is {self.job_field('JobState')}")
            yield

    def hurry(self) -> None:
        """Skip most of the two minutes that Slurm holds a requeued job for. Some seconds are needed for its life before
        to end everywhere: what of that is late would end the new one."""
        now = time.monotonic()
        if self.job_field("JobState") != "PENDING":
            self._pending_since = None
        elif self._pending_since is None:
            self._pending_since = now
        elif now - self._pending_since > _SETTLES_S:
            self._pending_since = now
            with contextlib.suppress(Trouble):  # a site that does not let its users: then it takes two minutes
                slurm("scontrol", "update", f"jobid={self.job}", "StartTime=now")

    def gone(self, state: str, *, within_s: float | None = None) -> Act:
        """Wait until the job has ended for good.

        Raises:
            Trouble: in another state than this, or not ``within_s``.
        """
        for _ in self.until(f"job {self.job} is {state}", within_s):
            found = self.job_field("JobState")
            if found == state:
                return
            if found in _OVER:
                raise Trouble(f"job {self.job} is {found}, and should be {state}")
            yield

    def finish(self, *, restarts: bool = False) -> Act:
        """Wait for the run's results, and its job's end.

        Args:
            restarts: the job may come back on the way, any number of times.

        Raises:
            Trouble: they do not come.
        """
        for _ in self.until("the run has finished"):
            if self.run.results.exists():
                break
            if restarts:
                self.hurry()
            self._see_that_it_lives("the end")
            yield
        yield from self.gone("COMPLETED")

    def wait(self, seconds: float) -> Act:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            yield

    def until(self, what: str, within_s: float | None = None) -> Iterator[None]:
        """Turns to wait in.

        Raises:
            Trouble: there have been enough.
        """
        patience = self._patience_s if within_s is None else within_s
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            yield
        raise Trouble(f"waited {patience:.0f} s in vain until {what}")

    def _see_that_it_lives(self, what: str) -> None:
        state = self.job_field("JobState")
        if state in _OVER and not self.run.results.exists():
            raise Trouble(f"job {self.job} is {state} before {what}; its logs are in {self.run.root / 'jobs'}")

    # --- seeing ---------------------------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """As far as it was seen."""
        return self.moments[-1].step if self.moments else 0

    def look(self) -> Moment:
        """Add what the run folder shows now to ``moments``."""
        attempts = read_lines(self.run.attempts)
        now = Moment(
            time.monotonic(), len(attempts), self.run.logged_step() or 0, self.run.saved_step() if attempts else 0
        )
        if now.starts > len(self.first_steps) and now.step > (attempts[-1]["from_step"] or 0):
            self.first_steps.append(self._seconds_since_start())
        if not self.moments or now.time - self.moments[-1].time > 0.02:
            self.moments.append(now)
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
            [self._known] = parse_records(slurm("scontrol", "--oneliner", "show", "job", self.job), first="JobId")
            self._asked = time.monotonic()
        return self._known.get(name, otherwise)

    def nodes(self) -> list[str]:
        self._asked = 0.0
        return slurm("scontrol", "show", "hostnames", self.job_field("NodeList")).split()

    # --- afterwards -----------------------------------------------------------------------------------------------

    def seconds_to_checkpoint(self) -> list[float | None]:
        """For each disturbance, until a checkpoint of the step that had been reached; None if there was none before the
        next start, or the end."""
        return [seconds_to_checkpoint(self.moments, disturbance) for disturbance in self.disturbances]

    def steps_lost(self) -> int:
        """Steps that were taken twice, over all starts."""
        return steps_lost(read_lines(self.run.attempts))


def seconds_to_checkpoint(moments: Sequence[Moment], disturbance: Disturbance) -> float | None:
    """From the disturbance to the first checkpoint of the step that it came at, or later, of the same start."""
    for moment in moments:
        if moment.time >= disturbance.time and moment.saved >= disturbance.step:
            return moment.time - disturbance.time if moment.starts == disturbance.starts else None
    return None


def steps_lost(attempts: Sequence[dict]) -> int:
    """Steps that were taken twice, from attempts.jsonl's lines."""
    return sum(
        max(0, (line.get("last_reached") or 0) - line["from_step"])
        for line in attempts[1:]
        if line.get("from_step") is not None
    )


def slurm(*command: str) -> str:
    """One of Slurm's commands; a controller that does not answer is asked again.

    Raises:
        Trouble: it fails, with its words.
    """
    deadline = time.monotonic() + _ANSWER_S
    while True:
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_S)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise Trouble(f"`{shlex.join(command)}` failed: {error}") from error
        if done.returncode == 0:
            return done.stdout.strip()
        said = re.sub(r"\s+", " ", done.stderr or done.stdout).strip()
        if time.monotonic() > deadline or not any(word in said for word in SLURM_AWAY):
            raise Trouble(f"`{shlex.join(command)}` failed: {said}")
        time.sleep(0.5)
