"""Two real processes over gloo: the loss and gradients of one process on the same lanes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from cfmask.distributed import Place, call_off, process_group
from cfmask.errors import UserError
from cfmask.masking.fills import concat
from cfmask.recipe import Method
from cfmask.step import training_step
from test_step import METHODS, make_batch, name_of, resolved, student_and_teachers
from towers import TINY

LANES, RANKS, PER_LANE = 4, 2, 3


def joined(lanes: list) -> tuple:
    return (
        torch.cat([images for images, _, _ in lanes]),
        torch.cat([labels for _, labels, _ in lanes]),
        concat([draws for _, _, draws in lanes]),
    )


def gradients_of_a_rank(rank: int, folder: Path) -> None:
    """Every method in turn, with a rank's lanes as two micro-batches; steps follow each other on one DDP."""
    torch.set_num_threads(1)
    with process_group(Place(rank=rank, world_size=RANKS), folder / "meeting"):
        student, _, normalise = student_and_teachers(TINY, Method())
        wrapped = DistributedDataParallel(student)
        results = {}
        for method in map(resolved, METHODS):
            _, teachers, _ = student_and_teachers(TINY, method)
            lanes = [make_batch(TINY, method, PER_LANE, seed=lane) for lane in range(LANES)]
            own = lanes[rank * LANES // RANKS : (rank + 1) * LANES // RANKS]
            losses = []
            for i, lane in enumerate(own):
                metrics = training_step(
                    wrapped,
                    teachers,
                    normalise,
                    *lane,
                    method,
                    weight=1 / len(own),
                    synchronise=i == len(own) - 1,
                )
                losses.append(metrics.loss)
            loss = torch.stack(losses).mean()
            dist.all_reduce(loss)
            gradients = {name: parameter.grad.clone() for name, parameter in student.named_parameters()}
            results[name_of(method)] = (loss / RANKS, gradients)
            wrapped.zero_grad()
        torch.save(results, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def by_rank(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    mp.start_processes(gradients_of_a_rank, args=(folder,), nprocs=RANKS, start_method="spawn")
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("method", METHODS, ids=name_of)
def test_two_processes_have_the_loss_and_gradients_of_one(by_rank, method):
    method = resolved(method)
    alone, teachers, normalise = student_and_teachers(TINY, method)
    batch = joined([make_batch(TINY, method, PER_LANE, seed=lane) for lane in range(LANES)])
    metrics = training_step(alone, teachers, normalise, *batch, method)
    for results in by_rank:
        loss, gradients = results[name_of(method)]
        torch.testing.assert_close(loss, metrics.loss, rtol=1e-12, atol=0)
        for name, parameter in alone.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-9, atol=1e-13, msg=name)


def test_a_loss_that_is_not_finite_on_one_rank_leaves_no_rank_a_finite_gradient(tmp_path):
    mp.start_processes(gradients_beside_a_bad_sample, args=(tmp_path,), nprocs=RANKS, start_method="spawn")
    for rank in range(RANKS):
        loss, norm = torch.load(tmp_path / f"{rank}.pt")
        assert loss.isfinite() == (rank != 1) and not norm.isfinite()


def gradients_beside_a_bad_sample(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    with process_group(Place(rank=rank, world_size=RANKS), folder / "meeting"):
        method = resolved(Method(mask="random"))
        student, teachers, normalise = student_and_teachers(TINY, method)
        images, labels, draws = make_batch(TINY, method, PER_LANE, seed=rank)
        if rank == 1:
            images[0, 0, 0, 0] = torch.inf
        metrics = training_step(DistributedDataParallel(student), teachers, normalise, images, labels, draws, method)
        norm = torch.nn.utils.get_total_norm([p.grad for p in student.parameters()])
        torch.save((metrics.loss, norm), folder / f"{rank}.pt")


def test_ranks_that_wait_hear_why_rank_zero_gave_up(tmp_path):
    call_off(Place(), tmp_path, "the disk is on fire")
    with pytest.raises(UserError, match="the disk is on fire"), process_group(Place(rank=1, world_size=2), tmp_path):
        pass


def test_an_address_of_an_earlier_attempt_is_not_taken_for_this_ones(tmp_path):
    """A file left by a killed attempt names a port where nobody listens; the group forms all the same."""
    (tmp_path / "meeting").mkdir()
    (tmp_path / "meeting/0.json").write_text('{"host": "127.0.0.1", "port": 1}')
    mp.start_processes(_late_rank_zero, args=(tmp_path,), nprocs=2, start_method="spawn")
    assert {p.name for p in tmp_path.glob("joined-*")} == {"joined-0", "joined-1"}


def _late_rank_zero(rank: int, folder: Path) -> None:
    import time

    if rank == 0:
        time.sleep(2)
    with process_group(Place(rank=rank, world_size=2), folder / "meeting"):
        (folder / f"joined-{rank}").touch()
