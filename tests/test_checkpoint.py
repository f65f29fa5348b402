"""Checkpoints: exact contents, the newest intact one, which are kept, and which is best. test_async_checkpoint.py tests
writing beside training."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from cfmask.checkpoint import resume
from cfmask.checkpoint import writer as checkpoint
from cfmask.checkpoint.image import FileImage
from cfmask.checkpoint.state import CheckpointState, Skips
from cfmask.checkpoint.writer import CheckpointWriter, Keep, best_of, to_keep
from cfmask.data.receipts import MODULUS, DataProgress
from cfmask.models.head import load_model
from cfmask.optim import Phase, adamw
from cfmask.recipe import Optim
from towers import TINY

PHASE = Phase(0, 10, tower=True, lr=1e-3, weight_decay=0.1)
LATEST_TWO = Keep(2)


def state(step: int, **top1: float) -> CheckpointState:
    return CheckpointState(
        step, "0123", DataProgress(samples=48, receipt=MODULUS - 7, bad_in_epoch=1), Skips(2, 1), top1=top1
    )


def trained(steps: int = 3):
    model = TINY.classifier()
    optimizer = adamw(model.parameters(), PHASE, Optim())
    for seed in range(steps):
        train_on(model, optimizer, seed)
    return model, optimizer


def train_on(model, optimizer, seed: int) -> None:
    torch.manual_seed(seed)
    model(torch.randn(2, 3, TINY.image, TINY.image))[1].square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def save(folder: Path, *states: CheckpointState, keep: Keep = LATEST_TWO, model=None, optimizer=None) -> None:
    """Write checkpoints of these states in one start that resumes from the latest."""
    if model is None:
        model, optimizer = trained(1)
    with CheckpointWriter(folder, keep, TINY.info(), resumed=resume.latest(folder)) as writer:
        writer.reserve(model)
        for one in states:
            writer.start(one, model, optimizer)
            assert writer.wait() is None


def steps_in(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder that contains nothing else but best.json."""
    names = sorted(path.name for path in folder.iterdir() if path.name != "best.json")
    assert all(name.startswith("step-") for name in names)
    return [int(name.removeprefix("step-")) for name in names]


# --- what is in it ----------------------------------------------------------------------------------------------------


def test_restored_weights_and_moments_are_bitwise_identical(tmp_path):
    model, optimizer = trained()
    save(tmp_path, state(5, val=12.5), model=model, optimizer=optimizer)
    other = TINY.classifier(seed=9)
    restored = adamw(other.parameters(), PHASE, Optim())
    found = resume.latest(tmp_path)
    assert found is not None and found.updates == 3, "two of five steps were skipped"
    assert vars(state(5, val=12.5)).items() <= vars(found).items()
    resume.restore_weights(found, other)
    resume.restore_optimizer(found, other, restored)
    for m, o in ((model, optimizer), (other, restored)):
        train_on(m, o, seed=7)
    for ours, theirs in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_checkpoint_has_a_model_file_and_deterministic_bytes(tmp_path):
    model, optimizer = trained()
    for folder in ("a", "b"):
        save(tmp_path / folder, state(5), model=model, optimizer=optimizer)
    loaded, info = load_model(tmp_path / "a/step-00000005/model.safetensors")
    assert info == TINY.info()
    for ours, theirs in zip(loaded.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    for file in (tmp_path / "a/step-00000005").iterdir():
        assert file.read_bytes() == (tmp_path / "b/step-00000005" / file.name).read_bytes()


TENSORS = st.dictionaries(
    st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
    st.tuples(
        st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
        st.lists(st.integers(0, 3), max_size=3),
    ),
    max_size=6,
)


@given(TENSORS, st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=3))
def test_safetensors_reads_a_file_image(tmp_path_factory, kinds, metadata):
    tensors = {name: torch.randn(shape).to(dtype) for name, (dtype, shape) in kinds.items()}
    image = FileImage(tensors, metadata)
    image.fill(tensors)
    path = tmp_path_factory.mktemp("image") / "file.safetensors"
    path.write_bytes(b"".join(image.pieces()))
    assert path.stat().st_size == image.size
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor)
    with safe_open(path, "pt") as file:
        assert (file.metadata() or {}) == metadata


