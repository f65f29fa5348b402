"""The restart policy: whether a job may start again, and who requeues it.

It holds for training, evaluation and the array tasks of conversions. ``of_run.py`` binds it to a run folder,
``retries.py`` applies it after a failure.

    restarts = Restarts.of_this_job(AttemptLog(folder), resume="python launch/submit.py --resume RUN")
    restarts.check_start(progress)                          before any work; raises GivenUp
    restarts.begin(progress, nodes=2)                       adds a line to folder/attempts.jsonl
    …
    sys.exit(restarts.after_stop(Cause.WARNED, progress))   rank 0, when all ranks have stopped

**The budget.** Every automatic restart counts, whatever its cause: the job's own requeue, a lost node, Slurm's requeue
of a preempted job. After ``--restarts-without-progress`` restarts in a row without progress the job is given up.
Progress is a number that grows only when work is saved: the step of the newest checkpoint, images counted, items done.
Starts that died before they could record anything count too, because Slurm counts restarts (SLURM_RESTART_COUNT). A new
submission has a new job number, and so a new budget. The jobs of a chain (chain.py) share one budget, and none of them
requeues itself.

**Who requeues.** Slurm requeues a job by itself when a node fails, after `scontrol requeue`, and when it is preempted
and killed. For a preempted job that ends within its grace time, it depends on the version of Slurm:

    until 23.11   the job is COMPLETED, so it has to requeue itself before it ends
    from 24.05    where PreemptMode is REQUEUE, Slurm requeues it when its batch script ends, with any exit code. Its
                  record of the preemption survives a requeue: if the job requeued itself, the end of its *next* start
                  would count as a preemption. So it just ends.

Where PreemptMode is CANCEL, no version requeues it, and the job has to.
"""

from __future__ import annotations

import enum
import logging
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cfmask.errors import UserError
from cfmask.runtime.attempts import AttemptLog
from launch.restarts.slurm_record import JobRecord, read_kill_wait_s, seconds_left, slurm_record
from launch.slurm.client import SlurmError, SlurmUnavailable
from launch.slurm.control import requeue
from launch.state.attempt import attempt_name, restart_of

if TYPE_CHECKING:
    import submitit

    from launch.restarts.chain import Chain

logger = logging.getLogger(__name__)

RESTARTS_WITHOUT_PROGRESS = 3
"""The default budget."""
VARIABLE = "CFMASK_RESTARTS_WITHOUT_PROGRESS"
"""Environment variable of a job that holds its budget."""

STOPPED = 128 + signal.SIGTERM
"""Exit code of a rank that asks for nothing: the job is over, or Slurm requeues it by itself."""
REQUEUE_ME = 144
"""Exit code that asks for a requeue, where the rank cannot call scontrol (a container), and on the local executor."""
REQUEUE_IF_PREEMPTED = 145
"""Exit code that asks the batch script for a requeue if Slurm has preempted the job."""

_SETTLED_S = 10.0
"""If Slurm's record does not explain a TERM within this time, somebody else has sent it."""
_ASK_AGAIN_S = 2.0
_REQUEUE_PATIENCE_S = 120.0
"""How long a rank asks Slurm for a requeue, or again after an error, before it leaves that to the batch script."""
_LOCAL_S = 45.0
"""Time for a checkpoint on the local executor: ``follow.py`` kills ranks a minute after Ctrl-C."""


class GivenUp(UserError):
    """The budget is spent: the job does not start again by itself."""


class Cause(enum.Enum):
    """Why a start has ended."""

    WARNED = "warned"
    """USR2, or the time limit is near: the job is to come back."""
    TERMINATED = "terminated"
    """TERM or INT: a preemption, a cancellation or a requeue. Slurm knows which."""
    NODE_LOST = "node lost"


class Verdict(enum.Enum):
    """Who repeats a start."""

    REQUEUE = "requeue"
    """The job has to requeue itself."""
    SLURM_DECIDES = "slurm decides"
    """The job just ends: Slurm requeues it, or is ending it for good already."""
    END = "end"
    """Nobody."""
    UNKNOWN = "unknown"
    """Slurm has not answered, and the cause alone does not decide it."""


@dataclass(frozen=True)
class JobStart:
    """A recorded start of a job.

    restart: how often the job had been restarted before it.
    progress: what was saved when it began.
    """

    restart: int
    progress: int


