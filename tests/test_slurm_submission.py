"""A run is queued once, also if the environment has options for sbatch or Slurm's answers are lost."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import made
from cfmask.errors import UserError
from cfmask.recipe import Recipe
from cfmask.runs import RunFolder
from launch.slurm.client import SlurmUnavailable
from launch.slurm.queue import SlurmJob
from launch.slurm.submission import SubmissionUnknown
from launch.state import cancellation
from launch.state.facts import in_queue, look_at, read_jobs
from launch.state.status import status_of
from launch.submission import planning
from launch.submission import submit as submission
from slurm_fixture import wait_until
from test_slurm_client import AWAY, HOSTILE, TIMED_OUT, FakeSlurm, fake  # noqa: F401

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture
def run(tmp_path) -> RunFolder:
    folder = RunFolder(tmp_path / "runs/a")
    (folder.root / "jobs").mkdir(parents=True)
    (folder.root / "recipe.json").write_text(Recipe().to_json())
    return folder


def submitted(run: RunFolder, job: str) -> RunFolder:
    """submitit's files of an accepted job that the command did not record."""
    (run.root / f"jobs/{job}_submission.sh").touch()
    (run.root / f"jobs/{job}_submitted.pkl").touch()
    return run


def queue_shows(*rows: tuple[str, str]) -> str:
    return "; ".join(f"echo '{job}|{state}|N/A|N/A|0|None||'" for job, state in rows) or "true"


@pytest.mark.parametrize("answer", [AWAY, TIMED_OUT, "echo 'Protocol authentication error' >&2; exit 1"])
def test_a_run_is_not_submitted_again_while_slurm_cannot_be_asked(fake: FakeSlurm, run, answer, monkeypatch):  # noqa: F811
    monkeypatch.setattr(planning, "_ASK_S", 0.0)
    fake.will("squeue", answer)
    assert planning.queued_job(run) is None, "it was never sent to Slurm"
    submitted(run, "12")
    for sweep in (False, True):
        with pytest.raises(UserError, match="job 12.*unknown whether.*Nothing was submitted"):
            planning.should_skip(run, sweep=sweep)


def test_ended_run_is_not_resubmitted_while_slurm_cannot_be_asked(fake, run, monkeypatch):  # noqa: F811
    """It may have been preempted and requeued."""
    monkeypatch.setattr(planning, "_ASK_S", 0.0)
    submitted(run, "12").begin_attempt(job="12-0", nodes=1, world_size=2, device="cpu", from_step=0)
    run.end_attempt("stopped at step 70 (quit)")
    fake.will("squeue", AWAY)
    with pytest.raises(UserError, match="Nothing was submitted"):
        planning.queued_job(run)
    monkeypatch.setenv("PATH", "/nowhere")
    assert planning.queued_job(run) is None, "a machine without Slurm"
    submitted(run, "13")
    with pytest.raises(UserError, match=r"\(job 13\).*no squeue on this machine"):
        planning.queued_job(run)


@pytest.mark.parametrize(
    ("state", "there"),
    [("PENDING", True), ("REQUEUE_HOLD", True), ("TELEPORTING", True), ("COMPLETING", False), ("FAILED", False)],
)
def test_job_states_that_block_a_submission(fake, run, state, there):  # noqa: F811
    fake.will("squeue", queue_shows(("12", state)))
    queued = planning.queued_job(submitted(run, "12"))
    assert queued == (f"12 ({state.lower()})" if there else None)


def test_job_that_is_being_requeued_blocks_a_submission(fake, run):  # noqa: F811
    submitted(run, "12").begin_attempt(job="12-0", nodes=1, world_size=2, device="cpu", from_step=0)
    fake.will("squeue", queue_shows(("12", "COMPLETING")))
    for why, there in (("stopped at step 7 (requeue)", True), ("stopped at step 7 (quit)", False)):
        run.end_attempt(why)
        assert (planning.queued_job(run) is not None) == there
    run.end_attempt("stopped at step 7 (requeue)")
    run.cancel()
    assert planning.queued_job(run) is None, "it finds the mark"


