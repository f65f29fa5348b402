"""Runs the probe of launch/doctor.py, on Slurm or on this machine, and turns what its ranks report into findings."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from cfmask.runtime.jsonl import read_object
from launch.allocation.resolve import Allocation
from launch.checks import cluster, ranks
from launch.checks.findings import NOT_CHECKED, PROBLEM, Finding, Findings
from launch.checks.login_node import Site, probe_executor
from launch.checks.probe import Probe, ProbeReport, read_reports
from launch.slurm.client import SlurmError, show_job
from launch.slurm.control import cancel
from launch.slurm.states import is_over, is_pending
from launch.submission import snapshot
from launch.submission.batch_script import set_environment, write_environment
from launch.submission.local import local_executor
from launch.submission.sbatch import send
from launch.submission.submit import REPO

PROBE_MIN = 6
"""The probe's time limit: more than its ranks wait for each other, and for files of each other."""

_LOOK_S = 1
"""Seconds between two looks at the job."""
_NOTICES = ("srun: ", "slurmstepd: error: *** ", "submitit ")
"""Beginnings of lines in a log that say that a rank has ended, and not why."""


def run_probe(
    findings: Findings,
    site: Site | None,
    folder: Path,
    allocation: Allocation,
    needed: tuple[str, ...],
    clock: Sequence[float],
    wait_s: float,
) -> None:
    """Run the probe and add its findings. Its folder is removed unless they include a problem.

    Args:
        site: what Slurm says about the cluster; None: run the ranks on this machine.
        folder: a new folder on the file system that runs are to lie on.
        needed: paths that every rank must be able to read.
        clock: the bounds of (file system's clock - this machine's), in seconds.
        wait_s: how long the job may wait in the queue.
    """
    before = len(findings.found)
    probe = Probe(folder, allocation.gpus_per_node, needed)
    small = replace(allocation, time=PROBE_MIN)
    try:
        (folder / "jobs").mkdir(parents=True)
        write_environment(allocation, folder / "jobs")
        snapshot.take(REPO, folder / "code")
        if site is not None:
            name, job, why_not = _run_on_slurm(probe, small, wait_s)
        else:
            name, job, why_not = *_run_here(probe, small), ""
        if why_not:
            findings.add(
                Finding("ranks", NOT_CHECKED, why_not, "--wait longer, or --qos or --partition that starts sooner")
            )
            return
        reports = _fresh_reports(folder)
        findings.add(
            _launch_failure(job, folder)
            or ranks.check_ranks(reports, small.world_size, _last_lines(folder, name, small))
        )
        cores = allocation.cpus_per_task if site is not None else 1  # else it takes what there is
        findings.add(
            *ranks.check_reports(reports, replace(small, cpus_per_task=cores), str(folder.parent), needed, clock)
        )
        if site is not None:
            if job.get("QOS", site.qos) != site.qos and site.config.get("PreemptType") == "preempt/qos":
                findings.add(*site.preemption(allocation, job["QOS"]))
            asked = None
            with contextlib.suppress(OSError):
                asked = read_object(folder / "requeue.json")
            findings.add(*cluster.check_job_record(job), cluster.check_requeue(job, asked))
    finally:
        if any(finding.state == PROBLEM for finding in findings.found[before:]):
            print(f"\nlogs and reports: {folder}", file=sys.stderr)
        else:
            shutil.rmtree(folder, ignore_errors=True)


def _run_on_slurm(probe: Probe, allocation: Allocation, wait_s: float) -> tuple[str, dict[str, str], str]:
    """Submit the probe, wait until it has ended or was requeued, and cancel it.

    Returns:
        The job's id, Slurm's last record of it, and, if it did not start in time, why.

    Raises:
        UserError: Slurm rejects it.
    """
    [job] = send(probe_executor(probe.folder, allocation), [probe])
    name = job.job_id
    print(f"job {name}: {allocation}", file=sys.stderr, flush=True)
    try:
        record, why_not = _wait(name, probe.folder, wait_s)
    finally:
        with contextlib.suppress(SlurmError):
            cancel(name)
        deadline = time.monotonic() + 15  # its ranks write into the folder until they are gone
        while time.monotonic() < deadline and not _has_ended(_show(name)):
            time.sleep(_LOOK_S)
    return name, record, why_not


