"""A rank that dies ends the job within 30 s: its failure report last in the log, exit code not 0, no rank left."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import made
from cfmask.runs import RunFolder
from cfmask.runtime.heartbeat import WAITING
from cfmask.runtime.jsonl import read_lines
from cfmask.runtime.logging import message_of
from cfmask.runtime.machine import process_runs
from launch.restarts.of_run import restarts_of
from launch.state.facts import look_at
from launch.state.failure_reports import RankFailure, RankStart, first_failure, report_of
from launch.state.status import status_of
from slurm_fixture import Cluster, wait_until

WITHIN_S = 120

# --- who was first ------------------------------------------------------------------------------------------------


def failure(rank: int, second: int, error: str = "ValueError: no", **more: object) -> RankFailure:
    return RankFailure(rank, "n1", f"2026-11-24T12:00:{second:02}.000", error, **{"traceback": "Traceback", **more})


def killed(rank: int, second: int) -> RankFailure:
    return failure(rank, second, "was killed by signal 9", traceback="", kind="killed")


def hung(rank: int, second: int, step: int, activity: str = WAITING, state: str = "S") -> RankFailure:
    return failure(rank, second, "hung", traceback="", kind="hung", step=step, activity=activity, state=state)


@pytest.mark.parametrize(
    ("left", "first"),
    [
        ([], None),
        ([failure(0, 2), failure(1, 1, "KeyError: 1")], 1),
        ([failure(0, 1, broken_off=True), killed(1, 2)], 1),
        ([failure(2, 1, broken_off=True), failure(0, 2, broken_off=True, error="RuntimeError: gloo")], 2),
        ([failure(0, 3), failure(2, 1), failure(1, 2)], 0),
        (
            [
                killed(0, 3),
                killed(2, 1),
            ],
            2,
        ),
        (
            [
                failure(1, 1, "DistNetworkError: Connection reset by peer"),
                killed(0, 2),
            ],
            0,
        ),
        ([hung(0, 1, 6), hung(1, 3, 6, "computing", "T"), hung(2, 2, 6)], 1),
        ([hung(0, 1, 6), hung(1, 3, 5), hung(2, 2, 6)], 1),
        ([hung(0, 1, 6), hung(1, 3, 6), hung(2, 2, 6, "loading data")], 2),
        ([hung(0, 1, 6), hung(2, 2, 6)], 1),
        ([hung(0, 2, 6), hung(1, 3, 6), hung(2, 1, 6)], 2),
        ([killed(0, 1), hung(1, 3, 6), hung(2, 2, 6)], 0),
        ([failure(0, 1, broken_off=True), hung(1, 3, 6, state="T"), hung(2, 2, 6)], 1),
    ],
    ids=[
        "nobody",
        "by time",
        "not a rank that was cut off",
        "only cut off",
        "alike: the lowest",
        "killed: by time",
        "before they met",
        "hung: a stopped process",
        "hung: a rank that is behind",
        "hung: a rank that does not wait",
        "hung: a rank without a report",
        "hung: no rank is behind",
        "killed before the others hang",
        "cut off after it was stopped",
    ],
)
def test_who_died_first(left, first):
    chosen = first_failure(left, 3)
    assert (chosen and chosen.rank) == first


# --- the process that waits for a rank, with ranks that are a few lines ----------------------------------------------

SUPERVISE = """
import os, signal, sys, time
from pathlib import Path
from launch.ranks import supervisor
supervisor._LOOK_S, supervisor._GRACE_S, supervisor._LISTEN_S = 0.2, 0.5, 0.2
def rank():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    Path(sys.argv[1], "rank").write_text(str(os.getpid()))
    {body}
