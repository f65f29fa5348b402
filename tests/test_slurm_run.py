"""Training on a real Slurm of two nodes: started, preempted, requeued, and the same weights in the end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import made
from cfmask.runs import read_lines
from slurm_fixture import wait_until

pytestmark = pytest.mark.slurm

EPOCHS = 40
STEPS = 6 * EPOCHS


@pytest.fixture(scope="module")
def materials(tmp_path_factory) -> Path:
    return made.make_materials(tmp_path_factory.mktemp("materials"))


def flags(materials: Path, run: Path, *more: object) -> list[object]:
    return [
        *made.recipe_flags(materials, run),
        *("--gpus-per-node", 0, "--epochs", EPOCHS, "--checkpoint-steps", 50),
        *more,
    ]


def on_two_nodes() -> list[object]:
    return ["--nodes", 2, "--tasks-per-node", 1, "--cpus-per-task", 1, "--time", 30]


@pytest.fixture(scope="module")
def undisturbed(materials, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    made.submit(*flags(materials, run, "--executor", "local", "--tasks-per-node", 2))
    return run


def job_of(done) -> str:
    return next(line.split()[1] for line in done.stdout.splitlines() if line.startswith("job "))


def logs(run: Path) -> str:
    return "\n".join(f"{p.name}:\n{p.read_text(errors='replace')[-3000:]}" for p in (run / "jobs").glob("*.out"))


def wait_for_end(run: Path) -> None:
    try:
        wait_until(lambda: (run / "results.json").exists(), "the run to finish", 150)
    except BaseException:
        print(logs(run))
        raise


def wait_for_step(run: Path, step: int) -> None:
    try:
        wait_until(lambda: any(x["step"] >= step for x in read_lines(run / "log.jsonl")), f"step {step}", 150)
    except BaseException:
        print(logs(run))
        raise


def assert_same_end(run: Path, other: Path) -> None:
    for file in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = (load_file(r / f"checkpoints/step-{STEPS:08d}" / file) for r in (run, other))
        for name in theirs:
            assert torch.equal(ours[name], theirs[name]), f"{name} of {file} differs"


def test_auto_means_slurm_where_srun_is_and_two_nodes_train_what_one_machine_does(
    slurm_cluster, materials, undisturbed, tmp_path
):
    run = tmp_path / "run"
    done = made.submit(*flags(materials, run, *on_two_nodes()))
    assert "slurm: 2 × 1 CPU ranks" in done.stdout
    wait_for_end(run)
    assert_same_end(run, undisturbed)
    [attempt] = read_lines(run / "attempts.jsonl")
    assert (attempt["nodes"], attempt["world_size"]) == (2, 2)


def test_preempted_by_a_more_important_job_it_comes_back_to_the_same_weights(
    slurm_cluster, materials, undisturbed, tmp_path
):
    run = tmp_path / "run"
    job = job_of(made.submit(*flags(materials, run, *on_two_nodes(), "--partition", "low")))
    wait_for_step(run, 20)
    important = slurm_cluster.sbatch("--partition=high", "--nodes=2", "--exclusive", "--wrap=sleep 2", cwd=tmp_path)
    wait_until(lambda: (run / "ended.json").exists(), "the run to save and leave", 90)
    slurm_cluster.wait_for_state(important, "COMPLETED", 90)
    wait_until(lambda: slurm_cluster.job(job)["JobState"] in ("PENDING", "RUNNING"), "the requeue", 60)
    slurm_cluster.call("scontrol", "update", f"jobid={job}", "StartTime=now")
    wait_for_end(run)
    assert_same_end(run, undisturbed)
    first, second = read_lines(run / "attempts.jsonl")
    assert second["why_last_ended"] == f"stopped at step {second['from_step']} (requeue)"
    assert second["from_step"] >= 20, "nothing was lost"
    assert slurm_cluster.job(job)["Restarts"] == "1"


def test_requeued_by_an_administrator_without_warning_it_ends_the_same(slurm_cluster, materials, undisturbed, tmp_path):
    run = tmp_path / "run"
    job = job_of(made.submit(*flags(materials, run, *on_two_nodes())))
    wait_for_step(run, 60)
    slurm_cluster.call("scontrol", "requeue", job)
    wait_until(lambda: slurm_cluster.job(job)["JobState"] == "PENDING", "the requeue", 60)
    slurm_cluster.call("scontrol", "update", f"jobid={job}", "StartTime=now")
    wait_for_end(run)
    assert_same_end(run, undisturbed)
    assert read_lines(run / "attempts.jsonl")[1]["from_step"] >= 50
