"""state.json: every changed bit is detected, older files are read, and unreadable files do not count as lost."""

from __future__ import annotations

import builtins
import errno
import hashlib
import itertools
import json
import os
from pathlib import Path

import pytest

from cfmask.checkpoint import resume
from cfmask.checkpoint.state import (
    MODEL,
    OPTIMIZER,
    STATE,
    CheckpointDamaged,
    CheckpointState,
    Skips,
    decode,
    digest_of,
    encode,
    read_state,
)
from cfmask.data.receipts import MODULUS, DataProgress
from cfmask.errors import UserError
from cfmask.runs import RunFolder
from cfmask.runtime.jsonl import append_lines
from cfmask.runtime.patience import StorageUnavailable, patiently
from cfmask.session import check_inputs, check_progress

FILES = {MODEL: b"weights" * 100, OPTIMIZER: b"moments" * 100}
SHA256 = {name: hashlib.sha256(data).hexdigest() for name, data in FILES.items()}
FOLDER = Path("step-00000012")


def state(step: int = 12) -> CheckpointState:
    return CheckpointState(
        step=step,
        dataset="0123456789abcdef",
        consumed=DataProgress(192, MODULUS - 7, 1),
        skips=Skips(2, 1),
        top1={"val": 12.5, "sketch": 3.0},
        inputs={"optim.lr": 3e-5, "run.seed": 1, "method.fill": None, "initial.safetensors": "ab" * 32},
    )


def put(folder: Path, step: int) -> Path:
    path = folder / f"step-{step:08d}"
    path.mkdir(parents=True)
    for name, data in FILES.items():
        (path / name).write_bytes(data)
    (path / STATE).write_bytes(encode(state(step), step - 2, SHA256))
    return path


def of_version_1(step: int = 12, **changed) -> bytes:
    contents = json.loads(encode(state(step), step - 2, SHA256))
    del contents["version"], contents["digest"]
    return json.dumps({**contents, **changed}, indent=2).encode()


# --- what is written is read, and nothing else ------------------------------------------------------------------------


def test_decode_is_the_inverse_of_encode():
    found = decode(encode(state(), 10, SHA256), FOLDER)
    assert vars(state()).items() <= vars(found).items()
    assert (found.updates, found.sha256, found.path) == (10, SHA256, FOLDER)


def test_every_flipped_bit_in_the_state_is_detected():
    data = encode(state(), 10, SHA256)
    right = decode(data, FOLDER)
    noticed = 0
    for position, bit in itertools.product(range(len(data)), range(8)):
        changed = bytearray(data)
        changed[position] ^= 1 << bit
        try:
            assert decode(bytes(changed), FOLDER) == right, f"byte {position}, bit {bit}"
        except CheckpointDamaged:
            noticed += 1
    assert noticed > 7 * len(data)


def test_a_state_without_digest_is_read():
    assert decode(of_version_1(), FOLDER) == decode(encode(state(), 10, SHA256), FOLDER)
    assert decode(of_version_1(top1={}), FOLDER).top1 == {}


def test_a_state_without_inputs_is_read():
    contents = json.loads(encode(state(), 10, SHA256))
    del contents["inputs"], contents["digest"]
    data = json.dumps({**contents, "digest": digest_of(contents)}).encode()
    assert decode(data, FOLDER).inputs == {}


@pytest.mark.parametrize(
    "changed",
    [
        {"step": 13},
        {"step": 12.0},
        {"step": True},
        {"updates": -1},
        {"updates": 11},
        {"updates": "10"},
        {"skips": {"total": 2, "in_a_row": None}},
        {"skips": {"total": 2, "in_a_rov": 1}},
        {"consumed": {"samples": 192, "receipt": "0x" + "0" * 30, "bad_in_epoch": 1}},
        {"consumed": {"samples": 192, "receipt": "0" * 32, "bad_in_epoci": 1}},
        {"top1": {"val": float("nan")}},
        {"top1": {"val": 400.0}},
        {"top1": [1]},
        {"inputs": {"run.seed": [1]}},
        {"sha256": {}},
        {"sha256": {MODEL: SHA256[MODEL], "optimizer.safetensor3": SHA256[OPTIMIZER]}},
        {"sha256": {MODEL: SHA256[MODEL], OPTIMIZER: SHA256[OPTIMIZER][:-1]}},
        {"dataset": 5},
        {"digesu": "0" * 64},
        {"version": 3},
    ],
)
def test_values_of_a_wrong_type_are_damage(changed):
    with pytest.raises(CheckpointDamaged, match="step-00000012 is damaged: state.json"):
        decode(of_version_1(**changed), FOLDER)


