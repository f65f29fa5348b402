"""How well the order of an epoch mixes samples, beside a full permutation."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cfmask.data import plan
from tools.benchmarks.tables import report

HEADER = ["set", "order", "class spread", "moved", "met again %"]
NOTE = (
    "Class spread: variance of a class's count in a batch over that of independent draws. Moved: mean distance between "
    "a sample's places in two epochs, as a share of the epoch (1/3 if independent). Met again: share of the pairs of a "
    "batch that are in one batch in the next epoch too. cfmask trains with windows of 4 shards; here 16 lanes, batches "
    "of 512."
)


@dataclass(frozen=True)
class Mixing:
    """How well an order mixes."""

    class_spread: float
    """Variance of a class's count in a batch over that of independent draws; 1 for a full permutation."""
    moved: float
    """Mean distance between a sample's places in two epochs, in epochs; 1/3 for independent permutations."""
    met_again: float
    """Share of the pairs of a batch that are in one batch in the next epoch too."""


def run(_: argparse.Namespace) -> str:
    rows = []
    for name, shards, per_shard in (("ImageNet, 1000 a shard", 1281, 1000), ("100,000 samples, 250 a shard", 400, 250)):
        for window in (1, 4, 16):
            quality, full = order_quality(
                shards=shards, per_shard=per_shard, lanes=16, batch_size=512, classes=1000, window_shards=window
            )
            rows.append([name, f"windows of {window} shards", *_cells(quality)])
        rows.append([name, "full permutation", *_cells(full)])
    return report("order", HEADER, rows, [NOTE])


def order_quality(
    *, shards: int, per_shard: int, lanes: int, batch_size: int, classes: int, window_shards: int
) -> tuple[Mixing, Mixing]:
    """The plan's order and a full permutation's, on a set whose classes are spread over shards at random."""
    counts = np.full(shards, per_shard)
    total = shards * per_shard
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.arange(total) % classes)
    sizes = {"lanes": lanes, "batch_size": batch_size, "window_shards": window_shards}
    planned = [plan.epoch_order(counts, seed=0, epoch=epoch, **sizes) for epoch in range(2)]
    steps = total // batch_size
    full = [rng.permutation(total)[: steps * batch_size].reshape(steps, batch_size) for _ in range(2)]
    return _mixing(planned, labels, classes), _mixing(full, labels, classes)


def _mixing(epochs: list[NDArray[np.int64]], labels: NDArray[np.int64], classes: int) -> Mixing:
    steps, batch = epochs[0].shape
    histograms = np.stack([np.bincount(labels[row], minlength=classes) for row in epochs[0]])
    share = 1 / classes
    expected = batch * share * (1 - share)
    step_of = np.full((2, len(labels)), -1)
    for e, order in enumerate(epochs):
        step_of[e, order.ravel()] = np.repeat(np.arange(steps), batch)
    in_both = (step_of >= 0).all(0)
    moved = np.abs(step_of[0, in_both] - step_of[1, in_both]).mean() / steps
    again = np.mean(
        [
            sum(n * (n - 1) for n in np.bincount(step_of[1, row][step_of[1, row] >= 0])) / (batch * (batch - 1))
            for row in epochs[0]
        ]
    )
    return Mixing(float(histograms.var(0).mean() / expected), float(moved), float(again))


def _cells(mixing: Mixing) -> list[str]:
    return [f"{mixing.class_spread:.3f}", f"{mixing.moved:.3f}", f"{100 * mixing.met_again:.3f}"]
