"""Seconds to the first batch, at the start of an epoch and near its end, of a set as large as ImageNet."""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path

import numpy as np

from cfmask.convert import shard_writer
from cfmask.data import shard_index, shards
from tools.benchmarks.fresh_process import fresh
from tools.benchmarks.ours import BATCH_SIZE, LANES, our_resume
from tools.benchmarks.photographs import draw_photograph
from tools.benchmarks.tables import announce, report, spread

SAMPLES, SHARDS = 1_281_167, 1282
HEADER = ["epoch", "ranks", "images in the batch", "manifest s", "first batch s", "together s"]


def run(arguments: argparse.Namespace) -> str:
    with tempfile.TemporaryDirectory(prefix="cfmask-bench-") as temporary:
        folder = (arguments.work or Path(temporary)).resolve() / "all-of-imagenet"
        if not (folder / "manifest.json").exists():
            announce(f"making {SHARDS} shards with an index of {SAMPLES:,} samples")
            make_large_set(folder)
        rows = []
        for percent, ranks in [(0, 1), (0, 16), (99, 1), (99, 16)]:
            times = [fresh(our_resume, folder, percent, ranks, arguments.workers) for _ in range(arguments.rounds)]
            manifest, first = ([t[name] for t in times] for name in ("manifest_s", "first_batch_s"))
            together = [a + b for a, b in zip(manifest, first, strict=True)]
            seconds = [spread(of, "{:.2f}") for of in (manifest, first, together)]
            rows.append([f"{percent} %", str(ranks), str(BATCH_SIZE // ranks), *seconds])
    note = (
        f"One rank's part of a batch of {BATCH_SIZE}, {LANES} lanes, {arguments.workers} loader threads; "
        f"{arguments.rounds} fresh processes, without imports; median (lowest–highest). The set: {SHARDS} shards with "
        "indexes of 999 or 1000 rows; the rows of a shard share one JPEG of 500 × 375."
    )
    return report("resume", HEADER, rows, [note])


def make_large_set(folder: Path) -> None:
    """A set with ImageNet's numbers of shards and samples. The samples of a shard share one JPEG."""
    folder.mkdir(parents=True, exist_ok=True)
    bounds = [n * SAMPLES // SHARDS for n in range(SHARDS + 1)]
    photo = draw_photograph(0)
    entries, indexes = [], []
    for n, (first, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        tar, rows = folder / f"train-{n:06d}.tar", end - first
        one = shard_writer.write_shard(tar, [("x", 0, {"jpg": photo, "cls": b"0"})])
        index = dataclasses.replace(
            one,
            keys=np.array([f"s{i}" for i in range(first, end)], dtype=np.bytes_),
            labels=(np.arange(first, end) % 1000).astype(np.int32),
            first=np.arange(0, 2 * rows + 1, 2),
            extension=np.tile(one.extension, rows),
            offset=np.tile(one.offset, rows),
            size=np.tile(one.size, rows),
            crc32=np.tile(one.crc32, rows),
        )
        shard_index.write_index(shard_index.index_path(tar), index)
        shard, index = shard_writer.shard_and_index(tar)
        entries.append(shard)
        indexes.append(index)
    shards.write_manifest(
        shards.Manifest(
            root=folder,
            split="train",
            store="original",
            classes=tuple((f"n{c:08d}", f"class {c}") for c in range(1000)),
            class_counts=shard_writer.class_counts_of(indexes, 1000),
            shards=tuple(entries),
        )
    )
