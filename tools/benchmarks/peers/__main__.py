"""The benchmark's peers: other libraries on the jobs that cfmask's loader and converter do.

Every loader and every converter is one function, written as a user of that library would write it from its
documentation. They run in an interpreter of their own (`tools/peers-requirements.txt`), where cfmask is not needed:

    python -m tools.benchmarks.peers loader NAME --data DIR --source TREE --batch 64 --workers 2 --seconds 20
    python -m tools.benchmarks.peers convert NAME --source TREE --out DIR --store original --workers 2
    python -m tools.benchmarks.peers list

The source is a tree of `class/image.JPEG`. The last line on stdout is one JSON object; what the libraries say goes to
stderr. Machine time is what all processes of a peer used, not only this one.

Loaders never end: they go through their data again and again, in another order each time, and yield the number of
images of each batch as it arrives. What counts as one job:

    photographs   decode the original JPEG, short side to 224 with an antialiased bicubic filter, centre crop 224.
                  "Same pixels" below means: equal to Pillow's to the last bit, which is what CLIP was evaluated on.
    raw           224 x 224 x 3 bytes that somebody has cropped before; every peer gives the same pixels.

A batch is (n, 3, 224, 224), uint8 or float32 in [0, 1], not normalised. What raw loaders yield are views of NHWC memory
("channels last"), which costs nobody anything.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from importlib import metadata
from pathlib import Path
from typing import Any

from tools.benchmarks.cpu_time import cpu_seconds
from tools.benchmarks.peers.converters import convert_ffcv, convert_litdata, convert_mosaic, convert_webdataset
from tools.benchmarks.peers.photographs import (
    dali,
    ffcv_jpeg,
    ffcv_original,
    imagefolder,
    litdata,
    litdata_tensor,
    mosaic,
    prepare_dali,
    prepare_ffcv_jpeg,
    prepare_ffcv_original,
    prepare_imagefolder,
    prepare_litdata,
    prepare_litdata_tensor,
    prepare_mosaic,
    prepare_spdl,
    prepare_webdataset_pil,
    spdl,
    webdataset_pil,
)
from tools.benchmarks.peers.raw_crops import (
    ffcv_raw,
    litdata_raw,
    mosaic_raw,
    prepare_ffcv_raw,
    prepare_litdata_raw,
    prepare_mosaic_raw,
    prepare_webdataset_raw,
    webdataset_raw,
)
from tools.benchmarks.peers.shared import STORES

_WEBDATASET = ("webdataset", "torchvision.transforms", "PIL.Image")
_TORCHVISION = ("torchvision", "torchvision.datasets", "torch.utils.data", "PIL.Image")
_MOSAIC = ("streaming", "torchvision.transforms", "PIL.Image")
_LITDATA = ("litdata", "torchvision.transforms.v2", "PIL.Image")
_FFCV = ("ffcv", "ffcv.loader", "ffcv.writer", "torchvision.transforms", "PIL.Image")
_SPDL = ("spdl.io", "spdl.dataloader", "spdl.source.local_directory", "spdl.source.utils")
_DALI = ("nvidia.dali", "nvidia.dali.fn", "nvidia.dali.plugin.pytorch")

# name: (loader, how its data is made, modules that it imports)
LOADERS: dict[str, tuple[Callable[..., Iterator[int]], Callable[[Path, Path], None], tuple[str, ...]]] = {
    "webdataset_pil": (webdataset_pil, prepare_webdataset_pil, _WEBDATASET),
    "imagefolder": (imagefolder, prepare_imagefolder, _TORCHVISION),
    "mosaic": (mosaic, prepare_mosaic, _MOSAIC),
    "litdata": (litdata, prepare_litdata, _LITDATA),
    "litdata_tensor": (litdata_tensor, prepare_litdata_tensor, _LITDATA),
    "ffcv_jpeg": (ffcv_jpeg, prepare_ffcv_jpeg, _FFCV),
    "ffcv_original": (ffcv_original, prepare_ffcv_original, _FFCV),
    "spdl": (spdl, prepare_spdl, _SPDL),
    "dali": (dali, prepare_dali, _DALI),
    "webdataset_raw": (webdataset_raw, prepare_webdataset_raw, _WEBDATASET),
    "mosaic_raw": (mosaic_raw, prepare_mosaic_raw, _MOSAIC),
    "litdata_raw": (litdata_raw, prepare_litdata_raw, _LITDATA),
    "ffcv_raw": (ffcv_raw, prepare_ffcv_raw, _FFCV),
}

# name: (converter, modules that it imports)
CONVERTERS: dict[str, tuple[Callable[..., int], tuple[str, ...]]] = {
    "webdataset": (convert_webdataset, _WEBDATASET),
    "mosaic": (convert_mosaic, _MOSAIC),
    "litdata": (convert_litdata, _LITDATA),
    "ffcv": (convert_ffcv, _FFCV),
}


def _load(modules: tuple[str, ...]) -> str | None:
    """Import what a peer needs, so that no clock counts it.

    Returns:
        The peer's version; None if it does not say.
    """
    for module in modules:
        importlib.import_module(module)
    if modules is _SPDL:
        # Its FFmpeg libraries are looked for only when they are used first.
        importlib.import_module("spdl.io.utils").get_ffmpeg_versions()
    if modules is _FFCV:
        return metadata.version("ffcv")  # its module has another number than its package
    return getattr(sys.modules[modules[0]], "__version__", None)


def _problem(modules: tuple[str, ...]) -> str | None:
    try:
        _load(modules)
    except Exception as error:
        return " ".join(f"{type(error).__name__}: {error}".split())
    return None


def run_loader(name: str, data: Path, *, batch: int, workers: int, seconds: float) -> dict[str, Any]:
    """Images in about ``seconds`` after the first batch has arrived. The clock stops when a batch arrives."""
    loader, _, modules = LOADERS[name]
    version = _load(modules)
    start = time.perf_counter()
    with closing(loader(data, batch=batch, workers=workers)) as batches:  # type: ignore[type-var]
        next(batches)
        first, cpu, images, elapsed = time.perf_counter(), cpu_seconds(), 0, 0.0
        for count in batches:
            images += count
            elapsed = time.perf_counter() - first
            if elapsed >= seconds:
                break
        cpu = cpu_seconds() - cpu
    return {
        "name": name,
        "version": version,
        "images": images,
        "seconds": round(elapsed, 3),
        "images_per_s": round(images / elapsed, 1),
        "cpu_seconds": round(cpu, 3),
        "cpu_ms_per_image": round(1000 * cpu / images, 3),
        "first_batch_s": round(first - start, 3),
        "batch": batch,
        "workers": workers,
    }


def run_convert(name: str, source: Path, out: Path, *, store: str, workers: int) -> dict[str, Any]:
    """The whole conversion, without this process's own imports."""
    converter, modules = CONVERTERS[name]
    start = time.perf_counter()
    version = _load(modules)
    imported, cpu = time.perf_counter(), cpu_seconds()
    images = converter(source, out, store=store, workers=workers)
    elapsed, cpu = time.perf_counter() - imported, cpu_seconds() - cpu
    return {
        "name": name,
        "version": version,
        "store": store,
        "images": images,
        "seconds": round(elapsed, 3),
        "images_per_s": round(images / elapsed, 1),
        "cpu_seconds": round(cpu, 3),
        "cpu_ms_per_image": round(1000 * cpu / images, 3),
        "import_s": round(imported - start, 3),
        "bytes": sum(path.stat().st_size for path in out.rglob("*") if path.is_file()),
        "workers": workers,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("loader", help="images per second of a loader")
    one.add_argument("name", choices=LOADERS)
    one.add_argument("--data", type=Path, required=True, help="folder for the peers' own formats, one folder each")
    one.add_argument("--source", type=Path, required=True, help="tree of class/image.JPEG")
    one.add_argument("--batch", type=int, default=64)
    one.add_argument("--workers", type=int, default=2)
    one.add_argument("--seconds", type=float, default=20)
    one.add_argument("--prepare-only", action="store_true", help="make the peer's data and stop")
    one = commands.add_parser("convert", help="time of a conversion")
    one.add_argument("name", choices=CONVERTERS)
    one.add_argument("--source", type=Path, required=True, help="tree of class/image.JPEG")
    one.add_argument("--out", type=Path, required=True, help="folder that is made; it may not exist")
    one.add_argument("--store", choices=STORES, default="original")
    one.add_argument("--workers", type=int, default=2)
    commands.add_parser("list", help="which peers can be imported here, and what keeps the others from it")
    arguments = parser.parse_args()

    # Libraries print; the answer alone belongs on stdout. (The file descriptor: their processes inherit it.)
    sys.stdout.flush()
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # LitData would ask the package registry for a newer version of itself before every job.
    os.environ.setdefault("LITDATA_DISABLE_VERSION_CHECK", "1")

    if arguments.command == "list":
        needs = {name: modules for name, (_, _, modules) in LOADERS.items()}
        needs |= {name: modules for name, (_, modules) in CONVERTERS.items()}
        result: dict[str, Any] = {name: _problem(modules) for name, modules in needs.items()}
    elif arguments.command == "loader":
        data = arguments.data / arguments.name
        if arguments.prepare_only:
            LOADERS[arguments.name][1](arguments.source, data)
            result = {"name": arguments.name, "data": str(data)}
        else:
            if not data.exists():
                # In a process of its own: LitData's writer, for one, changes how processes are started from then on.
                command = [sys.executable, "-m", "tools.benchmarks.peers", *sys.argv[1:], "--prepare-only"]
                subprocess.run(command, check=True)
            result = run_loader(
                arguments.name,
                data,
                batch=arguments.batch,
                workers=arguments.workers,
                seconds=arguments.seconds,
            )
    else:
        if arguments.out.exists():
            raise SystemExit(f"error: {arguments.out} exists already.")
        result = run_convert(
            arguments.name, arguments.source, arguments.out, store=arguments.store, workers=arguments.workers
        )
    print(json.dumps(result), file=answer, flush=True)


if __name__ == "__main__":
    main()
