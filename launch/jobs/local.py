"""submitit's local executor: ranks as processes of this machine."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import submitit

from launch.jobs import gpus
from launch.jobs.allocation import Allocation
from launch.jobs.batch_script import rank_command


class LocalExecutor(submitit.LocalExecutor):
    """As submitit's, whose controller inherits this process's streams, and lives longer: whoever reads a pipe of ours,
    as in `submit.py --no-follow | tail`, would wait until the job has ended."""

    def _submit_command(self, command: str) -> submitit.LocalJob[Any]:
        with _own_streams(Path(self.folder) / "controller.log"):
            return super()._submit_command(command)


def local_executor(folder: Path, code: Path, allocation: Allocation, *, timeout_min: int) -> LocalExecutor:
    """submitit's, with its files in a folder, which runs a snapshot of the code on this machine."""
    python = rank_command(allocation.python, shlex.quote(str(code)))
    # submitit's own choice is the first GPUs of the machine, whatever CUDA_VISIBLE_DEVICES is here.
    shown = shlex.join(gpus.for_ranks(allocation.visible_gpus))
    executor = LocalExecutor(folder, python=f"{shown} {python}" if shown else python)
    executor.update_parameters(
        tasks_per_node=allocation.tasks_per_node,
        gpus_per_node=allocation.gpus_per_node,
        timeout_min=timeout_min,
        stderr_to_stdout=True,
    )
    return executor


@contextlib.contextmanager
def _own_streams(log: Path) -> Iterator[None]:
    """Child processes that are started meanwhile read nothing, and write into a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(number) for number in (0, 1, 2)]  # not inheritable
    files = [os.open(os.devnull, os.O_RDONLY), os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)]
    try:
        for number, file in zip((0, 1, 2), (files[0], files[1], files[1]), strict=True):
            os.dup2(file, number)
        yield
    finally:
        for number, file in enumerate(kept):
            os.dup2(file, number)
        for file in (*kept, *files):
            os.close(file)
