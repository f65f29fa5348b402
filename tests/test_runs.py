"""The run folder: its lock, the records of starts and ends, and the mark of a cancelled run."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from cfmask.errors import UserError
from cfmask.runs import RunFolder
from cfmask.runtime.jsonl import append_lines, read_lines
from cfmask.runtime.machine import process_runs, started_at, this_machine

REPO = Path(__file__).resolve().parents[1]

# Holds the folder in argv[1], with a heartbeat every argv[2] s, until its standard input ends.
HOLDER = """
import sys
from pathlib import Path
from cfmask.runs import RunFolder
with RunFolder(Path(sys.argv[1])).locked("7-0", heartbeat_s=float(sys.argv[2])):
    print("held", flush=True)
    sys.stdin.read()
print("left", flush=True)
"""


def start_holder(root: Path, heartbeat_s: float = 0.05) -> subprocess.Popen:
    command = [sys.executable, "-c", HOLDER, str(root), str(heartbeat_s)]
    holder = subprocess.Popen(command, cwd=REPO, stdin=-1, stdout=-1, stderr=subprocess.STDOUT, text=True)
    assert holder.stdout.readline() == "held\n"
    return holder


@pytest.fixture
def run(tmp_path) -> RunFolder:
    return RunFolder(tmp_path)


def owner_file(run: RunFolder) -> Path:
    [file] = (run.root / ".owner").iterdir()
    return file


def put_owner_elsewhere(run: RunFolder) -> Path:
    """Let a process on another node hold the folder."""
    with run.locked():
        pass
    return owner_file(run).rename(run.root / ".owner" / "n17,another machine,4711,12-0,0a1b2c3d")


# --- one job on one folder ----------------------------------------------------------------------------------------


def test_the_lock_is_free_before_and_after(run):
    assert run.owner() is None
    for _ in range(2):
        with run.locked("12-3"):
            owner = run.owner()
            assert (owner.pid, owner.job, owner.host) == (os.getpid(), "12-3", os.uname().nodename)
            assert owner.why_dead() is None and owner.age_s < 60
        assert run.owner() is None


def test_the_lock_is_free_after_an_exception(run):
    with pytest.raises(ZeroDivisionError), run.locked():
        raise ZeroDivisionError
    assert run.owner() is None


def test_a_second_job_is_refused_with_the_owner_and_its_heartbeat(run):
    holder = start_holder(run.root)
    with pytest.raises(UserError) as refusal, run.locked(patience_s=0.2):
        pass
    said = rf"\(job 7-0, process {holder.pid} on {os.uname().nodename}; last heartbeat \d+ s ago\)"
    assert re.search(said, str(refusal.value))
    assert holder.communicate("")[0] == "left\n", "the holder is undisturbed"


def test_a_job_that_is_ending_is_waited_for(run):
    holder = start_holder(run.root)
    holder.stdin.close()
    with run.locked(patience_s=30):
        assert run.owner().pid == os.getpid()
    assert holder.wait() == 0


def test_the_lock_of_a_killed_local_owner_is_taken_over_at_once(run, capsys):
    holder = start_holder(run.root)
    holder.kill()
    # The holder is a zombie now, because nobody has waited for it.
    before = time.monotonic()
    with run.locked():
        assert run.owner().pid == os.getpid()
    assert time.monotonic() - before < 30
    assert f"taken over from job 7-0, process {holder.pid} on {os.uname().nodename}, which has ended" in (
        capsys.readouterr().out
    )
    assert not process_runs(holder.pid)
    holder.wait()
    assert not process_runs(holder.pid)


def test_the_lock_of_a_silent_remote_owner_is_taken_over_after_the_limit(run, capsys):
    put_owner_elsewhere(run)
    before = time.monotonic()
    with run.locked(dead_after_s=1.5, patience_s=0):
        assert time.monotonic() - before > 1, "it may be alive"
    assert "taken over from job 12-0, process 4711 on n17, which has had no heartbeat for" in capsys.readouterr().out


def test_the_age_of_a_heartbeat_is_by_the_file_systems_clock(run, monkeypatch):
    file = put_owner_elsewhere(run)
    monkeypatch.setattr("time.time", lambda: 4e9)
    assert run.owner().age_s < 30
    os.utime(file, (time.time_ns() / 1e9 - 1000,) * 2)
    assert 999 < run.owner().age_s < 1030


@pytest.mark.parametrize("stamp", [1e9, 4e9], ids=["behind", "ahead"])
def test_an_owner_with_a_wrong_clock_is_observed_for_the_whole_limit(run, stamp):
    file = put_owner_elsewhere(run)
    os.utime(file, (stamp, stamp))
    before = time.monotonic()
    with run.locked(dead_after_s=1.5, patience_s=0):
        assert time.monotonic() - before > 1.4, "its time stamp must not be used"


@pytest.mark.parametrize("step", [0.0, 1.0, -1.0], ids=["standing", "forwards", "backwards"])
def test_a_changing_heartbeat_is_alive_at_any_time_stamp(run, step):
    """The owner's clock is ten years behind, and stands still, advances, or goes back at every heartbeat."""
    file = put_owner_elsewhere(run)
    stop = threading.Event()

    def beat() -> None:
        stamp = 1e9
        while not stop.wait(0.1):
            os.utime(file, (stamp, stamp))
            stamp += step

    beating = threading.Thread(target=beat)
    beating.start()
    try:
        with pytest.raises(UserError, match="Another job is training"), run.locked(dead_after_s=2, patience_s=3):
            pass
    finally:
        stop.set()
        beating.join()
    assert owner_file(run) == file


