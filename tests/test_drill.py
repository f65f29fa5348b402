"""The fault matrix: launch/drill.py injects every fault on a real Slurm; these tests check the resulting runs without
its help. The second part tests its measurements, and its judgement of faulty runs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cfmask.runtime.jsonl import append_lines, read_lines
from launch import drill
from launch.drills.cluster import DevCluster
from launch.drills.environment import STEPS, DrillEnvironment
from launch.drills.faults import fill_disk
from launch.drills.handle import Fault, Snapshot, seconds_to_checkpoint, steps_lost
from launch.drills.materials import make_materials
from launch.drills.runner import DrillResult, different_losses, judge
from launch.drills.scenarios import DRILLS, UNDISTURBED
from slurm_fixture import CannotBeHad, Cluster, running_cluster, wait_until
from tools import audit

REPO = Path(__file__).resolve().parents[1]

# --- the matrix -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Twelve nodes of one CPU, for six runs at the same time: most of a drill is waiting."""
    try:
        with running_cluster("--nodes", "12", "--cpus-per-node", "1") as cluster, pytest.MonkeyPatch.context() as patch:
            patch.setenv("SLURM_CONF", str(cluster.conf))
            yield cluster
    except CannotBeHad as reason:
        pytest.skip(f"no Slurm on this machine: {reason}")


@pytest.fixture(scope="module")
def done(cluster, tmp_path_factory) -> Path:
    """The folder of all drills, done by the command that a user types."""
    folder = tmp_path_factory.mktemp("drills") / "all"
    command = [sys.executable, REPO / "launch/drill.py", "--folder", folder, "--pace", 0.12, "--at-once", 6]
    command += ["--patience", 12, "--nodes", 2, "--gpus-per-node", 0, "--cpus-per-task", 1, "--time", 30]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CFMASK_CLUSTER": ""}
    ended = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    (folder / "said.txt").write_text(f"exit code {ended.returncode}\n{ended.stdout}\n{ended.stderr}")
    return folder


def ends_of_starts(run: Path) -> list[str]:
    return [line["why_last_ended"] for line in read_lines(run / "attempts.jsonl")[1:]]


def job_states(cluster: Cluster, run: Path) -> list[str]:
    """The state in which each start of the run's jobs ended, from the accounting."""
    jobs = [line["job"] for line in read_lines(run / "jobs/submissions.jsonl")]
    listed = cluster.call("sacct", "--duplicates", "-X", "-n", "-P", f"--jobs={','.join(jobs)}", "--format=Start,State")
    return [line.split("|")[1].split()[0] for line in sorted(listed.splitlines())]


@pytest.mark.slurm
@pytest.mark.parametrize("name", [each.name for each in DRILLS if each.trains])
def test_run_ends_with_the_weights_of_the_undisturbed_run(done, name):
    run, alone = done / name, done / "undisturbed"
    said = (done / "said.txt").read_text()
    assert (run / "results.json").exists(), said
    losses = [[x["loss"] for x in read_lines(r / "log.jsonl") if "loss" in x] for r in (run, alone)]
    if name == "resized":  # sums are taken in another order
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    else:
        assert losses[0] == losses[1]
        for file in ("model.safetensors", "optimizer.safetensors"):
            ours, theirs = (load_file(r / f"checkpoints/step-{STEPS:08d}" / file) for r in (run, alone))
            assert ours.keys() == theirs.keys() and ours
            for tensor in ours:
                assert torch.equal(ours[tensor], theirs[tensor]), f"{tensor} of {file} differs"
    assert audit.main([str(run)]) == 0
    assert re.search(rf"^\| {name} \|.*\| (bitwise identical|same samples, same loss) \|$", said, re.MULTILINE), said


