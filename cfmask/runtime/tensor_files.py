"""Safetensors files: written with the usual permissions, replaced atomically, and read with their digest."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING

from cfmask.runtime.files import blocks_of, sync
from cfmask.runtime.machine import aside_of

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK = 1 << 22
# It can be read only by setting it: once, before there are threads.
_UMASK = os.umask(0)
os.umask(_UMASK)


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


def digest_of_tensors(path: Path) -> str:
    """sha256 of what is in a safetensors file. Unlike the file's own, it is the same in whatever order safetensors has
    written the metadata, which differs from process to process.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no safetensors file.
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


_DTYPES_OF_SAFETENSORS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64"}