def test_a_later_process_with_the_owners_pid_is_not_the_owner(run, capsys):
    with run.locked():
        pass
    here = f"{os.uname().nodename},{this_machine()},{os.getpid()},7-0,0a1b2c3d.{started_at(os.getpid()) - 100}"
    owner_file(run).rename(run.root / ".owner" / here)
    with run.locked(patience_s=0):
        pass
    assert "which has ended" in capsys.readouterr().out


def test_an_unavailable_file_system_does_not_end_the_holder(run):
    away = run.root.with_name("away")
    with run.locked(heartbeat_s=0.05):
        run.root.rename(away)
        time.sleep(0.3)
        away.rename(run.root)
        time.sleep(0.2)
        assert run.owner().pid == os.getpid()


def test_a_remote_owner_with_a_heartbeat_keeps_its_lock(run):
    file = put_owner_elsewhere(run)
    beats = subprocess.Popen(["sh", "-c", f"while touch -c '{file}'; do sleep 0.1; done"])
    try:
        with pytest.raises(UserError, match="Another job is training"), run.locked(dead_after_s=60, patience_s=0.5):
            pass
    finally:
        beats.kill()
        beats.wait()
    assert owner_file(run) == file


def test_a_suspended_owner_loses_its_lock_and_ends(run):
    holder = start_holder(run.root)
    os.kill(holder.pid, signal.SIGSTOP)
    with run.locked(dead_after_s=1, patience_s=30):
        os.kill(holder.pid, signal.SIGCONT)
        assert holder.wait(timeout=300) == 1
        assert run.owner().pid == os.getpid()
    said = holder.stdout.read()
    assert f"taken over by process {os.getpid()} on" in said and "left" not in said


def _contend(root: Path, ready, done, won) -> None:
    ready.wait()
    try:
        with RunFolder(root).locked(patience_s=0.3, dead_after_s=1):
            won.put(os.getpid())
            done.wait(timeout=300)
    except UserError:
        done.wait(timeout=300)


