"""Turns a source into sets of shards: makes the missing shards of each split, then its manifest."""

from __future__ import annotations

import json
import logging
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfmask.convert import shard_writer
from cfmask.convert.collection import collect
from cfmask.convert.planning import ShardTask, Store, claim, is_made, plan_split, work_on_missing
from cfmask.convert.request import Request
from cfmask.convert.sources.files import SourceImages, why_absent
from cfmask.convert.sources.objectnet import NO_OVERLAP
from cfmask.convert.sources.unpacking import UnpackTask, pending, unpack
from cfmask.convert.writing import IGNORED, LEFT_OUT, NO_IMAGES, make_shard, preload
from cfmask.data import images, shards
from cfmask.errors import UserError
from cfmask.runtime.files import remove_leftovers, sole_writer
from cfmask.runtime.output import printable
from cfmask.runtime.progress import progress_bar
from cfmask.runtime.throughput import format_bytes, throughput_bar
from cfmask.runtime.work import Run, Work

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Split:
    """A set to make.

    folder: of the set; its name is the split's.
    tasks: its shards.
    found: the source's images.
    made: facts for the manifest, beginning with those that describe the plan.
    """

    folder: Path
    tasks: list[ShardTask]
    found: SourceImages
    made: dict[str, Any]

    @property
    def name(self) -> str:
        return self.folder.name

    def missing(self) -> list[ShardTask]:
        return [task for task in self.tasks if not is_made(task.tar, task.plan)]


def plan_all(found: SourceImages, request: Request) -> list[Split]:
    size = request.image_size or 224
    store = Store(request.store, None if request.store == images.ORIGINAL else size, found.border)
    splits = []
    for name, of_split in found.splits.items():
        facts = {
            "source": request.source.name,
            "images": len(of_split),
            "classes": len(found.classes),
            "store": store.name,
            "image_size": store.image_size,
            "seed": request.seed,
            "samples_per_shard": request.samples_per_shard,
            **found.facts,
        }
        if name in found.count_mismatch:
            facts["count_mismatch"] = found.count_mismatch[name]
        splits.append(Split(request.out / name, plan_split(name, found, store, request), found, facts))
    return splits


def to_unpack(splits: list[Split]) -> list[UnpackTask]:
    """Parquet files to unpack next, before the missing shards can be made."""
    needed = (sample.image.blob.path for split in splits for task in split.missing() for sample in task.samples)
    return pending(splits[0].found.unpack, lambda: needed)


def unpack_first(splits: list[Split], request: Request, run: Run) -> list[Split]:
    """Unpack what is needed. Returns: the splits, planned again with exact sizes."""
    while tasks := to_unpack(splits):
        work = Work(
            kind="unpack",
            # All files of these splits, not only the pending ones: the same command has to find its array again.
            identity=json.dumps([str(task.record) for task in splits[0].found.unpack]),
            function=unpack,
            items=tasks,
            keys=[task.record.stem for task in tasks],
            describe=lambda task: str(task.record),
        )
        with progress_bar(total=sum(task.rows for task in tasks), desc="unpacking", unit=" images") as bar:
            run(work, lambda done: bar.update(done[0]))
        splits = plan_all(collect(request), request)
    return splits


def check_space(out: Path, splits: list[Split]) -> None:
    """Raises: UserError: the missing shards do not fit on the disk."""
    unpacked = sum(task.num_bytes for task in to_unpack(splits))
    needed = unpacked + sum(task.num_bytes for split in splits for task in split.missing())
    free = free_space(out)
    if needed > free:
        raise UserError(
            f"The shards {'and the unpacked images ' if unpacked else ''}in {out} need about {format_bytes(needed)}, "
            f"but the disk has only {format_bytes(free)} left. Free some space, or choose an --out on another disk."
        )


def free_space(folder: Path) -> int:
    """Free bytes for a folder, which need not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def convert_split(split: Split, run: Run, tool: str) -> None:
    """Make the missing shards of one split, then its manifest. tool: for the manifest."""
    begun = time.monotonic()
    folder, name, tasks = split.folder, split.name, split.tasks
    # Tasks of a Slurm array do not take the lock. Two that make the same shard do no harm: each writes the same bytes
    # to a temporary file of its own, then renames it.
    with sole_writer(folder):
        claim(folder, tasks[0].plan, split.made)
        work = work_on_missing("shards", tasks, make_shard, preload(tasks))
        total, to_do = (sum(len(task.samples) for task in some) for some in (tasks, work.items))
        with throughput_bar(
            total=total, initial=total - to_do, desc=name, unit=" images", disable=not work.items
        ) as advance:
            run(work, lambda made: advance(*made))
        manifest, kept = commit(split, tool)
        remove_leftovers(folder)
    seconds = time.monotonic() - begun
    rate = f", {to_do / seconds:.0f} images/s" if to_do else ""
    logger.info(
        f"{name}: {manifest.num_samples} images of {sum(n > 0 for n in manifest.class_counts)} classes "
        f"(of {manifest.num_classes}), shards: {len(tasks)}, {format_bytes(manifest.num_bytes)} in {folder} "
        f"({seconds:.0f} s{rate})"
    )
    if manifest.bad_samples or kept:
        logger.info(
            f"{name}: {manifest.bad_samples} images were left out because they have no bytes or do not decode; there "
            f"are {kept} other issues. All are listed in {folder / shard_writer.BAD_SAMPLES}"
        )


def commit(split: Split, tool: str) -> tuple[shards.Manifest, int]:
    """Write the list of issues and the manifest, from the plan and the indexes alone.

    Returns:
        The manifest, and the number of issues other than images left out and ignored files.
    """
    found, folder = split.found, split.folder
    entries, indexes = zip(*(shard_writer.shard_and_index(task.tar) for task in split.tasks), strict=True)
    empty: list[dict[str, Any]] = [
        {"name": f"{name}/", "class": found.class_ids.get(name), "issue": "no image in it", "policy": NO_IMAGES}
        for name in found.empty.get(split.name, [])
    ]
    issues: list[dict[str, Any]] = [
        {
            "name": printable(image.name),
            "class": found.class_ids[image.folder],
            "bytes": 0,
            "issue": why_absent(image),
            "policy": LEFT_OUT,
        }
        for image in found.absent.get(split.name, [])
    ]
    issues += [issue for index in indexes for issue in index.about["issues"]]
    issues = empty + sorted(issues, key=lambda issue: (issue["name"], issue["issue"]))
    left_out = sum(issue["policy"] == LEFT_OUT for issue in issues)
    kept = len(issues) - left_out
    issues += [{**issue, "name": printable(issue["name"]), "policy": IGNORED} for issue in found.ignored.issues()]
    shard_writer.write_bad_samples(folder, issues)
    if not any(entry.samples for entry in entries):
        raise UserError(
            f"None of the {left_out} images of the split {split.name} can be decoded; "
            f"{folder / shard_writer.BAD_SAMPLES} lists the reasons. Is this the right source?"
        )
    store = split.tasks[0].store
    manifest = shards.Manifest(
        root=folder,
        split=split.name,
        store=store.name,
        image_size=store.image_size,
        border=0 if store.image_size else store.border,
        accepted=found.accepted,
        classes=found.classes,
        class_counts=shard_writer.class_counts_of(indexes, len(found.classes)),
        shards=entries,
        bad_samples=left_out,
        made={
            "tool": tool,
            **split.made,
            "ignored": found.ignored.count() - found.ignored.count(NO_OVERLAP),
            "plan": split.tasks[0].plan,
        },
    )
    shards.write_manifest(manifest)
    return manifest, kept
