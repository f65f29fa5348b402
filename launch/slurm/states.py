"""Slurm's job states, and what they mean for whoever waits for a job.

    is_over(state)      it has ended and does not come back
    is_pending(state)   it waits in the queue, for the first time or again
    is_running(state)   it has nodes, and its processes run or may be run at any moment

Slurm describes a job by a base state and flags (slurm.h: enum job_states), and its commands show one word for both: a
flag where one is set, else the base state. sacct adds who cancelled a job ("CANCELLED by 1000"), cuts long words in its
table ("CANCELLED+"), and newer versions can list all ("RUNNING,COMPLETING"); squeue's %t abbreviates ("CG"). All of
these are understood.

A state that is not listed here counts as alive: it is neither over, nor pending, nor running. A job that was taken for
ended by mistake would be submitted a second time.
"""

from __future__ import annotations

import re

_ENDED = {
    "BOOT_FAIL": "BF",
    "CANCELLED": "CA",
    "COMPLETED": "CD",
    "DEADLINE": "DL",
    "FAILED": "F",
    "NODE_FAIL": "NF",
    "OUT_OF_MEMORY": "OOM",
    "PREEMPTED": "PR",
    "REVOKED": "RV",  # a flag: a sibling cluster of the federation has started the job instead
    "TIMEOUT": "TO",
}
_WAITING = {
    "PENDING": "PD",
    "REQUEUED": "RQ",
    "REQUEUE_FED": "RF",
    "REQUEUE_HOLD": "RH",
    "RESV_DEL_HOLD": "RD",
    "SPECIAL_EXIT": "SE",
}
_ALLOCATED = {
    "CONFIGURING": "CF",
    "EXPEDITING": "EX",
    "POWER_UP_NODE": "PU",
    "RESIZING": "RS",
    "RUNNING": "R",
    "SIGNALING": "SI",
    "STOPPED": "ST",
    "SUSPENDED": "S",
}
_LEAVING = {"COMPLETING": "CG", "STAGE_OUT": "SO"}
"""Its processes end, or its files are being moved. What it will be then, over or pending, is not known yet."""
_NEUTRAL = {"LAUNCH_FAILED": "LF", "RECONFIG_FAIL": "RC", "UPDATE_DB": "UD"}
"""Flags that say nothing about whether the job ends: the base state does, where it is shown beside them."""

_FULL = {short: full for group in (_ENDED, _WAITING, _ALLOCATED, _LEAVING, _NEUTRAL) for full, short in group.items()}


def words(state: str) -> frozenset[str]:
    """The base state and flags in what a command shows: {"CANCELLED"} of "CANCELLED by 1000"."""
    text = re.split(r"\s+by\s+", state.strip(), flags=re.IGNORECASE)[0].upper()
    found = {_FULL.get(word, word) for word in re.split(r"[\s,|]+", text) if word}
    return frozenset(_completed(word) for word in found)


def _completed(word: str) -> str:
    """A word that sacct's table has cut: "CANCELLED+", "OUT_OF_ME+"."""
    if not word.endswith("+"):
        return word
    fits = [full for full in _FULL.values() if full.startswith(word[:-1])]
    return fits[0] if len(fits) == 1 else word


def is_over(state: str) -> bool:
    found = words(state) - _NEUTRAL.keys()
    return bool(found) and found <= _ENDED.keys()


def is_pending(state: str) -> bool:
    """True also of a job that waits to be released after a requeue."""
    found = words(state)
    return bool(found & _WAITING.keys()) and not found & _LEAVING.keys()


def is_running(state: str) -> bool:
    """True also while its nodes boot, or its processes are suspended; not any more when they are being ended."""
    found = words(state)
    return bool(found & _ALLOCATED.keys()) and not found & (_LEAVING.keys() | _WAITING.keys() | _ENDED.keys())


def is_completing(state: str) -> bool:
    return bool(words(state) & _LEAVING.keys())
