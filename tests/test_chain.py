"""Chains of jobs for one run: a common budget, no requeues, dependencies, and jobs after the end of the run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import made
from cfmask.errors import UserError
from cfmask.recipe import Recipe
from cfmask.runs import RunFolder
from cfmask.runtime.jsonl import read_lines
from cfmask.runtime.logging import message_of
from launch import status
from launch.allocation.resolve import Allocation
from launch.restarts import chain, retries
from launch.restarts import policy as restart_policy
from launch.restarts.chain import Chain
from launch.restarts.policy import STOPPED, Cause, GivenUp, Restarts
from launch.restarts.retries import decide
from launch.restarts.slurm_record import JobRecord
from launch.slurm.client import SlurmError, SlurmUnavailable
from launch.state import cancellation
from launch.state.facts import read_state
from launch.state.failure_reports import KILLED, RAISED, UNHEALTHY, RankFailure, RankStart
from launch.submission import training
from launch.submission.dependencies import chained
from launch.submission.planning import PlannedJob, claim_run_folders
from launch.submission.sbatch import slurm_parameters
from launch.submission.submit import submit_to_slurm
from made import wait_for, wait_for_step
from slurm_fixture import Cluster, wait_until
from test_slurm_client import TIMED_OUT, FakeSlurm, fake  # noqa: F401

REPO = Path(__file__).resolve().parents[1]
ALLOCATION = Allocation("slurm", 1, 0, "", 1, 1, 10, python="python3")
JOBS = ("11", "12", "13", "14", "15", "16", "17")


@pytest.fixture
def run(tmp_path) -> RunFolder:
    folder = RunFolder(tmp_path / "runs/a")
    folder.claim(Recipe())
    (folder.root / "jobs").mkdir()
    return folder


def submitted(run: RunFolder, *jobs: str) -> RunFolder:
    """submitit's files of jobs that were submitted one after the other."""
    for number, job in enumerate(jobs):
        for path in (run.root / f"jobs/{job}_submission.sh", run.root / f"jobs/{job}_submitted.pkl"):
            path.touch()
            os.utime(path, (number, number))
    return run


def policy(run: RunFolder, place: int, restart: int = 0, *, limit: int = 3) -> Restarts:
    """The policy of the chain's job at this index."""
    job = JOBS[place]
    return Restarts(run, job, restart, limit, resume="submit.py --resume RUN", chain=Chain(run, job, JOBS[:place]))


def begins(run: RunFolder, place: int, restart: int, progress: int, *, limit: int = 3) -> None:
    here = policy(run, place, restart, limit=limit)
    here.check_start(progress)
    here.begin(progress)
    here.log.end_attempt("failed: no")


# --- the budget -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_the_jobs_of_a_chain_have_one_budget(run, limit):
    for place in range(limit + 1):
        begins(run, place, 0, 50, limit=limit)
    with pytest.raises(GivenUp, match=rf"the chain up to job {JOBS[limit + 1]} .*step 50.* allows {limit}\. .*failed"):
        policy(run, limit + 1, limit=limit).check_start(50)
    with pytest.raises(GivenUp):
        policy(run, limit, limit=limit).check_restart(50)
    policy(run, limit + 1, limit=limit).check_start(51)
    Restarts(run, "99", 0, limit, resume="").check_start(50)


@given(st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=6), st.integers(0, 4))
def test_every_start_of_a_chain_counts_once(tmp_path_factory, jobs, limit):
    """jobs: for each but the last, how often Slurm requeued it, and whether its last start made progress."""
    run = RunFolder(tmp_path_factory.mktemp("run"))
    progress, idle = 0, 0
    for place, (requeues, gets_on) in enumerate(jobs):
        for restart in range(requeues + 1):
            policy(run, place, restart).begin(progress)
            idle += 1
        if gets_on:
            progress, idle = progress + 1, 0
    here = policy(run, len(jobs), limit=limit)
    if idle > limit:
        with pytest.raises(GivenUp):
            here.check_start(progress)
    else:
        here.check_start(progress)


