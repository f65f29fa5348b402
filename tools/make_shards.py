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
import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cfmask.convert.planning import (  # noqa: E402
    Classes,
    Store,
    Task,
    claim,
    hold_out,
    is_made,
    plan_split,
    read_classes,
)
from cfmask.convert.writing import LEFT_OUT, NO_IMAGES, make_all, make_shard, preload  # noqa: E402
from cfmask.data import benchmarks, imagenet, images, shards, sources  # noqa: E402
from cfmask.errors import UserError, exits_cleanly  # noqa: E402
from cfmask.files import remove_leftovers, sole_writer, write_atomically  # noqa: E402
from cfmask.runtime.progress import progress_bar  # noqa: E402
from launch.jobs.array_arguments import Array, add_array_arguments, resolve_array  # noqa: E402

BAD_SAMPLES = "bad_samples.jsonl"
_SHIFTED_WITH_WNIDS = [b.name for b in benchmarks.SHIFTED if b is not benchmarks.OBJECTNET]


# --- what is to be converted ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Collection:
    """The images of a source, with what their folders mean.

    class_ids: by class folder. accepted: as the manifest's. facts: for the manifest's ``made``.
    """

    tree: sources.Tree
    classes: Classes
    class_ids: dict[str, int]
    accepted: dict[int, tuple[int, ...]] = field(default_factory=dict)
    border: int = 0
    facts: dict[str, Any] = field(default_factory=dict)


def collect(args: argparse.Namespace) -> Collection:
    """List the source and check it against what is known of the set.

    Raises:
        UserError: nothing to convert, strangers in the source, or counts that deviate.
    """
    listed = read_classes(args.classes) if args.verb == "folder" and args.classes else None
    with progress_bar(desc="listing the source", unit=" files") as bar:
        if args.verb == "folder":
            tree = sources.folder_tree(args.source, split=args.split, tick=bar.update)
            classes = listed or tuple((folder, folder) for folder in tree.folders)
            found = Collection(tree, classes, {folder: i for i, (folder, _) in enumerate(classes)})
        elif args.verb == "imagenet":
            tree = sources.imagenet_tree(args.source, split=args.split, devkit=args.devkit, tick=bar.update)
            found = Collection(tree, imagenet.classes(), {wnid: i for i, wnid in enumerate(imagenet.wnids())})
        elif args.verb == "objectnet":
            objectnet = sources.objectnet_tree(args.source, mappings=args.mappings, tick=bar.update)
            found = Collection(
                objectnet.tree,
                imagenet.classes(),
                {folder: ids[0] for folder, ids in objectnet.class_ids.items()},
                accepted={ids[0]: ids for ids in objectnet.class_ids.values() if len(ids) > 1},
                border=0 if args.border_removed else 2,
                facts={"border_removed_before": args.border_removed, "left_out_by_design": objectnet.left_out},
            )
        else:
            tree, class_ids = sources.benchmark_tree(args.source, args.verb, tick=bar.update)
            found = Collection(tree, imagenet.classes(), class_ids)
    if strangers := sorted(set(found.tree.folders) - set(found.class_ids)):
        raise UserError(
            f"{args.source} has class folders that {args.classes} does not list: {', '.join(strangers[:5])}"
            f"{' …' if len(strangers) > 5 else ''}. Add them to the list, or move them out of the source."
        )
    if args.verb != "folder":
        check_counts(found, args)
    if args.verb in ("imagenet", "folder") and args.holdout is not None:
        take_holdout(found, args)
    return found


def check_counts(found: Collection, args: argparse.Namespace) -> None:
    """Raises: UserError: a set has other numbers of images or classes than a whole copy of it."""
    for split, of_split in found.tree.splits.items():
        expected = benchmarks.BENCHMARKS.get(split)
        if expected is None:
            continue
        by_folder = Counter(image.folder for image in of_split)
        labels = {found.class_ids[folder] for folder in by_folder}
        right = {i for label in labels for i in found.accepted.get(label, (label,))}
        deviations = expected.deviations(by_folder, len(right))
        if deviations and not args.allow_count_mismatch:
            raise UserError(
                f"{args.source} has {'; '.join(deviations)} for the set {split}: it is not a whole copy of it, and "
                f"accuracies on it would not be comparable. Get the missing part or move out what is too much; "
                f"--allow-count-mismatch converts it as it is, and says so in the manifest."
            )
        if deviations:
            print(f"{split}: {'; '.join(deviations)}, as --allow-count-mismatch allows")
            found.facts.setdefault("count_mismatch", {})[split] = deviations


