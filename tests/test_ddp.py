"""Two real processes over gloo: the loss and gradients of one process on the same lanes."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from cfmask.errors import UserError
from cfmask.masking.fills import concat
from cfmask.recipe import Method
from cfmask.runtime import network, rendezvous
from cfmask.runtime.distributed import DistributedContext, process_group
from cfmask.step import training_step
from cfmask.training.ddp import data_parallel
from made import run_ranks
from test_step import METHODS, make_batch, name_of, resolved, student_and_teachers
from towers import B32, TINY

LANES, RANKS, PER_LANE = 4, 2, 3


def joined(lanes: list) -> tuple:
    return (
        torch.cat([images for images, _, _ in lanes]),
        torch.cat([labels for _, labels, _ in lanes]),
        concat([draws for _, _, draws in lanes]),
    )


def gradients_of_a_rank(rank: int, folder: Path) -> None:
    """Every method in turn, with a rank's lanes as two micro-batches; steps follow each other on one DDP."""
    with process_group(DistributedContext(rank=rank, world_size=RANKS), folder / "rendezvous"):
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
    run_ranks(gradients_of_a_rank, RANKS, folder)
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


def test_a_loss_that_is_not_finite_on_one_rank_makes_gradients_not_finite_on_all(tmp_path):
    run_ranks(gradients_beside_a_bad_sample, RANKS, tmp_path)
    for rank in range(RANKS):
        loss, norm = torch.load(tmp_path / f"{rank}.pt")
        assert loss.isfinite() == (rank != 1) and not norm.isfinite()


def gradients_beside_a_bad_sample(rank: int, folder: Path) -> None:
    with process_group(DistributedContext(rank=rank, world_size=RANKS), folder / "rendezvous"):
        method = resolved(Method(mask="random"))
        student, teachers, normalise = student_and_teachers(TINY, method)
        images, labels, draws = make_batch(TINY, method, PER_LANE, seed=rank)
        if rank == 1:
            images[0, 0, 0, 0] = torch.inf
        metrics = training_step(DistributedDataParallel(student), teachers, normalise, images, labels, draws, method)
        norm = torch.nn.utils.get_total_norm([p.grad for p in student.parameters()])
        torch.save((metrics.loss, norm), folder / f"{rank}.pt")


# --- before the first step --------------------------------------------------------------------------------------------


def gradients_of_two_steps(rank: int, folder: Path) -> None:
    """The state after the warm-up, and the gradients of a batch in the first step and in the second."""
    with process_group(DistributedContext(rank=rank, world_size=3), folder / "rendezvous"):
        method = resolved(Method(mask="random"))
        model, teachers, normalise = student_and_teachers(B32, method)
        for each in (model, teachers.pretrained, normalise):
            each.float()
        passes = []
        model.visual.conv1.register_forward_hook(lambda *_: passes.append(1))
        wrapped = data_parallel(model, torch.device("cpu"))
        found = {
            "passes": len(passes),
            "gradients": [name for name, parameter in model.named_parameters() if parameter.grad is not None],
            "forward": "forward" in vars(model),
            "rebuilt": wrapped._has_rebuilt_buckets,
        }
        images, labels, draws = make_batch(B32, method, PER_LANE, seed=rank)
        for step in (1, 2):
            training_step(wrapped, teachers, normalise, images.float(), labels, draws, method)
            found[step] = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
            wrapped.zero_grad()
        torch.save(found, folder / f"{rank}.pt")


def test_the_first_step_sums_in_the_order_of_later_ones_and_no_layer_runs_before_it(tmp_path):
    """With three ranks the order in which an all-reduce adds depends on where in a bucket a gradient lies."""
    run_ranks(gradients_of_two_steps, 3, tmp_path)
    for rank in range(3):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert (found["passes"], found["gradients"], found["forward"], found["rebuilt"]) == (0, [], False, True)
        for name, gradient in found[1].items():
            assert torch.equal(gradient, found[2][name]), name


def test_waiting_ranks_raise_the_reason_of_a_refusal_by_rank_0(tmp_path):
    rendezvous.call_off(tmp_path, "0", "the disk is on fire")
    with (
        pytest.raises(UserError, match="the disk is on fire"),
        process_group(DistributedContext(rank=1, world_size=2), tmp_path),
    ):
        pass


# --- rendezvous ------------------------------------------------------------------------------------------------------


def join_group(
    rank: int, folder: Path, context: DistributedContext, hosts: tuple[str, ...] = (), late_s: float = 0
) -> None:
    """Join a group of two ranks and write the sum of the ranks' numbers, which shows that both have joined."""
    time.sleep(late_s if rank == 0 else 0)
    if hosts:
        rendezvous.own_hosts = lambda: list(hosts)
    with process_group(dataclasses.replace(context, rank=rank, world_size=2), folder / "rendezvous"):
        total = torch.tensor(rank + 1)
        dist.all_reduce(total)
        (folder / f"{context.attempt}-{rank}").write_text(str(total.item()))


def group_formed(folder: Path, attempt: str = "0") -> bool:
    return [(folder / f"{attempt}-{rank}").read_text() for rank in range(2)] == ["3", "3"]


