"""The state of a plan: which of its jobs are done, queued or missing; and its display."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from cfmask.evaluation_spec import Evaluation, UniformSoup, WiseFT, ZeroShot, is_of_other_models
from cfmask.recipe import Recipe
from cfmask.runtime.jsonl import read_object
from cfmask.runtime.times import duration
from launch.paper.plan import DONE, MISSING, QUEUED, WAITING, PlanNode, ReproductionPlan, still_needed
from launch.paper.reproduction import Reproduction
from launch.slurm.queue import SlurmJob
from launch.state.facts import RunState, SlurmAnswers, jobs_in_queue, look_at
from launch.state.status import ENDED, Status, status_of

_POLL_S = 10


@dataclass(frozen=True)
class NodeStatus:
    """The status of a node of the plan."""

    state: str
    """DONE, QUEUED, WAITING or MISSING of ``plan``."""
    status: Status
    """What launch/status.py shows of its run."""
    jobs: tuple[SlurmJob, ...] = ()
    """Its jobs in Slurm's queue; a chain has several, and its last job succeeds once the results exist."""

    @property
    def job(self) -> SlurmJob | None:
        """The job that runs, or that will start first."""
        return next(iter(self.jobs), None)


def read_statuses(reproduction: Reproduction) -> dict[str, NodeStatus]:
    """The status of each node by name, with one call of squeue."""
    return statuses_of(reproduction, *look_at([reproduction.folder(name) for name in reproduction.plan.nodes]))


def statuses_of(reproduction: Reproduction, found: Sequence[RunState], slurm: SlurmAnswers) -> dict[str, NodeStatus]:
    """The status of each node by name.

    Args:
        found: of the nodes, in order.
    """
    statuses: dict[str, NodeStatus] = {}
    for name, run_state in zip(reproduction.plan.nodes, found, strict=True):
        status, jobs = status_of(run_state, slurm), tuple(jobs_in_queue(run_state, slurm))
        blind = reproduction.allocation.on_slurm and slurm.queue is None
        known = run_state.jobs.slurm or run_state.jobs.unconfirmed
        if blind and known and status.state in ENDED and not run_state.finished:
            status = replace(status, state="unknown")  # Slurm may have requeued a job that ended by its folder
        statuses[name] = NodeStatus(node_state(status, next(iter(jobs), None)), status, jobs)
        if statuses[name].state == DONE and is_of_other_models(read_object(run_state.run.results) or {}):
            statuses[name] = NodeStatus(MISSING, status)
    return statuses


def states_of(statuses: Mapping[str, NodeStatus]) -> dict[str, str]:
    """The states of the nodes by name, as ``plan`` takes them."""
    return {name: each.state for name, each in statuses.items()}


def node_state(status: Status, job: SlurmJob | None) -> str:
    """The state in the plan of a run with this status. A job that waits for a failed one will never start, so its node
    counts as missing although Slurm may take a while to remove the job."""
    if status.state == "finished":
        return DONE
    if status.state in ENDED:
        return MISSING
    if job is not None and status.state == "queued" and job.reason.startswith("Dependency"):
        return MISSING if job.reason == "DependencyNeverSatisfied" else WAITING
    return QUEUED


@dataclass(frozen=True)
class KindOfJob:
    """The jobs of a plan that differ in their seeds only, and their place in the tree of jobs."""

    branches: str
    """The lines of the tree to the left of its name."""
    nodes: tuple[PlanNode, ...]

    @property
    def title(self) -> str:
        return self.nodes[0].kind + (f" × {len(self.nodes)}" if len(self.nodes) > 1 else "")

    @property
    def work(self) -> str:
        """What one of the jobs does."""
        return _describe_work(self.nodes[0])

    def state(self, statuses: Mapping[str, NodeStatus]) -> str:
        """The states of the jobs, in words."""
        return _describe_states([statuses[node.name] for node in self.nodes])


