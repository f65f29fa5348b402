#!/usr/bin/env python3
"""Benchmarks: what cfmask costs beside its peers, on this machine, in one run.

    python tools/bench.py loader  --source TREE     images/s of training streams, warm and cold, every store
    python tools/bench.py convert --source TREE     images/s of conversions, every store
    python tools/bench.py resume                    seconds to the first batch, at 0 % and 99 % of all of ImageNet
    python tools/bench.py parts   --source TREE     what the time of an image goes to
    python tools/bench.py order                     how well the order mixes, beside a full permutation
    python tools/bench.py step                      training steps beside the authors' way: images/s, FLOPs, memory
    python tools/bench.py checkpoint                how long a checkpoint keeps training waiting

TREE is a folder of class/image.JPEG; without --source photograph-like noise of ImageNet's size is drawn. Peers run in
an interpreter of their own (tools/peers-requirements.txt says how it is made); one that is not there is named with
the reason. Contenders take turns, each in a fresh process; tables show medians and the range over the rounds.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402
from numpy.typing import NDArray  # noqa: E402

from cfmask.data import plan  # noqa: E402
from cfmask.data.images import STORES  # noqa: E402
from cfmask.errors import UserError, exits_cleanly  # noqa: E402
from cfmask.recipe import PRESETS, Recipe  # noqa: E402
from tools._shared import add_device_argument  # noqa: E402

if TYPE_CHECKING:
    from tools._bench_step import Case, Forward, Measured, Parts

REPO = Path(__file__).resolve().parents[1]
BASELINE = "webdataset_pil"
IN_PROCESSES = "cfmask_processes"
OURS = ("cfmask", IN_PROCESSES)

# Whose pixels are the recipe's: Pillow's to the bit, or (ours, litdata_tensor) within two levels of them.
LOADERS = {
    "original": {
        "cfmask": "±2",
        IN_PROCESSES: "±2",
        BASELINE: "Pillow's",
        "imagefolder": "Pillow's",
        "mosaic": "Pillow's",
        "litdata": "Pillow's",
        "litdata_tensor": "±2",
        "ffcv_jpeg": "other",
        "ffcv_original": "other",
        "spdl": "other",
        "dali": "other",
    },
    "crop-jpeg": {"cfmask": "of a crop"},
    "crop-raw": {
        "cfmask": "of a crop",
        IN_PROCESSES: "of a crop",
        "webdataset_raw": "of a crop",
        "mosaic_raw": "of a crop",
        "litdata_raw": "of a crop",
        "ffcv_raw": "of a crop",
    },
}
CONVERTERS = ("cfmask", "webdataset", "mosaic", "litdata", "ffcv")

# Models and batches whose steps are measured unless a flag says which.
STEPS = {
    "cpu": (("ViT-B-32-quickgelu", 32),),
    "cuda": (("ViT-B-16-quickgelu", 128), ("ViT-B-16-quickgelu", 512), ("ViT-L-14-quickgelu", 128)),
}


# --- running contenders ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """What all measurements of a run share."""

    source: Path
    work: Path
    peers: Path
    workers: int
    batch: int
    rounds: int
    seconds: float

    def call(self, program: str, *arguments: object, python: Path | str = sys.executable) -> dict[str, Any]:
        """The JSON object that a program of tools/ prints last.

        Raises:
            UserError: it printed none; with the last line that it said.
        """
        command = [str(python), str(REPO / "tools" / program), *map(str, arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        try:
            # Whatever the exit code: some libraries abort when they are torn down, after the measurement.
            return json.loads(done.stdout.strip().splitlines()[-1])
        except (IndexError, ValueError):
            words = (done.stderr.strip() or done.stdout.strip() or "no word").splitlines()[-1]
            raise UserError(f"{program} {' '.join(map(str, arguments[:2]))} failed: {words}") from None

    def missing_peers(self) -> dict[str, str]:
        """Peers that cannot run here, with the reason."""
        if not self.peers.exists():
            return {"all peers": f"{self.peers} is not there: tools/peers-requirements.txt says how to make it"}
        return {name: why for name, why in self.call("_peers.py", "list", python=self.peers).items() if why}

    def load(self, store: str, name: str, seconds: float) -> dict[str, Any]:
        common = ("--batch", self.batch, "--workers", self.workers, "--seconds", seconds)
        if name in OURS:
            how = ("--processes",) if name == IN_PROCESSES else ()
            return self.call("bench.py", "our-loader", self.work / "cfmask" / store / "train", *common, *how)
        arguments = ("--data", self.work / "peers", "--source", self.source, *common)
        return self.call("_peers.py", "loader", name, *arguments, python=self.peers)

    def convert(self, store: str, name: str, out: Path) -> dict[str, Any]:
        common = ("--source", self.source, "--out", out, "--store", store, "--workers", self.workers)
        if name == "cfmask":
            return self.call("bench.py", "our-convert", *common)
        return self.call("_peers.py", "convert", name, *common, python=self.peers)

    def prepare(self, store: str, name: str) -> None:
        """Make what a loader reads."""
        if name not in OURS:
            self.load(store, name, 0.1)
        elif not (self.work / "cfmask" / store / "train/manifest.json").exists():
            self.convert(store, "cfmask", self.work / "cfmask" / store)


def our_loader(folder: Path, *, batch: int, workers: int, seconds: float, processes: bool) -> dict[str, Any]:
    """cfmask's training stream, as the worker runs it; timed as _peers.py times its loaders."""
    import torch

    from cfmask.data.shards import load_manifest
    from cfmask.data.stream import train_batches
    from tools._peers import cpu_seconds

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
    from tools._peers import cpu_seconds

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


