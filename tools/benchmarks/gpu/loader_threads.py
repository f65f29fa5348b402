"""Images a second of the training stream by the number of its threads, from raw crops and from crops in JPEG."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from cfmask.data.shards import load_manifest
from cfmask.data.stream import train_batches
from tools.benchmarks.contenders import REPO
from tools.benchmarks.gpu.runner import Section
from tools.benchmarks.gpu.setting import Setting
from tools.benchmarks.photographs import draw_tree, multiply

STORES = ("crop-raw", "crop-jpeg")
DRAWN, IMAGES = 200, 4096


def loader_threads(setting: Setting, section: Section) -> dict[str, Any]:
    torch.set_num_threads(1)
    cores = len(os.sched_getaffinity(0))
    counts = (1, 2) if setting.dry else (1, 2, 4, 8, 16)
    shards = make_shards(setting)
    rows: list[list[object]] = []
    result: dict[str, Any] = {}
    for store, folder in shards.items():
        rates = [images_per_second(folder, threads, setting) for threads in counts]
        rows.append([store, *(f"{rate:.0f}" for rate in rates)])
        result[store] = dict(zip(counts, rates, strict=True))
    section.note(f"{cores} cores. Images/s of one rank's stream, whole epochs of {image_count(setting)} images.")
    section.table(["store", *(f"{threads} thread{'s' * (threads > 1)}" for threads in counts)], rows)
    return result


def image_count(setting: Setting) -> int:
    return 48 if setting.dry else IMAGES


def make_shards(setting: Setting) -> dict[str, Path]:
    """Folders of shards by store, of photograph-like noise of ImageNet's size."""
    root = setting.work / "loader"
    images = image_count(setting)
    source = multiply(draw_tree(root / "drawn", min(images, DRAWN)), root / "many", images)
    made = {}
    for store in STORES:
        command = [sys.executable, REPO / "tools/make_shards.py", "folder", "--source", source, "--split", "train"]
        command += ["--out", root / store, "--store", store]
        subprocess.run(list(map(str, command)), check=True)
        made[store] = root / store / "train"
    return made


def images_per_second(folder: Path, threads: int, setting: Setting) -> float:
    """Of whole epochs, each from a standing start."""
    manifest = load_manifest(folder)
    batch, seconds = (16, 0.1) if setting.dry else (512, 1.5)
    images, begun = 0, time.perf_counter()
    for epoch in range(1_000_000):
        for one in train_batches(
            manifest,
            image_size=224,
            batch_size=batch,
            lanes=16,
            rank=0,
            world_size=1,
            seed=0,
            epoch=epoch,
            loader_workers=threads,
            draw_spec=None,
            pin_memory=setting.device == "cuda",
        ):
            images += len(one.images)
        spent = time.perf_counter() - begun
        if spent >= seconds:
            return images / spent
    raise AssertionError
