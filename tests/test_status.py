"""The table of runs: every state found apart, from whole and from damaged folders, with one question to Slurm."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path

import pytest

import made
from cfmask import run_search
from cfmask.recipe import Recipe
from cfmask.runs import RunFolder
from cfmask.runtime.jsonl import append_lines, read_lines
from launch import status
from launch.slurm.queue import SacctRecord, SlurmJob
from launch.state import follow
from launch.state.facts import SlurmAnswers, read_state
from launch.state.status import Status, status_of
from launch.state.table import attempts_table, table
from slurm_fixture import wait_until

REPO = Path(__file__).resolve().parents[1]
EPOCHS = 40  # long enough to be disturbed


# --- made folders -------------------------------------------------------------------------------------------------


def make_run(
    root: Path, *, starts: int = 0, step: int = 0, saved: int = 0, job: str = "12", ended: str = ""
) -> RunFolder:
    """A run folder as one would be that has trained up to ``step``."""
    run = RunFolder(root)
    run.claim(Recipe())
    for restart in range(starts):
        run.begin_attempt(job=f"{job}-{restart}", nodes=2, world_size=4, device="cuda:0", from_step=saved * restart)
    for each in range(10, step + 1, 10):
        line = {"step": each, "total_steps": 1000, "loss": 2.5, "samples_per_s": 512.0, "eta_s": 3723.0}
        append_lines(run.log, [line])
    if saved:
        (run.checkpoints / f"step-{saved:08d}").mkdir(parents=True)
    if ended:
        run.end_attempt(ended)
    return run


def submitted(run: RunFolder, job: str, *, slurm: bool = True) -> RunFolder:
    """As submitit leaves it."""
    (run.root / "jobs").mkdir(exist_ok=True)
    (run.root / f"jobs/{job}_submitted.pkl").touch()
    if slurm:
        (run.root / f"jobs/{job}_submission.sh").touch()
    return run


def queued(job: str, state: str = "PENDING", *, restarts: int = 0, eligible_in_s: int = -60, reason: str = "Priority"):
    moment = (datetime.now() + timedelta(seconds=eligible_in_s)).isoformat(timespec="seconds")
    return SlurmJob(job, state, "N/A", moment, restarts, reason, "n[1-2]")


def row(run: RunFolder, *jobs: SlurmJob, starts: tuple[SacctRecord, ...] = ()) -> Status:
    return status_of(read_state(run), SlurmAnswers({job.id: job for job in jobs}, starts))


def sacct_record(state: str, job: str = "12", *, ago_s: int = 3600) -> SacctRecord:
    begin = (datetime.now() - timedelta(seconds=ago_s)).isoformat(timespec="seconds")
    return SacctRecord(job, state, begin, (datetime.now() + timedelta(seconds=9)).isoformat(timespec="seconds"))


@pytest.fixture
def root(tmp_path) -> Path:
    return tmp_path / "runs/some-run"


# --- states -------------------------------------------------------------------------------------------------------


def test_never_started(root):
    assert row(make_run(root)).state == "never started"


def test_queued_says_what_it_waits_for(root):
    found = row(submitted(make_run(root), "12"), queued("12"))
    assert (found.state, found.job, found.next_start, found.last_end) == ("queued", "12", "(Priority)", None)


def test_queued_with_an_estimate(root):
    moment = datetime.now().replace(hour=23, minute=59, second=58, microsecond=0).isoformat()
    job = SlurmJob("12", "PENDING", moment, "2020-01-01T00:00:00", 0, "Resources", "")
    assert row(submitted(make_run(root), "12"), job).next_start == "about 23:59:58 (Resources)"


def test_requeued_says_when_it_may_start(root):
    run = submitted(make_run(root, starts=1, step=70, saved=70, ended="stopped at step 70 (requeue)"), "12")
    found = row(run, queued("12", restarts=1, eligible_in_s=90, reason="BeginTime"))
    assert found.state == "requeued" and found.next_start.startswith("eligible ")
    assert found.last_end == "stopped at step 70 (requeue)"
    assert (found.step, found.total_steps, found.eta_s) == (70, 1000, None)


def test_its_job_runs_and_training_has_not_begun(root):
    assert row(submitted(make_run(root), "12"), queued("12", "RUNNING")).state == "starting"
    assert row(submitted(make_run(root), "12"), queued("12", "CONFIGURING")).state == "configuring"


def test_its_job_runs_and_training_is_over(root):
    run = submitted(make_run(root, starts=2, step=70, ended="stopped at step 70 (quit)"), "12")
    assert row(run, queued("12", "RUNNING", restarts=1)).state == "ending"
    assert row(run, queued("12", "COMPLETING", restarts=1)).state == "ending"
    assert row(run, queued("12", "RUNNING", restarts=2)).state == "starting", "of its next start"


def test_running(root):
    run = submitted(make_run(root, starts=1, step=70, saved=50), "12")
    with run.locked("12-0"):
        found = row(run, queued("12", "RUNNING"))
    assert (found.state, found.step, found.samples_per_s, found.loss, found.eta_s) == (
        "running",
        70,
        512.0,
        2.5,
        3723.0,
    )
    assert (found.attempts, found.last_end) == (1, None)


def test_running_without_slurm_is_known_from_the_heartbeat(root):
    run = make_run(root, starts=1, step=70)
    with run.locked():
        assert row(run).state == "running"
        [file] = (run.root / ".owner").iterdir()
        elsewhere = file.rename(file.with_name("n17,another machine,4711,,0a1b2c3d"))
        assert row(run).state == "running"
        os.utime(elsewhere, (1e9, 1e9))
        assert row(run).state == "dead"
        elsewhere.rename(file)


def test_a_queued_run_that_was_killed_on_another_node_is_not_running(root):
    run = submitted(make_run(root, starts=1, step=70), "12")
    with run.locked("12-0"):
        [file] = (run.root / ".owner").iterdir()
        elsewhere = file.rename(file.with_name("n17,another machine,4711,12-0,0a1b2c3d"))
        found = row(run, queued("12", restarts=1))
        elsewhere.rename(file)
    assert (found.state, found.last_end) == ("requeued", "killed without notice")


def test_finished(root):
    run = submitted(make_run(root, starts=1, step=1000, ended="finished"), "12")
    run.results.write_text("{}")
    assert (row(run).state, row(run).last_end) == ("finished", "finished")


def test_cancelling_and_cancelled(root):
    run = submitted(make_run(root, starts=1, step=70, saved=70, ended="stopped at step 70 (quit)"), "12")
    run.cancel()
    assert row(run, queued("12", "RUNNING")).state == "cancelling"
    found = row(run)
    assert found.state == "cancelled"
    assert found.last_end.startswith(f"cancelled at step 70 by {run.cancelled()['by']}, ")


@pytest.mark.parametrize(
    ("trained", "history", "state", "last_end"),
    [
        ({"ended": "stopped at step 70 (quit)"}, None, "stopped", "stopped at step 70 (quit)"),
        ({"ended": "failed: UserError: a\nlong story"}, None, "failed", "failed: UserError: a\nlong story"),
        ({}, None, "dead", "killed without notice"),
        ({}, "NODE_FAIL", "dead", "killed: node failed"),
        ({}, "OUT_OF_MEMORY", "dead", "killed: out of memory"),
        ({}, "TIMEOUT", "dead", "killed: time limit"),
        ({}, "CANCELLED by 0", "stopped", "killed: scancel by 0"),
        ({}, "FAILED", "failed", "killed: its job failed"),
        (None, "FAILED", "failed", "its job failed, before training began"),
        (None, "CANCELLED by 1000", "stopped", "scancel by 1000, before training began"),
    ],
)
def test_a_run_without_a_job_has_the_reason_of_its_folder_or_that_of_slurm(root, trained, history, state, last_end):
    """trained: None: no start was recorded."""
    run = make_run(root) if trained is None else make_run(root, starts=1, step=70, **trained)
    found = row(submitted(run, "12"), starts=(sacct_record(history),) if history else ())
    assert (found.state, found.last_end) == (state, last_end)
    assert " ".join(last_end.split()) in table([found])


def test_a_local_job_that_failed_before_training_began(root):
    found = row(submitted(make_run(root), "4000000", slurm=False))
    assert (found.state, found.last_end) == ("failed", "ended before training began")


def test_a_member_of_an_array(root):
    run = make_run(root)
    (run.root / "jobs").mkdir()
    (run.root / "jobs/12_3_submitted.pkl").touch()
    assert row(run, queued("12_3")).state == "queued"
    assert row(run, queued("12_4")).state == "dead"


def test_without_slurm_a_run_that_may_be_queued_is_unknown(root):
    def found(name: str, **made_as) -> str:
        run = submitted(make_run(root.with_name(name), **made_as), "12")
        return status_of(read_state(run), SlurmAnswers()).state

    assert found("a", starts=1, step=70, ended="stopped at step 70 (requeue)") == "unknown"
    assert found("b", starts=1, step=70) == "unknown"
    assert found("c") == "unknown"
    assert found("lost", starts=1, step=70, ended="lost a rank without a report: rank 1 was cut off") == "unknown"
    why = "given up: job 12 made no progress. Their ends: stopped at step 70 (requeue)"
    assert found("given-up", starts=1, step=70, ended=why) == "failed"
    assert found("d", starts=1, step=70, ended="stopped at step 70 (quit)") == "stopped"
    assert found("e", starts=1, step=70, ended="failed: UserError: no") == "failed"


# --- each start ---------------------------------------------------------------------------------------------------


def test_attempts_have_their_steps_and_their_ends(root):
    run = submitted(make_run(root, starts=1, step=70, saved=50), "12")
    run.begin_attempt(job="12-1", nodes=1, world_size=2, device="cpu", from_step=50)
    append_lines(run.log, [{"step": 90, "total_steps": 100, "loss": 1, "samples_per_s": 5, "eta_s": 1}])
    run.end_attempt("stopped at step 90 (quit)")
    run_state = read_state(run)
    slurm = SlurmAnswers({}, (sacct_record("NODE_FAIL"),))
    header, first, second = attempts_table(run_state, status_of(run_state, slurm), slurm).splitlines()
    assert header.split() == "attempt started job nodes ranks device from step to step ended".split()
    assert first.split()[2:] == "12-0 2 4 cuda:0 0 70 killed: node failed".split()
    assert second.split()[2:] == "12-1 1 2 cpu 50 90 stopped at step 90 (quit)".split()


# --- damaged folders ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "content", "note"),
    [
        ("recipe.json", '{"model', "not a recipe"),
        ("recipe.json", None, "no recipe.json"),
        ("attempts.jsonl", b'{"attempt": 1, "job": "12-0", "from_step": 0}\n{"attempt": 2, "jo', "torn line"),
        ("attempts.jsonl", b"\0" * 100, "torn line"),
        ("attempts.jsonl", None, ""),
        ("ended.json", '{"why', ""),
        ("ended.json", "[]", ""),
        ("ended.json", '{"why": "failed: x", "ended": 1, "attempt": "x"}', ""),
        ("cancelled.json", '{"b', ""),
        ("log.jsonl", b'{"step": 10, "total_steps": 1000, "loss": 2.5, "samples', ""),
        ("log.jsonl", b"17\n\xff\xfe\n[]\n", ""),
        ("log.jsonl", b"[" * 100_000, ""),
        ("log.jsonl", None, ""),
        ("results.json", '{"sets": ', ""),
        (".owner/free", None, ""),
        ("checkpoints/step-torn", b"", ""),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_damaged_file_leaves_the_rest_of_the_table(root, capsys, file, content, note):
    damaged = submitted(
        make_run(root, starts=1, step=70, saved=50, ended="stopped at step 70 (quit)"), "4000000", slurm=False
    )
    with damaged.locked():
        pass
    make_run(root.with_name("whole"))
    path = damaged.root / file
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert status.main([str(root.parent), "--attempts"]) == 0
    found = capsys.readouterr().out
    rows = [line.split()[0] for line in found.splitlines() if line.startswith(str(root.parent)) and " " in line]
    assert sorted(rows) == [str(root), str(root.with_name("whole"))]
    assert ("note: " in found) == bool(note) and note in found


def test_a_wrong_path_is_an_error_of_one_line(tmp_path, capsys, monkeypatch):
    def refused(*arguments: object) -> str:
        assert status.main(list(map(str, arguments))) == 2
        [said] = capsys.readouterr().err.splitlines()
        assert said.startswith("error: ")
        return said

    (tmp_path / "empty").mkdir()
    assert "no recipe.json" in refused(tmp_path / "empty")
    assert "No such file" in refused(tmp_path / "nowhere")
    monkeypatch.chdir(tmp_path)
    assert "change to the directory of the submission" in refused()
    make_run(tmp_path / "runs/a")
    make_run(tmp_path / "runs/b")
    assert "2 are given" in refused("--follow")
    make_run(tmp_path / "reproductions/ViT-B-32/ft-s0")
    assert f"folders of runs: {tmp_path}/reproductions/ViT-B-32." in refused(tmp_path / "reproductions")

    def deny(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(run_search, "_is_run", deny)
    assert "cannot be read: Permission denied" in refused(tmp_path / "runs")


# --- the command --------------------------------------------------------------------------------------------------


@pytest.fixture
def fake_slurm(tmp_path, monkeypatch) -> Path:
    """A squeue and a sacct that say what files say, and write down how they were called."""
    bin = tmp_path / "bin"
    bin.mkdir()
    for name in ("squeue", "sacct"):
        (bin / name).write_text(f'#!/bin/sh\necho {name} "$@" >> {bin}/calls\ncat {bin}/{name}.out\n')
        (bin / name).chmod(0o755)
        (bin / f"{name}.out").touch()
    (bin / "calls").touch()
    monkeypatch.setenv("PATH", f"{bin}{os.pathsep}{os.environ['PATH']}")
    return bin


def test_slurm_is_asked_once_for_all_runs(tmp_path, fake_slurm, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for job in range(12, 20):
        submitted(make_run(tmp_path / f"runs/r{job}", starts=job % 2, step=30, job=str(job)), str(job))
    (fake_slurm / "squeue.out").write_text("12|PENDING|N/A|2020-01-01T00:00:00|0|Priority||\n")
    now = datetime.now()
    begin, end = ((now + timedelta(seconds=s)).isoformat(timespec="seconds") for s in (-60, 60))
    (fake_slurm / "sacct.out").write_text(f"13|NODE_FAIL|{begin}|{end}\n13|PENDING|Unknown|Unknown\n")
    assert status.main([]) == 0
    found = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "waits in the queue: jobs of higher priority are first" in found["runs/r12"]
    assert "dead" in found["runs/r13"] and "killed: node failed" in found["runs/r13"]
    squeue, sacct = (fake_slurm / "calls").read_text().splitlines()
    assert "--jobs=12,13,14,15,16,17,18,19" in squeue
    assert "-j 13,14,15,16,17,18,19" in sacct, "what waits in the queue has not ended"


def test_slurm_that_does_not_answer_is_a_note(tmp_path, fake_slurm, capsys):
    submitted(make_run(tmp_path / "a", starts=1, step=30), "12")
    (fake_slurm / "squeue").write_text(
        "#!/bin/sh\necho slurm_load_jobs error: Unable to contact slurm controller >&2\nexit 1\n"
    )
    assert status.main([str(tmp_path / "a")]) == 0
    assert "note: Slurm does not answer here" in capsys.readouterr().out
    (fake_slurm / "squeue").write_text("#!/bin/sh\necho slurm_load_jobs error: Invalid job id specified >&2\nexit 1\n")
    assert status.main([str(tmp_path / "a")]) == 0
    assert "note" not in capsys.readouterr().out, "no such job any more is an answer"


def test_json_is_a_list_with_an_object_a_line(tmp_path, capsys):
    for name in "ab":
        make_run(tmp_path / name, starts=1, step=70)
    assert status.main([str(tmp_path), "--json"]) == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) == 2
    first, second = sorted(json.loads(text), key=lambda each: each["run"])
    assert (first["run"], second["run"]) == (str(tmp_path / "a"), str(tmp_path / "b"))
    assert (first["step"], first["loss"], first["state"]) == (70, 2.5, "dead")
    assert status.main([str(tmp_path), "--json", "--running"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_it_answers_at_once_without_torch(tmp_path):
    for i in range(5):
        make_run(tmp_path / f"r{i}", starts=3, step=70)
    code = f"""