STOPPED, CAME_BACK, KILLED = (
    r"stopped at step \d+ \(quit\)",
    r"stopped at step \d+ \(requeue\)",
    "killed without notice",
)
AT_LIMIT = CAME_BACK + ", at the time limit"
LOST = r"lost a rank without a report: rank {} was cut off"
# The ends of starts in attempts.jsonl and in the accounting. A warned job may end before Slurm preempts it. Without a
# grace time, the warning and TERM arrive at once, and either may be noticed first. So may the loss of a node, by Slurm
# or by the ranks.
ENDS: dict[str, tuple[list[str], str]] = {
    "warned": ([CAME_BACK], "REQUEUED COMPLETED"),
    "requeued": ([STOPPED], "REQUEUED COMPLETED"),
    "rank-killed": (["failed: rank 1 .*signal 9.*starts again.*"], "REQUEUED COMPLETED"),
    "rank-killed-for-good": (["failed: rank 1 .*signal 9.*"], "FAILED COMPLETED"),
    "rank-hung": (["failed: rank 1 hung: at step .*SIGSTOP.*starts again.*"], "REQUEUED COMPLETED"),
    "node-unhealthy": (["failed: rank 1: NodeUnhealthy: .*local disk.*without n\\d.*"], "REQUEUED COMPLETED"),
    "cancelled": ([STOPPED], "CANCELLED COMPLETED"),
    "resized": ([STOPPED, STOPPED], "CANCELLED CANCELLED COMPLETED"),
    "preempted": ([CAME_BACK], "(PREEMPTED|REQUEUED) COMPLETED"),
    "preempted-5-times": ([CAME_BACK] * 5, "((PREEMPTED|REQUEUED) ){5}COMPLETED"),
    "preempted-at-once": ([f"{STOPPED}|{CAME_BACK}"], "(PREEMPTED|REQUEUED) COMPLETED"),
    "preempted-unwarned": ([STOPPED], "(PREEMPTED|REQUEUED) COMPLETED"),
    "preempted-while-writing": ([KILLED], "PREEMPTED COMPLETED"),
    "node-lost": ([LOST.format(0)], "(NODE_FAIL|REQUEUED) COMPLETED"),
    "first-node-lost": ([rf"{LOST.format(1)}|{KILLED}"], "NODE_FAIL COMPLETED"),
    "controller-restarted": ([], "COMPLETED"),
    "interface-missing": (["failed: .*cfmask0.*"], "FAILED COMPLETED"),
    "unreadable-at-resume": ([STOPPED, "failed: .*Input/output error.*"], "CANCELLED FAILED COMPLETED"),
    "quota-at-warning": ([CAME_BACK], "REQUEUED COMPLETED"),
    "full-disk": (["failed: CheckpointNotWritten: .*No space left on device.*"], "FAILED COMPLETED"),
}


@pytest.mark.slurm
@pytest.mark.parametrize("name", ENDS)
def test_attempts_and_accounting_record_how_starts_ended(cluster, done, name):
    ends, states = ENDS[name]
    found = ends_of_starts(done / name)
    assert len(found) == len(ends) and all(map(re.fullmatch, ends, found)), found
    assert re.fullmatch(states, " ".join(job_states(cluster, done / name)))


@pytest.mark.slurm
@pytest.mark.parametrize(
    ("name", "ends"), [("time-limit", AT_LIMIT), ("chain", AT_LIMIT + r"; job \d+ resumes the run")]
)
def test_time_limit_costs_no_step(cluster, done, name, ends):
    found = ends_of_starts(done / name)
    assert found and all(re.fullmatch(ends, end) for end in found)
    assert "TIMEOUT" not in job_states(cluster, done / name)


@pytest.mark.slurm
def test_warned_runs_lose_no_step_and_others_resume_from_the_last_checkpoint(done):
    lost = {each.name: steps_lost(read_lines(done / each.name / "attempts.jsonl")) for each in DRILLS if each.trains}
    unwarned = ("rank-killed", "rank-killed-for-good", "rank-hung", "preempted-while-writing")
    unwarned += ("node-lost", "first-node-lost", "full-disk")
    assert {name: steps for name, steps in lost.items() if name not in unwarned and steps} == {}
    assert all(lost[name] <= 20 for name in ("rank-killed", "rank-hung", "node-lost", "first-node-lost")), (
        "--checkpoint-steps is 20"
    )
    assert 0 < lost["preempted-while-writing"] <= 40, "to the one before the torn one"
    assert not list((done / "preempted-while-writing/checkpoints").glob(".step-*")), "the torn one is gone"


