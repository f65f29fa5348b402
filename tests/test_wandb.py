"""--wandb: the history of a run in Weights & Biases, each step once, whatever ends the process that sends it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import made
from cfmask.errors import UserError
from cfmask.evaluation_spec import Evaluation
from cfmask.log_lines import curves_of
from cfmask.presets import PRESETS, preset_of
from cfmask.recipe import Data, Method, Recipe
from cfmask.runs import RunFolder
from cfmask.runtime.jsonl import append_lines, cut_lines, read_lines
from launch.allocation.cluster_file import ClusterFile
from launch.allocation.resolve import resolve_allocation
from launch.notification import wandb_sender
from launch.notification.wandb_sender import UNTIL_EOF
from launch.submit import parser
from slurm_fixture import wait_until
from wandb_server import KEY, Run, offline_run, serving

pytest.importorskip("wandb")

SENDER = """
import os, signal, sys, time
from launch.notification import wandb_sender
wandb_sender._INIT_S, wandb_sender._LOOK_S = {init_s}, 0.2
{plant}
sys.exit(wandb_sender.main(sys.argv[1:]))
"""
DIES_BEFORE_IT_SAVES = "wandb_sender.Sender._save = lambda self: os.kill(os.getpid(), signal.SIGKILL)"
OFFLINE = {"WANDB_MODE": "offline"}
NOBODY = "http://127.0.0.1:9"
"""An address at which nobody answers."""


@pytest.fixture(autouse=True)
def no_account(monkeypatch, tmp_path_factory):
    """Whoever runs these tests may have one."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))


