"""Slurm arrays: their allocation, and how they are requeued, followed, cancelled and given up."""

from __future__ import annotations

import argparse
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cfmask.errors import UserError
from launch.arrays import array
from launch.arrays import task as array_task
from launch.arrays.arguments import Array, add_array_arguments, resolve_array
from launch.restarts.policy import Cause
from launch.slurm.queue import SlurmJob
from made import REPO
from slurm_fixture import Cluster, wait_until

# --- flags and cluster file -------------------------------------------------------------------------------------------


@pytest.fixture
def resolve(tmp_path, monkeypatch):
    """Resolves flags and the text of a cluster file, with sbatch on the PATH."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("sbatch", "srun"):
        (programs / name).write_text("#!/bin/sh\nexit 1\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")

    def run(*flags: object, file: str = "", with_gpus: bool = False) -> Array | None:
        path = tmp_path / "cluster.toml"
        path.write_text(file)
        monkeypatch.setenv("CFMASK_CLUSTER", str(path))
        parser = argparse.ArgumentParser()
        add_array_arguments(parser, with_gpus=with_gpus)
        return resolve_array(parser.parse_args([str(flag) for flag in flags]))

    return run


FILE = """
nodes = 4
gpus_per_node = 8
cpus_per_task = 12
time = "2-00:00:00"
interface = "ib0"
partition = "cpu"
account = "lab"
qos = "long"
memory = "32G"
setup = ["module load python"]
srun_args = ["--mpi=none"]
python = "/opt/python"
[environment]
HF_HOME = "/shared/hf"
[sbatch]
comment = "conversion"
[container]
image = "image.sqsh"
mounts = ["/data:/data"]
"""


def test_array_ignores_nodes_gpus_and_cores_of_the_cluster_file(resolve):
    array = resolve("--executor", "slurm", file=FILE)
    allocation = array.allocation
    assert (allocation.nodes, allocation.tasks_per_node, allocation.gpus_per_node) == (1, 1, 0)
    assert (allocation.cpus_per_task, allocation.time_min, array.workers, array.tasks) == (8, 240, 8, 16)
    assert (allocation.partition, allocation.account, allocation.qos, allocation.memory) == (
        "cpu",
        "lab",
        "long",
        "32G",
    )
    assert allocation.setup == ("module load python",) and allocation.srun_args == ("--mpi=none",)
    assert allocation.python == "/opt/python" and dict(allocation.environment) == {"HF_HOME": "/shared/hf"}
    assert allocation.image == "image.sqsh" and allocation.sbatch == {"comment": "conversion"}


def test_array_flags_override_the_cluster_file(resolve):
    flags = ["--executor", "auto", "--time", "1:30:00", "--partition", "big", "--qos", "short", "--constraint", "ib"]
    array = resolve(*flags, "--cpus-per-task", 3, "--array", 5, "--array-parallelism", 2, "--after", 7, file=FILE)
    allocation = array.allocation
    assert (allocation.time_min, allocation.partition, allocation.qos) == (90, "big", "short")
    assert (allocation.constraint, allocation.dependency, allocation.array_parallelism) == ("ib", "afterok:7", 2)
    assert (array.tasks, array.workers) == (5, 3)
    assert resolve("--executor", "slurm", file='time = "1:00:00"').allocation.time_min == 60


def test_only_work_on_gpus_gets_gpus_with_a_worker_each(resolve):
    array = resolve("--executor", "slurm", file=FILE, with_gpus=True)
    assert (array.allocation.gpus_per_node, array.workers) == (1, 1)
    array = resolve("--executor", "slurm", "--gpus-per-task", "a100:4", with_gpus=True)
    assert (array.allocation.gpu_type, array.allocation.gpus_per_node, array.workers) == ("a100", 4, 4)
    assert resolve("--executor", "slurm", "--gpus-per-task", "0", with_gpus=True).workers == 8


@pytest.mark.parametrize(
    ("file", "flags", "asked"),
    [
        ('gres = "gpu:v100:8"', [], ("gres", "v100", 1)),
        ('gres = "gpu:v100:8"', ["--gpus-per-task", 2], ("gres", "v100", 2)),
        ("exclusive = 4", [], ("exclusive", "", 4)),
        ('gpus_per_task = "a100:1"\ntasks_per_node = 4', [], ("gpus_per_task", "a100", 1)),
        ('gpus_per_task = "a100:1"\ntasks_per_node = 4', ["--gpus-per-task", "h100:2"], ("gpus_per_node", "h100", 2)),
    ],
)
def test_gpus_are_asked_for_as_the_site_demands(resolve, file, flags, asked):
    allocation = resolve("--executor", "slurm", *flags, file=file, with_gpus=True).allocation
    assert (allocation.gpus_from, allocation.gpu_type, allocation.gpus_per_node) == asked
    assert resolve("--executor", "slurm", file=file).allocation.gpus_per_node == 0


@pytest.mark.parametrize(
    ("file", "limit"), [("UNLIMITED", 240), ("partition", "partition"), ("30", 30), ("1-00:00:00", 240)]
)
def test_time_limit_of_the_cluster_file_only_shortens_a_task(resolve, file, limit):
    assert resolve("--executor", "slurm", file=f'time = "{file}"').allocation.time == limit


def test_flags_without_effect_are_refused(resolve, capsys):
    assert resolve(file=FILE) is None
    for flags in (["--array", 4], ["--qos", "x"], ["--after", 3], ["--logs", "x"], ["--time", "1:00"]):
        with pytest.raises(UserError, match=f"^{flags[0]} without --executor slurm would do nothing"):
            resolve(*flags)
    for flags in (["--nodes", 2], ["--array", 0], ["--time", "soon"], ["--interface", "ib0"], ["--gpus-per-task", 1]):
        with pytest.raises(SystemExit):
            resolve("--executor", "slurm", *flags)


def job_in(state: str) -> SlurmJob:
    return SlurmJob("12_0", state, "", "", 0, "", "n1")


@pytest.mark.parametrize(("then", "follows"), [({}, False), ({"12_0": job_in("PENDING")}, True)])
def test_jobs_that_are_ending_are_waited_for_before_it_is_decided(
    resolve, tmp_path, monkeypatch, capsys, then, follows
):
    """Cancelled tasks stay COMPLETING for a while: following them would end without results."""
    leaving = {"12_0": job_in("COMPLETING"), "12_1": job_in("CG")}
    answers = iter([leaving, leaving, then])
    done = []
    monkeypatch.setattr(array, "queue_of_name", lambda name: next(answers))
    monkeypatch.setattr(array, "_ASK_S", 0.0)
    monkeypatch.setattr(array, "_submit", lambda *_: done.append("submitted"))
    monkeypatch.setattr(array, "_follow", lambda *_: done.append("followed") or ["/"])
    monkeypatch.setattr(array, "_clean_up", lambda *_: None)
    asked = resolve("--executor", "slurm", "--logs", tmp_path)
    work = array.Work("test", "test", os.getenv, ["HOME"], ["home"])
    (tmp_path / work.name / "results").mkdir(parents=True)
    assert array.run_array(work, asked) == ["/"]
    assert done == (["followed"] if follows else ["submitted", "followed"])
    assert capsys.readouterr().out.count("are ending: waiting for them") == 1


def test_jobs_with_results_elsewhere_are_neither_followed_nor_cancelled(resolve, tmp_path, monkeypatch):
    monkeypatch.setattr(array, "queue_of_name", lambda name: {"12_0": job_in("RUNNING")})
    monkeypatch.setattr(array, "cancel", lambda *jobs: pytest.fail(f"cancelled {jobs}"))
    asked = resolve("--executor", "slurm", "--logs", tmp_path / "other")
    with pytest.raises(UserError, match=f"results are not in {tmp_path / 'other'}.*same --logs"):
        array.run_array(array.Work("test", "test", os.getenv, ["HOME"], ["home"]), asked)


# --- a task -----------------------------------------------------------------------------------------------------------


def test_early_warning_follows_the_restart_policy(tmp_path, monkeypatch):
    """submitit would requeue the task whatever the policy says, and go on."""
    task = array_task.ArrayTask(tmp_path, 0, 1, None)
    (tmp_path / "work").mkdir()
    (tmp_path / "work/0.pkl").write_bytes(pickle.dumps([("a", 1), ("b", 2)]))
    (tmp_path / "results").mkdir()
    (tmp_path / "results/a.pkl").touch()
    asked = []

    class Policy:
        def after_stop(self, cause, progress):
            asked.append((cause, progress))
            return 143

    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(array_task.Restarts, "of_this_job", lambda *_, **__: Policy())
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit) as left:
        task.checkpoint()
    assert left.value.code == 143 and asked == [(Cause.WARNED, 1)]


# --- on Slurm ---------------------------------------------------------------------------------------------------------

COMMAND = """
import argparse, json, os, sys, time
from cfmask.runtime.command import exits_cleanly
from launch.arrays.array import Work, run_array
from launch.arrays.arguments import add_array_arguments, resolve_array

