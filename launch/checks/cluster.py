"""Findings from Slurm's configuration. Pure: launch/slurm/site.py asks Slurm."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from launch.allocation.nodes import chosen_partitions, fitting_nodes, nodes_of, time_refusal
from launch.allocation.resolve import Allocation
from launch.allocation.settings import PARTITION_TIME, UNLIMITED
from launch.checks.findings import NOT_CHECKED, Finding, not_checked, ok, problem, warning
from launch.slurm.texts import Qos, SlurmNode, seconds, version_of

ADMINISTRATOR = "slurm/administrator.md"
_ENOUGH_REQUEUES = 100
"""More preemptions than a run of a few days has."""
GRACE_S = 60
"""A sufficient grace time for a checkpoint on a busy shared file system; the advice is twice as long."""


def check_partition(partitions: Sequence[Mapping[str, str]], wanted: str | None, time: int | str) -> list[Finding]:
    """Check that the partition exists, is up, and allows the time limit.

    Args:
        time: ``Allocation.time``.
    """
    names = ", ".join(each["PartitionName"] for each in partitions) or "none that you may see"
    remedy = 'name one of them: --partition, or partition = "…" in cluster.toml'
    chosen = chosen_partitions(partitions, wanted)
    if unknown := sorted(set((wanted or "").split(",")) - {""} - {each["PartitionName"] for each in chosen}):
        return [problem("partition", f"there is no partition {', '.join(unknown)}; there are {names}", remedy)]
    if not chosen:
        return [problem("partition", f"Slurm has no default partition; there are {names}", remedy)]
    findings = []
    for each in chosen:
        name, state = each["PartitionName"], each.get("State", "UP")
        if state != "UP":
            findings.append(problem("partition", f"{name} is {state}", "use another one, or ask when it will be up"))
            continue
        default = "" if wanted else " (Slurm's default)"
        findings.append(ok("partition", f"{name}{default}, of {each.get('TotalNodes', '?')} nodes"))
        findings.append(_check_time(each, time))
    return findings


def _check_time(partition: Mapping[str, str], time: int | str) -> Finding:
    name, most = partition["PartitionName"], partition.get("MaxTime", "UNLIMITED")
    allowed = "any time" if math.isinf(seconds(most)) else f"at most {most}"
    if time == PARTITION_TIME:
        default = partition.get("DefaultTime", "NONE")
        default = most if default == "NONE" else default  # as Slurm does
        return ok("time limit", f"the default of {name}, {default}; it allows {allowed}")
    if refusal := time_refusal(partition, time):
        return problem("time limit", *refusal)
    requested = "no limit" if time == UNLIMITED else f"{time} min"
    return ok("time limit", f"{requested} requested; {name} allows {allowed}")


def check_nodes(nodes: Sequence[SlurmNode], partitions: Iterable[str], allocation: Allocation) -> Finding:
    """Check that the partitions have enough working nodes of the requested size."""
    own = nodes_of(nodes, partitions)
    if not own:
        return not_checked("nodes", "sinfo shows no node of the partition")
    large, found, change = fitting_nodes(own, allocation)
    if change:
        return problem("nodes", found, change)
    working = [node for node in large if node.works]
    if len(working) < allocation.nodes:
        states = ", ".join(sorted({node.state for node in large if not node.works}))
        change = "wait for them or ask (sinfo -R shows why), or use another --partition"
        return problem("nodes", f"{found}, and only {len(working)} of them work ({states})", change)
    return ok("nodes", found)


def check_preemption(
    config: Mapping[str, str],
    chosen: Sequence[Mapping[str, str]],
    partitions: Sequence[Mapping[str, str]],
    nodes: Sequence[SlurmNode],
    qos: Sequence[Qos],
    own_qos: str | None,
) -> list[Finding]:
    """Check whether a job can be preempted, by which jobs, and whether it then restarts.

    Args:
        chosen: the partitions that the job may go to.
        own_qos: its quality of service, if known.
    """
    kind = config.get("PreemptType", "").removeprefix("preempt/")
    if kind in ("", "none"):
        return [ok("preemption", "Slurm preempts no job here (PreemptType)")]
    if kind == "qos":
        service = next((each for each in qos if each.name == own_qos), None)
        if service is None:
            found = f"PreemptType is preempt/qos, and sacctmgr does not list the job's qos ({own_qos or 'unknown'})"
            change = f"name the qos with --qos; {ADMINISTRATOR}, 1 has the settings that it needs"
            return [not_checked("preemption", found, change)]
        by = [each.name for each in qos if service.name in each.preempts]
        if "WITHIN" in service.mode.upper().split(","):  # its own jobs preempt each other
            by.append(service.name)
        name, where = f"qos {service.name}", f"sacctmgr modify qos {service.name} set"
        return _consequences(config, name, by, service.mode, service.grace, where)
    findings = []
    for each in chosen:
        name = each["PartitionName"]
        here = {node.name for node in nodes if node.partition == name}
        sharing = {node.partition for node in nodes if node.name in here}
        higher = [other["PartitionName"] for other in partitions if _tier(other) > _tier(each)]
        by = [other for other in higher if other in sharing or not here]
        mode, grace = each.get("PreemptMode", ""), each.get("GraceTime", "0")
        findings += _consequences(config, f"partition {name}", by, mode, grace, f"PartitionName={name} …")
    return findings


def _tier(partition: Mapping[str, str]) -> int:
    return int(partition.get("PriorityTier", "1"))


def _consequences(
    config: Mapping[str, str], what: str, by: Sequence[str], own_mode: str, grace: str, where: str
) -> list[Finding]:
    """The findings on preemption of jobs in a partition or quality of service.

    Args:
        what: the partition or quality of service, by kind and name.
        by: those whose jobs preempt its jobs.
        where: the beginning of the line or command that sets its preemption mode.
    """
    mode = own_mode.upper()
    if mode in ("", "CLUSTER"):
        mode = config.get("PreemptMode", "OFF").upper()
    modes = set(mode.split(",")) - {"GANG", "WITHIN"}
    if not by or modes <= {"OFF"}:
        why = "nothing has a higher priority" if not by else f"PreemptMode={own_mode or mode}"
        return [ok("preemption", f"a job in {what} is not preempted: {why}")]
    change = f"{where} PreemptMode=REQUEUE ({ADMINISTRATOR}, 1)."
    found = f"a job in {what} is preempted by {', '.join(by)}, PreemptMode={mode}"
    if "REQUEUE" in modes:
        first = ok("preemption", f"{found}: it is requeued")
    elif "CANCEL" in modes:
        change += " Until then: submit.py --resume RUN"
        first = problem("preemption", f"{found}: its run stays cancelled until it is resumed by hand", change)
    else:  # SUSPEND
        change += " Until then: a --collective-timeout that is longer than the longest suspension"
        return [warning("preemption", f"{found}: it is suspended, and keeps its GPU memory", change)]
    return [first, check_user_signal(config), check_grace(config, what, grace, where), *check_requeue_limit(config)]


def check_requeue_limit(config: Mapping[str, str]) -> list[Finding]:
    """Check how often a job may be preempted. Until 23.11, only failed launches count against the limit."""
    limit = config.get("MaxBatchRequeue", "")
    if version_of(config.get("SLURM_VERSION", "")) < (24, 5) or not limit.isdigit():
        return []
    if int(limit) >= _ENOUGH_REQUEUES:
        return [ok("requeue limit", f"a job may be preempted {limit} times (MaxBatchRequeue)")]
    found = f"a job that was preempted {limit} times is held until an administrator releases it"
    return [warning("requeue limit", found, f"MaxBatchRequeue=1000000 in slurm.conf ({ADMINISTRATOR}, 8)")]


def check_user_signal(config: Mapping[str, str]) -> Finding:
    """Check whether a preempted job gets its --signal. 22.05 knows one name of the setting, later versions both."""
    old, new = "preempt_send_user_signal", "send_user_signal"
    has_old = old in config.get("SlurmctldParameters", "").lower()
    has_new = new in config.get("PreemptParameters", "").lower()
    knows_new = version_of(config.get("SLURM_VERSION", "")) > (22, 5)
    if has_old or (has_new and knows_new):
        set_by = f"SlurmctldParameters={old}" if has_old else f"PreemptParameters={new}"
        return ok("warning signal", f"a preempted job gets USR2 first ({set_by})")
    found = "a preempted job gets TERM and not USR2: it saves, and asks Slurm whether it is requeued"
    if has_new:
        found = f"PreemptParameters={new} is set, but Slurm {config.get('SLURM_VERSION')} uses another name"
    line = f"PreemptParameters={new}" if knows_new else f"SlurmctldParameters={old}"
    return warning("warning signal", found, f"{line} in slurm.conf ({ADMINISTRATOR}, 2)")


def check_grace(config: Mapping[str, str], what: str, grace: str, where: str) -> Finding:
    """Check whether the time between warning and kill is enough for a checkpoint."""
    try:
        given = seconds(grace)
    except ValueError:
        return Finding("grace", NOT_CHECKED, f"GraceTime of {what} is {grace!r}", f"see {ADMINISTRATOR}, 3")
    change = f"{where} GraceTime=120 ({ADMINISTRATOR}, 3). Until then: a smaller --checkpoint-minutes"
    if given == 0:
        wait = config.get("KillWait", "30 sec")
        found = f"GraceTime of {what} is 0: no warning signal, TERM, and KILL {wait} later (KillWait)"
        return warning("grace", found, change)
    found = f"{given:.0f} s between warning and kill (GraceTime of {what})"
    if given < GRACE_S:
        return warning("grace", f"{found}: little for a checkpoint on a busy file system", change)
    return ok("grace", found)


def check_requeue_setting(config: Mapping[str, str]) -> Finding:
    """JobRequeue is the default for jobs without --requeue; this project's jobs have it."""
    if config.get("JobRequeue") == "0":
        return ok("requeue setting", "JobRequeue=0, and submit.py gives --requeue")
    return ok("requeue setting", f"JobRequeue={config.get('JobRequeue', '1')}")


