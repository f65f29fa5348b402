"""Images a second of conversions, for every store."""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
from collections.abc import Sequence
from typing import Any

from cfmask.errors import UserError
from tools.benchmarks.contenders import Bench, prepared
from tools.benchmarks.tables import report, say, spread

CONVERTERS = ("cfmask", "webdataset", "mosaic", "litdata", "ffcv")


def run(arguments: argparse.Namespace) -> str:
    with prepared(arguments) as bench:
        return compare(bench, arguments.only, arguments.stores)


def compare(bench: Bench, only: list[str], stores: Sequence[str]) -> str:
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
    return report("convert", bench.source, header, rows, notes)