def forget_files(*folders: Path) -> None:
    """Drop folders' files from the page cache, so that they are read from the disk next."""
    os.sync()
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file():
                with open(path, "rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# --- loader ---------------------------------------------------------------------------------------------------------


def loader(bench: Bench, only: list[str]) -> str:
    missing = bench.missing_peers()
    contenders = [
        (store, name)
        for store, names in LOADERS.items()
        for name in names
        if name not in missing and ("all peers" not in missing or name in OURS) and (not only or name in only)
    ]
    failed: dict[str, str] = dict(missing)
    ready = []
    for store, name in contenders:
        say(f"preparing {name}, {store}")
        try:
            bench.prepare(store, name)
            ready.append((store, name))
        except UserError as error:
            failed[name] = str(error)
    warm: dict[tuple[str, str], list[dict[str, Any]]] = {c: [] for c in ready}
    cold: dict[tuple[str, str], list[dict[str, Any]]] = {c: [] for c in ready}
    for number in range(bench.rounds):
        for store, name in ready:
            say(f"round {number + 1} of {bench.rounds}: {name}, {store}")
            warm[store, name].append(bench.load(store, name, bench.seconds))
            forget_files(bench.work / "cfmask" / store, bench.work / "peers" / name, bench.source)
            cold[store, name].append(bench.load(store, name, bench.seconds / 4))
    base = per_core(warm.get(("original", BASELINE), []))
    rows = [
        [
            store,
            name,
            LOADERS[store][name],
            spread([r["images"] / r["seconds"] for r in warm[store, name]]),
            spread([r["images"] / r["cpu_seconds"] for r in warm[store, name]]),
            f"{per_core(warm[store, name]) / base:.2f}" if base else "",
            spread([r["images"] / r["seconds"] for r in cold[store, name]]),
            spread([r["first_batch_s"] for r in cold[store, name]], "{:.2f}"),
        ]
        for store, name in ready
    ]
    header = [
        "store",
        "loader",
        "pixels",
        "images/s",
        "images/s per core",
        f"× {BASELINE}",
        "cold images/s",
        "cold start s",
    ]
    notes = [
        f"Batch {bench.batch}, {bench.workers} workers, {bench.rounds} rounds of {bench.seconds:g} s (cold: of a "
        "quarter); median (lowest–highest). Per core: images by second of CPU time, of all processes and threads.",
        "Cold: the first pass after the files were dropped from the page cache; its start is the time to the first "
        "batch, imports not counted.",
        *(f"Not measured: {name}: {why}." for name, why in failed.items()),
    ]
    return report("loader", bench, header, rows, notes)


def per_core(results: list[dict[str, Any]]) -> float:
    return statistics.median(r["images"] / r["cpu_seconds"] for r in results) if results else 0.0


# --- convert --------------------------------------------------------------------------------------------------------


def convert(bench: Bench, only: list[str], stores: Sequence[str]) -> str:
    missing = bench.missing_peers()
    missing = {name.removeprefix("convert_"): why for name, why in missing.items()}
    names = [
        name
        for name in CONVERTERS
        if name not in missing and ("all peers" not in missing or name == "cfmask") and (not only or name in only)
    ]
    results: dict[tuple[str, str], list[dict[str, Any]]] = {(s, n): [] for s in stores for n in names}
    failed: dict[str, str] = dict(missing)
    for number in range(bench.rounds):
        for store, name in results:
            if f"{name} {store}" in failed:
                continue
            say(f"round {number + 1} of {bench.rounds}: {name}, {store}")
            out = bench.work / "converted"
            shutil.rmtree(out, ignore_errors=True)
            os.sync()  # what the one before has left to write is not this one's work
            try:
                results[store, name].append(bench.convert(store, name, out))
            except UserError as error:
                failed[f"{name} {store}"] = str(error)
            shutil.rmtree(out, ignore_errors=True)
    rows = []
    for store in stores:
        rates = {
            name: statistics.median(r["images"] / r["seconds"] for r in results[store, name])
            for name in names
            if results[store, name]
        }
        others = [rate for name, rate in rates.items() if name != "cfmask"]
        for name in rates:
            of = results[store, name]
            rows.append(
                [
                    store,
                    name,
                    spread([r["images"] / r["seconds"] for r in of]),
                    spread([r["images"] / r["cpu_seconds"] for r in of]),
                    f"{rates[name] / max(others):.2f}" if others else "",
                ]
            )
    header = ["store", "converter", "images/s", "images/s per core", "× fastest peer"]
    notes = [
        f"{bench.workers} processes where the converter has any, {bench.rounds} rounds; median (lowest–highest).",
        *(f"Not measured: {name}: {why}." for name, why in failed.items()),
    ]
    return report("convert", bench, header, rows, notes)


# --- resume ---------------------------------------------------------------------------------------------------------


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
                command = [sys.executable, __file__, "our-resume", folder, percent, world_size, workers]
                done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=True)
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

    from cfmask.data import shards

    folder.mkdir(parents=True, exist_ok=True)
    total, count = 1_281_167, 1282
    bounds = [n * total // count for n in range(count + 1)]
    photo = draw_photograph(0)
    entries, indexes = [], []
    for n in range(count):
        tar = folder / f"train-{n:06d}.tar"
        rows = bounds[n + 1] - bounds[n]
        one = shards.write_shard(tar, [("x", 0, {"jpg": photo, "cls": b"0"})])
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
        shards.write_index(shards.index_path(tar), index)
        shard, index = shards.shard_and_index(tar)
        entries.append(shard)
        indexes.append(index)
    shards.write_manifest(
        shards.Manifest(
            root=folder,
            split="train",
            store="original",
            classes=tuple((f"n{c:08d}", f"class {c}") for c in range(1000)),
            class_counts=shards.class_counts_of(indexes, 1000),
            shards=tuple(entries),
        )
    )


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


# --- parts ----------------------------------------------------------------------------------------------------------


def parts(source: Path) -> str:
    """What the time of an image goes to, in one thread."""
    import hashlib
    import io

    import torch
    from isal.isal_zlib import crc32
    from PIL import Image

    from cfmask.data import images

    torch.set_num_threads(1)
    paths = [path for path in sorted(source.glob("*/*")) if path.is_file()][:300]
    photos = [path.read_bytes() for path in paths]
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

        jobs: dict[str, tuple[Any, Any]] = {
            "JPEG: decode, Pillow": (lambda data: Image.open(io.BytesIO(data)).convert("RGB"), photos),
            "JPEG: decode, cfmask": (images.decode, photos),
            "resize and crop, cfmask": (lambda image: images.crop(image, 224), decoded),
            "conversion: look at the JPEG": (images.inspect, photos),
            "conversion: sha256": (lambda data: hashlib.sha256(data).digest(), photos),
            "conversion: CRC-32": (crc32, photos),
            "conversion: bytes from file to file, synced": (copy_synced, paths),
            "conversion: crop to JPEG": (lambda crop: images.encode(crop, "crop-jpeg"), crops),
            "raw crop: read into the batch": (read, range(len(raw))),
            "raw crop: CRC-32": (crc32, raw),
        }
        rows = []
        for name, (function, inputs) in jobs.items():
            times = []
            for _ in range(7):
                begun = time.process_time()
                for each in inputs:
                    function(each)
                times.append((time.process_time() - begun) / len(inputs) * 1e6)
            rows.append([name, spread(times)])
    notes = [
        f"{len(photos)} images, {sum(map(len, photos)) / len(photos) / 1e3:.0f} kB each; 7 rounds, median (range)."
    ]
    return report("parts", None, ["part", "µs an image"], rows, notes)


# --- order ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mixing:
    """How well an order mixes.

    class_spread: variance of a class's count in a batch, over that of independent draws; 1 is a full permutation.
    moved: mean distance between a sample's places in two epochs, in epochs; 1/3 for independent permutations.
    met_again: of the pairs in one batch, the share that meet in a batch of the next epoch too.
    """

    class_spread: float
    moved: float
    met_again: float


def order_quality(
    *, shards: int, per_shard: int, lanes: int, batch_size: int, classes: int, window_shards: int
) -> tuple[Mixing, Mixing]:
    """The plan's order and a full permutation's, on a set whose classes are spread over shards at random."""
    counts = np.full(shards, per_shard)
    total = shards * per_shard
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.arange(total) % classes)

    def planned(epoch: int) -> NDArray[np.int64]:
        return plan.epoch_order(
            counts, seed=0, epoch=epoch, lanes=lanes, batch_size=batch_size, window_shards=window_shards
        )

    steps = total // batch_size
    full = [rng.permutation(total)[: steps * batch_size].reshape(steps, batch_size) for _ in range(2)]
    return _mixing([planned(0), planned(1)], labels, classes), _mixing(full, labels, classes)


