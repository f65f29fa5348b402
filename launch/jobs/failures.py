"""How a job ends badly: a rank that dies takes the others along within seconds, and its failure
report comes last in the log.

A rank is two processes (``supervise``). The one that Slurm or the local controller has started waits for its child, and
the child trains: what the kernel has killed cannot speak for itself, and what is stuck in a collective, or
in a driver that lets no Python run, cannot end by itself.

    RUN/jobs/failures/
      123-0_1.json   rank 1's, of the first start of job 123: what it raised, or which signal killed it
      123-0.txt      those of the rank that died first, as the log ends with them
      123-0.lost     all reports are of ranks cut off from one without a report: its node is lost, and the job requeued

    a rank dies   its report is there at once; 2 s later, when others had time for theirs, it is decided who was first,
                  RUN/ended.json says so, and the process ends with an exit code that is not 0
    the others    look for reports every 2 s; what has not ended by itself 8 s later is killed
    on Slurm      srun --kill-on-bad-exit ends them as well: with a TERM, which here means a checkpoint and is of no use
                  to a rank that hangs, and after KillWait (30 s, or what a site likes) with a KILL. When all are gone
                  the batch script prints the report.

There is no report of an end that ranks have agreed on: finished, stopped with a checkpoint, to be requeued, cancelled.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cfmask.errors import UserError
from cfmask.files import write_atomically
from cfmask.runs import RunFolder
from cfmask.runtime.jsonl import read_object
from cfmask.runtime.machine import process_runs
from cfmask.runtime.process import JOB_SIGNALS, adopt_orphans, die_with_parent, ignore_job_signals, kill_children
from cfmask.secrets import mask_secrets
from launch.jobs.processes import JOBS_VARIABLE, SAVE_WITHIN_S
from launch.jobs.restarts import REQUEUE_IF_PREEMPTED, REQUEUE_ME, STOPPED, GivenUp, attempt_name, restart_of
from launch.jobs.run_restarts import restarts_of, saved_progress

_AGREED_ENDS = (0, REQUEUE_ME, REQUEUE_IF_PREEMPTED, STOPPED)
"""Exit codes of a rank that ends as all have agreed to (launch/jobs/restarts.py)."""
_RAISED = 1
"""Exit code of a rank that has raised, and printed it."""
_LOOK_S = 2.0
"""Between two looks for the reports of others: a listing of one small folder."""
_LISTEN_S = 2.0
"""From a rank's death until it is decided who was first: a broken connection is noticed elsewhere in less."""
_GRACE_S = 8.0
"""What a rank has, when another has died, to end by itself: to write a checkpoint to its end, say."""
_GONE_WITHIN_S = 5.0
"""A process that SIGKILL does not end in this time hangs in the kernel, and is left to it."""


@dataclass(frozen=True)
class RankFailure:
    """What a rank that died has left. time: ISO 8601, to the millisecond. error: one line. traceback: "" if it was
    killed. broken_off: it died of a connection to another rank that broke, so another has died before it."""

    rank: int
    node: str
    time: str
    error: str
    traceback: str = ""
    broken_off: bool = False

    @property
    def why(self) -> str:
        """For ended.json."""
        return f"failed: rank {self.rank}{':' if self.traceback else ''} {self.error}"

    def text(self, log: Path) -> str:
        """As the job's log ends with them. log: the rank's own."""
        who, clock = f"rank {self.rank} on {self.node}", self.time[11:19]
        if self.traceback:
            return f"{who} failed first, {clock}:\n{self.traceback.rstrip()}\n"
        return f"{who} {self.error}, {clock}; it was the first to end. Its log: {log}\n"


