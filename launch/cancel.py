#!/usr/bin/env python3
"""End a run for good, with a checkpoint if there is time.

    python launch/cancel.py RUN

A mark in the run folder (cancelled.json) keeps every job of the run from starting, training on or requeueing; whatever
trains is asked to save a checkpoint and end, and is killed after --grace seconds if it has not; what waits in Slurm's
queue leaves it. `python launch/submit.py --resume RUN` takes the mark away and goes on.

Exit codes: 0 the run has ended (or had before), 1 something of it is still there, 2 refused, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cfmask.errors import UserError, exits_cleanly  # noqa: E402
from cfmask.runs import RunFolder  # noqa: E402
from cfmask.runtime.lock import Owner  # noqa: E402
from launch.jobs import processes  # noqa: E402
from launch.jobs.run_state import RunState, accepted_jobs, ask_queue, find_runs, read_state  # noqa: E402
from launch.jobs.status_table import latest_checkpoint  # noqa: E402
from launch.slurm import control  # noqa: E402
from launch.slurm.client import SlurmError, SlurmUnavailable  # noqa: E402
from launch.slurm.queue import SlurmJob  # noqa: E402
from launch.slurm.states import is_pending, is_running, words  # noqa: E402

_GONE_WITHIN_S = 60  # after a kill: Slurm's KillWait and epilogue, a last look at the mark


@exits_cleanly
def main(argv: list[str] | None = None) -> int:
    assert __doc__
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("run", type=Path, metavar="RUN", help="run folder")
    p.add_argument(
        "--grace", type=float, default=120, metavar="S", help="seconds for a checkpoint before the kill (default: 120)"
    )
    arguments = p.parse_args(argv)
    [run, *others] = find_runs([arguments.run])
    if others or run.root != arguments.run:
        raise UserError(f"{arguments.run} is a folder of runs. Name one of them.")
    return cancel(RunFolder(run.root.resolve()), arguments.grace)


def cancel(run: RunFolder, grace_s: float) -> int:
    """Set the mark, end what there is, say what is left; the exit code."""
    if run.results.exists():
        print(f"{run.root} is finished: there is nothing to cancel.")
        return 0
    if told := run.cancelled():
        print(f"already cancelled by {told['by']}")
    run.cancel()
    try:
        left = end_jobs(run, grace_s)
    except KeyboardInterrupt:
        print("Interrupted. The mark stays: what still trains stops at its next step, and does not come back.")
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
    """Ask whatever trains or waits to end, and after ``grace_s`` make it; what is there all the same, or "".

    Raises:
        UserError: Slurm knows of a job, and does not let us end it.
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
                print("Slurm cannot be asked from here: a job of the run ends when it finds the mark.", flush=True)
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
    """The run's jobs that are not over, also those that sbatch did not confirm; None if Slurm cannot be asked."""
    try:
        unconfirmed = accepted_jobs(run_state.run, run_state.jobs, patience_s=0)
    except SlurmError:
        return None
    return ask_queue([*run_state.jobs.slurm, *unconfirmed])


def _end_slurm_job(job: SlurmJob, asked: set[str | int], *, late: bool, grace_s: float) -> None:
    if is_pending(job.state) or words(job.state) == {"CONFIGURING"}:
        print(f"job {job.id} waits in the queue: removed from it", flush=True)
        _scancel(job.id)
    elif late and f"kill {job.id}" not in asked:
        print(f"job {job.id} is still there: killed", flush=True)
        if _scancel(job.id):
            asked.add(f"kill {job.id}")
    elif is_running(job.state) and job.id not in asked:
        print(f"job {job.id} on {job.nodes}: save a checkpoint and end, or be killed in {grace_s:.0f} s", flush=True)
        # To the ranks, not to the batch script: the shell would die of it and take them along.
        if _scancel(job.id, signal="TERM"):
            asked.add(job.id)


def _scancel(job: str, signal: str | None = None) -> bool:
    """Whether Slurm has answered; if not, it is asked once more.

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


if __name__ == "__main__":
    sys.exit(main())
