"""What Slurm knows about jobs: the queue, and the history of jobs that have ended.

If Slurm cannot be asked, functions raise ``SlurmUnavailable``; they never return an empty answer instead. A caller that
took it for "there is no job" would submit a second one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from launch.slurm.client import PATIENCE_S, ask, ask_about_jobs
from launch.slurm.states import is_over


@dataclass(frozen=True)
class SlurmJob:
    """A job in the queue, as squeue shows it."""

    id: str
    """12, or 12_3 for a member of an array."""
    state: str
    start: str
    """When it started, or is expected to."""
    eligible: str
    restarts: int
    """How many times it was requeued."""
    reason: str
    nodes: str


@dataclass(frozen=True)
class SacctRecord:
    """One start of a job, as sacct shows it. Each requeue adds one."""

    job: str
    state: str
    start: str
    end: str


_FIELDS = ("JobArrayID", "State", "StartTime", "EligibleTime", "RestartCnt", "Reason", "NodeList")


def queue(jobs: Sequence[str], **wait: float) -> dict[str, SlurmJob]:
    """Those of the jobs that have not ended, by id. An array (12) is replaced by its members (12_0, 12_1, …).

    Args:
        wait: ``patience_s`` and ``answer_s`` of ``ask``.

    Raises:
        SlurmUnavailable: Slurm cannot be asked.
        SlurmError: squeue failed.
    """
    return _squeue(f"--jobs={','.join(jobs)}", **wait) if jobs else {}


def queue_of_name(name: str, **wait: float) -> dict[str, SlurmJob]:
    """The user's own jobs with this name (--job-name) that have not ended, by id. Raises as ``queue``."""
    return _squeue(f"--user={os.getuid()}", f"--name={name}", **wait)


def _squeue(*which: str, **wait: float) -> dict[str, SlurmJob]:
    shown = ",".join(f"{field}:|" for field in _FIELDS)
    # By default squeue hides some jobs that are alive, so ask for all states and drop ended jobs here.
    text = ask_about_jobs("squeue", "--noheader", "--array", "--states=all", *which, "--Format", shown, **wait)
    rows = [line.split("|")[: len(_FIELDS)] for line in text.splitlines() if line.count("|") >= len(_FIELDS)]
    return {
        id: SlurmJob(id, state, start, eligible, int(restarts or 0), reason, nodes)
        for id, state, start, eligible, restarts, reason, nodes in rows
        if not is_over(state)
    }


def history(jobs: Sequence[str], **wait: float) -> tuple[SacctRecord, ...]:
    """All starts of the jobs, in order.

    Args:
        wait: ``patience_s`` and ``answer_s`` of ``ask``.

    Raises:
        SlurmError: There is no accounting, or it cannot be asked.
    """
    if not jobs:
        return ()
    text = ask("sacct", "-X", "-n", "-P", "-D", "-j", ",".join(jobs), "-o", "JobID,State,Start,End", **wait)
    return tuple(SacctRecord(*line.split("|")) for line in text.splitlines() if line.count("|") == 3)


def known_jobs(jobs: Sequence[str], **wait: float) -> set[str]:
    """Those of the jobs and arrays that Slurm's controller knows: it forgets them some minutes after their end. Raises
    as ``queue``."""
    if not jobs:
        return set()
    text = ask_about_jobs("squeue", "--noheader", "--states=all", f"--jobs={','.join(jobs)}", "--format=%F", **wait)
    return set(text.split()) & set(jobs)


def host_names(node_list: str, *, patience_s: float = PATIENCE_S) -> list[str]:
    """The nodes of a Slurm node list: ["n1", "n2"] for "n[1-2]"."""
    return ask("scontrol", "show", "hostnames", node_list, patience_s=patience_s).split() if node_list else []
