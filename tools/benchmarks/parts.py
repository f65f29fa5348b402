"""Time of each part of decoding and converting an image, in one thread."""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from isal.isal_zlib import crc32
from PIL import Image

from cfmask.data import images
from tools.benchmarks.photographs import draw_tree
from tools.benchmarks.tables import report, spread

IMAGES, ROUNDS = 300, 7


def run(arguments: argparse.Namespace) -> str:
    with tempfile.TemporaryDirectory(prefix="cfmask-bench-") as temporary:
        source = arguments.source or draw_tree(Path(temporary) / "drawn")
        paths = [path for path in sorted(source.glob("*/*")) if path.is_file()][:IMAGES]
        photos = [path.read_bytes() for path in paths]
        rows = [[name, spread(times)] for name, times in measure(paths, photos).items()]
    size = sum(map(len, photos)) / len(photos)
    note = f"{len(photos)} images, {size / 1e3:.0f} kB each; {ROUNDS} rounds; median (lowest–highest)."
    return report("parts", ["part", "µs an image"], rows, [note])


def measure(paths: list[Path], photos: list[bytes]) -> dict[str, list[float]]:
    """Microseconds of CPU time an image by part, for each round."""
    torch.set_num_threads(1)
    decoded = [images.decode(photo) for photo in photos]
    crops = [images.crop(image, 224) for image in decoded]
    raw = [images.encode(crop, "crop-raw")[1] for crop in crops]
    batch = np.empty((len(raw), len(raw[0])), np.uint8)
    with tempfile.NamedTemporaryFile() as file, tempfile.NamedTemporaryFile() as copied:
        file.write(b"".join(raw))
        file.flush()

        def copy_synced(path: Path) -> None:
            copied.write(path.read_bytes())
            if path == paths[-1]:
                copied.flush()
                os.fsync(copied.fileno())
                copied.seek(0)

        def read(n: int) -> None:
            os.preadv(file.fileno(), [memoryview(batch[n])], n * len(raw[0]))

        parts: dict[str, tuple[Any, Any]] = {
            "JPEG: decode, Pillow": (lambda data: Image.open(io.BytesIO(data)).convert("RGB"), photos),
            "JPEG: decode, cfmask": (images.decode, photos),
            "resize and crop, cfmask": (lambda image: images.crop(image, 224), decoded),
            "conversion: inspect the JPEG": (images.inspect, photos),
            "conversion: sha256": (lambda data: hashlib.sha256(data).digest(), photos),
            "conversion: CRC-32": (crc32, photos),
            "conversion: bytes from file to file, synced": (copy_synced, paths),
            "conversion: crop to JPEG": (lambda crop: images.encode(crop, "crop-jpeg"), crops),
            "raw crop: read into the batch": (read, range(len(raw))),
            "raw crop: CRC-32": (crc32, raw),
        }
        times: dict[str, list[float]] = {}
        for name, (function, inputs) in parts.items():
            for _ in range(ROUNDS):
                begun = time.process_time()
                for each in inputs:
                    function(each)
                times.setdefault(name, []).append((time.process_time() - begun) / len(inputs) * 1e6)
    return times
