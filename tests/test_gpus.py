"""CUDA_VISIBLE_DEVICES in the local executor: the number of ranks, and the GPU that each of them sees."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import made
from cfmask.errors import UserError
from launch.allocation.cluster_file import ClusterFile
from launch.allocation.gpus import Gpu, parse_listing, show_to_rank, visible_gpus
from launch.allocation.resolve import resolve_allocation
from launch.submission import snapshot
from launch.submission.sbatch import local_executor
from launch.submit import parser

LISTING = """\
GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-5d5ba0d6-d33d-2b2c-524d-9e3d8d2b8a77)
  MIG 3g.20gb     Device  0: (UUID: MIG-c6d4f1ef-42e4-5de3-91c7-45d71c87eb3f)
  MIG 3g.20gb     Device  1: (UUID: MIG-cba663e8-9bed-5b25-b243-5985ef7c9beb)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-5d5ba0d6-ffff-2b2c-524d-9e3d8d2b8a77)
  MIG 7g.40gb     Device  0: (UUID: MIG-01234567-9bed-5b25-b243-5985ef7c9beb)
GPU 2: NVIDIA H100 80GB HBM3 (UUID: GPU-8932f937-d72c-4106-c12f-20bd9faed9f6)
"""
FIRST, SECOND, THIRD = GPUS = parse_listing(LISTING)


def test_the_listing_of_nvidia_smi_is_read_with_its_mig_devices():
    assert [len(gpu.mig) for gpu in GPUS] == [2, 1, 0]
    assert THIRD == Gpu("GPU-8932f937-d72c-4106-c12f-20bd9faed9f6")
    assert SECOND.mig == ("MIG-01234567-9bed-5b25-b243-5985ef7c9beb",)
    failed = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n"
    assert parse_listing(failed) == parse_listing("No devices found.\n") == ()


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, ["0", "1", "2"]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("2", ["2"]),
        ("2,0", ["2", "0"]),
        ("0, 1", ["0", "1"]),
        ("0,1,", ["0", "1"]),
        ("1gpu2,2ampere", ["1", "2"]),
        ("+1,02", ["1", "2"]),
        ("0,-1,1", ["0"]),  # what is invalid ends the list
        ("0,3,1", ["0"]),
        ("7,0", []),
        (",0", []),
        ("0,x,1", ["0"]),
        ("0,1,0", []),  # a GPU twice
        ("0,00", []),
        ("0,GPU-8932f937", ["0"]),
        (THIRD.uuid, [THIRD.uuid]),
        ("GPU-8932f937", ["GPU-8932f937"]),
        (f"GPU-8,{FIRST.uuid}", ["GPU-8", FIRST.uuid]),
        ("GPU-5d5ba0d6", []),  # two begin so
        ("GPU-5d5ba0d6-d,GPU-5d5ba0d6-f", ["GPU-5d5ba0d6-d", "GPU-5d5ba0d6-f"]),
        (f"GPU-8932,{THIRD.uuid}", []),
        (f"{THIRD.uuid},GPU-none,{FIRST.uuid}", [THIRD.uuid]),
        (f"{THIRD.uuid},0", [THIRD.uuid]),
        (f"{THIRD.uuid},{FIRST.mig[0]}", [THIRD.uuid]),
        (FIRST.mig[1], [FIRST.mig[1]]),
        (f"{SECOND.mig[0]},{FIRST.mig[1]}", [SECOND.mig[0], FIRST.mig[1]]),
        (f"{FIRST.mig[1]},{FIRST.mig[0]},{SECOND.mig[0]}", [FIRST.mig[1], SECOND.mig[0]]),  # a GPU has one rank
        ("MIG-none", []),
        (f"MIG-{FIRST.uuid}/1/0", [f"MIG-{FIRST.uuid}/1/0"]),
        (f"MIG-{FIRST.uuid}/1/0,MIG-{FIRST.uuid}/2/0", [f"MIG-{FIRST.uuid}/1/0"]),
        ("MIG-GPU-none/1/0", []),
    ],
)
def test_visible_gpus_follow_cudas_rules(value, shown):
    assert visible_gpus(value, GPUS) == tuple(shown)


def test_entries_are_not_checked_without_nvidia_smi():
    assert visible_gpus(None, None) is None
    assert visible_gpus("", None) == visible_gpus("-1", None) == ()
    assert visible_gpus("3,7,x,1", None) == ("3", "7")
    assert visible_gpus("GPU-a,GPU-b,GPU-b", None) == ()
    assert visible_gpus("MIG-a,MIG-b,0", None) == ("MIG-a", "MIG-b")


ENTRIES = st.one_of(
    st.integers(-2, 5).map(str), st.sampled_from(["", "x", "1a", "GPU-8932", "GPU-5d5ba0d6", FIRST.uuid, FIRST.mig[0]])
)


@given(st.lists(ENTRIES, max_size=5), st.booleans())
def test_the_list_is_the_one_that_torch_reads(entries, known):
    """For the kinds that torch reads. It knows neither the installed GPUs nor prefixes of the same one."""
    value = ",".join(entries)
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = value
    try:
        expected = [str(entry) for entry in torch.cuda._parse_visible_devices()]
    finally:
        os.environ.pop("CUDA_VISIBLE_DEVICES")
        if before is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = before
    shown = visible_gpus(value, None)
    assert list(shown) == expected
    if known and shown:  # what is known of a machine takes entries away from the end, or all
        fewer = visible_gpus(value, GPUS)
        assert fewer == shown[: len(fewer)]


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine whose nvidia-smi prints LISTING."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\n[ \"$*\" = -L ] && cat <<'.'\n{LISTING}.\n")
    (folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return monkeypatch


def allocation(*flags: object, last=None):
    return resolve_allocation(parser().parse_args([*map(str, flags), "--executor", "local"]), ClusterFile(), last)


@pytest.mark.parametrize(
    ("value", "flags", "shown"),
    [
        (None, (), ("0", "1", "2")),
        ("2,0", (), ("2", "0")),
        ("2,0", ("--gpus-per-node", 1), ("2",)),
        ("GPU-8932,junk", (), ("GPU-8932",)),
        ("", (), ()),
        ("-1", (), ()),
        ("2,0", ("--tasks-per-node", 2), ()),
        ("2,0", ("--gpus-per-node", 0), ()),
    ],
)
def test_there_is_a_rank_for_each_visible_gpu(machine, value, flags, shown):
    if value is not None:
        machine.setenv("CUDA_VISIBLE_DEVICES", value)
    found = allocation(*flags)
    assert (found.visible_gpus, found.gpus_per_node) == (shown, len(shown))
    assert found.tasks_per_node == (len(shown) or (2 if "--tasks-per-node" in flags else 1))


@pytest.mark.parametrize(("value", "wanted", "there"), [("2,0", 3, 2), ("", 1, 0), ("-1", 1, 0), ("1,9,0", 2, 1)])
def test_more_gpus_than_are_visible_are_refused(machine, value, wanted, there):
    machine.setenv("CUDA_VISIBLE_DEVICES", value)
    with pytest.raises(UserError, match=f'--gpus-per-node {wanted} .*CUDA_VISIBLE_DEVICES is "{value}".* {there} GPU'):
        allocation("--gpus-per-node", wanted)
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES"):  # a run that had more of them last
        allocation(last={"gpus_per_node": ("", wanted), "tasks_per_node": wanted})


def test_gpus_of_a_machine_without_a_driver_are_refused_before_a_rank_starts(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda program, **_: None)
    monkeypatch.setattr("launch.allocation.gpus.DEVICES", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert allocation().gpus_per_node == 0
    with pytest.raises(UserError, match=r"neither nvidia-smi nor .*Request --gpus-per-node 0, to train on CPUs\.$"):
        allocation("--gpus-per-node", 2)
    (tmp_path / "nvidia0").touch()  # a container without nvidia-smi: the ranks will find out
    assert allocation("--gpus-per-node", 2).visible_gpus == ("0", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(UserError, match='CUDA_VISIBLE_DEVICES is "0", which shows 1 GPU:'):
        allocation("--gpus-per-node", 2)


def test_more_gpus_than_the_machine_has_are_refused(machine):
    with pytest.raises(UserError, match=r"nvidia-smi -L lists 3 GPUs \(CUDA_VISIBLE_DEVICES is not set\)"):
        allocation("--gpus-per-node", 4)


def test_a_dry_run_counts_visible_gpus_and_takes_bf16(machine, tmp_path):
    materials = made.make_materials(tmp_path / "materials", per_class=16)
    flags = [*made.recipe_flags(materials, tmp_path / "run"), "--executor", "local", "--dry-run"]
    done = made.submit(*flags, env={"CUDA_VISIBLE_DEVICES": "2,0"})
    assert "this machine: 2 GPUs" in done.stdout and '"precision": "bf16"' in done.stdout
    done = made.submit(*flags, env={"CUDA_VISIBLE_DEVICES": ""})
    assert "this machine: 1 CPU rank\n" in done.stdout and '"precision": "fp32"' in done.stdout
    done = made.submit(*flags, "--gpus-per-node", 3, env={"CUDA_VISIBLE_DEVICES": "2,0"}, check=False)
    assert done.returncode == 2 and 'CUDA_VISIBLE_DEVICES is "2,0"' in done.stderr


class ClassifierOutput:
    """Writes a rank's environment to a file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self) -> None:
        seen = {name: os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "SUBMITIT_LOCAL_LOCALID")}
        (self.folder / f"seen-{seen['SUBMITIT_LOCAL_LOCALID']}.json").write_text(json.dumps(seen))


