"""Parsers for the output of Slurm's commands. They run nothing themselves."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass


def parse_records(text: str, first: str) -> list[dict[str, str]]:
    """NAME=VALUE records, as `scontrol show job` prints them, on one line or several.

    Args:
        first: The field that begins a record.
    """
    records: list[dict[str, str]] = []
    for word in text.split():
        name, found, value = word.partition("=")
        if name == first:
            records.append({})
        if found and records:
            records[-1].setdefault(name, value)
    return records


def parse_config(text: str) -> dict[str, str]:
    """The NAME = VALUE lines of `scontrol show config`; (null) becomes ""."""
    pairs = (line.split("=", 1) for line in text.splitlines() if re.match(r"\w+\s*=", line))
    return {name.strip(): "" if value.strip() == "(null)" else value.strip() for name, value in pairs}


def array_limit(config: Mapping[str, str]) -> int | None:
    """The largest number of members of a job array; 0 if arrays are disabled, None if the configuration does not say.
    MaxArraySize is the largest index + 1; max_array_tasks may be lower."""
    limits = re.findall(r"\bmax_array_tasks=(\d+)", config.get("SchedulerParameters", ""))
    limits += re.findall(r"^\d+$", config.get("MaxArraySize", ""))
    return min(map(int, limits), default=None)


def seconds(text: str) -> float:
    """Slurm's durations as it shows them: 120, 30 sec, 05:00, 00:02:00, 1-00:00:00, UNLIMITED.

    Raises:
        ValueError: The text is not a duration.
    """
    text = text.strip()
    if text.upper() in ("UNLIMITED", "INFINITE", "NONE"):
        return math.inf
    match = re.fullmatch(r"(?:(\d+)-)?((?:\d+:){0,2}\d+)(?: sec)?", text)
    if not match:
        raise ValueError(f"{text!r} is not a duration")
    total = 0
    for part in match[2].split(":"):
        total = total * 60 + int(part)
    if match[1] and (colons := match[2].count(":")) < 2:  # D-H, D-H:M
        total *= 3600 if colons == 0 else 60
    return int(match[1] or 0) * 86400 + total


def version_of(text: str) -> tuple[int, int]:
    """(22, 5) for "22.05.8" or "slurm-wlm 22.05.8"; (0, 0) for a text without a version."""
    match = re.search(r"(\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def _rows(text: str, columns: int) -> list[list[str]]:
    return [row for line in text.splitlines() if len(row := line.split("|")) == columns]


@dataclass(frozen=True)
class SlurmNode:
    """A node in a partition: a line of `sinfo -N`."""

    partition: str
    name: str
    state: str
    cpus: int
    gres: str
    memory_mb: int = 0
    """0 if it is unknown."""

    @property
    def works(self) -> bool:
        return not re.search(r"down|drain|fail|maint|unk|error|inval|no_respond|\*$", self.state.lower())


def parse_nodes(text: str) -> list[SlurmNode]:
    """Output of `sinfo -a -h -N -o "%R|%N|%T|%c|%G|%m"`."""
    return [
        SlurmNode(partition, name, state, _leading_number(cpus), gres, _leading_number(memory))
        for partition, name, state, cpus, gres, memory in _rows(text, 6)
    ]


def _leading_number(text: str) -> int:
    return int(re.sub(r"\D.*", "", text) or 0)


def megabytes(text: str) -> int | None:
    """A size as sbatch's --mem takes it: 4096, 480G, 1TB; None for another text."""
    match = re.fullmatch(r"(\d+)([KMGT]?)B?", text, re.IGNORECASE)
    return int(match[1]) * 1024 ** "KMGT".index(match[2].upper() or "M") // 1024 if match else None


@dataclass(frozen=True)
class Qos:
    """A quality of service: a line of `sacctmgr -nP show qos format=Name,Preempt,PreemptMode,GraceTime`."""

    name: str
    preempts: tuple[str, ...]
    """Names of the qualities of service whose jobs its jobs may preempt."""
    mode: str
    grace: str


def parse_qos(text: str) -> list[Qos]:
    """Output of sacctmgr as ``Qos`` says."""
    return [
        Qos(name, tuple(filter(None, preempts.split(","))), mode, grace)
        for name, preempts, mode, grace in _rows(text, 4)
    ]


def default_qos(text: str, account: str | None) -> str:
    """The quality of service of a job that does not name one.

    Args:
        text: Output of `sacctmgr -nP show assoc user=… format=Account,DefaultQOS,QOS`.
    """
    for name, default, allowed in _rows(text, 3):
        if account in (None, name) and (default or (allowed and "," not in allowed)):
            return default or allowed
    return "normal"


def gpus_of(gres: str, kind: str = "") -> int:
    """The number of GPUs in a node's GRES, such as gpu:a100:8(S:0-1),shard:16.

    Args:
        kind: Count GPUs of this type only.
    """
    total = 0
    for part in re.sub(r"\([^)]*\)", "", gres).split(","):
        name, *rest = part.split(":")
        if name == "gpu" and rest and rest[-1].isdigit() and (not kind or kind in rest[:-1]):
            total += int(rest[-1])
    return total
