"""Checkpoints are written while training continues: their contents, write errors, and kills."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import cfmask.runtime.jsonl
import cfmask.training.train
import made
from cfmask.checkpoint import image as image_module
from cfmask.checkpoint import resume
from cfmask.checkpoint.image import FileImage
from cfmask.checkpoint.state import CheckpointState, read_state
from cfmask.checkpoint.writer import CheckpointNotWritten, CheckpointWriter, Keep
from cfmask.errors import UserError
from cfmask.optim import adamw
from cfmask.presets import PRESETS
from cfmask.recipe import Data, Model, Optim, Recipe, Run
from cfmask.runs import RunFolder
from cfmask.runtime.distributed import DistributedContext
from cfmask.runtime.jsonl import read_lines
from cfmask.session import REQUEUE
from made import train
from test_checkpoint import LATEST_TWO, PHASE, state, steps_in, train_on, trained
from towers import TINY

MODEL, OPTIMIZER = "model.safetensors", "optimizer.safetensors"


def slow_down(monkeypatch, before_each_piece: Callable[[FileImage, int], None], piece: int = 2048) -> None:
    """Call a function before each piece of a file is written; it may wait or raise."""
    real = FileImage.pieces

    def pieces(image: FileImage) -> Iterator[bytes | memoryview]:
        for number, one in enumerate(real(image)):
            before_each_piece(image, number)
            yield one

    monkeypatch.setattr(image_module, "_PIECE", piece)
    monkeypatch.setattr(FileImage, "pieces", pieces)


@pytest.fixture
def gate(monkeypatch) -> Iterator[threading.Event]:
    """An event without which nothing is written."""
    opened = threading.Event()

    def wait(image: FileImage, number: int) -> None:
        assert opened.wait(240)

    slow_down(monkeypatch, wait)
    yield opened
    opened.set()


@pytest.fixture
def writer(tmp_path) -> Iterator[CheckpointWriter]:
    with CheckpointWriter(tmp_path / "checkpoints", LATEST_TWO, TINY.info()) as one:
        yield one


# --- beside training --------------------------------------------------------------------------------------------------


def test_a_checkpoint_has_the_values_of_its_step_while_training_continues(tmp_path, writer, gate):
    model, optimizer = trained()
    writer.reserve(model)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    moments = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in model.parameters()]
    writer.start(state(3), model, optimizer)
    for seed in range(20):
        train_on(model, optimizer, seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    assert not list((tmp_path / "checkpoints").glob("step-*"))
    gate.set()
    assert writer.wait() is None
    saved = tmp_path / "checkpoints/step-00000003"
    assert all(torch.equal(value, weights[name]) for name, value in load_file(saved / MODEL).items())
    stored = load_file(saved / OPTIMIZER)
    for (name, _), of in zip(model.named_parameters(), moments, strict=True):
        assert torch.equal(stored[f"exp_avg.{name}"], of["exp_avg"])
        assert torch.equal(stored[f"exp_avg_sq.{name}"], of["exp_avg_sq"])
    assert read_state(saved).updates == 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_copies_are_queued_between_the_steps_before_and_after(tmp_path, writer):
    model = TINY.classifier().cuda()
    optimizer = adamw(model.parameters(), PHASE, Optim())

    def step(seed: int) -> None:
        pixels = torch.randn(2, 3, TINY.image, TINY.image, generator=torch.Generator().manual_seed(seed)).pin_memory()
        model(pixels.to("cuda", non_blocking=True))[1].square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    for seed in range(3):
        step(seed)
    writer.reserve(model)
    busy = torch.randn(8192, 8192, device="cuda")
    busy @ busy
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(40):  # a second of work, so that the host is ahead of the device
            busy @ busy
        step(3)
        expected = {name: value.clone() for name, value in model.state_dict().items()}
        moments = {name: optimizer.state[p]["exp_avg"].clone() for name, p in model.named_parameters()}
        queued = torch.cuda.Event()
        queued.record()
        writer.start(state(4), model, optimizer)
        assert not queued.query(), "it waited for the device"
        for seed in range(4, 8):
            step(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(torch.nan)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert writer.wait() is None
    saved = tmp_path / "checkpoints/step-00000004"
    assert all(torch.equal(value, expected[name].cpu()) for name, value in load_file(saved / MODEL).items())
    stored = load_file(saved / OPTIMIZER)
    assert all(torch.equal(stored[f"exp_avg.{name}"], value.cpu()) for name, value in moments.items())
    assert read_state(saved).updates == 4


def test_start_waits_for_the_previous_checkpoint(tmp_path, writer, gate):
    model, optimizer = trained()
    writer.reserve(model)
    writer.start(state(3), model, optimizer)
    first = {name: value.clone() for name, value in model.state_dict().items()}
    train_on(model, optimizer, seed=9)
    began = threading.Event()

    def start_another() -> None:
        began.set()
        writer.start(state(4), model, optimizer)

    another = threading.Thread(target=start_another)
    another.start()
    assert began.wait(300)
    another.join(0.3)
    assert another.is_alive(), "it did not wait for the previous checkpoint"
    assert len(list((tmp_path / "checkpoints").glob(".step-*"))) == 1
    gate.set()
    another.join(120)
    assert writer.wait() is None
    assert steps_in(tmp_path / "checkpoints") == [3, 4]
    for step, weights in ((3, first), (4, model.state_dict())):
        saved = load_file(tmp_path / f"checkpoints/step-{step:08d}" / MODEL)
        assert all(torch.equal(saved[name], value) for name, value in weights.items())


def test_a_new_phase_may_begin_while_a_checkpoint_is_written(tmp_path, writer, gate):
    model, optimizer = trained()
    model.visual.requires_grad_(False)
    writer.reserve(model)
    writer.start(state(3), model, optimizer)
    model.visual.requires_grad_(True)
    writer.reserve(model)
    gate.set()
    writer.start(state(4), model, optimizer)
    assert writer.wait() is None
    moments = [set(load_file(tmp_path / f"checkpoints/step-{step:08d}" / OPTIMIZER)) for step in (3, 4)]
    assert {name.split(".")[1] for name in moments[0]} == {"head"}
    assert {name.split(".")[1] for name in moments[1]} == {"head", "visual"}


def test_a_checkpoint_is_overdue_after_minutes_but_not_during_writing(tmp_path, gate):
    model, optimizer = trained(1)
    with CheckpointWriter(tmp_path, LATEST_TWO, TINY.info(), minutes=0.2 / 60) as writer:
        writer.reserve(model)
        assert not writer.overdue
        time.sleep(0.25)
        assert writer.overdue
        writer.start(state(1), model, optimizer)
        time.sleep(0.25)
        assert not writer.overdue, "a checkpoint is being written"
        gate.set()
        writer.wait()
        assert writer.overdue, "counted from its beginning"
    with CheckpointWriter(tmp_path, LATEST_TWO, TINY.info(), minutes=0) as writer:
        assert not writer.overdue


# --- errors -----------------------------------------------------------------------------------------------------------


def test_a_write_error_is_logged_and_cleared_by_the_next_checkpoint(tmp_path, writer, monkeypatch, capsys):
    model, optimizer = trained(1)
    writer.reserve(model)
    writer.start(state(1), model, optimizer)
    assert writer.wait() is None

    def full(image: FileImage, number: int) -> None:
        if number == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        slow_down(patch, full)
        writer.start(state(2), model, optimizer)
        deadline = time.monotonic() + 300
        said = ""
        while "warning" not in said and time.monotonic() < deadline:
            time.sleep(0.01)
            said += capsys.readouterr().err
        assert "The checkpoint of step 2 could not be written" in said and "No space left on device" in said
        error = writer.wait()
        assert isinstance(error, CheckpointNotWritten) and isinstance(error.__cause__, OSError)
        assert "Earlier checkpoints are intact" in str(error) and "\n" not in str(error)
        assert steps_in(tmp_path / "checkpoints") == [1]
        writer.start(state(3), model, optimizer)
        assert isinstance(writer.wait(), CheckpointNotWritten)
    writer.start(state(4), model, optimizer)
    assert writer.wait() is None
    assert steps_in(tmp_path / "checkpoints") == [1, 4]


def test_an_unexpected_exception_is_raised_by_wait(tmp_path, monkeypatch):
    def defect(image: FileImage, number: int) -> None:
        raise ZeroDivisionError

    slow_down(monkeypatch, defect)
    model, optimizer = trained(1)
    writer = CheckpointWriter(tmp_path, LATEST_TWO, TINY.info())
    writer.reserve(model)
    writer.start(state(1), model, optimizer)
    with pytest.raises(ZeroDivisionError):
        writer.start(state(2), model, optimizer)


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system with room for one and a half checkpoints."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("this machine allows no mount")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("known", [True, False], ids=["seen beforehand", "met midway"])
def test_a_full_disk_leaves_earlier_checkpoints_intact(small_disk, monkeypatch, known):
    model, optimizer = trained(1)
    free: list[int] = []
    with CheckpointWriter(small_disk, LATEST_TWO, TINY.info()) as writer:
        writer.reserve(model)
        writer.start(state(1), model, optimizer)
        assert writer.wait() is None
        if not known:  # as with a quota, which cannot be queried
            nothing = shutil.disk_usage(small_disk)._replace(free=0)
            monkeypatch.setattr(shutil, "disk_usage", lambda path: nothing)
        slow_down(monkeypatch, lambda image, number: free.append(os.statvfs(small_disk).f_bfree))
        writer.start(state(2), model, optimizer)
        error = writer.wait()
    assert error is not None and "No space left on device" in str(error)
    assert bool(free) != known, "the disk was filled in vain, but logs need room"
    assert steps_in(small_disk) == [1]
    found = resume.latest(small_disk)
    assert found is not None and found.step == 1


def test_writing_recovers_from_a_read_only_disk(small_disk):
    model, optimizer = trained(1)
    with CheckpointWriter(small_disk, Keep(1), TINY.info()) as writer:
        writer.reserve(model)
        for step, options in ((1, "rw"), (2, "ro"), (3, "rw,size=400k")):
            subprocess.run(["mount", "-o", f"remount,{options}", small_disk], check=True)
            writer.start(state(step), model, optimizer)
            error = writer.wait()
            if options == "ro":
                assert error is not None and "Read-only file system" in str(error)
                assert steps_in(small_disk) == [1]
            else:
                assert error is None and steps_in(small_disk) == [step]


# --- kills ------------------------------------------------------------------------------------------------------------


def die_before_event(number: int) -> Callable[[], None]:
    """Send SIGKILL to this process before its ``number``-th file operation: open, write, sync, rename, make, remove."""
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        if done == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, arguments: tuple) -> None:
        if event in ("open", "os.rename", "os.mkdir", "os.remove_checkpoint", "os.rmdir"):
            tick()

    def synced(descriptor: int, real=os.fsync) -> None:
        tick()
        real(descriptor)
        tick()

    os.fsync = synced
    sys.addaudithook(audit)
    return tick


def test_a_kill_before_any_file_operation_leaves_only_intact_checkpoints(tmp_path, monkeypatch):
    """A child writes its third checkpoint, keeps two, and is killed before each operation in turn."""
    keep = Keep(2, best_on="holdout")
    model, optimizer = trained(1)
    with CheckpointWriter(tmp_path / "before", keep, TINY.info()) as writer:
        writer.reserve(model)
        for one in (state(1), state(2, holdout=50.0)):
            writer.start(one, model, optimizer)
        writer.wait()
    train_on(model, optimizer, seed=5)
    undisturbed = shutil.copytree(tmp_path / "before", tmp_path / "undisturbed")

    def write_third(folder: Path) -> None:
        with CheckpointWriter(folder, keep, TINY.info(), resumed=resume.latest(folder)) as writer:
            writer.reserve(model)
            writer.start(state(3, holdout=60.0), model, optimizer)
            assert writer.wait() is None

    def files(folder: Path) -> dict[Path, bytes]:
        return {path.relative_to(folder): path.read_bytes() for path in folder.glob("step-*/*")}

    write_third(undisturbed)
    expected = files(undisturbed)

    ended: list[int] = []
    for number in range(1, 1000):
        folder = shutil.copytree(tmp_path / "before", tmp_path / f"killed-{number}")
        child = os.fork()
        if child == 0:
            try:
                tick = die_before_event(number)
                slow_down(monkeypatch, lambda image, piece, tick=tick: tick(), piece=8192)
                write_third(folder)
                os._exit(0)
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        said: list[str] = []
        found = resume.latest(folder, report=said.append)
        assert found is not None and not said, f"killed at {number}, a damaged checkpoint was accepted"
        ended.append(found.step)
        assert all(path.read_bytes() == expected[path.relative_to(folder)] for path in found.path.iterdir())
        best = json.loads((folder / "best.json").read_text())
        assert (folder / f"step-{best['step']:08d}").is_dir(), "best.json names a missing checkpoint"
        write_third(folder)
        assert files(folder) == expected
        assert {path.name for path in folder.iterdir()} == {path.name for path in undisturbed.iterdir()}
        assert json.loads((folder / "best.json").read_text())["step"] == 3
    assert ended == sorted(ended) and set(ended) == {2, 3} and len(ended) > 30


# --- in a run ---------------------------------------------------------------------------------------------------------

STEPS = 12  # 2 epochs of 6


@pytest.fixture(scope="module")
def materials(tmp_path_factory) -> Path:
    return made.make_materials(tmp_path_factory.mktemp("materials"))


def recipe_of(materials: Path, eval_sets: tuple[str, ...] = (), epochs: int = 2, **run) -> Recipe:
    base = PRESETS["ft"]
    return dataclasses.replace(
        base,
        model=Model(name=str(materials / "tiny.json"), pretrained=str(materials / "tiny.safetensors")),
        data=Data(shards=str(materials / "shards"), loader_workers=0, eval_sets=eval_sets),
        optim=dataclasses.replace(base.optim, epochs=epochs, batch_size=16, lanes=4, lr=1e-3, warmup_steps=2),
        run=Run(precision="fp32", log_steps=1, **{"checkpoint_steps": 4, "keep_checkpoints": 99, **run}),
    ).resolved()


def logged_steps(run: RunFolder) -> list[int]:
    return [line["step"] for line in read_lines(run.log) if "loss" in line]


def test_checkpoint_minutes_do_not_change_training(materials, tmp_path):
    steps = train(recipe_of(materials, checkpoint_steps=1), tmp_path / "steps")
    clock = train(recipe_of(materials, checkpoint_steps=999, checkpoint_minutes=1e-9), tmp_path / "clock")
    saved = steps_in(clock.checkpoints)
    assert {6, 12} < set(saved), "only epoch ends"
    for step in saved:
        for file in (MODEL, OPTIMIZER, "state.json"):
            path = Path(f"step-{step:08d}") / file
            assert (clock.checkpoints / path).read_bytes() == (steps.checkpoints / path).read_bytes(), path


def test_epoch_ends_have_checkpoints_without_steps_and_minutes(materials, tmp_path):
    run = train(
        recipe_of(materials, checkpoint_steps=999, checkpoint_minutes=0.0, keep_checkpoints=1), tmp_path / "run"
    )
    assert steps_in(run.checkpoints) == [6, 12]


def test_epoch_ends_are_removed_with_no_keep_epochs(materials, tmp_path):
    run = train(recipe_of(materials, keep_checkpoints=1, keep_epochs=False), tmp_path / "run")
    assert steps_in(run.checkpoints) == [12]


def test_best_on_is_pointed_at_and_survives_a_resume(materials, tmp_path):
    settings = {"eval_sets": ("val",), "epochs": 3, "best_on": "val", "keep_checkpoints": 1, "keep_epochs": False}
    recipe = recipe_of(materials, **settings)
    train(recipe, tmp_path / "run", stop_at=8)
    run = train(recipe, tmp_path / "run")
    scores = {line["step"]: line["eval"]["val"] for line in read_lines(run.log) if "eval" in line}
    assert set(scores) == {6, 12, 18}
    best = min(scores, key=lambda step: (-scores[step], step))
    assert json.loads((run.checkpoints / "best.json").read_text()) == {
        "step": best,
        "set": "val",
        "top1": scores[best],
    }
    assert steps_in(run.checkpoints) == sorted({best, 18})
    for path in run.checkpoints.glob("step-*"):
        saved = read_state(path)
        assert saved.top1 == {"val": scores[saved.step]}


def test_best_on_defaults_to_the_holdout():
    def resolved(sets: tuple[str, ...], best_on: str | None = None) -> str | None:
        recipe = Recipe(data=Data(eval_sets=sets), run=Run(best_on=best_on)).resolved()
        assert recipe.resolved() == recipe
        return recipe.run.best_on

    assert resolved(()) is None and resolved(("val",)) is None
    assert resolved(("val", "holdout")) == "holdout"
    assert resolved(("val", "holdout"), "val") == "val"
    with pytest.raises(UserError, match="--best-on holdout would do nothing"):
        resolved(("val",), "holdout")


@pytest.mark.parametrize("minutes", [-1.0, float("inf"), float("nan")])
def test_invalid_checkpoint_minutes_are_refused(minutes):
    with pytest.raises(UserError, match="--checkpoint-minutes"):
        Recipe(run=Run(checkpoint_minutes=minutes)).resolved()


def fail_at(monkeypatch, steps: set[int]) -> None:
    """Writing the checkpoints of these steps finds a full disk."""
    real = CheckpointWriter._commit

    def commit(self: CheckpointWriter, state: CheckpointState, *arguments) -> None:
        if state.step in steps:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(self, state, *arguments)

    monkeypatch.setattr(CheckpointWriter, "_commit", commit)


def test_training_continues_if_a_checkpoint_cannot_be_written(materials, tmp_path, monkeypatch, capsys):
    fail_at(monkeypatch, {4, 8})
    run = train(recipe_of(materials), tmp_path / "run")
    assert steps_in(run.checkpoints) == [6, 12]
    assert capsys.readouterr().err.count("warning: The checkpoint of step") == 2
    assert run.results.exists()


def test_a_missing_last_checkpoint_is_an_error_that_a_repeat_resolves(materials, tmp_path, monkeypatch):
    recipe = recipe_of(materials)
    with monkeypatch.context() as patch:
        fail_at(patch, {8, 12})
        with pytest.raises(CheckpointNotWritten, match="step 12 .*No space left on device"):
            train(recipe, tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    assert logged_steps(run) == list(range(1, 13)) and not run.results.exists()
    assert steps_in(run.checkpoints) == [4, 6]
    train(recipe, tmp_path / "run")
    alone = train(recipe, tmp_path / "alone")
    assert read_lines(run.attempts)[1]["from_step"] == 6
    for file in (MODEL, OPTIMIZER):
        ours, theirs = (r.checkpoints / "step-00000012" / file for r in (run, alone))
        assert ours.read_bytes() == theirs.read_bytes()


def stop_at_4(recipe: Recipe, folder: Path, failing: int, monkeypatch, seconds_left: float) -> RunFolder:
    """A run with a stop request at step 4, whose checkpoint fails in the first ``failing`` tries."""
    real, tries = CheckpointWriter._commit, iter(range(99))

    def commit(self, state: CheckpointState, *arguments) -> None:
        if state.step == 4 and next(tries) < failing:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        real(self, state, *arguments)

    monkeypatch.setattr(CheckpointWriter, "_commit", commit)
    run, steps = RunFolder(folder), iter(range(1, 99))
    run.claim(recipe)

    def stop_request() -> str | None:
        return REQUEUE if next(steps) >= 3 else None

    outcome = cfmask.training.train.train(
        recipe, run, DistributedContext(), stop_request, seconds_left=lambda: seconds_left
    )
    assert outcome == REQUEUE
    return run


def test_a_checkpoint_that_fails_at_a_stop_is_retried(materials, tmp_path, monkeypatch):
    recipe = recipe_of(materials, checkpoint_steps=2)
    with monkeypatch.context() as patch:
        run = stop_at_4(recipe, tmp_path / "run", 1, patch, seconds_left=60)
    assert steps_in(run.checkpoints) == [2, 4]
    assert run.ended()["why"] == "stopped at step 4 (requeue)"
    train(recipe, run.root)
    alone = train(recipe, tmp_path / "alone")
    assert read_lines(run.attempts)[1]["from_step"] == 4
    for file in (MODEL, OPTIMIZER):
        ours, theirs = (r.checkpoints / "step-00000012" / file for r in (run, alone))
        assert ours.read_bytes() == theirs.read_bytes()


def test_a_stop_without_a_checkpoint_is_reported(materials, tmp_path, monkeypatch, capsys):
    recipe = recipe_of(materials, checkpoint_steps=2)
    run = stop_at_4(recipe, tmp_path / "run", 99, monkeypatch, seconds_left=12)
    assert steps_in(run.checkpoints) == [2]
    why = run.ended()["why"]
    assert why.startswith("stopped at step 4 (requeue), without a checkpoint: ") and "Disk quota exceeded" in why
    assert capsys.readouterr().out.count("trying again") == 1, "retried after 1 s, and not again after 3 s"


@pytest.mark.parametrize("stop_at", [3, None], ids=["requeue", "finish"])
def test_no_rank_ends_before_the_checkpoint_is_complete(materials, tmp_path, monkeypatch, stop_at):
    slow_down(monkeypatch, lambda image, number: time.sleep(0.01))
    whole: list[int] = []
    real = RunFolder.end_attempt

    def end_attempt(self: RunFolder, why: str) -> None:
        found = resume.latest(self.checkpoints)
        assert found is not None
        whole.append(found.step)
        real(self, why)

    monkeypatch.setattr(RunFolder, "end_attempt", end_attempt)
    run = train(recipe_of(materials), tmp_path / "run", stop_at=stop_at)
    assert whole == [logged_steps(run)[-1]]


def test_a_failing_run_waits_for_its_checkpoint(materials, tmp_path, monkeypatch):
    slow_down(monkeypatch, lambda image, number: time.sleep(0.02))
    real = cfmask.training.train.take_step
    calls = iter(range(1, 99))

    def take_step(*arguments):
        if next(calls) == 6:
            raise MemoryError("made up")
        return real(*arguments)

    monkeypatch.setattr(cfmask.training.train, "take_step", take_step)
    with pytest.raises(MemoryError):
        train(recipe_of(materials), tmp_path / "run")
    assert steps_in(tmp_path / "run/checkpoints") == [4]


def test_pending_log_lines_are_written_later(materials, tmp_path, monkeypatch, capsys):
    real = cfmask.runtime.jsonl.append_lines
    calls = iter(range(1, 999))

    def append_lines(path: Path, lines: list[dict]) -> None:
        if 5 <= next(calls) <= 11:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        real(path, lines)

    monkeypatch.setattr(cfmask.runtime.jsonl, "append_lines", append_lines)
    run = train(recipe_of(materials), tmp_path / "run")
    assert logged_steps(run) == [line["step"] for line in read_lines(run.receipts)] == list(range(1, 13))
    assert "Disk quota exceeded" in capsys.readouterr().err


def test_training_continues_without_curves(materials, tmp_path, monkeypatch, capsys):
    def add_scalar(self, name, value, step):
        if step > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", add_scalar)
    run = train(recipe_of(materials), tmp_path / "run")
    assert logged_steps(run) == list(range(1, 13))
    assert capsys.readouterr().err.count("and end here") == 1


# --- a killed run -----------------------------------------------------------------------------------------------------

RANK = """
import sys, time
from pathlib import Path

