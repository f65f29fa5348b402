#!/usr/bin/env python3
"""Convert images to shards: plain WebDataset tars, an index beside each, one manifest a set.

    python tools/make_shards.py imagenet --source DIR_OR_TAR --out DIR    ImageNet, as folders or as the official tars
    python tools/make_shards.py imagenet-v2 --source … --out DIR          also -r, -a, -sketch, and objectnet
    python tools/make_shards.py folder --source DIR_OR_TAR --out DIR      any tree of [split/]class/image

    OUT/train/manifest.json  train-000000.tar  train-000000.index.safetensors  …  plan.json  bad_samples.jsonl
    OUT/holdout/…  OUT/val/…  OUT/imagenet-v2/…

Stopped at any moment, by any signal, the same command makes the shards that are missing. Every shard's bytes
follow from the source and the seed alone; how many processes or jobs made it, and in how many attempts, leaves no
trace.

What is done with a source that is not as it should be. All but errors are listed in bad_samples.jsonl, a line an issue
with its policy; the manifest's bad_samples counts the images that were left out.

    does not decode, is truncated, is a decompression bomb, or has
    sides that differ by more than a hundred times                  left out
    CMYK, greyscale, 16-bit, palette, alpha                         kept, read as RGB
    EXIF orientation                                                kept, orientation not applied
    extension contradicts the content                               kept, under the extension of its content
    names that make the same key                                    kept, its key numbered
    class folder without an image                                   class has no images
    a known set with other numbers of images or classes             error first of all; --allow-count-mismatch: kept,
                                                                    and the manifest says so
    a folder that is no class; one name twice in a class            error first of all
    a source that changes or cannot be read, a tar that was cut     error; finished shards are kept
    files that are no images by their names                         stay out, counted
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cfmask.convert.collection import Request, collect  # noqa: E402
from cfmask.convert.conversion import MakeAll, Split, check_space, convert_split, free_space, plan_all  # noqa: E402
from cfmask.convert.planning import Task, is_made  # noqa: E402
from cfmask.convert.sources.imagenet import DEVKIT  # noqa: E402
from cfmask.convert.tarscan import shown_size  # noqa: E402
from cfmask.convert.writing import make_all, make_shard, preload  # noqa: E402
from cfmask.data import benchmarks, images  # noqa: E402
from cfmask.errors import UserError, exits_cleanly  # noqa: E402
from launch.jobs.array_arguments import Array, add_array_arguments, resolve_array  # noqa: E402

_SHIFTED_WITH_WNIDS = [b.name for b in benchmarks.SHIFTED if b is not benchmarks.OBJECTNET]


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    verbs = top.add_subparsers(dest="verb", required=True, metavar="SET")

    def verb(name: str, about: str) -> argparse.ArgumentParser:
        return verbs.add_parser(name, help=about, description=about, allow_abbrev=False)

    net = verb("imagenet", "ImageNet (ILSVRC2012), classes in the order of the 1000 sorted wnids")
    net.add_argument(
        "--split", choices=("train", "val", "all"), default="all", help="which to convert (default: all there are)"
    )
    net.add_argument(
        "--devkit",
        type=Path,
        metavar="FILE",
        help=f"{DEVKIT}: labels of a val set that is not sorted into class folders (default: in --source)",
    )
    known = [net, verb("imagenet-v2", "ImageNet-V2, matched frequency; folders are class numbers or wnids")]
    for name in _SHIFTED_WITH_WNIDS:
        if name != benchmarks.IMAGENET_V2.name:
            known.append(verb(name, f"ImageNet-{name.rpartition('-')[2].title()}; a folder a wnid"))
    objects = verb("objectnet", "the part of ObjectNet that overlaps with ImageNet, from the unpacked archive")
    objects.add_argument(
        "--mappings", type=Path, metavar="DIR", help="ObjectNet's mapping files (default: in --source or beside it)"
    )
    objects.add_argument(
        "--border-removed",
        action="store_true",
        help="this copy's red border has been removed (default: 2 pixels are cut off each side, here for crops, by the "
        "reader for originals)",
    )
    known.append(objects)
    tree = verb("folder", "any tree of [split/]class/image")
    tree.add_argument("--split", metavar="NAME", help="convert this split alone, or name the one that the tree is")
    tree.add_argument(
        "--classes",
        type=Path,
        metavar="FILE",
        help="a line `folder<TAB>display name` a class, class 0 first (default: the folders, sorted)",
    )
    for p in known:
        p.add_argument(
            "--allow-count-mismatch",
            action="store_true",
            help="convert a copy that has not the set's images or classes; the manifest says so",
        )
    for p in (net, tree):
        p.add_argument(
            "--holdout",
            type=int,
            metavar="N",
            help="take N images out of train, stratified by class, into a set `holdout` (the paper's: 10240)",
        )
    for p in (*known, tree):
        add_common_arguments(p)
    return top


def add_common_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--source",
        type=Path,
        required=True,
        metavar="DIR_OR_TAR",
        help="folder of images, or a tar, which is read in place",
    )
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder that gets a folder of shards a set")
    p.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the order of samples, and of --holdout (default: 0)"
    )
    p.add_argument(
        "--samples-per-shard",
        type=int,
        default=1000,
        metavar="N",
        help="at most so many (default: 1000, about 110 MB of ImageNet)",
    )
    p.add_argument(
        "--store",
        choices=images.STORES,
        default=images.ORIGINAL,
        help="original: the source's bytes; crop-jpeg, crop-raw: the recipe's centre crop, made once; raw ones are "
        "bitwise identical and need no decoder (default: original)",
    )
    p.add_argument("--image-size", type=int, metavar="S", help="side of the crops of a crop store (default: 224)")
    p.add_argument("--dry-run", action="store_true", help="say what would be made and how large it is; write nothing")
    p.add_argument("--workers", type=int, metavar="N", help="processes on this machine (default: all cores)")
    add_array_arguments(p)


def check_arguments(args: argparse.Namespace) -> None:
    """Raises: UserError: values that are too small, or flags that would do nothing."""
    for flag in ("samples_per_shard", "workers", "image_size"):
        if (value := getattr(args, flag)) is not None and value < 1:
            raise UserError(f"--{flag.replace('_', '-')} must be at least 1.")
    if args.image_size and args.store == images.ORIGINAL:
        raise UserError(
            "--image-size is the side of the crops of a crop store, and --store original keeps images as they are: "
            "leave it out, or choose --store crop-jpeg or crop-raw."
        )
    if args.executor == "slurm" and args.workers:
        raise UserError("--workers would do nothing with --executor slurm: --cpus-per-task says how many there are.")


def request_of(args: argparse.Namespace) -> Request:
    given = {field.name: getattr(args, field.name) for field in fields(Request) if hasattr(args, field.name)}
    for name in ("source", "out"):
        given[name] = given[name].expanduser().absolute()
    if args.verb == "imagenet" and args.split == "all":
        given["split"] = None
    return Request(kind=args.verb, **given)


def on_this_machine(workers: int | None) -> MakeAll:
    """Make shards in processes of this machine, by default one a core."""
    return lambda _, tasks, report: make_all(tasks, workers=workers or len(os.sched_getaffinity(0)), progress=report)


def on_slurm(array: Array, source: Path) -> MakeAll:
    """Make shards in a job array. Ctrl-C leaves it in the queue."""
    from launch.jobs.array import Work, run_array

    def make(split: Split, tasks: list[Task], report: Callable[[tuple[int, int]], object]) -> None:
        work = Work(
            kind="shards",
            identity=f"{split.folder}{tasks[0].plan}",
            function=make_shard,
            items=tasks,
            keys=[task.tar.stem for task in tasks],
            preload=preload(tasks),
        )
        run_array(work, array, progress=report, paths=[split.folder, source], goes_on=True)

    return make


@exits_cleanly
def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    check_arguments(args)
    array = resolve_array(args)
    request = request_of(args)
    found = collect(request)
    if ignored := found.tree.ignored:
        print(f"{len(ignored)} files are no images by their names and stay out, {ignored[0]} for one")
    if left_out := found.facts.get("left_out_by_design"):
        print(f"{left_out} images are in folders that do not overlap with ImageNet, and stay out")
    splits = plan_all(found, request)
    if args.dry_run:
        for split in splits:
            total = sum(task.num_bytes for task in split.tasks)
            print(
                f"{split.name}: {split.made['images']} images, {len(split.tasks)} shards, about {shown_size(total)} in "
                f"{split.folder}"
            )
    check_space(request.out, [task for split in splits for task in split.tasks if not is_made(task)])
    if args.dry_run:
        print(f"The disk has {shown_size(free_space(request.out))} left. Nothing was written.")
        return 0
    make = on_this_machine(args.workers) if array is None else on_slurm(array, request.source)
    try:
        for split in splits:
            convert_split(split, request, make)
    except KeyboardInterrupt:
        print("\nFinished shards are kept; the same command makes those that are missing.", file=sys.stderr)
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
