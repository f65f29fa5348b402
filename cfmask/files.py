"""Files that a reader finds whole or not at all, whenever the writer is killed."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from cfmask.errors import UserError
from cfmask.runtime.lock import FOLDER as LOCK_FOLDER
from cfmask.runtime.lock import FolderLock, LockHeld
from cfmask.runtime.machine import aside_of

if TYPE_CHECKING:
    from torch import Tensor

# It can be read only by setting it: once, before there are threads.
_UMASK = os.umask(0)
os.umask(_UMASK)


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


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file with the permissions that any other new file would have: safetensors alone would make it
    unreadable to the rest of the lab."""
    from safetensors.torch import save_file

    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, path, metadata=metadata)
    path.chmod(0o666 & ~_UMASK)


def replace_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """``save_tensors`` aside first, fsynced, then renamed: a reader finds a whole file, or what was there before, also
    after a power cut.

    Raises:
        OSError: it cannot be written.
    """
    from safetensors import SafetensorError

    aside = aside_of(path)
    try:
        save_tensors(aside, tensors, metadata)
        sync(aside)
        os.replace(aside, path)
    except SafetensorError as error:  # its way to say that the disk is full
        raise OSError(errno.EIO, str(error), str(path)) from error
    finally:
        aside.unlink(missing_ok=True)
    sync(path.parent)


def disk_is_full(error: OSError) -> bool:
    """Whether a write failed because the disk, or the user's quota on it, is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def read_bytes(path: Path) -> bytes:
    """A file's contents. Raises OSError."""
    return b"".join(bytes(block) for block in _blocks(path))


def sha256_of(path: Path) -> str:
    """Hexadecimal digest of a file's bytes. It lets other threads run. Raises OSError."""
    digest = hashlib.sha256()
    for block in _blocks(path):
        digest.update(block)
    return digest.hexdigest()


def digest_of_tensors(path: Path) -> str:
    """sha256 of what is in a safetensors file. Unlike the file's own, it is the same in whatever order safetensors has
    written the metadata, which differs from process to process.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no safetensors file.
    """
    blocks = _blocks(path)
    begin = bytearray(next(blocks, b""))
    end = 8 + int.from_bytes(begin[:8], "little")
    while len(begin) < end and (block := next(blocks, None)) is not None:
        begin += block
    digest = hashlib.sha256(json.dumps(json.loads(begin[8:end]), sort_keys=True).encode())
    digest.update(begin[end:])
    for block in blocks:
        digest.update(block)
    return digest.hexdigest()


def read_tensors(path: Path) -> tuple[dict[str, Tensor], str]:
    """The tensors of a safetensors file, on the CPU, and the sha256 of the bytes that they were made of.

    The file is read and not mapped: a read that fails is an error, while a page of a mapped file that cannot be read
    ends the process.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no safetensors file whose tensors lie one behind the other, or a torn one.
    """
    import torch

    digest = hashlib.sha256()
    descriptor = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(descriptor).st_size

        def fill(buffer: memoryview) -> None:
            for begin in range(0, len(buffer), _BLOCK):
                piece = buffer[begin : begin + _BLOCK]
                done = 0
                while done < len(piece):
                    got = os.readv(descriptor, [piece[done:]])
                    if not got:
                        raise ValueError("it ends too early")
                    done += got
                digest.update(piece)

        prefix = bytearray(8)
        fill(memoryview(prefix))
        [length] = struct.unpack("<Q", prefix)
        if length > size - 8:
            raise ValueError(f"its header would have {length} bytes")
        text = bytearray(length)
        fill(memoryview(text))
        header = json.loads(text)
        header.pop("__metadata__", None)
        tensors, position = {}, 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            begin, end = entry["data_offsets"]
            dtype = _DTYPES_OF_SAFETENSORS[entry["dtype"]]
            bytes_of_one = getattr(torch, dtype).itemsize
            if begin != position or end - begin != math.prod(entry["shape"]) * bytes_of_one or end > size - 8 - length:
                raise ValueError(f"its header gives {name} the bytes {begin} to {end}")
            tensor = torch.empty(entry["shape"], dtype=getattr(torch, dtype))
            if end > begin:
                fill(tensor.reshape(-1).view(torch.uint8).numpy().data)
            tensors[name], position = tensor, end
        if position != size - 8 - length:
            raise ValueError("there are bytes behind its tensors")
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:  # a header that is none
        raise ValueError(f"its header cannot be read ({error!r})") from None
    finally:
        os.close(descriptor)
    return tensors, digest.hexdigest()


_BLOCK = 1 << 22
_DTYPES_OF_SAFETENSORS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64"}


def _blocks(path: Path) -> Iterator[memoryview]:
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
