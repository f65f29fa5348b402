"""--notify: which event is sent when, and that no command delays or changes a job."""

from __future__ import annotations

import json
import stat
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from cfmask.errors import UserError
from cfmask.evaluation_spec import Evaluation
from cfmask.recipe import Recipe
from cfmask.runs import RunFolder
from cfmask.runtime.jsonl import append_lines
from launch.allocation.cluster_file import ClusterFile, read_cluster_file
from launch.allocation.resolve import resolve_allocation
from launch.notification import notify
from launch.notification.notify import Event, event_of_end, event_of_preemptions, preemptions_to_report, run_command
from launch.state.facts import read_state
from launch.submission.training import plan_resume
from launch.submit import parser
from slurm_fixture import wait_until


@pytest.fixture
def run(tmp_path) -> RunFolder:
    """One that has trained up to step 70 of 1000, in the second start of job 12."""
    made_run = RunFolder(tmp_path / "run")
    made_run.claim(Recipe())
    (made_run.root / "jobs").mkdir()
    for restart in range(2):
        made_run.begin_attempt(job=f"12-{restart}", nodes=2, world_size=4, device="cpu", from_step=50 * restart)
    line = {"step": 70, "total_steps": 1000, "loss": 2.5, "samples_per_s": 512.0, "eta_s": 3723.0}
    append_lines(made_run.log, [line])
    return made_run


def event_after(run: RunFolder, attempt: str = "12-1", failed: str | None = "exit code 1") -> Event | None:
    return event_of_end(read_state(run), attempt, failed=failed, node="n07")


# --- which event is sent ----------------------------------------------------------------------------------------------


def test_a_finished_run_sends_its_accuracies(run):
    run.results.write_text(json.dumps({"step": 70, "sets": {"val": {"correct": 3, "total": 4, "top1": 75.0}}}))
    run.end_attempt("finished")
    found = event_after(run, failed=None)
    assert found == Event(
        *("finished", str(run.root), "12", 2, 70, 1000, "finished"),
        node=found.node,
        top1={"val": 75.0},
        time=found.time,
    )
    assert datetime.strptime(found.time, "%Y-%m-%dT%H:%M:%S%z")
    # From Slurm 24.05 on, the job of a finished run may be started again.
    assert event_after(run, attempt="12-2", failed=None) is None


def test_an_evaluation_sends_accuracies_by_model(tmp_path):
    run = RunFolder(tmp_path / "evaluation")
    run.claim(Evaluation(models=("a",), shards="s", sets=("r",)))
    run.begin_attempt(job="7_3-0", nodes=1, world_size=1, device="cpu", from_step=0)
    run.results.write_text(json.dumps({"sets": {}, "models": [{"name": "a", "sets": {"r": {"top1": 50.0}}}]}))
    run.end_attempt("finished")
    found = event_after(run, "7_3-0", failed=None)
    assert found and (found.event, found.job, found.top1) == ("finished", "7_3", {"a": {"r": 50.0}})


@pytest.mark.parametrize(
    ("why", "failed", "event"),
    [
        ("failed: rank 3: ValueError: x", "exit code 1", "failed"),
        ("given up: job 12 made no progress", "exit code 1", "given_up"),
        ("not started: given up: job 12 made no progress", "exit code 1", "given_up"),
        ("lost a rank without a report: rank 1 was cut off; given up: job 12", "exit code 1", "given_up"),
        ("lost a rank without a report: rank 1 was cut off", "exit code 1", None),
        ("stopped at step 70 (requeue)", None, None),
        ("stopped at step 70 (quit)", None, None),
        ("stopped at step 70 (quit)", "exit code 139", None),
        ("failed: rank 3: ValueError: x", None, "failed"),  # rank 0 was stopped for it
        (None, None, None),
    ],
)
def test_the_event_of_an_end(run, why, failed, event):
    if why:
        run.end_attempt(why)
    found = event_after(run, failed=failed)
    assert (found and found.event) == event
    if found:
        assert (found.why, found.node, found.step, found.total_steps, found.attempt) == (why, "n07", 70, 1000, 2)


def test_an_end_that_could_not_be_recorded_is_sent_with_what_is_known(run):
    found = event_after(run)
    assert found and (found.event, found.why) == ("failed", "exit code 1")


