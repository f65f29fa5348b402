"""Run a loader or a converter of another library, as a user of that library would write it from its documentation.

    python -m tools.benchmarks.peers loader NAME --data DIR --source TREE --batch 64 --workers 2 --seconds 20
    python -m tools.benchmarks.peers convert NAME --source TREE --out DIR --store original --workers 2
    python -m tools.benchmarks.peers list

The interpreter needs the libraries of tools/peers-requirements.txt, but not cfmask. The source is a tree of
class/image.JPEG. The last line on stdout is a JSON object; the output of the libraries goes to stderr.

Loaders of photographs decode the original JPEG, resize its short side to 224 with an antialiased bicubic filter, and
crop the centre, unless their docstring says otherwise. Raw loaders read crops of 224 x 224 x 3 bytes. Batches are
(n, 3, 224, 224), uint8 or float32 in [0, 1], not normalised; those of raw loaders are views of NHWC memory.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from tools.benchmarks.peers import ffcv, litdata, mosaic, webdataset
from tools.benchmarks.peers.common import STORES
from tools.benchmarks.stream_timing import cpu_seconds, time_stream

PEERS: dict[str, Any] = {"webdataset": webdataset, "mosaic": mosaic, "litdata": litdata, "ffcv": ffcv}
PEER_OF = {loader: name for name, peer in PEERS.items() for loader in peer.LOADERS}


def problem(peer: str) -> str | None:
    """Why a peer cannot be imported; None if it can."""
    try:
        for module in PEERS[peer].IMPORTS:
            importlib.import_module(module)
    except Exception as error:
        return " ".join(f"{type(error).__name__}: {error}".split())
    return None


def run_loader(name: str, source: Path, folder: Path, *, batch: int, workers: int, seconds: float) -> dict[str, Any]:
    """Time a loader, without imports and without the conversion of its data, which is made once."""
    loader, data = PEERS[PEER_OF[name]].LOADERS[name], folder / name
    problem(PEER_OF[name])  # imports its modules before the clock starts
    if not data.exists():
        # In another process, because LitData's writer changes how this one starts processes.
        command = [sys.executable, "-m", "tools.benchmarks.peers", "prepare", name, "--source", source, "--out", data]
        subprocess.run([str(part) for part in command], check=True)
    with closing(loader.read(data, batch=batch, workers=workers)) as batches:
        return time_stream(batches, seconds)


def prepare(name: str, source: Path, out: Path) -> dict[str, Any]:
    """Make a loader's data, aside and then renamed."""
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    PEERS[PEER_OF[name]].LOADERS[name].convert(source, part, os.cpu_count() or 1)
    part.rename(out)
    return {"data": str(out)}


def run_convert(name: str, source: Path, out: Path, *, store: str, workers: int) -> dict[str, Any]:
    """Time a whole conversion, without imports."""
    problem(name)  # imports its modules before the clock starts
    begun, cpu = time.perf_counter(), cpu_seconds()
    images = PEERS[name].convert(source, out, workers, store=store)
    return {"images": images, "seconds": time.perf_counter() - begun, "cpu_seconds": cpu_seconds() - cpu}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("loader", help="time a loader")
    one.add_argument("name", choices=PEER_OF)
    one.add_argument("--data", type=Path, required=True, help="folder that gets a folder of data for each loader")
    one.add_argument("--batch", type=int, default=64)
    one.add_argument("--seconds", type=float, default=20)
    two = commands.add_parser("convert", help="time a conversion")
    two.add_argument("name", choices=PEERS)
    two.add_argument("--store", choices=STORES, default="original")
    three = commands.add_parser("prepare", help="make a loader's data")
    three.add_argument("name", choices=PEER_OF)
    for command in (one, two, three):
        command.add_argument("--source", type=Path, required=True, help="tree of class/image.JPEG")
    for command in (two, three):
        command.add_argument("--out", type=Path, required=True, help="folder to make; it must not exist")
    for command in (one, two):
        command.add_argument("--workers", type=int, default=2)
    commands.add_parser("list", help="why loaders and converters cannot be imported here; null for those that can")
    a = parser.parse_args()
    if a.command in ("convert", "prepare") and a.out.exists():
        raise SystemExit(f"error: --out {a.out} exists already.")

    # Keep stdout for the answer. The file descriptor is redirected, because processes of the libraries inherit it.
    sys.stdout.flush()
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # LitData asks the package index for a newer version of itself otherwise.
    os.environ.setdefault("LITDATA_DISABLE_VERSION_CHECK", "1")

    result: dict[str, Any]
    if a.command == "list":
        problems = {peer: problem(peer) for peer in PEERS}
        result = {**problems, **{loader: problems[peer] for loader, peer in PEER_OF.items()}}
    elif a.command == "loader":
        result = run_loader(a.name, a.source, a.data, batch=a.batch, workers=a.workers, seconds=a.seconds)
    elif a.command == "prepare":
        result = prepare(a.name, a.source, a.out)
    else:
        result = run_convert(a.name, a.source, a.out, store=a.store, workers=a.workers)
    print(json.dumps(result), file=answer, flush=True)


if __name__ == "__main__":
    main()
