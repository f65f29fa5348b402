"""The process that supervises a rank: if a rank fails or makes no progress, it ends within seconds, the others too, and
the failure report comes last in the log.

A rank is two processes: Slurm or the local controller starts the supervisor, which forks the rank and waits for it. A
process that the kernel has killed cannot report it, and one that is stuck in a collective, or in a driver that lets no
Python run, cannot end itself.

    a rank fails  its report is written at once (launch/state/failure_reports.py). 2 s later, when other ranks have had
                  time for theirs, it is decided which one failed first; RUN/ended.json records it, and the process
                  ends with a nonzero exit code
    a rank hangs  the same once its time is over (hangs.py), with the stacks of its threads
    the others    look for reports every 2 s. If a rank hangs, each reports what it was doing. A rank that has not ended
                  by itself 8 s later is killed
    on Slurm      srun --kill-on-bad-exit ends them too: with TERM, which here means a checkpoint and does not help if a
                  rank hangs, and with KILL after KillWait (30 s by default). When all are gone, the batch script prints
                  the report, and requeues the job if launch/restarts/ allows it

An end that ranks have agreed on has no report: finished, stopped with a checkpoint, to be requeued, cancelled.

Lines that torch's C++ code, faulthandler and Slurm write into the log have no time, level, rank and node.
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
from cfmask.runtime import nccl
from cfmask.runtime.files import write_atomically
from cfmask.runtime.logging import as_logged, message_of
from cfmask.runtime.machine import node_name, process_runs
from cfmask.runtime.process import (
    JOB_SIGNALS,
    adopt_orphans,
    die_with_parent,
    exit_without_finalization,
    ignore_job_signals,
    kill_children,
)
from cfmask.secrets import mask_secrets
from launch.ranks.beside_rank_0 import BesideRank0, notify_of_end
from launch.ranks.hangs import Hang, HangWatch
from launch.ranks.health import NodeUnhealthy
from launch.restarts.policy import REQUEUE_IF_PREEMPTED, REQUEUE_ME, STOPPED
from launch.restarts.retries import Decision, decide
from launch.state import ends
from launch.state.failure_reports import (
    DEVICE,
    HUNG,
    KILLED,
    RAISED,
    UNHEALTHY,
    RankFailure,
    RankStart,
    is_connection_loss,
    is_device_error,
    says_connection_lost,
)
from launch.state.processes import JOBS_VARIABLE, SAVE_WITHIN_S

logger = logging.getLogger(__name__)

_AGREED_ENDS = (0, REQUEUE_ME, REQUEUE_IF_PREEMPTED, STOPPED)
"""Exit codes of a rank that ends as all ranks have agreed."""
_RAISED = 1
"""Exit code of a rank that has raised an exception and logged it."""
_LOOK_S = 2.0
"""Between two looks for the reports of other ranks, which list one small folder."""
_LISTEN_S = 2.0
"""From a rank's failure to the decision which rank failed first. Other ranks notice a broken connection sooner."""
_GRACE_S = 8.0
"""Time for a rank to end by itself when another one has failed, for example to finish a checkpoint."""
_GONE_WITHIN_S = 5.0
"""A process that SIGKILL does not end within this time hangs in the kernel, and is abandoned."""
_TAIL_BYTES = 1 << 16


# --- the rank ---------------------------------------------------------------------------------------------------------


def write_failure(run: Path, error: BaseException) -> None:
    """Called in a rank as soon as an error is known to end it: the other ranks must not wait until it has closed a
    driver or finished a checkpoint."""
    kind = UNHEALTHY if isinstance(error, NodeUnhealthy) else DEVICE if is_device_error(error) else RAISED
    RankStart.found(run).write_failure(
        mask_secrets(f"{type(error).__name__}: {str(error)[:500]}"),
        traceback=mask_secrets(_formatted(error)),
        broken_off=is_connection_loss(error, group_formed=_group_formed()),
        kind=kind,
    )