# --- which one a resume takes -----------------------------------------------------------------------------------------


def tear(path: Path, damage: str = "cut") -> None:
    data = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    else:
        path.unlink()


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, file, damage):
    save(tmp_path, state(1), state(2))
    newest = tmp_path / "step-00000002"
    tear(newest / file, damage)
    said: list[str] = []
    found = resume.latest(tmp_path, report=said.append)
    assert found is not None and found.step == 1
    assert len(said) == 1 and str(newest) in said[0]


def test_the_temporary_folder_of_a_killed_writer_is_removed(tmp_path):
    save(tmp_path, state(4))
    shutil.copytree(tmp_path / "step-00000004", tmp_path / ".step-00000005.123")
    found = resume.latest(tmp_path)
    assert found is not None and found.step == 4
    CheckpointWriter(tmp_path, Keep(2), TINY.info(), resumed=found)
    assert steps_in(tmp_path) == [4]


@pytest.mark.parametrize("last", [1, 2])
def test_a_damaged_checkpoint_does_not_count_and_is_removed_later(tmp_path, last):
    save(tmp_path, state(10), state(20), keep=Keep(last))
    tear(tmp_path / "step-00000020/model.safetensors")
    if last == 1:  # no intact checkpoint is left: training restarts
        assert resume.latest(tmp_path) is None
    save(tmp_path, state(15), keep=Keep(last))
    assert steps_in(tmp_path)[-2:] == [15, 20]
    found = resume.latest(tmp_path)
    assert found is not None and found.step == 15
    save(tmp_path, state(25), keep=Keep(last))
    assert steps_in(tmp_path) == ([25] if last == 1 else [15, 25])


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(tmp_path):
    save(tmp_path, state(10), state(20))
    tear(tmp_path / "step-00000020/optimizer.safetensors")
    save(tmp_path, state(20))
    assert steps_in(tmp_path) == [10, 20]
    found = resume.latest(tmp_path)
    assert found is not None and found.step == 20


# --- which stay -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "best", "stay"),
    [
        (Keep(1), None, {90}),
        (Keep(2), None, {80, 90}),
        (Keep(99), None, {10, 20, 30, 40, 50, 60, 70, 80, 90}),
        (Keep(1, epoch_steps=30), None, {30, 60, 90}),
        (Keep(2, epoch_steps=30), None, {30, 60, 80, 90}),
        (Keep(1, best_on="holdout"), 30, {30, 90}),
        (Keep(1, best_on="holdout"), 90, {90}),
        (Keep(3, epoch_steps=45, best_on="holdout"), 10, {10, 70, 80, 90}),
    ],
)
def test_latest_epoch_end_and_best_checkpoints_are_kept(keep, best, stay):
    assert to_keep(range(10, 100, 10), keep, best) == stay


@given(
    steps=st.sets(st.integers(1, 200), min_size=1),
    last=st.integers(1, 5),
    epoch_steps=st.none() | st.integers(1, 50),
    best=st.none() | st.integers(1, 200),
)
def test_exactly_the_requested_checkpoints_are_kept(steps, last, epoch_steps, best):
    best = best if best in steps else None
    stay = to_keep(steps, Keep(last, epoch_steps), best)
    assert max(steps) in stay <= steps
    for step in steps:
        later = sum(other > step for other in steps)
        asked_for = later < last or step == best or (epoch_steps is not None and step % epoch_steps == 0)
        assert (step in stay) == asked_for
    assert to_keep(stay, Keep(last, epoch_steps), best) == stay


