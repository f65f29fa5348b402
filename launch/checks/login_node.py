"""The checks of launch/doctor.py on the login node: Slurm's settings, and whether sbatch accepts a job."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cfmask.errors import UserError
from cfmask.recipe import Recipe
from cfmask.runs import RunFolder
from launch.allocation.nodes import chosen_partitions
from launch.allocation.resolve import Allocation
from launch.checks import cluster
from launch.checks.findings import Finding, Findings, ok, problem
from launch.slurm import site
from launch.slurm.client import SlurmError
from launch.slurm.submission import test_only
from launch.slurm.texts import Qos, SlurmNode
from launch.submission import snapshot
from launch.submission.planning import PlannedJob
from launch.submission.snapshot import REPO
from launch.submission.submit import SubmissionBatch

if TYPE_CHECKING:
    from launch.slurm.executor import SlurmExecutor

_WAIT = {"patience_s": 10.0, "answer_s": 20.0}
"""For each of Slurm's commands."""


@dataclass(frozen=True)
class Site:
    """Slurm's description of the cluster."""

    config: Mapping[str, str]
    """slurm.conf, by key."""
    partitions: Sequence[Mapping[str, str]]
    """Records of scontrol."""
    nodes: Sequence[SlurmNode]
    """The nodes of all partitions."""
    services: Sequence[Qos]
    """All qualities of service; empty without accounting."""
    qos: str | None
    """The quality of service of a job, as far as it is known before submission."""

    def preemption(self, allocation: Allocation, qos: str | None) -> list[Finding]:
        chosen = chosen_partitions(self.partitions, allocation.partition)
        return cluster.check_preemption(self.config, chosen, self.partitions, self.nodes, self.services, qos)


def ask_slurm(findings: Findings, allocation: Allocation) -> Site | None:
    """Add the findings on partition, nodes, preemption, requeue and accounting.

    Returns:
        Slurm's answers; None if it does not answer.
    """
    try:
        config = site.read_config(**_WAIT)
        partitions = site.read_partitions(**_WAIT)
        nodes = site.read_nodes(**_WAIT)
    except UserError as error:
        change = "run scontrol ping; SLURM_CONF, if set, has to name this cluster's file"
        findings.add(problem("Slurm", str(error), change))
        return None
    services: list[Qos] = []
    qos = allocation.qos
    with contextlib.suppress(SlurmError):  # there is no accounting
        services = site.read_qos(**_WAIT)
        qos = qos or site.read_default_qos(allocation.account, **_WAIT)
    answers = Site(config, partitions, nodes, services, qos)
    chosen = [each["PartitionName"] for each in chosen_partitions(partitions, allocation.partition)]
    version = config.get("SLURM_VERSION", "of an unknown version")
    findings.add(ok("Slurm", f"{version}, cluster {config.get('ClusterName')}"))
    findings.add(*cluster.check_partition(partitions, allocation.partition, allocation.time))
    if chosen:
        findings.add(cluster.check_nodes(nodes, chosen, allocation))
        findings.add(*answers.preemption(allocation, qos))
    findings.add(cluster.check_requeue_setting(config), cluster.check_accounting(config))
    return answers


def probe_executor(folder: Path, allocation: Allocation) -> SlurmExecutor:
    """The executor that a run in this folder would be submitted with."""
    batch = SubmissionBatch.of([PlannedJob(RunFolder(folder), Recipe())])
    executor = batch.executor(allocation, snapshot.digest_of(REPO))
    executor.update_parameters(job_name="cfmask-doctor")
    return executor


def check_submission(findings: Findings, folder: Path, allocation: Allocation) -> bool:
    """Ask sbatch whether it accepts the file that a run would be submitted with, without queueing it."""
    try:
        said = test_only(probe_executor(folder, allocation).batch_script()).removeprefix("sbatch: ")
    except UserError as error:
        change = "submit.py --dry-run with these flags shows the file; flags and cluster.toml set its #SBATCH lines"
        findings.add(problem("sbatch", str(error), change))
        return False
    findings.add(ok("sbatch", f"accepts {allocation.nodes} × {allocation.tasks_per_node} ranks: {said}"))
    return True
