"""submitit's local executor with this project's controller (controller.py): ranks as processes of this machine."""

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
    """A job whose id is the pid of its controller."""

    _process: subprocess.Popen[bytes]

    @property
    def exit_code(self) -> int:
        """The controller's exit code, when the job is done; negative if a signal killed it."""
        return self._process.wait()

    def terminate(self) -> None:
        """Ask the ranks to save a checkpoint and end."""
        self._process.terminate()


class LocalExecutor(submitit.LocalExecutor):
    """Starts jobs under ``controller.py``, each in a session of its own, so that a closed terminal or a Ctrl-C reaches
    only the process that follows the job.

    Args:
        folder: for submitit's files.
        python: the shell command that starts a rank.
        followed: whether the job ends with this process.
    """

    def __init__(self, folder: Path, *, python: str, followed: bool) -> None:
        super().__init__(folder, python=python)
        self._followed = followed

    def start(self, work: Callable[[], Any]) -> ControlledJob:
        """The same as ``submit``, with the type of its result."""
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
        # This code, not the snapshot: only the ranks verify that the snapshot is undamaged.
        own = Path(__file__).resolve()
        controller = [sys.executable, "-u", str(own.with_name("controller.py")), *follower, str(self.folder)]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(own.parents[2]), os.environ.get("PYTHONPATH")]))
        # Its own streams: with inherited ones, the reader in `submit.py --no-follow | tail` would wait for the job.
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