@dataclass(frozen=True)
class RankStart:
    """A rank of one start of a job."""

    run: RunFolder
    attempt: str
    rank: int
    local: bool
    nodes: int
    world_size: int

    @classmethod
    def found(cls, run: Path) -> RankStart:
        import submitit

        environment = submitit.JobEnvironment()
        return cls(
            run=RunFolder(run),
            attempt=attempt_name(environment.job_id, restart_of(environment)),
            rank=environment.global_rank,
            local=environment.cluster != "slurm",
            nodes=environment.num_nodes,
            world_size=environment.num_tasks,
        )

    @classmethod
    def of_local(cls, run: RunFolder, job: str, rank: int, world_size: int) -> RankStart:
        """For the controller of a local job, which is in no rank's environment."""
        return cls(run, attempt_name(job, None), rank, local=True, nodes=1, world_size=world_size)

    @property
    def file(self) -> Path:
        return _folder(self.run) / f"{self.attempt}_{self.rank}.json"

    def reports(self) -> list[RankFailure]:
        """All that were left at this start, by any rank. Raises OSError."""
        with contextlib.suppress(FileNotFoundError):
            # Listed, not looked up: NFS asks the server when a folder is opened.
            names = os.listdir(_folder(self.run))
            mine = [n for n in names if n.startswith(f"{self.attempt}_") and n.endswith(".json")]
            read = [read_object(_folder(self.run) / name) for name in mine]
            return [RankFailure(**found) for found in read if found]
        return []

    def write_failure(self, error: str, traceback: str = "", broken_off: bool = False) -> None:
        """Only the first report of a rank counts. One that cannot be written is a warning."""
        now = time.time()
        clock = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(now)) + f".{int(now * 1000) % 1000:03}"
        node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        failure = RankFailure(self.rank, node, clock, error, traceback, broken_off)
        try:
            if self.file.exists():
                return
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.file, json.dumps(asdict(failure)))
        except OSError as reason:
            print(f"warning: {self.file} cannot be written: {reason.strerror}", file=sys.stderr, flush=True)


def report_of(run: RunFolder, job: str) -> str | None:
    """The failure report of the rank that died first when the job ended last, as text; None if there is none."""
    texts = sorted(_folder(run).glob(f"{job}-*.txt"), key=lambda path: path.stat().st_mtime)
    return texts[-1].read_text(errors="replace") if texts else None


def _folder(run: RunFolder) -> Path:
    return run.root / "jobs" / "failures"


# --- the rank -----------------------------------------------------------------------------------------------------


def write_failure(run: Path, error: BaseException) -> None:
    """Called in a rank that will not survive this error, as soon as it is known: what closing takes (a checkpoint that
    is being written, a driver) is none of the others' time."""
    RankStart.found(run).write_failure(
        mask_secrets(f"{type(error).__name__}: {str(error)[:500]}"),
        mask_secrets(_formatted(error)),
        broken_off=is_connection_loss(error, group_formed=_group_formed()),
    )


def _formatted(error: BaseException) -> str:
    """The traceback, without what runs before our code does."""
    entry = error.__traceback__
    while entry and not entry.tb_frame.f_code.co_filename.endswith("launch/jobs/rank.py"):
        entry = entry.tb_next
    return "".join(traceback.format_exception(type(error), error, entry or error.__traceback__))


_CONNECTION_LOST = (
    *("connection reset by peer", "connection closed by peer", "connection was likely closed", "broken pipe"),
    *("connection timed out", "no route to host", "timed out waiting", "wait timeout after"),
    *("application timeout caused pair closure", "ncclremoteerror", "remote process exited"),
)
"""What gloo, torch's store and NCCL say when a peer is gone or silent; their errors have no classes of their own."""
_OWN_FAULT = (
    *("ncclinvalid", "ncclunhandledcuda", "ncclsystemerror", "ncclinternalerror", "duplicate gpu"),
    *("unable to find address", "unable to find interface", "address already in use", "connection refused"),
)
"""What they say when it is this machine, or how it is set up."""


def is_connection_loss(error: BaseException, *, group_formed: bool) -> bool:
    """Whether a rank failed only because another one is gone. What goes wrong while ranks come together is a failure of
    its own: an interface that a node does not have, or a GPU that two ranks share, would be so again.

    Args:
        group_formed: the process group had been made.
    """
    text = str(error).lower()
    return (
        group_formed
        and isinstance(error, RuntimeError)
        and any(part in text for part in _CONNECTION_LOST)
        and not any(part in text for part in _OWN_FAULT)
    )