def kinds_of_jobs(plan: ReproductionPlan) -> list[KindOfJob]:
    """The jobs of a plan as a tree, in the order of its lines.

    A kind is drawn below the last of the kinds that it waits for; the others are above that one.
    """
    kinds: dict[str, list[PlanNode]] = {}
    for node in plan.nodes.values():
        kinds.setdefault(node.kind, []).append(node)
    kind_of = {name: node.kind for name, node in plan.nodes.items()}
    parent = {kind: kind_of[nodes[0].after[-1]] if nodes[0].after else None for kind, nodes in kinds.items()}
    lines: list[KindOfJob] = []

    def add(kind: str, first: str, rest: str) -> None:
        lines.append(KindOfJob(first, tuple(kinds[kind])))
        children = [each for each in kinds if parent[each] == kind]
        for each in children:
            last = each == children[-1]
            add(each, rest + ("└─ " if last else "├─ "), rest + ("   " if last else "│  "))

    for kind in kinds:
        if parent[kind] is None:
            add(kind, "", "")
    return lines


def overview(reproduction: Reproduction, statuses: Mapping[str, NodeStatus]) -> str:
    """The plan as a tree, with a line for each kind of job and the states of its jobs."""
    lines = [(kind.branches + kind.title, kind.work, kind.state(statuses)) for kind in kinds_of_jobs(reproduction.plan)]
    widths = [max(len(line[i]) for line in lines) for i in (0, 1)]
    done = sum(each.state == DONE for each in statuses.values())
    table = "\n".join(f"{a.ljust(widths[0])}  {b.ljust(widths[1])}  {c}".rstrip() for a, b, c in lines)
    return f"{table}\n{done} of {count_jobs(len(statuses))} done, in {reproduction.setup.folder}"


def _describe_work(node: PlanNode) -> str:
    if isinstance(node.work, Recipe):
        epochs = node.work.optim.total_epochs
        return f"train, {epochs} epoch" + ("s" if epochs > 1 else "")
    makes: dict[type, str] = {Evaluation: "", ZeroShot: "build the head, ", WiseFT: "mix, ", UniformSoup: "average, "}
    return f"{makes[type(node.work)]}evaluate"


def _describe_states(statuses: Sequence[NodeStatus]) -> str:
    """The states of the jobs of one kind, in words."""
    words = []
    for each in statuses:
        status = each.status
        word = "done" if each.state == DONE else "waits" if each.state == WAITING else status.state
        if each.state == MISSING:
            others = {"never started": "–", "finished": "of other models"}
            word = "cannot start" if each.job is not None else others.get(status.state, status.state)
        if status.state == "running" and status.step and len(statuses) == 1:
            left = f", ETA {duration(status.eta_s)}" if status.eta_s is not None else ""
            word += f" {status.step}/{status.total_steps}{left}"
        words.append(word)
    if len(set(words)) == 1:
        only = words[0]
        running = [e.status for e in statuses if e.status.state == "running" and e.status.eta_s is not None]
        eta = f", ETA {duration(max(s.eta_s or 0 for s in running))}" if running and len(statuses) > 1 else ""
        return only + eta
    counts = Counter("not started" if word == "–" else word for word in words)
    return ", ".join(f"{number} {word}" for word, number in counts.items())


def count_jobs(number: int) -> str:
    return f"{number} job" + ("s" if number != 1 else "")


def follow(reproduction: Reproduction) -> int:
    """Show the jobs until none is left. Ctrl-C leaves the jobs alone.

    Returns:
        The exit code: 0 if all jobs are done, 1 if a job failed, 130 after Ctrl-C.
    """
    shown = ""
    quiet = 0
    try:
        while True:
            statuses = read_statuses(reproduction)
            text = overview(reproduction, statuses)
            if sys.stdout.isatty():
                up = f"\x1b[{shown.count(chr(10)) + 1}A\x1b[J" if shown else ""
                print(up + text, flush=True)
            elif text != shown:
                print(time.strftime("\n%H:%M:%S\n") + text, flush=True)
            shown = text
            states = states_of(statuses)
            left = still_needed(reproduction.plan, states)
            # Two polls have to agree: during a requeue, the job is missing for a moment.
            quiet = quiet + 1 if all(states[node.name] == MISSING for node in left) else 0
            if not left or quiet == 2:
                break
            time.sleep(_POLL_S)
    except KeyboardInterrupt:
        print("The jobs continue. The same command shows them again.")
        return 130
    for node in left:
        if statuses[node.name].status.last_end:
            print(f"{node.name}: {statuses[node.name].status.last_end}")
    return 1 if left else 0
