"""Conversion by a job array on a real Slurm: the same bytes as on one machine, after requeues and interruptions."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from cfmask.data.shards import load_manifest
from made import environment_of
from slurm_fixture import wait_until
from test_make_shards import REPO, contents, convert, write_tar

pytestmark = pytest.mark.slurm

SHARDS = 120


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Large, flat PNGs: a few kB to store, 5 ms to check, which is long enough to interrupt."""
    flat = io.BytesIO()
    Image.new("RGB", (1000, 1000), (1, 2, 3)).save(flat, "PNG")
    files = {f"train/{c}/{i}.png": flat.getvalue() for c in "abcd" for i in range(SHARDS * 10 // 4)}
    return write_tar(tmp_path_factory.mktemp("source") / "set.tar", files)


@pytest.fixture(scope="module")
def undisturbed(source, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    assert convert("folder", source, out, "--samples-per-shard", 10, "--workers", 2) == 0
    return out / "train"


def start(source: Path, out: Path, *more: object, checkout: Path = REPO) -> subprocess.Popen:
    command = [sys.executable, checkout / "tools/make_shards.py", "folder", "--source", source, "--out", out]
    command += ["--samples-per-shard", 10, "--executor", "slurm", "--array", 3, "--cpus-per-task", 1]
    command += ["--time", "0:30:00"]
    return subprocess.Popen(
        [*map(str, command), *map(str, more)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=source.parent,
        env=environment_of(checkout),
    )


def finish(process: subprocess.Popen) -> str:
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said
    return said


def made(folder: Path) -> int:
    return len(list(folder.glob("*.index.safetensors")))


def array_of(cluster, process: subprocess.Popen) -> str:
    """The id of the job array that a command submitted, from the queue."""
    found: list[str] = []

    def look() -> bool:
        assert process.poll() is None, process.communicate()[0]
        lines = map(str.split, cluster.call("squeue", "--noheader", "--format=%F %j").splitlines())
        found[:] = [words[0] for words in lines if words[1].startswith("cfmask-shards-")]
        return bool(found)

    wait_until(look, "the jobs to be in the queue")
    return found[0]


def assert_same(folder: Path, undisturbed: Path) -> None:
    assert len(contents(undisturbed)) == 2 * SHARDS and contents(folder) == contents(undisturbed)
    assert (folder / "manifest.json").read_bytes() == (undisturbed / "manifest.json").read_bytes()
    assert sorted(os.listdir(folder)) == sorted(os.listdir(undisturbed)), "nothing is left behind"


def test_bytes_are_those_of_one_process_after_a_requeue_and_an_interruption(
    slurm_cluster, source, undisturbed, tmp_path
):
    folder = tmp_path / "train"
    command = start(source, tmp_path)
    array = array_of(slurm_cluster, command)
    wait_until(lambda: made(folder) >= 5, "the first shards")
    slurm_cluster.call("scontrol", "requeue", f"{array}_1")  # like after a node failure
    command.send_signal(signal.SIGINT)
    said, _ = command.communicate(timeout=300)
    assert command.returncode == 130 and "The jobs continue" in said and f"array job {array} of 3 tasks" in said
    assert not (folder / "manifest.json").exists()

    command = start(source, tmp_path)  # while the jobs run: it joins them
    slurm_cluster.start_again_now(f"{array}_1")
    said = finish(command)
    assert "jobs of an earlier command are in the queue" in said and "images/s" in said
    assert_same(folder, undisturbed)
    assert slurm_cluster.job(f"{array}_1")["Restarts"] == "1"
    assert f"{SHARDS} of {SHARDS} shards exist already" in finish(start(source, tmp_path))


def test_a_task_that_is_preempted_comes_back(slurm_cluster, source, undisturbed, tmp_path):
    folder = tmp_path / "train"
    command = start(
        source, tmp_path, "--partition", "low", "--array", 1
    )  # one task, which is preempted before it is done
    job = array_of(slurm_cluster, command)
    wait_until(lambda: made(folder) >= 5, "the first shards")
    important = slurm_cluster.sbatch("--partition=high", "--nodes=2", "--exclusive", "--wrap=true", cwd=tmp_path)
    slurm_cluster.wait_for_state(important, "COMPLETED")
    assert made(folder) < SHARDS and not (folder / "manifest.json").exists()
    slurm_cluster.start_again_now(job)
    finish(command)
    assert_same(folder, undisturbed)
    assert slurm_cluster.job(job)["Restarts"] == "1"


def test_the_array_runs_the_code_that_was_submitted(slurm_cluster, source, undisturbed, tmp_path):
    checkout = tmp_path / "checkout"
    for folder in ("cfmask", "launch", "tools"):
        shutil.copytree(REPO / folder, checkout / folder, ignore=shutil.ignore_patterns("__pycache__", "benchmarks"))
    hold = slurm_cluster.sbatch("--wrap=sleep 300", cwd=tmp_path)
    command = start(source, tmp_path / "out", "--after", hold, checkout=checkout)
    array = array_of(slurm_cluster, command)
    for path in (checkout / "cfmask/convert").glob("*.py"):
        path.write_text("raise SystemExit('this is not the code that was submitted')")
    slurm_cluster.call("scontrol", "update", f"jobid={array}", "dependency=")
    finish(command)
    slurm_cluster.call("scancel", hold)
    assert_same(tmp_path / "out/train", undisturbed)


def test_local_conversion_beside_an_array_writes_the_same_bytes(slurm_cluster, source, undisturbed, tmp_path):
    command = start(source, tmp_path)
    array_of(slurm_cluster, command)
    wait_until(lambda: made(tmp_path / "train") >= 2, "the first shards")
    command.send_signal(signal.SIGINT)
    command.communicate(timeout=300)
    assert convert("folder", source, tmp_path, "--samples-per-shard", 10) == 0
    manifest = load_manifest(tmp_path / "train")
    assert manifest.num_samples == SHARDS * 10
    wait_until(lambda: not slurm_cluster.call("squeue", "--noheader"), "the jobs to end")
    assert contents(tmp_path / "train") == contents(undisturbed)
    load_manifest(tmp_path / "train")


def test_failed_jobs_report_the_reason(slurm_cluster, source, tmp_path):
    gone = tmp_path / "set.tar"
    gone.write_bytes(source.read_bytes())
    command = start(gone, tmp_path / "out")
    array = array_of(slurm_cluster, command)
    wait_until(lambda: made(tmp_path / "out" / "train") >= 2, "the first shards")
    gone.unlink()
    said, _ = command.communicate(timeout=300)
    assert command.returncode == 2, said
    error = said[said.rindex("error: ") :]
    assert "results are missing" in error and f"The source {gone} cannot be read (No such file or directory)" in error
    assert f"{array}_" in error and "The same command submits what is missing" in error