def test_job_cancelled_in_the_queue_does_not_count_as_a_start(run):
    begins(run, 0, 0, 0, limit=0)
    policy(run, 4, limit=0).check_start(10)
    with pytest.raises(GivenUp):
        policy(run, 4, limit=0).check_start(0)
    (run.root / "jobs/13_0_log.out").touch()  # this one died before it could record anything
    with pytest.raises(GivenUp):
        policy(run, 4, limit=0).check_start(10)


# --- the end of a job -------------------------------------------------------------------------------------------------

RUNS, PREEMPTED = JobRecord("RUNNING"), JobRecord("RUNNING", preempted=True)
BACK_BY_ITSELF = JobRecord("RUNNING", preempted=True, slurm_requeues=True)


@pytest.fixture
def ask(run, monkeypatch):
    """The exit code of job 12 in the chain 11, 12, 13, for a record of Slurm. The job must not requeue itself."""
    submitted(run, "11", "12", "13")

    def ends(cause: Cause, answer: object, *, queued: tuple[str, ...] | Exception = ("12", "13")) -> int:
        def record(job: str) -> object:
            if isinstance(answer, Exception):
                raise answer
            return answer

        def queue(jobs, **given):
            if isinstance(queued, Exception):
                raise queued
            return {job: None for job in jobs if job in queued}

        monkeypatch.setattr(restart_policy, "slurm_record", record)
        monkeypatch.setattr(chain, "queue", queue)
        monkeypatch.setattr(restart_policy.shutil, "which", lambda name: None if answer is None else f"/usr/bin/{name}")
        here = policy(run, 1)
        here.begin(0)
        here.log.end_attempt("stopped at step 10 (requeue)")
        return here.after_stop(cause, 10)

    monkeypatch.setattr(restart_policy, "requeue", lambda job, **given: pytest.fail("a job of a chain was requeued"))
    monkeypatch.setattr(restart_policy, "_ASK_AGAIN_S", 0.0)
    monkeypatch.setattr(restart_policy, "_SETTLED_S", 0.1)
    monkeypatch.setattr(restart_policy, "_REQUEUE_PATIENCE_S", 0.1)
    return ends


@pytest.mark.parametrize(
    ("cause", "answer", "code"),
    [
        (Cause.WARNED, RUNS, 0),
        (Cause.WARNED, PREEMPTED, 0),
        (Cause.TERMINATED, PREEMPTED, 0),
        (Cause.WARNED, SlurmError("denied"), 0),
        (Cause.WARNED, None, 0),
        (Cause.TERMINATED, RUNS, STOPPED),
        (Cause.TERMINATED, None, STOPPED),
        (Cause.TERMINATED, SlurmError("denied"), STOPPED),
        (Cause.WARNED, BACK_BY_ITSELF, STOPPED),
        (Cause.WARNED, JobRecord("COMPLETING"), STOPPED),
    ],
)
def test_next_job_of_a_chain_resumes_instead_of_a_requeue(run, ask, capsys, cause, answer, code):
    assert ask(cause, answer) == code
    handed_over = "; job 13 resumes the run" if code == 0 else ""
    assert run.ended()["why"] == f"stopped at step 10 (requeue){handed_over}"
    assert ("job 13 resumes the run" in capsys.readouterr().out) == (code == 0)


def test_last_job_of_an_unfinished_chain_fails(run, ask):
    with pytest.raises(GivenUp, match=r"job 12 is the last of its chain.*not finished.*submit\.py --resume RUN"):
        ask(Cause.WARNED, RUNS, queued=("12",))
    with pytest.raises(UserError):
        ask(Cause.WARNED, None, queued=())
    assert ask(Cause.WARNED, RUNS, queued=SlurmUnavailable("away")) == 0, "the folder has a job behind it"


def test_appended_job_is_the_successor_of_a_chain(run, ask):
    submitted(run, "11", "12", "13", "21", "22")
    assert ask(Cause.WARNED, RUNS, queued=("12", "21", "22")) == 0
    assert run.ended()["why"].endswith("job 21 resumes the run")