@pytest.mark.parametrize("before", ["never held", "free", "owner killed", "owner silent elsewhere"])
def test_exactly_one_of_several_contenders_gets_the_lock(tmp_path, before):
    fork = multiprocessing.get_context("fork")
    for attempt in range(3 if before.endswith("elsewhere") else 6):
        run = RunFolder(tmp_path / str(attempt))
        run.root.mkdir()
        if before == "free":
            with run.locked():
                pass
        elif before == "owner killed":
            holder = start_holder(run.root)
            holder.kill()
            holder.wait()
        elif before == "owner silent elsewhere":
            os.utime(put_owner_elsewhere(run), (1e9, 1e9))
        ready, done, won = fork.Barrier(8), fork.Barrier(8), fork.Queue()
        contenders = [fork.Process(target=_contend, args=(run.root, ready, done, won)) for _ in range(8)]
        for contender in contenders:
            contender.start()
        for contender in contenders:
            contender.join(timeout=60)
        winner = won.get(timeout=5)
        assert won.empty(), "two processes hold the lock"
        assert winner in [contender.pid for contender in contenders]
        assert os.listdir(run.root / ".owner") == ["free"]
        assert os.listdir(run.root) == [".owner"], "temporary files are left"


def test_an_unwritable_folder_is_a_user_error(run, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied", str(run.root))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UserError, match="cannot be written: Permission denied"), run.locked():
        pass


# --- starts and ends ----------------------------------------------------------------------------------------------


def test_each_start_records_the_end_of_the_previous_one(run):
    run.begin_attempt(job="12-0", from_step=0)
    append_lines(run.log, [{"step": 7, "loss": 1.0}])
    run.end_attempt("stopped at step 7 (requeue)")
    mark = run.ended()
    assert mark["why"] == "stopped at step 7 (requeue)"
    run.begin_attempt(job="12-1", from_step=7)
    assert run.ended() is None
    append_lines(run.log, [{"step": 9, "loss": 1.0}])
    run.begin_attempt(job="12-2", from_step=7)
    first, second, third = read_lines(run.attempts)
    assert first["why_last_ended"] is None and "last_reached" not in first
    assert second["why_last_ended"] == mark["why"]
    assert (second["last_ended"], second["last_reached"]) == (mark["ended"], 7)
    assert third["why_last_ended"] == "killed without notice"
    assert (third["last_ended"], third["last_reached"]) == (None, 9)


def test_a_start_does_not_inherit_the_end_of_an_earlier_one(run):
    run.begin_attempt(from_step=0)
    run.end_attempt("stopped at step 7 (requeue)")
    left = (run.root / "ended.json").read_text()
    run.begin_attempt(from_step=7)
    (run.root / "ended.json").write_text(left)
    assert run.ended() is None
    run.begin_attempt(from_step=7)
    assert read_lines(run.attempts)[-1]["why_last_ended"] == "killed without notice"


def test_a_truncated_line_stays_separate_from_the_next(run):
    run.begin_attempt(from_step=0)
    run.attempts.write_text(run.attempts.read_text() + '{"attempt": 2, "sta')
    run.begin_attempt(from_step=5)
    assert [line["from_step"] for line in read_lines(run.attempts)] == [0, 5]


def test_the_tail_of_a_log_is_read(run):
    append_lines(run.log, [{"step": step} for step in range(10_000)])
    assert [line["step"] for line in read_lines(run.log, tail=50)] == [9997, 9998, 9999]
    assert run.logged_step() == 9999
    run.log.write_bytes(b'{"step": 1}\n{"step": 2, "lo')
    assert run.logged_step() == 1


# --- cancelled ----------------------------------------------------------------------------------------------------


def test_a_cancelled_run_has_a_mark_that_can_be_removed(run):
    assert run.cancelled() is None and run.clear_cancelled() is None
    run.cancel()
    mark = run.cancelled()
    assert mark["by"].endswith(f" on {os.uname().nodename}") and mark["when"]
    (run.root / "cancelled.json").write_text(json.dumps({**mark, "by": "ada"}))
    run.cancel()
    assert run.cancelled()["by"] == "ada", "the first mark is kept"
    assert run.clear_cancelled()["by"] == "ada"
    assert run.cancelled() is None


def test_a_mark_made_by_hand_counts(run):
    (run.root / "cancelled.json").touch()
    assert run.cancelled() == {"by": "somebody", "when": None}
