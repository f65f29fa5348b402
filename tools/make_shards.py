#!/usr/bin/env python3
"""Convert images to shards: plain WebDataset tars, an index beside each, one manifest a set.

    python tools/make_shards.py imagenet --source SOURCE --out DIR      ImageNet: folders, official tars, Kaggle's zip
    python tools/make_shards.py imagenet-v2 --source … --out DIR        also -r, -a, -sketch, and objectnet
    python tools/make_shards.py folder --source SOURCE --out DIR        any tree of [split/]class/image
    python tools/make_shards.py folder --source SOURCE --labels FILE    images and labels that a CSV or TSV file names

SOURCE is a folder, or a tar or zip archive, which is read in place, or Parquet files as the Hugging Face hub has them,
which are unpacked once below OUT/.unpacked.

    OUT/train/manifest.json  train-000000.tar  train-000000.index.safetensors  …  plan.json  bad_samples.jsonl
    OUT/holdout/…  OUT/val/…  OUT/imagenet-v2/…

Stopped at any moment, by any signal, the same command makes the shards that are missing. Every shard's bytes
follow from the source and the seed alone; how many processes or jobs made it, and in how many attempts, leaves no
trace.

What is done with a source that is not as it should be. All but errors are listed in bad_samples.jsonl, a line an issue
with its policy; the manifest's bad_samples counts the images that were left out.

    does not decode, is truncated, claims an absurd size (a
    decompression bomb), or has sides that differ by more than a
    hundred times                                                   left out
    TIFF of floats, signed or 32-bit samples: nothing says which
    value is black and which white                                  left out
    CMYK, greyscale, palette, alpha                                 kept, read as RGB
    16-bit, 12-bit                                                  kept, scaled to 8 bits
    several pictures in one file (animations, pages)                kept, the first one
    EXIF orientation                                                kept, orientation not applied
    TIFF orientation                                                kept, orientation applied
    extension contradicts the content                               kept, under the extension of its content
    names that make the same key                                    kept, its key numbered
    class folder without an image                                   class has no images
    an image that is a dangling link, a named pipe or a device      left out
    links to images in folders and archives                         followed
    files that are no images by their names, hidden files,
    archives inside the source, ImageNet's test set                 stay out, counted by reason and ending
    a known set with other numbers of images or classes             error first of all; --allow-count-mismatch: kept,
                                                                    and the manifest says so
    a folder that is no class; one name twice in a class; a link
    to a folder that is not there                                   error first of all
    an archive that was cut or goes on after its end, sparse or
    encrypted files in it                                           error first of all
    labels of one image that contradict each other; classes whose
    names differ in case or accents alone, in other splits or in a
    table; two folders that are one split (val, validation)         error first of all
    rows of Parquet files without a label (null or -1)              stay out, counted
    rows without the bytes of their image                           left out
    a set of which a Parquet file is missing or there twice; labels
    whose classes nothing names                                     error first of all
    a source that changes or cannot be read                         error; finished shards are kept
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
    """In processes of this machine, by default one a core."""

    def run(*, kind, identity, function, items, describe, preload, progress):
        workers_ = workers or len(os.sched_getaffinity(0))
        map_in_processes(function, items, workers=workers_, preload=preload, describe=describe, progress=progress)

    return run


def on_slurm(array: Array, request: Request) -> Run:
    """In a job array. Ctrl-C leaves it in the queue."""
    from launch.arrays.array import Work, run_array

    def run(*, kind, identity, function, items, describe, preload, progress):
        keys = [Path(describe(item)).stem for item in items]
        work = Work(kind=kind, identity=identity, function=function, items=items, keys=keys, preload=preload)
        run_array(work, array, progress=progress, paths=[request.out, request.source], goes_on=True)

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
        print("\nFinished shards are kept; the same command makes those that are missing.", file=sys.stderr)
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
