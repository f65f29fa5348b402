"""The local executor that runs a snapshot of the code with the ranks and GPUs of an allocation."""

from __future__ import annotations

import shlex
from pathlib import Path

from launch.allocation import gpus
from launch.allocation.resolve import Allocation
from launch.ranks.local import LocalExecutor
from launch.submission.batch_script import rank_command


def local_executor(
    folder: Path, code: Path, allocation: Allocation, *, timeout_min: int, followed: bool = True
) -> LocalExecutor:
    """submitit's, with its files in a folder, which runs a snapshot of the code on this machine.

    Args:
        followed: its jobs end with this process.
    """
    python = rank_command(allocation.python, shlex.quote(str(code)))
    # submitit's own choice is the first GPUs of the machine, whatever CUDA_VISIBLE_DEVICES is here.
    shown = shlex.join(gpus.for_ranks(allocation.visible_gpus))
    executor = LocalExecutor(folder, python=f"{shown} {python}" if shown else python, followed=followed)
    executor.update_parameters(
        tasks_per_node=allocation.tasks_per_node,
        gpus_per_node=allocation.gpus_per_node,
        timeout_min=timeout_min,
        stderr_to_stdout=True,
    )
    return executor
