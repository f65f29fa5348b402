"""Samples that cannot be read during training are replaced and reported; too many of them end the run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import made
from cfmask.data import shard_index
from cfmask.runtime.jsonl import read_lines
from tools import audit

STEPS = 6  # an epoch


@pytest.fixture(scope="module")
def materials(tmp_path_factory) -> Path:
    """A set of ten shards; in "shards" one bit of an image is flipped."""
    root = made.make_materials(tmp_path_factory.mktemp("materials"))
    shutil.copytree(root / "shards", root / "whole")
    rot(root / "shards/train/train-000004.tar", row=3)
    return root


def rot(tar: Path, row: int) -> str:
    """Flip a bit of a row's image; returns its key."""
    index = shard_index.load_index(tar)
    data = bytearray(tar.read_bytes())
    data[index.offset[index.image[row]] + 40] ^= 1
    tar.write_bytes(data)
    return index.keys[row].decode()


def flags(materials: Path, run: Path, *more: object) -> list[object]:
    return [
        *made.recipe_flags(materials, run),
        *("--executor", "local", "--tasks-per-node", 2, "--epochs", 1, "--checkpoint-steps", 2, "--loader-workers", 2),
        *more,
    ]


def assert_same_end(run: Path, other: Path) -> None:
    for file in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = (load_file(r / f"checkpoints/step-{STEPS:08d}" / file) for r in (run, other))
        for name in theirs:
            assert torch.equal(ours[name], theirs[name]), name


def test_bad_samples_and_a_missing_shard_are_replaced_also_after_a_resume(materials, tmp_path, capsys):
    share = ("--max-bad-share", 0.5)
    alone, stopped = tmp_path / "alone", tmp_path / "stopped"
    gone = materials / "shards/train/train-000001.tar"
    key = shard_index.load_index(materials / "shards/train/train-000004.tar").keys[3].decode()

    # The shard is removed while the job runs, because a launch would refuse it.
    for run in (alone, stopped):
        process = made.start(*flags(materials, run, *share))
        deadline = time.monotonic() + 240
        while not (run / "initial.safetensors").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        gone.rename(gone.with_suffix(".away"))
        try:
            if run == stopped:
                ranks = made.ranks_of(process)  # first, because it takes longer than the remaining steps
                while not (run / "checkpoints/step-00000002").exists() and time.monotonic() < deadline:
                    time.sleep(0.001)
                for pid in ranks:
                    os.kill(pid, signal.SIGUSR2)
            assert process.wait(300) == 0
        finally:
            gone.with_suffix(".away").rename(gone)
    assert_same_end(stopped, alone)
    assert len(read_lines(stopped / "attempts.jsonl")) == 2
    bad = read_lines(alone / "bad_samples.jsonl")
    assert bad == read_lines(stopped / "bad_samples.jsonl")
    assert {line["rank"] for line in bad} == {0, 1} and all(line["substitute"] for line in bad)
    assert {line["shard"].rpartition("/")[2] for line in bad} == {"train-000001.tar", "train-000004.tar"}
    assert any(line["key"] == key and "checksum differs" in line["reason"] for line in bad)
    assert any("No such file" in line["reason"] for line in bad)
    for run in (alone, stopped):
        assert audit.main([str(run)]) == 0, capsys.readouterr().out
    table = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("| 1")]
    assert int(table[0][4]) == sum(line["step"] <= 6 for line in bad)


def test_too_many_bad_samples_end_the_run_with_a_checkpoint(materials, tmp_path):
    root = tmp_path / "made"
    shutil.copytree(materials, root)
    shutil.rmtree(root / "shards")
    shutil.copytree(root / "whole", root / "shards")
    for number in (0, 2, 5):
        rot(root / f"shards/train/train-{number:06d}.tar", row=2)
    run = tmp_path / "run"
    begun = time.monotonic()
    done = made.submit(*flags(root, run, "--max-bad-share", 0.02), check=False)
    assert done.returncode == 1 and time.monotonic() - begun < 240
    logs = [path.read_text() for path in sorted((run / "jobs").glob("*_log.out"))]
    ends = [log for log in logs if "of epoch 1 could not be read, more than the 1 that --max-bad-share 0.02" in log]
    assert len(ends) == 2, "every rank reports the reason"
    assert "cannot be used" in "".join(logs)
    newest = max((run / "checkpoints").glob("step-*"))
    step = int(newest.name.removeprefix("step-"))
    assert json.loads((newest / "state.json").read_text())["consumed"]["bad_in_epoch"] >= 2
    assert f"it continues from step {step}" in ends[0]
    assert audit.main([str(run)]) == 0

    for tar in (root / "whole/train").glob("*.tar"):
        shutil.copy(tar, root / "shards/train" / tar.name)
    made.submit(*flags(root, run, "--max-bad-share", 0.02))
    assert json.loads((run / "results.json").read_text())["step"] == STEPS
    assert read_lines(run / "attempts.jsonl")[1]["from_step"] == step
    assert audit.main([str(run)]) == 0


def test_another_training_set_is_refused_at_a_resume(materials, tmp_path):
    run = tmp_path / "run"
    root = tmp_path / "made"
    shutil.copytree(materials, root)
    shutil.rmtree(root / "shards")
    shutil.copytree(root / "whole", root / "shards")
    process = made.start(*flags(root, run, "--checkpoint-steps", 1))
    deadline = time.monotonic() + 240
    while not (run / "checkpoints/step-00000001").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    made.kill_all(process)
    shutil.rmtree(root / "shards")
    made.convert(root / "images", root / "shards", "--samples-per-shard", "12")
    done = made.submit(*flags(root, run, "--checkpoint-steps", 1), check=False)
    assert done.returncode == 1 and "was begun with another training set" in done.stdout
