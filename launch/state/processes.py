"""The processes of a job on this machine: finding them, waiting for them and ending them.

    submit.py                      shows the progress (follow.py)
      controller.py RUN/jobs       starts the ranks; its pid is the job's id
        start.py                   supervises a rank (launch/ranks/supervisor.py)
          the rank                 trains or evaluates

Each of them may be killed at any moment. The others then end within 30 s, with a checkpoint if a rank can still write
one:

    submit.py (followed)     the controller ends the ranks as after Ctrl-C; with --no-follow nothing depends on it
    controller.py            each start.py ends its rank
    start.py                 the kernel kills its rank; the controller writes the failure report in its place
    a rank                   start.py writes a failure report

A job's processes are found by an environment variable, which their children inherit.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cfmask.errors import UserError
from cfmask.runs import RunFolder
from cfmask.runtime.machine import process_runs

logger = logging.getLogger(__name__)

SAVE_WITHIN_S = 20.0
"""Time for a checkpoint when a process that the ranks depend on was killed; then they are killed too."""
_GONE_WITHIN_S = 40.0
"""Within which all processes of an ending job are gone: SAVE_WITHIN_S, and the time that a process takes to end."""
JOBS_VARIABLE = "CFMASK_LOCAL_JOBS"
"""The environment variable that names the jobs folder to all processes of a job."""
FOLLOWER_FLAG = "--follower"
"""Flag of controller.py: the process that follows the job, with which it ends."""
_ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def ending_signals() -> Iterator[list[signal.Signals]]:
    """Collect Ctrl-C, TERM and HUP instead of ending. Signals that are ignored stay so, for example under nohup."""
    received: list[signal.Signals] = []
    caught = [number for number in _ENDING_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, lambda n, _: received.append(signal.Signals(n))) for number in caught}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def processes_of(run: RunFolder) -> list[int]:
    """This user's processes of the run's jobs on this machine."""
    wanted = os.fsencode(f"{JOBS_VARIABLE}={(run.root / 'jobs').resolve()}")
    found = []
    for process in Path("/proc").iterdir():
        with suppress(OSError):
            if process.name.isdigit() and wanted in (process / "environ").read_bytes().split(b"\0"):
                found.append(int(process.name))
    return sorted(pid for pid in found if pid != os.getpid() and process_runs(pid))


def controller_of(run: RunFolder) -> int | None:
    """The controller of the run's job on this machine; None if there is none."""
    # A job's id is its controller's pid, and submitit names files after it. Before these exist, the environment of the
    # process tells, which only its owner can read.
    named = [path.name.removesuffix("_submitted.pkl") for path in (run.root / "jobs").glob("*_submitted.pkl")]
    candidates = {*(int(name) for name in named if name.isdigit()), *processes_of(run)}
    return next((pid for pid in candidates if is_controller(pid, run.root / "jobs")), None)


def is_controller(pid: int, jobs: Path) -> bool:
    """Whether the process is the controller of these jobs, and not a later one with its number."""
    words = _command(pid)
    return (
        len(words) > 2
        and any(word.endswith("launch/ranks/controller.py") for word in words)
        and Path(words[-1]).resolve() == jobs.resolve()
        and process_runs(pid)
    )


def is_ending(controller: int) -> bool:
    """Whether the job ends because the process that followed it is gone."""
    words = _command(controller)
    if FOLLOWER_FLAG not in words:
        return False
    with suppress(OSError, ValueError):
        # pid (command) state parent …
        parent = Path(f"/proc/{controller}/stat").read_text().rpartition(")")[2].split()[1]
        return parent != words[words.index(FOLLOWER_FLAG) + 1]
    return True


def wait_until_gone(run: RunFolder) -> None:
    """Wait until a job on this machine has ended whose controller or follower was killed.

    Raises:
        UserError: one of its processes does not end.
    """
    deadline = time.monotonic() + _GONE_WITHIN_S
    said = False
    while left := processes_of(run):
        controller = controller_of(run)
        if controller is not None and not is_ending(controller):
            return  # the job continues, and the lock of the folder refuses another one
        if time.monotonic() > deadline:
            raise UserError(
                f"Processes of an earlier start of {run.root} do not end: {', '.join(map(str, left))}. End them: "
                f"kill -9 {' '.join(map(str, left))}"
            )
        if not said:
            said = True
            logger.info(f"An earlier start of {run.root} was killed; waiting until its ranks have ended")
        time.sleep(0.2)


def kill(run: RunFolder) -> None:
    """SIGKILL to all processes of the run's jobs on this machine, until none is left or 5 s are over."""
    deadline = time.monotonic() + 5
    while (left := processes_of(run)) and time.monotonic() < deadline:
        for pid in left:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def _command(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")[:-1]
    except OSError:
        return []
