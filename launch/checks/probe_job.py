"""Runs the probe of launch/doctor.py on Slurm or on this machine, and turns its ranks' reports into findings."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from cfmask.runtime.jsonl import read_object
from launch.allocation.resolve import Allocation
from launch.checks import cluster, ranks
from launch.checks.findings import PROBLEM, Finding, Findings, not_checked, problem
from launch.checks.login_node import Site, probe_executor
from launch.checks.probe import Probe
from launch.checks.report import read_reports
from launch.slurm.client import SlurmError, show_job
from launch.slurm.control import cancel
from launch.slurm.states import is_over, is_pending
from launch.submission import snapshot
from launch.submission.sbatch import local_executor, send, set_environment, write_environment
from launch.submission.snapshot import REPO

PROBE_MIN = 6
"""The probe's time limit: longer than its ranks wait for each other and for each other's files."""

_POLL_S = 0.5
_NOTICE = re.compile(r"srun: |slurmstepd(-\S+)?: error: \*\*\* |submitit ")
"""The beginning of log lines that report the end of a rank without the reason."""


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
        site: Slurm's description of the cluster; None: run the ranks on this machine.
        folder: the probe's new folder, on the file system that runs are to lie on.
        needed: paths that every rank has to read.
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
        job: Mapping[str, str] = {}
        if site is not None:
            name, job, why_not = _run_on_slurm(probe, small, wait_s)
            if why_not:
                findings.add(not_checked("ranks", why_not, "a longer --wait, or a --qos or --partition with less load"))
                return
        else:
            name = _run_here(probe, small)
            small = replace(small, cpus_per_task=1)  # a local run does not request cores
        os.listdir(folder)  # makes a network file system look again instead of answering from its cache
        reports = read_reports(folder)
        last_lines = _last_lines(folder, name, small)
        findings.add(_launch_failure(job, folder) or ranks.check_ranks(reports, small.world_size, last_lines))
        findings.add(*ranks.check_reports(reports, small, str(folder.parent), needed, clock))
        if site is not None:
            if job.get("QOS", site.qos) != site.qos and site.config.get("PreemptType") == "preempt/qos":
                findings.add(*site.preemption(allocation, job["QOS"]))
            asked = None
            with contextlib.suppress(OSError):
                asked = read_object(folder / "requeue.json")
            findings.add(cluster.check_job_record(job), cluster.check_requeue(job, asked))
    finally:
        if any(finding.state == PROBLEM for finding in findings.found[before:]):
            print(f"\nlogs and reports: {folder}", file=sys.stderr)
        else:
            shutil.rmtree(folder, ignore_errors=True)


def _run_on_slurm(probe: Probe, allocation: Allocation, wait_s: float) -> tuple[str, dict[str, str], str]:
    """Submit the probe, wait until it has ended or was requeued, and cancel it.

    Returns:
        The job's id, Slurm's last record of it, and the reason if it did not start in time.

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
        deadline = time.monotonic() + 15  # until its ranks have ended, they write into the folder
        while time.monotonic() < deadline and not _has_ended(_show(name)):
            time.sleep(_POLL_S)
    return name, record, why_not


def _wait(name: str, folder: Path, wait_s: float) -> tuple[dict[str, str], str]:
    """Returns the last two values of ``_run_on_slurm``."""
    queued_until = time.monotonic() + wait_s
    runs_until: float | None = None
    record: dict[str, str] = {}
    shown_reason = ""
    while True:
        time.sleep(_POLL_S)
        shown = _show(name)
        record = shown or record
        back = int(record.get("Restarts") or 0) > 0 and (folder / "requeue.json").exists()
        if back or _has_ended(shown):
            return record, ""
        now = time.monotonic()
        if not record or is_pending(record["JobState"]):
            reason = "Slurm does not answer" if shown is None else record.get("Reason", "")
            if runs_until is not None:  # it was preempted, or its node failed
                runs_until, queued_until = None, now + wait_s
            if now > queued_until:
                return record, f"job {name} waited {wait_s:.0f} s in the queue ({reason}), and was cancelled"
            if reason != shown_reason:
                shown_reason = reason
                print(f"job {name} is queued ({reason})", file=sys.stderr, flush=True)
        elif runs_until is None:
            runs_until = now + 60 * PROBE_MIN + 60
            print(f"job {name} runs on {record.get('NodeList')}", file=sys.stderr, flush=True)
        elif now > runs_until:
            return record, ""


def _show(name: str) -> dict[str, str] | None:
    """Slurm's record of the job: empty if Slurm has forgotten it; None if Slurm does not answer."""
    try:
        return show_job(name, patience_s=0)
    except SlurmError:
        return None


def _has_ended(record: Mapping[str, str] | None) -> bool:
    return record is not None and (not record or is_over(record.get("JobState", "")))


def _run_here(probe: Probe, allocation: Allocation) -> str:
    """Run the ranks as processes of this machine; returns the job's id."""
    set_environment(allocation)
    code = probe.folder / "code" / snapshot.digest_of(REPO)
    job = local_executor(probe.folder / "jobs", code, allocation, timeout_min=PROBE_MIN).start(probe)
    try:
        while not job.done():
            time.sleep(0.2)
    finally:
        while not job.done():
            job.terminate()
            time.sleep(0.5)
    return job.job_id


def _launch_failure(job: Mapping[str, str], folder: Path) -> Finding | None:
    """The problem that the job's first node could not open its log, which Slurm shows only as an exit code."""
    if job.get("Reason") != "JobLaunchFailure" and job.get("ExitCode") != "0:53":
        return None
    if list((folder / "jobs").glob("*_log.out")):
        return None
    where = job.get("BatchHost") or job.get("NodeList") or "the node"
    found = f"{where} could not create the job's log in {folder / 'jobs'}: {folder.parent} is missing or read-only"
    change = "use a folder that all nodes share (compare df): --shared DIR here, --run DIR of submit.py"
    return problem("shared folder", found, change)


def _last_lines(folder: Path, name: str, allocation: Allocation) -> dict[int, str]:
    """The last line of each rank's log. Notices of Slurm count if no rank has written anything else: the rank that
    Slurm killed because another one failed has only these."""
    found: dict[int, str] = {}
    notices: dict[int, str] = {}
    for rank in range(allocation.world_size):
        with contextlib.suppress(OSError):
            text = (folder / "jobs" / f"{name}_{rank}_log.out").read_text(errors="replace")
            lines = [line.strip()[-300:] for line in text.splitlines() if line.strip()]
            own = [line for line in lines if not _NOTICE.match(line)]
            (found if own else notices)[rank] = own[-1] if own else lines[0] if lines else ""
    return found or notices
