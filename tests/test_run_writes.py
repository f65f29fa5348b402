"""Writes on full disks, and the files that killed processes leave."""

from __future__ import annotations

import errno
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from cfmask.errors import UserError
from cfmask.runs import RunFolder
from cfmask.runtime.files import aside_of, sole_writer, write_atomically, written_aside
from cfmask.runtime.jsonl import JsonLines, read_lines
from cfmask.runtime.machine import this_machine
from cfmask.runtime.tensor_files import digest_of_tensors

REPO = Path(__file__).resolve().parents[1]


def full_disk(monkeypatch, *names: str) -> None:
    """Let writes to files of these names fail."""
    import cfmask.runtime.attempts
    import cfmask.runtime.jsonl

    real_append, real_write = cfmask.runtime.jsonl.append_lines, cfmask.runtime.files.write_atomically

    def refuse(real):
        def write(path, *rest):
            if path.name in names:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            return real(path, *rest)

        return write

    monkeypatch.setattr(cfmask.runtime.jsonl, "append_lines", refuse(real_append))
    monkeypatch.setattr(cfmask.runtime.attempts, "write_atomically", refuse(real_write))


def test_a_start_that_cannot_be_recorded_continues_and_is_recorded_later(tmp_path, capsys):
    run = RunFolder(tmp_path)
    run.begin_attempt(job="1-0", from_step=0)
    run.end_attempt("stopped at step 7 (requeue)")
    with pytest.MonkeyPatch.context() as patch:
        full_disk(patch, "attempts.jsonl", "ended.json")
        attempts = run.begin_attempt(job="1-1", from_step=7)
        run.end_attempt("stopped at step 9 (requeue)")
    said = capsys.readouterr().err
    assert f"{run.attempts} cannot be written (No space left on device)" in said
    assert "stopped at step 9 (requeue)" in said
    attempts.write()
    assert [line["job"] for line in read_lines(run.attempts)] == ["1-0", "1-1"]
    assert read_lines(run.attempts)[-1]["why_last_ended"] == "stopped at step 7 (requeue)"


