"""Images a second of training streams, warm and cold, for every store."""

from __future__ import annotations

import argparse
import statistics
from typing import Any

from cfmask.errors import UserError
from tools.benchmarks.comparison import drop_from_page_cache, prepared
from tools.benchmarks.tables import announce, report, spread

BASELINE = "webdataset_pil"
LOADERS = {
    "original": {
        "cfmask": "±2",
        "cfmask_processes": "±2",
        BASELINE: "Pillow's",
        "litdata_tensor": "±2",
        "ffcv_jpeg": "other",
        "ffcv_original": "other",
    },
    "crop-jpeg": {"cfmask": "of a crop"},
    "crop-raw": {
        "cfmask": "of a crop",
        "cfmask_processes": "of a crop",
        "webdataset_raw": "of a crop",
        "litdata_raw": "of a crop",
        "ffcv_raw": "of a crop",
    },
}
"""Loaders by store, with the pixels that they give: equal to Pillow's, within two levels of them, or others."""
HEADER = [
    *("store", "loader", "pixels", "images/s", "images/s per core", f"× {BASELINE}"),
    *("cold images/s", "cold start s"),
]


def run(arguments: argparse.Namespace) -> str:
    with prepared(arguments) as comparison:
        names, failed = comparison.choose(list(dict.fromkeys(name for of in LOADERS.values() for name in of)))
        ready = []
        for store, name in [(store, name) for store, of in LOADERS.items() for name in of if name in names]:
            announce(f"preparing {name}, {store}")
            try:
                comparison.prepare(store, name)
                ready.append((store, name))
            except UserError as error:
                failed[name] = str(error)
        warm: dict[tuple[str, str], list[dict[str, Any]]] = {key: [] for key in ready}
        cold: dict[tuple[str, str], list[dict[str, Any]]] = {key: [] for key in ready}
        work, seconds = comparison.work, comparison.seconds
        for number in range(comparison.rounds):
            for store, name in ready:
                announce(f"round {number + 1} of {comparison.rounds}: {name}, {store}")
                warm[store, name].append(comparison.load(store, name, seconds))
                drop_from_page_cache(work / "cfmask" / store, work / "peers" / name, comparison.source)
                cold[store, name].append(comparison.load(store, name, seconds / 4))
        base = _per_core(warm.get(("original", BASELINE), []))
        rows = [
            [
                *(store, name, LOADERS[store][name]),
                spread([r["images"] / r["seconds"] for r in warm[store, name]]),
                spread([r["images"] / r["cpu_seconds"] for r in warm[store, name]]),
                f"{_per_core(warm[store, name]) / base:.2f}" if base else "",
                spread([r["images"] / r["seconds"] for r in cold[store, name]]),
                spread([r["first_batch_s"] for r in cold[store, name]], "{:.2f}"),
            ]
            for store, name in ready
        ]
        notes = [
            f"Batch {comparison.batch}, {comparison.workers} workers, {comparison.rounds} rounds of {seconds:g} s "
            "(cold: a quarter of it); median (lowest–highest). Per core: images by second of CPU time of all processes "
            "and threads.",
            "Cold: the first pass after the files were dropped from the page cache. Its start is the time to the first "
            "batch, without imports.",
            *(f"Not measured: {name}: {why}." for name, why in failed.items()),
        ]
        return report("loader", HEADER, rows, notes, comparison.source)


def _per_core(results: list[dict[str, Any]]) -> float:
    return statistics.median(r["images"] / r["cpu_seconds"] for r in results) if results else 0.0
