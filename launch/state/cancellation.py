"""Cancels a run: marks its folder, then ends its jobs in Slurm and its processes on this machine."""

from __future__ import annotations

import os
import signal
import sys
import time

from cfmask.errors import UserError
from cfmask.runs import RunFolder
from cfmask.runtime.lock import Owner
from launch.slurm import control
from launch.slurm.client import SlurmError, SlurmUnavailable
from launch.slurm.queue import SlurmJob
from launch.slurm.states import base_and_flags, is_pending, is_running
from launch.state import processes
from launch.state.facts import RunState, accepted_jobs, ask_queue, read_state
from launch.state.table import latest_checkpoint

_GONE_WITHIN_S = 60
"""How long jobs may take to end after they were killed, with Slurm's KillWait and epilogue."""


def cancel_run(run: RunFolder, grace_s: float) -> int:
    """Mark the run as cancelled, end its jobs and print what is left of them.

    Args:
        grace_s: seconds that ranks get for a checkpoint before they are killed.

    Returns:
        The exit code: 0 if the run has ended, 1 if a job or process is still there, 130 after Ctrl-C.
    """
    if run.results.exists():
        print(f"{run.root} is finished: there is nothing to cancel.")
        return 0
    if earlier := run.cancelled():
        print(f"already cancelled by {earlier['by']}")
    run.cancel()
    try:
        left = end_jobs(run, grace_s)
    except KeyboardInterrupt:
        print("Interrupted. The mark stays: jobs that still train stop at their next step, and do not come back.")
        return 130
    if run.results.exists():
        run.clear_cancelled()
        print(f"{run.root} has finished before it could be cancelled.")
    elif left:
        print(f"error: {left}", file=sys.stderr)
        return 1
    else:
        step = run.logged_step()
        print("cancelled" + (f" at step {max(step, run.saved_step())}" if step else "") + f"; {latest_checkpoint(run)}")
    return 0


def end_jobs(run: RunFolder, grace_s: float) -> str:
    """Ask all jobs and processes of the run to end, and kill those that have not ended after ``grace_s`` seconds.

    Returns:
        A sentence about what has not ended, or "".

    Raises:
        UserError: Slurm or the system does not permit it.
    """
    kill_at = time.monotonic() + grace_s
    asked: set[str | int] = set()
    found_any = False
    while True:
        run_state = read_state(run)
        queue = _ask_queue(run_state)
        if queue is None:
            queue = {}
            if "slurm" not in asked:
                asked.add("slurm")
                print("Slurm does not answer here: a job of the run ends when it finds the mark.", flush=True)
        owner, controller = run_state.owner, run_state.jobs.controller
        here = processes.processes_of(run)
        if not queue and not controller and not owner and not here:
            if not found_any:
                print("There is no job of this run; it is marked as cancelled.")
            return ""
        found_any = True
        late = time.monotonic() > kill_at
        for job in queue.values():
            _end_slurm_job(job, asked, late=late, grace_s=grace_s)
        if controller:
            _end_process(controller, asked, late=late, grace_s=grace_s)
        elif owner and not queue and owner.is_here:
            _end_process(owner.pid, asked, late=late, grace_s=grace_s)
        if here and late:
            processes.kill(run)
        if time.monotonic() > kill_at + _GONE_WITHIN_S:
            return _leftover(queue, controller, owner, here)
        time.sleep(0.5 if not queue else 2)


def _ask_queue(run_state: RunState) -> dict[str, SlurmJob] | None:
    """The run's pending and running jobs, also unconfirmed ones; None if Slurm does not answer."""
    try:
        unconfirmed = accepted_jobs(run_state.run, run_state.jobs, patience_s=0)
    except SlurmError:
        return None
    return ask_queue([*run_state.jobs.slurm, *unconfirmed])


def _end_slurm_job(job: SlurmJob, asked: set[str | int], *, late: bool, grace_s: float) -> None:
    if is_pending(job.state) or base_and_flags(job.state) == {"CONFIGURING"}:
        print(f"job {job.id} waits in the queue: removed from it", flush=True)
        _scancel(job.id)
    elif late and f"kill {job.id}" not in asked:
        print(f"job {job.id} is still there: killed", flush=True)
        if _scancel(job.id):
            asked.add(f"kill {job.id}")
    elif is_running(job.state) and job.id not in asked:
        print(f"job {job.id} on {job.nodes}: save a checkpoint and end, or be killed in {grace_s:.0f} s", flush=True)
        # The signal goes to the ranks alone: the shell of the batch script would die of it, and end them at once.
        if _scancel(job.id, signal="TERM"):
            asked.add(job.id)


def _scancel(job: str, signal: str | None = None) -> bool:
    """End the job, or send it a signal.

    Returns:
        Whether Slurm has answered; otherwise the caller tries again.

    Raises:
        UserError: the job is another user's.
    """
    try:
        control.cancel(job, signal=signal, patience_s=10)
    except SlurmUnavailable as error:
        print(f"{error} The mark stays, and the job ends when it finds it.", flush=True)
        return False
    except SlurmError as error:
        if "denied" in str(error):
            raise UserError(f"Slurm does not let you cancel the job: {error} The mark stays.") from None
        print(error, flush=True)
    return True


def _end_process(pid: int, asked: set[str | int], *, late: bool, grace_s: float) -> None:
    if late:
        if f"kill {pid}" not in asked:
            asked.add(f"kill {pid}")
            print(f"process {pid} is still there: killed", flush=True)
        _send(pid, signal.SIGKILL)
    elif pid not in asked:
        asked.add(pid)
        print(f"process {pid}: save a checkpoint and end, or be killed in {grace_s:.0f} s", flush=True)
        _send(pid, signal.SIGTERM)


def _send(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass
    except PermissionError:
        raise UserError(f"Process {pid} is another user's. The mark stays: it stops at its next step.") from None


def _leftover(queue: dict[str, SlurmJob], controller: int | None, owner: Owner | None, here: list[int]) -> str:
    what = [f"job {job.id} ({job.state.lower()})" for job in queue.values()]
    if controller or owner:
        what.append(f"process {controller}" if controller else str(owner))
    elif here:
        what.append(f"process {', '.join(map(str, here))}")
    return f"{', '.join(what)} is still there. The mark stays: it stops at its next step, and does not come back."