def _mixing(epochs: list[NDArray[np.int64]], labels: NDArray[np.int64], classes: int) -> Mixing:
    steps, batch = epochs[0].shape
    histograms = np.stack([np.bincount(labels[row], minlength=classes) for row in epochs[0]])
    share = 1 / classes
    expected = batch * share * (1 - share)
    step_of = np.full((2, len(labels)), -1)
    for e, order in enumerate(epochs):
        step_of[e, order.ravel()] = np.repeat(np.arange(steps), batch)
    in_both = (step_of >= 0).all(0)
    moved = np.abs(step_of[0, in_both] - step_of[1, in_both]).mean() / steps
    again = np.mean(
        [
            sum(n * (n - 1) for n in np.bincount(step_of[1, row][step_of[1, row] >= 0])) / (batch * (batch - 1))
            for row in epochs[0]
        ]
    )
    return Mixing(float(histograms.var(0).mean() / expected), float(moved), float(again))


def order() -> str:
    rows = []
    for name, shards, per_shard in (("ImageNet, 1000 a shard", 1281, 1000), ("100,000 samples, 250 a shard", 400, 250)):
        for window in (1, 4, 16):
            quality, full = order_quality(
                shards=shards, per_shard=per_shard, lanes=16, batch_size=512, classes=1000, window_shards=window
            )
            rows.append([name, f"windows of {window} shards", *_cells(quality)])
        rows.append([name, "full permutation", *_cells(full)])
    header = ["set", "order", "class spread", "moved", "met again %"]
    notes = [
        "Class spread: variance of a class's count in a batch over that of independent draws. Moved: mean distance of "
        "a sample's places in two epochs, as a share of the epoch (1/3: independent). Met again: of the pairs in a "
        "batch, the share that are in one batch in the next epoch too. cfmask trains with windows of 4 shards; here 16 "
        "lanes, batches of 512.",
    ]
    return report("order", None, header, rows, notes)