# --- decisions --------------------------------------------------------------------------------------------------------


def verdict(cause: Cause, job: JobRecord | None) -> Verdict:
    """Who repeats a start that has stopped in an orderly way, or has lost a node. The budget is not considered.

    Args:
        job: None if Slurm does not answer.
    """
    if job is None:
        return Verdict.UNKNOWN if cause is Cause.TERMINATED else Verdict.REQUEUE
    if not job.is_live:
        return Verdict.SLURM_DECIDES
    if job.preempted:
        return Verdict.SLURM_DECIDES if job.slurm_requeues else Verdict.REQUEUE
    return Verdict.END if cause is Cause.TERMINATED else Verdict.REQUEUE


def starts_without_progress(starts: Sequence[JobStart], restart: int, progress: int) -> int:
    """The number of starts since progress was last made, recorded or not, before start number ``restart``.

    Args:
        starts: the recorded ones, in order.
        restart: counted from 0.
        progress: what is saved now.
    """
    first = 0
    if starts:
        idle = [start for start in starts if start.progress >= progress]
        # Starts that recorded nothing may have followed the last one that made progress.
        first = idle[0].restart if idle else starts[-1].restart + 1
    return max(0, restart - first)


# --- the policy for a job ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Restarts:
    """The policy for the job that this process is part of.

    log: where its starts are recorded.
    job: its number, "123" or "123_4".
    restart: how often Slurm has restarted it; None on the local executor.
    limit: the budget.
    resume: the command that starts it with a new budget.
    unit: of the progress.
    chain: None if the job is not part of a chain.
    """

    log: AttemptLog
    job: str
    restart: int | None
    limit: int
    resume: str
    unit: str = "step"
    chain: Chain | None = None

    @classmethod
    def of_this_job(
        cls, log: AttemptLog, *, resume: str, unit: str = "step", environment: submitit.JobEnvironment | None = None
    ) -> Restarts:
        if environment is None:
            import submitit

            environment = submitit.JobEnvironment()
        limit = int(os.environ.get(VARIABLE) or RESTARTS_WITHOUT_PROGRESS)
        return cls(log, environment.job_id, restart_of(environment), limit, resume, unit)

    @property
    def attempt(self) -> str:
        return attempt_name(self.job, self.restart)

    def begin(self, progress: int, **facts: Any) -> None:
        """Record this start. Raises OSError."""
        self.log.begin_attempt(job=self.attempt, from_step=progress, **facts)

    # --- the budget

    def check_start(self, progress: int) -> None:
        """Called before a start begins.

        Raises:
            GivenUp: it would exceed the budget.
        """
        self._check(self._number(), progress)

    def check_restart(self, progress: int) -> None:
        """Called before a requeue, so that no job is queued only to be given up.

        Raises:
            GivenUp: the budget is spent.
        """
        self._check(self._number() + (self.restart is not None), progress)

    def _number(self) -> int:
        """Of this start on Slurm; of the next one on the local executor, which counts recorded starts alone."""
        return len(self._recorded()) if self.restart is None else self._earlier_jobs()[self.job] + self.restart

    def _check(self, restart: int, progress: int) -> None:
        idle = starts_without_progress(self._recorded(), restart, progress)
        if restart == 0 or idle <= self.limit:
            return
        starts = "one start" if idle == 1 else f"{idle} starts in a row"
        who = f"job {self.job}" if self.chain is None else f"the chain up to job {self.job}"
        raise GivenUp(
            f"given up: {who} made no progress beyond {self.unit} {progress} in {starts}, and "
            f"--restarts-without-progress allows {self.limit}. {self._causes(idle)} Remove the cause, or raise "
            f"--restarts-without-progress; then: {self.resume}"
        )

    def _earlier_jobs(self) -> dict[str, int]:
        """For this job and those before it in its chain, the number of starts of the jobs before each."""
        return self.chain.first_starts(self.log.attempt_lines()) if self.chain else {self.job: 0}

    def _recorded(self) -> list[JobStart]:
        """The recorded starts of this job, and of those before it in its chain. A local job's number is a pid, which
        may be reused: only the starts at the end of the log are its own."""
        found: list[JobStart] = []
        first = self._earlier_jobs()
        for line in self.log.attempt_lines():
            job, _, count = str(line.get("job")).rpartition("-")
            if job not in first:
                found = [] if self.restart is None else found
            elif isinstance(line.get("from_step"), int):
                number = len(found) if self.restart is None else first[job] + int(count)
                found.append(JobStart(number, line["from_step"]))
        return found

    def _causes(self, number: int) -> str:
        """Why the last starts ended, the latest first."""
        ended = self.log.ended()
        ends = [ended["why"]] if ended else []
        ends += [line["why_last_ended"] for line in reversed(self.log.attempt_lines()) if line.get("why_last_ended")]
        counted = Counter(str(why).removesuffix(".") for why in ends[:number])
        if not counted:
            return "No start has recorded why it ended; see the logs."
        shown = [f"{why} ({times} times)" if times > 1 else why for why, times in counted.items()]
        return f"They ended because: {'; '.join(shown)}."

    # --- the end of a start

    def after_stop(self, cause: Cause, progress: int, is_cancelled: Callable[[], bool] = lambda: False) -> int:
        """Called by rank 0 when all ranks have stopped and their work is saved. Requeues the job if it is to come back.

        Args:
            is_cancelled: whether the user has cancelled the work.

        Returns:
            The exit code of this process.

        Raises:
            GivenUp: the job is to come back, and the budget is spent.
        """
        if is_cancelled():
            return 0
        if self.restart is None:
            if cause is Cause.TERMINATED:
                return STOPPED
            self.check_restart(progress)
            return REQUEUE_ME
        decided = self._decide(cause, is_cancelled)
        if decided is None and self.chain is None:
            self.check_restart(progress)
            return REQUEUE_IF_PREEMPTED if cause is Cause.TERMINATED else REQUEUE_ME
        if (decided or verdict(cause, None)) is not Verdict.REQUEUE:
            return 0 if is_cancelled() else STOPPED
        self.check_restart(progress)
        if self.chain is None:
            return 0 if _is_requeued(self.job) else REQUEUE_ME
        resumes = f"job {self.next_job()} resumes the run"
        if ended := self.log.ended():
            self.log.end_attempt(f"{ended['why']}; {resumes}")
        logger.info(resumes)
        return 0

    def next_job(self) -> str:
        """The job of the chain that resumes when this one has ended.

        Raises:
            GivenUp: there is none.
        """
        later = self.chain.later_jobs() if self.chain else []
        if not later:
            raise GivenUp(
                f"given up: job {self.job} is the last of its chain, and {self.log.root} is not finished. To resume "
                f"from its last checkpoint: {self.resume}"
            )
        return later[0]

    def _decide(self, cause: Cause, is_cancelled: Callable[[], bool]) -> Verdict | None:
        """Ask Slurm until it answers. Nothing is lost meanwhile: work is saved, and if Slurm kills the job, it does
        with it what it would have answered.

        Returns:
            None if Slurm's commands do not work here, as in a container without them or without the site's keys.
        """
        if not shutil.which("scontrol"):
            return None
        began = time.monotonic()
        while not is_cancelled():
            try:
                record = slurm_record(self.job)
            except SlurmError as error:
                if time.monotonic() > began + _REQUEUE_PATIENCE_S:
                    logger.warning(error)
                    return None
                record = None
            decided = verdict(cause, record)
            if decided is not Verdict.UNKNOWN and (decided is not Verdict.END or time.monotonic() > began + _SETTLED_S):
                return decided
            time.sleep(_ASK_AGAIN_S)
        return Verdict.END

    def seconds_left(self) -> float:
        """How long this job may take to save its work once it was asked to stop."""
        if self.restart is None:
            return _LOCAL_S
        try:
            record = slurm_record(self.job)
        except SlurmError:
            record = None
        return seconds_left(record, time.time(), kill_wait_s=read_kill_wait_s())


def _is_requeued(job: str) -> bool:
    """Requeue the job; whether Slurm has accepted it. If not, the batch script tries again."""
    try:
        requeue(job, patience_s=_REQUEUE_PATIENCE_S)
        return True
    except SlurmError as error:
        again = " The batch script tries again." if isinstance(error, SlurmUnavailable) else ""
        logger.warning(f"{error}{again}")
    return False
