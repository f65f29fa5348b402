"""Seconds to the first batch of an epoch, at its start and near its end, of a set that counts as ImageNet does."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from tools.benchmarks.contenders import REPO
from tools.benchmarks.photographs import draw_photograph
from tools.benchmarks.tables import report, say, spread


def run(arguments: argparse.Namespace) -> str:
    with tempfile.TemporaryDirectory(prefix="cfmask-bench-") as temporary:
        return resume((arguments.work or Path(temporary)).resolve(), arguments.workers, arguments.rounds)


def resume(work: Path, workers: int, rounds: int) -> str:
    """Seconds from a fresh process's call to the first batch, on a set that counts as many samples as ImageNet."""
    folder = work / "all-of-imagenet"
    if not (folder / "manifest.json").exists():
        say("making 1282 shards that count 1,281,167 samples")
        make_counted_set(folder)
    rows = []
    for percent in (0, 99):
        for world_size in (1, 16):
            times = []
            for _ in range(rounds):
                which = (folder, percent, world_size, workers)
                command = [sys.executable, "-m", "tools.benchmarks.ours", "resume", *which]
                done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=True, cwd=REPO)
                times.append(json.loads(done.stdout))
            rows.append(
                [
                    f"{percent} %",
                    str(world_size),
                    str(512 // world_size),
                    spread([t["manifest_s"] for t in times], "{:.2f}"),
                    spread([t["first_batch_s"] for t in times], "{:.2f}"),
                    spread([t["manifest_s"] + t["first_batch_s"] for t in times], "{:.2f}"),
                ]
            )
    header = ["epoch", "ranks", "images in the batch", "manifest s", "first batch s", "together s"]
    notes = [
        f"One rank's part of a batch of 512, 16 lanes, {workers} loader threads; {rounds} fresh processes, imports not "
        "counted; median (lowest–highest). The set: 1282 shards with indexes of 999 or 1000 rows; a shard's rows share "
        "one JPEG of 500 × 375.",
    ]
    return report("resume", None, header, rows, notes)


def make_counted_set(folder: Path) -> None:
    """A set that counts ImageNet's shards and samples, 1,281,167; those of a shard share one JPEG."""
    import dataclasses

    from cfmask.convert import shard_writer
    from cfmask.data import shard_index, shards

    folder.mkdir(parents=True, exist_ok=True)
    total, count = 1_281_167, 1282
    bounds = [n * total // count for n in range(count + 1)]
    photo = draw_photograph(0)
    entries, indexes = [], []
    for n in range(count):
        tar = folder / f"train-{n:06d}.tar"
        rows = bounds[n + 1] - bounds[n]
        one = shard_writer.write_shard(tar, [("x", 0, {"jpg": photo, "cls": b"0"})])
        index = dataclasses.replace(
            one,
            keys=np.array([f"s{i}" for i in range(bounds[n], bounds[n + 1])], dtype=np.bytes_),
            labels=(np.arange(bounds[n], bounds[n + 1]) % 1000).astype(np.int32),
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