@pytest.mark.parametrize("how", ["node lost", "killed", "unhealthy", "raised"])
def test_failed_job_of_a_chain_is_not_requeued_and_later_jobs_exclude_its_bad_node(run, monkeypatch, how):
    submitted(run, "11", "12", "13")
    monkeypatch.setattr(retries, "restarts_of", lambda run: policy(run, 0))
    monkeypatch.setattr(chain, "queue", lambda jobs, **given: dict.fromkeys(jobs))
    monkeypatch.setattr(retries, "_nodes_to_exclude", lambda here, deaths: tuple(death["node"] for death in deaths))
    left_out_nodes: dict[str, tuple[str, ...]] = {}
    monkeypatch.setattr(chain, "exclude_nodes", lambda job, nodes, **given: left_out_nodes.update({job: tuple(nodes)}))
    kind = {"killed": KILLED, "unhealthy": UNHEALTHY}.get(how, RAISED)
    failure = RankFailure(1, "n2", "2026-11-24T12:00:00.000", "no", broken_off=how == "node lost", kind=kind)
    decision = decide(RankStart(run, "11-0", 0, local=False, nodes=2, world_size=2), failure)
    assert not decision.restarts
    assert decision.why.endswith("; job 12 resumes the run") == (how != "raised")
    assert left_out_nodes == (dict.fromkeys(("12", "13"), ("n2",)) if how in ("killed", "unhealthy") else {})
    monkeypatch.setattr(retries, "restarts_of", lambda run: policy(run, 2))
    decision = decide(RankStart(run, "13-0", 0, local=False, nodes=2, world_size=2), failure)
    assert ("job 13 is the last of its chain" in decision.message) == (how != "raised")


def test_deaths_in_earlier_jobs_of_a_chain_count(run, monkeypatch):
    seen = []
    monkeypatch.setattr(retries, "restarts_of", lambda run: policy(run, 1))
    monkeypatch.setattr(retries, "_nodes_to_exclude", lambda here, deaths: seen.extend(deaths) or ())
    monkeypatch.setattr(chain, "queue", lambda jobs, **given: {})
    run.begin_attempt(job="11-0", from_step=0)
    run.end_attempt("failed: no", died={"rank": 0, "node": "n1", "kind": KILLED, "time": 0.0})
    run.begin_attempt(job="12-0", from_step=0)
    failure = RankFailure(1, "n2", "2026-11-24T12:00:00.000", "no", kind=KILLED)
    decide(RankStart(run, "12-0", 0, local=False, nodes=2, world_size=2), failure)
    assert [death["node"] for death in seen] == ["n1", "n2"]


# --- submitting -------------------------------------------------------------------------------------------------------


def script(allocation: Allocation, jobs: Path) -> str:
    return "\n".join(slurm_parameters(allocation, "x", str(jobs))["setup"])


def test_dependencies_of_chained_jobs():
    waits = Allocation("slurm", 1, 0, "", 1, 1, 10, dependency="afterok:7")
    assert chained(ALLOCATION, [], []).dependency is None
    assert chained(waits, [], []).dependency == "afterok:7"
    assert chained(ALLOCATION, [], ["5", "6"]).dependency == "afterany:5:6"
    assert chained(waits, ["11", "12"], ["5"]).dependency == "afterok:7,afterany:12"
    assert chained(waits, ["11", "12"], ["5"]).chain == ("11", "12")
    with pytest.raises(UserError, match="--dependency 'afterok:7\\?afterok:8' waits for any one"):
        chained(Allocation("slurm", 1, 0, "", 1, 1, 10, dependency="afterok:7?afterok:8"), ["11"], [])


@pytest.mark.parametrize("mark", ["results.json", "cancelled.json", None])
def test_batch_script_of_a_finished_or_cancelled_run_starts_no_rank(run, mark):
    """It skips the setup, too, which may take long."""
    if mark:
        (run.root / mark).touch()
    allocation = Allocation("slurm", 1, 0, "", 1, 1, 10, chain=("11", "12"), setup=("echo set up",))
    text = f"{script(allocation, run.root / 'jobs')}\necho $CFMASK_CHAIN\n)\necho $?"
    said = subprocess.run(["bash", "-c", text], capture_output=True, text=True).stdout.splitlines()
    assert bool(mark) == (message_of(said[0]) != said[0])
    assert [message_of(line) for line in said] == (
        [f"not started: the run is {'finished' if mark[0] == 'r' else mark[:-5]}", "99"]
        if mark
        else ["set up", "11,12", "0"]
    )
    assert "results.json" not in script(ALLOCATION, run.root / "jobs")