def _group_formed() -> bool:
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def _be_the_rank(rank: Callable[[], object], run: Path, supervisor: int) -> None:
    die_with_parent(supervisor)
    faulthandler.enable()  # a segmentation fault has a traceback too
    try:
        rank()
    except Exception as error:
        try:
            write_failure(run, error)
        finally:
            sys.stderr.write(mask_secrets("".join(traceback.format_exception(error))))
            sys.stdout.flush()
            sys.stderr.flush()
            # Not through Python's own end: there threads are waited for, and a communicator that others hang in.
            os._exit(_RAISED)
    finally:
        ignore_job_signals()  # Python's own end would restore what they do by default


# --- the process that waits for it --------------------------------------------------------------------------------


def supervise(rank: Callable[[], object], run: Path) -> int:
    """Do this in a child process, and see to it that it ends if another rank dies.

    Signals that this process is sent are the child's: where Slurm tracks processes by cgroup, it signals no other. In
    the child this returns, or leaves by SystemExit, as rank does.

    Returns:
        The exit code of this process.
    """
    parent, own = os.getppid(), os.getpid()
    adopt_orphans()
    here = RankStart.found(run)
    # The local executor's second start has the first one's name. Before the child may write its own.
    here.file.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        _be_the_rank(rank, run, own)
        return 0

    def pass_on(number: int, frame: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)

    for number in JOB_SIGNALS:
        signal.signal(number, pass_on)
    code = _wait(child, here, parent)
    kill_children()  # what the rank has started and not ended
    if code in _AGREED_ENDS:
        return code
    text = ""
    try:
        if here.file.exists():
            time.sleep(_LISTEN_S)
        text = _conclude(here, spoken=code == _RAISED)
    except OSError as error:
        print(f"warning: the failure report of {run} cannot be made: {error}", file=sys.stderr, flush=True)
    if here.local and here.rank == 0:
        print(text, end="", flush=True)
    return code


def _wait(child: int, here: RankStart, parent: int) -> int:
    """The child's exit code, 128 + the signal that killed it. If another rank has died, the child has little time; if
    the process that started this one is gone, it has SAVE_WITHIN_S for a checkpoint."""
    other_failed, orphaned, kill_at, give_up_at = False, False, float("inf"), float("inf")
    look_at, ask_at = time.monotonic() + _LOOK_S, 0.0
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        now = time.monotonic()
        if ended:
            break
        if now > give_up_at:
            return 1
        if now > kill_at:
            os.kill(child, signal.SIGKILL)
            kill_at, give_up_at = float("inf"), now + _GONE_WITHIN_S
        elif now > look_at and not other_failed:
            look_at = now + _LOOK_S
            with contextlib.suppress(OSError):  # looked for again: a file system that is away ends no training
                other_failed = bool(here.reports())
            kill_at = min(kill_at, now + _GRACE_S) if other_failed else kill_at
        if not orphaned and _is_orphaned(here, parent):
            orphaned, kill_at = True, min(kill_at, now + SAVE_WITHIN_S)
            print("The process that started this rank is gone: the rank saves a checkpoint and ends.", flush=True)
        if orphaned and now > ask_at:
            ask_at = now + 1.0  # again and again: in its first second a rank does not hear it
            os.kill(child, signal.SIGTERM)
        time.sleep(0.1)
    ignore_job_signals()
    code = os.waitstatus_to_exitcode(status)
    if code not in _AGREED_ENDS and give_up_at == float("inf"):  # not killed from here
        here.write_failure(_how_it_ended(code))
    return code if code >= 0 else 128 - code


def _is_orphaned(here: RankStart, parent: int) -> bool:
    """Whether slurmstepd, or the local controller, was killed. Between that one and this process there may be others,
    of the command that starts Python."""
    if os.getppid() != parent:
        return True
    return here.local and JOBS_VARIABLE in os.environ and not process_runs(int(here.attempt.partition("-")[0]))


def _how_it_ended(code: int) -> str:
    """Of a rank that has said nothing itself. code: negative if a signal killed it."""
    if code >= 0:
        return f"ended with exit code {code} and without a word"
    reason = ": out of memory?" if -code == signal.SIGKILL else ""
    return f"was killed by signal {-code} ({signal.Signals(-code).name}{reason})"


