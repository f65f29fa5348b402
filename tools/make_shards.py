#!/usr/bin/env python3
"""Convert images to shards: WebDataset tars with an index each, and a manifest for each set.

    python tools/make_shards.py imagenet --source SOURCE --out DIR      ImageNet: folders, official tars, Kaggle's zip
    python tools/make_shards.py imagenet-v2 --source … --out DIR        also -r, -a, -sketch, and objectnet
    python tools/make_shards.py folder --source SOURCE --out DIR        any folders of [split/]class/image
    python tools/make_shards.py folder --source SOURCE --labels FILE    images with labels from a CSV or TSV file

SOURCE is a folder, a tar or zip archive (read in place), or Parquet files in the layout of the Hugging Face hub
(unpacked once below OUT/.unpacked).

    OUT/train/manifest.json  train-000000.tar  train-000000.index.safetensors  …  plan.json  bad_samples.jsonl
    OUT/holdout/…  OUT/val/…  OUT/imagenet-v2/…

If it is interrupted, the same command makes the missing shards. The bytes of every shard depend on the source and the
seed alone, not on the number of processes, jobs or attempts.

Treatment of problems in a source. Except for errors, bad_samples.jsonl has a line for each problem with its treatment,
and bad_samples in the manifest is the number of images that were left out.

    image that does not decode, is truncated, claims an absurd
    size (decompression bomb), or is 100 times as long as wide      left out
    TIFF of float, signed or 32-bit samples, whose black and white
    are unknown                                                     left out
    CMYK, greyscale, palette, alpha                                 read as RGB
    16-bit, 12-bit                                                  scaled to 8 bits
    several pictures in one file (animations, pages)                the first one is read
    EXIF orientation                                                not applied
    TIFF orientation                                                applied
    extension contradicts the content                               stored under the extension of the content
    names that give the same key                                    a number is added to the key
    class folder without an image                                   the class has no images
    dangling link, named pipe or device                             left out
    links to images in folders and archives                         followed
    names without an image extension, hidden files, archives in
    the source, ImageNet's test set                                 skipped, counted by reason and extension
    Parquet row without a label (null or -1)                        skipped, counted
    Parquet row without image bytes                                 left out
    known set with other numbers of images or classes               error; kept with --allow-count-mismatch, and noted
                                                                    in the manifest
    folder that is not a class; duplicate name in a class; link to
    a missing folder                                                error before anything is written
    archive that is truncated or has data after its end, or that
    has sparse or encrypted files                                   error before anything is written
    contradictory labels of an image; class names that differ in
    case or accents alone; two folders of one split                 error before anything is written
    missing or duplicate Parquet file; labels without class names   error before anything is written
    source that changes or cannot be read                           error; finished shards are kept
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

try:
    from cfmask.convert.arguments import add_sets, check_arguments, request_of
    from cfmask.convert.collection import Request, collect
    from cfmask.convert.conversion import (
        Run,
        check_space,
        convert_split,
        free_space,
        plan_all,
        to_unpack,
        unpack_first,
    )
    from cfmask.convert.tarscan import shown_size
    from cfmask.convert.unpacking import remove_unpacked
    from cfmask.runtime.command import exits_cleanly
    from cfmask.runtime.pool import map_in_processes
    from launch.arrays.arguments import Array, add_array_arguments, resolve_array
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing}. Activate the environment first: source .venv/bin/activate (to create it: README.md).")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    for verb in add_sets(top.add_subparsers(dest="verb", required=True, metavar="SET")):
        add_array_arguments(verb)
    return top


def on_this_machine(workers: int | None) -> Run:
    """Run in processes of this machine, by default one per core."""

    def run(*, kind, identity, function, items, describe, preload, progress):
        workers_ = workers or len(os.sched_getaffinity(0))
        map_in_processes(function, items, workers=workers_, preload=preload, describe=describe, progress=progress)

    return run


def on_slurm(array: Array, request: Request) -> Run:
    """Run in a job array. Ctrl-C leaves it in the queue."""
    from launch.arrays.array import Work, run_array

    def run(*, kind, identity, function, items, describe, preload, progress):
        keys = [Path(describe(item)).stem for item in items]
        work = Work(kind=kind, identity=identity, function=function, items=items, keys=keys, preload=preload)
        run_array(work, array, progress=progress, paths=[request.out, request.source], survives_interrupt=True)

    return run


@exits_cleanly
def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    check_arguments(args)
    array = resolve_array(args)
    request = request_of(args)
    found = collect(request)
    for line in found.tree.stays_out.lines():
        print(line)
    splits = plan_all(found, request)
    if args.dry_run:
        for split in splits:
            total = sum(task.num_bytes for task in split.tasks)
            print(
                f"{split.name}: {split.made['images']} images, {len(split.tasks)} shards, about {shown_size(total)} in "
                f"{split.folder}"
            )
        if files := to_unpack(splits):
            print(
                f"Before that, {len(files)} Parquet files are unpacked: about "
                f"{shown_size(sum(file.num_bytes for file in files))} in {files[0].record.parent}, removed at the end"
            )
    check_space(request.out, splits)
    if args.dry_run:
        print(f"The disk has {shown_size(free_space(request.out))} left. Nothing was written.")
        return 0
    run = on_this_machine(args.workers) if array is None else on_slurm(array, request)
    try:
        splits = unpack_first(splits, request, run)
        for split in splits:
            convert_split(split, request, run)
        remove_unpacked(found.unpack)
    except KeyboardInterrupt:
        print("\nFinished shards are kept. The same command makes the missing ones.", file=sys.stderr)
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