def test_a_cancelled_run_and_a_refused_job_send_nothing(run):
    with run.locked("13-0"):
        assert event_after(run, attempt="14-0") is None, "job 13 trains here"
    assert event_after(run, attempt="14-0").event == "failed"
    run.end_attempt("failed: rank 1 was killed by signal 9")
    run.cancel()
    assert event_after(run) is None


def attempts(*ends: tuple[float, str], job: str = "12") -> list[dict]:
    """Lines of starts, each but the first after one that ended at an hour, for a reason."""
    began = datetime(2026, 11, 1, tzinfo=timezone.utc)
    lines: list[dict] = [{"job": f"{job}-0", "started": began.strftime("%Y-%m-%dT%H:%M:%S%z"), "why_last_ended": None}]
    for restart, (hour, why) in enumerate(ends, 1):
        when = (began + timedelta(hours=hour)).strftime("%Y-%m-%dT%H:%M:%S%z")
        killed = why == "killed without notice"
        line = {"job": f"{job}-{restart}", "started": when, "why_last_ended": why}
        lines.append({**line, "last_ended": None if killed else when})
    return lines


PREEMPTED, KILLED = "stopped at step 70 (requeue)", "killed without notice"


@pytest.mark.parametrize(
    ("lines", "reported_at"),
    [
        (attempts(*((hour, PREEMPTED) for hour in range(4))), []),
        (attempts(*((hour, PREEMPTED) for hour in range(14))), [5, 10]),
        (attempts(*((hour, (PREEMPTED, KILLED, "stopped at step 7 (quit)")[hour % 3]) for hour in range(6))), [5]),
        (attempts(*((7 * hour, PREEMPTED) for hour in range(20))), []),  # four within a day
        (attempts(*((0, PREEMPTED) for _ in range(4)), (23.9, PREEMPTED)), [5]),
        (attempts(*((0, PREEMPTED) for _ in range(4)), (24.1, PREEMPTED)), []),
        (attempts(*((hour, f"{PREEMPTED}, at the time limit") for hour in range(20))), []),
        (attempts(*((hour, "failed: rank 1: x") for hour in range(20))), []),
        (attempts(*((hour, "lost a rank without a report: x") for hour in range(20))), []),
        # Resumed by hand each time: other jobs, or another start of the same name on this machine.
        ([each for hour in range(9) for each in attempts((hour, KILLED), job=str(hour))[1:]], []),
        ([{**each, "job": "12-0"} for each in attempts(*((hour, KILLED) for hour in range(9)))], []),
        (attempts(*((hour, PREEMPTED) for hour in range(5)), (6, "failed: rank 1: x")), [5]),
        ([{}, {"job": "x", "why_last_ended": 3}], []),
    ],
)
def test_preemptions_are_reported_once_in_a_window(lines, reported_at):
    """As each start sees it, with the lines up to its own."""
    assert [n for n in range(len(lines)) if preemptions_to_report(lines[: n + 1])] == reported_at


def test_the_event_of_preemptions_has_their_number(run):
    run.attempts.unlink()
    append_lines(run.attempts, attempts(*((hour, PREEMPTED) for hour in range(5))))
    found = event_of_preemptions(read_state(run), "12-5")
    assert found and (found.event, found.attempt) == ("preempted_too_often", 6) and "5 times" in found.why
    append_lines(run.attempts, attempts(*((hour, PREEMPTED) for hour in range(6)))[-1:])
    assert event_of_preemptions(read_state(run), "12-6") is None


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        ("cat > got", None),
        ("true", None),  # reads nothing
        ("exec <&-; sleep 0.1", None),
        ("sleep 600 & echo begun", None),
        ("head -c 100000000 /dev/zero", None),
        ("head -c 100000000 /dev/zero | tr '\\0' x; exit 3", "ended with exit code 3: " + 200 * "x"),
        ("yes | head -c 100000000; kill -9 $$", "was killed by signal 9: y"),
        ("echo no >&2; false", "ended with exit code 1: no"),
        ("/no/such/program", "ended with exit code 127: "),
        ("curl https://hooks/T/SECRET; echo https://hooks/T/SECRET; false", "ended with exit code 1: ***"),
        ("post --token=SECRET; echo denied: SECRET; false", "ended with exit code 1: denied: ***"),
    ],
)
def test_the_end_of_a_command(tmp_path, command, complaint):
    began = time.monotonic()
    found = run_command(command, '{"event": "failed"}', tmp_path, within_s=600)
    assert found == complaint if complaint is None else found.startswith(complaint) and len(found) < 250
    assert time.monotonic() - began < 400
    if "got" in command:
        assert json.loads((tmp_path / "got").read_text()) == {"event": "failed"}


