#!/usr/bin/env python3
"""Check a cluster from where runs are submitted, and say what to change.

    python launch/doctor.py --nodes 2             as submit.py would run there: same flags, same cluster file
    python launch/doctor.py --nodes 2 --no-probe  only what Slurm tells without a job
    python launch/doctor.py --executor local      this machine
    python launch/doctor.py --json                an object a line, for scripts

First Slurm is asked: partition, time limit, nodes of that size, preemption (mode, warning signal, grace), requeue,
accounting, and what sbatch says to the very file that submit.py would send. Then a job of a minute goes the way that a
run goes (same sbatch file, srun arguments, environment, container, Python, copy of the code) and reports from every
rank: software, cores, memory, GPUs, the shared folder and how soon nodes see each other's files, room, clocks, the
process group, an all-reduce; at the end it requeues itself, and is cancelled. Nothing of it stays, unless something was
wrong.

Exit codes: 0 no problems (there may be warnings), 1 problems, 2 refused, 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from cfmask.errors import UserError, exits_cleanly  # noqa: E402
from cfmask.recipe import Recipe  # noqa: E402
from cfmask.runs import RunFolder  # noqa: E402
from launch.checks import cluster as of_slurm  # noqa: E402
from launch.checks import ranks as of_ranks  # noqa: E402
from launch.checks.cluster import NOT_CHECKED, OK, PROBLEM, WARNING, Finding  # noqa: E402
from launch.checks.node import write_and_look  # noqa: E402
from launch.checks.probe import Probe, Report, read_reports  # noqa: E402
from launch.jobs import snapshot  # noqa: E402
from launch.jobs.allocation import Allocation, resolve_allocation, uncovered  # noqa: E402
from launch.jobs.batch_script import set_environment, write_environment  # noqa: E402
from launch.jobs.claims import check_path  # noqa: E402
from launch.jobs.cluster_file import ClusterFile, load_cluster_file  # noqa: E402
from launch.jobs.local import local_executor  # noqa: E402
from launch.jobs.planning import Planned  # noqa: E402
from launch.jobs.sbatch import send  # noqa: E402
from launch.jobs.settings import add_allocation_arguments  # noqa: E402
from launch.jobs.submission import Batch  # noqa: E402
from launch.slurm import site as slurm_site  # noqa: E402
from launch.slurm.client import SlurmError, show_job  # noqa: E402
from launch.slurm.control import cancel  # noqa: E402
from launch.slurm.states import is_over, is_pending  # noqa: E402
from launch.slurm.submission import test_only  # noqa: E402
from launch.slurm.texts import Node, Qos  # noqa: E402

if TYPE_CHECKING:
    from launch.slurm.executor import SlurmExecutor

PROBE_MIN = 6
"""The probe's time limit: more than its ranks wait for each other, and for files of each other."""

_WAIT = {"patience_s": 10.0, "answer_s": 20.0}
"""For each of Slurm's commands."""
_LOOK_S = 1  # between looks at the job
_NOTICES = ("srun: ", "slurmstepd: error: *** ", "submitit ")  # in a log: that all is over, and not why
_NO_USE = (
    *("dependency", "array_parallelism", "restarts_without_progress", "rendezvous_timeout", "collective_timeout"),
    *("notify", "wandb"),
)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument(
        "--shared", type=Path, metavar="DIR", help="where runs are to lie (default: ./runs, or . if there is none)"
    )
    p.add_argument(
        "--wait", type=float, default=300, metavar="S", help="seconds that the job may wait in the queue (default: 300)"
    )
    p.add_argument("--no-probe", action="store_true", help="queue nothing")
    p.add_argument("--json", action="store_true", help="an object a line instead of a table")
    add_allocation_arguments(p)
    return p


@exits_cleanly
def main(argv: list[str] | None = None) -> int:
    # What is queued has to leave with us, however we are ended.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    arguments = parser().parse_args(argv)
    idle = [f"--{name.replace('_', '-')}" for name in (*_NO_USE, "after") if getattr(arguments, name)]
    if idle:
        raise UserError(f"{', '.join(idle)} would do nothing here. Leave it out.")
    file = load_cluster_file(arguments.cluster)
    allocation = resolve_allocation(arguments, file)
    shared = _shared_folder(arguments.shared)
    told = Told(as_json=arguments.json)
    site = _look_at_slurm(told, allocation) if allocation.on_slurm else None
    if not allocation.on_slurm:
        why = f"--executor is {arguments.executor}" if arguments.executor != "auto" else "there is no srun here"
        told.add(
            Finding("Slurm", NOT_CHECKED, f"{why}: what a cluster would do is unknown", "run this on a login node")
        )
    clock = _look_at_folder(told, shared, allocation)
    if clock is not None and (site is not None or not allocation.on_slurm):
        folder = shared / f".doctor-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        taken = not allocation.on_slurm or _test_only(told, folder, allocation)
        if arguments.no_probe:
            told.add(Finding("ranks", NOT_CHECKED, "--no-probe: no job was queued"))
        elif not taken:
            told.add(Finding("ranks", NOT_CHECKED, "Slurm would not take the job"))
        else:
            _probe(told, site, folder, allocation, _shards(file), clock, arguments.wait)
    return told.sum_up()


