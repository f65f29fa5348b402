"""How a job ends badly: a rank that fails, or makes no progress, ends the others within seconds, and its failure report
comes last in the log.

A rank is two processes (``supervise``). The one that Slurm or the local controller has started waits for its child, and
the child trains: what the kernel has killed cannot speak for itself, and what is stuck in a collective, or
in a driver that lets no Python run, cannot end by itself.

    a rank fails  its report is there at once (failure_reports.py); 2 s later, when others had time for theirs, it is
                  decided who was first, RUN/ended.json says so, and the process ends with an exit code that is not 0
    a rank hangs  the same, when its time is over (hangs.py): with the stacks of its threads
    the others    look for reports every 2 s; of a rank that hangs, each reports what it was doing; what has not ended
                  by itself 8 s later is killed
    on Slurm      srun --kill-on-bad-exit ends them as well: with a TERM, which here means a checkpoint and is of no use
                  to a rank that hangs, and after KillWait (30 s, or what a site likes) with a KILL. When all are gone
                  the batch script prints the report, and requeues the job if ``restarts.py`` allows it.

There is no report of an end that ranks have agreed on: finished, stopped with a checkpoint, to be requeued, cancelled.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from cfmask.errors import UserError
from cfmask.files import write_atomically
from cfmask.runtime import nccl
from cfmask.runtime.machine import process_runs
from cfmask.runtime.process import (
    JOB_SIGNALS,
    adopt_orphans,
    die_with_parent,
    exit_without_finalization,
    ignore_job_signals,
    kill_children,
)
from cfmask.secrets import mask_secrets
from launch.ranks.beside_rank_0 import BesideRank0, tell_end
from launch.ranks.hangs import Hang, HangWatch
from launch.ranks.health import NodeUnhealthy
from launch.restarts.policy import REQUEUE_IF_PREEMPTED, REQUEUE_ME, STOPPED
from launch.restarts.retries import Decision, decide
from launch.state.failure_reports import (
    DEVICE,
    HUNG,
    KILLED,
    RAISED,
    UNHEALTHY,
    RankFailure,
    RankStart,
    first_failure,
    is_connection_loss,
    is_device_error,
    says_connection_lost,
)
from launch.state.processes import JOBS_VARIABLE, SAVE_WITHIN_S

logger = logging.getLogger(__name__)

_AGREED_ENDS = (0, REQUEUE_ME, REQUEUE_IF_PREEMPTED, STOPPED)
"""Exit codes of a rank that ends as all have agreed to (launch/restarts/policy.py)."""
_RAISED = 1
"""Exit code of a rank that has raised, and printed it."""
_LOOK_S = 2.0
"""Between two looks for the reports of others: a listing of one small folder."""
_LISTEN_S = 2.0
"""From a rank's failure until it is decided who was first: a broken connection is noticed elsewhere in less."""
_GRACE_S = 8.0
"""What a rank has, when another has failed, to end by itself: to write a checkpoint to its end, say."""
_GONE_WITHIN_S = 5.0
"""A process that SIGKILL does not end in this time hangs in the kernel, and is left to it."""
_TAIL_BYTES = 1 << 16


# --- the rank -----------------------------------------------------------------------------------------------------


def write_failure(run: Path, error: BaseException) -> None:
    """Called in a rank that will not survive this error, as soon as it is known: what closing takes (a checkpoint that
    is being written, a driver) is none of the others' time."""
    kind = UNHEALTHY if isinstance(error, NodeUnhealthy) else DEVICE if is_device_error(error) else RAISED
    RankStart.found(run).write_failure(
        mask_secrets(f"{type(error).__name__}: {str(error)[:500]}"),
        traceback=mask_secrets(_formatted(error)),
        broken_off=is_connection_loss(error, group_formed=_group_formed()),
        kind=kind,
    )


def _formatted(error: BaseException) -> str:
    """The traceback, without what runs before our code does."""
    entry = error.__traceback__
    while entry and not entry.tb_frame.f_code.co_filename.endswith("launch/ranks/rank.py"):
        entry = entry.tb_next
    return "".join(traceback.format_exception(type(error), error, entry or error.__traceback__))