def test_a_state_of_another_step_is_damage():
    with pytest.raises(CheckpointDamaged, match="it is of step 12"):
        decode(encode(state(), 10, SHA256), Path("step-00000013"))


# --- what cannot be read is not lost ----------------------------------------------------------------------------------


class FailingCalls:
    """Counts the file system calls for ``folder``; from call number ``first`` on, ``times`` of them fail."""

    def __init__(self, monkeypatch, folder: Path, first: int, times: float, number: int) -> None:
        self.calls = 0
        self._descriptors: set[int] = set()

        def fails(real, of=lambda path: str(folder) in str(path)):
            def call(what, *rest, **more):
                if of(what):
                    self.calls += 1
                    if first <= self.calls < first + times:
                        raise OSError(number, os.strerror(number), str(what))
                done = real(what, *rest, **more)
                if real is real_open and of(what):
                    self._descriptors.add(done)
                return done

            return call

        real_open = os.open
        for name in ("open", "listdir", "stat", "scandir", "lstat"):
            monkeypatch.setattr(os, name, fails(getattr(os, name)))
        for name in ("readv", "fstat"):
            monkeypatch.setattr(os, name, fails(getattr(os, name), self._descriptors.__contains__))
        monkeypatch.setattr(builtins, "open", fails(builtins.open))


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES, errno.ENOTCONN, errno.ETIMEDOUT])
def test_no_checkpoint_is_passed_over_for_an_io_error(tmp_path, monkeypatch, number):
    put(tmp_path, 10)
    newest = put(tmp_path, 12)
    with monkeypatch.context() as patch:
        calls = FailingCalls(patch, tmp_path, first=10**6, times=0, number=number)
        assert resume.latest(tmp_path).path == newest
    assert calls.calls > 8
    for first in range(1, calls.calls + 1):
        with monkeypatch.context() as patch:
            patch.setenv("CFMASK_READ_PATIENCE", "0")
            FailingCalls(patch, tmp_path, first, times=float("inf"), number=number)
            with pytest.raises(StorageUnavailable, match="cannot be read"):
                resume.latest(tmp_path, report=lambda text: pytest.fail(text))
        with monkeypatch.context() as patch:
            patch.setattr("time.sleep", lambda seconds: None)
            FailingCalls(patch, tmp_path, first, times=2, number=number)
            assert resume.latest(tmp_path, report=lambda text: pytest.fail(text)).path == newest


def test_a_folder_that_disappears_is_not_damage(tmp_path, monkeypatch):
    put(tmp_path, 10)
    newest = put(tmp_path, 12)
    monkeypatch.setenv("CFMASK_READ_PATIENCE", "0")
    real = os.listdir

    def unmounted(path):
        names = real(path)
        if Path(path) == tmp_path:
            newest.rename(tmp_path / "away")
        return names

    monkeypatch.setattr(os, "listdir", unmounted)
    with pytest.raises(StorageUnavailable, match="disappeared"):
        resume.latest(tmp_path, report=lambda text: pytest.fail(text))


@pytest.mark.parametrize("name", [STATE, MODEL, OPTIMIZER])
def test_a_missing_member_is_damage(tmp_path, name):
    put(tmp_path, 10)
    (put(tmp_path, 12) / name).unlink()
    said: list[str] = []
    assert resume.latest(tmp_path, report=said.append).step == 10
    assert f"{name} is missing" in said[0]


def test_a_failing_read_is_retried(monkeypatch, capsys):
    failures = iter([OSError(errno.EIO, "I/O error")] * 3)

    def read():
        for failure in failures:
            raise failure
        return "read"

    assert patiently(read, "it", patience_s=30) == "read"
    with pytest.raises(FileNotFoundError):
        patiently(lambda: os.stat("/nowhere/at/all"), "it", patience_s=30)


