"""A run whose files cannot be read, or are gone, does not begin again by itself and keeps its logs."""

from __future__ import annotations

import errno
import os

import pytest
from safetensors.torch import load_file

import made
from cfmask.errors import UserError
from cfmask.recipe import Data, Method, Model, Optim, Recipe, Run
from cfmask.runtime.jsonl import read_lines


@pytest.fixture(scope="module")
def materials(tmp_path_factory):
    return made.make_materials(tmp_path_factory.mktemp("materials"))


def train(materials, folder, stop_at=None):
    recipe = Recipe(
        model=Model(name=str(materials / "tiny.json"), pretrained=str(materials / "tiny.safetensors")),
        method=Method(name="vanilla"),
        data=Data(shards=str(materials / "shards"), loader_workers=0),
        optim=Optim(epochs=2, batch_size=16, lanes=4, warmup_steps=2, lr=1e-3, micro_batches=2),
        run=Run(precision="fp32", checkpoint_steps=4, keep_checkpoints=2, log_steps=1),
    ).resolved()
    return made.train(recipe, folder, stop_at)


def records(run) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run.log, run.receipts, run.committed)}


def failing_read(monkeypatch, name: str) -> None:
    """Reading files of this name in a checkpoint fails."""
    real, doomed = os.open, set()

    def opened(path, *rest, **more):
        descriptor = real(path, *rest, **more)
        if str(path).endswith(name) and "/step-" in str(path):
            doomed.add(descriptor)
        return descriptor

    def readv(descriptor, buffers, real=os.readv):
        if descriptor in doomed:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(descriptor, buffers)

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "readv", readv)


def test_what_is_lost_or_unreadable_ends_a_start_and_the_flag_begins_again(materials, tmp_path, monkeypatch, capsys):
    whole = train(materials, tmp_path / "whole")
    run = train(materials, tmp_path / "run", stop_at=9)
    before = records(run)
    assert read_lines(run.committed)[-1]["step"] >= 9

    monkeypatch.setenv("CFMASK_READ_PATIENCE", "0.1")
    for name in ("state.json", "model.safetensors", "optimizer.safetensors"):
        with monkeypatch.context() as patch:
            failing_read(patch, name)
            with pytest.raises(UserError, match=f"{name} cannot be read .Input/output error; tried for"):
                train(materials, run.root)
        assert records(run) == before

    run.checkpoints.rename(tmp_path / "away")
    run.initial.rename(tmp_path / "initial")
    with pytest.raises(UserError, match="initial.safetensors is missing"):
        train(materials, run.root)
    (tmp_path / "initial").rename(run.initial)
    with pytest.raises(UserError, match="has no whole checkpoint in .*--from-step-0"):
        train(materials, run.root)
    assert records(run) == before and not run.checkpoints.exists()

    run.allow_step_0()
    train(materials, run.root, stop_at=5)
    assert not run.step_0_allowed() and read_lines(run.attempts)[-1]["from_step"] == 0
    train(materials, run.root)
    assert [line["step"] for line in read_lines(run.receipts)] == list(range(1, 13))
    ours, theirs = load_file(run.final), load_file(whole.final)
    assert all(ours[name].equal(theirs[name]) for name in theirs)
