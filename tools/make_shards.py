#!/usr/bin/env python3
"""Convert images to shards: plain WebDataset tars, an index beside each, one manifest.

    python tools/make_shards.py imagenet --source DIR_OR_TAR --out DIR    ImageNet, as folders or as the official tars
    python tools/make_shards.py folder   --source DIR_OR_TAR --out DIR    any tree of [split/]class/image

    OUT/train/manifest.json  train-000000.tar  train-000000.index.npz  …  plan.json  bad_samples.jsonl
    OUT/val/…

Stopped at any moment, by any signal, the same command goes on with the shards that are missing. Every shard's bytes
follow from the source and the seed alone; how many processes made it, and in how many attempts, leaves no trace.
"""

from __future__ import annotations

import argparse
import errno
import fcntl
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm  # noqa: E402

from cfmask.data import imagenet, plan, shards, sources  # noqa: E402
from cfmask.data.images import decode_as  # noqa: E402
from cfmask.data.process import die_with_parent, ignore_job_signals  # noqa: E402
from cfmask.errors import UserError, exits_cleanly  # noqa: E402
from cfmask.files import write_atomically  # noqa: E402

PLAN = "plan.json"
BAD_SAMPLES = "bad_samples.jsonl"
STORE = "original"

Classes = tuple[tuple[str, str], ...]


# --- the plan: which sample goes where ------------------------------------------------------------------------------


class Sample(NamedTuple):
    key: str
    label: int
    image: sources.LabelledImage


@dataclass(frozen=True)
class Task:
    """One shard to make; everything that a process needs for it."""

    tar: Path
    plan: str
    num_classes: int
    samples: list[Sample]


