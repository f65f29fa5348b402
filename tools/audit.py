#!/usr/bin/env python3
"""Prove what a run was trained on: each planned sample exactly once, across all its attempts.

    python tools/audit.py RUN

Every step left a receipt (a sum over hashes of its samples' keys) in receipts.jsonl, every checkpoint one of all steps
before it. Both are compared with what the plan says, which is a function of the recipe and the set alone; samples that
bad_samples.jsonl says were replaced count as replaced. A checkpoint whose state.json is not what was written proves
nothing. Exit code 0: proven; 1: not, and at which step; 2: cannot be told, because the set or the run is not there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

try:
    import numpy as np
    from numpy.typing import NDArray
    from tqdm import tqdm

    from cfmask.checkpoint.state import Checkpoint, CheckpointDamaged, list_checkpoints, read_state
    from cfmask.data import plan
    from cfmask.data.receipts import MODULUS, DataProgress, receipt, sample_hash
    from cfmask.data.shards import Manifest, load_sets
    from cfmask.data.stream import WINDOW_SHARDS
    from cfmask.errors import UserError
    from cfmask.recipe import Recipe
    from cfmask.report import table
    from cfmask.runs import RunFolder
    from cfmask.runtime.command import exits_cleanly
    from cfmask.runtime.jsonl import read_lines
    from cfmask.runtime.patience import patiently
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing}. Activate the environment first: source .venv/bin/activate (to create it: README.md).")

_EXPLAINED = 20
"""Wrong steps that are looked into: each takes as long as an epoch's receipts."""


@dataclass(frozen=True)
class Planned:
    """What a run should consume. keys (samples,): of the whole set, by global id."""

    keys: list[str]
    steps_per_epoch: int
    orders: dict[int, NDArray[np.int64]]
    recipe: Recipe
    sample_counts: NDArray[np.int64]

    def ids(self, step: int) -> NDArray[np.int64]:
        """(batch size,) of step 1, 2, …"""
        epoch, within = divmod(step - 1, self.steps_per_epoch)
        if epoch not in self.orders:
            optim, run = self.recipe.optim, self.recipe.run
            self.orders.clear()  # one epoch at a time is looked at
            self.orders[epoch] = plan.epoch_order(
                self.sample_counts,
                seed=run.seed,
                epoch=epoch,
                lanes=optim.lanes,
                batch_size=optim.batch_size,
                window_shards=WINDOW_SHARDS,
            )
        return self.orders[epoch][within]

    def step_keys(self, step: int, replaced: dict[int, str]) -> list[str]:
        """Keys of a step's samples; ``replaced`` gives another for some global ids."""
        return [replaced.get(int(i), self.keys[i]) for i in self.ids(step)]

    def epoch_of(self, step: int) -> int:
        return (step - 1) // self.steps_per_epoch


def load_plan(run: RunFolder) -> tuple[Planned, Manifest]:
    """Raises UserError: no run, no set, or an index that cannot be read."""
    recipe = run.recipe()
    [manifest] = load_sets(recipe.data.shards, [recipe.data.train_split], check_files=False).values()
    keys: list[str] = []
    for shard in tqdm(manifest.shards, desc="keys", unit=" shards", leave=False):
        keys += [key.decode() for key in manifest.open_index(shard).keys.tolist()]
    steps = plan.steps_per_epoch(manifest.num_samples, recipe.optim.batch_size)
    return Planned(keys, steps, {}, recipe, manifest.sample_counts), manifest