REFUSED = "echo 'sbatch: error: Batch job submission failed: Job violates accounting/QOS policy' >&2; exit 1"


def accepts(*jobs: int) -> list[str]:
    return [f"echo Submitted batch job {job}" for job in jobs]


def test_refusal_within_a_chain_keeps_the_accepted_jobs(fake: FakeSlurm, tmp_path, capsys):  # noqa: F811
    fake.will("sbatch", *accepts(11, 12), REFUSED)
    planned = claim_run_folders([PlannedJob(RunFolder(tmp_path / f"runs/{name}"), Recipe()) for name in "ab"])
    with pytest.raises(UserError, match=r"violates.* 2 of 4 jobs .* stay: 11, 12\. .*--resume \S+/runs/a --chain 2$"):
        submit_to_slurm(planned, ALLOCATION, chain=4, follow=False)
    run = RunFolder(tmp_path / "runs/a")
    assert [line["job"] for line in read_lines(run.root / "jobs/submissions.jsonl")] == ["11", "12"]
    assert not (tmp_path / "runs/b").exists() and not (run.root / ".claims").exists()
    assert "#SBATCH --dependency=afterany:11" in (run.root / "jobs/12_submission.sh").read_text()
    said = capsys.readouterr().out
    assert said.count("code ") == said.count("job      11 on ") == 1
    with pytest.raises(UserError, match="violates.*policy$"):
        submit_to_slurm(planned[1:], ALLOCATION, chain=4, follow=False)


def test_job_with_a_lost_answer_stays_in_the_chain(fake, tmp_path):  # noqa: F811
    [planned] = claim_run_folders([PlannedJob(RunFolder(tmp_path / "runs/a"), Recipe())])
    found = f'for each in {planned.run.root}/jobs/.submission_file_*.sh; do [ -h $each ] || echo "12|$each"; done'
    fake.will("sbatch", *accepts(11), TIMED_OUT, *accepts(13))
    fake.will("squeue", found)
    submit_to_slurm([planned], ALLOCATION, chain=3, follow=False)
    scripts = {job: (planned.run.root / f"jobs/{job}_submission.sh").read_text() for job in ("12", "13")}
    assert "afterany:11" in scripts["12"] and "afterany:12" in scripts["13"]
    assert "export CFMASK_CHAIN=11,12\n" in scripts["13"]


def in_queue(*jobs: str) -> str:
    states = ["RUNNING", *["PENDING"] * len(jobs)]
    return "; ".join(f"echo '{job}|{state}|N/A|N/A|0|None||'" for job, state in zip(jobs, states, strict=False))


def resume(run: RunFolder, *more: object) -> int:
    import argparse

    parser = argparse.ArgumentParser()
    training.add_submit_arguments(parser)
    flags = ("--resume", run.root, "--executor", "slurm", "--gpus-per-node", 0, *more)
    return training.submit(parser.parse_args(list(map(str, flags))))


@pytest.fixture
def live(fake, run, monkeypatch) -> RunFolder:  # noqa: F811
    """A run with job 12, which trains."""
    monkeypatch.setattr(training, "check", lambda *_: None)
    monkeypatch.setattr(training, "_describe", lambda *_: [])  # would read the shards
    monkeypatch.setenv("CFMASK_CLUSTER", "")
    fake.will("squeue", in_queue("12"))
    fake.will("sbatch", "echo to start >&2", *accepts(13, 14))
    fake.will("srun", "true")
    return submitted(run, "12")


