"""A run whose files are unreadable or lost does not restart at step 0 by itself, and keeps its logs."""

from __future__ import annotations

import dataclasses
import errno
import os

import pytest
from safetensors.torch import load_file

import cfmask.training.train
import made
from cfmask.errors import UserError
from cfmask.recipe import Data, Method, Model, Optim, Recipe, Run
from cfmask.runs import RunFolder
from cfmask.runtime.distributed import DistributedContext
from cfmask.runtime.jsonl import read_lines


@pytest.fixture(scope="module")
def materials(tmp_path_factory):
    return made.make_materials(tmp_path_factory.mktemp("materials"))


def recipe_of(materials) -> Recipe:
    return Recipe(
        model=Model(name=str(materials / "tiny.json"), pretrained=str(materials / "tiny.safetensors")),
        method=Method(name="vanilla"),
        data=Data(shards=str(materials / "shards"), loader_workers=0),
        optim=Optim(epochs=2, batch_size=16, lanes=4, warmup_steps=2, lr=1e-3, micro_batches=2),
        run=Run(precision="fp32", checkpoint_steps=4, keep_checkpoints=2, log_steps=1),
    ).resolved()


def train(materials, folder, stop_at=None):
    return made.train(recipe_of(materials), folder, stop_at)


def start_again(run: RunFolder, stop_request=lambda: None) -> None:
    """As a requeued job does: with what the run folder says."""
    cfmask.training.train.train(run.recipe(), run, DistributedContext(), stop_request)


def records(run) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run.log, run.receipts, run.committed)}


def failing_read(monkeypatch, name: str) -> None:
    """Let reads of files with this name in a checkpoint fail."""
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


def test_lost_or_unreadable_checkpoints_end_a_start_and_from_step_0_restarts(materials, tmp_path, monkeypatch, capsys):
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
    with pytest.raises(UserError, match="has no intact checkpoint in .*--from-step-0"):
        train(materials, run.root)
    assert records(run) == before and not run.checkpoints.exists()

    run.allow_step_0()
    train(materials, run.root, stop_at=5)
    assert not run.step_0_allowed() and read_lines(run.attempts)[-1]["from_step"] == 0
    train(materials, run.root)
    assert [line["step"] for line in read_lines(run.receipts)] == list(range(1, 13))
    ours, theirs = load_file(run.final), load_file(whole.final)
    assert all(ours[name].equal(theirs[name]) for name in theirs)


def test_a_changed_recipe_or_teacher_is_refused(materials, tmp_path):
    whole = train(materials, tmp_path / "whole")
    run = train(materials, tmp_path / "run", stop_at=5)
    before, recipe, initial = records(run), run.recipe(), run.initial.read_bytes()

    run.record_recipe(dataclasses.replace(recipe, optim=dataclasses.replace(recipe.optim, lr=3e-3)))
    with pytest.raises(UserError, match="optim.lr: 0.001 → 0.003"):
        start_again(run)
    run.record_recipe(recipe)
    run.initial.write_bytes(initial[:-1] + bytes([initial[-1] ^ 1]))
    with pytest.raises(UserError, match="initial.safetensors: "):
        start_again(run)
    run.initial.write_bytes(initial)
    assert records(run) == before

    # log_steps does not change weights.
    run.record_recipe(dataclasses.replace(recipe, run=dataclasses.replace(recipe.run, log_steps=2)))
    start_again(run)
    ours, theirs = load_file(run.final), load_file(whole.final)
    assert all(ours[name].equal(theirs[name]) for name in theirs)


def test_a_restart_at_step_0_survives_a_kill_before_its_first_checkpoint(materials, tmp_path):
    run = train(materials, tmp_path / "run", stop_at=9)
    for path in run.checkpoints.glob("step-*/model.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="has no intact checkpoint in .*--from-step-0"):
        start_again(run)

    def killed():
        raise KeyboardInterrupt

    run.allow_step_0()
    with pytest.raises(KeyboardInterrupt):
        start_again(run, killed)
    start_again(run)
    assert [line["from_step"] for line in read_lines(run.attempts)][-2:] == [0, 0]
    assert run.results.exists()


def test_unreadable_attempt_records_end_a_start_with_an_error(materials, tmp_path, monkeypatch, capsys):
    run = train(materials, tmp_path / "run", stop_at=5)
    before = records(run)
    monkeypatch.setenv("CFMASK_READ_PATIENCE", "0.1")

    def failing(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(cfmask.runtime.attempts, "read_lines", failing)
    with pytest.raises(UserError, match="attempts.jsonl cannot be read .Input/output error; tried for"):
        start_again(run)
    assert "attempts.jsonl cannot be read (Input/output error): failed: StorageUnavailable" in capsys.readouterr().err
    assert records(run) == before


def test_only_from_step_0_restarts_at_step_0(materials, tmp_path):
    run = train(materials, tmp_path / "run", stop_at=9)
    run.checkpoints.rename(tmp_path / "away")
    command = ("--resume", run.root, "--executor", "local", "--gpus-per-node", 0)
    run.allow_step_0()  # as by a submission whose job never started
    refused = made.submit(*command, check=False)
    assert refused.returncode == 1
    assert f"python launch/submit.py --resume {run.root} --from-step-0" in refused.stdout
    made.submit(*command, "--from-step-0")
    assert read_lines(run.attempts)[-1]["from_step"] == 0 and not run.step_0_allowed()
    assert [line["step"] for line in read_lines(run.receipts)] == list(range(1, 13))
    useless = made.submit("--run", tmp_path / "other", "--from-step-0", check=False)
    assert useless.returncode == 2 and "--from-step-0 would do nothing" in useless.stderr