def _cells(mixing: Mixing) -> list[str]:
    return [f"{mixing.class_spread:.3f}", f"{mixing.moved:.3f}", f"{100 * mixing.met_again:.3f}"]


# --- step -----------------------------------------------------------------------------------------------------------


def step(arguments: argparse.Namespace) -> str:
    """For each model and batch, a table of contenders and one of what our step's time goes to."""

    from tools._bench_step import Case

    device = arguments.device
    precision = arguments.precision or ("bf16" if device == "cuda" else "fp32")
    if precision == "tf32" and device == "cpu":
        raise UserError("TF32 is a GPU's arithmetic. Choose --precision fp32 or bf16 on a CPU.")
    cases = STEPS[device]
    if arguments.model:
        cases = ((arguments.model, cases[0][1]),)
    if arguments.batch_size:
        cases = tuple((model, arguments.batch_size) for model in dict.fromkeys(model for model, _ in cases))
    steps = arguments.steps or (20 if device == "cuda" else 3)
    return "\n\n".join(step_of(Case(model, batch, device, steps), precision, arguments) for model, batch in cases)


def step_of(case: Case, precision: str, arguments: argparse.Namespace) -> str:
    from tools import _bench_step as measure
    from tools._bench_step import HEADLINE, VANILLA, Contender, DoesNotFit, fresh

    rounds, presets = arguments.rounds, arguments.presets
    # Their code runs in fp32, which on a GPU a user turns into TF32 by one line.
    authors = [Contender("as the authors compute it", "tf32" if case.device == "cuda" else "fp32", None)]
    if case.device == "cuda" or precision == "bf16":
        authors.append(Contender("as the authors compute it", "bf16", None))
    ours = Contender("cfmask", precision, HEADLINE)
    contenders = [
        Contender("vanilla FT", precision, VANILLA),
        ours,
        Contender("cfmask, deterministic", precision, HEADLINE, deterministic=True),
        Contender("cfmask, activations recomputed", precision, HEADLINE, recompute=True),
        *([Contender("cfmask, compiled", precision, HEADLINE, compiled=True)] if arguments.compiled else []),
        *authors,
    ]
    if presets:
        methods = {
            name: replace(PRESETS[name].method, ensemble="its weights") if name == "wise-kd" else PRESETS[name].method
            for name in presets
        }
        contenders = [
            Contender(name, precision, Recipe(method=method).resolved().method) for name, method in methods.items()
        ]
        contenders += authors
    say(f"{case.model}, batch {case.batch}: one forward")
    plain = fresh(measure.measure_forward, case)
    peaks: dict[str, list[float]] = {c.precision: [] for c in contenders}
    results: dict[Contender, list[Measured]] = {c: [] for c in contenders}
    parts: list[Parts] = []
    too_big = set()
    for number in range(rounds):
        turn = f"{case.model}, batch {case.batch}, round {number + 1} of {rounds}"
        for kind in peaks:
            say(f"{turn}: a matrix product, {kind}")
            peaks[kind].append(fresh(measure.measure_matmul, case.device, kind))
        for c in contenders:
            if c in too_big:
                continue
            say(f"{turn}: {c.name}, {c.precision}")
            try:
                results[c].append(fresh(measure.measure_step, case, c, number == 0))
            except DoesNotFit:
                too_big.add(c)
        if ours in contenders and ours not in too_big:
            say(f"{turn}: parts of a step")
            try:
                parts.append(fresh(measure.measure_parts, case, precision, not parts))
            except DoesNotFit as error:
                say(f"parts of a step: {error}")

    names = [f"authors, {a.precision}" for a in authors]
    header = [
        *("step", "precision", "images/s", "ms a step", *(f"× {name}" for name in names)),
        *("TFLOP/s", "% of peak", "F", "memory GB", *(f"% of {name}" for name in names)),
    ]
    rows = []
    for c in contenders:
        if c in too_big:
            rows.append([c.name, c.precision, "does not fit", *[""] * (len(header) - 3)])
            continue
        of = results[c]
        beside = [[] if a in too_big else results[a] for a in authors]
        flops = of[0].flops
        assert flops is not None
        rate = flops / statistics.median(m.seconds for m in of)
        memory = max(m.peak for m in of)
        rows.append(
            [
                c.name,
                c.precision,
                spread([case.batch / m.seconds for m in of], "{:.1f}"),
                spread([1e3 * m.seconds for m in of]),
                *(spread(times_as_fast(of, them), "{:.2f}") if them else "" for them in beside),
                f"{rate / 1e12:.3g}",
                f"{100 * rate / statistics.median(peaks[c.precision]):.0f}",
                f"{flops / plain.flops:.2f}",
                f"{memory / 1e9:.2f}",
                *(f"{100 * memory / max(m.peak for m in them):.0f}" if them else "" for them in beside),
            ]
        )
    command = f"step --model {case.model} --batch-size {case.batch} --precision {precision} --device {case.device}"
    command += f" --presets {' '.join(presets)}" if presets else ""
    notes = [*step_notes(case, rounds, plain, peaks), *parts_of_step(parts, plain)]
    return report(command, None, header, rows, notes)


