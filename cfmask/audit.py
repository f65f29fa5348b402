"""Compares what a run was trained on with its plan, which is a pure function of the recipe and the training set.

Every step records a receipt in receipts.jsonl: a sum over hashes of its samples' keys (``cfmask.data.receipts``). Every
checkpoint records the sum over all steps before it. If both equal what the plan gives, the run was trained on each
planned sample exactly once, in spite of any restarts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cfmask.checkpoint.state import Checkpoint, CheckpointDamaged, list_checkpoints, read_state
from cfmask.data import plan
from cfmask.data.receipts import MODULUS, DataProgress, receipt, sample_hash
from cfmask.data.shards import Manifest, load_sets
from cfmask.data.stream import WINDOW_SHARDS
from cfmask.errors import UserError
from cfmask.recipe import Recipe
from cfmask.runs import RunFolder
from cfmask.runtime.jsonl import read_lines
from cfmask.runtime.patience import patiently
from cfmask.runtime.progress import progress_bar

MAX_EXPLAINED = 20
"""Wrong steps that are explained. Each explanation takes as long as an epoch's receipts."""


@dataclass(frozen=True)
class Planned:
    """The samples that a run should consume."""

    keys: list[str]
    """Keys of the whole set, by global id."""
    steps_per_epoch: int
    recipe: Recipe
    sample_counts: NDArray[np.int64]
    """Samples of each shard."""
    _orders: dict[int, NDArray[np.int64]] = field(default_factory=dict)
    """The order of the epoch that was asked for last."""

    def step_keys(self, step: int, replaced: dict[int, str]) -> list[str]:
        """Keys of a step's samples. ``replaced`` has the keys of substitutes by the global id of what they replace."""
        return [replaced.get(int(i), self.keys[i]) for i in self.ids(step)]

    def ids(self, step: int) -> NDArray[np.int64]:
        """Global ids of step 1, 2, …: (batch size,)."""
        epoch, within = divmod(step - 1, self.steps_per_epoch)
        if epoch not in self._orders:
            optim, run = self.recipe.optim, self.recipe.run
            self._orders.clear()  # steps are read epoch by epoch
            self._orders[epoch] = plan.epoch_order(
                self.sample_counts,
                seed=run.seed,
                epoch=epoch,
                lanes=optim.lanes,
                batch_size=optim.batch_size,
                window_shards=WINDOW_SHARDS,
            )
        return self._orders[epoch][within]

    def epoch_of(self, step: int) -> int:
        return (step - 1) // self.steps_per_epoch


Sets = dict[tuple[str, str], tuple[Manifest, list[str]]]
"""Training sets that have been read, and their keys, by shards and split: an audit of many runs reads each set once."""


def load_plan(run: RunFolder, sets: Sets | None = None) -> tuple[Planned, Manifest]:
    """The plan of a run and its training set.

    Args:
        sets: read sets are taken from here, and added.

    Raises:
        UserError: no run, no set, or an unreadable index.
    """
    recipe = run.recipe()
    where, sets = (recipe.data.shards, recipe.data.train_split), {} if sets is None else sets
    if where not in sets:
        [manifest] = load_sets(where[0], [where[1]], check_files=False).values()
        keys: list[str] = []
        for shard in progress_bar(iterable=manifest.shards, desc="keys", unit=" shards", leave=False):
            keys += [key.decode() for key in manifest.open_index(shard).keys.tolist()]
        sets[where] = manifest, keys
    manifest, keys = sets[where]
    steps = plan.steps_per_epoch(manifest.num_samples, recipe.optim.batch_size)
    return Planned(keys, steps, recipe, manifest.sample_counts), manifest


PROVEN, NOT_PROVEN, UNKNOWN = "proven", "NOT PROVEN", "unknown"
NEVER_STARTED = "never started"


@dataclass(frozen=True)
class Audit:
    """What an audit of a run has found."""

    verdict: str
    """PROVEN, NOT_PROVEN or UNKNOWN."""
    reached: str
    """How far the run has come, in words."""
    rows: list[list[str]] = field(default_factory=list)
    """A row for each epoch: epoch, steps, samples, replaced, verdict."""
    problems: list[str] = field(default_factory=list)
    """A sentence for each problem, or for the reason why the verdict is unknown."""


def audit(run: RunFolder, sets: Sets | None = None) -> Audit:
    """Compare receipts and checkpoints of a run with its plan, as far as it has come.

    Args:
        sets: see ``load_plan``.
    """
    try:
        if not patiently(run.has_started, str(run.attempts)) and not patiently(run.saved_step, str(run.checkpoints)):
            run.recipe()
            return Audit(UNKNOWN, NEVER_STARTED, problems=[f"{run.root} has never started: there is nothing to prove."])
        return _audit(run, sets)
    except (UserError, OSError) as error:
        return Audit(UNKNOWN, "see below", problems=[str(error)])