@pytest.mark.parametrize(
    ("value", "by_rank"),
    [
        ("2,0", ["2,0", "2,0"]),
        ("GPU-8932,GPU-5d5ba0d6-d,GPU-5d5ba0d6-f", ["GPU-8932,GPU-5d5ba0d6-d"] * 2),  # the third is not asked for
        (f"{SECOND.mig[0]},{FIRST.mig[1]}", [SECOND.mig[0], FIRST.mig[1]]),
    ],
)
def test_ranks_see_the_gpus_that_were_visible_to_the_launcher(machine, tmp_path, value, by_rank):
    machine.setenv("CUDA_VISIBLE_DEVICES", value)
    machine.setenv("PYTHONPATH", f"{made.REPO / 'tests'}:{os.environ.get('PYTHONPATH', '')}")
    run = tmp_path / "a run"
    code = snapshot.take(made.REPO, run / "code").path
    given = allocation("--gpus-per-node", 2)
    job = local_executor(run / "jobs", code, given, timeout_min=2).submit(ClassifierOutput(tmp_path))
    job.wait()
    found = [json.loads((tmp_path / f"seen-{rank}.json").read_text()) for rank in range(2)]
    assert [each["CUDA_VISIBLE_DEVICES"] for each in found] == by_rank


def test_slurm_rank_keeps_its_visible_devices():
    environment = {"CUDA_VISIBLE_DEVICES": "5"}
    show_to_rank(environment)
    assert environment == {"CUDA_VISIBLE_DEVICES": "5"}
