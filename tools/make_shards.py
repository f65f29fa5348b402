#!/usr/bin/env python3
"""Convert images to shards: plain WebDataset tars, an index beside each, and a manifest for each set.

    python tools/make_shards.py imagenet --source SOURCE --out DIR      ImageNet: folders, official tars, Kaggle's zip
    python tools/make_shards.py imagenet-v2 --source … --out DIR        also -r, -a, -sketch, and objectnet
    python tools/make_shards.py folder --source SOURCE --out DIR        any tree of [split/]class/image
    python tools/make_shards.py folder --source SOURCE --labels FILE    images and labels named in a CSV or TSV file

SOURCE is a folder; a tar or zip archive, which is read in place; or Parquet files as on the Hugging Face hub, which are
unpacked once below OUT/.unpacked.

    OUT/train/manifest.json  train-000000.tar  train-000000.index.safetensors  …  plan.json  bad_samples.jsonl
    OUT/holdout/…  OUT/val/…  OUT/imagenet-v2/…

After any interruption, the same command makes the missing shards. The bytes of every shard depend on the source and the
seed alone, not on the number of processes, jobs or attempts.

What happens to images and sources with an issue. All issues except errors are listed in bad_samples.jsonl, a line each,
with the policy in the right column; the manifest's bad_samples counts the images that were left out.

    does not decode, is truncated, claims an absurd size (a
    decompression bomb), or one side is more than a hundred times
    the other                                                       left out
    TIFF of floats, signed or 32-bit samples, which do not define
    black and white                                                 left out
    an image that is a dangling link, a named pipe or a device;
    a row of a Parquet file without the bytes of its image          left out
    CMYK, greyscale, palette, alpha                                 kept, read as RGB
    16-bit, 12-bit                                                  kept, scaled to 8 bits
    several pictures in one file (animations, pages)                kept, the first one
    EXIF orientation                                                kept, orientation not applied
    TIFF orientation                                                kept, orientation applied
    extension contradicts the content                               kept, under the extension of its content
    names that make the same key                                    kept, its key numbered
    class folder without an image                                   class has no images
    files not named like images, hidden files, archives inside the
    source, ImageNet's test set, rows of Parquet files without a
    label (null or -1)                                              ignored, counted by reason and suffix
    links to images in folders and archives                         followed
    a known set with other numbers of images or classes             error before any work; --allow-count-mismatch keeps
                                                                    it, and the manifest records it
    a folder that is not a class; a name twice in a class; a link
    to a missing folder                                             error before any work
    an archive that is truncated or has data after its end, or
    with sparse or encrypted files                                  error before any work
    labels of one image that contradict each other; classes whose
    names differ only in case or accents, in different splits or
    in a table; two folders of one split (val, validation)          error before any work
    Parquet files of a set that are missing or occur twice; labels
    of unknown classes                                              error before any work
    a source that changes or cannot be read                         error; finished shards are kept
"""

from __future__ import annotations

import argparse
import sys

try:
    from cfmask.convert.arguments import add_sets, check_arguments, request_of
    from cfmask.convert.collection import collect
    from cfmask.convert.conversion import check_space, convert_split, free_space, plan_all, to_unpack, unpack_first
    from cfmask.convert.sources.unpacking import remove_unpacked
    from cfmask.runtime.command import CommandParser, exits_cleanly
    from cfmask.runtime.throughput import format_bytes
    from launch.arrays.arguments import add_array_arguments, resolve_array
    from launch.arrays.run import check_with_slurm, runner
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing}. Activate the environment first: source .venv/bin/activate (to create it: README.md).")


def parser() -> argparse.ArgumentParser:
    top = CommandParser(__doc__)
    for verb in add_sets(top.add_subparsers(dest="verb", required=True, metavar="SET")):
        add_array_arguments(verb)
    return top


@exits_cleanly
def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    check_arguments(args)
    array = resolve_array(args)
    check_with_slurm(None if args.dry_run else array)
    request = request_of(args)
    found = collect(request)
    for line in found.ignored.lines():
        print(line)
    splits = plan_all(found, request)
    if args.dry_run:
        for split in splits:
            size = format_bytes(sum(task.num_bytes for task in split.tasks))
            print(
                f"{split.name}: {split.made['images']} images, {len(split.tasks)} shards, "
                f"about {size} in {split.folder}"
            )
        if files := to_unpack(splits):
            size = format_bytes(sum(file.num_bytes for file in files))
            print(
                f"Before that, {len(files)} Parquet files are unpacked: about {size} in {files[0].record.parent}, "
                f"removed at the end"
            )
    check_space(request.out, splits)
    if args.dry_run:
        print(f"The disk has {format_bytes(free_space(request.out))} left. Nothing was written.")
        return 0
    run = runner(array, workers=args.workers, paths=[request.out, request.source], survives_interrupt=True)
    try:
        splits = unpack_first(splits, request, run)
        for split in splits:
            convert_split(split, run, f"make_shards {request.kind}")
        remove_unpacked(found.unpack)
    except KeyboardInterrupt:
        print("\nFinished shards are kept; the same command makes the missing ones.", file=sys.stderr)
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
