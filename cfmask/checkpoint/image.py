"""A safetensors file in memory, which training copies into and a thread writes.

safetensors' own writer is not used: it orders metadata differently in each process, so that equal tensors would not
give equal files, and it cannot write from page-locked memory that was filled before.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cfmask.runtime.pinned import pinned_bytes

# Written and hashed in pieces, between which other threads can run.
_PIECE = 1 << 22
_SAFETENSORS_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}


class FileImage:
    """Equal tensors and metadata give equal bytes.

    Args:
        like: tensors with the names, shapes, types and device of those that will be copied. If they are on a GPU, the
            memory is page-locked, so that ``fill`` does not wait.
    """

    def __init__(self, like: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
        end = 0
        for name in sorted(like, key=lambda name: (-like[name].element_size(), name)):  # aligns all tensors
            tensor = like[name]
            begin, end = end, end + tensor.numel() * tensor.element_size()
            header[name] = {
                "dtype": _SAFETENSORS_NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [begin, end],
            }
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._header = struct.pack("<Q", len(text)) + text
        pinned = any(tensor.is_cuda for tensor in like.values())
        # zero_ touches every page now; torch.zeros would leave that to the first copy.
        self._data = pinned_bytes(end) if pinned else torch.empty(end, dtype=torch.uint8).zero_()
        self._tensors = {
            name: self._data[slice(*header[name]["data_offsets"])].view(tensor.dtype).view(tensor.shape)
            for name, tensor in like.items()
        }

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self._header) + len(self._data)

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy tensors into the image. Copies from a GPU are queued on the current stream and not waited for."""
        for name, copy in self._tensors.items():
            copy.copy_(tensors[name], non_blocking=True)

    def pieces(self) -> Iterator[bytes | memoryview]:
        """The bytes of the file, in order."""
        yield self._header
        data = self._data.numpy().data
        for begin in range(0, len(data), _PIECE):
            yield data[begin : begin + _PIECE]


def write_hashed(path: Path, pieces: Iterable[bytes | memoryview]) -> str:
    """Write and sync a file; returns the sha256 of ``pieces``."""
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for piece in pieces:
            file.write(piece)
            digest.update(piece)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()
