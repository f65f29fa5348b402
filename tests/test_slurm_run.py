"""Training and evaluation on a real Slurm with two nodes equal those on this machine. For interruptions of training see
test_drill.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import made
from cfmask.evaluation.worker import run_evaluation
from cfmask.evaluation_spec import Evaluation
from cfmask.report.results import read_results
from cfmask.runs import RunFolder
from cfmask.runtime.distributed import DistributedContext
from cfmask.runtime.jsonl import read_lines
from launch.allocation.cluster_file import ClusterFile
from launch.allocation.resolve import resolve_allocation
from launch.submission.planning import PlannedJob, claim_run_folders
from launch.submission.submit import enqueue
from launch.submit import parser
from slurm_fixture import wait_until

pytestmark = pytest.mark.slurm


def test_two_slurm_nodes_train_bitwise_identically_to_one_machine(slurm_cluster, tmp_path):
    materials = made.make_materials(tmp_path / "materials")

    def submit(run: Path, *more: object) -> str:
        flags = ("--gpus-per-node", 0, "--epochs", 2, "--follow", *more)
        return made.submit(*made.recipe_flags(materials, run), *flags).stdout

    there, here = tmp_path / "there", tmp_path / "here"
    said = submit(there, "--nodes", 2, "--tasks-per-node", 1, "--cpus-per-task", 1, "--time", 30)
    assert "on Slurm: 2 nodes × 1 CPU rank," in said
    submit(here, "--executor", "local", "--tasks-per-node", 2)
    wait_until(lambda: slurm_cluster.call("squeue", "--noheader") == "", "the job has gone")
    for file in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = (load_file(run / "checkpoints/step-00000012" / file) for run in (there, here))
        for name in theirs:
            assert torch.equal(ours[name], theirs[name]), f"{name} of {file} differs"
    [attempt] = read_lines(there / "attempts.jsonl")
    assert (attempt["nodes"], attempt["world_size"]) == (2, 2)

    # Slurm may start the job of a finished run once more (from 24.05 on, if it was preempted when it finished).
    job = attempt["job"].removesuffix("-0")
    results = (there / "results.json").read_bytes()
    slurm_cluster.call("scontrol", "requeue", job)
    slurm_cluster.start_again_now(job)
    wait_until(lambda: slurm_cluster.job(job)["JobState"] == "COMPLETED", "the second start has ended")
    assert slurm_cluster.job(job)["Restarts"] == "1" and slurm_cluster.job(job)["ExitCode"] == "0:0"
    assert read_lines(there / "attempts.jsonl") == [attempt] and (there / "results.json").read_bytes() == results
    assert RunFolder(there).ended()["why"] == "finished"


def test_preempted_evaluation_resumes_after_counted_samples(slurm_cluster, tmp_path):
    materials = made.make_materials(tmp_path / "materials")
    evaluation = Evaluation(
        models=(str(materials / "tiny.safetensors"),),
        shards=str(materials / "shards"),
        sets=("val", "train"),
        batch_size=2,
        loader_workers=0,
    )
    alone = RunFolder(tmp_path / "alone")
    alone.claim(evaluation)
    run_evaluation(evaluation, alone, DistributedContext())

    flags = ["--executor", "slurm", "--nodes", "2", "--tasks-per-node", "1", "--cpus-per-task", "1", "--time", "30"]
    planned = PlannedJob(RunFolder(tmp_path / "there"), evaluation)
    [planned] = claim_run_folders([planned])
    [job] = enqueue([planned], resolve_allocation(parser().parse_args(flags), ClusterFile()), pace_s=0.25)
    run = planned.run
    made.wait_for(run.root, lambda: len(read_lines(run.log)) > 0, "a line of progress")
    urgent = ("--partition=high", "--nodes=2", "--ntasks-per-node=4", "--wrap=sleep 2")
    slurm_cluster.sbatch(*urgent, cwd=tmp_path)
    made.wait_for(run.root, lambda: slurm_cluster.job(job.job_id).get("Restarts") == "1", "the preemption")
    slurm_cluster.start_again_now(job.job_id)
    made.wait_for(run.root, run.results.exists, "the results")
    assert read_results(run.root).models == read_results(alone.root).models
    first, second = read_lines(run.attempts)
    assert first["from_step"] == 0 < second["from_step"] < 192 and "requeue" in second["why_last_ended"]
    wait_until(lambda: slurm_cluster.call("squeue", "--noheader") == "", "the job has gone")