def plan_split(out: Path, split: str, images: list[sources.LabelledImage], classes: Classes, args) -> list[Task]:
    """The table of samples to shards: a function of the images' names and sizes, the classes and the seed."""
    class_ids = {folder: i for i, (folder, _) in enumerate(classes)}
    keys = unique_keys(images)
    digest = hashlib.sha256(
        json.dumps([shards.VERSION, STORE, split, args.seed, args.samples_per_shard, classes]).encode()
    )
    for image in images:
        digest.update(f"{image.name}\0{image.blob.size}\0{class_ids[image.folder]}\n".encode(errors="surrogateescape"))
    order = plan.permutation(len(images), plan.philox(plan.CONVERSION, args.seed))
    count = -(-len(images) // args.samples_per_shard)
    bounds = [n * len(images) // count for n in range(count + 1)]  # sizes differ by one at most
    return [
        Task(
            tar=out / split / f"{split}-{n:06d}.tar",
            plan=digest.hexdigest(),
            num_classes=len(classes),
            samples=[Sample(keys[i], class_ids[images[i].folder], images[i]) for i in order[bounds[n] : bounds[n + 1]]],
        )
        for n in range(count)
    ]


def unique_keys(images: list[sources.LabelledImage]) -> list[str]:
    """WebDataset keys: folder and file name in characters that are safe in a tar, on any system, and in a key (which
    ends at its first dot). Names that become equal are numbered in order."""
    taken: dict[str, int] = {}
    keys = []
    for image in images:
        stem = image.file.rpartition(".")[0] or image.file
        name = stem if stem.startswith(f"{image.folder}_") else f"{image.folder}_{stem}"
        key = re.sub(r"[^A-Za-z0-9_-]", "_", name)
        if len(key) > 80:  # the tar header has room for 100 bytes, extension included
            key = f"{key[:60]}-{hashlib.sha256(name.encode(errors='surrogateescape')).hexdigest()[:16]}"
        base, number = key, taken.get(key, 0)
        while key in taken:
            number += 1
            key = f"{base}-{number}"
        taken[base] = number
        taken.setdefault(key, 0)
        keys.append(key)
    return keys


def is_made(task: Task) -> bool:
    """Whether a shard of this very plan is there, whole: its index is its commit record."""
    try:
        about = shards.load_index(task.tar).about
        return about["plan"] == task.plan and task.tar.stat().st_size == about["bytes"]
    except (UserError, OSError, KeyError):
        return False


# --- the work -------------------------------------------------------------------------------------------------------


def make_shard(task: Task, report) -> None:
    """Read, check and write the samples of one shard. ``report(images, bytes)`` is called as they pass."""
    about: dict[str, Any] = {"plan": task.plan, "bad": []}

    def samples() -> Iterator[tuple[str, dict[str, bytes]]]:
        for sample in task.samples:
            image = sample.image
            data = image.blob.read()
            report(1, len(data))
            name = image.name.encode(errors="replace").decode()
            try:
                pixels, extension = decode_as(data)
            except UserError as reason:
                about["bad"].append({"name": name, "class": sample.label, "bytes": len(data), "reason": str(reason)})
                continue
            facts = {
                "key": sample.key,
                "wnid": image.folder,
                "class": sample.label,
                "name": name,
                "bytes": len(data),
                "width": pixels.width,
                "height": pixels.height,
            }
            yield sample.key, {extension: data, "cls": str(sample.label).encode(), "json": json.dumps(facts).encode()}

    try:
        shards.write_shard(task.tar, samples(), num_classes=task.num_classes, about=about)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"The disk of {task.tar.parent} is full. Free some space and run the same command again: finished "
                f"shards are kept."
            ) from None
        raise UserError(f"{task.tar} cannot be written ({error.strerror}).") from None


_channel: Any = None


def _start_worker(channel) -> None:
    global _channel
    die_with_parent()
    ignore_job_signals()
    warnings.simplefilter("ignore")  # Pillow warns of odd metadata, image by image
    _channel = channel


def _make_shard_in_worker(task: Task) -> None:
    images = size = 0
    sent = time.monotonic()

    def report(n: int, n_bytes: int) -> None:
        nonlocal images, size, sent
        images, size = images + n, size + n_bytes
        if time.monotonic() - sent > 0.2:
            _channel.put((images, size))
            images, size, sent = 0, 0, time.monotonic()

    make_shard(task, report)
    _channel.put((images, size))


def make_all(tasks: list[Task], workers: int, report) -> None:
    """Make the shards in ``workers`` processes; in this one if that is 1.

    Raises:
        UserError: the first that a process met. What is finished stays.
    """
    if workers == 1 or len(tasks) <= 1:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for task in tasks:
                make_shard(task, report)
        return
    context = multiprocessing.get_context("spawn")  # the progress bar has a thread: no fork
    channel = context.SimpleQueue()
    with ProcessPoolExecutor(min(workers, len(tasks)), context, _start_worker, (channel,)) as pool:
        try:
            pending = {pool.submit(_make_shard_in_worker, task) for task in tasks}
            while pending:
                done, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
                while not channel.empty():
                    report(*channel.get())
                for future in done:
                    future.result()
            while not channel.empty():
                report(*channel.get())
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.kill()  # at any moment: nothing is there under its final name before it is whole
            if isinstance(error, BrokenProcessPool):
                raise UserError(
                    "A conversion process was killed, most often for lack of memory. Run the same command again, with "
                    "fewer --workers if it happens twice: finished shards are kept."
                ) from None
            raise


# --- one split ------------------------------------------------------------------------------------------------------


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Two conversions must not write into one folder. The lock goes with the process, however it ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "w")
    except OSError as error:
        raise UserError(f"The folder {folder} cannot be written to ({error.strerror}).") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"Another conversion is writing to {folder}. Wait for it, or stop it first.") from None
        yield


def claim(folder: Path, tasks: list[Task], facts: dict[str, Any]) -> None:
    """Write the plan's identity into the folder, or see that it is there already.

    Raises:
        UserError: the folder holds shards of another plan.
    """
    path = folder / PLAN
    remedy = f"Choose another --out, or delete {folder} if nothing there is needed"
    if path.exists():
        try:
            there = json.loads(path.read_text())
            digest = there["plan"]
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise UserError(f"{path} cannot be read ({error!r}). {remedy}.") from None
        if digest != tasks[0].plan:
            before = ", ".join(f"{name} {there.get(name)}" for name in facts)
            now = ", ".join(f"{name} {value}" for name, value in facts.items())
            raise UserError(
                f"{folder} holds shards of another plan: it was begun with {before}; now it is {now}. (A plan also "
                f"changes with the names and sizes of the source's images and with the class list.) {remedy}."
            )
    elif any(folder.glob("*.tar")):
        raise UserError(f"{folder} holds tars that this program did not begin there. {remedy}.")
    else:
        write_atomically(path, json.dumps({"plan": tasks[0].plan, **facts}, indent=1).encode())


