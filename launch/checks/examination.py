"""The checks of launch/doctor.py, in their order."""

from __future__ import annotations

import os
import time
from pathlib import Path

from cfmask.errors import UserError
from launch.allocation.cluster_file import ClusterFile
from launch.allocation.resolve import Allocation, uncovered
from launch.checks.findings import NOT_CHECKED, PROBLEM, WARNING, Finding, Findings
from launch.checks.login_node import ask_slurm, check_submission
from launch.checks.probe_job import run_probe
from launch.ranks.health import write_and_look
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
    """Check where runs are submitted from, Slurm, and with a job of a minute the nodes; add the findings.

    Args:
        executor: as asked for with --executor.
        shared: the folder that runs are to lie in.
        probe: whether to queue the job.
        wait_s: how long it may wait in the queue.
    """
    site = ask_slurm(findings, allocation) if allocation.on_slurm else None
    if not allocation.on_slurm:
        why = f"--executor is {executor}" if executor != "auto" else "there is no srun here"
        findings.add(
            Finding("Slurm", NOT_CHECKED, f"{why}: what a cluster would do is unknown", "run this on a login node")
        )
    clock = _check_folder(findings, shared, allocation)
    if clock is None or (site is None and allocation.on_slurm):
        return
    folder = shared / f".doctor-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    accepted = not allocation.on_slurm or check_submission(findings, folder, allocation)
    if not probe:
        findings.add(Finding("ranks", NOT_CHECKED, "--no-probe: no job was queued"))
    elif not accepted:
        findings.add(Finding("ranks", NOT_CHECKED, "Slurm would not take the job"))
    else:
        run_probe(findings, site, folder, allocation, _shards(file), clock, wait_s)


def shared_folder(given: Path | None) -> Path:
    """The folder that runs lie in: the one that is given, or ./runs, or the working directory.

    Raises:
        UserError: the given path is no folder.
    """
    folder = given if given is not None else Path("runs")
    if not folder.is_dir():
        if given is not None:
            raise UserError(f"--shared {given} is no folder. Make it, or name one on the file system that nodes share.")
        folder = Path()
    check_path(folder.resolve())
    return folder.resolve()


def _shards(file: ClusterFile) -> tuple[str, ...]:
    """The shards folder of the cluster file, unless it is a URL."""
    given = file.values.get("shards")
    if file.path is None or not given or "://" in given or ":" in given.split("/")[0]:
        return ()
    return (str((file.path.parent / Path(given).expanduser()).resolve()),)


def _check_folder(findings: Findings, shared: Path, allocation: Allocation) -> list[float] | None:
    """Check that runs can be written there.

    Returns:
        The bounds of (file system's clock - this machine's), in seconds; None if nothing can be written.
    """
    error, clock = write_and_look(shared, f".doctor-{os.getpid()}")
    if error:
        change = "another folder: --shared DIR here, --run DIR of submit.py"
        findings.add(Finding("shared folder", PROBLEM, f"{shared} cannot be written from here: {error}", change))
        return None
    if uncovered(allocation, [shared]):
        found = f"{shared} is under none of the container's mounts"
        change = "mounts under [container] in cluster.toml, unless the site mounts it by itself"
        findings.add(Finding("container", WARNING, found, change))
    return clock
