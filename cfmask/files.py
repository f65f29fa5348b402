"""Files that a reader finds whole or not at all, whenever the writer is killed."""

from __future__ import annotations

import hashlib
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# It can be read only by setting it: once, before there are threads.
_UMASK = os.umask(0)
os.umask(_UMASK)


def write_atomically(path: Path, data: str | bytes) -> None:
    """Write aside, fsync, rename, fsync the folder: a reader sees all of it or what was there before."""
    aside = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.part")
    try:
        with open(aside, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    sync(path.parent)


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file with the permissions that any other new file would have: safetensors alone would make it
    unreadable to the rest of the lab."""
    from safetensors.torch import save_file

    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, path, metadata=metadata)
    path.chmod(0o666 & ~_UMASK)


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
