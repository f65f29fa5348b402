"""The configuration of the cluster: slurm.conf, partitions, nodes, and qualities of service.

The functions take the keywords ``patience_s`` and ``answer_s`` of ``ask``. They raise SlurmError if Slurm cannot be
asked.
"""

from __future__ import annotations

import getpass
from datetime import datetime

from launch.slurm import texts
from launch.slurm.client import SlurmError, ask


def read_config(**wait: float) -> dict[str, str]:
    """`scontrol show config`."""
    return texts.parse_config(ask("scontrol", "show", "config", **wait))


def controller_clock(**wait: float) -> float:
    """Unix time by the controller's clock, to the second."""
    first = ask("scontrol", "show", "config", **wait).partition("\n")[0]
    try:
        return datetime.fromisoformat(first.rpartition(" ")[2]).timestamp()
    except ValueError:
        raise SlurmError(f"`scontrol show config` does not begin with a time: {first!r}") from None


def max_array_members(**wait: float) -> int | None:
    """The largest number of members that a job array may have here (``array_limit``)."""
    return texts.array_limit(read_config(**wait))


def read_partitions(**wait: float) -> list[dict[str, str]]:
    """One record for each partition, with the field names of `scontrol show partition`."""
    return texts.parse_records(ask("scontrol", "--all", "show", "partition", **wait), first="PartitionName")


def read_nodes(**wait: float) -> list[texts.SlurmNode]:
    """The nodes; one in several partitions appears once for each."""
    return texts.parse_nodes(ask("sinfo", "--all", "--noheader", "--Node", "--format=%R|%N|%T|%c|%G|%m", **wait))


def read_qos(**wait: float) -> list[texts.Qos]:
    """The qualities of service."""
    return texts.parse_qos(ask("sacctmgr", "-nP", "show", "qos", "format=Name,Preempt,PreemptMode,GraceTime", **wait))


def hides_jobs(**wait: float) -> bool:
    """Whether users are not shown jobs of others."""
    return "jobs" in read_config(**wait).get("PrivateData", "")


def qos_may_exceed_partitions(**wait: float) -> bool:
    """Whether some quality of service lifts limits of partitions (its flags PartitionTimeLimit, PartitionMaxNodes).
    Without accounting there is none."""
    try:
        flags = ask("sacctmgr", "-nP", "show", "qos", "format=Flags", **wait)
    except SlurmError:
        return False
    return "PartitionTimeLimit" in flags or "PartitionMaxNodes" in flags


def read_default_qos(account: str | None, **wait: float) -> str:
    """The quality of service of this user's jobs that do not name one."""
    columns = "format=Account,DefaultQOS,QOS"
    text = ask("sacctmgr", "-nP", "show", "assoc", f"user={getpass.getuser()}", columns, **wait)
    return texts.default_qos(text, account)
