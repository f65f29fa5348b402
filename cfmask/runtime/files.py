"""Files that a reader finds whole or not at all, whenever the writer is killed."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from cfmask.errors import UserError
from cfmask.runtime.lock import FOLDER as LOCK_FOLDER
from cfmask.runtime.lock import FolderLock, LockHeld
from cfmask.runtime.machine import aside_of

if TYPE_CHECKING:
    pass


def write_atomically(path: Path, data: str | bytes, *, private: bool = False) -> None:
    """Write aside, fsync, rename, fsync the folder: a reader sees all of it or what was there before.

    Args:
        private: nobody but the owner can read it.

    Raises:
        OSError: it cannot be written.
    """
    aside = aside_of(path)
    try:
        with open(aside, "wb") as file:
            if private:
                os.fchmod(file.fileno(), 0o600)
            # A name of a file in a text need not be UTF-8.
            file.write(data.encode(errors="backslashreplace") if isinstance(data, str) else data)
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
def sole_writer(folder: Path, *, removed: bool = False) -> Iterator[None]:
    """Two processes must not write into one folder. The lock goes with the process, however it ends: on this machine at
    once, on another one after ``DEAD_AFTER_S``.

    Args:
        removed: at the end the folder goes, with all that it holds.

    Raises:
        UserError: another process writes there, or none can.
    """
    with ExitStack() as stack:
        while True:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(FolderLock(folder).held(patience_s=0, removed=removed))
                break
            except FileNotFoundError:
                if folder.is_symlink():  # to a folder that is not there
                    raise UserError(f"The folder {folder} is a link to a folder that does not exist.") from None
                continue  # who wrote there has just removed the folder
            except LockHeld as held:
                raise UserError(
                    f"Another process is writing to {folder} ({held.owner}). Wait for it, or stop it first."
                ) from None
            except OSError as error:
                raise UserError(f"The folder {folder} cannot be written to ({error.strerror}).") from None
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
    with sole_writer(folder, removed=True):
        for leftover in _but_lock(folder):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        yield folder / path.name
        # NAME.data, say, before NAME, which is of no use without it.
        for made in sorted(_but_lock(folder), reverse=True):
            sync(made)
            os.replace(made, path.with_name(made.name))
        sync(path.parent)


def _but_lock(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name != LOCK_FOLDER]


def disk_is_full(error: OSError) -> bool:
    """Whether a write failed because the disk, or the user's quota on it, is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def read_bytes(path: Path) -> bytes:
    """A file's contents. Raises OSError."""
    return b"".join(bytes(block) for block in blocks_of(path))


def sha256_of(path: Path) -> str:
    """Hexadecimal digest of a file's bytes. It lets other threads run. Raises OSError."""
    digest = hashlib.sha256()
    for block in blocks_of(path):
        digest.update(block)
    return digest.hexdigest()


_BLOCK = 1 << 22


def blocks_of(path: Path) -> Iterator[memoryview]:
    """A file's bytes, block by block; each is valid until the next one is asked for."""
    block = memoryview(bytearray(_BLOCK))
    descriptor = os.open(path, os.O_RDONLY)
    try:
        while got := os.readv(descriptor, [block]):
            yield block[:got]
    finally:
        os.close(descriptor)


def sync(path: Path) -> None:
    """fsync a file or a folder that was written by other means."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
