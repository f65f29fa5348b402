"""The paper's rows as jobs that take each other's models, and which of them are to be submitted: all of it pure.

    zero-shot ─┬─ a training run ── its evaluation                    nine mask × fill rows, FT + FD, FT
               └─ FT ─┬─ WiSE-FT ── WiSE-KD ── its evaluation
                      └─ soup of all FT ── the method from there ── its evaluation

A run of one seed hangs on nothing of another seed, but for the soup. Each has an evaluation of its own. One for all
would read every set once; but a run's training puts 13 million images through a step, its evaluation 167 thousand
through one forward: that is 0.2 % of the cost, and one run that failed would hold all rows up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cfmask.best_checkpoint import POINTER
from cfmask.errors import UserError
from cfmask.evaluation.model_origin import BEST, LAST
from cfmask.evaluation_spec import Evaluation, UniformSoup, WiseFT, ZeroShot
from cfmask.recipe import Recipe

HEADLINE = "object-mask-single-fill"
"""The row that the paper calls its method."""
ALPHA = 0.5
"""Of WiSE-FT, and of the ensemble that WiSE-KD learns from."""

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
"""Rows by the word that chooses them, in the order of the table."""

DONE, QUEUED, WAITING, MISSING = "done", "queued", "waiting", "missing"
"""States of a node: its results are there; a job is there that goes on by itself; one that has not begun and waits for
other jobs; neither."""


@dataclass(frozen=True)
class PlanNode:
    """A job of the plan, and its run folder.

    kind: what is the same for all seeds. after: names of nodes whose models it takes.
    """

    kind: str
    seed: int | None
    work: Recipe | Evaluation
    after: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Of the run folder."""
        return self.kind if self.seed is None else f"{self.kind}-s{self.seed}"


@dataclass(frozen=True)
class PaperRow:
    """A row of the table. found_in: the nodes whose results it is made of, one a seed."""

    word: str
    found_in: tuple[str, ...]

    @property
    def label(self) -> str:
        return LABELS[self.word]


@dataclass(frozen=True)
class ReproductionPlan:
    """nodes: by name, each after those that it takes models of. rows: what it is for."""

    nodes: Mapping[str, PlanNode]
    rows: tuple[PaperRow, ...]

    @property
    def trains(self) -> bool:
        """Whether a job of it is a training run."""
        return any(isinstance(node.work, Recipe) for node in self.nodes.values())

    @property
    def wanted(self) -> set[str]:
        """Nodes whose results make the rows."""
        return {name for row in self.rows for name in row.found_in}


# --- the paper's ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setup:
    """What the rows have in common.

    folder: absolute; a run folder in it for each node.
    recipe_of: the resolved recipe of a preset, seed, start and ensemble (both files, the latter of wise-kd).
    evaluation: shards, sets, precision …, as all of them have it.
    architecture, pretrained, mean, std: of the zero-shot model, as in recipe.Model.
    soup: a model file to start the soup's rows from; None: the plan's own.
    checkpoint: which checkpoint of a training run is evaluated, mixed and averaged: "best" (on the held-out set) or
        "last".
    """

    folder: Path
    recipe_of: Callable[[str, int, Path, Path | None], Recipe]
    evaluation: Evaluation
    architecture: str
    pretrained: str
    seeds: tuple[int, ...]
    soup: Path | None = None
    checkpoint: str = LAST
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def model(self, node: str) -> Path:
        """The model that an evaluation makes."""
        return self.folder / node / "model.safetensors"

    def trained_model(self, node: str) -> Path:
        """The model of a training run that counts; its path, as an evaluation takes it when the run has ended."""
        return self.folder / node / "checkpoints" / POINTER if self.checkpoint == BEST else self.model(node)


