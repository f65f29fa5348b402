"""A run folder is removed by the command that made it, and only while no other command uses it."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

import made
from cfmask.errors import UserError
from cfmask.evaluation_spec import Evaluation
from cfmask.recipe import Recipe
from cfmask.runs import RunFolder
from cfmask.runtime.jsonl import read_lines
from cfmask.runtime.machine import aside_of
from launch.allocation.resolve import Allocation
from launch.submission import claims, planning, training
from launch.submission import submit as submission
from launch.submission.claims import check_folder, take_folder
from launch.submission.planning import PlannedJob, claim_run_folders
from launch.submission.sbatch import write_environment
from slurm_fixture import wait_until


@pytest.fixture(scope="module")
def materials(tmp_path_factory):
    return made.make_materials(tmp_path_factory.mktemp("materials"), per_class=8)


def contents(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- claims -----------------------------------------------------------------------------------------------------------


def test_maker_removes_a_folder_without_other_claims(tmp_path):
    run = RunFolder(tmp_path / "runs/x")
    claim = take_folder(run, Recipe())
    (run.root / "jobs").mkdir()
    claim.abandon()
    assert claim.made and contents(tmp_path / "runs") == []


@pytest.mark.parametrize("present", ["empty", "run", "older run"])
def test_existing_folder_is_never_removed(tmp_path, present):
    run = RunFolder(tmp_path / "x")
    run.root.mkdir()
    if present == "run":
        run.claim(Recipe())
    elif present == "older run":
        take_folder(run, Recipe()).keep()
    claim = take_folder(run, Recipe())
    claim.abandon()
    assert not claim.made and (run.root / "recipe.json").exists()


@pytest.mark.parametrize("order", ["claimed", "accepted", "refused"])
def test_refused_maker_leaves_the_folder_to_another_command(tmp_path, order):
    run = RunFolder(tmp_path / "x")
    maker, other = take_folder(run, Recipe()), take_folder(run, Recipe())
    assert maker.made and not other.made
    if order == "refused":
        other.abandon()
        maker.abandon()
        assert contents(tmp_path) == []
        return
    if order == "accepted":
        other.keep()
        (run.root / "jobs").mkdir()
        (run.root / "jobs/submissions.jsonl").touch()
    maker.abandon()
    assert (run.root / "recipe.json").exists()
    other.keep()
    take_folder(run, Recipe()).keep()
    assert contents(run.root) == ["jobs", "recipe.json"] if order == "accepted" else ["recipe.json"]


@pytest.mark.parametrize("sign", ["log.jsonl", "checkpoints", "notes.txt", "owner"])
def test_folder_in_use_without_a_claim_is_kept(tmp_path, sign):
    """A user without a claim may be an older version, or a person."""
    run = RunFolder(tmp_path / "x")
    claim = take_folder(run, Recipe())
    if sign == "owner":
        with run.locked("local"):
            claim.abandon()
    else:
        (run.root / sign).touch()
        claim.abandon()
    assert (run.root / "recipe.json").exists()


@pytest.mark.parametrize("how", ["alone", "sweep", "accepted"])
def test_folder_with_an_unconfirmed_job_is_kept(tmp_path, how):
    run = RunFolder(tmp_path / "runs/x")
    maker, other = take_folder(run, Recipe()), take_folder(run, Recipe())
    folder = tmp_path / "runs/.sweeps/1" if how == "sweep" else run.root / "jobs"
    folder.mkdir(parents=True)
    if how == "sweep":
        (folder / "0").symlink_to(run.root)
    (folder / ("12_submission.sh" if how == "accepted" else ".submission_file_0123.sh")).touch()
    other.keep()
    maker.abandon()
    assert (run.root / "recipe.json").exists()


def test_command_waits_for_the_removal_of_a_folder_and_makes_it_again(tmp_path, monkeypatch):
    run = RunFolder(tmp_path / "x")
    maker = take_folder(run, Recipe())
    came: list[claims.Claim] = []
    thread = threading.Thread(target=lambda: came.append(take_folder(run, Recipe())))

    def in_use(checked: RunFolder) -> bool:
        thread.start()
        thread.join(0.5)
        assert not came, "the folder is about to go"
        return False

    monkeypatch.setattr(claims, "_in_use", in_use)
    maker.abandon()
    thread.join(10)
    assert came[0].made and (run.root / "recipe.json").exists() and came[0].mark.exists()


def test_removal_by_a_killed_command_does_not_block_others(tmp_path):
    run = RunFolder(tmp_path / "x")
    claim = take_folder(run, Recipe())
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    closed = claims._process().replace(str(os.getpid()), gone.stdout.strip())
    os.rename(run.root / ".claims", run.root / f".removing-{closed}")
    assert not take_folder(run, Recipe()).made
    assert claim.mark.exists()


def test_leftovers_of_killed_commands_are_removed(tmp_path):
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    run = RunFolder(tmp_path / "x")
    theirs = aside_of(run.root).name.replace(f"-{os.getpid()}-", f"-{gone.stdout.strip()}-")
    for name in (theirs, aside_of(run.root).name, aside_of(tmp_path / "x2").name):
        (tmp_path / name / ".claims").mkdir(parents=True)
    take_folder(run, Recipe())
    assert len(list(tmp_path.iterdir())) == 3 and not (tmp_path / theirs).exists()


@pytest.mark.parametrize("name", ["a%a", "a%jb", "%", "a\\b", "a\nb", "a\x07", "x" * 256, "ü" * 128])
def test_paths_that_slurm_or_a_file_system_would_change_are_refused(tmp_path, name):
    with pytest.raises(UserError, match="Give (another folder|a shorter one)"):
        take_folder(RunFolder(tmp_path / name / "x"), Recipe())
    assert contents(tmp_path) == []


@pytest.mark.parametrize("below", ["file", "file/run", "folder/run", "."])
def test_a_folder_that_could_not_be_made_is_refused_before_anything_is_written(tmp_path, below, monkeypatch):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.setattr(os, "access", lambda path, _: Path(path) != tmp_path / "folder")  # root may write everywhere
    for work, flag in ((Recipe(), "--run"), (Evaluation(models=("/m",), sets=("val",)), "--out")):
        with pytest.raises(UserError, match=f"(it is no folder|not writable|neither empty).* {flag}"):
            check_folder(RunFolder(tmp_path / below), work)
    check_folder(RunFolder(tmp_path / "new/run"), Recipe())
    assert contents(tmp_path) == ["file", "folder"]


# --- commands ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seeds", [(0,), (0, 1)], ids=["run", "sweep"])
@pytest.mark.parametrize("accepted", ["the other", "none"])
def test_refused_submission_keeps_a_run_that_another_command_submitted(
    materials, tmp_path, monkeypatch, seeds, accepted
):
    """Before Slurm refuses the first command, the same command runs elsewhere."""
    monkeypatch.setattr(submission.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(planning, "queued_job", lambda run: None)
    monkeypatch.setattr(submission, "max_array_members", lambda: None)
    monkeypatch.setattr(submission, "ask_slurm", lambda text, allocation: "")
    monkeypatch.setenv("CFMASK_CLUSTER", "")
    monkeypatch.chdir(tmp_path)
    parser = argparse.ArgumentParser()
    training.add_submit_arguments(parser)
    flags = made.recipe_flags(materials, tmp_path / "unused")[:-2]
    more = ("--executor", "slurm", "--gpus-per-node", 0, "--seeds", *seeds)
    arguments = parser.parse_args(list(map(str, [*flags, *more])))
    calls = []

    def send(executor, work):
        calls.append(len(work))
        if len(calls) == 2 and accepted == "the other":
            paths = SimpleNamespace(submission_file=tmp_path / "s", submitted_pickle=tmp_path / "p")
            return [SimpleNamespace(job_id=f"77_{number}", paths=paths) for number in range(len(work))]
        if len(calls) == 1 and accepted == "the other":
            assert training.submit(arguments) == 0
        elif len(calls) == 1:
            with pytest.raises(UserError, match="no"):
                training.submit(arguments)
        raise UserError("Slurm says no")

    monkeypatch.setattr(submission, "send", send)
    with pytest.raises(UserError, match="Slurm says no"):
        training.submit(arguments)
    assert calls == [len(seeds)] * 2
    runs = [path for path in (tmp_path / "runs").iterdir() if path.name != ".sweeps"]
    assert len(runs) == (len(seeds) if accepted == "the other" else 0)
    for run in runs:
        assert [line["job"][:3] for line in read_lines(run / "jobs/submissions.jsonl")] == ["77_"]
        assert (run / "recipe.json").exists() and list((run / "code").iterdir())


@pytest.mark.slurm
def test_logs_of_runs_with_special_characters(slurm_cluster, tmp_path):
    """Alone and as members of an array; each batch script runs a command that prints its arguments."""
    names = ("a`id`b", "a;b", "#a", "a #b", "a,b", "a'b\"c", " a b", "-lead", "ünï", "a$HOME", "a[1]*?", "x" * 255)
    allocation = Allocation("slurm", 1, 0, "", 1, 1, 10, python="printf %s\\\\n", environment={"A": "1"})
    sent = []
    for name in names:
        for members in ([tmp_path / "alone" / name], [tmp_path / "swept" / name / member for member in "01"]):
            batch = submission.SubmissionBatch.of([PlannedJob(RunFolder(member), Recipe()) for member in members])
            for member in members:
                (member / "jobs").mkdir(parents=True)
                write_environment(allocation, member / "jobs")
            batch.link_runs()
            script = tmp_path / "script.sh"
            script.write_text(batch.executor(allocation, "DIGEST").batch_script(len(members)))
            sent.append((slurm_cluster.sbatch(str(script), cwd=tmp_path), members))
    for job, members in sent:
        for number, member in enumerate(members):
            log = (
                member / "jobs" / f"{job}_{number}_0_log.out" if len(members) > 1 else member / f"jobs/{job}_0_log.out"
            )
            code = batch_code(member, len(members) > 1, number)
            wait_until(lambda log=log, code=code: log.exists() and code in log.read_text(), f"{log} has {code}")


def batch_code(member: Path, swept: bool, number: int) -> str:
    return f"/{number}/code/DIGEST/launch/ranks/start.py" if swept else f"{member}/code/DIGEST/launch/ranks/start.py"


def test_folders_of_a_refused_sweep_are_removed(tmp_path):
    first, second = RunFolder(tmp_path / "first"), RunFolder(tmp_path / "second")
    second.root.mkdir()
    (second.root / "foreign").touch()
    planned = [PlannedJob(run, Recipe()) for run in (first, second)]
    with pytest.raises(UserError, match="neither empty nor the folder"):
        claim_run_folders(planned)
    assert contents(tmp_path) == ["second"] and contents(second.root) == ["foreign"]