def _audit(run: RunFolder, sets: Sets | None) -> Audit:
    planned, manifest = load_plan(run, sets)
    receipts = _read(run.receipts)
    saved, problems = _states(run)
    if not receipts or not (saved or problems):
        raise UserError(f"{run.root} has no checkpoint yet, so there is nothing to prove.")
    problems += [
        f"The checkpoint of step {state.step} was trained on another set: digest {state.dataset}, {manifest.root} has "
        f"{manifest.digest}."
        for state in saved
        if state.dataset != manifest.digest
    ]
    replaced: dict[int, dict[int, str]] = {}
    for line in _read(run.bad_samples):
        replaced.setdefault(line["step"], {})[line["sample"]] = line["substitute"]

    wrong = next((n for n, line in enumerate(receipts, 1) if line["step"] != n), None)
    if wrong is not None:
        problems.append(
            f"receipts.jsonl has step {receipts[wrong - 1]['step']} where step {wrong} belongs: it was edited or torn."
        )
        receipts = receipts[: wrong - 1]
    rows, totals, differences = _compare_steps(planned, receipts, replaced)
    problems += differences
    for state in saved:
        of_steps = totals.get(state.step)
        if of_steps is None:
            problems.append(f"The checkpoint of step {state.step} is beyond the last receipt, of step {len(receipts)}.")
        elif (of_steps.samples, of_steps.receipt) != (state.consumed.samples, state.consumed.receipt):
            problems.append(
                f"The checkpoint of step {state.step} was trained on other samples than the receipts of the steps up "
                f"to it add up to ({state.consumed.samples} samples, they {of_steps.samples})."
            )
    last, total = len(receipts), planned.steps_per_epoch * planned.recipe.optim.total_epochs
    finished = patiently(run.results.exists, str(run.results))
    if finished and last < total:
        problems.append(f"The run has finished, but its receipts end at step {last} of {total}.")
    reached = f"finished, {total:,} steps" if finished else f"not finished, step {last:,} of {total:,}"
    return Audit(NOT_PROVEN if problems else PROVEN, reached, rows, problems)


def _compare_steps(
    planned: Planned, receipts: list[dict[str, Any]], replaced: dict[int, dict[int, str]]
) -> tuple[list[list[str]], dict[int, DataProgress], list[str]]:
    """A row for each epoch, the sums up to each step, and the steps that differ from the plan."""
    total = DataProgress()
    totals = {0: total}
    counts: dict[int, NDArray[np.int64]] = {}
    wrong_epochs: set[int] = set()
    wrong_steps = 0
    problems: list[str] = []
    for line in progress_bar(iterable=receipts, desc="steps", unit=" steps", leave=False):
        step, value = line["step"], int(line["receipt"], 16)
        epoch, replaced_here = planned.epoch_of(step), replaced.get(step, {})
        keys = planned.step_keys(step, replaced_here)
        if line["samples"] != len(keys) or value != receipt(keys, epoch):
            wrong_epochs.add(epoch)
            wrong_steps += 1
            if wrong_steps <= MAX_EXPLAINED:
                problems.append(_explain(planned, step, line["samples"], value, replaced))
        total = total.plus(samples=line["samples"], receipt=value, bad=0, epoch_begins=False)
        totals[step] = total
        counts[epoch] = counts.get(epoch, 0) + np.array([1, line["samples"], len(replaced_here)])
    if wrong_steps > MAX_EXPLAINED:
        problems.append(f"{wrong_steps - MAX_EXPLAINED} further steps consumed other samples than planned.")
    rows = [
        [
            str(epoch + 1),
            *map(str, row),
            "WRONG" if epoch in wrong_epochs else _verdict(int(row[0]), planned.steps_per_epoch),
        ]
        for epoch, row in counts.items()
    ]
    return rows, totals, problems


def attempts(run: RunFolder) -> Iterator[str]:
    """A line for each start of the run."""
    for line in _read(run.attempts):
        why = f"; the one before was {line['why_last_ended']}" if line["why_last_ended"] else ""
        ranks = "1 rank" if line["world_size"] == 1 else f"{line['world_size']} ranks"
        yield f"attempt {line['attempt']}: from step {line['from_step']}, {ranks}{why}"


def _read(path: Path) -> list[dict[str, Any]]:
    """Lines of a file. Unreadable storage is retried, then an error: it must not look like a missing file."""
    return patiently(lambda: read_lines(path), str(path))


def _states(run: RunFolder) -> tuple[list[Checkpoint], list[str]]:
    """The states of the checkpoints, and a sentence for each damaged one."""
    saved, problems = [], []
    for path in reversed(patiently(lambda: list_checkpoints(run.checkpoints), str(run.checkpoints))):
        try:
            saved.append(read_state(path))
        except CheckpointDamaged as error:
            problems.append(str(error))
    return saved, problems


def _verdict(steps: int, whole: int) -> str:
    return "each planned sample once" if steps == whole else f"each of its first {steps} of {whole} steps once"


def _explain(planned: Planned, step: int, samples: int, value: int, replaced: dict[int, dict[int, str]]) -> str:
    """Which samples came in place of the planned ones, as far as the difference of two sums tells."""
    epoch = planned.epoch_of(step)
    keys = planned.step_keys(step, replaced.get(step, {}))
    here = f"Step {step} (epoch {epoch + 1}, step {(step - 1) % planned.steps_per_epoch + 1} in it)"
    first = epoch * planned.steps_per_epoch + 1
    for other in range(first, first + planned.steps_per_epoch):
        if receipt(planned.step_keys(other, replaced.get(other, {})), epoch) == value:
            return (
                f"{here} consumed the samples of step {other}: those of step {step} are missing, those were repeated."
            )
    excess = (value - receipt(keys, epoch)) % MODULUS
    key_of = {sample_hash(key, epoch): key for key in planned.keys}
    if samples == len(keys):
        for missing in keys:
            if came := key_of.get((excess + sample_hash(missing, epoch)) % MODULUS):
                return f"{here} consumed {came} where {missing} was planned: {missing} is missing, {came} was repeated."
    elif samples == len(keys) + 1 and excess in key_of:
        return f"{here} consumed {key_of[excess]} besides what was planned: it was repeated."
    elif samples == len(keys) - 1 and (MODULUS - excess) % MODULUS in key_of:
        return f"{here} did not consume {key_of[(MODULUS - excess) % MODULUS]}: it is missing."
    return f"{here} consumed {samples} other samples than the {len(keys)} planned ones."
