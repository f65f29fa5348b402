"""A run that is killed, damaged or preempted ends with weights that are bitwise identical to an undisturbed run's."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import submitit
import torch
from safetensors.torch import load_file

import made
from cfmask.runs import RunFolder
from cfmask.runtime.jsonl import read_lines
from launch import submit
from launch.allocation.cluster_file import ClusterFile
from launch.allocation.resolve import resolve_allocation
from launch.ranks.rank import Job
from launch.submission import training
from launch.submission.recipe_arguments import recipe_from

STEPS = 18  # 3 epochs of 6
PACE_S = 0.1  # per step of a disturbed run, so that it does not finish too early
BY_FOUR = ("--tasks-per-node", 4, "--loader-workers", 0)


@pytest.fixture(scope="module")
def materials(tmp_path_factory) -> Path:
    return made.make_materials(tmp_path_factory.mktemp("materials"))


def flags(materials: Path, run: Path, *more: object) -> list[object]:
    return [
        *made.recipe_flags(materials, run),
        *("--executor", "local", "--tasks-per-node", 2, "--epochs", 3, "--loader-workers", 1, "--checkpoint-steps", 4),
        *more,
    ]


@pytest.fixture(scope="module")
def undisturbed(materials, tmp_path_factory) -> Path:
    """An undisturbed run, whose ranks import more packages than those of the other runs. Nothing depends on that."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    made.submit(*flags(materials, run), env={"PYTHONPATH": made.path_of_all_imports()})
    return run