def times_as_fast(ours: list[Measured], theirs: list[Measured]) -> list[float]:
    """Round by round: what slows the machine down for a while slows both."""
    return [b.seconds / a.seconds for a, b in zip(ours, theirs, strict=True)]


def step_notes(case: Case, rounds: int, plain: Forward, peaks: dict[str, list[float]]) -> list[str]:
    import torch

    from tools._bench_step import WARM_UP

    on_gpu = case.device == "cuda"
    matmul = ", ".join(f"{kind} {spread([p / 1e12 for p in of], '{:.3g}')}" for kind, of in peaks.items())
    notes = [
        f"torch {torch.__version__}{f', {plain.gpu}' if on_gpu else ''}. {rounds} rounds of {case.steps} steps "
        f"after {WARM_UP[case.device]} untimed, each in a fresh process; median (lowest–highest). A step goes from "
        "uint8 images on the device to updated weights; the device is waited for at the ends of a round only. ×: "
        "images/s beside the authors' way, round by round. Deterministic: as the worker trains unless told otherwise.",
        f"F: a forward of open_clip's plain tower, {plain.flops / case.batch / 1e9:.4g} GFLOP an image. FLOPs: of "
        "matrix products, convolutions and fused attention in a whole step, counted by torch; sums, activations and "
        f"AdamW are not. Peak: a big square matrix product, in its turn in every round; TFLOP/s: {matmul}.",
    ]
    if on_gpu:
        share = plain.relevance / plain.flops
        notes.append(f"Nor is the relevance kernel counted, where it runs: {share:.2f} F of a cfmask step.")
        what = "what tensors take at the peak: weights of student and teacher"
    else:
        what = "what the process has grown by at the peak since before its first step: activations"
    notes.append(f"Memory: {what}, and {plain.state / 1e9:.2f} GB of gradients and AdamW's moments in every row.")
    return notes