run, rank, attempt, slow = sys.argv[1:]
from cfmask.checkpoint import image as image_module
from cfmask.checkpoint.image import FileImage
from cfmask.runs import RunFolder
from cfmask.runtime.distributed import DistributedContext
from cfmask.runtime.process import exit_without_finalization
from cfmask.training.train import train

real = FileImage.pieces

def pieces(image):
    for piece in real(image):
        time.sleep(float(slow))
        yield piece

image_module._PIECE = 2048
FileImage.pieces = pieces
run = RunFolder(Path(run))
train(run.recipe(), run, DistributedContext(rank=int(rank), world_size=2, local_rank=int(rank), attempt=attempt))
exit_without_finalization(0)  # as ranks of a job do
"""


def start_ranks(run: RunFolder, attempt: str, slow: float = 0.0) -> list[subprocess.Popen]:
    return [
        subprocess.Popen([sys.executable, "-c", RANK, str(run.root), str(rank), attempt, str(slow)])
        for rank in range(2)
    ]


def test_a_kill_during_a_checkpoint_and_a_restart_end_bitwise_identical(materials, tmp_path):
    alone, killed = RunFolder(tmp_path / "alone"), RunFolder(tmp_path / "killed")
    recipe = recipe_of(materials, keep_checkpoints=2)
    for run in (alone, killed):
        run.claim(recipe)
    for process in start_ranks(alone, "1"):
        assert process.wait(300) == 0

    def underway() -> bool:
        """Whether the checkpoint of step 8 is half written and training has continued."""
        begun = list(killed.checkpoints.glob(f".step-00000008.*/{OPTIMIZER}"))
        return bool(begun) and max(logged_steps(killed)) > 8

    ranks = start_ranks(killed, "1", slow=0.05)
    deadline = time.monotonic() + 300
    while not underway() and time.monotonic() < deadline:
        time.sleep(0.01)
    for process in ranks:
        process.kill()
        process.wait()
    assert sorted(path.name.partition(".")[0] or "torn" for path in killed.checkpoints.iterdir()) == [
        "step-00000004",
        "step-00000006",
        "torn",
    ]
    assert max(logged_steps(killed)) > 8

    for process in start_ranks(killed, "2"):
        assert process.wait(300) == 0
    first, second = read_lines(killed.attempts)
    assert (second["from_step"], second["why_last_ended"]) == (6, "killed without notice")
    assert steps_in(killed.checkpoints) == steps_in(alone.checkpoints) == [6, 8, 12]
    for step in (6, 8, 12):
        for file in (MODEL, OPTIMIZER, "state.json"):
            ours, theirs = (r.checkpoints / f"step-{step:08d}" / file for r in (killed, alone))
            assert ours.read_bytes() == theirs.read_bytes(), f"{file} of step {step} differs"
    losses = [[(x["step"], x["loss"]) for x in read_lines(r.log)] for r in (killed, alone)]
    assert losses[0] == losses[1]
    assert read_lines(killed.receipts) == read_lines(alone.receipts)