@pytest.fixture(scope="module")
def undisturbed_by_four(materials, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    made.submit(*flags(materials, run, *BY_FOUR))
    return run


def assert_same_end(run: Path, other: Path) -> None:
    for file in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = (load_file(r / f"checkpoints/step-{STEPS:08d}" / file) for r in (run, other))
        assert ours.keys() == theirs.keys() and ours
        for name in ours:
            assert torch.equal(ours[name], theirs[name]), f"{name} of {file} differs"
    losses = [[(x["step"], x["loss"]) for x in read_lines(r / "log.jsonl") if "loss" in x] for r in (run, other)]
    assert losses[0] == losses[1], "the log does not match the weights"


def curve(run: Path) -> list[tuple[int, float]]:
    """The loss curve in TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard")).Reload()
    return [(event.step, event.value) for event in events.Scalars("train/loss")]


def wait_for_step(run: Path, step: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if any(line["step"] >= step for line in read_lines(run / "log.jsonl")):
            return
        assert process.poll() is None, "the run has ended before the disturbance"
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached")


def test_a_kill_before_any_checkpoint_and_a_restart_end_bitwise_identical(materials, undisturbed, tmp_path):
    run = tmp_path / "run"
    process = made.start(*flags(materials, run), pace_s=PACE_S)
    wait_for_step(run, 2, process)
    made.kill_all(process)
    made.submit(*flags(materials, run))
    assert_same_end(run, undisturbed)
    assert curve(run) == curve(undisturbed)


def test_two_kills_and_a_damaged_checkpoint_end_bitwise_identical(materials, undisturbed, tmp_path):
    run = tmp_path / "run"
    for step in (5, 13):
        process = made.start(*flags(materials, run), pace_s=PACE_S)
        wait_for_step(run, step, process)
        made.kill_all(process)
        assert not (run / "results.json").exists()
    newest = max((run / "checkpoints").glob("step-*"))
    torn = newest / "model.safetensors"
    torn.write_bytes(torn.read_bytes()[:-100])
    made.submit(*flags(materials, run))
    logs = "".join(log.read_text() for log in (run / "jobs").glob("*_0_log.out"))
    assert f"{newest} is damaged" in logs
    assert_same_end(run, undisturbed)
    assert curve(run) == curve(undisturbed)
    attempts = read_lines(run / "attempts.jsonl")
    assert [a["why_last_ended"] for a in attempts] == [None, "killed without notice", "killed without notice"]
    assert attempts[2]["from_step"] < int(newest.name.removeprefix("step-"))


def test_a_signal_to_one_rank_stops_all_with_a_checkpoint_and_a_requeue(materials, undisturbed, tmp_path):
    run = tmp_path / "run"
    process = made.start(*flags(materials, run), pace_s=PACE_S)
    wait_for_step(run, 7, process)
    os.kill(made.ranks_of(process)[1], signal.SIGUSR2)  # one rank alone gets it
    assert process.wait(timeout=300) == 0
    first, second = read_lines(run / "attempts.jsonl")
    assert second["why_last_ended"] == f"stopped at step {second['from_step']} (requeue)"
    assert second["from_step"] >= 7
    assert_same_end(run, undisturbed)


def test_the_time_limit_stops_a_run_without_a_signal(materials, tmp_path, monkeypatch):
    """Without a signal, a job that nears its time limit stops and is requeued, several times."""
    run = RunFolder(tmp_path / "run")
    arguments = submit.parser().parse_args(
        list(map(str, flags(materials, run.root, "--tasks-per-node", 1, "--epochs", 1)))
    )
    allocation = resolve_allocation(arguments, ClusterFile())
    run.claim(training.resolve_recipe(recipe_from(arguments), allocation))
    executor = submitit.LocalExecutor(run.root / "jobs")
    executor.update_parameters(timeout_min=60, stderr_to_stdout=True)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    job = executor.submit(Job(run.root, 0, time_limit_min=0.25, pace_s=3.0))  # 13.5 s; 6 steps take 18 s
    assert job.result() == "finished"
    whys = [attempt["why_last_ended"] for attempt in read_lines(run.attempts)[1:]]
    assert whys and all(re.fullmatch(r"stopped at step \d+ \(requeue\), at the time limit", why) for why in whys)


def test_a_terminated_run_leaves_a_checkpoint_of_its_step(materials, undisturbed, tmp_path):
    run = tmp_path / "run"
    process = made.start(*flags(materials, run), pace_s=PACE_S)
    wait_for_step(run, 6, process)
    for pid in made.ranks_of(process):
        os.kill(pid, signal.SIGTERM)
    assert process.wait(timeout=300) == 1
    stopped = json.loads((run / "ended.json").read_text())["why"]
    newest = max((run / "checkpoints").glob("step-*"))
    assert stopped == f"stopped at step {int(newest.name.removeprefix('step-'))} (quit)"
    made.submit("--resume", run, "--executor", "local", "--tasks-per-node", 2)
    assert_same_end(run, undisturbed)


def test_repeating_the_command_of_a_finished_run_changes_nothing(materials, undisturbed):
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*.safetensors")}
    done = made.submit(*flags(materials, undisturbed))
    assert "is finished" in done.stdout
    assert before == {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*.safetensors")}


def test_another_world_size_trains_on_the_same_batches(undisturbed, undisturbed_by_four):
    runs = (undisturbed_by_four, undisturbed)
    ours, theirs = ([x["loss"] for x in read_lines(run / "log.jsonl") if "loss" in x] for run in runs)
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-3, atol=1e-4)
    # the first step's gradients differ by nothing but the order of a sum
    assert ours[0] == pytest.approx(theirs[0], rel=1e-6)


def test_four_ranks_killed_between_checkpoints_by_minutes_end_bitwise_identical(
    materials, undisturbed_by_four, tmp_path
):
    """With more than two ranks the order in which an all-reduce adds depends on DDP's buckets."""
    run = tmp_path / "run"
    more = (*BY_FOUR, "--checkpoint-steps", 999, "--checkpoint-minutes", 1e-9)
    process = made.start(*flags(materials, run, *more), pace_s=PACE_S)
    wait_for_step(run, 9, process)
    made.kill_all(process)
    made.submit(*flags(materials, run, *more))
    assert_same_end(run, undisturbed_by_four)
