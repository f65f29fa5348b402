"""Files that a reader finds whole or not at all, whenever the writer is killed."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from cfmask.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

# It can be read only by setting it: once, before there are threads.
_UMASK = os.umask(0)
os.umask(_UMASK)

_LOCK = ".lock"


def write_atomically(path: Path, data: str | bytes, *, private: bool = False) -> None:
    """Write aside, fsync, rename, fsync the folder: a reader sees all of it or what was there before.

    Args:
        private: nobody but the owner can read it.
    """
    aside = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.part")
    try:
        with open(aside, "wb") as file:
            if private:
                os.fchmod(file.fileno(), 0o600)
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    sync(path.parent)


def remove_leftovers(folder: Path, names: str = "*") -> None:
    """Remove what writers of files of these names (a pattern) have left aside when they were killed. For the sole
    writer of ``folder``."""
    for leftover in folder.glob(f".{names}.part"):
        if leftover.is_file():
            leftover.unlink(missing_ok=True)


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Two processes must not write into one folder. The lock goes with the process, however it ends.

    Raises:
        UserError: another process writes there, or none can.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / _LOCK, "w")
    except OSError as error:
        raise UserError(f"The folder {folder} cannot be written to ({error.strerror}).") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"Another process is writing to {folder}. Wait for it, or stop it first.") from None
        yield


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A path of the same name and ending in the hidden folder ``.NAME.part`` beside ``path``, for who writes slowly, or
    through a library: what is there in the end takes ``path``'s place, with all else that lies in the folder, unless an
    error is raised. A writer that is killed leaves the folder; the next one of ``path`` empties it.

    Raises:
        UserError: another process is writing ``path``, or none can.
    """
    folder = path.with_name(f".{path.name}.part")
    with sole_writer(folder):
        try:
            for leftover in _but_lock(folder):
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            yield folder / path.name
            # NAME.data, say, before NAME, which is of no use without it.
            for made in sorted(_but_lock(folder), reverse=True):
                os.replace(made, path.with_name(made.name))
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _but_lock(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name != _LOCK]


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file with the permissions that any other new file would have: safetensors alone would make it
    unreadable to the rest of the lab."""
    from safetensors.torch import save_file

    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, path, metadata=metadata)
    path.chmod(0o666 & ~_UMASK)


def replace_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """``save_tensors`` aside first, then renamed: a reader finds a whole file, or what was there before. For a sole
    writer: the file aside has one name, so that what a kill leaves there the next one writes over."""
    aside = path.with_name(f".{path.name}.part")
    try:
        save_tensors(aside, tensors, metadata)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """Hexadecimal digest of a file's bytes. It lets other threads run."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """fsync a file or a folder that was written by other means."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