@pytest.mark.slurm
def test_shards_of_a_preempted_conversion_are_those_of_one_process(done):
    made, alone = (done / "conversion-preempted" / name / "train" for name in ("out", "alone"))
    names = sorted(path.name for path in alone.iterdir() if path.is_file())
    assert len([name for name in names if name.endswith(".tar")]) == 120
    assert sorted(path.name for path in made.iterdir() if path.is_file()) == names
    assert all((made / name).read_bytes() == (alone / name).read_bytes() for name in names)
    row = re.search(
        r"^\| conversion-preempted \|[^|]*\| (\d+) \|.*\| bitwise identical \|$", (done / "drills.md").read_text(), re.M
    )
    assert row and int(row[1]) == 2, "its task has started twice"


@pytest.mark.slurm
def test_other_numbers_of_nodes_are_recorded(done):
    attempts = read_lines(done / "resized/attempts.jsonl")
    assert [(line["nodes"], line["world_size"]) for line in attempts] == [(2, 2), (1, 1), (2, 2)]


@pytest.mark.slurm
def test_no_process_of_any_job_is_left(cluster, done, tmp_path):
    """After all drills. The drills themselves check that none is left right after a job."""
    cluster_of_drills = DevCluster(cluster.state)
    assert cluster_of_drills.processes() == []
    job = cluster.sbatch("--wrap=sleep 30", "--nodelist=n3", cwd=tmp_path)
    wait_until(
        lambda: len(cluster_of_drills.processes(f"SLURM_JOB_ID={job}", "SLURMD_NODENAME=n3")) >= 2,
        "its processes are found",
    )
    cluster.call("scancel", job)


@pytest.mark.slurm
def test_command_writes_table_and_chart(done):
    said = (done / "said.txt").read_text()
    assert said.startswith("exit code 0\n"), said
    assert (done / "drills.png").stat().st_size > 20_000
    assert all(f"| {each.name} |" in (done / "drills.md").read_text() for each in DRILLS)


