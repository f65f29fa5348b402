"""A rank that makes no progress is found, named with its stacks, and the job started again: by its heartbeat alone."""

from __future__ import annotations

import json
import os
import re
import signal
import struct
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import made
from cfmask.runtime import heartbeat
from cfmask.runtime.heartbeat import CHECKING, CHECKPOINT, PREPARING, Heartbeat
from cfmask.runtime.jsonl import read_lines
from launch.ranks import hangs

# --- the heartbeat ----------------------------------------------------------------------------------------------------


@given(st.text(max_size=60), st.integers(-1, 2**40))
def test_a_beat_is_read_as_it_was_written(activity, step):
    beats = Heartbeat()
    beats.beat(activity, step)
    found = beats.read()
    assert found.step == step and activity.encode()[:40].decode(errors="replace").startswith(found.activity.rstrip("�"))


def test_the_limit_follows_the_steps(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(heartbeat, "HANG_TIMEOUT_S", 60.0)
    beats = Heartbeat()
    for step in range(1, 8):
        beats.beat("computing", step)
        assert beats.read().limit_s == (heartbeat.COLLECTIVE_TIMEOUT_S if step < 6 else 60.0)
        now[0] += 0.5
    now[0] += 9.5
    beats.beat("computing", 8)
    assert beats.read().limit_s == pytest.approx(200), "20 times the slowest of the last 100"
    beats.beat(CHECKPOINT, None)
    assert beats.read().limit_s > heartbeat.COLLECTIVE_TIMEOUT_S and beats.read().step == 8
    beats.beat(CHECKING, None)
    assert beats.read().limit_s == heartbeat._CHECKING_S
    beats.restart()
    beats.beat("evaluating", 0)
    assert beats.read().limit_s == heartbeat.COLLECTIVE_TIMEOUT_S
    monkeypatch.setattr(heartbeat, "HANG_TIMEOUT_S", 0.0)
    for step in range(1, 8):
        beats.beat("evaluating", step)
    assert beats.read().limit_s == float("inf")


def test_a_writer_that_is_stopped_in_the_middle_of_a_beat_leaves_the_one_before():
    beats = Heartbeat()
    for step in range(1, 300):
        beats.beat("computing", step)
        before = beats.read()
        assert before.step == step and before.limit_s > 0
        slot = beats._slot((beats._count + 1) % 256)
        for written in (b"", struct.pack("<Bd", (beats._count + 1) % 256, 1.0)):
            beats._memory[slot : slot + beats._LAYOUT.size] = written.ljust(beats._LAYOUT.size, b"\0")
            assert beats.read() == before


def test_without_a_process_that_waits_nothing_happens():
    assert Heartbeat.active() is None
    heartbeat.beat(PREPARING)
    heartbeat.restart_steps()


# --- the process that waits -------------------------------------------------------------------------------------------


@pytest.fixture
def watched(monkeypatch):
    """A watch on a child whose heart beats until it is stopped. The limit is 4 s: a busy machine may leave a process
    without a core for a second."""
    for name in ("HANG_TIMEOUT_S", "COLLECTIVE_TIMEOUT_S", "_CHECKING_S"):
        monkeypatch.setattr(heartbeat, name, 4.0)
    monkeypatch.setattr(hangs, "HANG_TIMEOUT_S", 4.0)
    watch = hangs.HangWatch()
    child = os.fork()
    if child == 0:
        watch.begin_in_child()
        for step in range(100_000):
            heartbeat.beat("computing", step)
            time.sleep(0.05)
        os._exit(0)
    watch.begin(child)
    yield watch, child
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def first_hang(watch: hangs.HangWatch, within_s: float = 60.0) -> hangs.Hang | None:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if hang := watch.look():
            return hang
        time.sleep(0.05)
    return None


def test_a_process_that_is_stopped_is_found_with_its_stacks(watched):
    watch, child = watched
    assert first_hang(watch, 1.5) is None
    os.kill(child, signal.SIGSTOP)
    hang = first_hang(watch)
    assert hang is not None and hang.state == "T" and hang.beat.activity == "computing"
    assert re.fullmatch(
        r"hung: at step \d+, computing, no progress for \d+ s; its process is stopped \(SIGSTOP\) \(--hang-timeout\)",
        hang.error,
    )
    assert "test_hangs.py" in watch.stacks() and "most recent call first" in watch.stacks()


def test_time_in_which_this_process_was_suspended_does_not_count(watched, monkeypatch):
    watch, child = watched
    os.kill(child, signal.SIGSTOP)
    monkeypatch.setattr(hangs, "_SUSPENDED_S", 0.5)
    monkeypatch.setattr(hangs, "HANG_TIMEOUT_S", 0.6)
    watch.look()
    time.sleep(0.7)
    assert watch.look() is None, "the job as a whole was suspended"
    assert first_hang(watch) is not None


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def materials(tmp_path_factory) -> Path:
    return made.make_materials(tmp_path_factory.mktemp("materials"))


IN_TRAINING = """
import os as _os, signal as _signal, time as _time
_start, _rank = int(_os.environ.get("CFMASK_LOCAL_START", 0)), int(_os.environ.get("SUBMITIT_LOCAL_GLOBALID", -1))
def _stop(start, rank):
    if (start, rank) == (_start, _rank):
        _os.kill(_os.getpid(), _signal.SIGSTOP)
"""
TRAIN = """
_take_step, _top1, _inputs_of, _steps = take_step, top1, inputs_of, []
def take_step(*given):
    _steps.append(1)
    if len(_steps) == 9:
        _stop(0, 1)
    return _take_step(*given)
def top1(models, normalise, batches, *given):
    def stopping():
        for batch in batches:
            _stop(1, 1)
            yield batch
    return _top1(models, normalise, stopping(), *given)
def inputs_of(batch):
    if _rank == 1:
        _time.sleep(0.15)
    return _inputs_of(batch)
"""
CHECKPOINT_WRITER = """
_real = write_hashed
def write_hashed(*given):
    _stop(2, 0)
    return _real(*given)
"""


def test_stopped_ranks_are_named_and_the_run_ends_with_the_same_weights(materials, tmp_path):
    """In a step, in an evaluation, and while a checkpoint is written. Rank 1 is slow all the time, which is seen."""
    flags = ("--executor", "local", "--tasks-per-node", 2, "--epochs", 3, "--checkpoint-steps", 4)
    flags += ("--eval-sets", "val", "--eval-steps", 3)
    whole, run = tmp_path / "whole", tmp_path / "run"
    made.submit(*made.recipe_flags(materials, whole), *flags)
    clone = made.plant(
        tmp_path / "clone",
        cfmask__training__train=IN_TRAINING + TRAIN,
        cfmask__checkpoint__writer=IN_TRAINING + CHECKPOINT_WRITER,
        cfmask__runtime__heartbeat="_FACTOR = 10\n",  # half, for less to wait
    )
    done = made.submit(
        *made.recipe_flags(materials, run), *flags, "--hang-timeout", 0.15, repository=clone, check=False
    )
    assert done.returncode == 0, done.stdout + made.logs(run)
    starts = read_lines(run / "attempts.jsonl")[1:]
    for number, (start, rank) in enumerate(zip(starts, (1, 1, 0), strict=True), 1):
        assert re.fullmatch(
            rf"failed: rank {rank} hung: .*its process is stopped \(SIGSTOP\).*; starts again "
            rf"\(retry {number} of 3\)",
            start["why_last_ended"],
        ), start
        assert start["last_died"]["rank"] == rank
    assert "evaluating" in starts[1]["why_last_ended"]
    log = next((run / "jobs").glob("*_0_log.out")).read_text()
    assert re.search(r" ERROR rank 0 \S+ \| hung: at step .*stacks of its threads:", log), "its stacks"
    for each in (whole, run):
        made.assert_log_format(each)
    made.assert_same_weights(run, whole)
    lines = [line for line in read_lines(run / "log.jsonl") if "slowest_rank" in line]
    assert sum(line["slowest_rank"] == 1 for line in lines) > len(lines) * 0.5
    assert sorted(line["slowest_rank_s"] for line in lines)[len(lines) // 2] >= 0.15


def aborting_ranks(folder: Path, where: str) -> dict[str, str]:
    """The environment in which a rank aborts when it imports training. where: the last lines of a program, which may
    call ``abort_rank``."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        "import lean, os, sys, threading, time\n"
        "def later():\n"
        "    while 'cfmask.training.train' not in sys.modules: time.sleep(0.1)\n"
        "    os.abort()\n"
        "def start(): threading.Thread(target=later, daemon=True).start()\n"
        f"def abort_rank(): os.register_at_fork(after_in_child=start)\n{where}"
    )
    return {"PYTHONPATH": os.pathsep.join([str(folder), os.environ["PYTHONPATH"]])}


def test_retries_end_and_the_reason_is_said(materials, tmp_path):
    run = tmp_path / "run"
    flags = (*made.recipe_flags(materials, run), "--executor", "local", "--tasks-per-node", 1, "--retries", 1)
    environment = aborting_ranks(tmp_path / "die", "if os.environ.get('SUBMITIT_LOCAL_GLOBALID'): abort_rank()\n")
    done = made.submit(*flags, "--epochs", 1, check=False, env=environment)
    assert done.returncode == 1
    ended = json.loads((run / "ended.json").read_text())
    assert ended["why"].startswith("failed: rank 0 was killed by signal 6 (SIGABRT)")
    assert ended["why"].endswith("given up: --retries allows 1 within 24 hours")
    assert len(read_lines(run / "attempts.jsonl")) == 2
    assert "The job is not started again: given up: --retries allows 1" in done.stdout


@pytest.mark.slurm
def test_a_node_on_which_ranks_die_twice_is_left_out(slurm_cluster, materials, tmp_path):
    """On whichever node the job starts, its rank is aborted."""
    run = tmp_path / "run"
    environment = aborting_ranks(
        tmp_path / "die",
        "if os.environ.get('SLURM_PROCID') and os.environ.get('SUBMITIT_EXECUTOR') != 'local':\n"
        f"    BAD = {str(tmp_path / 'bad')!r}\n"
        "    if not os.path.exists(BAD): open(BAD, 'w').write(os.environ['SLURMD_NODENAME'])\n"
        "    if open(BAD).read() == os.environ['SLURMD_NODENAME']: abort_rank()\n",
    )
    ranks = ("--tasks-per-node", 1, "--cpus-per-task", 1, "--gpus-per-node", 0, "--time", 30, "--epochs", 1)
    made.submit(*made.recipe_flags(materials, run), *ranks, env={**environment, "CFMASK_CLUSTER": ""})
    job = read_lines(run / "jobs/submissions.jsonl")[-1]["job"]
    for restart in (1, 2):
        made.wait_for(run, lambda n=restart: slurm_cluster.job(job)["Restarts"] == str(n), f"restart {restart}")
        if restart == 2:
            made.wait_for(run, lambda: slurm_cluster.job(job)["ExcNodeList"] != "(null)", "the node is left out")
        slurm_cluster.start_again_now(job)
    made.wait_for(run, (run / "results.json").exists, "the results")
    bad = (tmp_path / "bad").read_text()
    assert slurm_cluster.job(job)["ExcNodeList"] == bad != slurm_cluster.job(job)["NodeList"]
    first, second, third = read_lines(run / "attempts.jsonl")
    assert re.search(r"SIGABRT.*; starts again \(retry 1 of 3\)", second["why_last_ended"])
    assert re.search(rf"SIGABRT.*; starts again, without {bad} \(retry 2 of 3\)", third["why_last_ended"])
    assert [second["last_died"]["node"], third["last_died"]["node"]] == [bad, bad]
