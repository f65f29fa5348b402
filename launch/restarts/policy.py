"""The restart policy: may a start of a job be repeated, and who repeats it?

This is decided here and nowhere else, for training, evaluation and the array tasks of conversions:

    restarts = Restarts.of_this_job(AttemptLog(folder), resume="python launch/submit.py --resume RUN")
    restarts.check_start(progress)                          before any work; raises GivenUp
    restarts.begin(progress, nodes=2)                       a line in folder/attempts.jsonl
    …
    sys.exit(restarts.after_stop(Cause.WARNED, progress))   rank 0, when all ranks have stopped

**The budget.** Every automatic restart counts, whatever its cause: the job's own requeue, a lost node, Slurm's requeue
of a preempted job. A job may be restarted ``--restarts-without-progress`` times in a row without progress; then it is
given up. Progress is a number that only grows when work is saved: the step of the newest checkpoint, counted images,
items done. Starts that died before they could record anything count too: Slurm says how often the job has come back
(SLURM_RESTART_COUNT). A new submission has a job number, and so a budget, of its own. The jobs of a chain (chain.py)
have one budget together, and none of them requeues itself.

**Who repeats it.** Slurm requeues a job by itself when a node fails, when somebody calls `scontrol requeue`, and when
it is preempted and killed. What a preempted job that ends within its grace time becomes depends on the version:

    until 23.11   COMPLETED: the job has to requeue itself before it ends
    from 24.05    requeued when its batch script ends, with any exit code, where PreemptMode is REQUEUE. The mark that
                  says so survives a requeue: after `scontrol requeue` by the job itself, the end of its *next* start
                  would count as a preemption. So it just ends.

Where PreemptMode is CANCEL, no version requeues it, and the job does.
"""

from __future__ import annotations

import enum
import logging
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from cfmask.errors import UserError
from cfmask.runtime.attempts import AttemptLog
from launch.slurm.client import SlurmError, SlurmUnavailable, ask, show_job, version
from launch.slurm.control import requeue
from launch.slurm.site import read_config
from launch.slurm.states import is_running
from launch.slurm.texts import parse_records, seconds
from launch.state.attempt import attempt_name, restart_of

if TYPE_CHECKING:
    import submitit

    from launch.restarts.chain import Chain

logger = logging.getLogger(__name__)

RESTARTS_WITHOUT_PROGRESS = 3
"""The default budget."""
VARIABLE = "CFMASK_RESTARTS_WITHOUT_PROGRESS"
"""Environment variable in which a job has its budget (launch/allocation/resolve.py)."""

STOPPED = 128 + signal.SIGTERM
"""Exit code of a rank that has stopped and asks for nothing: the job is over, or Slurm requeues it by itself."""
REQUEUE_ME = 144
"""Exit code that asks for a requeue: of the batch script on Slurm, where the rank cannot call scontrol (a container);
of submitit's local executor, whose own number it is."""
REQUEUE_IF_PREEMPTED = 145
"""Exit code that asks the batch script for a requeue if Slurm has preempted the job."""

_REQUEUES_PREEMPTED = (24, 5)
"""The first version of Slurm that requeues a preempted job which ends within its grace time."""
_SETTLED_S = 10.0
"""A TERM that Slurm's record does not explain within this time was sent by somebody else."""
_ASK_AGAIN_S = 2.0
_REQUEUE_PATIENCE_S = 120.0
"""How long Slurm is asked for a requeue, or asked again after an error; then the batch script tries."""
_KILL_WAIT_S = 30.0
"""Slurm's default between TERM and KILL of a job that it ends (KillWait)."""
_LOCAL_S = 45.0
"""On this machine nobody kills ranks that were asked to stop; whoever has pressed Ctrl-C waits for a minute."""


class GivenUp(UserError):
    """The budget is spent: the job is not started again by itself."""


class Cause(enum.Enum):
    """Why a start has ended."""

    WARNED = "warned"
    """USR2, or the time limit is near: it is meant to come back."""
    TERMINATED = "terminated"
    """TERM or INT: a preemption, a cancellation or a requeue. Slurm knows which."""
    NODE_LOST = "node lost"


class Verdict(enum.Enum):
    REQUEUE = "requeue"
    """The job has to ask for it."""
    SLURM_DECIDES = "slurm decides"
    """The job just ends: Slurm requeues it, or is ending it for good already."""
    END = "end"
    """Nobody wants it back."""
    UNKNOWN = "unknown"
    """Slurm has not answered, and the cause alone does not say."""


