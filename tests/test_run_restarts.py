"""What counts as progress of a training run and of an evaluation, and how a rank asks the restart policy."""

from __future__ import annotations

import dataclasses
import json

import pytest
import submitit

import made
from cfmask.evaluation.worker import run_evaluation
from cfmask.evaluation_spec import Evaluation
from cfmask.runs import RunFolder
from cfmask.runtime.distributed import DistributedContext
from cfmask.runtime.jsonl import read_lines
from cfmask.runtime.rendezvous import CalledOff
from cfmask.session import FINISHED, QUIT
from launch.ranks import rank
from launch.restarts.of_run import restarts_of, saved_progress
from launch.restarts.policy import Cause, GivenUp
from test_async_checkpoint import recipe_of


@pytest.fixture(scope="module")
def materials(tmp_path_factory):
    return made.make_materials(tmp_path_factory.mktemp("materials"))


@pytest.fixture
def job(monkeypatch):
    """Put this process into a start of Slurm's job 12."""

    def enter(restart: int, limit: int = 3) -> submitit.JobEnvironment:
        monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
        monkeypatch.setenv("SLURM_JOB_ID", "12")
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        monkeypatch.setenv("CFMASK_RESTARTS_WITHOUT_PROGRESS", str(limit))
        return submitit.JobEnvironment()

    return enter


def test_a_newer_checkpoint_that_is_damaged_is_no_progress(materials, tmp_path):
    run = made.train(recipe_of(materials, checkpoint_steps=2), tmp_path / "run", stop_at=4)
    assert saved_progress(run) == 4
    damaged = run.checkpoints / "step-00000004/optimizer.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-8])
    for _ in range(2):  # two starts that fell back to the one before it, and died
        run.begin_attempt(job="12-0", from_step=2)
    assert saved_progress(run) == 2


def test_an_evaluations_progress_is_the_images_it_has_counted(materials, tmp_path):
    evaluation = Evaluation(
        models=(str(materials / "tiny.safetensors"),),
        shards=str(materials / "shards"),
        sets=("val",),
        batch_size=16,
        loader_workers=0,
    )
    run = RunFolder(tmp_path / "run")
    run.claim(evaluation)
    assert saved_progress(run) == 0
    asked = iter(range(99))
    assert run_evaluation(evaluation, run, DistributedContext(), lambda: QUIT if next(asked) == 2 else None) == QUIT
    counted = saved_progress(run)
    assert 0 < counted < 96
    assert run_evaluation(evaluation, run, DistributedContext()) == FINISHED
    assert read_lines(run.attempts)[1]["from_step"] == counted


def test_a_start_of_a_finished_run_is_called_off_and_not_recorded(materials, tmp_path, job):
    run = RunFolder(tmp_path / "run")
    run.claim(recipe_of(materials))
    run.results.write_text("{}")
    with pytest.raises(CalledOff, match="is finished") as called_off:
        rank._check_start(run, DistributedContext(attempt="12-1"), restarts_of(run, job(1)))
    assert not called_off.value.failed and not run.attempts.exists()
    assert json.loads((run.root / "rendezvous/12-1.json").read_text())["failed"] is False


def test_a_start_beyond_the_budget_is_called_off_and_says_why(materials, tmp_path, job):
    run = RunFolder(tmp_path / "run")
    run.claim(recipe_of(materials))
    for restart in range(2):
        rank._check_start(run, DistributedContext(attempt=f"12-{restart}"), restarts_of(run, job(restart, limit=1)))
        run.begin_attempt(job=f"12-{restart}", from_step=0)
        run.end_attempt("failed: RuntimeError: no such interface")
    with pytest.raises(CalledOff, match=r"no such interface \(2 times\)") as called_off:
        rank._check_start(run, DistributedContext(attempt="12-2"), restarts_of(run, job(2, limit=1)))
    assert called_off.value.failed
    why = run.ended()["why"]
    assert why.startswith("not started: given up") and why.endswith(f"submit.py --resume {run.root}")
    assert [line["job"] for line in read_lines(run.attempts)] == ["12-0", "12-1", "12-2"]
    rank._check_start(run, DistributedContext(attempt="12-2"), restarts_of(run, job(2, limit=2)))


def test_a_start_that_died_before_it_was_recorded_counts(materials, tmp_path, job):
    run = RunFolder(tmp_path / "run")
    run.claim(recipe_of(materials))
    with pytest.raises(CalledOff, match="in 4 starts in a row"):
        rank._check_start(run, DistributedContext(attempt="12-4"), restarts_of(run, job(4)))


def test_submitits_own_handler_cannot_requeue_past_the_policy(materials, tmp_path, job, monkeypatch):
    """It calls ``checkpoint`` and then requeues: for a signal that comes before ours is installed."""
    run = RunFolder(tmp_path / "run")
    run.claim(recipe_of(materials))
    job(0)
    asked = []

    class Policy:
        def after_stop(self, cause, progress, is_cancelled):
            asked.append((cause, progress, is_cancelled()))
            return 143

    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr(rank, "restarts_of", lambda run, environment: Policy())
    monkeypatch.setattr(rank.os, "_exit", leave)
    with pytest.raises(SystemExit) as left:
        rank.Job(run.root, 0, 30).checkpoint()
    assert left.value.code == 143 and asked == [(Cause.WARNED, 0, False)]


def test_a_stop_without_a_checkpoint_is_given_up_when_the_budget_is_spent(materials, tmp_path, job, monkeypatch):
    run = RunFolder(tmp_path / "run")
    run.claim(dataclasses.replace(recipe_of(materials)))
    run.begin_attempt(job="12-0", from_step=0)
    run.end_attempt("stopped at step 3 (requeue), without a checkpoint: Disk quota exceeded")
    restarts = restarts_of(run, job(0, limit=0))
    monkeypatch.setattr("launch.restarts.policy.shutil.which", lambda name: None)
    with pytest.raises(GivenUp, match="without a checkpoint: Disk quota exceeded"):
        restarts.after_stop(Cause.WARNED, saved_progress(run))