def take_holdout(found: Collection, args: argparse.Namespace) -> None:
    """Move images from the split train to a split holdout."""
    splits = found.tree.splits
    if "train" not in splits or "holdout" in splits:
        raise UserError(
            f"--holdout takes images out of a split called train and makes a split called holdout of them; the source "
            f"has {', '.join(splits)}. Leave --holdout out, or convert the training set with it."
        )
    splits["train"], splits["holdout"] = hold_out(splits["train"], args.holdout, seed=args.seed)
    found.facts["holdout"] = args.holdout


# --- one split ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """A set to be made. made: facts of how, for the manifest; they begin with what identifies the plan to people."""

    folder: Path
    tasks: list[Task]
    found: Collection
    made: dict[str, Any]

    @property
    def name(self) -> str:
        return self.folder.name


def plan_all(found: Collection, args: argparse.Namespace) -> list[Split]:
    size = args.image_size or 224
    store = Store(args.store, None if args.store == images.ORIGINAL else size, found.border)
    splits = []
    for name, of_split in found.tree.splits.items():
        folder = args.out / name
        facts = {
            "source": args.source.name,
            "images": len(of_split),
            "classes": len(found.classes),
            "store": store.name,
            "image_size": store.image_size,
            "seed": args.seed,
            "samples_per_shard": args.samples_per_shard,
            **{key: value for key, value in found.facts.items() if key != "count_mismatch"},
        }
        if name in found.facts.get("count_mismatch", {}):
            facts["count_mismatch"] = found.facts["count_mismatch"][name]
        tasks = plan_split(
            folder,
            of_split,
            classes=found.classes,
            class_ids=found.class_ids,
            store=store,
            seed=args.seed,
            samples_per_shard=args.samples_per_shard,
        )
        splits.append(Split(folder, tasks, found, facts))
    return splits


def _size(n: int) -> str:
    return f"{n / 1e9:.1f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB"


def check_space(out: Path, tasks: list[Task]) -> None:
    """Raises: UserError: what is still to be made does not fit on the disk."""
    needed = sum(task.num_bytes for task in tasks)
    free = free_space(out)
    if needed > free:
        raise UserError(
            f"The shards in {out} need about {_size(needed)}, and the disk has {_size(free)} left. Free some space, or "
            f"choose an --out on another disk."
        )


