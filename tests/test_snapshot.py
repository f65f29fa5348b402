"""The code snapshot of a job: complete on the disk before it is renamed, verified before it runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cfmask.runtime.logging import message_of
from launch.ranks.start import digest_of, verify
from launch.submission import snapshot


@pytest.fixture
def repository(tmp_path):
    for name in ("cfmask/a.py", "cfmask/data/b.py", "launch/ranks/start.py"):
        path = tmp_path / "repository" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {name}\n")
    start = Path(__file__).parents[1] / "launch/ranks/start.py"
    (tmp_path / "repository/launch/ranks/start.py").write_text(start.read_text())
    return tmp_path / "repository"


def flip(code: Path) -> None:
    path = code / "cfmask/a.py"
    path.chmod(0o644)
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


def empty(code: Path) -> None:
    os.truncate(code / "cfmask/data/b.py", 0)


def lose(code: Path) -> None:
    (code / "cfmask/data/b.py").unlink()


def add(code: Path) -> None:
    (code / "cfmask/json.py").write_text("")


@pytest.mark.parametrize("damage", [flip, empty, lose, add])
def test_a_damaged_copy_does_not_run_and_is_replaced_at_the_next_submission(repository, tmp_path, damage):
    taken = snapshot.take(repository, tmp_path / "run/code")
    verify(taken.path)
    damage(taken.path)
    command = [sys.executable, str(taken.path / "launch/ranks/start.py"), "-u", "-m", "submitit.core._submit", "jobs"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert " ERROR rank 0 " in done.stderr and message_of(done.stderr) != done.stderr, "as in a job's log"
    assert f"{taken.path}, is damaged" in done.stderr and f"submit.py --resume {tmp_path / 'run'}`" in done.stderr
    again = snapshot.take(repository, tmp_path / "run/code")
    verify(again.path)
    assert again.path == taken.path and [path.name for path in again.path.parent.iterdir()] == [taken.digest]


def test_a_whole_copy_is_taken_once(repository, tmp_path):
    before = snapshot.take(repository, tmp_path / "code").path.stat()
    after = snapshot.take(repository, tmp_path / "code").path.stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_files_and_folders_are_on_the_disk_before_the_copy_has_its_name(repository, tmp_path, monkeypatch):
    synced: list[Path] = []
    before_rename: list[Path] = []
    rename = Path.rename

    def renamed(path: Path, target: Path) -> Path:
        before_rename.extend(synced)
        return rename(path, target)

    monkeypatch.setattr(snapshot, "sync", lambda path: synced.append(path))
    monkeypatch.setattr(Path, "rename", renamed)
    final = snapshot.take(repository, tmp_path / "code").path
    aside = {path for path in before_rename if path.name.startswith(f".{final.name}")}.pop()
    names = {path.relative_to(aside) for path in before_rename}
    everything = {path.relative_to(final) for path in (final, *final.rglob("*"))}
    assert names == everything - {Path("snapshot.json")}, "write_atomically syncs that one itself"
    assert synced[-1] == tmp_path / "code", "and the new name"


def test_a_repository_is_not_verified(repository):
    verify(repository)
    assert len(digest_of(repository)) == 12
