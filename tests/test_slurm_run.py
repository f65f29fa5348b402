"""Training on a real Slurm of two nodes is what it is on one machine. What interrupts it there: test_drill.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import made
from cfmask.runs import read_lines
from slurm_fixture import wait_until

pytestmark = pytest.mark.slurm


def test_auto_means_slurm_where_srun_is_and_two_nodes_train_what_one_machine_does(slurm_cluster, tmp_path):
    materials = made.make_materials(tmp_path / "materials")

    def submit(run: Path, *more: object) -> str:
        flags = ("--gpus-per-node", 0, "--epochs", 2, "--follow", *more)
        return made.submit(*made.recipe_flags(materials, run), *flags).stdout

    there, here = tmp_path / "there", tmp_path / "here"
    said = submit(there, "--nodes", 2, "--tasks-per-node", 1, "--cpus-per-task", 1, "--time", 30)
    assert "slurm: 2 × 1 CPU ranks" in said
    submit(here, "--executor", "local", "--tasks-per-node", 2)
    wait_until(lambda: slurm_cluster.call("squeue", "--noheader") == "", "the job has gone")
    for file in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = (load_file(run / "checkpoints/step-00000012" / file) for run in (there, here))
        for name in theirs:
            assert torch.equal(ours[name], theirs[name]), f"{name} of {file} differs"
    [attempt] = read_lines(there / "attempts.jsonl")
    assert (attempt["nodes"], attempt["world_size"]) == (2, 2)