@pytest.fixture
def run(tmp_path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    shards = "https://host/shards?sig=SECRET"
    folder.claim(replace(PRESETS["ft"], data=Data(shards=shards, eval_sets=("val",))).resolved())
    return folder


def take_steps(run: RunFolder, last: int, *, committed: int) -> None:
    """A start that resumes from the last checkpoint, takes steps up to one, with a line for every tenth and an
    evaluation for every fiftieth, and writes a checkpoint."""
    begun = max((line["step"] for line in read_lines(run.committed)), default=0)
    cut_lines(run.log, begun)
    for step in range(begun + 10, last + 1, 10):
        line = {"step": step, "total_steps": 200, "loss": step / 8, "samples_per_s": 512.0, "eta_s": 3.0}
        append_lines(run.log, [line])
        if step % 50 == 0:
            append_lines(run.log, [{"step": step, "epoch": step // 50, "eval": {"val": 60.0 + step / 10}}])
    append_lines(run.committed, [{"step": committed}])


def finish(run: RunFolder) -> None:
    sets = {"val": {"correct": 4, "total": 5, "top1": 80.0}}
    run.results.write_text(json.dumps({"step": 200, "skipped_steps": 0, "sets": sets}))


def send(
    run: RunFolder, environment: dict[str, str] | None = None, *, plant: str = "", init_s: float = 30, code: int = 0
) -> str:
    """The output of a sender whose standard input is closed: the start of the run has ended."""
    command = [sys.executable, "-c", SENDER.format(init_s=init_s, plant=plant)]
    command += [UNTIL_EOF, str(run.root), "lab/imagenet"]
    done = subprocess.run(
        command, env={**os.environ, **(environment or OFFLINE)}, input="", capture_output=True, text=True, timeout=120
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def folders(run: RunFolder) -> list[Path]:
    return sorted((run.root / "wandb").glob("offline-run-*"))


def offline_history(run: RunFolder) -> Run:
    """All folders, in the order in which `wandb sync` uploads them."""
    whole, ids = Run(), set()
    for folder in folders(run):
        id, part = offline_run(folder)
        ids.add(id)
        whole.history += part.history
        whole.summary |= part.summary
        whole.config |= part.config
        whole.tags = part.tags
    assert len(ids) == 1, "one run"
    return whole


def assert_is_log(found: Run, run: RunFolder, *, up_to: int | None = None) -> None:
    """Each step of log.jsonl once, in order, with the points of its curves."""
    expected: dict[int, dict[str, float]] = {}
    for line in read_lines(run.log):
        if up_to is None or line["step"] <= up_to:
            expected.setdefault(line["step"], {}).update(curves_of(line))
    own = ("_step", "_timestamp", "_runtime")
    assert found.steps == sorted(expected)
    assert [{k: v for k, v in line.items() if k not in own} for line in found.history] == list(expected.values())


# --- offline ----------------------------------------------------------------------------------------------------------


def test_offline_each_step_is_written_once_whatever_ends_the_sender(run):
    take_steps(run, 100, committed=50)
    send(run)
    assert_is_log(offline_history(run), run, up_to=50)
    kept = json.loads((run.root / "wandb.json").read_text())["lab/imagenet"]
    assert kept["sent"] == 50
    send(run)
    assert len(folders(run)) == 1, "nothing new"

    take_steps(run, 170, committed=150)
    send(run, plant=DIES_BEFORE_IT_SAVES, code=-signal.SIGKILL)
    assert len(folders(run)) == 2, "one that does not count"
    send(run)
    assert len(folders(run)) == 2
    assert_is_log(offline_history(run), run, up_to=150)

    take_steps(run, 200, committed=200)
    finish(run)
    said = send(run)
    whole = offline_history(run)
    assert_is_log(whole, run)
    assert "`wandb sync " in said and "steps up to 200" in said
    assert whole.summary["results"] == {"val": 80.0} and whole.tags == ["ft"]
    config = json.dumps(whole.config)
    assert '"eval_sets": ["val"]' in config and "https://host/shards?sig=***" in config
    for path in (run.root / "wandb").rglob("*"):
        assert not path.is_file() or b"SECRET" not in path.read_bytes(), path
    assert send(run) == "" and len(folders(run)) == 3


# --- online -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[tuple[dict[str, str], dict[str, Run]]]:
    """The environment in which wandb finds it, and its runs."""
    with serving() as (address, runs):
        environment = {"WANDB_BASE_URL": address, "WANDB_API_KEY": KEY}
        yield {**environment, "WANDB__FILE_STREAM_TRANSMIT_INTERVAL": "1"}, runs


@contextlib.contextmanager
def sending(run: RunFolder, environment: dict[str, str]) -> Iterator[None]:
    """A sender beside a rank that goes on; it is killed in the end."""
    command = [sys.executable, "-c", SENDER.format(init_s=30, plant=""), UNTIL_EOF]
    process = subprocess.Popen(
        [*command, str(run.root), "lab/imagenet"], env={**os.environ, **environment}, stdin=subprocess.PIPE
    )
    try:
        yield
    finally:
        process.kill()
        process.wait()


def test_online_each_step_is_sent_once_although_the_sender_is_killed(run, server):
    environment, runs = server
    take_steps(run, 70, committed=50)
    with sending(run, environment):
        wait_until(lambda: runs and [*runs.values()][0].steps[-1:] == [50], "steps up to the checkpoint")
        append_lines(run.committed, [{"step": 70}])
        wait_until(lambda: [*runs.values()][0].steps[-1:] == [70], "and those up to the next one")

    take_steps(run, 150, committed=150)
    # Nobody but the server knows what was sent, and it does not answer: a folder could repeat steps.
    said = send(run, {**environment, "WANDB_BASE_URL": NOBODY}, init_s=2)
    assert "cannot be reached" in said and "they wait in log.jsonl" in said and not folders(run)
    take_steps(run, 200, committed=200)
    finish(run)
    assert "resumed lab/imagenet" in send(run, environment)
    [(id, there)] = runs.items()
    assert_is_log(there, run)
    assert there.summary["results"] == {"val": 80.0} and there.tags == ["ft"]
    assert "SECRET" not in json.dumps(there.config)
    for path in (run.root / "wandb").rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path
    kept = json.loads((run.root / "wandb.json").read_text())["lab/imagenet"]
    assert kept == {"id": id, "sent": 200, "folders": [], "unconfirmed": False, "finished": True}


def test_a_start_that_cannot_reach_wandb_is_offline_and_its_folders_are_synced_first(run, server, tmp_path):
    environment, runs = server
    take_steps(run, 60, committed=50)
    said = send(run, {"WANDB_BASE_URL": environment["WANDB_BASE_URL"]})
    assert "this start is offline: No API key" in said and len(folders(run)) == 1
    take_steps(run, 150, committed=150)
    assert "is not synced, so this start is offline too" in send(run, environment) and not runs
    wandb = [sys.executable, "-m", "wandb", "sync", "--yes", str(run.root / "wandb")]
    environ = {**os.environ, **environment}
    done = subprocess.run(wandb, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    [there] = runs.values()
    assert_is_log(there, run, up_to=150)
    take_steps(run, 200, committed=200)
    finish(run)
    send(run, environment)
    assert len(runs) == 1 and len(folders(run)) == 2
    assert_is_log(there, run)


# --- beside rank 0 ----------------------------------------------------------------------------------------------------

SUPERVISE = """
import sys, time
from pathlib import Path
from launch.ranks import supervisor
from launch.notification import notify
notify.WITHIN_S = {within_s}
def rank():
    {body}
sys.exit(supervisor.supervise(rank, Path(sys.argv[1])))
"""


def supervise(run: RunFolder, body: str, environment: dict[str, str], *, within_s: float = 30) -> tuple[int, str]:
    """Exit code and log of rank 0 of job 7, which does what a line of Python says."""
    environment = {**os.environ, **environment, wandb_sender.VARIABLE: "lab/imagenet", "SUBMITIT_EXECUTOR": "local"}
    environment |= {f"SUBMITIT_LOCAL_{name}": "0" for name in ("NODEID", "GLOBALID", "LOCALID")}
    environment |= {f"SUBMITIT_LOCAL_{name}": "1" for name in ("NTASKS", "JOB_NUM_NODES")} | {
        "SUBMITIT_LOCAL_JOB_ID": "7"
    }
    program = SUPERVISE.format(body=body, within_s=within_s)
    command = [sys.executable, "-u", "-c", program, str(run.root)]
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120
    )
    return done.returncode, done.stdout


def _home(process: Path) -> bool:
    """Whether a process was started by this test."""
    return f"HOME={os.environ['HOME']}".encode() in (process / "environ").read_bytes().split(b"\0")


def nothing_is_left_of(run: RunFolder) -> bool:
    named = str(run.root).encode()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if named in path.read_bytes() or (b"wandb-core" in path.read_bytes() and _home(path.parent)):
                return False
        except OSError:
            continue
    return True


def test_wandb_that_hangs_holds_no_job_up(run):
    """A server that takes connections and never answers."""
    take_steps(run, 100, committed=100)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        environment = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": f"http://127.0.0.1:{silent.getsockname()[1]}"}
        began = time.monotonic()
        code, log = supervise(run, "time.sleep(4); sys.exit(143)", environment, within_s=2)
        assert code == 143 and time.monotonic() - began < 80, log
    assert "the end of the history was not sent within 2 s" in log
    wait_until(lambda: nothing_is_left_of(run), "the end of all processes")


@pytest.mark.parametrize(("plant", "told"), [("find_spec", "wandb is not installed"), ("wandb", "could not be sent")])
def test_wandb_that_is_missing_or_broken_is_a_line_of_the_log(run, tmp_path, plant, told):
    take_steps(run, 100, committed=100)
    (tmp_path / "path").mkdir()
    if plant == "wandb":
        (tmp_path / "path/wandb.py").write_text("raise AttributeError('planted')\n")
    else:
        hides = "u.find_spec = lambda name, find=u.find_spec: None if name == 'wandb' else find(name)\n"
        hides = f"import importlib.util as u\n{hides}"
        (tmp_path / "path/sitecustomize.py").write_text(hides)
    path = os.pathsep.join([str(tmp_path / "path"), os.environ["PYTHONPATH"]])
    code, log = supervise(run, "time.sleep(1); sys.exit(7)", {**OFFLINE, "PYTHONPATH": path})
    assert code == 7 and told in log, log


def test_without_the_package_a_run_on_this_machine_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("launch.allocation.resolve.wandb_is_installed", lambda: False)
    arguments = ["--gpus-per-node", "0", "--wandb", "imagenet", "--executor"]
    with pytest.raises(UserError, match="--wandb needs the package wandb"):
        resolve_allocation(parser().parse_args([*arguments, "local"]), ClusterFile())
    monkeypatch.setattr("launch.allocation.resolve.shutil.which", lambda name: name)
    allocation = resolve_allocation(parser().parse_args([*arguments, "slurm"]), ClusterFile())
    assert allocation.environment[wandb_sender.VARIABLE] == allocation.again["wandb"] == "imagenet"
    assert "this Python does not have the package wandb" in capsys.readouterr().err


@pytest.mark.parametrize("project", ["", "a b", "lab/a/b", "x" * 129, "a;b"])
def test_a_project_that_wandb_does_not_take_is_refused(project):
    with pytest.raises(SystemExit):
        parser().parse_args(["--wandb", project])


# --- what is sent -----------------------------------------------------------------------------------------------------


def test_each_preset_is_found_again_in_its_recipe():
    for name, preset in PRESETS.items():
        method = replace(preset.method, ensemble="a model" if name == "wise-kd" else None)
        assert preset_of(replace(preset, method=method).resolved()) == name
    assert preset_of(Recipe(method=Method(beta=7.0)).resolved()) is None


def test_an_evaluation_sends_its_results(tmp_path):
    run = RunFolder(tmp_path / "evaluation")
    run.claim(Evaluation(models=("a",), shards="s", sets=("r",)))
    append_lines(run.log, [{"step": 64, "total_steps": 96, "set": "r", "samples_per_s": 9.0, "eta_s": 3.0}])
    assert send(run) == "", "no counts are kept yet"
    run.results.write_text(json.dumps({"sets": {}, "models": [{"name": "a", "sets": {"r": {"top1": 50.0}}}]}))
    send(run)
    [folder] = folders(run)
    _, found = offline_run(folder)
    assert found.summary["results"] == {"a": {"r": 50.0}} and found.tags == ["evaluation", "nothing"]
    assert found.steps == [64] and found.history[0]["evaluation/samples_per_s"] == 9.0


# --- a run ------------------------------------------------------------------------------------------------------------


def test_three_starts_of_a_run_are_one_history_without_gaps_or_repeats(tmp_path, monkeypatch):
    """The first is stopped, the second is killed with all its processes between two checkpoints."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("WANDB_MODE", "offline")
    materials, run = made.make_materials(tmp_path / "materials"), RunFolder(tmp_path / "run")
    flags = [*made.recipe_flags(materials, run.root), "--batch-size", 4, "--epochs", 6, "--eval-sets", "val"]
    flags += ["--checkpoint-steps", 50, "--executor", "local", "--tasks-per-node", 1]

    process = made.start(*flags, "--wandb", "imagenet", "--notify", f"cat >> {tmp_path}/news")
    made.wait_for_step(run.root, 20)
    process.send_signal(signal.SIGINT)
    assert process.wait(300) == 128 + signal.SIGINT
    first = run.saved_step()
    assert_is_log(offline_history(run), run, up_to=first)

    process = made.start("--resume", run.root, "--executor", "local")
    # A checkpoint is of an epoch's end, 24 steps, or of a multiple of 50.
    ahead = ("steps that are taken again", lambda: first < run.saved_step() < read_lines(run.log)[-1]["step"] - 2)
    made.wait_for(run.root, ahead[1], ahead[0])
    made.kill_all(process)
    assert not run.results.exists()

    made.submit("--resume", run.root, "--executor", "local")
    whole = offline_history(run)
    assert_is_log(whole, run)
    assert whole.steps == list(range(1, 145)) and len(folders(run)) >= 3
    results = json.loads(run.results.read_text())
    assert whole.summary["results"] == {"val": results["sets"]["val"]["top1"]}
    board = EventAccumulator(str(run.root / "tensorboard")).Reload().Tags()["scalars"]
    assert {name for line in whole.history for name in line if name[0] != "_"} == set(board)
    assert len(read_lines(run.attempts)) == 3
    made.assert_log_format(run.root)
    [news] = read_lines(tmp_path / "news")
    assert (news["event"], news["attempt"], news["step"], news["total_steps"]) == ("finished", 3, 144, 144)
    assert news["top1"] == {"val": results["sets"]["val"]["top1"]} and news["run"] == str(run.root)