def _wait(name: str, folder: Path, wait_s: float) -> tuple[dict[str, str], str]:
    """The last two items that ``_run_on_slurm`` returns."""
    queued_until = time.monotonic() + wait_s
    runs_until: float | None = None
    record: dict[str, str] = {}
    said = ""
    while True:
        time.sleep(_LOOK_S)
        shown = _show(name)
        record = shown or record
        back = int(record.get("Restarts") or 0) > 0 and (folder / "requeue.json").exists()
        if back or _has_ended(shown):
            return record, ""
        now = time.monotonic()
        if not record or is_pending(record["JobState"]):
            reason = "Slurm does not answer" if shown is None else record.get("Reason", "")
            if runs_until is not None:  # preempted, or its node has failed
                runs_until, queued_until = None, now + wait_s
            if now > queued_until:
                return record, f"job {name} waited {wait_s:.0f} s in the queue ({reason}), and was cancelled"
            if reason != said:
                said = reason
                print(f"job {name} is queued ({reason})", file=sys.stderr, flush=True)
        elif runs_until is None:
            runs_until = now + 60 * PROBE_MIN + 60
            print(f"job {name} runs on {record.get('NodeList')}", file=sys.stderr, flush=True)
        elif now > runs_until:
            return record, ""


def _show(name: str) -> dict[str, str] | None:
    """Slurm's record of the job: empty when it ended a while ago; None if Slurm does not answer."""
    try:
        return show_job(name, patience_s=0)
    except SlurmError:
        return None


def _has_ended(record: Mapping[str, str] | None) -> bool:
    return record is not None and (not record or is_over(record.get("JobState", "")))


def _run_here(probe: Probe, allocation: Allocation) -> tuple[str, dict[str, str]]:
    """Run the ranks as processes of this machine; the job's id, and an empty record."""
    set_environment(allocation)
    code = probe.folder / "code" / snapshot.digest_of(REPO)
    executor = local_executor(probe.folder / "jobs", code, allocation, timeout_min=PROBE_MIN)
    job = executor.start(probe)
    try:
        while not job.done():
            time.sleep(0.2)
    finally:
        while not job.done():
            job.terminate()
            time.sleep(0.5)
    return job.job_id, {}


def _fresh_reports(folder: Path) -> list[ProbeReport]:
    os.listdir(folder)  # makes a network file system look again instead of answering from its cache
    return read_reports(folder)


def _launch_failure(job: Mapping[str, str], folder: Path) -> Finding | None:
    """The problem that the job's first node could not open its log, which Slurm shows only by an exit code."""
    if job.get("Reason") != "JobLaunchFailure" and job.get("ExitCode") != "0:53":
        return None
    if list((folder / "jobs").glob("*_log.out")):
        return None
    where = job.get("BatchHost") or job.get("NodeList") or "the node"
    found = f"{where} could not make the job's log in {folder / 'jobs'}: {folder.parent} is not there, or not writable"
    change = (
        "a folder on the file system that the nodes share (df on both sides): --shared DIR here, --run DIR of submit.py"
    )
    return Finding("shared folder", PROBLEM, found, change)


def _last_lines(folder: Path, name: str, allocation: Allocation) -> dict[int, str]:
    """The last line of each rank's log that says something about the rank."""
    found = {}
    for rank in range(allocation.world_size):
        with contextlib.suppress(OSError):
            text = (folder / "jobs" / f"{name}_{rank}_log.out").read_text(errors="replace")
            lines = [line.strip()[-300:] for line in text.splitlines() if line.strip()]
            own = [line for line in lines if not line.startswith(_NOTICES)]
            found[rank] = own[-1] if own else lines[0] if lines else ""
    return found
