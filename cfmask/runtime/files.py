"""Atomic writes: a reader finds the whole file or what was there before, even if the writer is killed."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from cfmask.errors import UserError
from cfmask.runtime.lock import FOLDER as LOCK_FOLDER
from cfmask.runtime.lock import FolderLock, LockHeld
from cfmask.runtime.machine import aside_of

_BLOCK = 1 << 22


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a new path beside ``path``. The file that the block writes there is synced and renamed to ``path``; if the
    block raises an error, it is removed. An OSError without a file name, as of a full disk, gets that of ``path``."""
    aside = aside_of(path)
    try:
        yield aside
        sync(aside)
        os.replace(aside, path)
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise
    finally:
        aside.unlink(missing_ok=True)
    sync(path.parent)


def write_atomically(path: Path, data: str | bytes, *, private: bool = False) -> None:
    """Replace the contents of a file atomically.

    Args:
        private: only the owner may read the file.

    Raises:
        OSError: the file cannot be written.
    """
    with replacing(path) as aside, open(aside, "wb") as file:
        if private:
            os.fchmod(file.fileno(), 0o600)
        # A file name in a text may not be valid UTF-8.
        file.write(data.encode(errors="backslashreplace") if isinstance(data, str) else data)


def remove_leftovers(folder: Path, names: str = "*") -> None:
    """Remove the temporary files that killed writers have left for files of these names (a pattern). For the sole
    writer of ``folder``."""
    for leftover in folder.glob(f".{names}.part"):
        if leftover.is_file():
            leftover.unlink(missing_ok=True)


@contextmanager
def sole_writer(folder: Path, *, removed: bool = False) -> Iterator[None]:
    """Hold the lock of a folder, which is made if it is missing. The lock ends with the process: on this machine at
    once, on other machines after ``lock.DEAD_AFTER_S``.

    Args:
        removed: whether the folder is removed at the end, with everything in it.

    Raises:
        UserError: another process holds the lock, or the folder cannot be written to.
    """
    with ExitStack() as stack:
        while True:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(FolderLock(folder).held(patience_s=0, removed=removed))
                break
            except FileNotFoundError:
                if folder.is_symlink():
                    raise UserError(f"The folder {folder} is a link to a folder that does not exist.") from None
                continue  # the last writer has just removed the folder
            except LockHeld as held:
                raise UserError(
                    f"Another process is writing to {folder} ({held.owner}). Wait for it, or stop it first."
                ) from None
            except OSError as error:
                raise UserError(f"The folder {folder} cannot be written to ({error.strerror}).") from None
        yield


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yield a path with the same name in the hidden folder ``.NAME.part`` beside ``path``, for a file that is written
    slowly or by a library. At the end all files in that folder are moved beside ``path``, unless an error was raised. A
    killed writer leaves the folder, and the next writer of ``path`` empties it.

    Raises:
        UserError: another process is writing ``path``, or it cannot be written.
    """
    folder = path.with_name(f".{path.name}.part")
    with sole_writer(folder, removed=True):
        for leftover in _without_lock(folder):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        yield folder / path.name
        # In reverse order, so that NAME.data is there before NAME, which needs it.
        for made in sorted(_without_lock(folder), reverse=True):
            sync(made)
            os.replace(made, path.with_name(made.name))
        sync(path.parent)


def _without_lock(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name != LOCK_FOLDER]


def disk_is_full(error: OSError) -> bool:
    """Whether a write failed because the disk or the user's quota is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def read_bytes(path: Path) -> bytes:
    """A file's contents. Raises OSError."""
    return b"".join(bytes(block) for block in blocks_of(path))


def sha256_of(path: Path) -> str:
    """Hexadecimal digest of a file's bytes. Other threads run meanwhile. Raises OSError."""
    digest = hashlib.sha256()
    for block in blocks_of(path):
        digest.update(block)
    return digest.hexdigest()


def blocks_of(path: Path) -> Iterator[memoryview]:
    """A file's bytes in blocks; each is valid until the next one is requested."""
    block = memoryview(bytearray(_BLOCK))
    descriptor = os.open(path, os.O_RDONLY)
    try:
        while got := os.readv(descriptor, [block]):
            yield block[:got]
    finally:
        os.close(descriptor)


def sync(path: Path) -> None:
    """fsync a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