def test_only_kept_checkpoints_are_on_disk(tmp_path):
    keep = Keep(1, epoch_steps=3)
    for step, there in ((1, [1]), (2, [2]), (3, [3]), (4, [3, 4]), (5, [3, 5]), (6, [3, 6]), (7, [3, 6, 7])):
        save(tmp_path, state(step), keep=keep)
        assert steps_in(tmp_path) == there
    save(tmp_path, state(8), keep=Keep(2))
    assert steps_in(tmp_path) == [7, 8]


# --- the best ---------------------------------------------------------------------------------------------------------


@given(st.dictionaries(st.integers(1, 99), st.none() | st.sampled_from([10.0, 20.0, 30.0])))
def test_the_best_checkpoint_is_the_first_with_the_highest_top1(scores):
    top1 = {step: {"val": 99.0} if score is None else {"holdout": score} for step, score in scores.items()}
    scored = {step: score for step, score in scores.items() if score is not None}
    expected = min(scored, key=lambda step: (-scored[step], step), default=None)
    assert best_of(top1, "holdout") == (None if expected is None else (expected, scored[expected]))
    assert best_of(top1, None) is None


def pointed_at(folder: Path) -> dict:
    return json.loads((folder / "best.json").read_text())


def test_the_best_checkpoint_on_the_holdout_is_named_and_kept(tmp_path):
    keep = Keep(1, best_on="holdout")
    epochs = [state(3, holdout=50.0, val=1.0), state(6, holdout=70.0, val=9.0), state(9, holdout=60.0, val=99.0)]
    save(tmp_path, *epochs, state(10), keep=keep)
    assert steps_in(tmp_path) == [6, 10]
    assert pointed_at(tmp_path) == {"step": 6, "set": "holdout", "top1": 70.0}
    save(tmp_path, state(12, holdout=70.0), state(13), keep=keep)
    assert pointed_at(tmp_path)["step"] == 6, "the first one among equals"
    save(tmp_path, state(15, holdout=71.0), state(16), keep=keep)
    assert steps_in(tmp_path) == [15, 16]
    assert pointed_at(tmp_path) == {"step": 15, "set": "holdout", "top1": 71.0}


def test_a_missing_pointer_is_written_at_the_next_start(tmp_path):
    keep = Keep(1, best_on="holdout")
    save(tmp_path, state(3, holdout=50.0), state(6, holdout=70.0), keep=keep)
    (tmp_path / "best.json").unlink()
    CheckpointWriter(tmp_path, keep, TINY.info(), resumed=resume.latest(tmp_path))
    assert pointed_at(tmp_path)["step"] == 6


def test_there_is_no_pointer_without_best_on(tmp_path):
    save(tmp_path, state(3, holdout=50.0), state(4, holdout=60.0))
    assert not (tmp_path / "best.json").exists()


def test_a_damaged_best_checkpoint_is_no_longer_named(tmp_path):
    keep = Keep(1, best_on="holdout")
    save(tmp_path, state(3, holdout=50.0), state(6, holdout=70.0), keep=Keep(9))
    tear(tmp_path / "step-00000006/model.safetensors")
    for step, there in ((5, [3, 5, 6]), (7, [3, 7])):
        save(tmp_path, state(step), keep=keep)
        assert steps_in(tmp_path) == there and pointed_at(tmp_path)["step"] == 3


def test_a_complete_checkpoint_counts_if_old_ones_cannot_be_listed(tmp_path, monkeypatch):
    save(tmp_path, state(3), state(4))

    def failing(folder):
        raise OSError(errno.EIO, "Input/output error")

    with CheckpointWriter(tmp_path, LATEST_TWO, TINY.info(), resumed=resume.latest(tmp_path)) as writer:
        model, optimizer = trained(1)
        writer.reserve(model)
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "list_checkpoints", failing)
            writer.start(state(5), model, optimizer)
            assert writer.wait() is None
        assert steps_in(tmp_path) == [3, 4, 5]
        writer.start(state(6), model, optimizer)
    assert steps_in(tmp_path) == [5, 6]
