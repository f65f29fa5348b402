"""Looks after the ranks of a job on this machine: starts them, passes signals on, and leaves none behind.

    python -u launch/ranks/controller.py [--follower PID] RUN/jobs

What submitit's own controller does, and in addition:

    a rank's process was killed    its failure report is written here, so that the other ranks end
    the follower was killed        TERM to the ranks, which save a checkpoint; after SAVE_WITHIN_S a KILL
    TERM                           the same without the KILL: whoever asked decides how long ranks may take. Ranks that
                                   have not begun to train have nothing to save, and are killed at once
    all ranks have ended           whatever they have started is killed

Everything else comes in the environment that launch/ranks/local.py sets.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path

from cfmask.runs import RunFolder
from cfmask.runtime.process import adopt_orphans, kill_children
from launch.ranks import supervisor
from launch.restarts.policy import REQUEUE_ME
from launch.state.attempt import LOCAL_START
from launch.state.failure_reports import RankStart
from launch.state.processes import FOLLOWER_FLAG, SAVE_WITHIN_S

_LOOK_S = 0.1
_REPEAT_S = 0.5
"""In its first second a rank does not hear a TERM: it is sent again and again."""
_GONE_WITHIN_S = 5.0
_END_WITHIN_S = 25.0
"""What ranks have when one of them was killed; their own supervisors end them in half of it."""


class Controller:
    """Of one job.

    Args:
        run: the run folder.
        follower: the process with which the job ends, this one's parent; None if it goes on without one.
    """

    def __init__(self, run: RunFolder, follower: int | None) -> None:
        self._run, self._follower = run, follower
        self._world_size = int(os.environ["SUBMITIT_LOCAL_NTASKS"])
        self._command = shlex.split(os.environ["SUBMITIT_LOCAL_COMMAND"])
        self._give_up_at = time.monotonic() + float(os.environ["SUBMITIT_LOCAL_TIMEOUT_S"])
        self._ranks: list[subprocess.Popen[bytes]] = []
        self._start = 0
        self._asked = False
        self._asked_again_at = 0.0

    def run(self) -> int:
        """Until a start ends without asking for another one; the exit code of the first rank that ended badly, or 0."""
        # A terminal's signals are for the follower. Ranks inherit what is ignored.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._ask_to_end)
        signal.signal(signal.SIGUSR2, self._pass_on)
        adopt_orphans()
        while True:
            codes = self._start_once()
            if self._asked or not (REQUEUE_ME in codes or self._start_of(0).mark("restart").exists()):
                return next((code if code > 0 else 128 - code for code in codes if code), 0)
            self._start += 1

    def _ask_to_end(self, number: int, frame: object) -> None:
        self._asked = True

    def _pass_on(self, number: int, frame: object) -> None:
        for rank in self._ranks:
            rank.send_signal(number)

    def _start_once(self) -> list[int]:
        """Exit codes of one start of all ranks, negative for signals."""
        with ExitStack() as logs:
            self._ranks = []
            for rank in range(self._world_size):
                environment = {
                    **os.environ,
                    "SUBMITIT_LOCAL_JOB_ID": str(os.getpid()),
                    "SUBMITIT_LOCAL_LOCALID": str(rank),
                    "SUBMITIT_LOCAL_GLOBALID": str(rank),
                    LOCAL_START: str(self._start),
                }
                log = logs.enter_context(open(self._log(rank), "ab"))
                self._ranks.append(
                    subprocess.Popen(self._command, env=environment, stdout=log, stderr=subprocess.STDOUT)
                )
        try:
            killed = self._wait()
        finally:
            self._kill()
        for rank in killed:
            supervisor.conclude_for(self._start_of(rank), self._log(0))
        return [rank.returncode if rank.returncode is not None else -signal.SIGKILL for rank in self._ranks]

    def _wait(self) -> list[int]:
        """Until all ranks have ended, or had to; those whose process could not say how it ended."""
        killed: list[int] = []
        kill_at = self._give_up_at
        while any(each.poll() is None for each in self._ranks):
            now = time.monotonic()
            for rank, each in enumerate(self._ranks):
                if each.poll() is not None and rank not in killed and self._report(rank, each.returncode):
                    killed.append(rank)
                    kill_at = min(kill_at, now + _END_WITHIN_S)
            if self._follower is not None and os.getppid() != self._follower:
                self._follower, self._asked = None, True
                kill_at = min(kill_at, now + SAVE_WITHIN_S)
            if self._asked and now > self._asked_again_at:
                if self._asked_again_at and not self._has_begun():
                    break  # heard once, and there is nothing to save
                self._asked_again_at = now + _REPEAT_S
                self._pass_on(signal.SIGTERM, None)
            if now > kill_at:
                break
            time.sleep(_LOOK_S)
        return killed + [r for r, each in enumerate(self._ranks) if r not in killed and self._report(r, each.poll())]

    def _has_begun(self) -> bool:
        """Whether ranks may have something to save."""
        try:
            return self._run.begun_by(self._start_of(0).attempt)
        except OSError:
            return True

    def _report(self, rank: int, code: int | None) -> bool:
        """Write the failure report of a rank whose supervisor was killed; whether it was."""
        if code is None or (self._asked and code == -signal.SIGTERM):  # it had no handler yet
            return False
        return supervisor.report_for(self._start_of(rank), code, self._log(rank))

    def _start_of(self, rank: int) -> RankStart:
        job = str(os.getpid())
        return RankStart.of_local(self._run, job, rank, self._world_size, self._start)

    def _log(self, rank: int) -> Path:
        return self._run.root / "jobs" / f"{os.getpid()}_{rank}_log.out"

    def _kill(self) -> None:
        """What of the ranks is left, and what they have started."""
        for rank in self._ranks:
            rank.kill()
        for rank in self._ranks:
            with suppress(subprocess.TimeoutExpired):  # it hangs in the kernel, and is left to it
                rank.wait(_GONE_WITHIN_S)
        kill_children()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(FOLLOWER_FLAG, type=int, dest="follower", help="end the job when this process ends")
    parser.add_argument("jobs", type=Path, help="jobs folder of the run")
    arguments = parser.parse_args()
    return Controller(RunFolder(arguments.jobs.absolute().parent), arguments.follower).run()


if __name__ == "__main__":
    sys.exit(main())