# --- facts ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class JobRecord:
    """What Slurm says of a job that runs, or did a moment ago."""

    state: str
    """As `scontrol show job` names it; "" if Slurm does not know the job any more."""
    preempted: bool = False
    """It has been chosen for preemption, and is in its grace time."""
    slurm_requeues: bool = False
    """Slurm requeues it, if it is preempted, when its batch script ends."""
    end_time: float | None = None
    """Unix time at which it is killed, or was ended; the end of the grace time if it is preempted."""

    @classmethod
    def of(cls, shown: Mapping[str, str], *, slurm: tuple[int, int], preempt_mode: str) -> JobRecord:
        """
        Args:
            shown: fields of `scontrol show job`.
            slurm: its version, (22, 5).
            preempt_mode: of the job's partition or QOS: "REQUEUE", "GANG,REQUEUE", "CANCEL", …
        """
        return cls(
            state=shown.get("JobState", ""),
            preempted=_unix_time(shown.get("PreemptTime")) is not None,
            slurm_requeues=slurm >= _REQUEUES_PREEMPTED
            and "REQUEUE" in preempt_mode.upper()
            and shown.get("Requeue") != "0",
            end_time=_unix_time(shown.get("EndTime")),
        )

    @property
    def is_live(self) -> bool:
        """Whether it runs, and Slurm has not begun to end or requeue it."""
        return is_running(self.state)


def _unix_time(text: str | None) -> float | None:
    """Of 2026-11-24T12:00:00 in local time; None for "None", "N/A", "Unknown"."""
    try:
        return datetime.fromisoformat(text or "").timestamp()
    except ValueError:
        return None


@dataclass(frozen=True)
class JobStart:
    """A start of a job that was recorded: how often the job had come back by then, and from what progress."""

    restart: int
    progress: int


# --- decisions --------------------------------------------------------------------------------------------------------


