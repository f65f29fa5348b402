"""Runs the checks of launch/doctor.py in order."""

from __future__ import annotations

import os
import time
from pathlib import Path

from cfmask.errors import UserError
from cfmask.urls import is_remote
from launch.allocation.cluster_file import ClusterFile
from launch.allocation.resolve import Allocation, uncovered
from launch.checks.findings import Findings, not_checked, problem, warning
from launch.checks.login_node import ask_slurm, check_submission
from launch.checks.node import write_and_compare_clocks
from launch.checks.probe_job import run_probe
from launch.submission.claims import check_path


def examine(
    findings: Findings,
    allocation: Allocation,
    file: ClusterFile,
    *,
    executor: str,
    shared: Path,
    probe: bool,
    wait_s: float,
) -> None:
    """Check the login node and Slurm, and the nodes with a job of a minute; add the findings.

    Args:
        executor: the value of --executor.
        shared: the folder that runs are to lie in.
        probe: whether to queue the job.
        wait_s: how long it may wait in the queue.
    """
    site = ask_slurm(findings, allocation) if allocation.on_slurm else None
    if not allocation.on_slurm:
        why = f"--executor is {executor}" if executor != "auto" else "there is no srun here"
        findings.add(not_checked("Slurm", why, "run this on a login node"))
    clock = _check_folder(findings, shared, allocation)
    if clock is None or (site is None and allocation.on_slurm):
        return
    folder = shared / f".doctor-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    accepted = not allocation.on_slurm or check_submission(findings, folder, allocation)
    if not probe:
        findings.add(not_checked("ranks", "--no-probe: no job was queued"))
    elif not accepted:
        findings.add(not_checked("ranks", "Slurm would reject the job"))
    else:
        shards = (file.shards,) if file.shards and not is_remote(file.shards) else ()
        run_probe(findings, site, folder, allocation, shards, clock, wait_s)


def shared_folder(given: Path | None) -> Path:
    """The folder that runs lie in: the given one, else ./runs, else the working directory.

    Raises:
        UserError: the given path is not a folder.
    """
    folder = given if given is not None else Path("runs")
    if not folder.is_dir():
        if given is not None:
            raise UserError(f"--shared {given} is no folder. Create it, or name one that all nodes share.")
        folder = Path()
    check_path(folder.resolve())
    return folder.resolve()


def _check_folder(findings: Findings, shared: Path, allocation: Allocation) -> list[float] | None:
    """Check that runs can be written there.

    Returns:
        The bounds of (file system's clock - this machine's), in seconds; None if the folder cannot be written.
    """
    error, clock = write_and_compare_clocks(shared, f".doctor-{os.getpid()}")
    if error:
        change = "another folder: --shared DIR here, --run DIR of submit.py"
        findings.add(problem("shared folder", f"{shared} cannot be written from here: {error}", change))
        return None
    if uncovered(allocation, [shared]):
        change = "mounts under [container] in cluster.toml, unless the site always mounts it"
        findings.add(warning("container", f"{shared} is under none of the container's mounts", change))
    return clock