@pytest.mark.parametrize(
    "left",
    [{"hosts": ["127.0.0.1"], "rendezvous_port": 1, "port": 1, "token": "t"}, {"host": "127.0.0.1", "port": 1}],
    ids=["nobody there", "another version"],
)
def test_the_rendezvous_file_of_a_killed_start_is_ignored(tmp_path, left):
    (tmp_path / "rendezvous").mkdir()
    (tmp_path / "rendezvous/0.json").write_text(json.dumps(left))
    run_ranks(join_group, 2, tmp_path, DistributedContext(), (), 1)
    assert group_formed(tmp_path)


@pytest.mark.parametrize(
    "hosts", [("::1",), ("203.0.113.1", "no-such-host.invalid", "127.0.0.1")], ids=["IPv6", "first ones unreachable"]
)
def test_rank_0_is_found_at_the_first_reachable_address(tmp_path, hosts):
    run_ranks(join_group, 2, tmp_path, DistributedContext(nodes=2), hosts)
    assert group_formed(tmp_path)


def test_jobs_on_one_machine_form_separate_groups(tmp_path):
    jobs = [
        run_ranks(join_group, 2, tmp_path, DistributedContext(attempt=name), join=False) for name in ("71-0", "72-0")
    ]
    for job in jobs:
        while not job.join():
            pass
    assert group_formed(tmp_path, "71-0") and group_formed(tmp_path, "72-0")
    assert not list((tmp_path / "rendezvous").iterdir()), "rendezvous files are removed"


@pytest.mark.parametrize("said", [None, b"", b"wrong token, and more of it than was asked for"])
def test_a_server_without_the_token_is_not_taken_for_rank_0(monkeypatch, said):
    monkeypatch.setattr(rendezvous, "_CONNECT_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            visitor, _ = server.accept()
            if said is None:
                time.sleep(2)
            else:
                visitor.sendall(said)
            visitor.close()

        threading.Thread(target=answer, daemon=True).start()
        assert rendezvous.probe("127.0.0.1", server.getsockname()[1], "token") is None


def test_missing_ranks_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(rendezvous, "RENDEZVOUS_TIMEOUT", timedelta(seconds=1))
    with pytest.raises(TimeoutError, match="2 of 3 ranks did not come.*rank 1, rank 2"):
        with process_group(DistributedContext(world_size=3), tmp_path):
            pass
    with pytest.raises(TimeoutError, match="rank 0 published no address"):
        with process_group(DistributedContext(rank=1, world_size=2), tmp_path):
            pass


def test_a_missing_interface_is_reported_with_the_existing_ones(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo,ib7")
    with pytest.raises(UserError, match=r"no network interface ib7 .* lo \(127.0.0.1\)"):
        with process_group(DistributedContext(nodes=2, world_size=2), tmp_path):
            pass
    monkeypatch.setattr(network, "interface_addresses", lambda: [("lo", "127.0.0.1"), ("ib7", "10.0.0.7")])
    assert network.own_hosts() == ["127.0.0.1", "10.0.0.7"], "gloo takes a list"


@pytest.mark.parametrize("addresses", ["10.77.0.{}/24", "fd77::{}/64"], ids=["IPv4", "IPv6 only"])
def test_machines_with_unknown_host_names_form_a_group(tmp_path, addresses):
    """Two network namespaces: each has a bridge with the same address, as Docker makes it, and a host name that the
    other cannot resolve."""
    names = [f"cfmask-{os.getpid()}-{i}" for i in range(2)]
    try:
        _make_machines(names, addresses)
        ranks = [
            subprocess.Popen(
                [
                    *("ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", 'hostname "$0"; exec "$@"', name),
                    *(sys.executable, "-c", f"import test_ddp; test_ddp.join_on_a_machine({rank}, {str(tmp_path)!r})"),
                ],
                env={**os.environ, "PYTHONPATH": f"{Path(__file__).parent}:{os.environ['PYTHONPATH']}"},
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank, name in enumerate(names)
        ]
        errors = [rank.communicate(timeout=300)[1] for rank in ranks]
        assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(errors)
        assert group_formed(tmp_path)
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def join_on_a_machine(rank: int, folder: str) -> None:
    rendezvous._CONNECT_S = 1
    join_group(rank, Path(folder), DistributedContext(nodes=2))


def _make_machines(names: list[str], addresses: str) -> None:
    def ip(*words: object) -> None:
        done = subprocess.run(["ip", *map(str, words)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"networks of its own need root: ip {' '.join(map(str, words))}: {done.stderr.strip()}")

    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("networks of its own need root, and iproute2")
    for name in names:
        ip("netns", "add", name)
    ip("link", "add", "eth7", "netns", names[0], "type", "veth", "peer", "name", "eth7", "netns", names[1])
    for i, name in enumerate(names):
        here = ("-n", name)
        ip(*here, "link", "set", "lo", "up")
        ip(*here, "link", "add", "docker0", "type", "veth", "peer", "name", "container0")
        ip(*here, "address", "add", "172.17.0.1/16", "dev", "docker0")
        ip(*here, "link", "set", "docker0", "up")
        ip(*here, "address", "add", addresses.format(i + 1), "dev", "eth7", *(["nodad"] if ":" in addresses else []))
        ip(*here, "link", "set", "eth7", "up")
