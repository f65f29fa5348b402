"""How a cluster is set up: Slurm's configuration, partitions, nodes and qualities of service.

Each function raises SlurmError if Slurm cannot be asked.
"""

from __future__ import annotations

import getpass
from datetime import datetime

from launch.slurm.client import ANSWER_S, PATIENCE_S, SlurmError, ask
from launch.slurm.texts import (
    Qos,
    SlurmNode,
    array_limit,
    default_qos,
    parse_config,
    parse_nodes,
    parse_qos,
    parse_records,
)

_NODES = "%R|%N|%T|%c|%G"
_QOS = "Name,Preempt,PreemptMode,GraceTime"
_ASSOCIATION = "Account,DefaultQOS,QOS"


def read_config(*, patience_s: float = PATIENCE_S, answer_s: float = ANSWER_S) -> dict[str, str]:
    """`scontrol show config`."""
    return parse_config(ask("scontrol", "show", "config", patience_s=patience_s, answer_s=answer_s))


def controller_clock(*, patience_s: float = PATIENCE_S, answer_s: float = ANSWER_S) -> float:
    """Unix time, by the controller's clock, to the second."""
    said = ask("scontrol", "show", "config", patience_s=patience_s, answer_s=answer_s).partition("\n")[0]
    try:
        return datetime.fromisoformat(said.rpartition(" ")[2]).timestamp()
    except ValueError:
        raise SlurmError(f"`scontrol show config` does not begin with a time: {said!r}") from None


def max_array_members(*, patience_s: float = PATIENCE_S) -> int | None:
    """The most members that a job array may have here (``array_limit``)."""
    return array_limit(read_config(patience_s=patience_s))


def read_partitions(*, patience_s: float = PATIENCE_S, answer_s: float = ANSWER_S) -> list[dict[str, str]]:
    """A record a partition, as `scontrol show partition` names its fields."""
    text = ask("scontrol", "--all", "show", "partition", patience_s=patience_s, answer_s=answer_s)
    return parse_records(text, first="PartitionName")


def read_nodes(*, patience_s: float = PATIENCE_S, answer_s: float = ANSWER_S) -> list[SlurmNode]:
    """A node once for each of its partitions."""
    command = ("sinfo", "--all", "--noheader", "--Node", f"--format={_NODES}")
    return parse_nodes(ask(*command, patience_s=patience_s, answer_s=answer_s))


def read_qos(*, patience_s: float = PATIENCE_S, answer_s: float = ANSWER_S) -> list[Qos]:
    command = ("sacctmgr", "-nP", "show", "qos", f"format={_QOS}")
    return parse_qos(ask(*command, patience_s=patience_s, answer_s=answer_s))


def read_default_qos(account: str | None, *, patience_s: float = PATIENCE_S, answer_s: float = ANSWER_S) -> str:
    """That of this user's jobs which name none."""
    command = ("sacctmgr", "-nP", "show", "assoc", f"user={getpass.getuser()}", f"format={_ASSOCIATION}")
    return default_qos(ask(*command, patience_s=patience_s, answer_s=answer_s), account)