def test_job_of_a_command_killed_during_sbatch_is_found(fake, run):  # noqa: F811
    script = run.root / "jobs/.submission_file_0123.sh"
    script.touch()
    fake.will("squeue", f"echo '12|{script}'", queue_shows(("12", "PENDING")))
    assert planning.queued_job(run) == "12 (pending)"
    fake.will("squeue", "true")
    assert planning.queued_job(run) is None, "sbatch had not been called, or the job is over"


def test_a_member_of_a_sweep_whose_command_was_killed_is_found(fake, run):  # noqa: F811
    sweep = run.root.parent / ".sweeps/20260101-000000-1"
    sweep.mkdir(parents=True)
    (sweep / "1").symlink_to(run.root)
    (sweep / "44_submission.sh").touch()
    assert read_jobs(run).slurm == ("44_1",)
    fake.will("squeue", queue_shows(("44_1", "PENDING")))
    assert planning.queued_job(run) == "44_1 (pending)"
    (sweep / "44_submission.sh").rename(sweep / ".submission_file_0123.sh")
    fake.will("squeue", *["echo '44|.submission_file_0123.sh'", queue_shows(("44_1", "PENDING"))])
    assert planning.queued_job(run) is not None
    assert "--jobs=44_1" in fake.calls("squeue")[-1], "not the other members, which are no reason to refuse this run"


def test_unconfirmed_array_of_a_plan_is_found(fake, run):  # noqa: F811
    sweep = run.root.parent / ".sweeps/20260101-000000-1"
    sweep.mkdir(parents=True)
    (sweep / "3").symlink_to(run.root)
    (sweep / ".submission_file_0123.sh").touch()
    fake.will("squeue", "echo '44|.submission_file_0123.sh'", queue_shows(("44_3", "PENDING"), ("44_4", "PENDING")))
    [run_state], slurm = look_at([run])
    assert status_of(run_state, slurm).state == "queued" and in_queue(run_state, slurm).id == "44_3"
    fake.will("squeue", "true")
    [run_state], slurm = look_at([run])
    assert status_of(run_state, slurm).state == "never started", "sbatch had not been called"


def test_a_job_that_sbatch_did_not_confirm_is_cancelled(fake, run):  # noqa: F811
    script = run.root / "jobs/.submission_file_0123.sh"
    script.touch()
    fake.will("squeue", f"echo '12|{script}'", queue_shows(("12", "PENDING")), "true", f"echo '12|{script}'", "true")
    fake.will("scancel", "true")
    assert cancellation.end_jobs(run, grace_s=5) == ""
    assert fake.calls("scancel") == ["scancel 12"]


@pytest.mark.parametrize("members", [1, 2])
@pytest.mark.parametrize("accepted", [True, False])
def test_a_job_whose_files_cannot_be_written_is_cancelled_and_its_folder_stays(
    fake,  # noqa: F811
    tmp_path,
    monkeypatch,
    members,
    accepted,
):
    """The disk is full before or after sbatch has answered."""
    from submitit.core.utils import JobPaths

    from launch.allocation.resolve import Allocation

    planned = planning.claim_run_folders(
        [planning.PlannedJob(RunFolder(tmp_path / f"runs/{number}"), Recipe()) for number in range(members)]
    )
    real = JobPaths.move_temporary_file

    def full(self, path, name, keep_as_symlink=False):
        if name == "submitted_pickle":
            raise OSError(28, "No space left on device")
        real(self, path, name, keep_as_symlink)

    monkeypatch.setattr(JobPaths, "move_temporary_file", full)
    fake.will("sbatch", "echo Submitted batch job 12")
    fake.will("scancel", "true")
    if not accepted:
        monkeypatch.setattr("launch.slurm.executor.submit", lambda script: full(None, None, "submitted_pickle"))
    allocation = Allocation("slurm", 1, 0, "", 1, 1, 10, python="python3")
    with pytest.raises(SubmissionUnknown if accepted else OSError, match="No space left"):
        submission.enqueue(planned, allocation)
    assert [each.run.root.exists() for each in planned] == [accepted] * members
    assert fake.calls("scancel") == ["scancel 12"] * accepted
    assert list((tmp_path / "runs").glob("*/jobs/.submission_file*")) == [] or accepted
    if accepted:
        fake.will("squeue", queue_shows())
        assert planning.queued_job(planned[0].run) is None, "the same command may be given again"