def _group_formed() -> bool:
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def _be_the_rank(rank: Callable[[], object], run: Path, supervisor: int, watch: HangWatch) -> NoReturn:
    die_with_parent(supervisor)
    faulthandler.enable()  # a segmentation fault has a traceback too
    watch.begin_in_child()
    code: object = _RAISED
    try:
        try:
            rank()
            code = 0
        except SystemExit as leaving:
            code = leaving.code or 0
        except BaseException as error:
            write_failure(run, error)
            raise
    except BaseException as error:
        logger.error(mask_secrets("".join(traceback.format_exception(error)).rstrip()))
    if not isinstance(code, int):  # as Python does with a message
        logger.error(mask_secrets(str(code)))
        code = _RAISED
    ignore_job_signals()
    exit_without_finalization(code)


# --- the process that waits for it --------------------------------------------------------------------------------


def supervise(rank: Callable[[], object], run: Path) -> int:
    """Do this in a child process, and see to it that it ends if another rank dies.

    Signals that this process is sent are the child's: where Slurm tracks processes by cgroup, it signals no other. The
    child does not return: it ends with 0 if rank returns, or with the code of its SystemExit.

    Returns:
        The exit code of this process.
    """
    parent, own = os.getppid(), os.getpid()
    adopt_orphans()
    here = RankStart.found(run)
    watch = HangWatch()
    child = os.fork()
    if child == 0:
        _be_the_rank(rank, run, own, watch)
    watch.begin(child)

    def pass_on(number: int, frame: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)

    for number in JOB_SIGNALS:
        signal.signal(number, pass_on)
    beside = BesideRank0(here.run, here.attempt, here.rank)
    code = _wait(child, here, parent, watch)
    kill_children(but=beside.pids)  # what the rank has started and not ended
    if code in _AGREED_ENDS:
        beside.end(failed=None)
        return code
    _report_end(here, code)
    beside.end(failed=f"exit code {code}", node=_node_of_failure(here))
    return code


def _report_end(here: RankStart, code: int) -> None:
    """Say why the job ends, for a rank that has ended badly."""
    text = ""
    try:
        if here.file.exists():
            time.sleep(_LISTEN_S)
        text = _conclude(here, spoken=code == _RAISED)
    except OSError as error:
        logger.warning(f"the failure report of {here.run.root} cannot be made: {error}")
    if here.local and here.rank == 0:
        logger.error(text.rstrip("\n"))


def _node_of_failure(here: RankStart) -> str | None:
    """Of the rank that died first, if it has left a report that can be read."""
    with contextlib.suppress(OSError):
        failure = first_failure(here.reports(), here.world_size)
        return failure.node if failure else None
    return None


def _wait(child: int, here: RankStart, parent: int, watch: HangWatch) -> int:
    """The child's exit code, 128 + the signal that killed it. If it makes no progress, or another rank has failed, it
    has little time; if the process that started this one is gone, it has SAVE_WITHIN_S for a checkpoint."""
    failed, orphaned, kill_at, give_up_at = False, False, float("inf"), float("inf")
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
        elif now > look_at and not failed:
            look_at = now + _LOOK_S
            hang, reports = watch.look(), []
            with contextlib.suppress(OSError):  # looked for again: a file system that is away ends no training
                reports = here.reports()
            if hang or any(report.kind == HUNG for report in reports):
                _report_hang(here, hang or watch.hang(), watch)  # of those that wait as well: what they wait at
            failed = hang is not None or bool(reports)
            kill_at = min(kill_at, now + _GRACE_S) if failed else kill_at
        if not orphaned and _is_orphaned(here, parent):
            orphaned, kill_at = True, min(kill_at, now + SAVE_WITHIN_S)
            logger.info("The process that started this rank is gone: the rank saves a checkpoint and ends.")
        if orphaned and now > ask_at:
            ask_at = now + 1.0  # again and again: in its first second a rank does not hear it
            os.kill(child, signal.SIGTERM)
        time.sleep(0.1)
    ignore_job_signals()
    code = os.waitstatus_to_exitcode(status)
    if code not in _AGREED_ENDS and give_up_at == float("inf"):  # not killed from here
        lost = _watchdog_said(here.log(here.rank)) if code == -signal.SIGABRT else None
        here.write_failure(lost or _how_it_ended(code), kind=KILLED, broken_off=lost is not None)
    return code if code >= 0 else 128 - code


