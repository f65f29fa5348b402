"""What Slurm's commands print, parsed: one function a text. Nothing here asks anybody anything."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass


def parse_records(text: str, first: str) -> list[dict[str, str]]:
    """`scontrol show job` and the like, in either form: NAME=VALUE words; ``first`` begins a record."""
    records: list[dict[str, str]] = []
    for word in text.split():
        name, found, value = word.partition("=")
        if name == first:
            records.append({})
        if found and records:
            records[-1].setdefault(name, value)
    return records


def parse_config(text: str) -> dict[str, str]:
    """`scontrol show config`: NAME = VALUE lines; what has no value says (null)."""
    pairs = (line.split("=", 1) for line in text.splitlines() if re.match(r"\w+\s*=", line))
    return {name.strip(): "" if value.strip() == "(null)" else value.strip() for name, value in pairs}


def array_limit(config: Mapping[str, str]) -> int | None:
    """The most members that a job array may have, by `scontrol show config`; 0 where there are no arrays; None if it
    does not say. MaxArraySize is the largest index + 1; an administrator may have set fewer members than that."""
    limits = re.findall(r"\bmax_array_tasks=(\d+)", config.get("SchedulerParameters", ""))
    limits += re.findall(r"^\d+$", config.get("MaxArraySize", ""))
    return min(map(int, limits), default=None)


def seconds(text: str) -> float:
    """Slurm's durations as it shows them: 120, 30 sec, 05:00, 00:02:00, 1-00:00:00, UNLIMITED.

    Raises:
        ValueError: it is none.
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
    """(22, 5) of "22.05.8" or "slurm-wlm 22.05.8"; (0, 0) if there is no version in it."""
    match = re.search(r"(\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2])) if match else (0, 0)


@dataclass(frozen=True)
class SlurmNode:
    """A line of `sinfo -N`: a node in a partition."""

    partition: str
    name: str
    state: str
    cpus: int
    gres: str

    @property
    def works(self) -> bool:
        return not re.search(r"down|drain|fail|maint|unk|error|inval|no_respond|\*$", self.state.lower())


def parse_nodes(text: str) -> list[SlurmNode]:
    """`sinfo -a -h -N -o "%R|%N|%T|%c|%G"`."""
    rows = (line.split("|") for line in text.splitlines() if line.count("|") == 4)
    return [SlurmNode(p, name, state, int(re.sub(r"\D.*", "", cpus) or 0), gres) for p, name, state, cpus, gres in rows]


@dataclass(frozen=True)
class Qos:
    """A line of `sacctmgr -nP show qos format=Name,Preempt,PreemptMode,GraceTime`.

    preempts: names of those whose jobs give way to its.
    """

    name: str
    preempts: tuple[str, ...]
    mode: str
    grace: str


def parse_qos(text: str) -> list[Qos]:
    rows = (line.split("|") for line in text.splitlines() if line.count("|") == 3)
    return [Qos(name, tuple(filter(None, give.split(","))), mode, grace) for name, give, mode, grace in rows]


def default_qos(text: str, account: str | None) -> str:
    """The qos of a job that names none, by `sacctmgr -nP show assoc user=… format=Account,DefaultQOS,QOS`."""
    rows = [line.split("|") for line in text.splitlines() if line.count("|") == 2]
    own = [row for row in rows if account is None or row[0] == account]
    for _, default, allowed in own:
        if default or (allowed and "," not in allowed):
            return default or allowed
    return "normal"


def gpus_of(gres: str, kind: str = "") -> int:
    """GPUs of a node by its GRES, of a type if one is wanted: gpu:a100:8(S:0-1),shard:16."""
    total = 0
    for part in re.sub(r"\([^)]*\)", "", gres).split(","):
        name, *rest = part.split(":")
        if name == "gpu" and rest and rest[-1].isdigit() and (not kind or kind in rest[:-1]):
            total += int(rest[-1])
    return total
