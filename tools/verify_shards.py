#!/usr/bin/env python3
"""See whether sets of shards are what they were when they were made.

    python tools/verify_shards.py shards             every set in the folder, quick: sizes, counts, indexes, every
                                                     label, end marks, a few headers of each tar; reads no images
    python tools/verify_shards.py shards/val --full  reads everything: sha256, every member's CRC, every label, and
                                                     every image decodes
    python tools/verify_shards.py shards --full --executor slurm --array 32 --cpus-per-task 8

A line for each bad shard: what, where, what to do. Exit status: 0 all is well, 1 something is wrong with the shards,
2 they cannot be verified.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

try:
    from cfmask.convert import verification
    from cfmask.convert.set_verification import Findings, as_json, checks_of, find_sets, findings_of
    from cfmask.convert.tarscan import shown_size
    from cfmask.errors import UserError
    from cfmask.runtime.command import exits_cleanly
    from cfmask.runtime.files import remove_leftovers, write_atomically
    from cfmask.runtime.pool import map_in_processes
    from cfmask.runtime.progress import progress_bar
    from launch.arrays.arguments import Array, add_array_arguments, resolve_array
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing}. Activate the environment first: source .venv/bin/activate (to create it: README.md).")


def show(found: Findings) -> None:
    manifest = found.manifest
    for name, problems in found.problems.items():
        what = "; ".join(problem.what for problem in problems)
        remedies = " ".join(dict.fromkeys(problem.remedy for problem in problems))
        print(f"BAD  {Path(manifest.root) / name}: {what}. {remedies}")
    for warning in found.warnings:
        print(f"note {manifest.root}: {warning}")
    bad = len(found.problems.keys() - {""})
    state = "all good" if not found.problems else f"{bad} BAD of them" if bad else "BAD manifest"
    print(
        f"{manifest.root}: {len(manifest.shards)} shards, {state}; {manifest.num_samples} samples, "
        f"{shown_size(manifest.num_bytes)}"
    )


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("sets", nargs="+", metavar="SET", help="folder of a set, or of several")
    p.add_argument(
        "--full", action="store_true", help="read and decode everything (default: sizes, indexes, labels, some headers)"
    )
    p.add_argument("--workers", type=int, metavar="N", help="processes on this machine (default: all cores)")
    p.add_argument("--out", type=Path, metavar="FILE", help="JSON file to write the findings to as well")
    add_array_arguments(p)
    return p


@exits_cleanly
def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    array = resolve_array(args)
    if args.workers is not None and (args.workers < 1 or array):
        raise UserError("--workers must be at least 1, and goes with --cpus-per-task where there is --executor slurm.")
    begun = time.monotonic()
    manifests = {str(m.root): m for given in args.sets for m in find_sets(given)}
    items = [check for manifest in manifests.values() for check in checks_of(manifest, args.full)]
    verdicts = verify(items, array, args.workers or len(os.sched_getaffinity(0)))
    results, at = [], 0
    for manifest in manifests.values():
        results.append(findings_of(manifest, verdicts[at : at + len(manifest.shards)], args.full))
        at += len(manifest.shards)
        show(results[-1])
    good = not any(found.problems for found in results)
    seconds = time.monotonic() - begun
    print(f"{'full' if args.full else 'quick'} check: {'all good' if good else 'BAD'} ({seconds:.0f} s)")
    if args.out:
        report = {
            "good": good,
            "mode": "full" if args.full else "quick",
            "seconds": round(seconds, 1),
            "sets": [as_json(found) for found in results],
        }
        try:
            write_atomically(args.out, json.dumps(report, indent=1).encode())
            remove_leftovers(args.out.parent, f"{args.out.name}.*")
        except OSError as error:
            raise UserError(f"{args.out} cannot be written ({error.strerror}).") from None
    return 0 if good else 1


def verify(items: list[verification.Check], array: Array | None, workers: int) -> list[verification.Verdict]:
    begun, done, bad = time.monotonic(), 0, 0
    with progress_bar(total=len(items), desc="verifying", unit=" shards") as bar:

        def progress(verdict: verification.Verdict) -> None:
            nonlocal done, bad
            done, bad = done + verdict.bytes, bad + bool(verdict.problems)
            rate = f"{done / 1e6 / (time.monotonic() - begun):.0f} MB/s"
            bar.set_postfix_str(rate + (f", {bad} BAD" if bad else ""), refresh=False)
            bar.update()

        preload = ("torch",) if any(item.full for item in items) else ()
        if array is not None:
            from launch.arrays.array import Work, run_array

            work = Work(
                kind="verify",
                identity=json.dumps([(os.path.abspath(item.root), item.shard.name, item.full) for item in items]),
                function=verification.check,
                items=items,
                keys=[f"{number:06d}-{item.shard.name}" for number, item in enumerate(items)],
                preload=preload,
            )
            return run_array(work, array, progress=progress, paths=sorted({item.root for item in items}))
        return map_in_processes(
            verification.check,
            items,
            workers=workers,
            preload=preload,
            describe=lambda item: str(item.root / item.shard.name),
            progress=progress,
        )


if __name__ == "__main__":
    sys.exit(main())