def _formatted(error: BaseException, *, whole: bool = False) -> str:
    """The traceback, without the frames that call rank.py unless ``whole``. A UserError, which says what to do, has
    none."""
    if isinstance(error, UserError):
        return f"error: {error}"
    entry = None if whole else error.__traceback__
    while entry and not entry.tb_frame.f_code.co_filename.endswith("launch/ranks/rank.py"):
        entry = entry.tb_next
    return "".join(traceback.format_exception(type(error), error, entry or error.__traceback__))


def _group_formed() -> bool:
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def _be_the_rank(rank: Callable[[], object], run: Path, supervisor: int, watch: HangWatch) -> NoReturn:
    die_with_parent(supervisor)
    faulthandler.enable()
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
        logger.error(mask_secrets(_formatted(error, whole=True).rstrip()))
    if not isinstance(code, int):  # sys.exit("message")
        logger.error(mask_secrets(str(code)))
        code = _RAISED
    ignore_job_signals()
    exit_without_finalization(code)


# --- the supervisor ---------------------------------------------------------------------------------------------------


def supervise(rank: Callable[[], object], run: Path) -> int:
    """Run ``rank`` in a child process, and end it if another rank fails.

    Signals to this process are passed on to the child, because Slurm may signal no other process. The child ends with 0
    if ``rank`` returns, or with the code of its SystemExit.

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
    kill_children(but=beside.pids)
    if code in _AGREED_ENDS:
        beside.end(failed=None)
        return code
    _report_end(here, code)
    beside.end(failed=f"exit code {code}", node=_node_of_failure(here))
    return code


def _report_end(here: RankStart, code: int) -> None:
    """Report why the job ends, for a rank that has failed."""
    text = ""
    try:
        if here.file.exists():
            time.sleep(_LISTEN_S)
        text = _conclude(here, is_logged=code == _RAISED)
    except OSError as error:
        logger.warning(f"the failure report of {here.run.root} cannot be made: {error}")
    if text and here.local and here.rank == 0:
        logger.error(text.rstrip("\n"))


def _node_of_failure(here: RankStart) -> str | None:
    """Of the rank that failed first, if its report can be read."""
    with contextlib.suppress(OSError):
        failure = here.first_failure()
        return failure.node if failure else None
    return None


def _wait(child: int, here: RankStart, parent: int, watch: HangWatch) -> int:
    """Wait for the child, and kill it _GRACE_S after it hangs or another rank has failed. If the process that started
    this one is gone, it has SAVE_WITHIN_S for a checkpoint.

    Returns:
        The child's exit code, or 128 + the signal that killed it.
    """
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
            with contextlib.suppress(OSError):  # looked for again: a lost file system does not end training
                reports = here.reports()
            if hang or any(report.kind == HUNG for report in reports):
                _report_hang(here, hang or watch.hang(), watch)  # also of a rank that only waits
            failed = hang is not None or bool(reports)
            kill_at = min(kill_at, now + _GRACE_S) if failed else kill_at
        if not orphaned and _is_orphaned(here, parent):
            orphaned, kill_at = True, min(kill_at, now + SAVE_WITHIN_S)
            logger.warning("the process that started this rank is gone: the rank saves a checkpoint and ends")
        if orphaned and now > ask_at:
            ask_at = now + 1.0  # repeated, because a rank ignores TERM in its first second
            os.kill(child, signal.SIGTERM)
        time.sleep(0.1)
    ignore_job_signals()
    code = os.waitstatus_to_exitcode(status)
    if code not in _AGREED_ENDS and give_up_at == float("inf"):  # not killed from here
        lost = _watchdog_message(here.log(here.rank)) if code == -signal.SIGABRT else None
        here.write_failure(lost or _how_it_ended(code), kind=KILLED, broken_off=lost is not None)
    return code if code >= 0 else 128 - code


def _report_hang(here: RankStart, hang: Hang, watch: HangWatch) -> None:
    # The flight recorder first: a stopped rank runs only while it writes its stacks.
    recorded = nccl.dump_flight_recorder(here.attempt, here.rank)
    stacks, beat = watch.stacks(), hang.beat
    here.write_failure(
        hang.error, kind=HUNG, step=beat.step, activity=beat.activity, state=hang.state, stacks=mask_secrets(stacks)
    )
    where = f"; NCCL's flight recorder: {here.mark('nccl_')}{here.rank}" if recorded else ""
    logger.error(f"{hang.error}{where}; stacks of its threads:\n{mask_secrets(stacks).rstrip()}")


def _watchdog_message(log: Path) -> str | None:
    """The last message about a lost connection in the log of a rank that ended with SIGABRT, as NCCL's watchdog writes
    it; None if there is none."""
    with contextlib.suppress(OSError), open(log, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
        lines = [message_of(line) for line in file.read().decode(errors="replace").splitlines()]
        return next((line.strip()[:300] for line in reversed(lines) if says_connection_lost(line)), None)
    return None


def _is_orphaned(here: RankStart, parent: int) -> bool:
    """Whether slurmstepd or the local controller was killed. The command that starts Python may put further processes
    between the controller and this one."""
    if os.getppid() != parent:
        return True
    return here.local and JOBS_VARIABLE in os.environ and not process_runs(int(here.job))


def _how_it_ended(code: int) -> str:
    """The end of a process that left no report. code: negative if a signal killed it."""
    if code >= 0:
        return f"ended with exit code {code} and without a report"
    reason = ": out of memory?" if -code == signal.SIGKILL else ""
    return f"was killed by signal {-code} ({signal.Signals(-code).name}{reason})"


# --- for the local controller, in place of a supervisor that was killed -----------------------------------------------


def report_for(here: RankStart, code: int, log: Path) -> bool:
    """Write the failure report of a rank whose supervisor has ended and could not write it.

    Args:
        code: of the supervisor; negative if a signal killed it.
        log: the rank's.

    Returns:
        Whether it was written.
    """
    if code in _AGREED_ENDS or (code > 0 and here.reports()):
        return False
    if code < 0:
        here.write_failure(f"lost its supervising process, which {_how_it_ended(code)}", kind=KILLED)
    else:  # it never had a child: its copy of the code is damaged, or Python could not start
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        last = message_of(lines[-1]) if lines else "its log is empty"
        here.write_failure(f"ended with exit code {code}: {last}")
    return True


def conclude_for(here: RankStart, log: Path) -> None:
    """When all ranks have ended: conclude for a rank that ``report_for`` wrote the report of.

    Args:
        log: rank 0's, which ends with the report of the rank that failed first.
    """
    text = _conclude(here, is_logged=False)
    if here.rank == 0:
        if text:
            with open(log, "a") as file:
                file.write(as_logged(text.rstrip("\n"), 0, node_name()))
        notify_of_end(
            here.run, here.attempt, failed="lost the supervising process of rank 0", node=_node_of_failure(here)
        )


# --- which rank failed first, and what follows ------------------------------------------------------------------------


def _conclude(here: RankStart, *, is_logged: bool) -> str:
    """Decide on what is known so far. Each rank that fails does so, and the last one knows most.

    Args:
        is_logged: whether the rank's log ends with its own traceback.

    Returns:
        The text with which rank 0's log of a local job ends. On Slurm the batch script prints it, after srun's output.
    """
    failure = here.first_failure()
    ended = here.run.ended() if here.run.begun_by(here.attempt) else None
    if failure is None or (ended is not None and (ended["why"] == ends.FINISHED or ends.is_stopped(ended["why"]))):
        return ""  # the run had ended by then, and rank 0 has recorded how
    decision = decide(here, failure)
    text = mask_secrets(failure.text(here.log(failure.rank))) + decision.message
    here.mark("restart").unlink(missing_ok=True)  # of a rank that knew less
    if decision.restarts:
        write_atomically(here.mark("exclude"), ",".join(decision.excluded))
        here.mark("restart").touch()
    write_atomically(here.mark("txt"), text)
    _record(here, failure, decision)
    return "" if failure.rank == here.rank and is_logged and not decision.message else text


def _record(here: RankStart, failure: RankFailure, decision: Decision) -> None:
    """Record the end in ended.json, unless rank 0 has recorded the same. If the start failed before it was recorded,
    record it first."""
    run, why = here.run, decision.why
    if not run.has_work():
        return  # the folder of launch/doctor.py
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
        run.end_failed(why, **facts)  # rank 0 holds the lock, and waits for this rank
    # Otherwise another job holds the lock, and this one was refused.