def test_live_run_is_refused_or_gets_a_chain_behind_its_job(live, capsys):
    with pytest.raises(UserError, match=rf"Job 12 \(running\) already exists.* --resume {live.root} --chain N"):
        resume(live)
    live.allow_step_0()
    with live.locked("12-0"):
        assert resume(live, "--chain", 2) == 0, "the job holds the folder, and those behind it do not ask for it"
    scripts = [(live.root / f"jobs/{job}_submission.sh").read_text() for job in (13, 14)]
    assert "--dependency=afterany:12\n" in scripts[0] and "--dependency=afterany:13\n" in scripts[1]
    assert "behind job 12 (running)" in capsys.readouterr().out
    assert live.step_0_allowed(), "it is the live job's"
    assert not (live.root / ".claims").exists()


def test_from_step_0_and_cancelled_runs_cannot_be_queued_behind_a_live_job(live, fake):  # noqa: F811
    with pytest.raises(UserError, match="--from-step-0 is for a run without a job, and job 12 exists"):
        resume(live, "--chain", 2, "--from-step-0")
    live.cancel()
    with pytest.raises(UserError, match=r"was cancelled by .*, and job 12 \(running\) has not ended yet"):
        resume(live, "--chain", 2)
    assert fake.calls("sbatch") == []


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--executor", "local"), "--chain would do nothing: its jobs wait .* --executor is local"),
        (("--array-parallelism", 2, "--seeds", 0, 1), "--array-parallelism would do nothing with --chain"),
        (("--retries", 2), "--retries would do nothing with --chain"),
    ],
)
def test_contradictory_chain_flags_are_refused(fake, tmp_path, monkeypatch, more, said):  # noqa: F811
    import argparse

    materials = made.make_materials(tmp_path / "materials", per_class=8)
    fake.will("sbatch", "false")
    monkeypatch.setenv("CFMASK_CLUSTER", "")
    parser = argparse.ArgumentParser()
    training.add_submit_arguments(parser)
    flags = [*made.recipe_flags(materials, tmp_path / "run")[:-2], "--executor", "slurm", "--gpus-per-node", 0]
    flags += ["--chain", 3, *more]
    with pytest.raises(UserError, match=said):
        training.submit(parser.parse_args(list(map(str, flags))))


# --- what is seen of it -----------------------------------------------------------------------------------------------


def test_the_status_shows_the_live_job_and_how_many_wait(live, fake, capsys):  # noqa: F811
    submitted(live, "12", "13", "14")
    fake.will("squeue", in_queue("12", "13", "14"))
    assert status.main([str(live.root), "--json"]) == 0
    [told] = json.loads(capsys.readouterr().out)
    assert (told["job"], told["waiting"], told["state"]) == ("12", 2, "starting")
    assert status.main([str(live.root)]) == 0
    assert "12 (+2)" in capsys.readouterr().out


def test_a_run_has_not_ended_while_a_job_of_its_chain_may_come(run):
    submitted(run, "12", "13")
    run.begin_attempt(job="12-0", from_step=0)
    run.end_attempt("stopped at step 7 (requeue); job 13 resumes the run")
    assert not read_state(run).records_its_end and read_state(run).comes_back
    run.begin_attempt(job="13-0", from_step=7)
    run.end_attempt("given up: job 13 is the last of its chain, and runs/a is not finished.")
    assert read_state(run).records_its_end and not read_state(run).comes_back


def test_all_jobs_of_a_chain_are_cancelled(live, fake):  # noqa: F811
    submitted(live, "12", "13", "14")
    fake.will("squeue", in_queue("12", "13", "14"), in_queue("12", "13", "14"), "true")
    fake.will("scancel", "true")
    assert cancellation.end_jobs(live, grace_s=5) == ""
    assert fake.calls("scancel") == ["scancel --signal=TERM 12", "scancel 13", "scancel 14"]


# --- on a real Slurm --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def materials(tmp_path_factory) -> Path:
    return made.make_materials(tmp_path_factory.mktemp("materials"))


def jobs_of(run: Path) -> list[str]:
    return [line["job"] for line in read_lines(run / "jobs/submissions.jsonl")]