def parts_of_step(parts: list[Parts], plain: Forward) -> list[str]:
    from cfmask.report import table
    from tools._bench_step import PARTS

    if not parts:
        return []
    steps = [step for some in parts for step in some.seconds]
    flops = parts[0].flops
    assert flops is not None
    rows = []
    for name in PARTS:
        shares = [100 * step[name] / sum(step.values()) for step in steps]
        milliseconds = spread([1e3 * step[name] for step in steps], "{:.1f}")
        rows.append([name, milliseconds, f"{statistics.median(shares):.1f}", f"{flops[name] / plain.flops:.2f}"])
    sums = spread([1e3 * sum(step.values()) for step in steps], "{:.1f}")
    rows.append(["all", sums, "100", f"{sum(flops.values()) / plain.flops:.2f}"])
    return [
        table(["part of cfmask's step", "ms", "% of the step", "F"], rows),
        "The same calls with a wait for the device after each part, which on a GPU makes their sum longer than a step. "
        "Masks and fill: with the normalisation of what they give.",
    ]


# --- shared ---------------------------------------------------------------------------------------------------------


def checkpoint(arguments: argparse.Namespace) -> str:
    """Tables for checkpoint."""
    import torch

    from tools._bench_checkpoint import HEADER, NOTE, checkpoint_stall

    device = arguments.device
    rows = checkpoint_stall(arguments.model, arguments.folder, device=device, rounds=arguments.rounds)
    where = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    return report("checkpoint", None, HEADER, rows, [f"{arguments.model}, {where}, torch {torch.__version__}. {NOTE}"])


