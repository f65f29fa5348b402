"""The rows of the paper's table as jobs that read each other's models, and which of the jobs to submit. Pure.

    zero-shot ─┬─ a training run ── its evaluation                    nine mask × fill rows, FT + FD, FT
               └─ FT ─┬─ WiSE-FT ── WiSE-KD ── its evaluation
                      └─ soup of all FT ── the method from there ── its evaluation

Except for the soup, a run depends on no run of another seed. Each run has an evaluation of its own: one evaluation of
all runs would read every set once, but a failed run would block all rows, and the cost is small. Training puts 13
million images through a step, an evaluation 167 thousand through one forward pass: 0.2 % of the cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cfmask.checkpoint.best import POINTER
from cfmask.errors import UserError
from cfmask.evaluation.model_origin import BEST, LAST
from cfmask.evaluation_spec import Evaluation, UniformSoup, WiseFT, ZeroShot
from cfmask.recipe import Model, Recipe

HEADLINE = "object-mask-single-fill"
"""The row that the paper calls its method."""
ALPHA = 0.5
"""The mixing coefficient of WiSE-FT, and of the ensemble that WiSE-KD distils from."""

MASKED = tuple(
    f"{mask}-mask-{fill}"
    for mask in ("random", "object", "context")
    for fill in ("no-fill", "single-fill", "multi-fill")
)
LABELS = {
    "zero-shot": "zero-shot",
    "ft": "FT",
    "wise-ft": f"WiSE-FT, α = {ALPHA}",
    "fd-clean": "FT + FD, clean images",
    **{row: f"FT + FD, {row.replace('-mask-', ' mask, ')}" for row in MASKED},
    "wise-kd": "WiSE-KD",
    "soup": "model soup",
    f"soup-{HEADLINE}": f"{HEADLINE.replace('-mask-', ' mask, ')}, from the soup",
}
"""Labels of the rows by the name that --rows takes, in the order of the table."""

DONE, QUEUED, WAITING, MISSING = "done", "queued", "waiting", "missing"
"""States of a node: it has results; it has a job that runs or will run; its job has not begun and waits for other jobs;
it has neither results nor a job."""


@dataclass(frozen=True)
class PlanNode:
    """A job of the plan, and its run folder."""

    kind: str
    """The part of the name that all seeds share."""
    seed: int | None
    work: Recipe | Evaluation
    after: tuple[str, ...] = ()
    """Names of the nodes whose models it reads. The last one depends on the others."""

    @property
    def name(self) -> str:
        """The name of the run folder."""
        return self.kind if self.seed is None else f"{self.kind}-s{self.seed}"


@dataclass(frozen=True)
class PaperRow:
    """A row of the table."""

    word: str
    """Its name for --rows."""
    found_in: tuple[str, ...]
    """The nodes whose results it averages, one per seed."""

    @property
    def label(self) -> str:
        return LABELS[self.word]


@dataclass(frozen=True)
class ReproductionPlan:
    """The jobs that rows of the table need."""

    nodes: Mapping[str, PlanNode]
    """By name; each comes after the nodes whose models it reads."""
    rows: tuple[PaperRow, ...]

    @property
    def trains(self) -> bool:
        """Whether a job is a training run."""
        return any(isinstance(node.work, Recipe) for node in self.nodes.values())

    @property
    def wanted(self) -> set[str]:
        """The nodes whose results the rows average."""
        return {name for row in self.rows for name in row.found_in}


# --- the paper's ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setup:
    """What the rows have in common."""

    folder: Path
    """Absolute; has a run folder for each node."""
    recipe_of: Callable[[str, int, Path, Path | None], Recipe]
    """Returns the resolved recipe of a preset, seed, initial model and ensemble (of WiSE-KD)."""
    evaluation: Evaluation
    """The shards, sets, precision and other settings of all evaluations."""
    start: Model
    """The zero-shot model."""
    seeds: tuple[int, ...]
    soup: Path | None = None
    """A model file to start the soup's rows from; None: the average of the plan's FT models."""
    checkpoint: str = LAST
    """Which checkpoint of a training run is evaluated, mixed and averaged: "best" (on the held-out set) or "last"."""

    def model(self, node: str) -> Path:
        """The model that an evaluation writes."""
        return self.folder / node / "model.safetensors"

    def trained_model(self, node: str) -> Path:
        """The model of a training run that is evaluated, as a path that an evaluation accepts."""
        return self.folder / node / "checkpoints" / POINTER if self.checkpoint == BEST else self.model(node)


def choose_rows(words: Sequence[str] | None, setup: Setup) -> tuple[str, ...]:
    """The requested rows, in the table's order; by default all that are possible.

    Raises:
        UserError: a row needs a soup, and there is neither a model file nor a second seed.
    """
    no_soup = setup.soup is None and len(setup.seeds) < 2
    of_soup = [word for word in LABELS if word.startswith("soup")]
    if words is None:
        return tuple(word for word in LABELS if not (no_soup and word in of_soup))
    if no_soup and (asked := [word for word in of_soup if word in words]):
        raise UserError(
            f"The row {asked[0]} needs a soup: give one with --soup FILE, or at least two --seeds, whose FT models are "
            "averaged."
        )
    return tuple(word for word in LABELS if word in words)


def paper_plan(words: Sequence[str], setup: Setup) -> ReproductionPlan:
    """The jobs of these rows, and the jobs that they depend on.

    Args:
        words: keys of LABELS.
    """
    zero = PlanNode(
        "zero-shot",
        None,
        setup.evaluation.as_kind(
            ZeroShot,
            architecture=setup.start.name,
            pretrained=setup.start.pretrained,
            mean=setup.start.mean,
            std=setup.start.std,
        ),
    )
    nodes = {zero.name: zero}
    rows = []

    def add(node: PlanNode) -> PlanNode:
        return nodes.setdefault(node.name, node)

    def trained(preset: str, seed: int, start: PlanNode = zero, ensemble: PlanNode | None = None) -> PlanNode:
        given = setup.soup if start.kind == "soup" else None
        recipe = setup.recipe_of(
            preset, seed, given or setup.model(start.name), setup.model(ensemble.name) if ensemble else None
        )
        needs = [node.name for node in (None if given else start, ensemble) if node is not None]
        return add(PlanNode(preset if start is zero else f"{start.kind}-{preset}", seed, recipe, tuple(needs)))

    def evaluated(run: PlanNode) -> PlanNode:
        work = replace(setup.evaluation, models=(str(setup.trained_model(run.name)),))
        return add(PlanNode(f"{run.kind}-eval", run.seed, work, (run.name,)))

    def wise_ft(seed: int) -> PlanNode:
        fine = trained("ft", seed)
        models = str(setup.model(zero.name)), str(setup.trained_model(fine.name))
        work = setup.evaluation.as_kind(WiseFT, models=models, alphas=(ALPHA,))
        return add(PlanNode("wise-ft", seed, work, (zero.name, fine.name)))

    def soup() -> PlanNode:
        if setup.soup is not None:
            return add(PlanNode("soup", None, replace(setup.evaluation, models=(str(setup.soup),))))
        fine = [trained("ft", seed).name for seed in setup.seeds]
        work = setup.evaluation.as_kind(UniformSoup, models=tuple(str(setup.trained_model(name)) for name in fine))
        # The seeds are in its name: with another seed, it is another soup.
        return add(PlanNode("soup-of-" + "-".join(map(str, setup.seeds)), None, work, tuple(fine)))

    for word in words:
        if word == "zero-shot":
            found = [zero]
        elif word == "soup":
            found = [soup()]
        elif word == "wise-ft":
            found = [wise_ft(seed) for seed in setup.seeds]
        elif word == "wise-kd":
            found = [evaluated(trained(word, seed, ensemble=wise_ft(seed))) for seed in setup.seeds]
        elif word == f"soup-{HEADLINE}":
            found = [evaluated(trained(HEADLINE, seed, soup())) for seed in setup.seeds]
        else:
            found = [evaluated(trained(word, seed)) for seed in setup.seeds]
        rows.append(PaperRow(word, tuple(node.name for node in found)))
    used = with_needed(nodes, {name for row in rows for name in row.found_in})
    return ReproductionPlan({name: node for name, node in nodes.items() if name in used}, tuple(rows))


# --- the graph --------------------------------------------------------------------------------------------------------


def with_needed(nodes: Mapping[str, PlanNode], names: Iterable[str]) -> set[str]:
    """These nodes, and all that they depend on, directly or indirectly."""
    found: set[str] = set()
    open_names = list(names)
    while open_names:
        name = open_names.pop()
        if name not in found:
            found.add(name)
            open_names += nodes[name].after
    return found


def still_needed(plan: ReproductionPlan, states: Mapping[str, str]) -> list[PlanNode]:
    """The nodes that are not done and that rows need, in order. Once a row has its results, the runs behind it are no
    longer needed, even if their folders are gone."""
    needed = set(plan.wanted)
    left = []
    for node in reversed(list(plan.nodes.values())):
        if node.name in needed and states[node.name] != DONE:
            needed.update(node.after)
            left.append(node)
    return left[::-1]


def to_submit(plan: ReproductionPlan, states: Mapping[str, str]) -> list[PlanNode]:
    """The nodes to submit, in order: those that are missing, and those whose job waits for a job that no longer exists,
    because a node that they depend on is submitted again."""
    chosen: dict[str, PlanNode] = {}
    for node in still_needed(plan, states):
        stale = states[node.name] == WAITING and any(name in chosen for name in node.after)
        if states[node.name] == MISSING or stale:
            chosen[node.name] = node
    return list(chosen.values())


def arrays(chosen: Iterable[PlanNode], states: Mapping[str, str]) -> list[list[PlanNode]]:
    """The nodes grouped into arrays: training runs that wait for the same jobs, and evaluations that wait for the same
    jobs. Each array comes after those that it waits for.

    Args:
        chosen: in order, as ``to_submit`` returns them.
    """
    found: dict[tuple[bool, frozenset[str]], list[PlanNode]] = {}
    for node in chosen:
        found.setdefault((isinstance(node.work, Recipe), frozenset(awaited(node, states))), []).append(node)
    return list(found.values())


def awaited(node: PlanNode, states: Mapping[str, str]) -> list[str]:
    """The nodes whose jobs a node waits for."""
    return [name for name in node.after if states[name] != DONE]
