"""Snapshots of the code in the run folder: a job that is requeued a week later runs the code that was submitted.

RUN/code/0123456789ab/    named after its digest; files are read-only; start.py verifies them before they run
  cfmask/ launch/         everything that a job imports from this repository
  snapshot.json           commit, files that differ from it, when it was taken, versions of Python and packages
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import subprocess
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from cfmask.runtime.files import sync, write_atomically
from launch.ranks.start import FOLDERS, code_files, digest_of

REPO = Path(__file__).resolve().parents[2]
"""The repository that this module belongs to, or the snapshot."""
_INFO = "snapshot.json"
_PACKAGES = ("torch", "torchvision", "open_clip_torch", "webdataset", "submitit", "numpy")


@dataclass(frozen=True)
class Snapshot:
    """A copy of the code."""

    path: Path
    info: dict[str, Any]
    """Content of its snapshot.json."""

    @property
    def digest(self) -> str:
        return str(self.info["digest"])

    def __str__(self) -> str:
        commit, changed = self.info.get("commit"), self.info.get("uncommitted") or []
        if commit is None:
            return self.digest
        return f"{self.digest} (commit {commit[:7]}" + (f", {len(changed)} files changed since)" if changed else ")")


def take(repository: Path, folder: Path) -> Snapshot:
    """Copy the code into ``folder``, unless it is already there. A damaged copy is replaced. Several processes may do
    this at once."""
    digest = digest_of(repository)
    final = folder / digest
    if (final / _INFO).exists() and digest_of(final) == digest:
        return read(final)
    mine = f"{digest}.{platform.node()}-{os.getpid()}"
    aside = folder / f".{mine}"
    shutil.rmtree(aside, ignore_errors=True)
    _copy(repository, aside, digest)
    if final.exists():
        damaged = folder / f".damaged-{mine}"
        with contextlib.suppress(FileNotFoundError):  # another process replaces it, too
            final.rename(damaged)
        shutil.rmtree(damaged, ignore_errors=True)
    try:
        aside.rename(final)
    except OSError:
        shutil.rmtree(aside, ignore_errors=True)
        if not (final / _INFO).exists() or digest_of(final) != digest:
            raise
    sync(folder)
    return read(final)


def _copy(repository: Path, aside: Path, digest: str) -> None:
    """Sync all files before the caller renames the copy, so that it is complete even after a power failure."""
    folders = {aside}
    for path in code_files(repository):
        copy = aside / path.relative_to(repository)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
        copy.chmod(0o444)
        sync(copy)
        folders |= {parent for parent in copy.parents if parent.is_relative_to(aside)}
    write_atomically(aside / _INFO, json.dumps(_info(repository, digest), indent=2))
    for each in folders:
        sync(each)


def read(final: Path) -> Snapshot:
    """A copy that has been taken before."""
    return Snapshot(final, json.loads((final / _INFO).read_text()))


def differing_files(one: Path, other: Path) -> list[str]:
    """Names of the files that differ between two trees."""
    contents = [{str(p.relative_to(root)): p.read_bytes() for p in code_files(root)} for root in (one, other)]
    names = sorted(contents[0].keys() | contents[1].keys())
    return [name for name in names if contents[0].get(name) != contents[1].get(name)]


def _info(repository: Path, digest: str) -> dict[str, Any]:
    if (repository / _INFO).exists():  # submitted from a snapshot
        return json.loads((repository / _INFO).read_text())
    commit = _git(repository, "rev-parse", "HEAD")
    status = _git(repository, "status", "--porcelain", "--", *FOLDERS) if commit else None
    versions: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "digest": digest,
        "commit": commit,
        "uncommitted": [line[3:] for line in status.splitlines()] if status else [],
        "taken": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": platform.python_version(),
        "packages": versions,
    }


def _git(repository: Path, *words: str) -> str | None:
    """Output of git; None without git, or if the folder is not the root of a repository."""
    if not (repository / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "-C", str(repository), *words], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.rstrip() if done.returncode == 0 else None
