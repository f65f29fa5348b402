"""Cancelling ends a run for good: with a checkpoint, from every state, on this machine and on a real Slurm."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import made
from cfmask.recipe import Recipe
from cfmask.runs import RunFolder
from cfmask.runtime.jsonl import read_lines
from cfmask.runtime.machine import process_runs
from launch import cancel
from launch.state import cancellation
from launch.state.facts import SlurmAnswers, read_state
from launch.state.status import status_of
from made import wait_for_step
from slurm_fixture import Cluster, wait_until

REPO = Path(__file__).resolve().parents[1]
LONG = 400  # epochs: nothing here is to end by itself


@pytest.fixture(scope="module")
def materials(tmp_path_factory) -> Path:
    return made.make_materials(tmp_path_factory.mktemp("materials"))


def run_tool(name: str, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, REPO / "launch" / f"{name}.py", *arguments]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=240)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def state_of(run: Path) -> str:
    [status] = json.loads(run_tool("status", run, "--json").stdout)
    return status["state"]


def assert_left_a_checkpoint_of_where_it_stopped(run: Path, told: str) -> int:
    [attempt] = read_lines(run / "attempts.jsonl")
    why = json.loads((run / "ended.json").read_text())["why"]
    step = RunFolder(run).saved_step()
    assert attempt["from_step"] == 0 and why == f"stopped at step {step} (quit)"
    assert f"cancelled at step {step}; the latest checkpoint is {run / f'checkpoints/step-{step:08d}'}" in told
    assert json.loads((run / f"checkpoints/step-{step:08d}/state.json").read_text())["step"] == step
    assert not (run / "results.json").exists()
    return step


# --- on this machine ----------------------------------------------------------------------------------------------


def local(materials: Path, run: Path, *more: object) -> list[object]:
    flags = ["--executor", "local", "--tasks-per-node", 2, "--epochs", LONG, "--checkpoint-steps", 10_000]
    return [*made.recipe_flags(materials, run), *flags, *more]


def test_a_run_on_this_machine_ends_with_a_checkpoint_and_a_resume_takes_the_mark_away(materials, tmp_path):
    run = tmp_path / "run"
    process = made.start(*local(materials, run))
    wait_for_step(run, 8)
    assert state_of(run) == "running"
    done = run_tool("cancel", run)
    assert done.returncode == 0
    step = assert_left_a_checkpoint_of_where_it_stopped(run, done.stdout)
    assert step >= 8
    assert process.wait(timeout=300) == 1
    assert state_of(run) == "cancelled"
    assert RunFolder(run).owner() is None

    again = run_tool("cancel", run)
    assert again.returncode == 0 and "already cancelled by" in again.stdout and f"step {step}" in again.stdout

    resumed = made.start("--resume", run, "--executor", "local", "--tasks-per-node", 2)
    try:
        wait_for_step(run, step + 5)
        assert state_of(run) == "running"
        assert read_lines(run / "attempts.jsonl")[1]["from_step"] == step
    finally:
        made.kill_all(resumed)


def test_the_mark_alone_ends_a_run(materials, tmp_path):
    """On another machine no signal of ours reaches it."""
    run = tmp_path / "run"
    process = made.start(*local(materials, run))
    wait_for_step(run, 3)
    RunFolder(run).cancel()
    assert process.wait(timeout=300) == 1
    assert read_lines(run / "attempts.jsonl")[-1]["from_step"] == 0
    assert json.loads((run / "ended.json").read_text())["why"].endswith("(quit)")


def test_a_job_that_finds_the_mark_does_not_start(materials, tmp_path):
    run = tmp_path / "run"
    process = made.start(*local(materials, run))
    wait_until(lambda: list((run / "jobs").glob("*_submitted.pkl")), "the job is submitted")
    RunFolder(run).cancel()
    assert process.wait(timeout=300) == 1
    assert not (run / "log.jsonl").exists()
    [attempt] = read_lines(run / "attempts.jsonl")
    assert attempt["from_step"] is None
    told = status_of(read_state(RunFolder(run)), SlurmAnswers())
    assert (told.state, told.step) == ("cancelled", None)


def test_what_does_not_end_in_time_is_killed(materials, tmp_path):
    run = tmp_path / "run"
    process = made.start(*local(materials, run))
    wait_for_step(run, 8)
    rank = RunFolder(run).owner().pid
    os.kill(rank, signal.SIGSTOP)
    done = run_tool("cancel", run, "--grace", 2)
    assert done.returncode == 0
    assert "is still there: killed" in done.stdout and "there is no checkpoint" not in done.stdout
    assert process.wait(timeout=300) == 1
    assert not process_runs(rank)
    listed = subprocess.run(["ps", "-o", "stat=", "-g", str(process.pid)], capture_output=True, text=True).stdout
    assert all(line.startswith("Z") for line in listed.split()), "a rank is left"


def test_a_run_without_a_job_is_marked(tmp_path):
    RunFolder(tmp_path / "run").claim(Recipe())
    done = run_tool("cancel", tmp_path / "run")
    assert done.returncode == 0
    assert "There is no job of this run" in done.stdout and "there is no checkpoint" in done.stdout
    assert state_of(tmp_path / "run") == "cancelled"


def test_a_finished_run_is_left_alone(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.claim(Recipe())
    run.results.write_text("{}")
    done = run_tool("cancel", run.root)
    assert done.returncode == 0 and "nothing to cancel" in done.stdout
    assert run.cancelled() is None


def test_what_is_no_run_is_a_sentence(tmp_path, capsys, monkeypatch):
    def refused(*arguments: object) -> str:
        assert cancel.main(list(map(str, arguments))) == 2
        [said] = capsys.readouterr().err.splitlines()
        return said

    assert "No such file" in refused(tmp_path / "nowhere")
    RunFolder(tmp_path / "run").claim(Recipe())
    assert "folder of runs" in refused(tmp_path)
    assert "--grace must be at least 0" in refused(tmp_path / "run", "--grace", "nan")

    def deny(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("cfmask.runs.write_atomically", deny)
    assert "cannot be written: Permission denied" in refused(tmp_path / "run")


def test_interrupted_it_says_that_the_mark_stays(tmp_path, capsys, monkeypatch):
    run = RunFolder(tmp_path / "run")
    run.claim(Recipe())

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cancellation, "end_jobs", interrupt)
    assert cancel.main([str(run.root)]) == 130
    assert "The mark stays" in capsys.readouterr().out
    assert run.cancelled()


def test_a_process_that_has_the_number_of_one_of_ours_is_left_alone(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.claim(Recipe())
    (run.root / "jobs").mkdir()
    other = subprocess.Popen(["sleep", "60"])
    try:
        (run.root / f"jobs/{other.pid}_submitted.pkl").touch()
        assert run_tool("cancel", run.root).returncode == 0
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


# --- on Slurm -----------------------------------------------------------------------------------------------------


def on_slurm(materials: Path, run: Path, *more: object) -> list[object]:
    return [
        *made.recipe_flags(materials, run),
        *("--gpus-per-node", 0, "--epochs", LONG, "--checkpoint-steps", 10_000),
        *("--nodes", 2, "--tasks-per-node", 1, "--cpus-per-task", 1, "--time", 30),
        *more,
    ]


def submit(materials: Path, run: Path, *more: object) -> str:
    done = made.submit(*on_slurm(materials, run, *more), pace_s=made.PACE_S)
    return next(line.split()[1] for line in done.stdout.splitlines() if line.startswith("job "))


@pytest.mark.slurm
def test_a_running_job_refuses_a_second_one_and_saves_and_leaves_when_it_is_cancelled(
    slurm_cluster: Cluster, materials, tmp_path
):
    run = tmp_path / "run"
    name = submit(materials, run)
    wait_for_step(run, 2)
    # submit.py would refuse it; this is what it would have sent.
    second = slurm_cluster.sbatch("--hold", str(run / f"jobs/{name}_submission.sh"), cwd=tmp_path)
    shutil.copy(run / f"jobs/{name}_submitted.pkl", run / f"jobs/{second}_submitted.pkl")
    slurm_cluster.call("scontrol", "release", second)
    slurm_cluster.wait_for_state(second, "FAILED")
    log = "".join(path.read_text() for path in (run / "jobs").glob(f"{second}_*_log.out"))
    assert f"Another job is training into {run}" in log
    step = RunFolder(run).logged_step()
    wait_for_step(run, step + 5)
    assert state_of(run) == "running" and slurm_cluster.job(name)["JobState"] == "RUNNING"
    done = run_tool("cancel", run)
    assert done.returncode == 0, done.stderr
    assert "save a checkpoint and end" in done.stdout and "still there" not in done.stdout
    assert_left_a_checkpoint_of_where_it_stopped(run, done.stdout)
    assert slurm_cluster.call("squeue", "--noheader", f"--jobs={name}") == ""
    assert (slurm_cluster.job(name)["JobState"], slurm_cluster.job(name)["Restarts"]) == ("COMPLETED", "0")
    assert state_of(run) == "cancelled"


@pytest.mark.slurm
def test_a_job_that_is_just_starting_ends_without_being_killed(slurm_cluster: Cluster, materials, tmp_path):
    """Its ranks do not find the mark at the same moment: some have looked before it came."""

    def starts_and_is_cancelled(delay_s: int) -> None:
        run = tmp_path / f"after-{delay_s}"
        name = submit(materials, run)
        slurm_cluster.wait_for_state(name, "RUNNING")
        time.sleep(delay_s)
        done = run_tool("cancel", run)
        assert done.returncode == 0, done.stderr
        assert "still there" not in done.stdout
        assert state_of(run) == "cancelled"

    with ThreadPoolExecutor() as threads:
        list(threads.map(starts_and_is_cancelled, (0, 1, 3)))


@pytest.mark.slurm
def test_a_job_that_waits_leaves_the_queue(slurm_cluster: Cluster, materials, tmp_path):
    blocker = slurm_cluster.sbatch("--nodes=2", "--exclusive", "--wrap=sleep 300", cwd=tmp_path)
    try:
        slurm_cluster.wait_for_state(blocker, "RUNNING")
        run = tmp_path / "run"
        name = submit(materials, run)
        assert state_of(run) == "queued"
        done = run_tool("cancel", run)
        assert done.returncode == 0 and f"job {name} waits in the queue: removed from it" in done.stdout
        assert slurm_cluster.job(name)["JobState"] == "CANCELLED"
        assert state_of(run) == "cancelled" and not (run / "attempts.jsonl").exists()
    finally:
        slurm_cluster.call("scancel", blocker)


@pytest.mark.slurm
def test_a_job_that_was_just_requeued_does_not_go_on(slurm_cluster: Cluster, materials, tmp_path):
    """The mark comes while it waits for its next start, from somewhere without Slurm."""
    run = tmp_path / "run"
    name = submit(materials, run)
    wait_for_step(run, 4)
    slurm_cluster.call("scancel", "--signal=USR2", name)
    slurm_cluster.wait_for_state(name, "PENDING")
    assert state_of(run) == "requeued"
    RunFolder(run).cancel()
    assert state_of(run) == "cancelling"
    slurm_cluster.start_again_now(name)
    slurm_cluster.wait_for_state(name, "COMPLETED")
    assert slurm_cluster.job(name)["Restarts"] == "1"
    first, second = read_lines(run / "attempts.jsonl")
    assert second["why_last_ended"] == f"stopped at step {RunFolder(run).saved_step()} (requeue)"
    assert second["from_step"] is None
    assert json.loads((run / "ended.json").read_text())["why"].startswith("not started: cancelled by")
    assert state_of(run) == "cancelled"


@pytest.mark.slurm
def test_a_job_that_comes_back_without_getting_anywhere_is_given_up(slurm_cluster: Cluster, materials, tmp_path):
    run = tmp_path / "run"
    name = submit(materials, run, "--restarts-without-progress", 0)
    wait_for_step(run, 4)
    # As if it had come this far before; no checkpoint of it comes near.
    RunFolder(run).begin_attempt(job=f"{name}-0", from_step=10_000_000)
    slurm_cluster.call("scontrol", "requeue", name)
    slurm_cluster.start_again_now(name)
    slurm_cluster.wait_for_state(name, "FAILED")
    why = json.loads((run / "ended.json").read_text())["why"]
    assert "given up" in why and "stopped at step" in why and f"submit.py --resume {run}" in why
    assert state_of(run) == "failed"


@pytest.mark.slurm
def test_the_lock_of_a_job_that_was_killed_is_taken_over(slurm_cluster: Cluster, materials, tmp_path):
    run = tmp_path / "run"
    name = submit(materials, run, "--retries", 0)
    wait_for_step(run, 8)
    os.kill(RunFolder(run).owner().pid, signal.SIGKILL)
    slurm_cluster.wait_for_state(name, "FAILED")
    assert state_of(run) == "failed"
    # As it looks from another node, a good while later.
    [file] = (run / ".owner").iterdir()
    file = file.rename(file.with_name(f"n17,another machine,4711,{name}-0,0a1b2c3d"))
    os.utime(file, (time.time() - 75,) * 2)
    # A minute outside of tests.
    clone = made.plant(tmp_path / "clone", cfmask__runtime__lock="DEAD_AFTER_S = 20\n")
    told = made.submit(*on_slurm(materials, run), pace_s=made.PACE_S, repository=clone).stdout
    assert f"{run}: lock taken over from job {name}-0, process 4711 on n17, which has had no heartbeat for " in told
    wait_until(lambda: len(read_lines(run / "attempts.jsonl")) == 2, "the second start")
    assert state_of(run) == "running"
    assert run_tool("cancel", run).returncode == 0


@pytest.mark.slurm
def test_one_run_of_a_sweep_is_cancelled_and_the_other_goes_on(slurm_cluster: Cluster, materials, tmp_path):
    flags = on_slurm(materials, Path("unused"), "--nodes", 1, "--seeds", 0, 1)
    cut = flags.index("--run")
    made.submit(*flags[:cut], *flags[cut + 2 :], cwd=tmp_path, pace_s=made.PACE_S)
    first, second = sorted(path for path in (tmp_path / "runs").iterdir() if path.name[0] != ".")
    try:
        wait_for_step(first, 2)
        wait_for_step(second, 2)
        jobs = [status["job"] for status in json.loads(run_tool("status", tmp_path / "runs", "--json").stdout)]
        assert len(set(jobs)) == 2 and all("_" in job for job in jobs)
        assert run_tool("cancel", first).returncode == 0
        assert (state_of(first), state_of(second)) == ("cancelled", "running")
        step = RunFolder(second).logged_step()
        wait_for_step(second, step + 5)
    finally:
        assert run_tool("cancel", second).returncode == 0


@pytest.mark.slurm
def test_following_a_job_survives_its_requeue(slurm_cluster: Cluster, materials, tmp_path):
    run = tmp_path / "run"
    name = submit(materials, run, "--epochs", 20)
    command = [sys.executable, REPO / "launch/status.py", run, "--follow"]
    following = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )
    try:
        wait_for_step(run, 8)
        slurm_cluster.call("scancel", "--signal=USR2", name)
        slurm_cluster.start_again_now(name)
        told, bar = following.communicate(timeout=400)
    finally:
        following.kill()
    assert following.returncode == 0, told + bar
    assert "finished: " in told
    assert len(read_lines(run / "attempts.jsonl")) == 2