def audit(run: RunFolder) -> tuple[list[list[str]], list[str]]:
    """A row an epoch (epoch, steps, samples, replaced, verdict), and what is wrong, a sentence each.

    Raises:
        UserError: the run has no receipts, or the plan cannot be made.
    """
    planned, manifest = load_plan(run)
    receipts = _lines(run.receipts)
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
    for line in _lines(run.bad_samples):
        replaced.setdefault(line["step"], {})[line["sample"]] = line["substitute"]

    steps = [line["step"] for line in receipts]
    if steps != list(range(1, len(steps) + 1)):
        wrong = next(n for n, step in enumerate(steps, 1) if n != step)
        problems.append(
            f"receipts.jsonl has step {steps[wrong - 1]} where step {wrong} belongs: it was edited or torn."
        )
        receipts = receipts[: wrong - 1]
    total = DataProgress()
    by_step = {0: total}
    rows: dict[int, list[int]] = {}
    wrong_epochs: set[int] = set()
    unexplained = 0
    for line in tqdm(receipts, desc="steps", unit=" steps", leave=False):
        step, value = line["step"], int(line["receipt"], 16)
        epoch = planned.epoch_of(step)
        keys = planned.step_keys(step, replaced.get(step, {}))
        if line["samples"] != len(keys) or value != receipt(keys, epoch):
            wrong_epochs.add(epoch)
            if len(problems) < _EXPLAINED:
                problems.append(_what_happened(planned, step, line["samples"], value, replaced))
            else:
                unexplained += 1
        total = total.plus(samples=line["samples"], receipt=value, bad=0, epoch_begins=False)
        by_step[step] = total
        row = rows.setdefault(epoch, [0, 0, 0])
        for i, more in enumerate((1, line["samples"], len(replaced.get(step, {})))):
            row[i] += more
    if unexplained:
        problems.append(f"So it went on: {unexplained} further steps consumed other samples than planned.")
    for state in saved:
        of_steps = by_step.get(state.step)
        if of_steps is None:
            problems.append(f"The checkpoint of step {state.step} is beyond the last receipt, of step {len(receipts)}.")
        elif (of_steps.samples, of_steps.receipt) != (state.consumed.samples, state.consumed.receipt):
            problems.append(
                f"The checkpoint of step {state.step} was trained on other samples than the receipts of the steps up "
                f"to it add up to ({state.consumed.samples} samples, they {of_steps.samples})."
            )
    verdicts = {
        epoch: "WRONG" if epoch in wrong_epochs else _verdict(row[0], planned.steps_per_epoch)
        for epoch, row in rows.items()
    }
    return [[str(epoch + 1), *map(str, row), verdicts[epoch]] for epoch, row in rows.items()], problems


def _lines(path: Path) -> list[dict[str, Any]]:
    """Raises StorageUnavailable: an audit that cannot read proves nothing, in either direction."""
    return patiently(lambda: read_lines(path), str(path))


def _states(run: RunFolder) -> tuple[list[Checkpoint], list[str]]:
    """What the checkpoints say of themselves, and of each that is damaged, how."""
    saved, problems = [], []
    for path in reversed(patiently(lambda: list_checkpoints(run.checkpoints), str(run.checkpoints))):
        try:
            saved.append(read_state(path))
        except CheckpointDamaged as error:
            problems.append(str(error))
    return saved, problems


def _verdict(steps: int, whole: int) -> str:
    return "each planned sample once" if steps == whole else f"each of its first {steps} of {whole} steps once"


def _what_happened(planned: Planned, step: int, samples: int, value: int, replaced: dict[int, dict[int, str]]) -> str:
    """Which samples came instead of the planned ones, as far as the difference of two sums tells."""
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
    return f"{here} consumed other samples than planned: {samples} of them, {len(keys)} were planned."


def _attempts(run: RunFolder) -> Iterator[str]:
    for line in _lines(run.attempts):
        why = f"; the one before was {line['why_last_ended']}" if line["why_last_ended"] else ""
        yield f"attempt {line['attempt']}: from step {line['from_step']}, {line['world_size']} ranks{why}"


@exits_cleanly
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    run = RunFolder(parser.parse_args(argv).run)
    rows, problems = audit(run)
    print(*_attempts(run), "", sep="\n")
    print(table(["epoch", "steps", "samples", "replaced", "verdict"], rows))
    if problems:
        print("", *problems, "NOT PROVEN", sep="\n")
        return 1
    print("\nProven: receipts of steps and checkpoints are those of the plan.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
