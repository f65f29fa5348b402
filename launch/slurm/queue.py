"""What Slurm knows of jobs: those that are queued or run, and how others ended.

"Slurm cannot be asked" is an exception (``SlurmUnavailable``), never an empty answer: whoever took it for "there is no
job" would submit a second one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from launch.slurm.client import ANSWER_S, PATIENCE_S, SlurmError, SlurmUnavailable, ask
from launch.slurm.states import is_over


@dataclass(frozen=True)
class SlurmJob:
    """A job in the queue, as squeue shows it.

    id: 12, or 12_3 for a member of an array.
    start: when it began, or may begin.
    restarts: how many times it was requeued.
    """

    id: str
    state: str
    start: str
    eligible: str
    restarts: int
    reason: str
    nodes: str


@dataclass(frozen=True)
class SacctRecord:
    """One start of a job, as sacct shows it. A requeue begins another one."""

    job: str
    state: str
    start: str
    end: str


_FIELDS = ("JobArrayID", "State", "StartTime", "EligibleTime", "RestartCnt", "Reason", "NodeList")


def queue(jobs: Sequence[str], *, patience_s: float = PATIENCE_S, answer_s: float = ANSWER_S) -> dict[str, SlurmJob]:
    """Those of the jobs that are not over, by id; of an array (12), each of its members (12_0, 12_1, …).

    Raises:
        SlurmError: Slurm cannot be asked (SlurmUnavailable), or squeue failed.
    """
    return _squeue(f"--jobs={','.join(jobs)}", patience_s=patience_s, answer_s=answer_s) if jobs else {}


def queue_of_name(name: str, *, patience_s: float = PATIENCE_S) -> dict[str, SlurmJob]:
    """The same for the caller's own jobs of a name (--job-name).

    Raises:
        SlurmError: as ``queue``.
    """
    return _squeue(f"--user={os.getuid()}", f"--name={name}", patience_s=patience_s, answer_s=ANSWER_S)


def _squeue(*which: str, patience_s: float, answer_s: float) -> dict[str, SlurmJob]:
    shown = ",".join(f"{field}:|" for field in _FIELDS)
    # All states, because the default leaves some jobs out that are alive; those that are over are dropped below.
    command = ("squeue", "--noheader", "--array", "--states=all", *which, "--Format", shown)
    try:
        text = ask(*command, patience_s=patience_s, answer_s=answer_s)
    except SlurmUnavailable:
        raise
    except SlurmError as error:
        if "Invalid job id" in str(error):  # all of them ended a while ago
            return {}
        raise
    rows = [line.split("|")[: len(_FIELDS)] for line in text.splitlines() if line.count("|") >= len(_FIELDS)]
    return {
        id: SlurmJob(id, state, start, eligible, int(restarts or 0), reason, nodes)
        for id, state, start, eligible, restarts, reason, nodes in rows
        if not is_over(state)
    }


def history(
    jobs: Sequence[str], *, patience_s: float = PATIENCE_S, answer_s: float = ANSWER_S
) -> tuple[SacctRecord, ...]:
    """All starts of the jobs, in order.

    Raises:
        SlurmError: there is no accounting, or it cannot be asked.
    """
    if not jobs:
        return ()
    command = ("sacct", "-X", "-n", "-P", "-D", "-j", ",".join(jobs), "-o", "JobID,State,Start,End")
    text = ask(*command, patience_s=patience_s, answer_s=answer_s)
    return tuple(SacctRecord(*line.split("|")) for line in text.splitlines() if line.count("|") == 3)


def host_names(node_list: str, *, patience_s: float = PATIENCE_S) -> list[str]:
    """["n1", "n2"] of "n[1-2]"."""
    return ask("scontrol", "show", "hostnames", node_list, patience_s=patience_s).split() if node_list else []
