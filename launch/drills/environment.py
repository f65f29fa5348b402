"""What a drill is, and where drills are done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.drills.cluster import DevCluster
from launch.drills.handle import Poll, RunHandle

STEPS = 120
"""Of a run: 4 epochs of 480 images, 16 a step."""
RECIPE = (
    *("--epochs", "4", "--batch-size", "16", "--lanes", "16", "--warmup-steps", "2", "--lr", "1e-3"),
    *("--checkpoint-steps", "20", "--keep-checkpoints", "999", "--log-steps", "1"),
)
"""Flags of submit.py."""


@dataclass(frozen=True)
class Drill:
    """A way to interrupt a run.

    name: of the drill, and of its run folder.
    what: the fault, in words.
    scenario: submits the run, injects the fault, waits for the end.
    ends: a pattern of what attempts.jsonl says of why the starts ended, all but the last, joined by "; ".
    needs: what not every user has: "preempt" (a job that preempts), "cluster" (to administer the cluster), or "".
    nodes: at least so many.
    flags: of submit.py.
    lasts_s: seconds that the run is to train undisturbed, in place of what --pace says.
    same_ranks: whether it trains on the same number of ranks throughout; otherwise sums are taken in another order, and
        the weights differ in rounding.
    alone: nothing else may run meanwhile.
    trains: whether what it leaves is a training run, to be compared with the undisturbed one; otherwise the scenario
        makes the comparison.
    """

    name: str
    what: str
    scenario: Callable[[RunHandle, DrillEnvironment], Poll]
    ends: str = ""
    needs: str = ""
    nodes: int = 1
    flags: tuple[str, ...] = ()
    lasts_s: float | None = None
    same_ranks: bool = True
    alone: bool = False
    trains: bool = True


@dataclass(frozen=True)
class DrillEnvironment:
    """Where drills are done.

    folder: for runs, table and picture.
    flags: of submit.py, for every run.
    nodes: of a run.
    cluster: the cluster, if it is slurm/cluster.py's.
    preempt_with: arguments of sbatch for a job that preempts the runs; empty if the user has no such right.
    pace_s: seconds that a run waits at each step.
    patience_s: seconds that anything may take that is waited for.
    """

    folder: Path
    flags: tuple[str, ...]
    nodes: int
    cluster: DevCluster | None
    preempt_with: Sequence[str]
    pace_s: float
    patience_s: float

    def handle(self, drill: Drill) -> RunHandle:
        pace_s = self.pace_s if drill.lasts_s is None else drill.lasts_s / STEPS
        flags = (*self.flags, *drill.flags)
        return RunHandle(self.folder / drill.name, flags, pace_s=pace_s, patience_s=self.patience_s)

    def lacks(self, drill: Drill) -> str | None:
        """Why a drill cannot be done here; None if it can."""
        if drill.nodes > self.nodes:
            return f"needs --nodes {drill.nodes}"
        if drill.needs == "preempt" and not self.preempt_with:
            return "needs --preempt-with"
        return "needs the cluster of slurm/cluster.py" if drill.needs == "cluster" and self.cluster is None else None