@pytest.mark.slurm
def test_drills_that_cannot_be_done_here_are_refused(done, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(drill, "make_materials", lambda _, **size: make_materials(done / "materials", **size))
    monkeypatch.setenv("CFMASK_CLUSTER", "")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    for flags, said in (
        (("--drills", "resized", "--gpus-per-node", "0"), "resized needs --nodes 2"),
        (("--folder", "full", "--gpus-per-node", "0"), "is not empty"),
        (("--executor", "local"), "Drills need Slurm"),
    ):
        assert drill.main(list(flags)) == 2
        assert said in capsys.readouterr().err
    assert not list(tmp_path.glob("drills"))
    assert drill.main(["--drills", "warned", "--gpus-per-node", "0", "--partition", "nope"]) == 2
    assert "invalid partition specified: nope" in capsys.readouterr().err


# --- what it measures and how it judges -------------------------------------------------------------------------------


def test_seconds_to_checkpoint_are_those_to_the_first_of_the_step_reached():
    snapshots = [
        Snapshot(0, 1, 3, 0),
        Snapshot(1, 1, 7, 4),
        Snapshot(2, 1, 8, 7),
        Snapshot(3, 1, 8, 8),
        Snapshot(4, 2, 8, 8),
    ]
    assert seconds_to_checkpoint(snapshots, Fault(1, "x", 1, 7)) == 1
    assert seconds_to_checkpoint(snapshots, Fault(2, "x", 1, 8)) == 1
    assert seconds_to_checkpoint(snapshots, Fault(2, "x", 1, 9)) is None, "never"
    late = [*snapshots[:2], Snapshot(4, 2, 4, 4), Snapshot(9, 2, 9, 8)]
    assert seconds_to_checkpoint(late, Fault(1, "x", 1, 7)) is None, "by another start"


def test_steps_lost_are_those_taken_twice():
    first = {"from_step": 0}
    second, third = {"from_step": 20, "last_reached": 33}, {"from_step": 50, "last_reached": 50}
    refused = {"from_step": None, "last_reached": 50}
    assert steps_lost([first, second, third, refused]) == 13
    assert steps_lost([first]) == steps_lost([]) == 0


@pytest.fixture
def two_runs(tmp_path) -> tuple[DrillResult, DrillResult]:
    """The results of a drill and of an undisturbed run."""
    env = DrillEnvironment(tmp_path, (), 2, None, (), 0.0, 1.0)
    for name in ("warned", "undisturbed"):
        run = tmp_path / name
        final = run / f"checkpoints/step-{STEPS:08d}"
        final.mkdir(parents=True)
        for file in ("model.safetensors", "optimizer.safetensors"):
            save_file({"weight": torch.arange(4.0), "bias": torch.ones(2)}, final / file)
        append_lines(run / "receipts.jsonl", [{"step": s, "samples": 16, "receipt": f"{s:032x}"} for s in (1, 2)])
        append_lines(run / "log.jsonl", [{"step": s, "loss": 1.0 / s} for s in (1, 2)])
    append_lines(tmp_path / "undisturbed/attempts.jsonl", [{"attempt": 1, "why_last_ended": None}])
    attempts = [
        {"attempt": 1, "why_last_ended": None},
        {"attempt": 2, "why_last_ended": "stopped at step 63 (requeue)"},
    ]
    append_lines(tmp_path / "warned/attempts.jsonl", attempts)
    warned = next(each for each in DRILLS if each.name == "warned")
    return tuple(DrillResult(each, env.handle(each)) for each in (warned, UNDISTURBED))


def test_identical_runs_pass(two_runs):
    assert judge(*two_runs) == []


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors"])
def test_changed_bit_fails(two_runs, file):
    run = two_runs[0].run.folder
    path = run.checkpoints / f"step-{STEPS:08d}" / file
    tensors = load_file(path)
    tensors["weight"].view(torch.int32)[3] ^= 1
    save_file(tensors, path)
    assert judge(*two_runs) == [f"1 tensors differ: weight of {file}"]
    del tensors["bias"]
    save_file(tensors, path)
    assert judge(*two_runs) == [f"2 tensors differ: bias of {file}, weight of {file}"]


def test_other_ends_other_samples_and_missing_receipts_fail(two_runs):
    result, alone = two_runs
    run = result.run.folder
    shutil.copy(run.attempts, run.root / "kept")
    append_lines(run.attempts, [{"attempt": 3, "why_last_ended": "killed without notice"}])
    [ends] = judge(result, alone)
    assert "gives other ends of its starts: stopped at step 63 (requeue); killed without notice" in ends
    shutil.copy(run.root / "kept", run.attempts)
    text = run.receipts.read_text()
    run.receipts.write_text(text.replace(f"{2:032x}", f"{3:032x}"))
    assert "other samples" in judge(result, alone)[0]
    run.receipts.write_text(text.splitlines()[0] + "\n")
    assert "other samples" in judge(result, alone)[0]


def test_losses_up_to_rounding(two_runs):
    ours, theirs = (each.run.folder for each in two_runs)
    assert different_losses(ours, theirs, tolerance=0) == ""
    ours.log.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 0.5004}\n')
    assert different_losses(ours, theirs, tolerance=1e-3) == ""
    assert different_losses(ours, theirs, tolerance=1e-4) == "the loss of step 2 is 0.5004, undisturbed 0.5"
    ours.log.write_text('{"step": 1, "loss": 1.0}\n')
    assert "other steps" in different_losses(ours, theirs, tolerance=1)


def test_fill_disk_leaves_the_given_space(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk]).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        fill_disk(disk / "filler", leave=1 << 16)
        assert 1 << 16 <= shutil.disk_usage(disk).free <= (1 << 16) + 8192
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_help_and_list_need_neither_slurm_nor_torch():
    command = [sys.executable, "-X", "importtime", REPO / "launch/drill.py", "--list"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True)
    assert [line.split()[0] for line in listed.stdout.splitlines()] == [each.name for each in DRILLS]
    assert not re.search(r"\| +(torch|matplotlib)$", listed.stderr, re.MULTILINE)