def report_for(here: RankStart, code: int, log: Path) -> bool:
    """Called by the local controller when the process that waits for a rank has ended: write the rank's failure report
    if that process could not.

    Args:
        code: how it ended; negative if a signal killed it.
        log: the rank's.

    Returns:
        Whether it was written.
    """
    if code in _AGREED_ENDS or (code > 0 and here.reports()):
        return False
    if code < 0:
        here.write_failure(f"lost the process that waits for it, which {_how_it_ended(code)}")
    else:  # before it had a child: its copy of the code is damaged, or there is no such Python
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        here.write_failure(f"ended with exit code {code}: {lines[-1] if lines else 'its log is empty'}")
    return True


def conclude_for(here: RankStart, log: Path) -> None:
    """Called by the local controller when all ranks have ended, for one that ``report_for`` wrote the report of.

    Args:
        log: rank 0's, which ends with the report of the rank that died first.
    """
    text = _conclude(here, spoken=False)
    if text and here.rank == 0:
        with open(log, "a") as file:
            file.write(text)


def _conclude(here: RankStart, *, spoken: bool) -> str:
    """Every rank that ends badly does this, with what is known by then; the last one knows best.

    Args:
        spoken: the rank's log ends with its own traceback.

    Returns:
        What rank 0's log of a local job is to end with; on Slurm the batch script prints it, after srun's own.
    """
    failure = _first(here.reports())
    ended = here.run.ended() if here.run.begun_by(here.attempt) else None
    if failure is None or (ended is not None and ended["why"].startswith(("finished", "stopped"))):
        return ""  # the run had come to an end by then, and rank 0 has said to which
    text = failure.text(here.run.root / "jobs" / f"{here.attempt.rpartition('-')[0]}_{failure.rank}_log.out")
    mark = _folder(here.run) / f"{here.attempt}.lost"
    why = failure.why
    mark.unlink(missing_ok=True)  # of a rank that had not heard yet
    if failure.broken_off and not here.local and here.nodes > 1:
        why = f"lost a rank without a report: rank {failure.rank} was cut off"
        refusal = _refusal_of_restart(here.run)
        what_next = f"The job is not requeued: {refusal}" if refusal else "The job goes back into the queue."
        text += f"No rank has said why, as when a node is lost. {what_next}\n"
        why = f"{why}; {refusal}" if refusal else why
        if not refusal:
            mark.touch()
    write_atomically(_folder(here.run) / f"{here.attempt}.txt", text)
    _record(here, failure, why)
    return "" if failure.rank == here.rank and spoken else text


def _refusal_of_restart(run: RunFolder) -> str | None:
    """Why the job is not to come back after the loss of a node; None if it is."""
    if cancelled := run.cancelled():
        return f"cancelled by {cancelled['by']}"
    try:
        restarts_of(run).check_restart(saved_progress(run))
    except GivenUp as given_up:
        return str(given_up)
    return None


def _first(left: list[RankFailure]) -> RankFailure | None:
    """Who died first. A rank that was killed is heard of later than the connections that break with it, also before
    there is a process group. What several ranks raise alike, because they know the same, the lowest of them says."""
    if not left:
        return None
    killed = any(not failure.traceback for failure in left)

    def order(failure: RankFailure) -> tuple[bool, str]:
        cut_off = killed and any(text in failure.error.lower() for text in _CONNECTION_LOST)
        return failure.broken_off or cut_off, failure.time

    first = min(left, key=order)
    alike = [failure for failure in left if failure.traceback and failure.error == first.error]
    return min(alike, key=lambda failure: failure.rank, default=first)


def _record(here: RankStart, failure: RankFailure, why: str) -> None:
    """Say it in ended.json, unless rank 0 has said as much; a start that had not begun to train is one all the same."""
    run = here.run
    if not run.has_work():
        return  # launch/doctor.py's folder
    if run.begun_by(here.attempt):
        if run.ended() is None or failure.rank != 0 or why != failure.why:
            run.end_attempt(why)
        return
    facts: dict[str, Any] = {"job": here.attempt, "nodes": here.nodes, "world_size": here.world_size}
    owner = run.owner()
    if owner is None or owner.why_dead():
        with contextlib.suppress(UserError), run.locked(here.attempt, patience_s=0):
            run.end_failed(why, **facts)
    elif owner.job == here.attempt and failure.rank == here.rank:
        run.end_failed(why, **facts)  # rank 0 holds the folder, and waits for this rank to come
    # Else another job does, and this one was refused.
