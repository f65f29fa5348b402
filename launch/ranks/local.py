"""submitit's local executor, with a controller of our own (controller.py): ranks as processes of this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import submitit
from submitit.local.local import LocalJob

from launch.state.processes import FOLLOWER_FLAG, JOBS_VARIABLE


class ControlledJob(LocalJob[Any]):
    """Its id is its controller's pid."""

    _process: subprocess.Popen[bytes]

    @property
    def exit_code(self) -> int:
        """The controller's, when the job is done; negative if a signal killed it."""
        return self._process.wait()

    def terminate(self) -> None:
        """Ask the ranks for a checkpoint, and to end."""
        self._process.terminate()


class LocalExecutor(submitit.LocalExecutor):
    """submitit's, except that jobs are looked after by ``controller.py``, in a session of their own: a terminal that is
    closed, or a Ctrl-C, reaches the process that follows the job and nothing else.

    Args:
        folder: for submitit's files.
        python: the shell command that starts a rank.
        followed: the job ends with this process.
    """

    def __init__(self, folder: Path, *, python: str, followed: bool) -> None:
        super().__init__(folder, python=python)
        self._followed = followed

    def start(self, work: Callable[[], Any]) -> ControlledJob:
        """``submit``, and what it gives here."""
        job = self.submit(work)
        assert isinstance(job, ControlledJob)
        return job

    def _submit_command(self, command: str) -> ControlledJob:
        tasks = self.parameters.get("tasks_per_node", 1)
        environment = {
            **os.environ,
            JOBS_VARIABLE: str(self.folder.resolve()),
            "SUBMITIT_EXECUTOR": "local",
            "SUBMITIT_LOCAL_NTASKS": str(tasks),
            "SUBMITIT_LOCAL_COMMAND": command,
            "SUBMITIT_LOCAL_TIMEOUT_S": str(int(60 * self.parameters["timeout_min"])),
            "SUBMITIT_LOCAL_NODEID": "0",
            "SUBMITIT_LOCAL_JOB_NUM_NODES": "1",
            "CUDA_VISIBLE_DEVICES": ",".join(map(str, range(self.parameters.get("gpus_per_node", 0)))),
        }
        follower = [FOLLOWER_FLAG, str(os.getpid())] if self._followed else []
        # Of the code that runs here and now: the ranks check that their copy of it is whole.
        own = Path(__file__).resolve()
        controller = [sys.executable, "-u", str(own.with_name("controller.py")), *follower, str(self.folder)]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(own.parents[2]), os.environ.get("PYTHONPATH")]))
        # Streams of its own: who reads a pipe of ours, as in `submit.py --no-follow | tail`, would wait for the job.
        with open(Path(self.folder) / "controller.log", "ab") as log:
            process = subprocess.Popen(
                controller,
                env=environment,
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        return ControlledJob(folder=self.folder, job_id=str(process.pid), process=process, tasks=list(range(tasks)))
