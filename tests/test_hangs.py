"""A rank that makes no progress is found, named with its stacks, and the job started again: by its heartbeat alone."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import made
from cfmask.runs import RunFolder
from cfmask.runtime import heartbeat
from cfmask.runtime.heartbeat import CHECKING, CHECKPOINT, PREPARING, WAITING, Heartbeat
from cfmask.runtime.jsonl import read_lines
from cfmask.runtime.machine import process_runs
from launch.jobs import hangs

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


def test_without_a_process_that_waits_nothing_happens():
    assert Heartbeat.active() is None
    heartbeat.beat(PREPARING)
    heartbeat.restart_steps()


# --- the process that waits -------------------------------------------------------------------------------------------


@pytest.fixture
def watched(monkeypatch):
    """A watch on a child whose heart beats until it is stopped; the limit is 0.6 s."""
    monkeypatch.setattr(heartbeat, "HANG_TIMEOUT_S", 0.6)
    monkeypatch.setattr(hangs, "HANG_TIMEOUT_S", 0.6)
    monkeypatch.setattr(heartbeat, "COLLECTIVE_TIMEOUT_S", 0.6)
    monkeypatch.setattr(heartbeat, "_CHECKING_S", 0.6)
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


def first_hang(watch: hangs.HangWatch, within_s: float = 20.0) -> hangs.Hang | None:
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
    watch.look()
    time.sleep(0.7)
    assert watch.look() is None, "the job as a whole was suspended"
    assert first_hang(watch) is not None


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def materials(tmp_path_factory) -> Path:
    return made.make_materials(tmp_path_factory.mktemp("materials"))


def rank_of(run: Path, rank: int) -> int:
    """The process that trains."""
    wanted = f"SUBMITIT_LOCAL_GLOBALID={rank}".encode()
    here = f"CFMASK_LOCAL_JOBS={run / 'jobs'}".encode()
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and process_runs(int(entry.name)):
            try:
                variables = (entry / "environ").read_bytes().split(b"\0")
                if wanted in variables and here in variables and b"_submit" in (entry / "cmdline").read_bytes():
                    found[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    [child] = [pid for pid, parent in found.items() if parent in found]
    return child


def test_a_stopped_rank_is_named_and_the_run_starts_again_to_the_same_weights(materials, tmp_path):
    """Twice: in a step, and in an evaluation. The second start of a rank on the only node leaves no node out."""
    flags = (
        "--executor",
        "local",
        "--tasks-per-node",
        2,
        "--epochs",
        20,
        "--checkpoint-steps",
        4,
        "--eval-sets",
        "val",
    )
    whole, run = tmp_path / "whole", tmp_path / "run"
    made.submit(*made.recipe_flags(materials, whole), *flags)
    following = subprocess.Popen(
        [sys.executable, made.REPO / "launch/submit.py", *map(str, made.recipe_flags(materials, run)), *map(str, flags)]
        + ["--hang-timeout", "0.05"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for stop, reached in enumerate((8, 30)):
        made.wait_for(run, lambda n=stop: len(read_lines(run / "attempts.jsonl")) > n, f"start {stop + 1}")
        made.wait_for_step(run, reached)
        os.kill(rank_of(run, 1), signal.SIGSTOP)
    said, _ = following.communicate(timeout=200)
    assert following.returncode == 0, said
    starts = read_lines(run / "attempts.jsonl")
    whys = [start["why_last_ended"] for start in starts[1:]]
    assert len(whys) == 2, said + made.logs(run)
    for number, why in enumerate(whys, 1):
        assert re.fullmatch(
            r"failed: rank 1 hung: at step \d+, .*its process is stopped \(SIGSTOP\).*; starts again "
            rf"\(retry {number} of 3\)",
            why,
        ), why
    assert [start["last_died"]["rank"] for start in starts[1:]] == [1, 1]
    [log] = (run / "jobs").glob("*_0_log.out")
    assert "rank 0 hung: at step" in log.read_text() and WAITING in log.read_text(), "what it waited at"
    made.assert_same_weights(run, whole)
    assert not RunFolder(run).ended() or RunFolder(run).ended()["why"] == "finished"


def test_retries_end_and_the_reason_is_said(materials, tmp_path):
    run = tmp_path / "run"
    flags = (*made.recipe_flags(materials, run), "--executor", "local", "--tasks-per-node", 1, "--retries", 1)
    die = tmp_path / "die"
    die.mkdir()
    (die / "sitecustomize.py").write_text(
        "import os, sys, threading, time\n"
        "def later():\n"
        "    while 'cfmask.train' not in sys.modules: time.sleep(0.1)\n"
        "    os.abort()\n"
        "def start(): threading.Thread(target=later, daemon=True).start()\n"
        "if os.environ.get('SUBMITIT_LOCAL_GLOBALID'): os.register_at_fork(after_in_child=start)\n"
    )
    paths = os.pathsep.join([str(die), os.environ["PYTHONPATH"]])
    done = made.submit(*flags, "--epochs", 1, check=False, env={"PYTHONPATH": paths})
    assert done.returncode == 1
    ended = json.loads((run / "ended.json").read_text())
    assert ended["why"].startswith("failed: rank 0 was killed by signal 6 (SIGABRT)")
    assert ended["why"].endswith("given up: --retries allows 1 within 24 hours")
    assert len(read_lines(run / "attempts.jsonl")) == 2
    assert "The job is not started again: given up: --retries allows 1" in done.stdout
