"""Does work in the tasks of a Slurm array, or in processes of this machine."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from cfmask.runtime.pool import map_in_processes
from cfmask.runtime.work import Run
from launch.arrays.arguments import Array


def check_with_slurm(array: Array | None) -> None:
    """Ask Slurm about a task of the array before work begins.

    Raises:
        SlurmError: Slurm would refuse it or could never start it, or does not answer.
    """
    if array is None:
        return
    from launch.submission.feasibility import ask_slurm
    from launch.submission.sbatch import slurm_executor  # submitit takes a while to import

    executor = slurm_executor(array.logs, "cfmask", shlex.quote(str(array.logs)), "code", array.allocation)
    ask_slurm(executor.batch_script(), array.allocation)


def runner(
    array: Array | None, *, workers: int | None, paths: Sequence[str | Path] = (), survives_interrupt: bool = False
) -> Run:
    """
    Args:
        array: None for processes of this machine.
        workers: processes on this machine; by default one for each core.
        paths, survives_interrupt: as in ``run_array``.
    """

    def run(work, progress):
        if array is not None:
            from launch.arrays.array import run_array  # submitit takes a while to import

            return run_array(work, array, progress=progress, paths=paths, survives_interrupt=survives_interrupt)
        return map_in_processes(
            work.function,
            work.items,
            workers=workers or len(os.sched_getaffinity(0)),
            preload=work.preload,
            describe=work.describe,
            progress=progress,
        )

    return run