def verdict(cause: Cause, job: JobRecord | None) -> Verdict:
    """Who repeats a start that has stopped in an orderly way, or lost a node. The budget is another question.

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
    """How many starts of a job, recorded or not, have passed since progress was last made, before its start number
    ``restart`` (0 is the first one).

    Args:
        starts: those that were recorded, in order.
        progress: what is saved now.
    """
    first = 0
    if starts:
        idle = [start for start in starts if start.progress >= progress]
        # The last one that got on may have been followed by starts that recorded nothing.
        first = idle[0].restart if idle else starts[-1].restart + 1
    return max(0, restart - first)


def seconds_left(job: JobRecord | None, now: float, *, kill_wait_s: float = _KILL_WAIT_S) -> float:
    """Until Slurm kills the job's processes, as far as is known; an answer that is missing counts as the least that
    there can be."""
    if job is None or not job.state:
        return kill_wait_s
    end = now if job.end_time is None else job.end_time
    if not job.is_live:  # TERM was sent at its end time
        return max(0.0, min(kill_wait_s, end + kill_wait_s - now))
    return max(0.0, end - now) if job.end_time is not None else float("inf")


# --- a job ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Restarts:
    """The policy for the job that this process is part of.

    log: where its starts are recorded. job: its number, "123" or "123_4". restart: how often Slurm has started it
    again; None on the local executor. limit: the budget. resume: the command that starts it with a fresh budget. unit:
    of the progress. chain: None if it is no job of one.
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
        return cls(
            log=log,
            job=environment.job_id,
            restart=restart_of(environment),
            limit=int(os.environ.get(VARIABLE) or RESTARTS_WITHOUT_PROGRESS),
            resume=resume,
            unit=unit,
        )

    @property
    def attempt(self) -> str:
        return attempt_name(self.job, self.restart)

    # --- the budget

    def check_start(self, progress: int) -> None:
        """Asked before a start is begun.

        Raises:
            GivenUp: it would be one more than the budget has.
        """
        self._check(len(self._recorded()) if self.restart is None else self._earlier() + self.restart, progress)

    def begin(self, progress: int, **facts: Any) -> None:
        """Record this start. Raises OSError."""
        self.log.begin(job=self.attempt, from_step=progress, **facts)

    def check_restart(self, progress: int) -> None:
        """Asked before this start is repeated: a job is not queued only to be given up.

        Raises:
            GivenUp: the budget is spent.
        """
        self._check(len(self._recorded()) if self.restart is None else self._earlier() + self.restart + 1, progress)

    def _check(self, restart: int, progress: int) -> None:
        idle = starts_without_progress(self._recorded(), restart, progress)
        if restart == 0 or idle <= self.limit:
            return
        starts = "one start" if idle == 1 else f"{idle} starts in a row"
        who = f"job {self.job}" if self.chain is None else f"the chain up to job {self.job}"
        raise GivenUp(
            f"given up: {who} made no progress beyond {self.unit} {progress} in {starts}, and "
            f"--restarts-without-progress allows {self.limit}. {self._causes(idle)} Mend the cause, or allow more with "
            f"--restarts-without-progress; then: {self.resume}"
        )

    def _earlier(self) -> int:
        """Starts of the jobs before this one in its chain."""
        return self.chain.first_starts(self.log.lines())[self.job] if self.chain else 0

    def _recorded(self) -> list[JobStart]:
        """This job's starts that know their progress, and those of the jobs before it in its chain. A local job's
        number is that of a process, which may come again: there, those at the end count."""
        found: list[JobStart] = []
        lines = self.log.lines()
        first = self.chain.first_starts(lines) if self.chain else {self.job: 0}
        for line in lines:
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
        ends += [line["why_last_ended"] for line in reversed(self.log.lines()) if line.get("why_last_ended")]
        counted = Counter(str(why).removesuffix(".") for why in ends[:number])
        if not counted:
            return "None of them has recorded why; see their logs."
        shown = [f"{why} ({times} times)" if times > 1 else why for why, times in counted.items()]
        return f"Their ends: {'; '.join(shown)}."

    # --- the end of a start

    def after_stop(self, cause: Cause, progress: int, is_cancelled: Callable[[], bool] = lambda: False) -> int:
        """Called by rank 0 when all ranks have stopped and their work is saved. Requeues the job if that is right.

        Args:
            is_cancelled: whether the work was ended for good, whatever Slurm says.

        Returns:
            The exit code of this process.

        Raises:
            GivenUp: it should be repeated, and the budget is spent.
        """
        if is_cancelled():
            return 0
        if self.restart is None:
            if cause is Cause.TERMINATED:
                return STOPPED
            self.check_restart(progress)
            return REQUEUE_ME
        if self.chain is not None:
            return self._hand_over(cause, progress, is_cancelled)
        if not shutil.which("scontrol"):  # a container: the batch script, outside of it, asks
            self.check_restart(progress)
            return REQUEUE_IF_PREEMPTED if cause is Cause.TERMINATED else REQUEUE_ME
        try:
            decided = self._ask(cause, is_cancelled)
        except SlurmError as error:
            logger.info(f"{error} The batch script asks.")
            self.check_restart(progress)
            return REQUEUE_IF_PREEMPTED if cause is Cause.TERMINATED else REQUEUE_ME
        if decided is not Verdict.REQUEUE:
            return 0 if is_cancelled() else STOPPED
        self.check_restart(progress)
        return 0 if _is_requeued(self.job) else REQUEUE_ME

    def _hand_over(self, cause: Cause, progress: int, is_cancelled: Callable[[], bool]) -> int:
        """``after_stop`` in a job of a chain: where another one would requeue itself, the next job resumes."""
        try:
            decided = self._ask(cause, is_cancelled) if shutil.which("scontrol") else verdict(cause, None)
        except SlurmError:
            decided = verdict(cause, None)
        if decided is not Verdict.REQUEUE:
            return 0 if is_cancelled() else STOPPED
        self.check_restart(progress)
        resumes = f"job {self.next_job()} resumes the run"
        if ended := self.log.ended():
            self.log.end(f"{ended['why']}; {resumes}")
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
                f"given up: job {self.job} is the last of its chain, and {self.log.folder} is not finished. To resume "
                f"from its last checkpoint: {self.resume}"
            )
        return later[0]

    def _ask(self, cause: Cause, is_cancelled: Callable[[], bool]) -> Verdict:
        """Until there is an answer. Who waits loses nothing: work is saved, and a job that is killed meanwhile becomes
        what Slurm meant it to become.

        Raises:
            SlurmError: Slurm's commands do not work here, as in a container that has them and not the site's keys.
        """
        began = time.monotonic()
        settled = began + _SETTLED_S
        while not is_cancelled():
            try:
                record = slurm_record(self.job)
            except SlurmError:
                if time.monotonic() > began + _REQUEUE_PATIENCE_S:
                    raise
                record = None
            decided = verdict(cause, record)
            if decided is not Verdict.UNKNOWN and (decided is not Verdict.END or time.monotonic() > settled):
                return decided
            time.sleep(_ASK_AGAIN_S)
        return Verdict.END

    def seconds_left(self) -> float:
        """How long this job may go on saving its work, once it was asked to stop."""
        if self.restart is None:
            return _LOCAL_S
        try:
            record = slurm_record(self.job)
        except SlurmError:
            record = None
        return seconds_left(record, time.time(), kill_wait_s=_kill_wait_s())


# --- asking Slurm -----------------------------------------------------------------------------------------------------


def slurm_record(job: str, *, patience_s: float = 10.0) -> JobRecord | None:
    """None if Slurm does not answer.

    Raises:
        SlurmError: its commands fail for another reason.
    """
    try:
        shown = show_job(job, patience_s=patience_s)
        number = version(patience_s=patience_s)
        record = JobRecord.of(shown, slurm=number, preempt_mode="REQUEUE")
        if record.preempted and record.slurm_requeues:
            return JobRecord.of(shown, slurm=number, preempt_mode=_preempt_mode(shown, patience_s))
        return record
    except SlurmError as error:
        logger.info(f"Slurm does not say how it stands with job {job}: {error}")
        if isinstance(error, SlurmUnavailable):
            return None
        raise


