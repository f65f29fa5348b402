"""Sweeps as one array, the code snapshot, resuming with another number of ranks, dry runs, dependencies, refusals."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import made
from cfmask.runtime.jsonl import read_lines
from launch.submission.snapshot import differing_files, take
from made import logs, wait_for, wait_for_step
from slurm_fixture import wait_until

# --- the code that was submitted --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def materials(tmp_path_factory) -> Path:
    return made.make_materials(tmp_path_factory.mktemp("materials"))


@pytest.fixture
def clone(tmp_path) -> Path:
    """A copy of the repository that a test may break."""
    for folder in ("cfmask", "launch"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(made.REPO / folder, tmp_path / "clone" / folder, ignore=ignored)
    return tmp_path / "clone"


@pytest.fixture(autouse=True)
def nobodys_cluster_file(monkeypatch):
    monkeypatch.setenv("CFMASK_CLUSTER", "")


def flags(materials: Path, *more: object) -> list[object]:
    """A recipe with 6 steps in each epoch and the default run folder."""
    recipe = made.recipe_flags(materials, Path("unused"))
    cut = recipe.index("--run")
    return [*recipe[:cut], *recipe[cut + 2 :], *more]


def submit(repo: Path, *words: object, check: bool = True, **popen) -> subprocess.CompletedProcess:
    """``made.submit`` with the code of another working copy."""
    return made.submit(*words, check=check, repository=repo, **popen)


def break_code(repo: Path) -> None:
    """Make imports from this copy fail."""
    for module in ("cfmask/training/train.py", "launch/ranks/rank.py"):
        (repo / module).write_text("raise RuntimeError('this is not what was submitted')\n")


def test_snapshot_has_the_code_of_a_job_and_is_named_after_its_digest(tmp_path, clone):
    snapshot = take(clone, tmp_path / "code")
    assert snapshot.path == tmp_path / "code" / snapshot.digest
    assert differing_files(clone, snapshot.path) == []
    assert not list(snapshot.path.rglob("__pycache__"))
    assert (snapshot.path / "cfmask/training/train.py").stat().st_mode & 0o777 == 0o444
    assert take(clone, tmp_path / "code").info == snapshot.info, "once is enough"
    assert [path.name for path in (tmp_path / "code").iterdir()] == [snapshot.digest], "nothing else is left there"
    (clone / "cfmask/step.py").write_text("# better\n")
    other = take(clone, tmp_path / "code")
    assert other.digest != snapshot.digest
    assert differing_files(snapshot.path, other.path) == ["cfmask/step.py"]
    assert take(snapshot.path, tmp_path / "code").info == snapshot.info, "a snapshot's own is itself"


def test_snapshot_records_the_commit_and_uncommitted_files(tmp_path, clone):
    def git(*words: str) -> str:
        who = ("-c", "user.name=x", "-c", "user.email=x@example.org")
        done = subprocess.run(["git", *who, *words], cwd=clone, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    assert take(clone, tmp_path / "code").info["commit"] is None
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "-m", "x")
    (clone / "cfmask/step.py").write_text("# better\n")
    (clone / "cfmask/new.py").write_text("")
    info = take(clone, tmp_path / "code").info
    assert info["commit"] == git("rev-parse", "HEAD")
    assert info["uncommitted"] == ["cfmask/step.py", "cfmask/new.py"]
    assert info["packages"]["torch"]


def test_requeued_job_runs_the_code_that_was_submitted(materials, clone, tmp_path):
    """Submitted from within the working copy, where `python -m` would find its modules first."""
    run = tmp_path / "run"
    command = [sys.executable, "launch/submit.py", *flags(materials, "--run", run, "--executor", "local")]
    command += ["--tasks-per-node", 2, "--epochs", 40]
    process = subprocess.Popen(
        list(map(str, command)),
        cwd=clone,
        env=made.environment_of(clone),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: any(line["step"] >= 3 for line in read_lines(run / "log.jsonl")), "step 3")
        break_code(clone)
        for pid in made.ranks_of(process):
            os.kill(pid, signal.SIGUSR2)
        assert process.wait(timeout=300) == 0
    finally:
        if process.poll() is None:
            made.kill_all(process)
    first, second = read_lines(run / "attempts.jsonl")
    assert second["from_step"] >= 3 and "(requeue)" in second["why_last_ended"]
    assert (run / "results.json").exists()


def test_resume_takes_the_current_code_and_names_the_earlier_one(materials, clone, tmp_path):
    run = tmp_path / "run"
    submit(clone, *flags(materials, "--run", run, "--executor", "local", "--tasks-per-node", 1, "--epochs", 1))
    (run / "results.json").unlink()  # not finished after all
    with open(clone / "cfmask/step.py", "a") as file:
        file.write("# better\n")
    here = ("--resume", run, "--executor", "local")
    said = submit(clone, *here).stdout
    assert (
        "The code differs from that of the run's last submission: cfmask/step.py. To resume with the earlier code: "
        "python " in said
    )
    old = Path(re.search(r"python (\S+)/launch/submit.py --resume", said)[1])
    (run / "results.json").unlink()
    said = submit(old, *here).stdout
    assert f"code {old.name}" in said
    codes = [line["code"] for line in read_lines(run / "jobs/submissions.jsonl")]
    assert codes[0] == codes[2] == old.name != codes[1]
    assert {path.name for path in (run / "code").iterdir()} == set(codes)


# --- on this machine --------------------------------------------------------------------------------------------------


def test_local_sweep_runs_members_in_turn_and_skips_finished_ones(materials, tmp_path):
    here = ("--executor", "local", "--tasks-per-node", 2, "--epochs", 1)
    done = made.submit(*flags(materials, *here, "--presets", "ft", "fd-clean", "--seeds", 3), cwd=tmp_path)
    runs = sorted((tmp_path / "runs").iterdir())
    recipes = [json.loads((run / "recipe.json").read_text()) for run in runs]
    assert [(r["method"]["name"], r["run"]["seed"]) for r in recipes] == [("feature-distillation", 3), ("vanilla", 3)]
    assert all((run / "results.json").exists() for run in runs) and done.stdout.count("finished: ") == 2
    before = [(run / "results.json").stat().st_mtime_ns for run in runs]
    more = flags(materials, *here, "--presets", "ft", "fd-clean", "--seeds", 3, 0, "--dry-run")
    again = made.submit(*more, cwd=tmp_path).stdout
    assert again.count("is finished: skipped") == 2
    assert re.search(r"runs/ft-tiny-s0-\w+\n +runs/fd-clean-tiny-s0-\w+\n", again)
    assert [(run / "results.json").stat().st_mtime_ns for run in runs] == before


def test_failed_member_of_a_sweep_does_not_stop_the_others(materials, tmp_path):
    here = ("--executor", "local", "--epochs", 1, "--max-skipped-steps", 0, "--lr", 1e30, "--seeds", 0, 1)
    done = made.submit(*flags(materials, *here), cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert re.search(r"2 of 2 runs did not finish: \S+-s0-\w+, \S+-s1-\w+$", done.stdout.strip())
    assert [len(read_lines(run / "attempts.jsonl")) for run in (tmp_path / "runs").iterdir()] == [1, 1]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--seeds", 0, 1, "--seed", 2), "--seed and --seeds contradict each other"),
        (("--presets", "ft", "--preset", "ft"), "--preset and --presets contradict each other"),
        (("--seeds", 1, 1), "--seeds names one of them twice: 1 1"),
        (("--seeds", 0, 1, "--run", "x"), "--run names one folder, and this is a sweep of 2 runs"),
        (("--presets", "ft", "fd-clean", "--beta", 3), "--beta would do nothing with --method vanilla"),
        (("--seeds", 0, 1, "--follow"), "--follow and --no-follow are for a single run"),
        (("--seeds", 0, 1, "--partition", "x"), "--partition would do nothing"),
        (
            ("--executor", "slurm", "--gpus-per-node", 0, "--array-parallelism", 2),
            "--array-parallelism would do nothing",
        ),
    ],
)
def test_contradictory_sweep_flags_are_refused(materials, tmp_path, more, said):
    done = made.submit(
        *flags(materials, "--executor", "local", "--tasks-per-node", 2, *more), check=False, cwd=tmp_path
    )
    assert done.returncode == 2 and said in done.stderr, done.stderr
    assert not (tmp_path / "runs").exists()


def test_shards_may_come_from_the_cluster_file(materials, tmp_path):
    (tmp_path / "cluster.toml").write_text(f"shards = '{materials}/shards'\neval_sets = ['val']\nnodes = 2\n")
    words = flags(materials, "--executor", "local", "--dry-run")
    cut = words.index("--shards")
    done = made.submit(*words[:cut], *words[cut + 2 :], cwd=tmp_path, env={"CFMASK_CLUSTER": "cluster.toml"})
    recipe = json.loads(done.stdout[: done.stdout.rindex("}") + 1])
    assert recipe["data"]["shards"] == str(materials / "shards") and recipe["data"]["eval_sets"] == ["val"]
    assert "; cluster file cluster.toml" in done.stdout
    other = made.submit(*words, "--eval-sets", cwd=tmp_path, env={"CFMASK_CLUSTER": "cluster.toml"}).stdout
    assert json.loads(other[: other.rindex("}") + 1])["data"]["eval_sets"] == [], "flags win"
    without = made.submit(*words[:cut], *words[cut + 2 :], cwd=tmp_path, check=False)
    assert "--shards is missing" in without.stderr and "cluster file" in without.stderr


def test_run_resumes_with_another_number_of_ranks(materials, tmp_path):
    run = tmp_path / "run"
    here = ("--executor", "local")
    made.submit(*flags(materials, "--run", run, *here, "--tasks-per-node", 2, "--epochs", 1))
    (run / "results.json").unlink()
    assert "Ranks: 1, where there were 2" in made.submit("--resume", run, *here, "--tasks-per-node", 1).stderr
    (run / "results.json").unlink()
    as_it_was = made.submit("--resume", run, *here, "--dry-run")
    assert "this machine: 1 CPU rank\n" in as_it_was.stdout and "ranks, where" not in as_it_was.stderr
    refused = made.submit("--resume", run, *here, "--tasks-per-node", 3, check=False)
    assert "3 ranks cannot share 4 lanes" in refused.stderr
    assert [line["world_size"] for line in read_lines(run / "attempts.jsonl")] == [2, 1]
    refused = made.submit("--resume", run, *here, "--seeds", 1, 2, check=False)
    assert "these flags would do nothing: --seeds." in refused.stderr


# --- on a real Slurm --------------------------------------------------------------------------------------------------

ON_TWO_NODES = ("--nodes", 2, "--gpus-per-node", 0, "--tasks-per-node", 1, "--cpus-per-task", 1, "--time", 30)
ON_ONE_NODE = ("--nodes", 1, *ON_TWO_NODES[2:])


def wait_for_end(run: Path) -> None:
    wait_for(run, (run / "results.json").exists, f"the end of {run.name}")


@pytest.mark.slurm
def test_dry_run_prints_the_sbatch_file_and_queues_nothing(slurm_cluster, materials, tmp_path):
    blocker = slurm_cluster.sbatch("--hold", "--output=/dev/null", "--wrap=true", cwd=tmp_path)
    before = slurm_cluster.call("squeue", "--noheader", "--array")
    for more in ((), ("--seeds", 0, 1, 2, "--array-parallelism", 2)):
        words = flags(materials, *ON_TWO_NODES, *more, "--partition", "high", "--after", blocker, "--dry-run")
        done = made.submit(*words, cwd=tmp_path)
        text = done.stdout[done.stdout.index("#!/bin/bash") :]
        for line in ("--nodes=2", "--partition=high", "--time=30", "--requeue", f"--dependency=afterok:{blocker}"):
            assert f"#SBATCH {line}" in text
        assert "srun --unbuffered" in text and "--cpus-per-task=1" in text and "/launch/ranks/start.py" in text
        assert ("#SBATCH --array=0-2%2" in text) == bool(more)
        assert re.search(r"Job \d+ to start at", text), "Slurm's own answer"
        assert not list(tmp_path.iterdir())
    assert slurm_cluster.call("squeue", "--noheader", "--array") == before
    slurm_cluster.call("scancel", blocker)


@pytest.mark.slurm
@pytest.mark.parametrize("dry", [True, False], ids=["dry run", "in earnest"])
def test_slurms_refusal_is_shown_and_leaves_no_files(slurm_cluster, materials, tmp_path, dry):
    words = flags(materials, *ON_TWO_NODES, "--partition", "nope", *(["--dry-run"] if dry else []))
    for sweep in ((), ("--seeds", 0, 1)):
        done = made.submit(*words, *sweep, check=False, cwd=tmp_path)
        assert done.returncode == 2, done.stdout
        assert "error: Slurm does not take the job: invalid partition specified: nope" in done.stderr
        assert not [path for path in tmp_path.rglob("*") if path.name not in ("runs", ".sweeps")]


@pytest.mark.slurm
def test_members_of_a_sweep_are_requeued_and_resumed_separately(slurm_cluster, materials, tmp_path):
    """Two runs; one is requeued by an administrator, the other is cancelled and resumed."""
    words = flags(materials, *ON_ONE_NODE, "--seeds", 0, 1, "--epochs", 15, "--checkpoint-steps", 20)
    done = made.submit(*words, cwd=tmp_path, pace_s=made.PACE_S)
    (first, requeued), (second, cancelled) = made.jobs_of(done, tmp_path).items()
    array = first.partition("_")[0]
    assert (first, second) == (f"{array}_0", f"{array}_1")
    wait_for_step(requeued, 25)
    wait_for_step(cancelled, 25)
    slurm_cluster.call("scontrol", "requeue", first)
    slurm_cluster.call("scancel", second)
    wait_until(lambda: slurm_cluster.job(first)["JobState"] == "PENDING", "the requeue")
    again = made.submit(*words, "--dry-run", cwd=tmp_path)
    assert f"Job {first} (pending) already exists for {requeued}: skipped" in again.stdout
    slurm_cluster.start_again_now(first)
    wait_for_end(requeued)
    assert read_lines(requeued / "attempts.jsonl")[1]["from_step"] >= 20
    assert [line["job"] for line in read_lines(requeued / "attempts.jsonl")] == [f"{first}-0", f"{first}-1"]
    assert list((requeued / "jobs").glob(f"{first}_0_log.out")), "logs are in the run's own folder"
    [(third, _)] = made.jobs_of(made.submit("--resume", cancelled)).items()
    wait_for_end(cancelled)
    attempts = read_lines(cancelled / "attempts.jsonl")
    assert [line["job"] for line in attempts] == [f"{second}-0", f"{third}-0"] and attempts[1]["from_step"] >= 20


@pytest.mark.slurm
def test_signals_during_startup_do_not_end_a_job(slurm_cluster, materials, tmp_path):
    """Send USR2 ten times a second from the start of the step until it trains."""
    words = flags(materials, *ON_TWO_NODES, "--epochs", 2, "--run", tmp_path / "run")
    [(job, run)] = made.jobs_of(made.submit(*words)).items()
    wait_until(lambda: f"{job}.0" in slurm_cluster.call("squeue", "--steps", "--noheader"), "its step")
    for _ in range(30):
        try:
            # While a job leaves its nodes, scancel repeats a signal for a minute and a half.
            slurm_cluster.call("timeout", "3", "scancel", "--signal=USR2", job)
        except AssertionError as error:  # it is on its way back into the queue, or there
            assert slurm_cluster.job(job)["JobState"] in ("PENDING", "COMPLETING"), error
            break
        time.sleep(0.1)

    def comes_back_or_is_there() -> bool:
        state = slurm_cluster.job(job)["JobState"]
        assert state in ("RUNNING", "PENDING", "COMPLETED", "COMPLETING"), f"{state}\n{logs(run)}"
        return state == "PENDING" or (run / "results.json").exists()

    wait_for(run, comes_back_or_is_there, "a sign of it")
    if slurm_cluster.job(job)["JobState"] == "PENDING":  # heard by a handler, which is as it should be
        slurm_cluster.start_again_now(job)
    wait_for_end(run)


@pytest.mark.slurm
def test_batch_script_requeues_a_job_whose_ranks_lack_scontrol(slurm_cluster, materials, clone, tmp_path):
    """As in a container: the command that starts Python has its own file system, here its own PATH."""
    (tmp_path / "python").write_text(f'#!/bin/sh\nexport PATH=/nowhere\nexec {sys.executable} "$@"\n')
    (tmp_path / "python").chmod(0o755)
    (clone / "cluster.toml").write_text(f"python = '{tmp_path}/python'\n")
    words = flags(materials, *ON_TWO_NODES, "--epochs", 15, "--cluster", "cluster.toml", "--run", tmp_path / "run")
    [(job, run)] = made.jobs_of(submit(clone, *words, cwd=clone, pace_s=made.PACE_S)).items()
    wait_for_step(run, 5)
    break_code(clone)
    slurm_cluster.call("scancel", "--signal=USR2", job)
    slurm_cluster.start_again_now(job)
    wait_for_end(run)
    first, second = read_lines(run / "attempts.jsonl")
    assert second["from_step"] >= 5 and "(requeue)" in second["why_last_ended"]


@pytest.mark.slurm
def test_job_waits_for_after_and_is_not_queued_twice(slurm_cluster, materials, tmp_path):
    first = slurm_cluster.sbatch("--wrap=until [ -e go ]; do sleep 0.2; done", cwd=tmp_path)
    short = flags(materials, *ON_ONE_NODE, "--epochs", 1)
    [(second, run)] = made.jobs_of(made.submit(*short, "--after", first, cwd=tmp_path), tmp_path).items()
    assert slurm_cluster.job(second)["Dependency"].startswith(f"afterok:{first}(")
    twice = made.submit(*short, cwd=tmp_path, check=False)
    assert twice.returncode == 2 and f"Job {second} (pending)" in twice.stderr and "launch/cancel.py" in twice.stderr
    (tmp_path / "go").touch()
    wait_for_end(run)


@pytest.mark.slurm
def test_job_gets_environment_and_cores_of_the_cluster_file(slurm_cluster, materials, tmp_path):
    (tmp_path / "cluster.toml").write_text(
        "gpus_per_node = 0\ncpus_per_task = 2\ntime = '0:30:00'\npartition = 'high'\n"
        "setup = ['echo set up on $SLURMD_NODENAME']\n[environment]\nPROBE = '$SLURMD_NODENAME and more'\n"
        "[sbatch]\ncomment = 'probe'\n"
    )
    (tmp_path / "python").write_text(
        f'#!/bin/sh\necho "probe: $PROBE; $SLURM_CPUS_PER_TASK cores"\nexec {sys.executable} "$@"\n'
    )
    (tmp_path / "python").chmod(0o755)
    with open(tmp_path / "cluster.toml", "r+") as file:
        file.write(f"python = '{tmp_path}/python'\n" + (tmp_path / "cluster.toml").read_text())
    done = made.submit(*flags(materials, "--epochs", 1), cwd=tmp_path, env={"CFMASK_CLUSTER": "cluster.toml"})
    [(job, run)] = made.jobs_of(done, tmp_path).items()
    wait_for_end(run)
    said = logs(run)
    assert "set up on n" in said and re.search(r"probe: n\d and more; 2 cores", said)
    assert slurm_cluster.job(job)["Comment"] == "probe" and slurm_cluster.job(job)["Partition"] == "high"
