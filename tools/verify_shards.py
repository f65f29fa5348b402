#!/usr/bin/env python3
"""See whether sets of shards are what they were when they were made.

    python tools/verify_shards.py shards             every set in the folder, quick: sizes, counts, indexes, labels'
                                                     histogram, end marks, a few headers of each tar; reads no images
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
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cfmask.convert import verification  # noqa: E402
from cfmask.convert.tarscan import shown_size  # noqa: E402
from cfmask.data import remote  # noqa: E402
from cfmask.data.shards import MANIFEST, Manifest, load_manifest  # noqa: E402
from cfmask.errors import UserError, exits_cleanly  # noqa: E402
from cfmask.files import remove_leftovers, write_atomically  # noqa: E402
from cfmask.runtime.pool import map_in_processes  # noqa: E402
from cfmask.runtime.progress import progress_bar  # noqa: E402
from launch.jobs.array_arguments import Array, add_array_arguments, resolve_array  # noqa: E402


@dataclass
class Findings:
    """What was found out about a set. problems: by shard's name, "" for those of the set itself."""

    manifest: Manifest
    problems: dict[str, list[verification.Problem]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def find_sets(given: str) -> list[Manifest]:
    """The set that ``given`` is, or all those in it.

    Raises:
        UserError: there is none, one of them has no manifest or a damaged one, or it is a URL.
    """
    if remote.is_remote(given):
        raise UserError(f"{given} is a URL, and shards are verified where their files are: run this there.")
    folder = Path(given).expanduser().absolute()
    if folder.is_dir() and not (folder / MANIFEST).exists():
        children = [child for child in sorted(folder.iterdir()) if child.is_dir()]
        # A child with tars and no manifest is a conversion that was not finished: loading it says so.
        if sets := [child for child in children if (child / MANIFEST).exists() or any(child.glob("*.tar"))]:
            return [load_manifest(child, check_files=False) for child in sets]
    return [load_manifest(folder, check_files=False)]


def checks_of(manifest: Manifest, full: bool) -> list[verification.Check]:
    root = Path(manifest.root)
    foreign = manifest.made.get("tool") == "index_shards"
    return [
        verification.Check(
            root=root,
            shard=shard,
            store=manifest.store,
            image_size=manifest.image_size,
            num_classes=manifest.num_classes,
            label_from=manifest.made["label_from"] if foreign else "",
            label_field=manifest.made["label_field"] if foreign else "class",
            foreign=foreign,
            full=full,
        )
        for shard in manifest.shards
    ]


def findings_of(manifest: Manifest, verdicts: list[verification.Verdict], full: bool) -> Findings:
    """Put a set's verdicts together, with what only the whole set can tell."""
    found = Findings(manifest, {verdict.name: list(verdict.problems) for verdict in verdicts if verdict.problems})
    if all(verdict.class_counts or not manifest.num_classes for verdict in verdicts):
        counts = [sum(of_class) for of_class in zip(*(verdict.class_counts for verdict in verdicts), strict=True)]
        wrong = [
            i for i, (ours, theirs) in enumerate(zip(counts, manifest.class_counts, strict=True)) if ours != theirs
        ]
        if wrong:
            what = (
                f"the manifest's class histogram is not that of the indexes, for {len(wrong)} classes: of class "
                f"{wrong[0]} there are {counts[wrong[0]]} samples, not {manifest.class_counts[wrong[0]]}"
            )
            remedy = "Delete the manifest and run the conversion (or tools/index_shards.py) again: it writes it anew."
            found.problems[""] = [verification.Problem("histogram", what, remedy)]
    names = {shard.name for shard in manifest.shards}
    for extra in sorted({path.name for path in Path(manifest.root).glob("*.tar")} - names):
        found.warnings.append(f"{extra} is not in the manifest: nobody reads it. Is it of another set?")
    if full and any(not shard.sha256 for shard in manifest.shards):
        found.warnings.append(
            "it was indexed without --checksums: bytes that changed, and still decode, are not found. "
            "`python tools/index_shards.py … --checksums` makes a record from now on."
        )
    return found


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


def as_json(found: Findings) -> dict:
    manifest = found.manifest
    return {
        "set": str(manifest.root),
        "shards": len(manifest.shards),
        "samples": manifest.num_samples,
        "bytes": manifest.num_bytes,
        "bad_shards": len(found.problems.keys() - {""}),
        "problems": [
            {"shard": name, **asdict(problem)} for name, problems in found.problems.items() for problem in problems
        ],
        "warnings": found.warnings,
    }


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("sets", nargs="+", metavar="SET", help="folder of a set, or of several")
    mode = p.add_mutually_exclusive_group()
    mode.add_argument("--quick", action="store_true", help="read headers and indexes (default)")
    mode.add_argument("--full", action="store_true", help="read and decode everything")
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
            from launch.jobs.array import Work, run_array

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