sys.exit(supervisor.supervise(rank, Path(sys.argv[1])))
"""


@pytest.fixture
def supervise(tmp_path) -> Callable[..., subprocess.Popen]:
    """Start rank 0 of job 7, which is of two on this machine: what it does, in a line."""
    (tmp_path / "recipe.json").touch()
    environment = {**os.environ, "SUBMITIT_EXECUTOR": "local", "SUBMITIT_LOCAL_JOB_ID": "7", "CFMASK_RETRIES": "0"}
    environment |= {f"SUBMITIT_LOCAL_{name}": "0" for name in ("NODEID", "GLOBALID", "LOCALID")}
    environment |= {"SUBMITIT_LOCAL_NTASKS": "2", "SUBMITIT_LOCAL_JOB_NUM_NODES": "1"}

    def start(body: str) -> subprocess.Popen:
        command = [sys.executable, "-c", SUPERVISE.format(body=body), str(tmp_path)]
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        wait_until(lambda: (tmp_path / "rank").exists() and (tmp_path / "rank").read_text(), "the rank runs")
        return process

    return start


def pid_of(run: Path) -> int:
    return int((run / "rank").read_text())


def write_failure_of_rank_1(run: Path) -> None:
    here = RankStart(RunFolder(run), "7-0", 1, local=True, nodes=1, world_size=2)
    here.write_failure("ValueError: planted", traceback="Traceback (most recent call last):\nValueError: planted\n")


@pytest.mark.parametrize("how", ["time.sleep(600)", "import ctypes; ctypes.PyDLL(None).sleep(600)"])
def test_a_rank_that_hangs_is_ended_when_another_dies(supervise, tmp_path, how):
    """In a collective; or where it lets no Python run."""
    process = supervise(how)
    write_failure_of_rank_1(tmp_path)
    told, _ = process.communicate(timeout=WITHIN_S)
    assert process.returncode == 128 + signal.SIGKILL
    assert not process_runs(pid_of(tmp_path))
    assert told.endswith("Traceback (most recent call last):\nValueError: planted\n")
    assert RunFolder(tmp_path).ended()["why"] == "failed: rank 1: ValueError: planted"
    assert report_of(RunFolder(tmp_path), "7").splitlines()[0].startswith("rank 1 on ")


def test_of_a_rank_that_was_killed_the_other_process_tells(supervise, tmp_path):
    process = supervise("os.kill(os.getpid(), signal.SIGKILL)")
    told, _ = process.communicate(timeout=WITHIN_S)
    assert process.returncode == 128 + signal.SIGKILL
    assert re.search(r"rank 0 on \S+ was killed by signal 9 \(SIGKILL: out of memory\?\)", told.splitlines()[-1])
    [attempt] = read_lines(tmp_path / "attempts.jsonl")
    assert (attempt["job"], attempt["from_step"]) == ("7-0", None)
    assert "rank 0 was killed by signal 9" in RunFolder(tmp_path).ended()["why"]


def test_an_error_that_is_for_the_user_has_no_traceback(supervise, tmp_path):
    process = supervise("from cfmask.errors import UserError; raise UserError('/data/x is missing. Copy it there.')")
    told, _ = process.communicate(timeout=WITHIN_S)
    assert process.returncode == 1 and "Traceback" not in told
    assert told.splitlines()[-1] == "error: /data/x is missing. Copy it there."
    assert RunFolder(tmp_path).ended()["why"] == "failed: rank 0: UserError: /data/x is missing. Copy it there."


@pytest.mark.parametrize(
    ("said", "lost"),
    [
        ("[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7, OpType=ALLREDUCE)", True),
        ("ncclRemoteError: A call failed possibly due to a network error or a remote process exiting.", True),
        ("ncclUnhandledCudaError: Call to CUDA function failed.", False),
        ("double free or corruption", False),
    ],
)
def test_nccls_watchdog_that_aborts_a_rank_is_a_lost_connection(supervise, tmp_path, said, lost):
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs/7_0_log.out").write_text(f"step 5\n{said}\nterminate called after throwing …\n")
    process = supervise("os.abort()")
    process.communicate(timeout=WITHIN_S)
    report = json.loads((tmp_path / "jobs/failures/7-0_0.json").read_text())
    assert (report["broken_off"], report["kind"]) == (lost, "killed")
    assert report["error"] == (said if lost else "was killed by signal 6 (SIGABRT)")


def test_a_local_job_within_a_job_of_slurms_that_was_requeued_has_one_name(tmp_path, monkeypatch):
    """Otherwise its ranks would count as not begun, and be killed without a checkpoint."""
    local = {"EXECUTOR": "local", "LOCAL_JOB_ID": "7", "LOCAL_GLOBALID": "0", "LOCAL_LOCALID": "0", "LOCAL_NTASKS": "1"}
    for name, value in {**local, "LOCAL_NODEID": "0", "LOCAL_JOB_NUM_NODES": "1"}.items():
        monkeypatch.setenv(f"SUBMITIT_{name}", value)
    monkeypatch.setenv("SLURM_JOB_ID", "99")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    run = RunFolder(tmp_path)
    assert RankStart.found(tmp_path).attempt == restarts_of(run).attempt == "7-0"


@pytest.mark.parametrize("code", [0, 143, 144])
def test_an_end_that_ranks_agree_on_leaves_no_report(supervise, tmp_path, code):
    process = supervise(f"sys.exit({code})")
    assert process.wait(WITHIN_S) == code
    assert not (tmp_path / "jobs").exists() and not (tmp_path / "ended.json").exists()


def test_a_rank_that_crashes_after_the_run_has_finished_changes_nothing(supervise, tmp_path):
    RunFolder(tmp_path).begin_attempt(job="7-0", from_step=0)
    RunFolder(tmp_path).end_attempt("finished")
    process = supervise("os.abort()")
    told, _ = process.communicate(timeout=WITHIN_S)
    assert process.returncode == 128 + signal.SIGABRT and "Fatal Python error: Aborted" in told
    assert RunFolder(tmp_path).ended()["why"] == "finished"
    assert report_of(RunFolder(tmp_path), "7") is None


@pytest.mark.parametrize("end", ["return", "sys.exit(0)", "sys.exit(144)"])
def test_a_rank_that_is_done_does_not_finalize_the_interpreter(supervise, end):
    """There, a thread that still has a tensor to release aborts the process, and a finished run counted as failed."""
    aborts = "class Aborts:\\n def __del__(self): os.abort()"
    process = supervise(f'exec("{aborts}", globals()); sys.kept = Aborts(); print("done", end=""); {end}')
    told, _ = process.communicate(timeout=WITHIN_S)
    assert (process.returncode, told) == (144 if "144" in end else 0, "done")


def test_a_rank_that_leaves_with_a_message_fails_with_it(supervise):
    process = supervise('sys.exit("no such thing")')
    told, _ = process.communicate(timeout=WITHIN_S)
    assert process.returncode == 1 and "no such thing" in told


def test_a_signal_reaches_the_rank_until_it_ends_and_does_not_kill_it_then(supervise, tmp_path):
    process = supervise(
        "heard = []; "
        "signal.signal(signal.SIGTERM, lambda *_: heard.append(1)); Path(sys.argv[1], 'ready').touch()\n"
        "    while not heard: time.sleep(0.01)\n"
        "    sys.exit(143)"
    )
    wait_until(lambda: (tmp_path / "ready").exists(), "a handler")
    while process.poll() is None:
        process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
    assert process.returncode == 143 and not (tmp_path / "jobs").exists()


@pytest.mark.parametrize("code", [0, 7])
def test_reports_that_cannot_be_read_end_no_rank(supervise, tmp_path, code):
    """The folder is looked at every two seconds, on a file system that may be away for some of them."""
    process = supervise(f"time.sleep(2); sys.exit({code})")
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs/failures").symlink_to("failures")  # ELOOP
    out, _ = process.communicate(timeout=WITHIN_S)
    assert process.returncode == code, out
    assert "Traceback" not in out and ("cannot be" in out) == bool(code)


def test_a_rank_does_not_outlive_the_process_that_waits_for_it(supervise, tmp_path):
    process = supervise("time.sleep(600)")
    process.kill()
    process.wait()
    wait_until(lambda: not process_runs(pid_of(tmp_path)), "the rank is gone")


# --- jobs ---------------------------------------------------------------------------------------------------------

RANK = """
import os as _os, pathlib as _pathlib, signal as _signal, time as _time
_RANK = int(_os.environ.get("SLURM_PROCID") or _os.environ.get("SUBMITIT_LOCAL_GLOBALID") or -1)
def _die(rank, how):
    if _RANK == rank:
        _pathlib.Path({stamp!r}).write_text(str(_time.time()))
        exec(how)