@pytest.mark.slurm
def test_chain_ends_with_the_weights_of_an_uninterrupted_run(slurm_cluster: Cluster, materials, tmp_path, monkeypatch):
    """Two jobs are queued behind the live one. The second job is requeued by somebody, and keeps its number, before it
    is warned. All the while the run is followed."""
    monkeypatch.setenv("CFMASK_CLUSTER", "")
    run, alone = tmp_path / "run", tmp_path / "alone"
    recipe = [*made.recipe_flags(materials, run), "--epochs", 40, "--checkpoint-steps", 1000, "--gpus-per-node", 0]
    one_rank = ("--tasks-per-node", 1, "--cpus-per-task", 1, "--time", 30)
    made.submit(*recipe, *one_rank, "--chain", 2, pace_s=made.PACE_S)
    first, second = jobs_of(run)
    command = [sys.executable, str(REPO / "launch/status.py"), str(run), "--follow"]
    following = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        wait_for_step(run, 5)
        made.submit("--resume", run, "--chain", 2, pace_s=made.PACE_S)
        _, _, third, fourth = jobs_of(run)
        assert f"afterany:{second}(unfulfilled)" in slurm_cluster.job(third)["Dependency"].split(",")
        slurm_cluster.call("scancel", "--signal=USR2", first)
        for job, starts, act in ((second, 2, ("scontrol", "requeue")), (second, 3, ("scancel", "--signal=USR2"))):
            wait_for(run, lambda starts=starts: len(read_lines(run / "attempts.jsonl")) == starts, f"start {starts}")
            step = RunFolder(run).logged_step() or 0
            wait_for_step(run, step + 1)
            slurm_cluster.call(*act, job)
            if starts == 2:
                slurm_cluster.start_again_now(job)
        told, _ = following.communicate(timeout=200)
    finally:
        following.kill()
    assert following.returncode == 0 and "finished: " in told
    for job in (first, second, third, fourth):
        wait_until(lambda job=job: slurm_cluster.job(job)["JobState"] == "COMPLETED", f"the end of job {job}")
        assert slurm_cluster.job(job)["ExitCode"] == "0:0"
    attempts = read_lines(run / "attempts.jsonl")
    assert [line["job"] for line in attempts] == [f"{first}-0", f"{second}-0", f"{second}-1", f"{third}-0"]
    assert [line["from_step"] == line["last_reached"] for line in attempts[1:]] == [True] * 3
    assert attempts[1]["why_last_ended"].endswith(f"(requeue); job {second} resumes the run")
    assert attempts[2]["why_last_ended"].endswith("(quit)"), "Slurm itself takes it back"
    assert attempts[3]["why_last_ended"].endswith(f"(requeue); job {third} resumes the run")
    assert "not started: the run is finished" in (run / f"jobs/{fourth}_0_log.out").read_text()
    hours, minutes, seconds = map(int, slurm_cluster.job(fourth)["RunTime"].split(":"))
    assert 3600 * hours + 60 * minutes + seconds <= 20, "it is over in seconds"

    recipe[recipe.index("--run") + 1] = alone
    made.submit(*recipe, *one_rank, "--follow")
    for file in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = (load_file(each / "checkpoints/step-00000240" / file) for each in (run, alone))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slurm
def test_a_chain_is_cancelled_as_a_whole(slurm_cluster: Cluster, materials, tmp_path, monkeypatch):
    monkeypatch.setenv("CFMASK_CLUSTER", "")
    run = tmp_path / "run"
    flags = [*made.recipe_flags(materials, run), "--epochs", 400, "--gpus-per-node", 0, "--cpus-per-task", 1]
    made.submit(*flags, "--time", 30, "--chain", 3, pace_s=made.PACE_S)
    wait_for_step(run, 3)
    done = subprocess.run(
        [sys.executable, str(REPO / "launch/cancel.py"), str(run)], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert "cancelled at step" in done.stdout and done.stdout.count("waits in the queue: removed from it") == 2
    states = [slurm_cluster.job(job)["JobState"] for job in jobs_of(run)]
    assert states == ["COMPLETED", "CANCELLED", "CANCELLED"]
    assert len(read_lines(run / "attempts.jsonl")) == 1
