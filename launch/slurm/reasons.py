"""Why a job waits in the queue: squeue's reason codes in words."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class PendingReason:
    """Why a job waits.

    why: completes "the job waits in the queue: …"; without a full stop.
    remedy: what the user can do, as a sentence without a full stop; "" if waiting is enough.
    """

    why: str
    remedy: str = ""


_SUBMIT_AGAIN = "cancel it (python launch/cancel.py {run}) and submit it again with "
_REASONS = {
    "": PendingReason("Slurm has not looked at it yet"),
    "None": PendingReason("Slurm has not looked at it yet"),
    "Priority": PendingReason("jobs of higher priority are first"),
    "Resources": PendingReason("its nodes are in use by other jobs"),
    "BeginTime": PendingReason("its earliest start time has not come"),
    "Dependency": PendingReason("another job has to end first"),
    "DependencyNeverSatisfied": PendingReason(
        "the job that it waits for has failed, so it never starts",
        "resume that run first, then cancel this one (python launch/cancel.py {run}) and submit it again",
    ),
    "JobArrayTaskLimit": PendingReason("as many runs of its sweep as allowed are running (--array-parallelism)"),
    "JobHeldUser": PendingReason("its user holds it", "scontrol release {job}"),
    "JobHeldAdmin": PendingReason("an administrator holds it", "ask the administrator to release job {job}"),
    "JobHoldMaxRequeue": PendingReason(
        "it was requeued as often as Slurm allows, and is held",
        "python launch/cancel.py {run}, then python launch/submit.py --resume {run}",
    ),
    "Licenses": PendingReason("a licence that it asks for is in use"),
    "Reservation": PendingReason("its reservation has not begun, or has no free nodes"),
    "ReservationDeleted": PendingReason("its reservation was deleted", _SUBMIT_AGAIN + "another reservation or none"),
    "ReservationInvalid": PendingReason("its reservation is invalid", _SUBMIT_AGAIN + "another reservation or none"),
    "ReqNodeNotAvail": PendingReason("nodes that it needs are down, drained or reserved"),
    "NodeDown": PendingReason("a node that it needs is down"),
    "PartitionDown": PendingReason("its partition is down"),
    "PartitionInactive": PendingReason("its partition starts no jobs now"),
    "PartitionNodeLimit": PendingReason(
        "it asks for more nodes than its partition allows or has working",
        _SUBMIT_AGAIN + "fewer --nodes or another --partition",
    ),
    "PartitionTimeLimit": PendingReason(
        "--time is longer than its partition allows",
        _SUBMIT_AGAIN + "a shorter --time (a run continues over any number of starts)",
    ),
    "PartitionConfig": PendingReason(
        "its partition does not allow what it asks for", _SUBMIT_AGAIN + "another --partition or a smaller request"
    ),
    "BadConstraints": PendingReason(
        "no node has what it asks for, so it never starts",
        _SUBMIT_AGAIN + "a smaller request (`sinfo -N -o '%N %c %m %G %f'` shows what the nodes have)",
    ),
    "Constraints": PendingReason("no node has what it asks for at the moment"),
    "MaxMemPerLimit": PendingReason(
        "it asks for more memory than a node may give", _SUBMIT_AGAIN + "a smaller --memory"
    ),
    "InvalidAccount": PendingReason("Slurm does not know its account", _SUBMIT_AGAIN + "another --account"),
    "InvalidQOS": PendingReason("Slurm does not know its QOS", _SUBMIT_AGAIN + "another --qos"),
    "AccountNotAllowed": PendingReason(
        "its account may not use the partition", _SUBMIT_AGAIN + "another --account or --partition"
    ),
    "QOSNotAllowed": PendingReason(
        "its QOS may not be used in the partition", _SUBMIT_AGAIN + "another --qos or --partition"
    ),
    "QOSUsageThreshold": PendingReason("its QOS has used more than its share for now"),
    "AccountingPolicy": PendingReason("a limit of its account or QOS is reached"),
    "Cleaning": PendingReason("Slurm still ends its previous start"),
    "Prolog": PendingReason("Slurm prepares its nodes"),
    "BurstBufferResources": PendingReason("the burst buffer is full"),
    "BurstBufferStageIn": PendingReason("files are being copied to the burst buffer"),
    "SchedDefer": PendingReason("Slurm has put off scheduling it"),
    "FedJobLock": PendingReason("the clusters of the federation agree on where it runs"),
    "PowerNotAvail": PendingReason("the power limit of the cluster is reached"),
    "PowerReserved": PendingReason("power is reserved for another job"),
    "DeadLine": PendingReason("it cannot end before its deadline", _SUBMIT_AGAIN + "a shorter --time"),
    "JobLaunchFailure": PendingReason(
        "its last start failed before its first process ran, and Slurm holds it", "scontrol release {job}"
    ),
    # Texts that Slurm shows in place of a code, by how they begin.
    "Nodes required for job are": PendingReason("its nodes are down, drained or reserved for jobs of higher priority"),
    "launch failure limit exceeded": PendingReason(
        "it was requeued as often as Slurm allows, and is held",
        "python launch/cancel.py {run}, then python launch/submit.py --resume {run}",
    ),
    "launch failed": PendingReason(
        "its last start failed before its first process ran, and Slurm holds it", "scontrol release {job}"
    ),
    "job requeued in held state": PendingReason(
        "Slurm or an administrator has put it on hold", "scontrol release {job}"
    ),
}
_WHAT = {
    "Cpu": "CPUs",
    "CPU": "CPUs",
    "GRES": "GPUs",
    "Mem": "memory",
    "Memory": "memory",
    "Node": "nodes",
    "Job": "jobs",
    "Jobs": "jobs",
    "Wall": "run time",
    "WallDuration": "run time",
    "Time": "run time",
    "Billing": "billing units",
    "License": "licences",
    "Energy": "energy",
    "BB": "burst buffer",
    "Resource": "resources",
    "Unknown": "a resource",
}
_LIMIT = re.compile(
    r"(?P<whose>Association|Assoc|QOS|)(?P<kind>Grp|Max|Min|)(?:Submit)?"
    rf"(?P<what>{'|'.join(sorted(_WHAT, key=len, reverse=True))})"
    r"(?P<minutes>(?:Run)?Minutes|)(?:Per(?P<per>Job|Node|User|Account))?(?:Limit|NotSatisfied|)"
)


def explain(reason: str, *, job: str = "JOB", run: str = "RUN") -> PendingReason:
    """A pending reason of squeue in words; an unknown one is quoted.

    Args:
        reason: as squeue or `scontrol show job` prints it, such as "ReqNodeNotAvail, UnavailableNodes:n[1-2]".
        job, run: the job's id and the run folder, for the commands in the remedy.
    """
    text = " ".join(reason.replace("_", " ").strip("() ").split())
    code, _, detail = text.partition(",")
    found = _REASONS.get(code) or next(
        (r for head, r in _REASONS.items() if " " in head and text.startswith(head)), None
    )
    if found is None and (limit := _LIMIT.fullmatch(code)) and (limit["whose"] or limit["per"]):
        found = _of_limit(limit)
    if found is None and text.endswith("requeued held"):
        found = PendingReason(f"Slurm holds it ({text})", "scontrol release {job}")
    if found is None:
        return PendingReason(f"Slurm gives the reason {text}")
    why = found.why
    if code == "ReqNodeNotAvail" and detail:
        why = _unavailable(detail.strip())
    return PendingReason(why, found.remedy.format(job=job, run=run))


def _unavailable(detail: str) -> str:
    if detail == "Reserved for maintenance":
        return "nodes that it needs are reserved for maintenance"
    if detail == "May be reserved for other job":
        return "nodes that it needs may be reserved for another job"
    if nodes := detail.removeprefix("UnavailableNodes:").strip():
        return f"nodes that it needs are down, drained or reserved: {nodes}"
    return _REASONS["ReqNodeNotAvail"].why


def _of_limit(limit: re.Match[str]) -> PendingReason:
    """The reason of a limit of an account or QOS, such as QOSMaxGRESPerUser or AssocGrpCPUMinutesLimit."""
    what = _WHAT[limit["what"]]
    owner = "its account" if limit["whose"].startswith("Assoc") else "its QOS"
    if limit["minutes"]:
        what = f"{'GPU' if what == 'GPUs' else 'CPU' if what == 'CPUs' else what} minutes"
    if limit["kind"] == "Min":
        return PendingReason(f"it asks for fewer {what} than {owner} demands", _SUBMIT_AGAIN + "more, or another --qos")
    if limit["per"] in ("Job", "Node") or (limit["kind"] == "Max" and what == "run time"):
        each = "a node" if limit["per"] == "Node" else "a job"
        return PendingReason(
            f"it asks for more {what} than {owner} allows {each}", _SUBMIT_AGAIN + "less, or another --account or --qos"
        )
    if limit["minutes"] == "Minutes":
        return PendingReason(
            f"the {what} of {owner} are used up",
            "ask the administrator when they are renewed, or use another --account",
        )
    of_user = limit["per"] == "User" or (limit["whose"] == "Assoc" and limit["kind"] == "Max")
    whose = f"your limit on {what}" if of_user else f"the limit on {what} of {owner}"
    if limit["per"] == "Account":
        whose = f"the limit on {what} of its account"
    return PendingReason(f"{whose} is reached until other jobs end")