def free_space(folder: Path) -> int:
    """Bytes that a folder, which need not exist yet, can take."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def convert_split(split: Split, args: argparse.Namespace, array: Array | None) -> None:
    """Make what is missing of one split, then its manifest."""
    begun = time.monotonic()
    folder, name, tasks = split.folder, split.name, split.tasks
    # Jobs of a Slurm array do not take the lock. Two that make one shard write the same bytes aside, under names of
    # their own, and rename: that does no harm.
    with sole_writer(folder):
        claim(folder, tasks[0].plan, split.made)
        missing = [task for task in tasks if not is_made(task)]
        total = sum(len(task.samples) for task in tasks)
        to_do = sum(len(task.samples) for task in missing)
        if len(missing) < len(tasks):
            print(f"{name}: {len(tasks) - len(missing)} of {len(tasks)} shards are there already")
        done_bytes = 0
        with progress_bar(total=total, initial=total - to_do, desc=name, unit=" images", disable=not missing) as bar:

            def report(made: tuple[int, int]) -> None:
                nonlocal done_bytes
                n, n_bytes = made
                done_bytes += n_bytes
                bar.set_postfix_str(f"{done_bytes / 1e6 / (time.monotonic() - begun):.1f} MB/s", refresh=False)
                bar.update(n)

            if array is not None:
                convert_on_slurm(split, missing, array, args.source, report)
            else:
                workers = args.workers or len(os.sched_getaffinity(0))
                make_all(missing, workers=workers, progress=report)
        manifest, kept = commit(split, args)
        remove_leftovers(folder)
    seconds = time.monotonic() - begun
    rate = f", {to_do / seconds:.0f} images/s" if to_do else ""
    print(
        f"{name}: {manifest.num_samples} images of {sum(n > 0 for n in manifest.class_counts)} classes "
        f"(of {manifest.num_classes}), shards: {len(tasks)}, {_size(manifest.num_bytes)} in {folder} "
        f"({seconds:.0f} s{rate})"
    )
    if manifest.bad_samples or kept:
        print(
            f"{name}: {manifest.bad_samples} images were left out because they do not decode, {kept} other oddities "
            f"were dealt with; {folder / BAD_SAMPLES} lists them all"
        )


def convert_on_slurm(
    split: Split, missing: list[Task], array: Array, source: Path, report: Callable[[tuple[int, int]], object]
) -> None:
    """Make the missing shards in a job array. Ctrl-C leaves it in the queue."""
    from launch.jobs.array import Work, run_array

    work = Work(
        kind="shards",
        identity=f"{split.folder}{split.tasks[0].plan}",
        function=make_shard,
        items=missing,
        keys=[task.tar.stem for task in missing],
        preload=preload(missing),
    )
    run_array(work, array, progress=report, paths=[split.folder, source], goes_on=True)


def commit(split: Split, args: argparse.Namespace) -> tuple[shards.Manifest, int]:
    """The list of bad samples and the manifest, from the plan and the indexes alone.

    Returns:
        The manifest, and how many issues there are beside images that were left out.

    Raises:
        UserError: not one image could be decoded.
    """
    found, folder = split.found, split.folder
    entries, indexes = zip(*(shards.shard_and_index(task.tar) for task in split.tasks), strict=True)
    issues = [
        {"name": f"{empty}/", "class": found.class_ids.get(empty), "issue": "no image in it", "policy": NO_IMAGES}
        for empty in found.tree.empty.get(split.name, [])
    ]
    issues += sorted(
        (issue for index in indexes for issue in index.about["issues"]),
        key=lambda issue: (issue["name"], issue["issue"]),
    )
    if issues:
        write_atomically(folder / BAD_SAMPLES, "".join(json.dumps(issue) + "\n" for issue in issues))
    else:
        (folder / BAD_SAMPLES).unlink(missing_ok=True)
    bad = sum(issue["policy"] == LEFT_OUT for issue in issues)
    if not any(entry.samples for entry in entries):
        raise UserError(
            f"None of the {bad} images of the split {split.name} decodes; {folder / BAD_SAMPLES} has the reasons. Is "
            f"the source what it should be?"
        )
    store = split.tasks[0].store
    manifest = shards.Manifest(
        root=folder,
        split=split.name,
        store=store.name,
        image_size=store.image_size,
        border=store.border_left,
        accepted=found.accepted,
        classes=found.classes,
        class_counts=shards.class_counts_of(indexes, len(found.classes)),
        shards=entries,
        bad_samples=bad,
        made={
            "tool": f"make_shards {args.verb}",
            **split.made,
            "ignored": len(found.tree.ignored),
            "plan": split.tasks[0].plan,
        },
    )
    shards.write_manifest(manifest)
    return manifest, len(issues) - bad


# --- command line ---------------------------------------------------------------------------------------------------


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
        help=f"{sources.DEVKIT}: labels of a val set that is not sorted into class folders (default: in --source)",
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


@exits_cleanly
def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    check_arguments(args)
    array = resolve_array(args)
    args.source, args.out = args.source.expanduser().absolute(), args.out.expanduser().absolute()
    found = collect(args)
    if ignored := found.tree.ignored:
        print(f"{len(ignored)} files are no images by their names and stay out, {ignored[0]} for one")
    if left_out := found.facts.get("left_out_by_design"):
        print(f"{left_out} images are in folders that do not overlap with ImageNet, and stay out")
    splits = plan_all(found, args)
    if args.dry_run:
        for split in splits:
            total = sum(task.num_bytes for task in split.tasks)
            print(
                f"{split.name}: {split.made['images']} images, {len(split.tasks)} shards, about {_size(total)} in "
                f"{split.folder}"
            )
    check_space(args.out, [task for split in splits for task in split.tasks if not is_made(task)])
    if args.dry_run:
        print(f"The disk has {_size(free_space(args.out))} left. Nothing was written.")
        return 0
    try:
        for split in splits:
            convert_split(split, args, array)
    except KeyboardInterrupt:
        print("\nFinished shards are kept; the same command makes those that are missing.", file=sys.stderr)
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
