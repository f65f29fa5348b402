"""Checkpoints: bit for bit, the newest whole one, and a full disk that costs nothing but the newest."""

from __future__ import annotations

import os
import subprocess

import pytest
import torch

from cfmask import checkpoint
from cfmask.data.receipts import MODULUS, Consumed
from cfmask.optim import Phase, Skips, adamw
from cfmask.recipe import Optim
from towers import TINY

PHASE = Phase(0, 10, tower=True, lr=1e-3, weight_decay=0.1)


def state(step: int) -> checkpoint.State:
    return checkpoint.State(step, "0123", Consumed(samples=48, receipt=MODULUS - 7, bad_in_epoch=1), Skips(2, 1))


def trained(steps: int = 3):
    model = TINY.classifier()
    optimizer = adamw(model.parameters(), PHASE, Optim())
    for seed in range(steps):
        torch.manual_seed(seed)
        model(torch.randn(2, 3, TINY.image, TINY.image))[1].square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def test_weights_and_moments_come_back_bit_for_bit_and_continue_alike(tmp_path):
    model, optimizer = trained()
    checkpoint.save(tmp_path, state(5), model, TINY.info(), optimizer, keep=2)
    other = TINY.classifier(seed=9)
    restored = adamw(other.parameters(), PHASE, Optim())
    found = checkpoint.latest(tmp_path)
    assert found is not None and found.updates == 3, "two of five steps were left out"
    assert vars(state(5)).items() <= vars(found).items()
    checkpoint.restore_weights(found, other)
    checkpoint.restore_optimizer(found, other, restored)
    for m, o in ((model, optimizer), (other, restored)):
        torch.manual_seed(7)
        m(torch.randn(2, 3, TINY.image, TINY.image))[1].square().mean().backward()
        o.step()
    for ours, theirs in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_only_the_latest_are_kept(tmp_path):
    model, optimizer = trained(1)
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, state(step), model, TINY.info(), optimizer, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_a_torn_checkpoint_is_recognised_and_the_one_before_used(tmp_path, file, damage):
    model, optimizer = trained(1)
    for step in (1, 2):
        newest = checkpoint.save(tmp_path, state(step), model, TINY.info(), optimizer, keep=2)
    target = newest / file
    data = bytearray(target.read_bytes())
    if damage == "cut":
        target.write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        data[len(data) // 2] ^= 1
        target.write_bytes(data)
    else:
        target.unlink()
    said: list[str] = []
    found = checkpoint.latest(tmp_path, report=said.append)
    assert found is not None and found.step == 1
    assert len(said) == 1 and str(newest) in said[0]


def test_a_folder_left_by_a_kill_is_no_checkpoint_and_is_cleaned_up(tmp_path):
    model, optimizer = trained(1)
    (tmp_path / ".step-00000005.123").mkdir()
    assert checkpoint.latest(tmp_path) is None
    checkpoint.save(tmp_path, state(6), model, TINY.info(), optimizer, keep=2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000006"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system with room for one checkpoint and a half."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("this machine allows no mount")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_is_said_and_leaves_earlier_checkpoints_intact(small_disk):
    model, optimizer = trained(1)
    checkpoint.save(small_disk, state(1), model, TINY.info(), optimizer, keep=2)
    with pytest.raises(
        checkpoint.CheckpointNotWritten, match="No space left on device.*Earlier checkpoints are intact"
    ):
        checkpoint.save(small_disk, state(2), model, TINY.info(), optimizer, keep=2)
    assert [p.name for p in small_disk.iterdir()] == ["step-00000001"]
    found = checkpoint.latest(small_disk)
    assert found is not None and found.step == 1
