"""Every process of a run on this machine may be killed at any moment: the others end within 30 s, nothing stays behind,
and the same command resumes to the same weights."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import made
from cfmask.runs import RunFolder
from cfmask.runtime.machine import process_runs
from launch.state import processes
from made import REPO
from slurm_fixture import wait_until

WITHIN_S = 120
RUN_FILES = {
    *(
        "recipe.json",
        "initial.safetensors",
        "log.jsonl",
        "receipts.jsonl",
        "tensorboard",
        "checkpoints",
        "committed.jsonl",
        "attempts.jsonl",
    ),
    *("model.safetensors", "results.json", "ended.json", "jobs", "code", ".owner"),
}
JOB_FILES = r"\d+_submitted\.pkl|\d+_\d+_(log\.out|result\.pkl)|submissions\.jsonl|controller\.log|failures"


@pytest.fixture(scope="module")
def materials(tmp_path_factory) -> Path:
    return made.make_materials(tmp_path_factory.mktemp("materials"))


def flags(materials: Path, run: Path, *more: object) -> list[object]:
    here = ("--executor", "local", "--tasks-per-node", 2, "--epochs", 3, "--checkpoint-steps", 2, "--retries", 0)
    return [*made.recipe_flags(materials, run), *here, *more]


@pytest.fixture(scope="module")
def undisturbed(materials, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    made.submit(*flags(materials, run))
    return run


@dataclass
class Command:
    """A submit.py that follows its run, and the run's processes by what they do."""

    process: subprocess.Popen
    run: Path

    @classmethod
    def start(cls, run: Path, *command: object) -> Command:
        words = made.submit_command(*command, pace_s=made.PACE_S)
        output = open(run.parent / "output.txt", "w")  # noqa: SIM115
        # Not ignored, as it would be below nohup.
        words = ["env", "--default-signal=HUP", *words]
        return cls(subprocess.Popen(words, stdout=output, stderr=output, start_new_session=True), run)

    @property
    def output(self) -> str:
        return (self.run.parent / "output.txt").read_text()

    def pids(self) -> dict[str, int]:
        """follower, controller, supervisor 0 and 1, rank 0 and 1: those that are there."""
        found = {"follower": self.process.pid} if process_runs(self.process.pid) else {}
        if controller := processes.controller_of(RunFolder(self.run)):
            found["controller"] = controller
        for pid in processes.processes_of(RunFolder(self.run)):
            variables = read(pid, "environ").split("\0")
            rank = next((v.partition("=")[2] for v in variables if v.startswith("SUBMITIT_LOCAL_GLOBALID=")), None)
            if rank is not None:
                found[f"{'rank' if f'supervisor {rank}' in found else 'supervisor'} {rank}"] = pid
        return found

    def wait_for(self, *roles: str) -> None:
        wait_until(lambda: set(roles) <= self.pids().keys(), f"{roles}")

    def kill(self, role: str) -> float:
        """How long it took until nothing of the run was left."""
        began = time.monotonic()
        os.kill(self.pids()[role], signal.SIGKILL)
        self.wait_until_gone()
        return time.monotonic() - began

    def wait_until_gone(self) -> None:
        def gone() -> bool:
            return self.process.poll() is not None and not processes.processes_of(RunFolder(self.run))

        wait_until(gone, "nothing of the run is left", WITHIN_S + 30)


def read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace")
    except OSError:
        return ""


def assert_same_weights(run: Path, other: Path) -> None:
    ours, theirs = (load_file(each / "model.safetensors") for each in (run, other))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def assert_nothing_stays(run: Path) -> None:
    """Of a finished run: no process, and no file that only a process that was killed would leave."""
    assert processes.processes_of(RunFolder(run)) == []
    names = {path.name for path in run.iterdir()}
    assert names <= {*RUN_FILES, "rendezvous"}, names
    assert not list((run / "rendezvous").iterdir())
    assert [path.name for path in (run / ".owner").iterdir()] == ["free"]
    assert [name for name in os.listdir(run / "jobs") if not re.fullmatch(JOB_FILES, name)] == []
    hidden = [path for path in run.rglob(".*") if path.name != ".owner"]
    assert not hidden, hidden


BEFORE = ("rank 0", "rank 1")
"""Both are there, and import torch: they have not met."""