# --- a run does not begin again by itself -----------------------------------------------------------------------------


def begun(root: Path, *, committed=(), attempts=(0,), logged=0) -> RunFolder:
    run = RunFolder(root)
    append_lines(run.attempts, [{"attempt": n, "from_step": step} for n, step in enumerate(attempts)])
    append_lines(run.committed, [{"step": step} for step in committed])
    append_lines(run.receipts, [{"step": step} for step in range(1, logged + 1)])
    return run


@pytest.mark.parametrize(
    "history", [{"committed": [8]}, {"attempts": [0, 8]}, {"logged": 17}], ids=["committed", "resumed", "logged"]
)
def test_a_run_with_progress_is_not_restarted_at_step_0(tmp_path, history):
    run = begun(tmp_path, **history)
    with pytest.raises(UserError) as refusal:
        check_progress(run, None, epoch_steps=100, checkpoint_steps=8)
    assert str(run.checkpoints) in str(refusal.value) and f"--resume {tmp_path} --from-step-0" in str(refusal.value)
    run.allow_step_0()
    check_progress(run, None, epoch_steps=100, checkpoint_steps=8)
    run.clear_step_0()
    with pytest.raises(UserError):
        check_progress(run, None, epoch_steps=100, checkpoint_steps=8)


def test_a_damaged_checkpoint_is_proof_of_progress(tmp_path):
    """Also without committed.jsonl, if the log ends before the second checkpoint."""
    run = begun(tmp_path, logged=12)
    (put(run.checkpoints, 8) / MODEL).write_bytes(b"torn")
    with pytest.raises(UserError, match="its history shows a checkpoint of step 8"):
        check_progress(run, resume.latest(run.checkpoints), epoch_steps=100, checkpoint_steps=8)


@pytest.mark.parametrize("name, value", [("run.seed", 3), ("optim.lr", 3e-4), ("initial.safetensors", "cd" * 32)])
def test_a_resume_with_other_inputs_is_refused(tmp_path, name, value):
    checkpoint = resume.verified(put(tmp_path / "checkpoints", 12))
    same = dict(checkpoint.inputs)
    check_inputs(RunFolder(tmp_path), checkpoint, same)
    # Names that only one of the two has are not compared.
    check_inputs(RunFolder(tmp_path), checkpoint, {"run.seed": 1, "optim.new": 5})
    with pytest.raises(UserError, match=f"{name}: {same[name]} → {value}"):
        check_inputs(RunFolder(tmp_path), checkpoint, {**same, name: value})


@pytest.mark.parametrize(
    "history", [{}, {"logged": 7}, {"logged": 16}, {"attempts": [0, 0], "logged": 12}, {"attempts": [0, 8, 0]}]
)
def test_a_run_without_checkpoints_restarts_at_step_0(tmp_path, history):
    """Killed while the first checkpoint was written, or restarted on request."""
    check_progress(begun(tmp_path, **history), None, epoch_steps=100, checkpoint_steps=8)


def test_a_resume_from_an_older_checkpoint_warns(tmp_path, capsys):
    run = begun(tmp_path, committed=[10, 12], attempts=[0])
    put(run.checkpoints, 10)
    check_progress(run, resume.latest(run.checkpoints), epoch_steps=100, checkpoint_steps=2)
    assert "the checkpoint of step 12" in capsys.readouterr().err
    put(run.checkpoints, 12)
    check_progress(run, resume.latest(run.checkpoints), epoch_steps=100, checkpoint_steps=2)
    assert not capsys.readouterr().out


def test_history_is_cut_in_place_on_a_full_disk(tmp_path, monkeypatch):
    run = begun(tmp_path, committed=[4, 8], logged=9)
    with open(run.receipts, "a") as file:
        file.write('{"step": 1')

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("cfmask.runtime.jsonl.write_atomically", full)
    run.cut_history(4)
    assert run.receipts.read_text() == "".join(json.dumps({"step": step}) + "\n" for step in range(1, 5))
    assert run.history().saved == 4


def test_read_state_retries(tmp_path, monkeypatch):
    path = put(tmp_path, 12)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    FailingCalls(monkeypatch, tmp_path, first=1, times=1, number=errno.EIO)
    assert read_state(path).step == 12