@exits_cleanly
def main():
    function, items = {"getenv": os.getenv, "sleep": time.sleep}[sys.argv[1]], json.loads(sys.argv[2])
    parser = argparse.ArgumentParser()
    add_array_arguments(parser)
    array = resolve_array(parser.parse_args(["--executor", "slurm", *sys.argv[3:]]))
    keys = [f"item-{number}" for number in range(len(items))]
    print(json.dumps(run_array(Work("test", "test", function, items, keys), array)))

sys.exit(main())
"""


def start(folder: Path, function: str, items: str, *flags: object) -> subprocess.Popen:
    """An array of os.getenv, or of time.sleep, over items in JSON; its folder is in ``folder``/jobs."""
    command = [sys.executable, "-c", COMMAND, function, items, "--logs", folder / "jobs", "--cpus-per-task", 1, *flags]
    return subprocess.Popen(
        [str(word) for word in command], cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def array_of(process: subprocess.Popen) -> str:
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if "array job " in line:
            return line.partition("array job ")[2].split()[0]
    raise AssertionError("".join(said))


def wait_for_starts(folder: Path, count: int) -> None:
    """Until the tasks have begun so many times, all together."""

    def begun() -> int:
        return sum(len(path.read_text().splitlines()) for path in folder.glob("jobs/*/tasks/*/attempts.jsonl"))

    wait_until(lambda: begun() >= count, f"{count} starts")


@pytest.mark.slurm
def test_tasks_get_the_settings_of_the_cluster_file(slurm_cluster: Cluster, tmp_path):
    cluster = tmp_path / "cluster.toml"
    cluster.write_text(
        'partition = "high"\nnodes = 2\ngpus_per_node = 8\nsetup = ["export FROM_SETUP=set"]\n'
        '[environment]\nFROM_FILE = "of $SLURM_JOB_PARTITION"\n[sbatch]\ncomment = "hello"\n'
    )
    asked = '["FROM_SETUP", "FROM_FILE", "SLURM_JOB_PARTITION", "SLURM_JOB_NUM_NODES"]'
    process = start(tmp_path, "getenv", asked, "--cluster", cluster, "--array", 2, "--time", "1:00:00")
    array = array_of(process)
    job = slurm_cluster.job(f"{array}_0")
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert output.strip() == '["set", "of high", "high", "1"]'
    assert (job["TimeLimit"], job["Comment"], job["Requeue"]) == ("01:00:00", "hello", "1")
    assert not list((tmp_path / "jobs").iterdir())


@pytest.mark.slurm
def test_preempted_tasks_resume(slurm_cluster: Cluster, tmp_path):
    process = start(tmp_path, "sleep", "[0, 0, 8, 8]", "--array", 2, "--partition", "low")
    array = array_of(process)
    wait_until(lambda: len(list(tmp_path.glob("jobs/*/results/*.pkl"))) == 2, "the quick items")
    slurm_cluster.sbatch("--partition=high", "--nodes=2", "--exclusive", "--wrap=true", cwd=tmp_path)
    for task in (f"{array}_0", f"{array}_1"):
        wait_until(lambda task=task: slurm_cluster.job(task).get("Restarts") == "1", "the requeue")
        slurm_cluster.start_again_now(task)
    wait_for_starts(tmp_path, 4)
    second = [path.read_text().splitlines()[1] for path in tmp_path.glob("jobs/*/tasks/*/attempts.jsonl")]
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert output.strip() == "[null, null, null, null]"
    assert all('"from_step": 1,' in line and '"why_last_ended": "stopped: ' in line for line in second), second


@pytest.mark.slurm
def test_task_without_progress_is_given_up_with_a_reason(slurm_cluster: Cluster, tmp_path):
    process = start(tmp_path, "sleep", "[60, 60]", "--array", 1, "--restarts-without-progress", 1)
    job = array_of(process)
    for starts in (1, 2):
        wait_for_starts(tmp_path, starts)
        slurm_cluster.call("scontrol", "requeue", job)
        slurm_cluster.start_again_now(job)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 2
    assert "2 of 2 results are missing" in errors and "made no progress beyond item 0 in 2 starts in a row" in errors
    assert "--restarts-without-progress allows 1" in errors and "Traceback" not in errors
    assert slurm_cluster.job(job)["Restarts"] == "2"


@pytest.mark.slurm
def test_array_is_followed_again_and_cancelled_by_interrupt(slurm_cluster: Cluster, tmp_path):
    process = start(tmp_path, "sleep", "[60, 60]")
    array = array_of(process)
    slurm_cluster.wait_for_state(f"{array}_0", "RUNNING")
    process.kill()  # nobody cancels: the same command follows what is there
    process.wait()
    process = start(tmp_path, "sleep", "[60, 60]")
    assert process.stdout is not None and "jobs of an earlier command are in the queue" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=300)
    assert process.returncode == 130
    # Given again at once, it submits the work again. Cancelled by somebody else, it is an error in one paragraph.
    process = start(tmp_path, "sleep", "[60, 60]")
    cancelled, array = array, array_of(process)
    slurm_cluster.wait_for_state(f"{cancelled}_0", "CANCELLED")
    slurm_cluster.wait_for_state(f"{array}_0", "RUNNING")
    slurm_cluster.call("scancel", array)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 2 and "The jobs ended, and 2 of 2 results are missing" in errors
