"""Slurm's job states, and what they mean for a caller that waits for a job.

    is_over(state)      the job has ended and does not return
    is_pending(state)   it waits in the queue, for the first time or again
    is_running(state)   it has nodes, and its processes run or may start at any moment

Slurm describes a job by a base state and flags (slurm.h: enum job_states). Its commands show a flag if one is set, else
the base state. sacct adds who cancelled a job ("CANCELLED by 1000") and truncates long names in its table
("CANCELLED+"); newer versions can list all flags ("RUNNING,COMPLETING"); squeue's %t abbreviates ("CG"). All of these
are understood.

A state that is not listed here is neither over, nor pending, nor running, and so counts as alive: a job that was taken
for ended by mistake would be submitted a second time.
"""

from __future__ import annotations

import re


def _table(text: str) -> dict[str, str]:
    """Abbreviations by state."""
    return dict(pair.split(":") for pair in text.split())


# REVOKED is a flag: a sibling cluster of the federation has started the job instead.
_ENDED = _table(
    "BOOT_FAIL:BF CANCELLED:CA COMPLETED:CD DEADLINE:DL FAILED:F NODE_FAIL:NF OUT_OF_MEMORY:OOM PREEMPTED:PR "
    "REVOKED:RV TIMEOUT:TO"
)
_WAITING = _table("PENDING:PD REQUEUED:RQ REQUEUE_FED:RF REQUEUE_HOLD:RH RESV_DEL_HOLD:RD SPECIAL_EXIT:SE")
_ALLOCATED = _table(
    "CONFIGURING:CF EXPEDITING:EX POWER_UP_NODE:PU RESIZING:RS RUNNING:R SIGNALING:SI STOPPED:ST SUSPENDED:S"
)
_LEAVING = _table("COMPLETING:CG STAGE_OUT:SO")
"""Its processes end or its files are moved. Whether it will then be over or pending is not known yet."""
_NEUTRAL = _table("LAUNCH_FAILED:LF RECONFIG_FAIL:RC UPDATE_DB:UD")
"""Flags that do not tell whether the job ends; the base state does, if it is shown beside them."""

_FULL = {short: full for group in (_ENDED, _WAITING, _ALLOCATED, _LEAVING, _NEUTRAL) for full, short in group.items()}


def base_and_flags(state: str) -> frozenset[str]:
    """The base state and flags in a state as a command shows it: {"CANCELLED"} for "CANCELLED by 1000"."""
    text = re.split(r"\s+by\s+", state.strip(), flags=re.IGNORECASE)[0].upper()
    return frozenset(_full_name(_FULL.get(name, name)) for name in re.split(r"[\s,|]+", text) if name)


def _full_name(name: str) -> str:
    """Complete a name that sacct's table has truncated: "CANCELLED+", "OUT_OF_ME+"."""
    matches = [full for full in _FULL.values() if name.endswith("+") and full.startswith(name[:-1])]
    return matches[0] if len(matches) == 1 else name


def is_over(state: str) -> bool:
    """Whether the job has ended for good."""
    found = base_and_flags(state) - _NEUTRAL.keys()
    return bool(found) and found <= _ENDED.keys()


def is_pending(state: str) -> bool:
    """Whether the job waits in the queue, or waits to be released after a requeue."""
    found = base_and_flags(state)
    return bool(found & _WAITING.keys()) and not found & _LEAVING.keys()


def is_held(state: str) -> bool:
    """Whether the job waits for somebody to release it, according to its state; a held job may also be PENDING."""
    return bool(base_and_flags(state) & {"REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"})


def is_running(state: str) -> bool:
    """Whether the job has nodes. True while they boot or its processes are suspended, false once these are ended."""
    found = base_and_flags(state)
    return bool(found & _ALLOCATED.keys()) and not found & (_LEAVING.keys() | _WAITING.keys() | _ENDED.keys())


def is_completing(state: str) -> bool:
    """Whether the job is leaving its nodes."""
    return bool(base_and_flags(state) & _LEAVING.keys())
