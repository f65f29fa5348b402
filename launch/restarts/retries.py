"""Whether a job is started again after a rank has failed, and which nodes it must not get then.

    a node was lost       the restart policy alone decides (restarts.py)
    a rank has died       killed by a signal, hung, an error of its GPU, or its node failed the check: ``--retries``
                          within 24 hours, and the restart policy
    a rank has raised     no: the next start would raise it again
    in a chain            no: the next job of the chain resumes (chain.py)

A node on which two ranks of a job have died is left out at its next start, one that failed the check at once. They stay
with the job, for as long as it keeps its number, as sbatch's --exclude does; in a chain, with the jobs behind it.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
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
_WINDOW_S = 24 * 3600.0
_DEATHS_OF_NODE = 2


@dataclass(frozen=True)
class Decision:
    """why: for attempts.jsonl. said: for the log, beside the failure report; "" where nothing is to be said. leave_out:
    nodes. died: the death, for attempts.jsonl."""

    why: str
    said: str = ""
    restarts: bool = False
    leave_out: tuple[str, ...] = ()
    died: dict[str, Any] | None = None


def decide(here: RankStart, failure: RankFailure) -> Decision:
    """What becomes of a job whose rank has failed first."""
    if failure.broken_off:
        return _lost(here, failure) if not here.local and here.nodes > 1 else Decision(failure.why)
    if failure.kind not in DEATHS or not here.run.has_work():
        return Decision(failure.why)
    died = {"rank": failure.rank, "node": failure.node, "kind": failure.kind, "time": time.time()}
    chain = restarts_of(here.run).chain
    jobs = (*chain.before, here.job) if chain else (here.job,)
    earlier = [death for job in jobs for death in here.run.deaths(job, before=here.attempt)]
    if chain:
        chain.leave_out(_left_out(here, [*earlier, died]))
        next_one = _refusal(here)
        return Decision(f"{failure.why}; {next_one}", f"{next_one}\n", died=died)
    limit = int(os.environ.get(VARIABLE) or RETRIES)
    recent = sum(death["time"] > time.time() - _WINDOW_S for death in earlier)
    if not limit:
        return Decision(failure.why, died=died)
    refusal = _refusal(here)
    if not refusal and recent >= limit:
        refusal = f"given up: --retries allows {limit} within 24 hours"
    if refusal:
        return Decision(f"{failure.why}; {refusal}", f"The job is not started again: {refusal}\n", died=died)
    out = () if here.local else _left_out(here, [*earlier, died])
    without = f", without {', '.join(out)}" if out else ""
    again = f"starts again{without} (retry {recent + 1} of {limit})"
    return Decision(f"{failure.why}; {again}", f"The job {again}.\n", restarts=True, leave_out=out, died=died)


def _lost(here: RankStart, failure: RankFailure) -> Decision:
    why = f"lost a rank without a report: rank {failure.rank} was cut off"
    refusal = _refusal(here)
    what_next = f"The job is not requeued: {refusal}" if refusal else "The job goes back into the queue."
    said = f"No rank has said why, as when a node is lost. {what_next}\n"
    return Decision(f"{why}; {refusal}" if refusal else why, said, restarts=not refusal)


def _refusal(here: RankStart) -> str | None:
    """Why the job is not to come back; None if it is."""
    if cancelled := here.run.cancelled():
        return f"cancelled by {cancelled['by']}"
    restarts = restarts_of(here.run)
    try:
        restarts.check_restart(saved_progress(here.run))
        return f"job {restarts.next_job()} resumes the run" if restarts.chain else None
    except UserError as refused:  # given up; or the recipe cannot be read
        return str(refused)


def _left_out(here: RankStart, deaths: list[dict[str, Any]]) -> tuple[str, ...]:
    """Nodes that the job is not to get again, the worst first; only as many as its partition can spare."""
    found: dict[str, int] = {}
    for death in deaths:
        if death["node"]:
            found[death["node"]] = found.get(death["node"], 0) + (_DEATHS_OF_NODE if death["kind"] == UNHEALTHY else 1)
    bad = sorted((node for node, number in found.items() if number >= _DEATHS_OF_NODE), key=lambda node: -found[node])
    if not bad or not shutil.which("scontrol"):
        return ()
    try:
        job = show_job(here.job, patience_s=5)
        excluded = set(host_names(job.get("ExcNodeList", "").removeprefix("(null)"), patience_s=5))
        nodes = read_nodes(patience_s=5)
    except SlurmError as error:
        logger.info(f"No node is left out: {error}")
        return ()
    there = {node.name for node in nodes if node.works and node.partition == job.get("Partition")} - excluded
    spare = len(there) - here.nodes
    out = [node for node in bad if node in there][: max(0, spare)]
    if left := [node for node in bad if node in there and node not in out]:
        logger.info(f"{', '.join(left)} cannot be left out: the partition has no other node for the job")
    return (*sorted(excluded), *out) if out else ()
