"""One measurement of cfmask's own loader, converter or resumption: what a benchmark starts in a fresh process."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cfmask.data import plan
from cfmask.errors import UserError
from cfmask.runtime.command import exits_cleanly


def our_loader(folder: Path, *, batch: int, workers: int, seconds: float, processes: bool) -> dict[str, Any]:
    """cfmask's training stream, as training runs it; timed as peers/__main__.py times its loaders."""
    import torch

    from cfmask.data.shards import load_manifest
    from cfmask.data.stream import train_batches
    from tools.benchmarks.cpu_time import cpu_seconds

    torch.set_num_threads(1)
    manifest = load_manifest(folder)
    begun = time.perf_counter()
    images, started, cpu, first = 0, 0.0, 0.0, None
    for epoch in range(1_000_000):
        settings: dict[str, Any] = {"image_size": 224, "seed": 0, "epoch": epoch, "draw_spec": None}
        if processes:
            batches = in_processes(manifest, batch, workers, settings)
        else:
            sizes: dict[str, Any] = {"batch_size": batch, "lanes": 2, "rank": 0, "world_size": 1}
            stream = train_batches(manifest, loader_workers=workers, **sizes, **settings)
            batches = (some.images for some in stream)
        for some in batches:
            now = time.perf_counter()
            if first is None:
                first, started, cpu = now - begun, now, cpu_seconds()
                continue
            images += len(some)
            if now - started >= seconds:
                used = cpu_seconds() - cpu
                return {"images": images, "seconds": now - started, "cpu_seconds": used, "first_batch_s": first}
    raise AssertionError


def in_processes(manifest: Any, batch: int, workers: int, settings: dict[str, Any]) -> Iterator[Any]:
    """The same stages in the processes of torch's DataLoader, each with a lane and batches of its own: what threads are
    measured against."""
    import torch
    from torch.utils.data import DataLoader, IterableDataset, get_worker_info

    from cfmask.data.stream import train_batches

    class Lane(IterableDataset):
        def __iter__(self) -> Iterator[Any]:
            worker = get_worker_info()
            assert worker is not None
            torch.set_num_threads(1)
            sizes: dict[str, Any] = {
                "batch_size": batch * workers,
                "lanes": workers,
                "rank": worker.id,
                "world_size": workers,
            }
            for some in train_batches(manifest, loader_workers=0, **sizes, **settings):
                yield some.images

    yield from DataLoader(Lane(), batch_size=None, num_workers=workers, multiprocessing_context="fork")


def our_convert(source: Path, out: Path, *, store: str, workers: int) -> dict[str, Any]:
    from cfmask.data.shards import load_manifest
    from tools import make_shards
    from tools.benchmarks.cpu_time import cpu_seconds

    flags = ["--store", store, "--workers", str(workers), "--split", "train"]
    before = cpu_seconds()
    begun = time.perf_counter()
    stdout = os.dup(1)
    os.dup2(2, 1)  # what it prints is not the answer
    code = make_shards.main(["folder", "--source", str(source), "--out", str(out), *flags])
    os.dup2(stdout, 1)
    seconds, used = time.perf_counter() - begun, cpu_seconds() - before
    if code:
        raise UserError("the conversion failed")
    images = load_manifest(out / "train").num_samples
    return {"images": images, "seconds": seconds, "cpu_seconds": used}


def our_resume(folder: Path, percent: int, world_size: int, workers: int) -> dict[str, float]:
    import torch

    from cfmask.data.shards import load_manifest
    from cfmask.data.stream import train_batches
    from cfmask.masking.fills import DrawSpec

    torch.set_num_threads(1)
    begun = time.perf_counter()
    manifest = load_manifest(folder)
    loaded = time.perf_counter()
    steps = plan.steps_per_epoch(manifest.num_samples, 512)
    batches = train_batches(
        manifest,
        image_size=224,
        batch_size=512,
        lanes=16,
        rank=world_size - 1,
        world_size=world_size,
        seed=0,
        epoch=3,
        start_step=steps * percent // 100,
        loader_workers=workers,
        draw_spec=DrawSpec("object", "single-fill", 0.3, 49),
    )
    batch = next(batches)
    first = time.perf_counter() - loaded
    assert batch.step == steps * percent // 100 and len(batch.labels) == 512 // world_size
    batches.close()  # type: ignore[attr-defined]
    return {"manifest_s": loaded - begun, "first_batch_s": first}


@exits_cleanly
def main() -> None:
    """Print what was measured as a JSON object, in the last line."""
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    p.add_argument("what", choices=("loader", "convert", "resume"))
    p.add_argument("rest", nargs="*")
    for flag in ("--batch", "--workers"):
        p.add_argument(flag, type=int)
    p.add_argument("--seconds", type=float)
    p.add_argument("--processes", action="store_true")
    p.add_argument("--store")
    for flag in ("--source", "--out"):
        p.add_argument(flag, type=Path)
    a = p.parse_args()
    if a.what == "loader":
        folder = Path(a.rest[0])
        found = our_loader(folder, batch=a.batch, workers=a.workers, seconds=a.seconds, processes=a.processes)
    elif a.what == "convert":
        found = our_convert(a.source, a.out, store=a.store, workers=a.workers)
    else:
        name, percent, world_size, workers = a.rest
        found = our_resume(Path(name), int(percent), int(world_size), int(workers))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
