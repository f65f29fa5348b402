"""submit.py on this machine: runs in the background, and in its own process."""

from __future__ import annotations

import json

import pytest

import made
from cfmask.runtime.jsonl import read_lines


@pytest.fixture(scope="module")
def materials(tmp_path_factory):
    return made.make_materials(tmp_path_factory.mktemp("materials"), per_class=8)


def test_no_follow_does_not_keep_pipes_open(materials, tmp_path):
    """As in `submit.py --no-follow | tail`: the reader waits until the pipe is closed."""
    run = tmp_path / "run"
    flags = [*made.recipe_flags(materials, run), "--batch-size", 8, "--executor", "local", "--tasks-per-node", 1]
    done = made.submit(*flags, "--epochs", 1, "--no-follow")
    assert not (run / "results.json").exists(), "the pipe was read to its end while the run goes on"
    assert f"run      {run}: new" in done.stdout
    made.wait_for(run, (run / "results.json").exists, "its end")
    assert (run / "jobs/controller.log").exists()


def test_debug_executor_trains_in_this_process(materials, tmp_path):
    run = tmp_path / "run"
    flags = [*made.recipe_flags(materials, run), "--batch-size", 8, "--executor", "debug", "--tasks-per-node", 1]
    done = made.submit(*flags, "--epochs", 1)
    assert "finished: " in done.stdout and (run / "model.safetensors").exists()
    assert json.loads((run / "results.json").read_text()) is not None
    assert [line["executor"] for line in read_lines(run / "jobs/submissions.jsonl")] == ["debug"]
    [attempt] = read_lines(run / "attempts.jsonl")
    assert attempt["world_size"] == 1