def test_lines_are_kept_while_the_disk_is_full(tmp_path):
    lines = JsonLines(tmp_path / "bad_samples.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        full_disk(patch, "bad_samples.jsonl")
        lines.extend([{"step": 1}, {"step": 2}])
        lines.write()
    assert not lines.path.exists()
    lines.add({"step": 3})
    lines.write()
    assert [line["step"] for line in read_lines(lines.path)] == [1, 2, 3] and not lines.pending


@pytest.mark.parametrize("end", [b"", b"\n", b'\n{"eval": {"val": 1', b'\n{"step": 9'])
def test_lines_that_contain_a_text_are_those_of_all_lines(tmp_path, end):
    log = tmp_path / "log.jsonl"
    lines = [b'{"eval": {"val": 1.0}, "also": "eval"}', b'{"step": 1}', b"", b'{"x": 2}', b'{"step": 3, "eval": {}}']
    log.write_bytes(b"\n".join(lines) + end)
    assert read_lines(log, having='"eval"') == [line for line in read_lines(log) if "eval" in line]
    assert len(read_lines(log, having='"eval"')) == 2 and read_lines(log, having="nowhere") == []


def test_lost_output_does_not_end_a_process():
    code = """
import sys
from cfmask.runtime.output import tolerate_lost_output
tolerate_lost_output()
for n in range(1000):
    print("a line", n, flush=True)
    print("a line", n, file=sys.stderr)
sys.stdout.isatty()
"""
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-u", "-c", code], stdout=full, stderr=full, cwd=REPO)
    assert done.returncode == 0


def dead_process() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_the_next_holder_removes_temporary_files_of_killed_processes(tmp_path):
    run = RunFolder(tmp_path)
    here, pid = this_machine(), dead_process()
    left = [
        f".model.safetensors.{here}-{pid}-0a1b2c3d.part",
        f".initial.safetensors.{'f' * 12}-{pid}-0a1b2c3d.part",
        ".results.json.n17-4711.part",
        ".model.safetensors.4711",
        f".recipe.json.{here}-{pid}-0a1b2c3d.part",
        f".clock.{here}-{pid}-0a1b2c3d",
        f".owner.{here}-{pid}-0a1b2c3d",
    ]
    stay = [
        f".recipe.json.{'f' * 12}-{pid}-0a1b2c3d.part",
        f".clock.{'f' * 12}-{pid}-0a1b2c3d",
        f".recipe.json.{here}-{os.getpid()}-0a1b2c3d.part",
        ".claims",
    ]
    for name in [*left, *stay]:
        (tmp_path / name).mkdir() if "owner" in name else (tmp_path / name).touch()
    with run.locked():
        assert sorted(os.listdir(tmp_path)) == sorted([*stay, ".owner"])
    for name in stay[:2]:
        os.utime(tmp_path / name, (1e9, 1e9))
    with run.locked():
        assert sorted(os.listdir(tmp_path)) == sorted([*stay[2:], ".owner"])


@pytest.mark.parametrize("finished", [True, False])
def test_tidy_removes_leftovers_of_finished_runs(tmp_path, finished):
    run = RunFolder(tmp_path)
    (tmp_path / "jobs").mkdir()
    (tmp_path / ".claims").mkdir()
    left = [run.progress, run.head_rows, tmp_path / ".claims/node-1-0a1b2c", tmp_path / f"jobs/{'0a' * 16}.pkl"]
    stay = tmp_path / "jobs/12_submitted.pkl"
    for path in (*left, stay):
        path.touch()
    if finished:
        run.results.write_text("{}")
    run.tidy()
    assert [path.exists() for path in (*left, stay)] == [not finished] * len(left) + [True]


def test_a_folder_has_a_sole_writer_until_it_is_killed(tmp_path):
    code = f"""
import sys
from pathlib import Path
from cfmask.runtime.files import sole_writer
with sole_writer(Path({str(tmp_path / "set")!r})):
    print("held", flush=True)
    sys.stdin.read()
"""
    holder = subprocess.Popen([sys.executable, "-c", code], cwd=REPO, stdin=-1, stdout=-1, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"Another process is writing to .*process {holder.pid} on"):
        with sole_writer(tmp_path / "set"):
            pass
    holder.kill()
    holder.wait()
    with sole_writer(tmp_path / "set"):
        pass


def test_locks_work_without_flock(tmp_path, monkeypatch):
    """As on a Lustre file system that is mounted without flock."""

    def missing(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", missing)
    monkeypatch.setattr("fcntl.lockf", missing)
    with written_aside(tmp_path / "model.onnx") as aside:
        aside.write_text("model")
        (aside.parent / "model.onnx.data").write_text("data")
    assert sorted(os.listdir(tmp_path)) == ["model.onnx", "model.onnx.data"]
    with RunFolder(tmp_path).locked():
        pass


def test_written_aside_removes_its_files_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), written_aside(tmp_path / "model.pt") as aside:
        aside.write_text("half")
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == []


def test_names_of_temporary_files_are_unique(tmp_path):
    names = {aside_of(tmp_path / "a") for _ in range(100)}
    assert len(names) == 100
    write_atomically(tmp_path / "a", json.dumps(1))
    assert os.listdir(tmp_path) == ["a"]


def test_the_digest_of_tensors_does_not_depend_on_the_order_of_the_metadata(tmp_path):
    def written(name: str, metadata: dict[str, str], value: float) -> str:
        header = {"__metadata__": metadata, "w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
        text = json.dumps(header).encode()
        (tmp_path / name).write_bytes(struct.pack("<Q", len(text)) + text + struct.pack("<f", value))
        return digest_of_tensors(tmp_path / name)

    first = written("a", {"mean": "0.5", "std": "0.2"}, 1.0)
    assert written("b", {"std": "0.2", "mean": "0.5"}, 1.0) == first
    assert written("c", {"mean": "0.5", "std": "0.3"}, 1.0) != first != written("d", {"mean": "0.5", "std": "0.2"}, 2.0)
    (tmp_path / "e").write_bytes(b"")
    with pytest.raises(ValueError):
        digest_of_tensors(tmp_path / "e")