@dataclass
class Told:
    """What was found so far; says it when it is found."""

    as_json: bool
    findings: list[Finding] = field(default_factory=list)

    def add(self, *findings: Finding) -> None:
        for finding in findings:
            self.findings.append(finding)
            if self.as_json:
                print(json.dumps(asdict(finding)), flush=True)
                continue
            print(f"{finding.state:<11}  {finding.check:<15}  {finding.found}", flush=True)
            if finding.change:
                print(f"{'':11}  {'':15}  → {finding.change}", flush=True)

    def sum_up(self) -> int:
        """The exit code."""
        counts = {state: sum(f.state == state for f in self.findings) for state in (PROBLEM, WARNING, NOT_CHECKED)}
        if not self.as_json:
            words = [
                f"{count} {state}{'s' if count > 1 and state != NOT_CHECKED else ''}"
                for state, count in counts.items()
                if count
            ]
            print("\n" + (", ".join(words) if words else "all is well"))
        return 1 if counts[PROBLEM] else 0


# --- from here ------------------------------------------------------------------------------------------------------


def _shared_folder(given: Path | None) -> Path:
    """Where runs lie.

    Raises:
        UserError: it is named, and no folder.
    """
    folder = given if given is not None else Path("runs")
    if not folder.is_dir():
        if given is not None:
            raise UserError(f"--shared {given} is no folder. Make it, or name one on the file system that nodes share.")
        folder = Path()
    check_path(folder.resolve())
    return folder.resolve()


def _shards(file: ClusterFile) -> tuple[str, ...]:
    """The shards folder of the cluster file, if it has one that is no URL."""
    given = file.values.get("shards")
    if file.path is None or not given or "://" in given or ":" in given.split("/")[0]:
        return ()
    return (str((file.path.parent / Path(given).expanduser()).resolve()),)


def _look_at_folder(told: Told, shared: Path, allocation: Allocation) -> list[float] | None:
    """The bounds of (its file system's clock - this machine's); None if nothing can be written there."""
    error, clock = write_and_look(shared, f".doctor-{os.getpid()}")
    if error:
        change = "another folder: --shared DIR here, --run DIR of submit.py"
        told.add(Finding("shared folder", PROBLEM, f"{shared} cannot be written from here: {error}", change))
        return None
    if uncovered(allocation, [shared]):
        found = f"{shared} is under none of the container's mounts"
        change = "mounts under [container] in cluster.toml, unless the site mounts it by itself"
        told.add(Finding("container", WARNING, found, change))
    return clock


@dataclass(frozen=True)
class Site:
    """What Slurm told. qos: what a job gets, as far as can be known before there is one."""

    config: Mapping[str, str]
    partitions: Sequence[Mapping[str, str]]
    nodes: Sequence[Node]
    services: Sequence[Qos]
    qos: str | None

    def preemption(self, allocation: Allocation, qos: str | None) -> list[Finding]:
        chosen = of_slurm.chosen_partitions(self.partitions, allocation.partition)
        return of_slurm.check_preemption(self.config, chosen, self.partitions, self.nodes, self.services, qos)


def _look_at_slurm(told: Told, allocation: Allocation) -> Site | None:
    """Ask it, and say what comes of it; None if it does not answer."""
    try:
        config = slurm_site.read_config(**_WAIT)
        partitions = slurm_site.read_partitions(**_WAIT)
        nodes = slurm_site.read_nodes(**_WAIT)
    except UserError as error:
        change = "scontrol ping says more; SLURM_CONF, if it is set, has to name this cluster's"
        told.add(Finding("Slurm", PROBLEM, str(error), change))
        return None
    services: list[Qos] = []
    qos = allocation.qos
    with contextlib.suppress(SlurmError):  # without accounting there is none
        services = slurm_site.read_qos(**_WAIT)
        qos = qos or slurm_site.read_default_qos(allocation.account, **_WAIT)
    found = Site(config, partitions, nodes, services, qos)
    chosen = [each["PartitionName"] for each in of_slurm.chosen_partitions(partitions, allocation.partition)]
    told.add(
        Finding(
            "Slurm", OK, f"{config.get('SLURM_VERSION', 'of an unknown version')}, cluster {config.get('ClusterName')}"
        )
    )
    told.add(*of_slurm.check_partition(partitions, allocation.partition, allocation.time))
    if chosen:
        told.add(of_slurm.check_nodes(nodes, chosen, allocation))
        told.add(*found.preemption(allocation, qos))
    told.add(of_slurm.check_requeue_setting(config), of_slurm.check_accounting(config))
    return found