def _size(n: int) -> str:
    return f"{n / 1e9:.1f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB"


def progress(**settings) -> tqdm:
    return tqdm(**settings, mininterval=0.1 if sys.stderr.isatty() else 10, dynamic_ncols=True)


def check_space(folder: Path, tasks: list[Task]) -> None:
    """Raises: UserError: what is still to be made does not fit on the disk."""
    # Three headers a sample, data padded to 512, a short .cls and .json: under 5 KB beside the image.
    needed = sum(sample.image.blob.size + 5_000 for task in tasks for sample in task.samples)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"The shards of {folder} need {_size(needed)}, and the disk has {_size(free)} left. Free some space, or "
            f"choose an --out on another disk."
        )


def convert_split(
    out: Path, split: str, images: list[sources.LabelledImage], classes: Classes, ignored: int, args
) -> None:
    """Make what is missing of one split, then its manifest."""
    begun = time.monotonic()
    folder = out / split
    tasks = plan_split(out, split, images, classes, args)
    facts = {
        "source": args.source.name,
        "images": len(images),
        "classes": len(classes),
        "seed": args.seed,
        "samples_per_shard": args.samples_per_shard,
    }
    with sole_writer(folder):
        claim(folder, tasks, facts)
        missing = [task for task in tasks if not is_made(task)]
        check_space(folder, missing)
        to_do = sum(len(task.samples) for task in missing)
        if len(missing) < len(tasks):
            print(f"{split}: {len(tasks) - len(missing)} of {len(tasks)} shards are there already")
        done_bytes = 0
        with progress(
            total=len(images), initial=len(images) - to_do, desc=split, unit=" images", disable=not missing
        ) as bar:

            def report(n: int, n_bytes: int) -> None:
                nonlocal done_bytes
                done_bytes += n_bytes
                bar.set_postfix_str(f"{done_bytes / 1e6 / (time.monotonic() - begun):.1f} MB/s", refresh=False)
                bar.update(n)

            make_all(missing, args.workers, report)
        manifest = commit(
            folder, split, classes, tasks, {"tool": f"make_shards {args.verb}", **facts, "ignored": ignored}
        )
        for leftover in folder.glob(".*.part"):
            leftover.unlink()
    seconds = time.monotonic() - begun
    rate = f", {to_do / seconds:.0f} images/s" if to_do else ""
    print(
        f"{split}: {manifest.num_samples} images of {sum(n > 0 for n in manifest.class_counts)} classes "
        f"(of {manifest.num_classes}), shards: {len(tasks)}, {_size(manifest.num_bytes)} in {folder} "
        f"({seconds:.0f} s{rate})"
    )
    if manifest.bad_samples:
        print(
            f"{split}: {manifest.bad_samples} images do not decode and were left out; {folder / BAD_SAMPLES} lists them"
        )


def commit(folder: Path, split: str, classes: Classes, tasks: list[Task], made: dict[str, Any]) -> shards.Manifest:
    """The list of bad samples and the manifest, from the indexes alone.

    Raises:
        UserError: not one image could be decoded.
    """
    indexes = [shards.load_index(task.tar) for task in tasks]
    bad = sorted((entry for index in indexes for entry in index.about["bad"]), key=lambda entry: entry["name"])
    listed = "".join(json.dumps(entry) + "\n" for entry in bad).encode()
    if bad:
        write_atomically(folder / BAD_SAMPLES, listed)
    else:
        (folder / BAD_SAMPLES).unlink(missing_ok=True)
    manifest = shards.Manifest(
        root=folder,
        split=split,
        store=STORE,
        classes=classes,
        class_counts=shards.class_counts_of(indexes, len(classes)),
        shards=tuple(shards.shard_of_index(task.tar, index) for task, index in zip(tasks, indexes, strict=True)),
        bad_samples=len(bad),
        made={**made, "plan": tasks[0].plan},
    )
    if not manifest.num_samples:
        raise UserError(
            f"None of the {len(bad)} images of the split {split} decodes; {folder / BAD_SAMPLES} has the reasons. Is "
            f"the source what it should be?"
        )
    shards.write_manifest(manifest)
    return manifest