"""
IN_A_STEP = """
_take_step, _taken = take_step, []
def take_step(*given):
    _taken.append(1)
    if len(_taken) == 5:
        {what}
    return _take_step(*given)
"""
IN_EVALUATION = """
_top1 = top1
def top1(*given, **named):
    _die(1, "raise MemoryError('planted')")
    return _top1(*given, **named)
"""
WHILE_IT_WRITES = """
_real = write_hashed
def write_hashed(*given):
    _time.sleep(600)
"""
QUICK = {"launch__ranks__supervisor": "\n_LOOK_S, _GRACE_S = 0.5, 1.0\n"}
KILL = "_os.kill(_os.getpid(), _signal.SIGKILL)"


@pytest.fixture(scope="module")
def materials(tmp_path_factory) -> Path:
    return made.make_materials(tmp_path_factory.mktemp("materials"))


@pytest.fixture
def plant(tmp_path) -> Callable[..., Path]:
    """A working copy in which ranks die: ends of modules by file. ``stamp`` in it says when."""

    def planted(**ends: str) -> Path:
        preamble = RANK.format(stamp=str(tmp_path / "stamp"))
        return made.plant(tmp_path / "clone", **{module: preamble + end for module, end in ends.items()})

    return planted


def died_at(clone: Path) -> float:
    return float((clone.parent / "stamp").read_text())


def submit(clone: Path, materials: Path, *flags: object) -> subprocess.CompletedProcess:
    recipe = [*made.recipe_flags(materials, clone.parent / "run"), "--epochs", 40, "--eval-sets", "val", "--retries", 0]
    recipe += flags
    return made.submit(*recipe, repository=clone, check=False, env={"CFMASK_CLUSTER": ""})


def processes_of(run: Path) -> list[int]:
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and process_runs(int(process.name)):
            try:
                found += [int(process.name)] * (str(run) in (process / "cmdline").read_text(errors="replace"))
            except OSError:
                continue
    return found


def log_of_rank_0(run: Path) -> str:
    [log] = (run / "jobs").glob("*_0_log.out")
    return log.read_text(errors="replace")


def assert_the_story_is_told(run: Path, why: str, last_line: str) -> None:
    assert json.loads((run / "ended.json").read_text())["why"] == f"failed: {why}"
    assert re.search(last_line, message_of(log_of_rank_0(run).splitlines()[-1])), log_of_rank_0(run)
    [run_state], slurm = look_at([RunFolder(run)])
    told = status_of(run_state, slurm)
    assert (told.state, told.last_end) == ("failed", f"failed: {why}")


LOCAL = {
    "raises at import": (
        {"launch__ranks__rank": "_die(1, \"raise ValueError('planted')\")\n", **QUICK},
        ("rank 1: ValueError: planted", "^ValueError: planted$"),
    ),
    "raises while rank 0 hangs": (
        {
            "cfmask__training__train": IN_A_STEP.format(
                what="_die(1, \"raise ValueError('planted')\"); _time.sleep(600)"
            )
        },
        ("rank 1: ValueError: planted", "^ValueError: planted$"),
    ),
    "killed in a step": (
        {"cfmask__training__train": IN_A_STEP.format(what=f"_die(1, {KILL!r})")},
        (
            "rank 1 was killed by signal 9 (SIGKILL: out of memory?)",
            r"^rank 1 on \S+ was killed by signal 9 .* first to end\. Its log: \S+_1_log\.out$",
        ),
    ),
    "raises while it writes a checkpoint": (
        {
            "cfmask__training__train": IN_A_STEP.format(what="_die(0, \"raise ValueError('planted')\")"),
            "cfmask__checkpoint__writer": WHILE_IT_WRITES,
            **QUICK,
        },
        ("ValueError: planted", "^ValueError: planted$"),
    ),
}


@pytest.mark.parametrize(("ends", "expected"), LOCAL.values(), ids=LOCAL)
def test_on_this_machine(plant, materials, tmp_path, ends, expected):
    clone, run = plant(**ends), tmp_path / "run"
    ranks = ("--executor", "local", "--tasks-per-node", 2)
    notify = f"cat >> {tmp_path}/news; exit 0"
    done = submit(clone, materials, *ranks, "--checkpoint-steps", 3, "--notify", notify)
    assert time.time() - died_at(clone) < WITHIN_S
    assert done.returncode == 1
    assert processes_of(run) == []
    assert_the_story_is_told(run, *expected)
    [news] = read_lines(tmp_path / "news")
    assert (news["event"], news["why"], news["attempt"]) == ("failed", f"failed: {expected[0]}", 1)
    holding = [path.name for path in run.rglob("*") if path.is_file() and notify.encode() in path.read_bytes()]
    assert holding == ["notify.sh"], "the command may hold a secret"
    assert "The run did not finish. rank " in done.stdout
    assert message_of(log_of_rank_0(run).splitlines()[-1]) in done.stdout
    made.assert_log_format(run)


SLURM = {
    "raises in the evaluation": (
        {"cfmask__training__train": IN_EVALUATION},
        ("rank 1: MemoryError: planted", "^MemoryError: planted$"),
    ),
    "rank 0 is killed": (
        {"cfmask__training__train": IN_A_STEP.format(what=f"_die(0, {KILL!r})")},
        ("rank 0 was killed by signal 9 (SIGKILL: out of memory?)", r"^rank 0 on n1 was killed by signal 9"),
    ),
}


@pytest.mark.slurm
@pytest.mark.parametrize(("ends", "expected"), SLURM.values(), ids=SLURM)
def test_on_slurm(slurm_cluster: Cluster, plant, materials, tmp_path, ends, expected):
    clone, run = plant(**ends), tmp_path / "run"
    ranks = ("--nodes", 2, "--tasks-per-node", 1, "--cpus-per-task", 1, "--gpus-per-node", 0, "--time", 30)
    slow = f"sleep 1; cat >> {tmp_path}/news; sleep 600"  # hears a TERM of srun, and a KILL after KillWait (5 s)
    done = submit(clone, materials, *ranks, "--notify", slow)
    name = next(line.split()[1] for line in done.stdout.splitlines() if line.startswith("job "))
    wait_until(lambda: (tmp_path / "stamp").exists(), "a rank dies")
    slurm_cluster.wait_for_state(name, "FAILED", WITHIN_S)
    assert time.time() - died_at(clone) < WITHIN_S
    assert slurm_cluster.job(name)["ExitCode"] not in ("0:0", "144:0")
    assert processes_of(run) == []
    assert_the_story_is_told(run, *expected)
    assert read_lines(run / "attempts.jsonl")[-1]["job"] == f"{name}-0"
    made.assert_log_format(run)
    [news] = read_lines(tmp_path / "news")
    assert (news["event"], news["job"], news["why"]) == ("failed", name, f"failed: {expected[0]}")
