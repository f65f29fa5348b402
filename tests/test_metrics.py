"""The reduction of named metrics: what each rank receives, and when."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import made
from cfmask.data import receipts
from cfmask.metrics import AsyncMetricReducer, Mean, StepResult, Sum, step_metrics, stop_metrics, stop_of
from cfmask.runtime.distributed import DistributedContext, process_group
from cfmask.session import QUIT, REQUEUE

RANKS = 3
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory) -> dict[str, list]:
    """What the functions below return on each rank of a group, by their names."""
    folder = tmp_path_factory.mktemp("ranks")
    made.run_ranks(_on_a_rank, RANKS, folder)
    by_rank = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]
    return {name: [of_rank[name] for of_rank in by_rank] for name in by_rank[0]}


def _on_a_rank(rank: int, folder: Path) -> None:
    functions = (sums_and_means, sent_by_ranks_of_different_speed, requests)
    with process_group(DistributedContext(rank=rank, world_size=RANKS), folder / "rendezvous"):
        torch.save({function.__name__: function(rank, folder) for function in functions}, folder / f"{rank}.pt")


class Copied:
    """A CUDA event, where there is no CUDA."""

    def __init__(self, blocking: bool) -> None:
        self.recorded = False

    def record(self) -> None:
        self.recorded = True

    def synchronize(self) -> None:
        assert self.recorded


@pytest.fixture(params=["as on a CPU", "as on a GPU"])
def reducer(request, tmp_path, monkeypatch) -> Iterator[AsyncMetricReducer]:
    """In a group of this process; also with what it does on a GPU: staged numbers, a side stream, events."""
    with process_group(DistributedContext(), tmp_path / "rendezvous"):
        made = AsyncMetricReducer(CPU)
        if request.param == "as on a GPU":
            empty = torch.empty
            monkeypatch.setattr(torch, "empty", lambda *sizes, pin_memory=False, **named: empty(*sizes, **named))
            monkeypatch.setattr(torch.cuda, "Event", Copied)
            monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
            made._stream = object()
        yield made


def sums_and_means(rank: int, folder: Path):
    reducer = AsyncMetricReducer(CPU)
    for step in (1, 2):
        for part in range(2):
            value = torch.tensor(float(10 * step + 2 * rank + part))
            metrics = {
                "loss": Mean(value),
                "seen": Sum(4 + rank),
                "digits": Sum(torch.tensor([value, 1.0, 2047.0])),
                "grid": Sum(torch.full((2, 2), rank)),
                "right": Sum(torch.tensor(3)),
            }
            reducer.add(metrics)
        reducer.add({"norm": Mean(torch.tensor(0.5)), "late": Sum(rank == 1)})
        reducer.send(step)
    return reducer.receive()


def test_every_rank_receives_the_same_sums_and_means_by_name(on_ranks):
    by_rank = on_ranks["sums_and_means"]
    for received in by_rank:
        assert [r.step for r in received] == [1, 2]
        for reduced in received:
            first = 10 * reduced.step
            added = [first + 2 * rank + part for rank in range(RANKS) for part in range(2)]
            assert reduced.scalar("loss") == sum(added) / len(added)
            assert reduced.scalar("seen") == 2 * (4 + 5 + 6)
            assert reduced.values["digits"] == [sum(added), 6.0, 6 * 2047.0]
            assert reduced.values["grid"] == [6.0] * 4
            assert reduced.scalar("right") == 18
            assert reduced.scalar("norm") == 0.5 and reduced.scalar("late") == 1
            assert set(reduced.means) == {"loss", "norm"}
    assert [[r.values for r in of_rank] for of_rank in by_rank] == [[r.values for r in by_rank[0]]] * RANKS


def sent_by_ranks_of_different_speed(rank: int, folder: Path):
    """Whether the others had sent their last step before rank 2 sent its; what was read before it and afterwards."""
    reducer, early, in_time = AsyncMetricReducer(CPU), [], True
    for step in range(1, 5):
        reducer.add({"step": Sum(step)})
        if rank == 2 and step == 4:
            deadline = time.monotonic() + 60
            while len(list(folder.glob("*.sent"))) < 2 and time.monotonic() < deadline:
                time.sleep(0.01)
            in_time = time.monotonic() < deadline
        reducer.send(step)
        if step == 4:
            (folder / f"{rank}.sent").touch()
        early += reducer.receive(before=step)
    return in_time, early, reducer.receive(), reducer.receive()


def test_sending_waits_for_no_rank_and_steps_are_read_once_in_their_order(on_ranks):
    for in_time, early, rest, nothing in on_ranks["sent_by_ranks_of_different_speed"]:
        assert in_time, "sending waited for the slowest rank"
        assert [(r.step, r.scalar("step")) for r in early] == [(1, 3), (2, 6), (3, 9)]
        assert [(r.step, r.scalar("step")) for r in rest] == [(4, 12)]
        assert nothing == []


def requests(rank: int, folder: Path):
    reducer = AsyncMetricReducer(CPU)
    asked = [(None, None, None), (None, REQUEUE, None), (REQUEUE, None, QUIT)]
    for step, of_ranks in enumerate(asked):
        reducer.add(stop_metrics(of_ranks[rank]))
        reducer.send(step)
    return [stop_of(reduced) for reduced in reducer.receive()]


def test_a_request_of_one_rank_counts_for_all_and_quit_overrules_requeue(on_ranks):
    assert on_ranks["requests"] == [[None, REQUEUE, QUIT]] * RANKS


def test_values_are_those_of_the_time_of_sending(reducer):
    value = torch.tensor([1.0, 2.0])
    reducer.add({"value": Sum(value)})
    value.fill_(9.0)
    reducer.send(1)
    value.fill_(7.0)
    reducer.add({"value": Sum(value)})
    reducer.send(2)
    first, second = reducer.receive()
    assert first.values == {"value": [1.0, 2.0]} and second.values == {"value": [7.0, 7.0]}
    assert first.time <= second.time


def test_memory_of_results_is_reused_only_after_they_are_read(reducer):
    for step in range(1, 8):
        for _ in range(2):
            reducer.add({"value": Sum(torch.tensor([step, 1.0])), "number": Mean(step)})
        reducer.send(step)
        for reduced in reducer.receive(before=step - 1):  # two steps late
            assert reduced.values == {"value": [2.0 * reduced.step, 2.0], "number": [reduced.step]}
    assert [reduced.scalar("number") for reduced in reducer.receive()] == [6, 7]
    assert len(reducer._free) == (0 if reducer._stream is None else 3)


def test_steps_may_have_different_metrics_and_a_graph_is_not_kept(reducer):
    weight = torch.ones((), requires_grad=True)
    reducer.add({"loss": Mean(2 * weight)})
    reducer.send(1)
    reducer.add({"other": Sum(3)})
    reducer.send(2)
    assert [reduced.values for reduced in reducer.receive()] == [{"loss": [2.0]}, {"other": [3.0]}]


def test_a_name_that_is_added_in_two_ways_is_refused(reducer):
    reducer.add({"loss": Mean(torch.tensor(1.0))})
    reducer.add({"loss": Mean(1.0)})
    with pytest.raises(ValueError, match="metrics of step 7 were added in different ways: loss, loss"):
        reducer.send(7)


def test_a_receipt_is_summed_exactly_and_a_norm_that_is_not_finite_is_a_skipped_step(reducer):
    values = [receipts.receipt([f"{part}-{i}" for i in range(8)], epoch=3) for part in range(4)]
    for norm in (2.5, float("nan"), float("inf")):
        for value in values:
            receipt = torch.tensor(receipts.to_digits(value), dtype=torch.float32)
            reducer.add({"samples": Sum(8), "receipt": Sum(receipt), "bad": Sum(1)})
        reducer.add(step_metrics(torch.tensor(norm), stop=None, overdue=True))
        reducer.send(1)
    results = [StepResult.of(reduced) for reduced in reducer.receive()]
    assert [result.skipped for result in results] == [False, True, True]
    for result in results:
        assert (result.samples, result.bad, result.stop, result.overdue) == (32, 4, None, True)
        assert result.receipt == sum(values) % receipts.MODULUS


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_results_arrive_while_the_device_is_busy_and_nothing_waits_for_it(tmp_path):
    context = DistributedContext(gpu=True)
    with process_group(context, tmp_path / "rendezvous"):
        device = context.device
        reducer = AsyncMetricReducer(device)
        work = torch.randn(8192, 8192, device=device)

        def step(number: int) -> None:
            reducer.add({"loss": Mean(torch.full((), float(number), device=device)), "seen": Sum(4)})
            reducer.add({"digits": Sum(torch.tensor([1.0, number])), "norm": Mean(work[0, 0].abs())})
            reducer.send(number)

        for number in range(1, 3):  # NCCL sets itself up, and memory is taken
            step(number)
        reducer.receive()
        torch.cuda.synchronize()
        busy = torch.cuda.Event()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(3)
            for _ in range(40):
                work @ work
            step(4)
            busy.record()
            [third] = reducer.receive(before=4)
            assert not busy.query(), "step 3 was read after step 4 was over"
            [fourth] = reducer.receive()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for number, reduced in ((3, third), (4, fourth)):
            assert reduced.scalar("loss") == number and reduced.scalar("seen") == 4
            assert reduced.values["digits"] == [1.0, number]
            assert reduced.scalar("norm") == pytest.approx(float(work[0, 0].abs()))