# --- command line ---------------------------------------------------------------------------------------------------


def read_classes(path: Path) -> Classes:
    """A class list: one `folder<TAB>display name` a line, class 0 first.

    Raises:
        UserError: the file is missing, a line has no tab, or a folder is there twice.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The class list {path} cannot be read ({error}).") from None
    classes: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        folder, tab, name = line.partition("\t")
        if not (tab and folder.strip() and name.strip()):
            raise UserError(f"{path}, line {number}: expected a folder, a tab and a display name, got {line!r}.")
        if folder in classes:
            raise UserError(f"{path}, line {number}: the folder {folder!r} has a line before this one.")
        classes[folder] = name.strip()
    if not classes:
        raise UserError(f"The class list {path} is empty.")
    return tuple(classes.items())


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = top.add_subparsers(dest="verb", required=True, metavar="imagenet|folder")
    net = verbs.add_parser("imagenet", help="ImageNet (ILSVRC2012), classes in the order of the 1000 sorted wnids")
    net.add_argument(
        "--split", choices=("train", "val", "all"), default="all", help="which to convert (default: all there are)"
    )
    net.add_argument(
        "--devkit",
        type=Path,
        metavar="FILE",
        help=f"{sources.DEVKIT}: labels of a val set that is not sorted into class folders (default: in --source)",
    )
    tree = verbs.add_parser("folder", help="any tree of [split/]class/image")
    tree.add_argument("--split", metavar="NAME", help="convert this split alone, or name the one that the tree is")
    tree.add_argument(
        "--classes",
        type=Path,
        metavar="FILE",
        help="a line `folder<TAB>display name` a class, class 0 first (default: the folders, sorted)",
    )
    for verb in (net, tree):
        verb.add_argument("--source", type=Path, required=True, metavar="DIR_OR_TAR", help="a tar is read in place")
        verb.add_argument("--out", type=Path, required=True, metavar="DIR", help="gets one folder of shards a split")
        verb.add_argument("--seed", type=int, default=0, help="of the permutation of samples over shards (default: 0)")
        verb.add_argument(
            "--samples-per-shard",
            type=int,
            default=1000,
            metavar="N",
            help="at most (default: 1000, about 110 MB of ImageNet)",
        )
        verb.add_argument(
            "--workers",
            type=int,
            default=len(os.sched_getaffinity(0)),
            metavar="N",
            help="processes (default: all cores)",
        )
    return top


@exits_cleanly
def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    args.source, args.out = args.source.expanduser().absolute(), args.out.expanduser().absolute()
    if args.samples_per_shard < 1 or args.workers < 1:
        raise UserError("--samples-per-shard and --workers must be at least 1.")
    classes: Classes | None = read_classes(args.classes) if args.verb == "folder" and args.classes else None
    with progress(desc="listing the source", unit=" files") as bar:
        if args.verb == "imagenet":
            tree = sources.imagenet_tree(args.source, split=args.split, devkit=args.devkit, tick=bar.update)
            classes = imagenet.classes()
        else:
            tree = sources.folder_tree(args.source, split=args.split, tick=bar.update)
            classes = classes or tuple((folder, folder) for folder in tree.folders)
    if strangers := sorted(set(tree.folders) - {folder for folder, _ in classes}):
        raise UserError(
            f"{args.source} has class folders that {args.classes} does not list: {', '.join(strangers[:5])}"
            f"{' …' if len(strangers) > 5 else ''}. Add them to the list, or move them out of the source."
        )
    if tree.ignored:
        print(f"{len(tree.ignored)} files are no images by their names and stay out, {tree.ignored[0]} for one")
    try:
        for split, images in tree.splits.items():
            convert_split(args.out, split, images, classes, len(tree.ignored), args)
    except KeyboardInterrupt:
        print("\nFinished shards are kept; the same command goes on from here.", file=sys.stderr)
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