import sys
from launch import status
assert status.main([{str(tmp_path)!r}]) == 0
print([name for name in ("torch", "numpy", "submitit") if name in sys.modules])
"""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stdout.splitlines()[-1] == "[]"
    # processor time: the machine may be busy with other things
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


# --- following a run ----------------------------------------------------------------------------------------------


def test_a_log_that_cannot_be_read_for_a_moment_does_not_end_the_follower(tmp_path, monkeypatch):
    """A run on this machine ends with its follower."""
    run = make_run(tmp_path / "run", starts=1, step=4)
    append_lines(run.log, [{"step": 5, "total_steps": 9, "loss": 1.0, "samples_per_s": 2.0, "eta_s": 3.0}])
    failures = iter([OSError(5, "Input/output error")])
    real = follow.progress_of

    def failing(run):
        for failure in failures:
            raise failure
        return real(run)

    monkeypatch.setattr(follow, "progress_of", failing)
    shown = []
    monkeypatch.setattr(
        follow.ProgressLine, "show", lambda line, progress, **more: shown.append((progress.step, progress.total))
    )
    monkeypatch.setattr(follow.time, "sleep", lambda seconds: None)
    follow._watch(run, iter([""]))
    assert shown == [(None, None), (5, 9)]


def test_a_run_that_waits_has_no_eta_and_no_rate(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", starts=1, step=4)
    append_lines(run.log, [{"step": 5, "total_steps": 9, "loss": 1.0, "samples_per_s": 2.0, "eta_s": 3.0}])
    shown = []
    monkeypatch.setattr(follow.ProgressLine, "show", lambda line, progress, **more: shown.append(progress))
    monkeypatch.setattr(follow.time, "sleep", lambda seconds: None)
    follow._watch(run, iter(["", "preempted, starts again in 2 min or later", ""]))
    assert [(each.step, each.eta_s, each.samples_per_s) for each in shown[:3]] == [
        (5, 3.0, 2.0),
        (5, None, None),
        (5, 3.0, 2.0),
    ]


def start_following(run: Path) -> subprocess.Popen:
    command = [sys.executable, REPO / "launch/status.py", run, "--follow"]
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def materials(tmp_path_factory) -> Path:
    return made.make_materials(tmp_path_factory.mktemp("materials"))


def local_flags(materials: Path, run: Path) -> list[object]:
    return [*made.recipe_flags(materials, run), "--executor", "local", "--tasks-per-node", 2, "--epochs", EPOCHS]


def test_a_run_on_this_machine_is_followed_over_a_restart_to_its_end(materials, tmp_path):
    run = tmp_path / "run"
    process = made.start(*local_flags(materials, run))
    wait_until(lambda: (run / "recipe.json").exists(), "the run is there")
    following = start_following(run)
    wait_until(lambda: any(x["step"] >= 5 for x in read_lines(run / "log.jsonl")), "step 5")
    os.kill(RunFolder(run).owner().pid, signal.SIGUSR2)
    found, bar = following.communicate(timeout=240)
    assert following.returncode == 0, found + bar
    assert f"finished: {run / 'model.safetensors'}" in found
    assert "loss" in bar and "samples/s" in bar and f"/{EPOCHS * 6}" in bar
    assert len(read_lines(run / "attempts.jsonl")) == 2
    assert process.wait(timeout=300) == 0
    assert follow.follow_run(RunFolder(run)) == 0, "of a finished run, at once"


def test_a_follower_leaves_the_run_alone_after_ctrl_c_and_ends_with_a_run_that_dies(materials, tmp_path):
    run = tmp_path / "run"
    process = made.start(*local_flags(materials, run))
    try:
        wait_until(lambda: any(x["step"] >= 2 for x in read_lines(run / "log.jsonl")), "step 2")
        first, second = start_following(run), start_following(run)
        assert first.stderr.read(1) and second.stderr.read(1), "both show their bars"
        first.send_signal(signal.SIGINT)
        found, errors = first.communicate(timeout=300)
        assert first.returncode == 130 and "Traceback" not in errors
        assert "The run continues" in found
        assert process.poll() is None
    finally:
        made.kill_all(process)
    found, bar = second.communicate(timeout=300)
    assert second.returncode == 1, found + bar
    assert "The run did not finish" in found and "--resume" in found