@pytest.mark.parametrize(
    ("victim", "step"),
    [("supervisor 1", None), ("controller", 4), ("follower", 4)],
    ids=lambda value: {None: "before the ranks have met", 4: "in training"}.get(value, value),
)
def test_a_killed_process_ends_the_run_and_the_same_command_resumes(materials, undisturbed, tmp_path, victim, step):
    run = tmp_path / "run"
    command = Command.start(run, *flags(materials, run, *([] if step else ["--rendezvous-timeout", 5])))
    if step:
        made.wait_for_step(run, step)
    else:
        command.wait_for(*BEFORE)
    took_s = command.kill(victim)
    assert took_s < WITHIN_S
    assert "Traceback" not in command.output
    if victim == "follower":
        assert command.process.returncode == -signal.SIGKILL
    else:
        assert command.process.returncode == 1
        assert "was killed" in command.output.split("watch ")[1], command.output
    if victim in ("controller", "follower") and step:
        assert re.fullmatch(r"stopped at step \d+ \(quit\)", RunFolder(run).ended()["why"]), "a checkpoint was saved"
    (run / f"jobs/{'0' * 32}.pkl").touch()  # as of a command that was killed while it submitted
    made.submit(*flags(materials, run, *([] if step else ["--rendezvous-timeout", 5])))
    assert_same_weights(run, undisturbed)
    assert_nothing_stays(run)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_command_that_follows_a_run_ends_it(materials, tmp_path, number):
    """In training: after a checkpoint. The command is in a session of its own, as of a terminal."""
    run = tmp_path / "run"
    command = Command.start(run, *flags(materials, run, "--epochs", 400, "--checkpoint-steps", 10_000))
    made.wait_for_step(run, 3)
    os.killpg(command.process.pid, number)
    command.wait_until_gone()
    assert command.process.returncode == 128 + number
    step = RunFolder(run).saved_step()
    assert step >= 3 and RunFolder(run).ended()["why"] == f"stopped at step {step} (quit)"
    assert "Traceback" not in command.output
    if number != signal.SIGHUP:
        assert f"step-{step:08d}. The same command resumes" in command.output


def test_a_second_ctrl_c_kills_ranks_that_do_not_end(materials, tmp_path):
    run = tmp_path / "run"
    command = Command.start(run, *flags(materials, run, "--epochs", 400))
    made.wait_for_step(run, 3)
    for role in BEFORE:
        os.kill(command.pids()[role], signal.SIGSTOP)
    command.process.send_signal(signal.SIGINT)
    time.sleep(2)
    assert command.process.poll() is None
    command.process.send_signal(signal.SIGINT)
    command.wait_until_gone()
    assert command.process.returncode == 130 and "killed" in command.output and "Traceback" not in command.output


def test_a_run_that_is_not_followed_goes_on_by_itself_and_is_refused_a_second_time(materials, tmp_path):
    """Its output may be read to the end: nothing of the run holds it open."""
    run = tmp_path / "run"
    more = ("--epochs", 400, "--no-follow")
    done = made.submit(*flags(materials, run, *more), pace_s=made.PACE_S)
    controller = processes.controller_of(RunFolder(run))
    assert f"job      {controller} on " in done.stdout
    again = made.submit(*flags(materials, run, *more), check=False)
    assert again.returncode == 2 and f"Job {controller} on this machine already exists for {run}" in again.stderr
    ended = subprocess.run([sys.executable, str(REPO / "launch/cancel.py"), str(run)], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert processes.processes_of(RunFolder(run)) == []


def test_what_a_rank_has_started_ends_with_it(tmp_path):
    """A helper that ignores its parent's end, of a rank that is killed, and of one whose supervisor is."""
    code = """
import os, subprocess, sys, time
from cfmask.runtime.process import adopt_orphans, die_with_parent, kill_children
adopt_orphans()
me = os.getpid()
if os.fork() == 0:
    die_with_parent(me)
    helper = subprocess.Popen(["sleep", "600"], start_new_session=True)
    print(helper.pid, flush=True)
    os.kill(os.getpid(), 9)
os.wait()
kill_children()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not process_runs(int(done.stdout))


@pytest.mark.slow
def test_random_kills(materials, tmp_path):
    """CFMASK_KILLS kills (20) of a random process at a random moment, three a run; CFMASK_SEED (0) repeats them."""
    whole = tmp_path / "whole"
    made.submit(*flags(materials, whole, "--epochs", 30))
    kills, seed = int(os.environ.get("CFMASK_KILLS", 20)), int(os.environ.get("CFMASK_SEED", 0))
    draw = random.Random(seed)
    done = 0
    while done < kills:
        run = tmp_path / f"run-{done}" / "run"
        run.parent.mkdir()
        for _ in range(3):
            command = Command.start(run, *flags(materials, run, "--epochs", 30, "--rendezvous-timeout", 5))
            role = draw.choice(["follower", "controller", "supervisor 0", "supervisor 1", *BEFORE])
            wait_until(lambda: role in command.pids() or command.process.poll() is not None, role)  # noqa: B023
            at_step, after_s = (
                draw.choice([None, (RunFolder(run).logged_step() or 0) + draw.randint(1, 40)]),
                draw.random(),
            )
            if at_step is not None:
                made.wait_for(run, lambda: (RunFolder(run).logged_step() or 0) >= at_step, f"step {at_step}")  # noqa: B023
            time.sleep(after_s * (8 if at_step is None else 0.3))
            assert role in command.pids(), command.output
            took_s = command.kill(role)
            done += 1
            print(f"{done}: {role} at step {RunFolder(run).logged_step()}: all ended in {took_s:.1f} s")
            assert took_s < WITHIN_S
            assert "Traceback" not in command.output, command.output
        made.submit(*flags(materials, run, "--epochs", 30))
        assert_same_weights(run, whole)
        assert_nothing_stays(run)
