"""squeue's pending reasons in words."""

from __future__ import annotations

import re

import pytest

from launch import submit
from launch.slurm.reasons import _REASONS, explain

_LIMITS = """
QOSGrpCpuLimit QOSGrpCPUMinutesLimit QOSGrpCPURunMinutesLimit QOSGrpJobsLimit QOSGrpMemLimit QOSGrpNodeLimit
QOSGrpSubmitJobsLimit QOSGrpWallLimit QOSMaxCpuPerJobLimit QOSMaxCpuMinutesPerJobLimit QOSMaxNodePerJobLimit
QOSMaxWallDurationPerJobLimit QOSMaxCpuPerUserLimit QOSMaxJobsPerUserLimit QOSMaxNodePerUserLimit
QOSMaxSubmitJobPerUserLimit QOSMinCpuNotSatisfied AssocGrpCpuLimit AssocGrpCPUMinutesLimit AssocGrpJobsLimit
AssocGrpSubmitJobsLimit AssocGrpWallLimit AssocMaxJobsLimit AssocMaxCpuPerJobLimit AssocMaxWallDurationPerJobLimit
AssocMaxSubmitJobLimit AssocGrpUnknown AssocMaxCpuPerNode AssocGrpMemRunMinutes AssocMaxNodeMinutesPerJob AssocGrpEnergy
AssocGrpGRES AssocGrpGRESMinutes AssocMaxGRESPerNode AssocGrpLicense AssocGrpBB AssocGrpBilling AssocGrpBillingMinutes
QOSMaxGRESPerUser QOSMaxGRESPerJob QOSMinGRES QOSMinNode QOSMaxMemoryPerUser QOSGrpGRES QOSGrpBillingRunMinutes
MaxGRESPerAccount MaxJobsPerAccount MaxSubmitJobsPerAccount MaxNodePerAccount AssociationJobLimit
AssociationResourceLimit AssociationTimeLimit QOSJobLimit QOSResourceLimit QOSTimeLimit
"""


@pytest.mark.parametrize(
    ("reason", "why"),
    [
        ("Resources", "its nodes are in use by other jobs"),
        ("(Priority)", "jobs of higher priority are first"),
        ("None", "Slurm has not looked at it yet"),
        ("", "Slurm has not looked at it yet"),
        ("ReqNodeNotAvail", "nodes that it needs are down, drained or reserved"),
        ("ReqNodeNotAvail, UnavailableNodes:n[1-2]", "nodes that it needs are down, drained or reserved: n[1-2]"),
        ("ReqNodeNotAvail,_UnavailableNodes:", "nodes that it needs are down, drained or reserved"),
        ("ReqNodeNotAvail, Reserved for maintenance", "nodes that it needs are reserved for maintenance"),
        ("QOSMaxGRESPerUser", "your limit on GPUs is reached until other jobs end"),
        ("AssocGrpGRES", "the limit on GPUs of its account is reached until other jobs end"),
        ("AssocGrpGRESMinutes", "the GPU minutes of its account are used up"),
        ("AssocMaxJobsLimit", "your limit on jobs is reached until other jobs end"),
        ("QOSMaxWallDurationPerJobLimit", "it asks for more run time than its QOS allows a job"),
        ("MaxGRESPerAccount", "the limit on GPUs of its account is reached until other jobs end"),
        ("QOSMinGRES", "it asks for fewer GPUs than its QOS demands"),
        ("SomethingNew", "Slurm gives the reason SomethingNew"),
        ("QOSMaxQubitsPerUser", "Slurm gives the reason QOSMaxQubitsPerUser"),
        ("TimeLimit", "Slurm gives the reason TimeLimit"),
        (
            "Nodes_required_for_job_are_DOWN,_DRAINED_or_reserved_for_jobs_in_higher_priority_partitions",
            "its nodes are down, drained or reserved for jobs of higher priority",
        ),
    ],
)
def test_a_reason_is_explained(reason, why):
    assert explain(reason).why == why


@pytest.mark.parametrize("reason", [*_REASONS, *_LIMITS.split()])
def test_known_reasons_are_phrases_and_their_commands_are_complete(reason):
    found = explain(reason, job="4711", run="runs/a")
    assert not found.why.startswith("Slurm gives the reason") and len(found.why) < 80
    for text in (found.why, found.remedy):
        assert "{" not in text.replace("%", "") and not text.endswith(".")
        assert "JOB" not in text and "RUN" not in text
    assert set(re.findall(r"(?<![\w-])--[a-z-]+", found.remedy)) <= set(submit.parser()._option_string_actions)


def test_a_held_job_has_a_remedy():
    assert explain("JobHeldUser", job="4711").remedy == "scontrol release 4711"
    held = explain("launch failure limit exceeded requeued held", run="runs/a")
    assert "--resume runs/a" in held.remedy and "as often as Slurm allows" in held.why
    assert explain("user env retrieval failed requeued held", job="1").remedy == "scontrol release 1"
    assert explain("Priority").remedy == ""
