"""The order of training and evaluation as a pure function: no I/O, no process group, no clock.

An example with 3 shards of 4, 3 and 4 samples, a global batch of 4 and 2 lanes:

    ids           a0 a1 a2 a3 | b0 b1 b2 | c0 c1 c2 c3        a sample's id is its index when shards lie end to end
    epoch order   c0 c1 c2 c3 a0 a1 a2 a3 b0 b1 b2            shards permuted by (seed, epoch)
    rotated       c2 c3 a0 a1 a2 a3 b0 b1 [b2 c0 c1]          start drawn by (seed, epoch); samples beyond whole steps
                                                              are left out, other ones in each epoch
    spans         lane 0: c2 c3 a0 a1   lane 1: a2 a3 b0 b1   equal length, (N // B) * B / lanes
    lane order    a1 c2 | a0 c3         b0 a2 | b1 a3         permuted inside windows of a few shards' length
                  step 0  step 1        step 0  step 1

Rank r of W owns lanes r*V/W … (r+1)*V/W - 1. The order above does not depend on ranks, so the global batch of a step is
the same for every W. The state of the stream is (epoch, step), and a resume slices the order.

Orders are drawn from raw Philox words, which are the same in every version of numpy. Its derived distributions
(shuffle, integers) may change with an upgrade, which would break resumed runs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cfmask.errors import UserError

# First word of a generator's key, by purpose, so that two purposes never share a stream.
_SHARDS, _SPANS, _LANES, CONVERSION = 1, 2, 3, 4


def philox(purpose: int, *words: int) -> np.random.Philox:
    """Counter-based bit generator for (purpose, words); each word in [0, 2**32).

    A purpose must always use the same number of words: numpy's SeedSequence pads with zeros, so (1,) and (1, 0) are the
    same.
    """
    if any(not 0 <= word < 2**32 for word in words):
        raise UserError(f"seeds, epochs and steps must lie in 0 … 2**32 - 1, got {words}.")
    return np.random.Philox(np.random.SeedSequence([purpose, *words]))


def permutation(n: int, bits: np.random.Philox) -> NDArray[np.int64]:
    """A uniform permutation of 0 … n-1, (n,), from the order of n raw 64-bit words."""
    return np.argsort(bits.random_raw(n), kind="stable").astype(np.int64, copy=False)


def lane_generator(seed: int, epoch: int, step: int, lane: int) -> np.random.Generator:
    """The generator of all random draws (masks, donors) of a lane at a step."""
    return np.random.Generator(philox(_LANES, seed, epoch, step, lane))


def steps_per_epoch(num_samples: int, batch_size: int) -> int:
    """Whole global batches in an epoch: num_samples // batch_size.

    Raises:
        UserError: fewer samples than a batch.
    """
    if num_samples < batch_size:
        raise UserError(
            f"{num_samples} samples do not fill one global batch of {batch_size}: "
            f"choose a batch size of at most {num_samples}, or convert more images."
        )
    return num_samples // batch_size


def lanes_of_rank(rank: int, world_size: int, lanes: int) -> range:
    """The consecutive lanes that a rank owns. Raises UserError if the world size does not divide the number of
    lanes."""
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} of world size {world_size}")
    if lanes % world_size:
        raise UserError(
            f"{world_size} ranks cannot share {lanes} lanes evenly: use {_listed(divisors(lanes))} ranks, "
            f"or a number of lanes that {world_size} divides."
        )
    owned = lanes // world_size
    return range(rank * owned, (rank + 1) * owned)


def samples_per_lane(batch_size: int, lanes: int) -> int:
    """Samples of a lane in a step: batch_size / lanes. Raises UserError if that is not a whole number."""
    if lanes < 1 or batch_size < 1 or batch_size % lanes:
        fitting = [n for n in divisors(max(batch_size, 1)) if n <= 64]
        raise UserError(
            f"a global batch of {batch_size} cannot be made of {lanes} equal lanes: "
            f"use {_listed(fitting)} lanes, or a batch size that is a multiple of {max(lanes, 1)}."
        )
    return batch_size // lanes


def lane_order(
    sample_counts: NDArray[np.int64],
    *,
    seed: int,
    epoch: int,
    lane: int,
    lanes: int,
    batch_size: int,
    window_shards: int = 4,
) -> NDArray[np.int64]:
    """Global sample ids of one lane in one epoch.

    Args:
        sample_counts: samples in each shard, in manifest order, (shards,).
        window_shards: length of a shuffle window, in shards of average size. It bounds how many shards a lane has open
            at a time.

    Returns:
        (steps, batch_size // lanes) int64; row t has the lane's samples of step t.

    Raises:
        UserError: lanes do not divide the batch size, or there are fewer samples than a batch.
    """
    counts = np.asarray(sample_counts, np.int64)
    per_lane = samples_per_lane(batch_size, lanes)
    if not 0 <= lane < lanes:
        raise ValueError(f"lane {lane} of {lanes}")
    total = int(counts.sum())
    span = steps_per_epoch(total, batch_size) * per_lane

    bits = philox(_SHARDS, seed, epoch)
    start = int(bits.random_raw()) % total
    shards = permutation(len(counts), bits)

    shuffled = _shuffle_in_windows(
        span,
        window=window_shards * total / len(counts),
        bits=philox(_SPANS, seed, epoch, lane),
    )
    position = (start + lane * span + shuffled) % total

    ends = np.cumsum(counts[shards])
    slot = np.searchsorted(ends, position, side="right")
    first_id = (np.cumsum(counts) - counts)[shards]
    first_position = ends - counts[shards]
    return (first_id[slot] + position - first_position[slot]).reshape(-1, per_lane)


def epoch_order(sample_counts: NDArray[np.int64], *, lanes: int, **settings: Any) -> NDArray[np.int64]:
    """Global sample ids of a whole epoch, (steps, batch size): ``lane_order`` of every lane, side by side."""
    return np.concatenate(
        [lane_order(sample_counts, lane=lane, lanes=lanes, **settings) for lane in range(lanes)], axis=1
    )


def _shuffle_in_windows(n: int, *, window: float, bits: np.random.Philox) -> NDArray[np.int64]:
    """0 … n-1 permuted within equal windows of a length of about ``window``, (n,)."""
    windows = max(1, round(n / max(window, 1.0)))
    bounds = np.linspace(0, n, windows + 1).astype(np.int64)
    keys = bits.random_raw(n)
    order = np.empty(n, np.int64)
    for begin, end in zip(bounds[:-1], bounds[1:], strict=True):
        order[begin:end] = begin + np.argsort(keys[begin:end], kind="stable")
    return order


def eval_batches(num_samples: int, batch_size: int, rank: int, world_size: int, start: int = 0) -> list[range]:
    """The ids of each batch that a rank evaluates.

    Batch b begins with sample b · batch_size; the last one may be smaller. Batches do not depend on the number of
    ranks, so results are bitwise identical for any. From ``start`` on, they are distributed to the ranks in turn: a
    rank may have one fewer than others, or none.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} of world size {world_size}")
    firsts = range(start * batch_size, num_samples, batch_size)[rank::world_size]
    return [range(first, min(first + batch_size, num_samples)) for first in firsts]


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _listed(numbers: list[int]) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{', '.join(map(str, numbers[:-1]))} or {numbers[-1]}"
