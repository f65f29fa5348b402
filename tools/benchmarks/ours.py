"""cfmask's own loader, converter and resumption. Each function is one measurement, for ``fresh_process.fresh``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from cfmask.convert.collection import Request, collect
from cfmask.convert.conversion import convert_split, plan_all
from cfmask.data import plan
from cfmask.data.shards import Manifest, load_manifest
from cfmask.data.stream import train_batches
from cfmask.masking.fills import DrawSpec
from cfmask.runtime.pool import map_in_processes
from cfmask.runtime.work import Work
from tools.benchmarks.stream_timing import cpu_seconds, time_stream

BATCH_SIZE, LANES = 512, 16
"""Batch of a run, for ``our_resume``."""


def our_loader(
    folder: Path, batch: int, threads: int, seconds: float, *, lanes: int = 2, pin_memory: bool = False
) -> dict[str, float]:
    """The training stream, as training reads it."""
    torch.set_num_threads(1)
    sizes: dict[str, Any] = {"batch_size": batch, "lanes": lanes, "rank": 0, "world_size": 1}
    return time_stream(
        _in_threads(load_manifest(folder), loader_workers=threads, pin_memory=pin_memory, **sizes), seconds
    )


def our_loader_in_processes(folder: Path, batch: int, workers: int, seconds: float) -> dict[str, float]:
    """The same stages in worker processes of torch's DataLoader, each with a lane and batches of its own."""
    torch.set_num_threads(1)
    return time_stream(_in_processes(load_manifest(folder), batch, workers), seconds)


def _stream(manifest: Manifest, epoch: int, **settings: Any) -> Iterator[Any]:
    return train_batches(manifest, image_size=224, seed=0, epoch=epoch, draw_spec=None, **settings)


def _in_threads(manifest: Manifest, **settings: Any) -> Iterator[int]:
    for epoch in range(1_000_000):
        for some in _stream(manifest, epoch, **settings):
            yield len(some.images)


def _in_processes(manifest: Manifest, batch: int, workers: int) -> Iterator[int]:
    class Lane(IterableDataset):
        def __init__(self, epoch: int) -> None:
            self.epoch = epoch

        def __iter__(self) -> Iterator[torch.Tensor]:
            worker = get_worker_info()
            assert worker is not None
            torch.set_num_threads(1)
            sizes = {"batch_size": batch * workers, "lanes": workers, "rank": worker.id, "world_size": workers}
            for some in _stream(manifest, self.epoch, loader_workers=0, **sizes):
                yield some.images

    for epoch in range(1_000_000):
        for images in DataLoader(Lane(epoch), batch_size=None, num_workers=workers, multiprocessing_context="fork"):
            yield len(images)


def our_convert(source: Path, out: Path, store: str, workers: int) -> dict[str, float]:
    """The whole conversion of a tree of class/image."""

    def run(work: Work, progress: Callable[[Any], object]) -> list[Any]:
        return map_in_processes(
            work.function,
            work.items,
            workers=workers,
            preload=work.preload,
            describe=work.describe,
            progress=progress,
        )

    before, begun = cpu_seconds(), time.perf_counter()
    request = Request(kind="folder", source=source, out=out, store=store, split="train")
    for split in plan_all(collect(request), request):
        convert_split(split, run, "bench.py")
    seconds, used = time.perf_counter() - begun, cpu_seconds() - before
    return {"images": load_manifest(out / "train").num_samples, "seconds": seconds, "cpu_seconds": used}


def our_resume(folder: Path, percent: int, world_size: int, threads: int) -> dict[str, float]:
    """Seconds to the manifest and then to the first batch, at a place in the epoch."""
    torch.set_num_threads(1)
    begun = time.perf_counter()
    manifest = load_manifest(folder)
    loaded = time.perf_counter()
    start_step = plan.steps_per_epoch(manifest.num_samples, BATCH_SIZE) * percent // 100
    batches = train_batches(
        manifest,
        image_size=224,
        batch_size=BATCH_SIZE,
        lanes=LANES,
        rank=world_size - 1,
        world_size=world_size,
        seed=0,
        epoch=3,
        start_step=start_step,
        loader_workers=threads,
        draw_spec=DrawSpec("object", "single-fill", 0.3, 49),
    )
    batch = next(batches)
    first = time.perf_counter() - loaded
    assert batch.step == start_step and len(batch.labels) == BATCH_SIZE // world_size
    batches.close()  # type: ignore[attr-defined]
    return {"manifest_s": loaded - begun, "first_batch_s": first}
