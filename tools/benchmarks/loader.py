"""Images a second of training streams, warm and cold, for every store."""

from __future__ import annotations

import argparse
import statistics
from typing import Any

from cfmask.errors import UserError
from tools.benchmarks.contenders import IN_PROCESSES, OURS, Bench, forget_files, prepared
from tools.benchmarks.tables import report, say, spread

BASELINE = "webdataset_pil"

# Whose pixels are the recipe's: bitwise Pillow's, or (ours, litdata_tensor) within two levels of them.
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


def run(arguments: argparse.Namespace) -> str:
    with prepared(arguments) as bench:
        return compare(bench, arguments.only)


def compare(bench: Bench, only: list[str]) -> str:
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
    return report("loader", bench.source, header, rows, notes)


def per_core(results: list[dict[str, Any]]) -> float:
    return statistics.median(r["images"] / r["cpu_seconds"] for r in results) if results else 0.0
