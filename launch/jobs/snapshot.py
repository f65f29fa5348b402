"""The code that was submitted, kept in the run folder: a requeue next week runs it, whatever the repository holds.

RUN/code/0123456789ab/    named after what is in it; files are read-only
  cfmask/ launch/         all that a job imports of this repository
  snapshot.json           commit, files that differ from it, when it was taken, versions of Python and packages
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from cfmask.files import write_atomically

FOLDERS = ("cfmask", "launch")
_INFO = "snapshot.json"
_PACKAGES = ("torch", "torchvision", "open_clip_torch", "webdataset", "submitit", "numpy")


@dataclass(frozen=True)
class Snapshot:
    """Where it is, and what it says about itself."""

    path: Path
    info: dict[str, Any]

    @property
    def digest(self) -> str:
        return str(self.info["digest"])

    def __str__(self) -> str:
        commit, changed = self.info.get("commit"), self.info.get("uncommitted") or []
        if commit is None:
            return self.digest
        return f"{self.digest} (commit {commit[:7]}" + (f", {len(changed)} files changed since)" if changed else ")")


def digest_of(repository: Path) -> str:
    """12 hexadecimal digits that two trees share only if a job would run the same code."""
    whole = hashlib.sha256()
    for path in _files(repository):
        content = path.read_bytes()
        whole.update(f"{path.relative_to(repository)} {len(content)}\n".encode() + content)
    return whole.hexdigest()[:12]


def take(repository: Path, folder: Path) -> Snapshot:
    """Copy the code into ``folder``, unless it is there. May be called by several processes at once."""
    digest = digest_of(repository)
    final = folder / digest
    if not (final / _INFO).exists():
        aside = folder / f".{digest}.{platform.node()}-{os.getpid()}"
        shutil.rmtree(aside, ignore_errors=True)
        for path in _files(repository):
            copy = aside / path.relative_to(repository)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
            copy.chmod(0o444)
        write_atomically(aside / _INFO, json.dumps(_info(repository, digest), indent=2))
        try:
            aside.rename(final)
        except OSError:
            shutil.rmtree(aside, ignore_errors=True)
            if not (final / _INFO).exists():
                raise
    return Snapshot(final, json.loads((final / _INFO).read_text()))


def differing_files(one: Path, other: Path) -> list[str]:
    """Names of the files that two trees do not have in common."""
    contents = [{str(p.relative_to(root)): p.read_bytes() for p in _files(root)} for root in (one, other)]
    names = sorted(contents[0].keys() | contents[1].keys())
    return [name for name in names if contents[0].get(name) != contents[1].get(name)]


def _files(repository: Path) -> Iterator[Path]:
    for folder in FOLDERS:
        for path in sorted((repository / folder).rglob("*")):
            if path.is_file() and not _hidden(path.relative_to(repository)):
                yield path


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in path.parts)


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
    """What git says; None without git, or where this is not a repository of its own."""
    if not (repository / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "-C", str(repository), *words], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.rstrip() if done.returncode == 0 else None
