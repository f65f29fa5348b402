"""Safetensors files: written with ordinary permissions, replaced atomically, and read together with their digest."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from cfmask.runtime.files import blocks_of, read_bytes, replacing

if TYPE_CHECKING:
    from torch import Tensor

# The umask can be read only by setting it: once, before there are threads.
_UMASK = os.umask(0)
os.umask(_UMASK)


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file with the permissions of any other new file. safetensors alone would make it unreadable
    for other users."""
    from safetensors.torch import save_file

    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, path, metadata=metadata)
    path.chmod(0o666 & ~_UMASK)


def replace_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """``save_tensors``, atomically (``files.replacing``).

    Raises:
        OSError: the file cannot be written.
    """
    from safetensors import SafetensorError

    with replacing(path) as aside:
        try:
            save_tensors(aside, tensors, metadata)
        except SafetensorError as error:  # raised if the disk is full
            raise OSError(errno.EIO, str(error), str(path)) from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], str]:
    """The tensors of a safetensors file, on the CPU, and the sha256 of the bytes that they were made from.

    The file is read and not mapped: a read error is an exception, whereas a page of a mapped file that cannot be read
    kills the process.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a safetensors file, or is truncated.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    data = read_bytes(path)
    try:
        return load(data), hashlib.sha256(data).hexdigest()
    except SafetensorError as error:
        raise ValueError(str(error)) from None


def digest_of_tensors(path: Path) -> str:
    """sha256 of the contents of a safetensors file. Unlike the sha256 of the file, it does not depend on the order of
    the metadata, in which safetensors differs from process to process.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a safetensors file.
    """
    blocks = blocks_of(path)
    begin = bytearray(next(blocks, b""))
    end = 8 + int.from_bytes(begin[:8], "little")
    while len(begin) < end and (block := next(blocks, None)) is not None:
        begin += block
    digest = hashlib.sha256(json.dumps(json.loads(begin[8:end]), sort_keys=True).encode())
    digest.update(begin[end:])
    for block in blocks:
        digest.update(block)
    return digest.hexdigest()