def test_cancel_is_repeated_after_a_lost_answer(monkeypatch, capsys):
    answers: list[Exception | None] = [SlurmUnavailable("Socket timed out."), None]
    given = []

    def answer(job: str, **options) -> None:
        given.append(options["signal"])
        if error := answers.pop(0):
            raise error

    monkeypatch.setattr(cancellation.control, "cancel", answer)
    asked: set[str | int] = set()
    for _ in range(3):
        job = SlurmJob("12", "RUNNING", "", "", 0, "", "n1")
        cancellation._end_slurm_job(job, asked, late=False, grace_s=120)
    assert given == ["TERM", "TERM"] and "Socket timed out. The mark stays" in capsys.readouterr().out


@pytest.mark.slurm
def test_options_in_the_environment_affect_neither_jobs_nor_queries(slurm_cluster, tmp_path, monkeypatch):
    """The caller is also part of a job with another size."""
    from submitit.core.utils import pickle_load
    from submitit.helpers import CommandFunction

    from launch.slurm.executor import SlurmExecutor

    materials = made.make_materials(tmp_path / "materials", per_class=16)
    blocker = slurm_cluster.sbatch("--hold", "--output=/dev/null", "--wrap=true", cwd=tmp_path)
    run = tmp_path / "run"
    words = [
        *made.recipe_flags(materials, run),
        "--nodes",
        1,
        "--gpus-per-node",
        0,
        "--tasks-per-node",
        1,
        "--time",
        30,
    ]
    words += ["--cpus-per-task", 1, "--after", blocker]
    outer = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "9", "SLURM_MEM_PER_CPU": "1", "SRUN_CPUS_PER_TASK": "3"}
    with monkeypatch.context() as caller:
        for name, value in {**HOSTILE, **outer, "ARRIVES": "yes"}.items():
            caller.setenv(name, value)
        first = made.submit(*words)
        again = made.submit(*words, check=False)
        status = [sys.executable, str(REPO / "launch/status.py"), str(run)]
        table = subprocess.run(status, capture_output=True, text=True, timeout=60).stdout
        executor = SlurmExecutor(tmp_path / "array", python=sys.executable)
        executor.update_parameters(time=5, ntasks_per_node=1, additional_parameters={"requeue": True})
        jobs = executor.submit_array([CommandFunction(["env"], verbose=False)] * 2)
    [job] = [path.name.partition("_")[0] for path in (run / "jobs").glob("*_submission.sh")]
    known = slurm_cluster.job(job)
    assert [known[key] for key in ("Partition", "TimeLimit", "Requeue", "NumTasks")] == ["low", "00:30:00", "1", "1"]
    assert "SBATCH_PARTITION, SBATCH_TIMELIMIT in the environment: ignored" in first.stderr
    assert f"job      {job} on" in first.stdout and known["Dependency"].startswith(f"afterok:{blocker}")
    assert again.returncode == 2 and f"Job {job} (pending) already exists" in again.stderr, again.stdout + again.stderr
    assert "waits in the queue: " in table and job in table
    assert "wckey" not in (run / f"jobs/{job}_submission.sh").read_text()
    # Where squeue fails, nothing is queued.
    (tmp_path / "squeue").write_text("#!/bin/sh\necho 'Protocol authentication error' >&2\nexit 1\n")
    (tmp_path / "squeue").chmod(0o755)
    blind = made.submit(*words, check=False, env={"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    assert blind.returncode == 2 and "Nothing was submitted" in blind.stderr
    assert len(list((run / "jobs").glob("*_submission.sh"))) == 1
    slurm_cluster.call("scancel", job, blocker)
    # The environment of a rank: the user's, and Slurm's own of this job.
    assert slurm_cluster.job(jobs[0].job_id)["Partition"] == "low"
    for each in jobs:
        wait_until(each.paths.result_pickle.exists, f"the result of job {each.job_id}")
        outcome, printed = pickle_load(each.paths.result_pickle)
        assert outcome == "success"
        inside = dict(line.split("=", 1) for line in printed.splitlines() if "=" in line)
        assert inside["ARRIVES"] == "yes" and inside["SLURM_NTASKS"] == "1" and "SRUN_CPUS_PER_TASK" not in inside
        assert not {name for name in HOSTILE if name in inside and name != "SUBMITIT_EXECUTOR"}