def draw_photograph(seed: int) -> bytes:
    """A JPEG of 500 × 375 of about 110 kB, ImageNet's mean: smooth shapes with grain."""
    import io

    from PIL import Image

    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(
        (500, 375), Image.Resampling.BICUBIC
    )
    grain = rng.normal(0, 18, (375, 500, 1))
    buffer = io.BytesIO()
    Image.fromarray(np.clip(np.asarray(coarse) + grain, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=93)
    return buffer.getvalue()


def draw_tree(folder: Path, images: int = 500) -> Path:
    """class/image.JPEG, drawn once."""
    if not (folder / "whole").exists():
        for n in range(images):
            path = folder / "images" / f"class{n % 20:02d}" / f"{n}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(draw_photograph(n))
        (folder / "whole").touch()
    return folder / "images"


def multiply(source: Path, folder: Path, images: int) -> Path:
    """The source's images as often as gives at least ``images``: hard links, or copies across file systems."""
    if not (folder / "whole").exists():
        shutil.rmtree(folder, ignore_errors=True)
        found = sorted(path for path in source.glob("*/*") if path.is_file())
        if not found:
            raise UserError(f"{source} has no class/image in it.")
        for copy in range(-(-images // len(found))):
            for path in found:
                new = folder / "images" / path.parent.name / f"{path.stem}-{copy}{path.suffix}"
                new.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, new)
        (folder / "whole").touch()
    return folder / "images"


def spread(values: list[float], form: str = "{:.0f}") -> str:
    return f"{form.format(statistics.median(values))} ({form.format(min(values))}–{form.format(max(values))})"


def say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def report(name: str, bench: Bench | None, header: list[str], rows: list[list[str]], notes: list[str]) -> str:
    from cfmask.report import table

    of = ""
    if bench is not None:
        files = [path for path in bench.source.glob("*/*") if path.is_file()]
        of = f" {len(files)} images, {sum(p.stat().st_size for p in files) / max(1, len(files)) / 1e3:.0f} kB each."
    machine = f"{cpu_name()}, {len(os.sched_getaffinity(0))} cores; Python {platform.python_version()}"
    head = f"`python tools/bench.py {name}`, {datetime.date.today()}, {machine}.{of}"
    return "\n\n".join([head, table(header, rows), *notes])


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    verbs = top.add_subparsers(dest="verb", required=True, metavar="loader|convert|resume|parts|order|step|checkpoint")
    for name, what in (("loader", "training streams"), ("convert", "conversions")):
        verb = verbs.add_parser(name, help=what, allow_abbrev=False)
        verb.add_argument("--source", type=Path, metavar="TREE", help="folder of class/image.JPEG (default: drawn)")
        verb.add_argument(
            "--peers",
            type=Path,
            default=REPO / ".venv-peers/bin/python",
            metavar="PYTHON",
            help="interpreter with the peers (default: that of .venv-peers)",
        )
        verb.add_argument("--images", type=int, metavar="N", help="repeat the source's images up to so many")
        verb.add_argument("--seconds", type=float, default=8, metavar="S", help="of a warm measurement (default: 8)")
        verb.add_argument("--batch-size", type=int, default=64, metavar="N", help="images at a time (default: 64)")
        verb.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these contenders alone")
    verbs.choices["convert"].add_argument(
        "--stores", nargs="+", choices=STORES, default=STORES, help="what shards hold (default: all of them)"
    )
    verbs.add_parser("resume", help="time to the first batch", allow_abbrev=False)
    verbs.add_parser("order", help="how well the order mixes", allow_abbrev=False)
    verbs.add_parser("parts", help="what the time of an image goes to", allow_abbrev=False).add_argument(
        "--source", type=Path, metavar="TREE", help="folder of class/image.JPEG (default: drawn)"
    )
    verb = verbs.add_parser("step", help="training steps", allow_abbrev=False)
    verb.add_argument("--model", metavar="NAME", help="open_clip model, or a configuration's path (default: several)")
    verb.add_argument("--batch-size", type=int, metavar="N", help="images at a time (default: 32, on a GPU several)")
    verb.add_argument(
        "--precision", choices=("fp32", "tf32", "bf16"), help="of our steps (default: fp32, on a GPU bf16)"
    )
    add_device_argument(verb)
    verb.add_argument("--compiled", action="store_true", help="a row with torch.compile too (a minute a round)")
    verb.add_argument(
        "--presets",
        nargs="+",
        choices=sorted(set(PRESETS) - {"lp-ft"}),
        default=[],
        metavar="ROW",
        help="these methods beside the authors', in place of the headline's variants",
    )
    verb.add_argument("--steps", type=int, metavar="N", help="timed in a round (default: 3, on a GPU 20)")
    verb.add_argument("--rounds", type=int, default=3, metavar="N", help="how often each is measured (default: 3)")
    verb = verbs.add_parser("checkpoint", help="what a checkpoint costs training", allow_abbrev=False)
    verb.add_argument(
        "--model",
        default="ViT-B-16-quickgelu",
        metavar="NAME",
        help="open_clip model, or a configuration's path (default: ViT-B-16-quickgelu)",
    )
    add_device_argument(verb)
    verb.add_argument("--folder", type=Path, metavar="DIR", help="on the disk to write to (default: a temporary one)")
    verb.add_argument("--rounds", type=int, default=5, metavar="N", help="how often each is measured (default: 5)")
    for name in ("loader", "convert", "resume"):
        verb = verbs.choices[name]
        verb.add_argument("--rounds", type=int, default=5, metavar="N", help="how often each is measured (default: 5)")
        verb.add_argument(
            "--workers",
            type=int,
            default=len(os.sched_getaffinity(0)),
            metavar="N",
            help="processes on this machine (default: all cores)",
        )
        verb.add_argument("--work", type=Path, metavar="DIR", help="where sets are made (default: a temporary folder)")
    return top


@exits_cleanly
def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] in (["our-loader"], ["our-convert"], ["our-resume"]):  # one measurement, in a process of its own
        print(json.dumps(_measure(argv)))
        return 0
    arguments = parser().parse_args(argv)
    if arguments.verb in ("order", "step", "checkpoint"):
        of_verb = {"order": lambda _: order(), "step": step, "checkpoint": checkpoint}
        print(of_verb[arguments.verb](arguments))
        return 0
    with tempfile.TemporaryDirectory(prefix="cfmask-bench-") as temporary:
        work = (getattr(arguments, "work", None) or Path(temporary)).resolve()
        if arguments.verb == "parts":
            print(parts(arguments.source or draw_tree(Path(temporary) / "drawn")))
            return 0
        if arguments.verb == "resume":
            print(resume(work, arguments.workers, arguments.rounds))
            return 0
        source = (arguments.source or draw_tree(work / "drawn")).resolve()
        if arguments.images:
            source = multiply(source, work / f"source-{arguments.images}", arguments.images)
        bench = Bench(
            source=source,
            work=work,
            peers=arguments.peers.absolute(),
            workers=arguments.workers,
            batch=arguments.batch_size,
            rounds=arguments.rounds,
            seconds=arguments.seconds,
        )
        if arguments.verb == "loader":
            print(loader(bench, arguments.only))
        else:
            print(convert(bench, arguments.only, arguments.stores))
    return 0


def _measure(argv: list[str]) -> dict[str, Any]:
    p = argparse.ArgumentParser()
    p.add_argument("what")
    p.add_argument("rest", nargs="*")
    for flag in ("--batch", "--workers"):
        p.add_argument(flag, type=int)
    p.add_argument("--seconds", type=float)
    p.add_argument("--processes", action="store_true")
    p.add_argument("--store")
    for flag in ("--source", "--out"):
        p.add_argument(flag, type=Path)
    a = p.parse_args(argv)
    if a.what == "our-loader":
        return our_loader(Path(a.rest[0]), batch=a.batch, workers=a.workers, seconds=a.seconds, processes=a.processes)
    if a.what == "our-convert":
        return our_convert(a.source, a.out, store=a.store, workers=a.workers)
    folder, percent, world_size, workers = a.rest
    return our_resume(Path(folder), int(percent), int(world_size), int(workers))


if __name__ == "__main__":
    sys.exit(main())
