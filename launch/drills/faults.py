"""Faults of the file system and of one node's settings.

Most are injected into the ranks: Python imports ``sitecustomize`` when it starts, and sbatch passes PYTHONPATH to the
job. A fault is active while its mark, a file, exists:

    fault = Injection(folder, SLOW_CHECKPOINTS)
    with fault.inherited():
        run.submit()
    fault.mark.touch()          from here on, no checkpoint is completed
    fault.mark.unlink()         checkpoints are written again
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

_PREAMBLE = """\
import builtins
import errno
import io
import os
import sys
import threading
import time
from importlib.machinery import PathFinder
from importlib.util import module_from_spec

MARK = {mark!r}
here = os.path.dirname(os.path.abspath(__file__))
if of_the_site := PathFinder.find_spec("sitecustomize", [folder for folder in sys.path if folder != here]):
    of_the_site.loader.exec_module(module_from_spec(of_the_site))  # this file hides it


def writes_checkpoint():
    return threading.current_thread().name.startswith("checkpoint ")


"""

SLOW_CHECKPOINTS = """\
def fsync(descriptor, fsync=os.fsync):
    while writes_checkpoint() and os.path.exists(MARK):
        time.sleep(0.1)
    fsync(descriptor)


os.fsync = fsync
"""
"""Writing a checkpoint takes until the mark is removed."""

QUOTA_EXCEEDED = """\
def fsync(descriptor, fsync=os.fsync):
    if writes_checkpoint() and os.path.exists(MARK):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
    fsync(descriptor)


os.fsync = fsync
"""
"""Writing a checkpoint fails with EDQUOT when it is flushed, as on NFS."""

UNREADABLE_CHECKPOINTS = """\
def check(file):
    name = os.fsdecode(file) if isinstance(file, (str, bytes, os.PathLike)) else ""
    if "/checkpoints/step-" in name and os.path.exists(MARK):
        raise OSError(errno.EIO, os.strerror(errno.EIO), name)


def open_file(file, mode="r", *arguments, opened=io.open, **options):
    if "r" in mode:
        check(file)
    return opened(file, mode, *arguments, **options)


def open_descriptor(path, flags, *arguments, opened=os.open, **options):
    if flags & os.O_ACCMODE == os.O_RDONLY and not flags & os.O_DIRECTORY:
        check(path)
    return opened(path, flags, *arguments, **options)


builtins.open = io.open = open_file
os.open = open_descriptor
os.environ.setdefault("CFMASK_READ_PATIENCE", "12")
"""
"""Opening a file of a checkpoint for reading fails with EIO; runs retry for 12 s instead of 60 s."""

SLOW_SHARDS = """\
def replace(source, target, *arguments, replace=os.replace, **options):
    if str(target).endswith(".tar") and os.path.exists(MARK):
        time.sleep(0.2)
    return replace(source, target, *arguments, **options)


os.replace = replace
"""
"""Every shard takes 0.2 s longer to write."""

NO_LOCAL_DISK = """\
if os.path.exists(MARK) and os.environ.get("SLURM_PROCID") == "1":
    # A file names the node on which rank 1 starts first, so that all processes agree.
    with open(MARK + ".lock", "a") as lock:
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX)
        chosen = [name for name in os.listdir(os.path.dirname(MARK)) if name.startswith("mark.n")]
        if not chosen:
            open(f"{MARK}.{os.environ['SLURMD_NODENAME']}", "w").close()
if os.path.exists(f"{MARK}.{os.environ.get('SLURMD_NODENAME')}"):
    real = os.statvfs

    def statvfs(path):
        found = real(path)
        full = str(path) == os.environ.get("TMPDIR", "/tmp")
        return os.statvfs_result((*found[:4], 0, *found[5:])) if full else found

    os.statvfs = statvfs
"""
"""One node of the job has no space on its local disk: the node on which rank 1 starts first."""


def interface_missing(node: int, name: str) -> str:
    """Make the ranks on one node of the job (0 is its first) use an interface that does not exist."""
    return f"""\
if os.path.exists(MARK) and os.environ.get("SLURM_NODEID") == "{node}":
    os.environ["GLOO_SOCKET_IFNAME"] = {name!r}
"""


class Injection:
    """A fault in jobs that are submitted ``with injection.inherited()``, and in their restarts. It is active while the
    file ``mark`` exists, which it does not at first.

    Args:
        folder: a new folder that all nodes see.
        code: Python code, run at the start of each process.
    """

    def __init__(self, folder: Path, code: str) -> None:
        folder.mkdir(parents=True)
        self._folder, self.mark = folder, folder / "mark"
        (folder / "sitecustomize.py").write_text(_PREAMBLE.format(mark=str(self.mark)) + code)

    @contextlib.contextmanager
    def inherited(self) -> Iterator[None]:
        """Processes that are started in this context have the fault. Do not yield in it: all drills share this
        process and its environment."""
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(self._folder), before]))
        try:
            yield
        finally:
            os.environ.pop("PYTHONPATH")
            if before is not None:
                os.environ["PYTHONPATH"] = before


def fill_disk(path: Path, *, leave: int) -> None:
    """Write a file that leaves only so many bytes free on its file system."""
    with open(path, "wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))
    os.truncate(path, max(0, path.stat().st_size - leave))
