"""A drill, and the environment in which drills are done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.drills.cluster import DevCluster
from launch.drills.handle import Poll, RunHandle

STEPS = 120
"""Of a run: 4 epochs of 480 images, 16 per step."""
RECIPE = (
    *("--epochs", "4", "--batch-size", "16", "--lanes", "16", "--warmup-steps", "2", "--lr", "1e-3"),
    *("--checkpoint-steps", "20", "--keep-checkpoints", "999", "--log-steps", "1"),
    "--eval-sets",  # none: those of the cluster file are not among the drills' data
)
"""Flags of submit.py."""


@dataclass(frozen=True)
class DrillEnvironment:
    """Where drills are done."""

    folder: Path
    """For runs, table and chart."""
    flags: tuple[str, ...]
    """Flags of submit.py for every run."""
    nodes: int
    """Nodes of a run."""
    cluster: DevCluster | None
    """The cluster, if it is slurm/cluster.py's."""
    preempt_with: Sequence[str]
    """sbatch arguments of a job that preempts the runs; empty if the user may not preempt."""
    pace_s: float
    """Seconds that a run waits at each step."""
    patience_s: float
    """Seconds after which a wait fails."""

    def handle(self, drill: Drill) -> RunHandle:
        pace_s = self.pace_s if drill.lasts_s is None else drill.lasts_s / STEPS
        flags = (*self.flags, *drill.flags)
        return RunHandle(self.folder / drill.name, flags, pace_s=pace_s, patience_s=self.patience_s)

    def lacks(self, drill: Drill) -> str | None:
        """What is missing for a drill; None if it can be done here."""
        if drill.nodes > self.nodes:
            return f"needs --nodes {drill.nodes}"
        if drill.needs == "preempt" and not self.preempt_with:
            return "needs --preempt-with"
        return "needs the cluster of slurm/cluster.py" if drill.needs == "cluster" and self.cluster is None else None


Scenario = Callable[[RunHandle, DrillEnvironment], Poll]
"""Submits the run, injects the fault, and waits for the end."""


@dataclass(frozen=True)
class Drill:
    """A way to interrupt a run."""

    name: str
    """Also the name of the run folder."""
    what: str
    """A description of the fault."""
    scenario: Scenario
    ends: str = ""
    """A pattern of what attempts.jsonl records as the ends of all starts but the last, joined by "; "."""
    needs: str = ""
    """A right that not every user has: "preempt" (submit a job that preempts), "cluster" (administer the cluster)."""
    nodes: int = 1
    """The least number of nodes."""
    flags: tuple[str, ...] = ()
    """Flags of submit.py."""
    lasts_s: float | None = None
    """Seconds that the run trains if undisturbed; replaces --pace."""
    same_ranks: bool = True
    """The run always has the same number of ranks. Otherwise the weights differ by rounding: sums are taken in another
    order."""
    alone: bool = False
    """No other drill may run at the same time."""
    trains: bool = True
    """The result is a training run, to be compared with the undisturbed one. Otherwise the scenario compares."""
