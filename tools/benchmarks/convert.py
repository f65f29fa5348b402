"""Images a second of conversions, for every store."""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
from typing import Any

from cfmask.errors import UserError
from tools.benchmarks.comparison import prepared
from tools.benchmarks.tables import announce, report, spread

CONVERTERS = ["cfmask", "webdataset", "mosaic", "litdata", "ffcv"]
HEADER = ["store", "converter", "images/s", "images/s per core", "× fastest peer"]


def run(arguments: argparse.Namespace) -> str:
    with prepared(arguments) as comparison:
        names, failed = comparison.choose(CONVERTERS)
        results: dict[tuple[str, str], list[dict[str, Any]]] = {(s, n): [] for s in arguments.stores for n in names}
        out = comparison.work / "converted"
        for number in range(comparison.rounds):
            for store, name in results:
                if f"{name} {store}" in failed:
                    continue
                announce(f"round {number + 1} of {comparison.rounds}: {name}, {store}")
                shutil.rmtree(out, ignore_errors=True)
                os.sync()  # the writes of the one before must not delay this one
                try:
                    results[store, name].append(comparison.convert(store, name, out))
                except UserError as error:
                    failed[f"{name} {store}"] = str(error)
                shutil.rmtree(out, ignore_errors=True)
        rates = {key: [r["images"] / r["seconds"] for r in of] for key, of in results.items() if of}
        rows = []
        for (store, name), of in rates.items():
            peers = [statistics.median(r) for (s, n), r in rates.items() if s == store and n != "cfmask"]
            per_core = [r["images"] / r["cpu_seconds"] for r in results[store, name]]
            beside = f"{statistics.median(of) / max(peers):.2f}" if peers else ""
            rows.append([store, name, spread(of), spread(per_core), beside])
        notes = [
            f"{comparison.workers} processes where the converter has several, {comparison.rounds} rounds; median "
            "(lowest–highest).",
            *(f"Not measured: {name}: {why}." for name, why in failed.items()),
        ]
        return report("convert", HEADER, rows, notes, comparison.source)
