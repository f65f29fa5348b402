"""What launch/doctor.py finds out on the login node: Slurm's settings, and whether sbatch accepts a job."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cfmask.errors import UserError
from cfmask.recipe import Recipe
from cfmask.runs import RunFolder
from launch.allocation.resolve import Allocation
from launch.checks import cluster
from launch.checks.findings import OK, PROBLEM, Finding, Findings
from launch.slurm import site
from launch.slurm.client import SlurmError
from launch.slurm.submission import test_only
from launch.slurm.texts import Qos, SlurmNode
from launch.submission import snapshot
from launch.submission.planning import Planned
from launch.submission.submit import REPO, SubmissionBatch

if TYPE_CHECKING:
    from launch.slurm.executor import SlurmExecutor

_WAIT = {"patience_s": 10.0, "answer_s": 20.0}
"""For each of Slurm's commands."""


@dataclass(frozen=True)
class Site:
    """What Slurm says about the cluster.

    config: slurm.conf, by key.
    partitions: a record of scontrol each.
    nodes: of all partitions.
    services: each quality of service; empty without accounting.
    qos: the quality of service that a job gets, as far as it is known before there is a job.
    """

    config: Mapping[str, str]
    partitions: Sequence[Mapping[str, str]]
    nodes: Sequence[SlurmNode]
    services: Sequence[Qos]
    qos: str | None

    def preemption(self, allocation: Allocation, qos: str | None) -> list[Finding]:
        chosen = cluster.chosen_partitions(self.partitions, allocation.partition)
        return cluster.check_preemption(self.config, chosen, self.partitions, self.nodes, self.services, qos)


def ask_slurm(findings: Findings, allocation: Allocation) -> Site | None:
    """Ask Slurm about partition, nodes, preemption, requeue and accounting, and add the findings.

    Returns:
        What it says; None if it does not answer.
    """
    try:
        config = site.read_config(**_WAIT)
        partitions = site.read_partitions(**_WAIT)
        nodes = site.read_nodes(**_WAIT)
    except UserError as error:
        change = "scontrol ping says more; SLURM_CONF, if it is set, has to name this cluster's"
        findings.add(Finding("Slurm", PROBLEM, str(error), change))
        return None
    services: list[Qos] = []
    qos = allocation.qos
    with contextlib.suppress(SlurmError):  # without accounting there is none
        services = site.read_qos(**_WAIT)
        qos = qos or site.read_default_qos(allocation.account, **_WAIT)
    answers = Site(config, partitions, nodes, services, qos)
    chosen = [each["PartitionName"] for each in cluster.chosen_partitions(partitions, allocation.partition)]
    findings.add(
        Finding(
            "Slurm", OK, f"{config.get('SLURM_VERSION', 'of an unknown version')}, cluster {config.get('ClusterName')}"
        )
    )
    findings.add(*cluster.check_partition(partitions, allocation.partition, allocation.time))
    if chosen:
        findings.add(cluster.check_nodes(nodes, chosen, allocation))
        findings.add(*answers.preemption(allocation, qos))
    findings.add(cluster.check_requeue_setting(config), cluster.check_accounting(config))
    return answers


def probe_executor(folder: Path, allocation: Allocation) -> SlurmExecutor:
    """The executor that a run in this folder would be submitted with."""
    batch = SubmissionBatch.of([Planned(RunFolder(folder), Recipe())])
    executor = batch.executor(allocation, snapshot.digest_of(REPO))
    executor.update_parameters(job_name="cfmask-doctor")
    return executor


def check_submission(findings: Findings, folder: Path, allocation: Allocation) -> bool:
    """Ask sbatch, without queueing anything, whether it accepts the file that a run would be submitted with."""
    executor = probe_executor(folder, allocation)
    try:
        said = test_only(executor.batch_script()).removeprefix("sbatch: ")
    except UserError as error:
        change = (
            "submit.py --dry-run with these flags shows the file; its #SBATCH lines are flags and keys of cluster.toml"
        )
        findings.add(Finding("sbatch", PROBLEM, str(error), change))
        return False
    findings.add(Finding("sbatch", OK, f"takes {allocation.nodes} × {allocation.tasks_per_node} ranks: {said}"))
    return True