def check_accounting(config: Mapping[str, str]) -> Finding:
    kind = config.get("AccountingStorageType", "").removeprefix("accounting_storage/")
    if kind in ("", "none"):
        found = "no accounting: status.py cannot tell how a killed job ended, and submitit warns whenever it polls"
        change = f"AccountingStorageType=accounting_storage/slurmdbd in slurm.conf ({ADMINISTRATOR}, last section)"
        return warning("accounting", found, change)
    return ok("accounting", f"{kind}: sacct shows how jobs ended")


def check_job_record(job: Mapping[str, str]) -> Finding:
    """Check that the probe's job kept --requeue: a site may change jobs when they are submitted."""
    if job.get("Requeue") == "0":
        found = "Slurm accepted the job without its --requeue (Requeue=0): a job_submit plugin or a wrapper removed it"
        return problem("requeue flag", found, f"ask to keep the flag ({ADMINISTRATOR}, 4)")
    return ok("requeue flag", "the job has it (Requeue=1)")


def check_requeue(job: Mapping[str, str], asked: Mapping[str, object] | None) -> Finding:
    """Check that the job was requeued when its first rank asked for it.

    Args:
        asked: the content of requeue.json; None: the rank ended before.
    """
    if asked is None:
        return not_checked("requeue")
    if int(job.get("Restarts") or 0) > 0:
        # Without a code, the requeue ended the rank before scontrol returned.
        by_rank = asked.get("scontrol") and asked.get("code") in (0, None)
        how = "its first rank's scontrol" if by_rank else "its batch script: scontrol is missing on its ranks, or fails"
        return ok("requeue", f"the job requeued itself (by {how})")
    said = str(asked.get("said") or "the node has no scontrol, and the batch script's requeue failed")
    change = (
        f"ask for the right to requeue one's own jobs ({ADMINISTRATOR}, 4). Until then, submit.py --chain N queues N "
        "jobs, of which each resumes the run"
    )
    return problem("requeue", f"the job ended instead of being requeued: {said}", change)