def _report_hang(here: RankStart, hang: Hang, watch: HangWatch) -> None:
    # Before: a rank that is stopped runs for its stacks only.
    recorded = nccl.dump_flight_recorder(here.attempt, here.rank)
    stacks, beat = watch.stacks(), hang.beat
    here.write_failure(
        hang.error, kind=HUNG, step=beat.step, activity=beat.activity, state=hang.state, stacks=mask_secrets(stacks)
    )
    where = f"; NCCL's flight recorder: {here.mark('nccl_')}{here.rank}" if recorded else ""
    logger.error(f"rank {here.rank} {hang.error}{where}; stacks of its threads:\n{stacks}")


def _watchdog_said(log: Path) -> str | None:
    """What NCCL's watchdog has printed before it ended this process with SIGABRT because a connection was lost; None if
    it was not that."""
    with contextlib.suppress(OSError), open(log, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
        lines = file.read().decode(errors="replace").splitlines()
        return next((line.strip()[:300] for line in reversed(lines) if says_connection_lost(line)), None)
    return None


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
        here.write_failure(f"lost the process that waits for it, which {_how_it_ended(code)}", kind=KILLED)
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
    if here.rank == 0:
        tell_end(here.run, here.attempt, failed="lost the process that waits for rank 0", node=_node_of_failure(here))


def _conclude(here: RankStart, *, spoken: bool) -> str:
    """Every rank that ends badly does this, with what is known by then; the last one knows best.

    Args:
        spoken: the rank's log ends with its own traceback.

    Returns:
        What rank 0's log of a local job is to end with; on Slurm the batch script prints it, after srun's own.
    """
    failure = first_failure(here.reports(), here.world_size)
    ended = here.run.ended() if here.run.begun_by(here.attempt) else None
    if failure is None or (ended is not None and ended["why"].startswith(("finished", "stopped"))):
        return ""  # the run had come to an end by then, and rank 0 has said to which
    decision = decide(here, failure)
    text = mask_secrets(failure.text(here.log(failure.rank))) + decision.said
    here.mark("restart").unlink(missing_ok=True)  # of a rank that had not heard yet
    if decision.restarts:
        write_atomically(here.mark("exclude"), ",".join(decision.leave_out))
        here.mark("restart").touch()
    write_atomically(here.mark("txt"), text)
    _record(here, failure, decision)
    return "" if failure.rank == here.rank and spoken and not decision.said else text


def _record(here: RankStart, failure: RankFailure, decision: Decision) -> None:
    """Say it in ended.json, unless rank 0 has said as much; a start that had not begun to train is one all the same."""
    run, why = here.run, decision.why
    if not run.has_work():
        return  # launch/doctor.py's folder
    if run.begun_by(here.attempt):
        if run.ended() is None or failure.rank != 0 or why != failure.why:
            run.end_attempt(why, died=decision.died)
        return
    facts: dict[str, Any] = {"job": here.attempt, "nodes": here.nodes, "world_size": here.world_size}
    facts["died"] = decision.died
    owner = run.owner()
    if owner is None or owner.why_dead():
        with contextlib.suppress(UserError), run.locked(here.attempt, patience_s=0):
            run.end_failed(why, **facts)
    elif owner.job == here.attempt and failure.rank == here.rank:
        run.end_failed(why, **facts)  # rank 0 holds the folder, and waits for this rank to come
    # Else another job does, and this one was refused.
