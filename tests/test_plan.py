"""The order of samples is a pure function of (seed, epoch, sample counts), and a partition."""

import itertools
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cfmask.data import plan
from cfmask.errors import UserError
from tools.benchmarks.order import order_quality

counts_of_shards = st.lists(st.integers(0, 40), min_size=1, max_size=12)


def epoch_of(counts, *, lanes, batch_size, seed=0, epoch=0, window_shards=4):
    """(steps, lanes, per lane): the whole epoch."""
    orders = [
        plan.lane_order(
            np.array(counts),
            seed=seed,
            epoch=epoch,
            lane=lane,
            lanes=lanes,
            batch_size=batch_size,
            window_shards=window_shards,
        )
        for lane in range(lanes)
    ]
    return np.stack(orders, axis=1)


@settings(max_examples=300, deadline=None)
@given(
    counts=counts_of_shards,
    lanes=st.sampled_from([1, 2, 3, 4, 8, 16]),
    per_lane=st.integers(1, 5),
    seed=st.integers(0, 2**32 - 1),
    epoch=st.integers(0, 1000),
    window_shards=st.integers(1, 6),
)
def test_an_epoch_is_whole_batches_of_distinct_samples(counts, lanes, per_lane, seed, epoch, window_shards):
    batch = lanes * per_lane
    assume(sum(counts) >= batch)
    order = epoch_of(counts, lanes=lanes, batch_size=batch, seed=seed, epoch=epoch, window_shards=window_shards)
    assert order.shape == (sum(counts) // batch, lanes, per_lane)
    ids = order.ravel()
    assert len(np.unique(ids)) == len(ids)
    assert ids.min() >= 0 and ids.max() < sum(counts)


@settings(max_examples=50, deadline=None)
@given(counts=counts_of_shards, seed=st.integers(0, 99), epoch=st.integers(0, 99))
def test_every_sample_is_used_when_the_batch_divides_the_set(counts, seed, epoch):
    counts = [*counts, -sum(counts) % 8 + 8]
    order = epoch_of(counts, lanes=4, batch_size=8, seed=seed, epoch=epoch)
    assert sorted(order.ravel()) == list(range(sum(counts)))


@pytest.mark.parametrize("lanes", [1, 2, 12, 16])
def test_every_world_size_that_divides_the_lanes_sees_the_same_global_batches(lanes):
    counts = [30, 7, 0, 55, 21]
    whole = epoch_of(counts, lanes=lanes, batch_size=2 * lanes)
    for world_size in plan.divisors(lanes):
        ranks = [whole[:, list(plan.lanes_of_rank(rank, world_size, lanes))] for rank in range(world_size)]
        assert {rank.shape for rank in ranks} == {(len(whole), lanes // world_size, 2)}
        assert np.array_equal(np.concatenate(ranks, axis=1), whole)


def test_orders_differ_between_epochs_and_between_seeds():
    counts = [100] * 10
    epochs = {(s, e): epoch_of(counts, lanes=4, batch_size=32, seed=s, epoch=e) for s in range(3) for e in range(4)}
    flat = [order.ravel() for order in epochs.values()]
    for i, a in enumerate(flat):
        assert np.array_equal(a, epoch_of(counts, lanes=4, batch_size=32, seed=i // 4, epoch=i % 4).ravel())
        for b in flat[i + 1 :]:
            # Two random permutations agree in one place on average.
            assert np.count_nonzero(a == b) < 12


@pytest.mark.parametrize("counts", [[101], [25, 26, 50]])
def test_samples_left_out_differ_between_epochs(counts):
    missed = np.zeros(101, int)
    for epoch in range(400):
        used = epoch_of(counts, lanes=2, batch_size=8, epoch=epoch).ravel()
        missed[np.setdiff1d(np.arange(101), used)] += 1
    assert missed.sum() == 400 * (101 % 8)
    expected = 400 * 5 / 101
    assert missed.min() > 0 and missed.max() < 3 * expected


def test_a_lane_has_few_shards_open_at_a_time():
    size, window_shards = 50, 4
    order = epoch_of([size] * 64, lanes=4, batch_size=32, window_shards=window_shards)
    for lane in range(4):
        shards = order[:, lane].ravel() // size
        window = window_shards * size
        for begin in range(0, len(shards) - window, 37):
            # A window begins in the middle of a shard, and any stretch of its length overlaps two windows.
            assert len(np.unique(shards[begin : begin + window])) <= 2 * (window_shards + 1)
        assert len(np.unique(shards)) <= len(shards) / size + 2


def test_neighbours_on_disk_are_spread_over_the_window():
    """Mean distance of neighbours is that of a random permutation of the window, a third of its length."""
    order = epoch_of([100] * 32, lanes=1, batch_size=16, window_shards=8).ravel()
    place = np.argsort(order)
    distance = np.abs(np.diff(place))
    same_window = distance < 800
    assert distance[same_window].mean() == pytest.approx(800 / 3, rel=0.1)


def test_the_order_does_not_change_with_a_release_of_numpy():
    """Pinned: a run that resumes after an upgrade must find the order it left."""
    order = epoch_of([5, 3, 4], lanes=2, batch_size=4, seed=7, epoch=3)
    assert order.tolist() == [[[4, 0], [11, 5]], [[2, 7], [10, 8]], [[1, 3], [6, 9]]]


@settings(max_examples=300, deadline=None)
@given(
    counts=counts_of_shards,
    lanes=st.sampled_from([1, 2, 4, 6, 12, 16]),
    per_lane=st.integers(1, 5),
    micro=st.integers(0, 3),
    seed=st.integers(0, 2**32 - 1),
    epoch=st.integers(0, 50),
    data=st.data(),
)
def test_a_run_with_any_interruptions_consumes_what_an_uninterrupted_one_does(
    counts, lanes, per_lane, micro, seed, epoch, data
):
    """From any resume point on any number of ranks, each with micro-batches of its own, changed at every restart."""
    batch = lanes * per_lane
    assume(sum(counts) >= batch)
    whole = epoch_of(counts, lanes=lanes, batch_size=batch, seed=seed, epoch=epoch)
    seen, step = [], 0
    while step < len(whole):
        world_size = data.draw(st.sampled_from(plan.divisors(lanes)))
        until = data.draw(st.integers(step + 1, len(whole)))
        # A rank plans its own lanes alone, and begins where the last attempt ended.
        ranks = [
            [
                plan.lane_order(np.array(counts), seed=seed, epoch=epoch, lane=lane, lanes=lanes, batch_size=batch)[
                    step:until
                ]
                for lane in plan.lanes_of_rank(rank, world_size, lanes)
            ]
            for rank in range(world_size)
        ]
        seen.append(np.stack([order for rank in ranks for order in rank], axis=1))
        step = until
    assert np.array_equal(np.concatenate(seen), whole)
    assert len(np.unique(whole)) == whole.size


def imagenet_counts():
    counts = np.full(1282, 1_281_167 // 1282)
    counts[: 1_281_167 % 1282] += 1
    return counts


@pytest.mark.parametrize("rank", [0, 1234, 4095])
def test_planning_imagenet_for_4096_ranks_is_cheap_on_each(rank):
    counts = imagenet_counts()
    [lane] = plan.lanes_of_rank(rank, 4096, 4096)
    tracemalloc.start()
    begun = time.process_time()
    order = plan.lane_order(counts, seed=0, epoch=3, lane=lane, lanes=4096, batch_size=4096 * 8)
    seconds, (_, peak) = time.process_time() - begun, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert order.shape == (39, 8)
    assert seconds < 1 and peak < 100e6


def test_4096_ranks_partition_imagenet():
    counts = imagenet_counts()
    orders = [
        plan.lane_order(counts, seed=0, epoch=3, lane=lane, lanes=4096, batch_size=4096 * 8) for lane in range(4096)
    ]
    ids = np.concatenate([order.ravel() for order in orders])
    assert len(np.unique(ids)) == len(ids) == 39 * 4096 * 8


def test_a_batch_mixes_classes_and_neighbours_nearly_as_a_full_permutation_does():
    """A converted set: classes spread over shards at random. The numbers are those of `tools/bench.py order`."""
    quality, full = order_quality(shards=320, per_shard=250, lanes=16, batch_size=512, classes=100, window_shards=4)
    assert quality.class_spread == pytest.approx(full.class_spread, rel=0.05)
    assert quality.moved == pytest.approx(full.moved, rel=0.05)  # from one epoch to the next
    assert quality.met_again < 1.2 * full.met_again


def test_draws_of_a_lane_are_keyed_by_seed_epoch_step_and_lane():
    draws = {
        (s, e, t, v): tuple(plan.lane_generator(s, e, t, v).integers(0, 2**62, 2))
        for s in range(3)
        for e in range(3)
        for t in range(3)
        for v in range(3)
    }
    assert len(set(draws.values())) == len(draws)
    for key, value in draws.items():
        assert tuple(plan.lane_generator(*key).integers(0, 2**62, 2)) == value


def test_planning_all_of_imagenet_takes_well_below_a_second():
    counts = np.full(1282, 1_281_167 // 1282)
    counts[: 1_281_167 % 1282] += 1
    begun = time.process_time()
    order = epoch_of(counts, lanes=16, batch_size=512)
    assert time.process_time() - begun < 1.0
    assert order.shape == (2502, 16, 32)
    assert len(np.unique(order)) == order.size


@settings(max_examples=100, deadline=None)
@given(n=st.integers(0, 500), size=st.integers(1, 60), world_size=st.integers(1, 40), start=st.integers(0, 9))
def test_evaluation_has_the_same_batches_for_any_number_of_ranks(n, size, world_size, start):
    dealt = [plan.eval_batches(n, size, rank, world_size, start) for rank in range(world_size)]
    alone = plan.eval_batches(n, size, 0, 1, start)
    rounds = [batch for turn in itertools.zip_longest(*dealt) for batch in turn if batch is not None]
    assert rounds == alone, "in turn, so that what is done after any round is a beginning of the set"
    assert [i for batch in alone for i in batch] == list(range(min(n, start * size), n))
    assert all(len(batch) == size for batch in alone[:-1])
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1


def test_errors_name_the_sizes_that_work():
    with pytest.raises(UserError, match="3 ranks cannot share 16 lanes evenly: use 1, 2, 4, 8 or 16 ranks"):
        plan.lanes_of_rank(0, 3, 16)
    with pytest.raises(
        UserError, match="a global batch of 20 cannot be made of 16 equal lanes: use 1, 2, 4, 5, 10 or 20"
    ):
        plan.samples_per_lane(20, 16)
    with pytest.raises(
        UserError, match="10 samples do not fill one global batch of 16: choose a batch size of at most 10"
    ):
        epoch_of([10], lanes=4, batch_size=16)
    with pytest.raises(UserError, match="0 … 2\\*\\*32 - 1"):
        plan.lane_generator(-1, 0, 0, 0)
