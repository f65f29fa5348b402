"""The controller of a job on this machine: starts the ranks, passes signals on, and leaves no process behind.

    python -u launch/ranks/controller.py [--follower PID] RUN/jobs

It replaces submitit's own controller, because it must also handle these:

    a supervisor was killed        the controller writes the rank's failure report, so that the other ranks end
    the follower was killed        TERM to the ranks, which save a checkpoint; KILL after SAVE_WITHIN_S
    TERM                           the same without KILL: the sender decides how long ranks may take. Ranks that have
                                   not begun to train have nothing to save, and are killed at once
    all ranks have ended           processes that they have started are killed

Further settings are in the environment that launch/ranks/local.py sets.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from cfmask.runs import RunFolder
from cfmask.runtime.logging import log_to_job
from cfmask.runtime.machine import node_name
from cfmask.runtime.process import adopt_orphans, kill_children
from launch.ranks import supervisor
from launch.restarts.policy import REQUEUE_ME
from launch.state.attempt import LOCAL_START
from launch.state.failure_reports import RankStart
from launch.state.processes import FOLLOWER_FLAG, SAVE_WITHIN_S

_LOOK_S = 0.1
_REPEAT_S = 0.5
"""Between two TERMs: a rank ignores TERM in its first second."""
_GONE_WITHIN_S = 5.0
_END_WITHIN_S = 25.0
"""Until the controller kills the ranks after a supervisor was killed; the other supervisors need half of it."""


class Controller:
    """The controller of one job.

    Args:
        run: the run folder.
        follower: this process's parent, with which the job ends; None if the job does not depend on it.
    """

    def __init__(self, run: RunFolder, follower: int | None) -> None:
        self._run, self._follower = run, follower
        self._world_size = int(os.environ["SUBMITIT_LOCAL_NTASKS"])
        self._command = shlex.split(os.environ["SUBMITIT_LOCAL_COMMAND"])
        self._give_up_at = time.monotonic() + float(os.environ["SUBMITIT_LOCAL_TIMEOUT_S"])
        self._ranks: list[subprocess.Popen[bytes]] = []
        self._start = 0
        self._asked = False
        self._ask_again_at = 0.0

    def run(self) -> int:
        """Run starts until one does not ask for another.

        Returns:
            The exit code of the first rank that failed, or 0.
        """
        # A terminal's signals are for the follower. Ranks inherit that they are ignored.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._ask_to_end)
        signal.signal(signal.SIGUSR2, self._pass_on)
        adopt_orphans()
        while True:
            codes = self._run_start()
            if self._asked or not (REQUEUE_ME in codes or self._start_of(0).mark("restart").exists()):
                return next((code if code > 0 else 128 - code for code in codes if code), 0)
            self._start += 1

    def _ask_to_end(self, number: int, frame: object) -> None:
        self._asked = True

    def _pass_on(self, number: int, frame: object) -> None:
        for process in self._ranks:
            process.send_signal(number)

    def _run_start(self) -> list[int]:
        """Start all ranks and wait for them; their exit codes, negative for signals."""
        self._ranks = []
        for rank in range(self._world_size):
            environment = {
                **os.environ,
                "SUBMITIT_LOCAL_JOB_ID": str(os.getpid()),
                "SUBMITIT_LOCAL_LOCALID": str(rank),
                "SUBMITIT_LOCAL_GLOBALID": str(rank),
                LOCAL_START: str(self._start),
            }
            with open(self._start_of(rank).log(rank), "ab") as log:
                process = subprocess.Popen(self._command, env=environment, stdout=log, stderr=subprocess.STDOUT)
            self._ranks.append(process)
        try:
            reported = self._wait()
        finally:
            self._kill()
        for rank in reported:
            supervisor.conclude_for(self._start_of(rank), self._start_of(rank).log(0))
        return [-signal.SIGKILL if process.returncode is None else process.returncode for process in self._ranks]

    def _wait(self) -> list[int]:
        """Wait until all ranks have ended, or have to be killed.

        Returns:
            The ranks whose failure report was written here.
        """
        reported: list[int] = []
        kill_at = self._give_up_at
        while any(process.poll() is None for process in self._ranks):
            now = time.monotonic()
            if new := self._write_reports(reported):
                reported += new
                kill_at = min(kill_at, now + _END_WITHIN_S)
            if self._follower is not None and os.getppid() != self._follower:
                self._follower, self._asked = None, True
                kill_at = min(kill_at, now + SAVE_WITHIN_S)
            if self._asked and now > self._ask_again_at:
                if self._ask_again_at and not self._has_begun():
                    break  # TERM was sent once, and there is nothing to save
                self._ask_again_at = now + _REPEAT_S
                self._pass_on(signal.SIGTERM, None)
            if now > kill_at:
                break
            time.sleep(_LOOK_S)
        return reported + self._write_reports(reported)

    def _write_reports(self, reported: list[int]) -> list[int]:
        """Write the failure reports of ranks whose supervisors were killed, except those in ``reported``."""
        written = []
        for rank, process in enumerate(self._ranks):
            code = process.poll()
            ended_by_us = self._asked and code == -signal.SIGTERM  # it had no handler yet
            if rank not in reported and code is not None and not ended_by_us:
                start = self._start_of(rank)
                written += [rank] * supervisor.report_for(start, code, start.log(rank))
        return written

    def _has_begun(self) -> bool:
        """Whether ranks may have something to save."""
        try:
            return self._run.begun_by(self._start_of(0).attempt)
        except OSError:
            return True

    def _start_of(self, rank: int) -> RankStart:
        attempt = f"{os.getpid()}-{self._start}"
        return RankStart(self._run, attempt, rank, local=True, nodes=1, world_size=self._world_size)

    def _kill(self) -> None:
        """Kill the remaining ranks, and what they have started."""
        for process in self._ranks:
            process.kill()
        for process in self._ranks:
            with suppress(subprocess.TimeoutExpired):  # it hangs in the kernel, and is abandoned
                process.wait(_GONE_WITHIN_S)
        kill_children()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(FOLLOWER_FLAG, type=int, dest="follower", help="end the job when this process ends")
    parser.add_argument("jobs", type=Path, help="jobs folder of the run")
    arguments = parser.parse_args()
    if "SUBMITIT_LOCAL_COMMAND" not in os.environ:
        sys.exit("error: This file runs a job that launch/submit.py starts on this machine, and is no command.")
    log_to_job(None, node_name())
    return Controller(RunFolder(arguments.jobs.absolute().parent), arguments.follower).run()


if __name__ == "__main__":
    sys.exit(main())
