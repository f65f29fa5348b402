"""Whether a job starts again after a rank has failed, and which nodes it must not get then.

    a node was lost       as the restart policy allows (policy.py)
    a rank has died       (killed by a signal, hung, GPU error, unhealthy node) as the restart policy allows, and at
                          most ``--retries`` times within 24 hours
    a rank has raised     no: the next start would raise the same exception
    in a chain            no: the next job of the chain resumes (chain.py)

A node is excluded from the next start when two ranks of the job have died on it, or when it has failed the node check.
As with sbatch's --exclude, this holds while the job keeps its number; in a chain it holds for the later jobs.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

from cfmask.errors import UserError
from launch.restarts.of_run import restarts_of, saved_progress
from launch.slurm.client import SlurmError, show_job
from launch.slurm.queue import host_names
from launch.slurm.site import read_nodes
from launch.state.failure_reports import DEATHS, UNHEALTHY, RankFailure, RankStart

logger = logging.getLogger(__name__)

RETRIES = 3
"""The default of --retries."""
VARIABLE = "CFMASK_RETRIES"
"""Environment variable of a job that holds its --retries."""
_WINDOW_S = 24 * 3600.0
_DEATHS_OF_NODE = 2
"""So many deaths on a node exclude it."""


@dataclass(frozen=True)
class Decision:
    """What follows from the failure of a rank.

    why: the reason of the end, for attempts.jsonl.
    message: for the log, after the failure report; may be empty.
    restarts: whether the job starts again.
    excluded: nodes that it must not get then.
    died: which rank has died, and where, for attempts.jsonl.
    """

    why: str
    message: str = ""
    restarts: bool = False
    excluded: tuple[str, ...] = ()
    died: dict[str, Any] | None = None


def decide(here: RankStart, failure: RankFailure) -> Decision:
    """The decision after ``failure``, the first one of a start."""
    if failure.broken_off:
        return _after_lost_node(here, failure) if not here.local and here.nodes > 1 else Decision(failure.why)
    if failure.kind not in DEATHS or not here.run.has_work():
        return Decision(failure.why)
    died = {"rank": failure.rank, "node": failure.node, "kind": failure.kind, "time": time.time()}
    chain = restarts_of(here.run).chain
    jobs = (*chain.before, here.job) if chain else (here.job,)
    deaths = [death for job in jobs for death in here.run.deaths(job, before=here.attempt)]
    if chain:
        chain.exclude_nodes(_nodes_to_exclude(here, [*deaths, died]))
        outcome = _refusal(here)
        return Decision(f"{failure.why}; {outcome}", f"{outcome}\n", died=died)
    limit = int(os.environ.get(VARIABLE) or RETRIES)
    recent = sum(death["time"] > time.time() - _WINDOW_S for death in deaths)
    if not limit:
        return Decision(failure.why, died=died)
    refusal = _refusal(here)
    if not refusal and recent >= limit:
        refusal = f"given up: --retries allows {limit} within 24 hours"
    if refusal:
        return Decision(f"{failure.why}; {refusal}", f"The job is not started again: {refusal}\n", died=died)
    excluded = () if here.local else _nodes_to_exclude(here, [*deaths, died])
    without = f", without {', '.join(excluded)}" if excluded else ""
    again = f"starts again{without} (retry {recent + 1} of {limit})"
    return Decision(f"{failure.why}; {again}", f"The job {again}.\n", restarts=True, excluded=excluded, died=died)


def _after_lost_node(here: RankStart, failure: RankFailure) -> Decision:
    why = f"lost a rank without a report: rank {failure.rank} was cut off"
    refusal = _refusal(here)
    outcome = f"The job is not requeued: {refusal}" if refusal else "The job goes back into the queue."
    message = f"No rank has reported a failure of its own, as when a node is lost. {outcome}\n"
    return Decision(f"{why}; {refusal}" if refusal else why, message, restarts=not refusal)


def _refusal(here: RankStart) -> str | None:
    """Why the job does not start again; None if it may."""
    if cancelled := here.run.cancelled():
        return f"cancelled by {cancelled['by']}"
    restarts = restarts_of(here.run)
    try:
        restarts.check_restart(saved_progress(here.run))
        return f"job {restarts.next_job()} resumes the run" if restarts.chain else None
    except UserError as refused:  # given up, or the recipe cannot be read
        return str(refused)


def _nodes_to_exclude(here: RankStart, deaths: list[dict[str, Any]]) -> tuple[str, ...]:
    """Nodes that the job must not get again, with those that are excluded already. The worst come first, and only as
    many are added as its partition can spare."""
    counts: Counter[str] = Counter()
    for death in deaths:
        counts[death["node"]] += _DEATHS_OF_NODE if death["kind"] == UNHEALTHY else 1
    bad = [node for node, number in counts.most_common() if node and number >= _DEATHS_OF_NODE]
    if not bad or not shutil.which("scontrol"):
        return ()
    try:
        job = show_job(here.job, patience_s=5)
        excluded = set(host_names(job.get("ExcNodeList", "").removeprefix("(null)"), patience_s=5))
        nodes = read_nodes(patience_s=5)
    except SlurmError as error:
        logger.warning(f"no node is excluded: {error}")
        return ()
    usable = {node.name for node in nodes if node.works and node.partition == job.get("Partition")} - excluded
    candidates = [node for node in bad if node in usable]
    spare = max(0, len(usable) - here.nodes)
    if kept := candidates[spare:]:
        logger.warning(f"{', '.join(kept)} cannot be excluded: the partition has no other node for the job")
    return (*sorted(excluded), *candidates[:spare]) if candidates[:spare] else ()