@pytest.mark.parametrize(
    "command",
    [
        "(echo $$ >> pids; exec sleep 600) & echo $$ >> pids; echo half; sleep 600",
        "echo $$ >> pids; exec >&- 2>&-; sleep 600",
        "echo $$ >> pids; yes",
        "trap '' TERM; echo $$ >> pids; while :; do :; done",
    ],
)
def test_a_command_that_hangs_is_killed_with_its_children(tmp_path, command):
    began = time.monotonic()
    assert "did not end within 2 s and was killed" in run_command(command, "{}", tmp_path, within_s=2)
    assert 2 <= time.monotonic() - began < 400
    for pid in (tmp_path / "pids").read_text().split():
        wait_until(lambda pid=pid: not Path(f"/proc/{pid}").exists(), "its end")


def test_a_command_is_run_in_the_run_folder_and_its_failure_is_a_line_of_the_log(run, capsys):
    found = Event("failed", str(run.root), "12", 1, 0, None, "x", "n07")
    notify.send("cat > got && pwd > where", found)
    assert capsys.readouterr().out == ""
    assert (run.root / "where").read_text().strip() == str(run.root)
    assert Event(**json.loads((run.root / "got").read_text())) == found
    notify.send("echo https://x/?sig=SECRET; exit 5", found)
    assert capsys.readouterr().err == "warning: --notify ended with exit code 5: ***\n"


def test_a_command_that_cannot_be_run_is_a_line_of_the_log(run, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nowhere")  # no sh
    notify.send("cat > got", Event("failed", str(run.root), "12", 1, 0, None, "x", "n07"))
    assert "warning: --notify cannot be run: " in capsys.readouterr().err


def test_the_command_is_kept_for_its_owner_alone_and_for_a_resume(run, capsys):
    command = "curl -d @- https://hooks/T/SECRET"
    notify.keep_command(command, run)
    [path] = (run.root / "jobs").iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and notify.kept_command(run) == command
    line = {"job": "12", "executor": "local", "allocation": {"nodes": 1, "tasks_per_node": 1}}
    append_lines(run.root / "jobs/submissions.jsonl", [line])
    flags = ["--resume", str(run.root), "--executor", "local"]
    allocation, _ = plan_resume(parser().parse_args(flags), ClusterFile())
    assert allocation.notify == command
    assert "SECRET" not in repr(allocation) + json.dumps(allocation.again) + json.dumps(dict(allocation.environment))
    allocation, _ = plan_resume(parser().parse_args([*flags, "--notify", ":"]), ClusterFile())
    assert allocation.notify == ":"
    notify.keep_command(None, run)
    assert notify.kept_command(run) is None
    assert "SECRET" not in "".join(capsys.readouterr())


@pytest.mark.parametrize("command", ["", "  ", "if", "echo 'x", "echo $("])
def test_a_command_that_sh_cannot_read_is_refused(tmp_path, monkeypatch, command, capsys):
    with pytest.raises(SystemExit):
        parser().parse_args(["--notify", command])
    assert "is not a command of the shell" in capsys.readouterr().err
    (tmp_path / "cluster.toml").write_text(f"notify = {json.dumps(command)}\n")
    file = read_cluster_file(tmp_path / "cluster.toml")
    on_slurm = parser().parse_args(["--gpus-per-node", "0"])
    on_slurm.executor = "slurm"
    monkeypatch.setattr("launch.allocation.resolve.choose_executor", lambda arguments: "slurm")
    with pytest.raises(UserError, match="notify is .* which is not a command of the shell"):
        resolve_allocation(on_slurm, file)


def test_without_a_supervisor_it_is_refused():
    for flag in ("--notify", "--wandb"):
        arguments = parser().parse_args(["--executor", "debug", "--tasks-per-node", "1", flag, "x"])
        with pytest.raises(UserError, match=f"{flag} would do nothing with --executor debug"):
            resolve_allocation(arguments, ClusterFile())
