"""Images a second of the training stream by its number of threads, from raw crops and from JPEG crops."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tools.benchmarks.gpu.runner import Section
from tools.benchmarks.gpu.setting import Setting
from tools.benchmarks.ours import our_convert, our_loader
from tools.benchmarks.photographs import draw_tree, repeat_images

STORES = ("crop-raw", "crop-jpeg")
DRAWN, IMAGES = 200, 4096


def loader_threads(setting: Setting, section: Section) -> dict[str, Any]:
    counts = (1, 2) if setting.dry else (1, 2, 4, 8, 16)
    images, batch, seconds = (48, 16, 0.1) if setting.dry else (IMAGES, 512, 1.5)
    cores, root = len(os.sched_getaffinity(0)), setting.work / "loader"
    source = repeat_images(draw_tree(root / "drawn", min(images, DRAWN)), root / "many", images)
    rows: list[list[object]] = []
    result: dict[str, Any] = {}
    for store in STORES:
        our_convert(source, root / store, store, cores)

        def rate(threads: int, folder: Path = root / store / "train") -> float:
            pin_memory = setting.device == "cuda"
            found = our_loader(folder, batch, threads, seconds, lanes=16, pin_memory=pin_memory)
            return found["images"] / found["seconds"]

        result[store] = {threads: rate(threads) for threads in counts}
        rows.append([store, *(f"{value:.0f}" for value in result[store].values())])
    section.note(f"{cores} cores. Images/s of one rank's stream, in epochs of {images} images.")
    section.table(["store", *(f"{threads} thread{'s' * (threads > 1)}" for threads in counts)], rows)
    return result