def _executor(folder: Path, allocation: Allocation) -> SlurmExecutor:
    """submitit's, as for a run in this folder."""
    batch = Batch.of([Planned(RunFolder(folder), Recipe())])
    executor = batch.executor(allocation, snapshot.digest_of(REPO))
    executor.update_parameters(job_name="cfmask-doctor")
    return executor


def _test_only(told: Told, folder: Path, allocation: Allocation) -> bool:
    """What sbatch says to the very file that a run would be sent with; whether it takes it."""
    executor = _executor(folder, allocation)
    try:
        said = test_only(executor.batch_script()).removeprefix("sbatch: ")
    except UserError as error:
        change = (
            "submit.py --dry-run with these flags shows the file; its #SBATCH lines are flags and keys of cluster.toml"
        )
        told.add(Finding("sbatch", PROBLEM, str(error), change))
        return False
    told.add(Finding("sbatch", OK, f"takes {allocation.nodes} × {allocation.tasks_per_node} ranks: {said}"))
    return True


# --- the probe ------------------------------------------------------------------------------------------------------


def _probe(
    told: Told,
    site: Site | None,
    folder: Path,
    allocation: Allocation,
    needed: tuple[str, ...],
    clock: Sequence[float],
    wait_s: float,
) -> None:
    """Run it, and say what comes of it. The folder stays if something was wrong with it."""
    before = len(told.findings)
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
            told.add(
                Finding("ranks", NOT_CHECKED, why_not, "--wait longer, or --qos or --partition that starts sooner")
            )
            return
        reports = _fresh_reports(folder)
        told.add(
            _launch_failure(job, folder)
            or of_ranks.check_ranks(reports, small.world_size, _last_words(folder, name, small))
        )
        cores = allocation.cpus_per_task if site is not None else 1  # else it takes what there is
        told.add(
            *of_ranks.check_reports(reports, replace(small, cpus_per_task=cores), str(folder.parent), needed, clock)
        )
        if site is not None:
            if job.get("QOS", site.qos) != site.qos and site.config.get("PreemptType") == "preempt/qos":
                told.add(*site.preemption(allocation, job["QOS"]))
            told.add(*of_slurm.check_job_record(job), of_slurm.check_requeue(job, _read(folder / "requeue.json")))
    finally:
        if any(finding.state == PROBLEM for finding in told.findings[before:]):
            print(f"\nlogs and reports: {folder}", file=sys.stderr)
        else:
            shutil.rmtree(folder, ignore_errors=True)


def _run_on_slurm(probe: Probe, allocation: Allocation, wait_s: float) -> tuple[str, dict[str, str], str]:
    """Queue it, wait until it has come to its end or back into the queue, and take it out of there.

    Returns:
        The job's id, what Slurm knows of it at last, and, if it has not started in time, why.

    Raises:
        UserError: Slurm does not take it.
    """
    [job] = send(_executor(probe.folder, allocation), [probe])
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
    """What Slurm knows of the job: nothing when it has ended a while ago; None if Slurm does not answer."""
    try:
        return show_job(name, patience_s=0)
    except SlurmError:
        return None


def _has_ended(record: Mapping[str, str] | None) -> bool:
    return record is not None and (not record or is_over(record.get("JobState", "")))


def _run_here(probe: Probe, allocation: Allocation) -> tuple[str, dict[str, str]]:
    """The ranks as processes of this machine."""
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


def _fresh_reports(folder: Path) -> list[Report]:
    os.listdir(folder)  # a network file system may answer from memory otherwise
    return read_reports(folder)


def _launch_failure(job: Mapping[str, str], folder: Path) -> Finding | None:
    """The job's first node could not even open the log: Slurm tells so by a code alone."""
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


def _last_words(folder: Path, name: str, allocation: Allocation) -> dict[int, str]:
    """The end of each rank's log."""
    words = {}
    for rank in range(allocation.world_size):
        with contextlib.suppress(OSError):
            text = (folder / "jobs" / f"{name}_{rank}_log.out").read_text(errors="replace")
            lines = [line.strip()[-300:] for line in text.splitlines() if line.strip()]
            own = [line for line in lines if not line.startswith(_NOTICES)]
            words[rank] = own[-1] if own else lines[0] if lines else ""
    return words


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except OSError:
        return None


if __name__ == "__main__":
    sys.exit(main())
