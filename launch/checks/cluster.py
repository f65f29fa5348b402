"""What doctor.py makes of how a cluster is set up. Nothing here asks Slurm: launch/slurm/site.py does."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from launch.allocation.resolve import Allocation
from launch.allocation.settings import PARTITION_TIME, UNLIMITED
from launch.checks.findings import NOT_CHECKED, OK, PROBLEM, WARNING, Finding
from launch.slurm.texts import Qos, SlurmNode, gpus_of, seconds, version_of

ADMINISTRATOR = "slurm/administrator.md"
_ENOUGH_REQUEUES = 100
"""A run of a few days is preempted less often."""
GRACE_S = 60
"""A grace that is enough for a checkpoint on a shared file system with other users; to ask for: twice as long."""


# --- Slurm, from the login node -------------------------------------------------------------------------------------


def chosen_partitions(partitions: Sequence[Mapping[str, str]], wanted: str | None) -> list[Mapping[str, str]]:
    """The partitions that a job would go to: those that are named (a list, in Slurm), or the default."""
    if wanted:
        return [each for name in wanted.split(",") for each in partitions if each["PartitionName"] == name]
    return [each for each in partitions if each.get("Default") == "YES"]


def check_partition(partitions: Sequence[Mapping[str, str]], wanted: str | None, time: int | str) -> list[Finding]:
    """That there is one, that it is up, and that it gives so much time.

    Args:
        time: ``Allocation.time``.
    """
    names = ", ".join(each["PartitionName"] for each in partitions)
    chosen = chosen_partitions(partitions, wanted)
    if unknown := sorted(set((wanted or "").split(",")) - {""} - {each["PartitionName"] for each in chosen}):
        found = f"there is no partition {', '.join(unknown)}; there are {names or 'none that you see'}"
        return [
            Finding("partition", PROBLEM, found, 'name one of them: --partition, or partition = "…" in cluster.toml')
        ]
    if not chosen:
        found = f"Slurm has no default partition; there are {names or 'none that you see'}"
        return [Finding("partition", PROBLEM, found, 'name one: --partition, or partition = "…" in cluster.toml')]
    findings = []
    for each in chosen:
        name, state = each["PartitionName"], each.get("State", "UP")
        if state != "UP":
            change = "use another one, or ask when it is back"
            findings.append(Finding("partition", PROBLEM, f"{name} is {state}", change))
            continue
        is_default = "" if wanted else " (Slurm's default)"
        findings.append(Finding("partition", OK, f"{name}{is_default}, of {each.get('TotalNodes', '?')} nodes"))
        findings.append(_check_time(each, time))
    return findings


def _check_time(partition: Mapping[str, str], time: int | str) -> Finding:
    name, most = partition["PartitionName"], partition.get("MaxTime", "UNLIMITED")
    limit = seconds(most)
    at_most = "any time" if math.isinf(limit) else f"at most {most}"
    if time == PARTITION_TIME:
        default = partition.get("DefaultTime", "NONE")
        default = most if default == "NONE" else default  # as Slurm does
        return Finding("time limit", OK, f"{name}'s default, {default}, is asked for; it gives {at_most}")
    asked = "no limit" if time == UNLIMITED else f"{time} min"
    if (math.inf if time == UNLIMITED else 60 * int(time)) > limit:
        found = f"a job gets {most} in {name} at most, and --time asks for {asked}"
        change = f"--time {int(limit // 60)}, or time = {int(limit // 60)} in cluster.toml"
        return Finding("time limit", PROBLEM, found, f"{change}: a run goes on over any number of starts")
    return Finding("time limit", OK, f"{asked} asked for; {name} gives {at_most}")


def check_nodes(nodes: Sequence[SlurmNode], partitions: Iterable[str], allocation: Allocation) -> Finding:
    """That the partitions have nodes of the size that is asked for."""
    a = allocation
    cpus = a.tasks_per_node * a.cpus_per_task
    gpus = f"{a.gpus_per_node} GPUs" + (f" ({a.gpu_type})" if a.gpu_type else "") if a.gpus_per_node else ""
    wanted = " and ".join(filter(None, [gpus, f"{cpus} CPU{'s' if cpus > 1 else ''}"]))
    own = {node.name: node for node in nodes if node.partition in set(partitions)}.values()
    if not own:
        return Finding("nodes", NOT_CHECKED, "sinfo shows no node of the partition")
    if a.gpus_from == "exclusive":  # Slurm need not know of its GPUs
        with_gpus = list(own)
    else:
        with_gpus = [node for node in own if gpus_of(node.gres, a.gpu_type) >= a.gpus_per_node]
    if len(with_gpus) < a.nodes:
        kinds = sorted({node.gres for node in own})
        found = (
            f"{len(with_gpus)} of {len(own)} nodes have {gpus}, {a.nodes} are asked for; they have {'; '.join(kinds)}"
        )
        change = "another --partition, another type or number of GPUs (--gpus-per-node 0: train on CPUs), or --nodes"
        return Finding("nodes", PROBLEM, found, change)
    large = [node for node in with_gpus if node.cpus >= cpus]
    if len(large) < a.nodes:
        most = sorted((node.cpus for node in with_gpus), reverse=True)[a.nodes - 1]
        found = f"{len(large)} of {len(own)} nodes have {wanted}, {a.nodes} are asked for"
        each = most // a.tasks_per_node
        fewer = f"--cpus-per-task {each}, or cpus_per_task = {each} in cluster.toml"
        change = f"{fewer if each else f'--tasks-per-node {most}'}: {a.nodes} nodes have {most} CPUs or more"
        return Finding("nodes", PROBLEM, found, change)
    working = [node for node in large if node.works]
    found = f"{len(large)} of {len(own)} nodes have {wanted}; {a.nodes} asked for"
    if len(working) < a.nodes:
        states = ", ".join(sorted({node.state for node in large if not node.works}))
        change = "wait for them or ask (sinfo -R says why), or use another --partition"
        return Finding("nodes", PROBLEM, f"{found}, and only {len(working)} of them work ({states})", change)
    return Finding("nodes", OK, found)


def check_preemption(
    config: Mapping[str, str],
    chosen: Sequence[Mapping[str, str]],
    partitions: Sequence[Mapping[str, str]],
    nodes: Sequence[SlurmNode],
    qos: Sequence[Qos],
    own_qos: str | None,
) -> list[Finding]:
    """Whether a job can be preempted, by whom, and what then becomes of it.

    Args:
        chosen: the partitions that the job goes to. own_qos: its quality of service, if it is known.
    """
    kind = config.get("PreemptType", "").removeprefix("preempt/")
    if kind in ("", "none"):
        return [Finding("preemption", OK, "Slurm preempts no job here (PreemptType)")]
    if kind == "qos":
        service = next((each for each in qos if each.name == own_qos), None)
        if service is None:
            found = f"PreemptType is preempt/qos, and sacctmgr tells nothing of the qos {own_qos or 'that a job gets'}"
            change = f"name the qos with --qos; see {ADMINISTRATOR}, 1 for what it should have"
            return [Finding("preemption", NOT_CHECKED, found, change)]
        by = [each.name for each in qos if service.name in each.preempts]
        # A qos that names none of its own can still preempt within itself.
        if "WITHIN" in service.mode.upper().split(","):
            by.append(service.name)
        return _consequences(
            config, f"qos {service.name}", by, service.mode, service.grace, f"sacctmgr modify qos {service.name} set"
        )
    findings = []
    for each in chosen:
        name = each["PartitionName"]
        here = {node.name for node in nodes if node.partition == name}
        shares = {node.partition for node in nodes if node.name in here} if here else None
        by = [
            other["PartitionName"]
            for other in partitions
            if _tier(other) > _tier(each) and (shares is None or other["PartitionName"] in shares)
        ]
        findings += _consequences(
            config,
            f"partition {name}",
            by,
            each.get("PreemptMode", ""),
            each.get("GraceTime", "0"),
            f"PartitionName={name} …",
        )
    return findings


def _tier(partition: Mapping[str, str]) -> int:
    return int(partition.get("PriorityTier", "1"))


def _consequences(
    config: Mapping[str, str], what: str, by: Sequence[str], own_mode: str, grace: str, where: str
) -> list[Finding]:
    mode = own_mode.upper()
    if mode in ("", "CLUSTER"):
        mode = config.get("PreemptMode", "OFF").upper()
    modes = set(mode.split(",")) - {"GANG", "WITHIN"}
    if not by or modes <= {"OFF"}:
        why = "nobody comes before it" if not by else f"PreemptMode={own_mode or mode}"
        return [Finding("preemption", OK, f"a job in {what} is not preempted: {why}")]
    line = f"{where} PreemptMode=REQUEUE ({ADMINISTRATOR}, 1)."
    by_whom = f"a job in {what} gives way to {', '.join(by)}, PreemptMode={mode}"
    if "REQUEUE" in modes:
        first = Finding("preemption", OK, f"{by_whom}: it comes back by itself")
    elif "CANCEL" in modes:
        change = f"{line} Until then: submit.py --resume RUN"
        return [
            Finding("preemption", PROBLEM, f"{by_whom}: its run is over until somebody resumes it", change),
            *_warning_and_grace(config, what, grace, where),
        ]
    else:  # SUSPEND
        change = f"{line} Until then: a --collective-timeout that is longer than the longest stop"
        return [
            Finding(
                "preemption", WARNING, f"{by_whom}: it is stopped where it is, and its GPUs' memory stays taken", change
            )
        ]
    return [first, *_warning_and_grace(config, what, grace, where)]


def _warning_and_grace(config: Mapping[str, str], what: str, grace: str, where: str) -> list[Finding]:
    return [check_user_signal(config), check_grace(config, what, grace, where), *check_requeue_limit(config)]


def check_requeue_limit(config: Mapping[str, str]) -> list[Finding]:
    """Whether a job may be preempted any number of times. Until 23.11 only failed launches count against the limit."""
    limit = config.get("MaxBatchRequeue", "")
    if version_of(config.get("SLURM_VERSION", "")) < (24, 5) or not limit.isdigit():
        return []
    if int(limit) >= _ENOUGH_REQUEUES:
        return [Finding("requeue limit", OK, f"a job may be preempted {limit} times (MaxBatchRequeue)")]
    found = f"a job that was preempted {limit} times is held until an administrator releases it"
    change = f"MaxBatchRequeue=1000000 in slurm.conf ({ADMINISTRATOR}, 8)"
    return [Finding("requeue limit", WARNING, found, change)]


def check_user_signal(config: Mapping[str, str]) -> Finding:
    """Whether a job that is preempted gets its --signal. Of the two names, 22.05 knows one, later versions both."""
    old, new = "preempt_send_user_signal", "send_user_signal"
    has_old = old in config.get("SlurmctldParameters", "").lower()
    has_new = new in config.get("PreemptParameters", "").lower()
    knows_new = version_of(config.get("SLURM_VERSION", "")) > (22, 5)
    line = f"PreemptParameters={new}" if knows_new else f"SlurmctldParameters={old}"
    if has_old or (has_new and knows_new):
        set_by = f"SlurmctldParameters={old}" if has_old else f"PreemptParameters={new}"
        return Finding("warning signal", OK, f"a job that is preempted gets its USR2 first ({set_by})")
    change = f"{line} in slurm.conf ({ADMINISTRATOR}, 2)"
    if has_new:
        found = f"PreemptParameters={new} is set, and Slurm {config.get('SLURM_VERSION')} does not know it by this name"
        return Finding("warning signal", WARNING, found, change)
    found = "a job that is preempted gets TERM, not its USR2: it saves, and asks Slurm whether it comes back"
    return Finding("warning signal", WARNING, found, change)


def check_grace(config: Mapping[str, str], what: str, grace: str, where: str) -> Finding:
    """Whether the time between warning and kill is enough for a checkpoint."""
    try:
        given = seconds(grace)
    except ValueError:
        return Finding("grace", NOT_CHECKED, f"GraceTime of {what} is {grace!r}", f"see {ADMINISTRATOR}, 3")
    change = f"{where} GraceTime=120 ({ADMINISTRATOR}, 3). Until then: a smaller --checkpoint-minutes"
    if given == 0:
        wait = config.get("KillWait", "30 sec")
        found = f"GraceTime of {what} is 0: no warning signal, TERM and {wait} later KILL (KillWait)"
        return Finding("grace", WARNING, found, change)
    found = f"{given:.0f} s between warning and kill (GraceTime of {what})"
    if given < GRACE_S:
        return Finding("grace", WARNING, f"{found}: little for a checkpoint on a busy file system", change)
    return Finding("grace", OK, found)


def check_requeue_setting(config: Mapping[str, str]) -> Finding:
    """JobRequeue is what a job gets that does not say: ours do."""
    if config.get("JobRequeue") == "0":
        return Finding("requeue setting", OK, "JobRequeue=0, and submit.py asks for --requeue itself")
    return Finding("requeue setting", OK, f"JobRequeue={config.get('JobRequeue', '1')}")


def check_accounting(config: Mapping[str, str]) -> Finding:
    kind = config.get("AccountingStorageType", "").removeprefix("accounting_storage/")
    if kind in ("", "none"):
        found = (
            "no accounting: status.py cannot tell how a job ended that left no word, and submitit warns at every look"
        )
        change = f"AccountingStorageType=accounting_storage/slurmdbd in slurm.conf ({ADMINISTRATOR}, last section)"
        return Finding("accounting", WARNING, found, change)
    return Finding("accounting", OK, f"{kind}: sacct knows how jobs ended")


def check_job_record(job: Mapping[str, str]) -> list[Finding]:
    """What became of the probe's job on its way into the queue: a site may change what was asked for."""
    if job.get("Requeue") == "0":
        found = "Slurm took the job without its --requeue (Requeue=0): a job_submit plugin or a wrapper takes it away"
        return [Finding("requeue flag", PROBLEM, found, f"ask for it to be left in ({ADMINISTRATOR}, 4)")]
    return [Finding("requeue flag", OK, "the job has it (Requeue=1)")]


def check_requeue(job: Mapping[str, str], asked: Mapping[str, object] | None) -> Finding:
    """Whether the job came back to the queue when its first rank asked for that.

    Args:
        asked: what it did; None: it did not come to it.
    """
    if asked is None:
        return Finding("requeue", NOT_CHECKED, "the probe did not come so far")
    if int(job.get("Restarts") or 0) > 0:
        # Without a code it was taken out of the way before it heard of its success.
        by_rank = asked.get("scontrol") and asked.get("code") in (0, None)
        how = "its first rank's scontrol" if by_rank else "its batch script: its ranks have no scontrol that does"
        return Finding("requeue", OK, f"the job went back into the queue at its own wish (by {how})")
    said = str(asked.get("said") or "no scontrol on the node, and the batch script had no success either")
    change = (
        f"ask for the right to requeue one's own jobs ({ADMINISTRATOR}, 4). Until then, submit.py --chain N queues N "
        "jobs, of which each resumes the run"
    )
    return Finding("requeue", PROBLEM, f"the job ended instead of going back into the queue: {said}", change)
