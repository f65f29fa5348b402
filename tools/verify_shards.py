#!/usr/bin/env python3
"""Verify sets of shards against their manifests and indexes.

    python tools/verify_shards.py shards             every set in the folder, quick: sizes, counts, indexes, every
                                                     label, end marks, a few headers of each tar; reads no images
    python tools/verify_shards.py shards/val --full  reads everything: sha256, every member's CRC, every label;
                                                     decodes every image
    python tools/verify_shards.py shards --full --executor slurm --array 32 --cpus-per-task 8

Prints a line for each bad shard, with the problem and the remedy. Exit status: 0 all shards are good, 1 some are bad, 2
they cannot be verified.
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
    from cfmask.convert.set_verification import SetReport, as_json, checks_of, find_sets, report_on
    from cfmask.errors import UserError
    from cfmask.runtime.command import CommandParser, exits_cleanly
    from cfmask.runtime.files import remove_leftovers, write_atomically
    from cfmask.runtime.throughput import format_bytes, throughput_bar
    from cfmask.runtime.work import Work
    from launch.allocation.data import shards_of_file
    from launch.arrays.arguments import Array, add_array_arguments, resolve_array
    from launch.arrays.run import check_with_slurm, runner
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing}. Activate the environment first: source .venv/bin/activate (to create it: README.md).")


def show(report: SetReport) -> None:
    manifest = report.manifest
    for name, problems in report.problems.items():
        what = "; ".join(problem.what for problem in problems)
        remedies = " ".join(dict.fromkeys(problem.remedy for problem in problems))
        print(f"BAD  {Path(manifest.root) / name}: {what}. {remedies}")
    for warning in report.warnings:
        print(f"note {manifest.root}: {warning}")
    state = "BAD manifest" if report.problems else "all good"
    if report.bad_shards:
        state = f"{report.bad_shards} BAD of them"
    print(
        f"{manifest.root}: {len(manifest.shards)} shards, {state}; {manifest.num_samples} samples, "
        f"{format_bytes(manifest.num_bytes)}"
    )


def parser() -> argparse.ArgumentParser:
    p = CommandParser(__doc__)
    about = "folder of a set, or of several (default: shards of the cluster file)"
    p.add_argument("sets", nargs="*", metavar="SET", help=about)
    p.add_argument(
        "--full", action="store_true", help="read and decode everything (default: sizes, indexes, labels, some headers)"
    )
    p.add_argument("--workers", type=int, metavar="N", help="processes on this machine (default: all cores)")
    p.add_argument("--out", type=Path, metavar="FILE", help="also write the results to this JSON file")
    add_array_arguments(p)
    return p


@exits_cleanly
def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    array = resolve_array(args)
    args.sets = args.sets or [shards_of_file(args.cluster)]
    if args.workers is not None and args.workers < 1:
        raise UserError("--workers must be at least 1.")
    if args.workers and array:
        raise UserError("--workers would do nothing with --executor slurm: --cpus-per-task sets the number there.")
    check_with_slurm(array)
    begun = time.monotonic()
    manifests = {str(m.root): m for given in args.sets for m in find_sets(given)}
    checks = [check for manifest in manifests.values() for check in checks_of(manifest, args.full)]
    verdicts = verify(checks, array, args.workers)
    reports, at = [], 0
    for manifest in manifests.values():
        reports.append(report_on(manifest, verdicts[at : at + len(manifest.shards)], args.full))
        at += len(manifest.shards)
        show(reports[-1])
    good = not any(report.problems for report in reports)
    mode, seconds = "full" if args.full else "quick", time.monotonic() - begun
    print(f"{mode} check: {'all good' if good else 'BAD'} ({seconds:.0f} s)")
    if args.out:
        results = {"good": good, "mode": mode, "seconds": round(seconds, 1), "sets": list(map(as_json, reports))}
        try:
            write_atomically(args.out, json.dumps(results, indent=1).encode())
            remove_leftovers(args.out.parent, f"{args.out.name}.*")
        except OSError as error:
            raise UserError(f"{args.out} cannot be written ({error.strerror}).") from None
    return 0 if good else 1


def verify(checks: list[verification.Check], array: Array | None, workers: int | None) -> list[verification.Verdict]:
    work = Work(
        kind="verify",
        identity=json.dumps([(os.path.abspath(check.root), check.shard.name, check.full) for check in checks]),
        function=verification.check,
        items=checks,
        keys=[f"{number:06d}-{check.shard.name}" for number, check in enumerate(checks)],
        preload=("torch",) if any(check.full for check in checks) else (),
        describe=lambda check: str(check.root / check.shard.name),
    )
    bad = 0
    with throughput_bar(total=len(checks), desc="verifying", unit=" shards") as advance:

        def progress(verdict: verification.Verdict) -> None:
            nonlocal bad
            bad += bool(verdict.problems)
            advance(1, verdict.bytes, f", {bad} BAD" if bad else "")

        return runner(array, workers=workers, paths=sorted({check.root for check in checks}))(work, progress)


if __name__ == "__main__":
    sys.exit(main())
