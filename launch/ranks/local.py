"""submitit's local executor with our own controller (controller.py): ranks are processes of this machine."""

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
    """A job on this machine; its id is the pid of its controller."""

    _process: subprocess.Popen[bytes]

    @property
    def exit_code(self) -> int:
        """Exit code of the controller, once the job has ended; negative if a signal killed it."""
        return self._process.wait()

    def terminate(self) -> None:
        """Ask the ranks to save a checkpoint and end."""
        self._process.terminate()


class LocalExecutor(submitit.LocalExecutor):
    """submitit's executor, except that ``controller.py`` starts the ranks in a session of their own: Ctrl-C, or closing
    the terminal, reaches only the process that follows the job.

    Args:
        folder: Gets submitit's files.
        python: Shell command that starts a rank.
        followed: End the job when this process ends.
    """

    def __init__(self, folder: Path, *, python: str, followed: bool) -> None:
        super().__init__(folder, python=python)
        self._followed = followed

    def start(self, work: Callable[[], Any]) -> ControlledJob:
        """``submit``, with the type of job that this executor returns."""
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
        # The controller of this checkout, not of the snapshot: only the ranks verify their copy of the code.
        own = Path(__file__).resolve()
        controller = [sys.executable, "-u", str(own.with_name("controller.py")), *follower, str(self.folder)]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(own.parents[2]), os.environ.get("PYTHONPATH")]))
        # The controller gets its own streams; otherwise `submit.py --no-follow | tail` would wait for the job.
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