def choose_rows(words: Sequence[str] | None, setup: Setup) -> tuple[str, ...]:
    """The rows that are asked for, in the table's order; all that can be had if none are.

    Raises:
        UserError: a soup's, and there is nothing to make it of.
    """
    no_soup = setup.soup is None and len(setup.seeds) < 2
    of_soup = [word for word in LABELS if word.startswith("soup")]
    if words is None:
        return tuple(word for word in LABELS if not (no_soup and word in of_soup))
    if no_soup and (asked := [word for word in of_soup if word in words]):
        raise UserError(
            f"The row {asked[0]} needs a soup: give one with --soup FILE, or at least two --seeds, whose FT models are "
            "averaged then."
        )
    return tuple(word for word in LABELS if word in words)


def paper_plan(words: Sequence[str], setup: Setup) -> ReproductionPlan:
    """The jobs that rows of the paper take, and those that these need.

    Args:
        words: keys of LABELS.
    """
    zero = PlanNode(
        "zero-shot",
        None,
        setup.evaluation.as_kind(
            ZeroShot,
            architecture=setup.architecture,
            pretrained=setup.pretrained,
            mean=setup.mean,
            std=setup.std,
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
        # Its ingredients are in its name: with another seed it is another soup, and this one stays what it is.
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
    return ReproductionPlan({node.name: node for node in in_order(nodes.values()) if node.name in used}, tuple(rows))


# --- the graph --------------------------------------------------------------------------------------------------------


def in_order(nodes: Iterable[PlanNode]) -> list[PlanNode]:
    """Each after all that it takes models of; otherwise as they came.

    Raises:
        ValueError: one takes a model of a node that is not there, or, over others, of itself.
    """
    left = {node.name: node for node in nodes}
    placed: dict[str, PlanNode] = {}
    for node in left.values():
        if strange := [name for name in node.after if name not in left]:
            raise ValueError(f"{node.name} comes after {strange[0]}, which is not in the plan")
    while left:
        ready = [node for node in left.values() if all(name in placed for name in node.after)]
        if not ready:
            raise ValueError(f"{', '.join(left)} wait for each other")
        for node in ready:
            placed[node.name] = left.pop(node.name)
    return list(placed.values())


def with_needed(nodes: Mapping[str, PlanNode], names: Iterable[str]) -> set[str]:
    """These, and all that they take models of, over any number of steps."""
    found: set[str] = set()
    open_names = list(names)
    while open_names:
        name = open_names.pop()
        if name not in found:
            found.add(name)
            open_names += nodes[name].after
    return found


def still_needed(plan: ReproductionPlan, states: Mapping[str, str]) -> list[PlanNode]:
    """What has to be done yet, in order: what rows lack, and what that needs. A run whose row is there is not needed
    any more, whatever has become of its folder."""
    needed = set(plan.wanted)
    left = []
    for node in reversed(list(plan.nodes.values())):
        if node.name in needed and states[node.name] != DONE:
            needed.update(node.after)
            left.append(node)
    return left[::-1]


def to_submit(plan: ReproductionPlan, states: Mapping[str, str]) -> list[PlanNode]:
    """The nodes that get a job now, in order: those that are missing, and those whose job waits for one that has gone,
    because a node that it comes after is submitted anew."""
    chosen: dict[str, PlanNode] = {}
    for node in still_needed(plan, states):
        stale = states[node.name] == WAITING and any(name in chosen for name in node.after)
        if states[node.name] == MISSING or stale:
            chosen[node.name] = node
    return list(chosen.values())


def arrays(chosen: Iterable[PlanNode], states: Mapping[str, str]) -> list[list[PlanNode]]:
    """What of the nodes that get a job goes out together, as an array: trainings that wait for the same jobs, and
    evaluations that do. Each array after those that it waits for; a node that waits for others than any is alone.

    Args:
        chosen: in order, as ``to_submit`` gives them.
    """
    found: dict[tuple[bool, frozenset[str]], list[PlanNode]] = {}
    for node in chosen:
        found.setdefault((isinstance(node.work, Recipe), frozenset(awaited(node, states))), []).append(node)
    return list(found.values())


def awaited(node: PlanNode, states: Mapping[str, str]) -> list[str]:
    """The nodes whose jobs it waits for."""
    return [name for name in node.after if states[name] != DONE]