def _preempt_mode(shown: Mapping[str, str], patience_s: float) -> str:
    """What becomes of a job that is preempted: of its QOS or its partition, as PreemptType says."""
    config = read_config(patience_s=patience_s)
    default = config.get("PreemptMode", "")
    try:
        if config.get("PreemptType") == "preempt/qos":
            query = ("sacctmgr", "--noheader", "--parsable2", "show", "qos", shown.get("QOS", ""), "format=PreemptMode")
            mode = ask(*query, patience_s=0).strip()
            return default if mode.lower() in ("", "cluster") else mode
        partition = ask(
            "scontrol", "--oneliner", "show", "partition", shown.get("Partition", ""), patience_s=patience_s
        )
        return next(iter(parse_records(partition, first="PartitionName")), {}).get("PreemptMode", default)
    except SlurmError:  # no database, or a partition that is gone
        return default


def _kill_wait_s() -> float:
    try:
        return seconds(read_config(patience_s=0)["KillWait"])
    except (SlurmError, ValueError, KeyError):
        return _KILL_WAIT_S


def _is_requeued(job: str) -> bool:
    """Ask Slurm for it; whether it has been done."""
    try:
        requeue(job, patience_s=_REQUEUE_PATIENCE_S)
        return True
    except SlurmUnavailable as error:
        logger.info(f"{error} The batch script tries again.")
    except SlurmError as error:
        logger.info(error)
    return False


# --- the batch script -------------------------------------------------------------------------------------------------


def batch_script_end(failures: str) -> list[str]:
    """The last lines of a batch script, in sh, where $status has the exit code of srun: print the failure report of the
    rank that died first, and requeue where Python has decided so but could not do it. They follow ``verdict``; what is
    left to them are jobs whose ranks are in a container without scontrol, and lost nodes.

    Args:
        failures: RUN/jobs/failures, as a word of the shell.
    """
    major, minor = _REQUEUES_PREEMPTED
    return [
        "attempt=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"
        "-${SLURM_RESTART_COUNT:-0}",
        f'report={failures}/"$attempt"',
        'if [ "$status" -ne 0 ]; then cat "$report.txt" 2>/dev/null; fi',
        "requeue=",
        f'if [ "$status" -eq {REQUEUE_ME} ] || [ "$status" -ne 0 -a -e "$report.restart" ]; then requeue=1; fi',
        f'if [ "$status" -eq {REQUEUE_IF_PREEMPTED} ] || [ -n "$requeue" ]; then',
        '    job=$(scontrol --oneliner show job "$SLURM_JOB_ID")',
        "    slurm=$(scontrol --version | tr . ' ' | while read -r _ a b _; do echo $((a * 100 + ${b#0})); done)",
        '    case "$job" in *" PreemptTime="[0-9]*)',
        "        requeue=1",
        f'        if [ "${{slurm:-0}}" -ge {100 * major + minor} ]; then',
        "            config=$(scontrol show config)",
        '            case "$config" in',
        '                *preempt/qos*) mode=$(sacctmgr -nP show qos "$SLURM_JOB_QOS" format=PreemptMode) ;;',
        '                *) mode=$(scontrol --oneliner show partition "$SLURM_JOB_PARTITION")',
        "                   mode=$(echo \"$mode\" | sed -n 's/.*PreemptMode=\\([^ ]*\\).*/\\1/p') ;;",
        "            esac",
        '            case "$mode" in "" | [Cc]luster | CLUSTER)',
        "                mode=$(echo \"$config\" | sed -n 's/^PreemptMode *= *//p') ;;",
        "            esac",
        '            case "$mode" in *REQUEUE* | *requeue*) requeue= ;; esac',
        "        fi ;;",
        "    esac",
        '    case "$job" in *" JobState=RUNNING "* | "") ;; *) requeue= ;; esac  # else Slurm is ending it already',
        "fi",
        # Slurm ends this script with the requeue, and KillWait later kills it. Only a job that waits can be updated.
        "trap '' TERM",
        'for again in ${requeue:+1 2 3 4 5 6}; do scontrol requeue "$SLURM_JOB_ID" && break; sleep 10; done',
        'if [ -n "$requeue" -a -s "$report.exclude" ]; then',
        "    for again in 1 2 3 4 5; do",
        '        scontrol update "jobid=$SLURM_JOB_ID" "ExcNodeList=$(cat "$report.exclude")" && break; sleep 1',
        "    done",
        "fi",
        'exit "$status"',
    ]
