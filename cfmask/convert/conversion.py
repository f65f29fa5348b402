"""A source becomes sets of shards: what is missing of each split is made, then its manifest."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from cfmask.convert import shard_writer
from cfmask.convert.collection import Collection, Request, collect
from cfmask.convert.planning import ShardTask, Store, claim, is_made, plan_split
from cfmask.convert.sources.files import why_absent
from cfmask.convert.sources.objectnet import NO_OVERLAP
from cfmask.convert.tarscan import shown_size
from cfmask.convert.unpacking import Unpack, pending, unpack
from cfmask.convert.writing import LEFT_OUT, NO_IMAGES, STAYS_OUT, make_shard, preload
from cfmask.data import images, shards
from cfmask.errors import UserError
from cfmask.runtime.files import remove_leftovers, sole_writer, write_atomically
from cfmask.runtime.output import printable
from cfmask.runtime.progress import progress_bar

logger = logging.getLogger(__name__)

BAD_SAMPLES = "bad_samples.jsonl"


@dataclass(frozen=True)
class Split:
    """A set to be made. made: facts of how, for the manifest; they begin with what identifies the plan to people."""

    folder: Path
    tasks: list[ShardTask]
    found: Collection
    made: dict[str, Any]

    @property
    def name(self) -> str:
        return self.folder.name


def plan_all(found: Collection, request: Request) -> list[Split]:
    size = request.image_size or 224
    store = Store(request.store, None if request.store == images.ORIGINAL else size, found.border)
    splits = []
    for name, of_split in found.tree.splits.items():
        folder = request.out / name
        facts = {
            "source": request.source.name,
            "images": len(of_split),
            "classes": len(found.classes),
            "store": store.name,
            "image_size": store.image_size,
            "seed": request.seed,
            "samples_per_shard": request.samples_per_shard,
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
            seed=request.seed,
            samples_per_shard=request.samples_per_shard,
        )
        splits.append(Split(folder, tasks, found, facts))
    return splits


def to_unpack(splits: list[Split]) -> list[Unpack]:
    """What has to be unpacked next, if anything, before the missing shards can be made."""
    missing = (task for split in splits for task in split.tasks if not is_made(task))
    return pending(splits[0].found.unpack, lambda: (sample.image.blob.path for t in missing for sample in t.samples))


class Run(Protocol):
    """Applies a function to items, in processes of this machine or in the tasks of a job array.

    kind, identity: as those of ``launch.arrays.array.Work``. describe: path of what becomes of an item; their stems
    differ. progress: gets each result, (images, bytes).
    """

    def __call__(
        self,
        *,
        kind: str,
        identity: str,
        function: Callable[[Any], tuple[int, int]],
        items: Sequence[Any],
        describe: Callable[[Any], str],
        preload: tuple[str, ...],
        progress: Callable[[tuple[int, int]], object],
    ) -> object: ...


def unpack_first(splits: list[Split], request: Request, run: Run) -> list[Split]:
    """Unpack what is needed. Returns: the splits as they are planned then."""
    while files := to_unpack(splits):
        with progress_bar(total=sum(file.rows for file in files), desc="unpacking", unit=" images") as bar:
            run(
                kind="unpack",
                identity=f"{request.source} {request.out}",
                function=unpack,
                items=files,
                describe=lambda file: str(file.record),
                preload=(),
                progress=lambda done: bar.update(done[0]),
            )
        splits = plan_all(collect(request), request)
    return splits


def check_space(out: Path, splits: list[Split]) -> None:
    """Raises: UserError: what is still to be made does not fit on the disk."""
    needed = sum(task.num_bytes for split in splits for task in split.tasks if not is_made(task))
    unpacked = sum(file.num_bytes for file in to_unpack(splits))
    needed += unpacked
    free = free_space(out)
    if needed > free:
        raise UserError(
            f"The shards {'and the unpacked images ' if unpacked else ''}in {out} need about {shown_size(needed)}, and "
            f"the disk has {shown_size(free)} left. Free some space, or choose an --out on another disk."
        )


def free_space(folder: Path) -> int:
    """Bytes that a folder, which need not exist yet, can take."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def convert_split(split: Split, request: Request, run: Run) -> None:
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
            logger.info(f"{name}: {len(tasks) - len(missing)} of {len(tasks)} shards are there already")
        done_bytes = 0
        with progress_bar(total=total, initial=total - to_do, desc=name, unit=" images", disable=not missing) as bar:

            def report(made: tuple[int, int]) -> None:
                nonlocal done_bytes
                n, n_bytes = made
                done_bytes += n_bytes
                bar.set_postfix_str(f"{done_bytes / 1e6 / (time.monotonic() - begun):.1f} MB/s", refresh=False)
                bar.update(n)

            run(
                kind="shards",
                identity=f"{folder}{tasks[0].plan}",
                function=make_shard,
                items=missing,
                describe=lambda task: str(task.tar),
                preload=preload(missing),
                progress=report,
            )
        manifest, kept = commit(split, request)
        remove_leftovers(folder)
    seconds = time.monotonic() - begun
    rate = f", {to_do / seconds:.0f} images/s" if to_do else ""
    logger.info(
        f"{name}: {manifest.num_samples} images of {sum(n > 0 for n in manifest.class_counts)} classes "
        f"(of {manifest.num_classes}), shards: {len(tasks)}, {shown_size(manifest.num_bytes)} in {folder} "
        f"({seconds:.0f} s{rate})"
    )
    if manifest.bad_samples or kept:
        logger.info(
            f"{name}: {manifest.bad_samples} images were left out because they have no bytes or do not decode, {kept} "
            f"other oddities were dealt with; {folder / BAD_SAMPLES} lists them all"
        )


def commit(split: Split, request: Request) -> tuple[shards.Manifest, int]:
    """The list of bad samples and the manifest, from the plan and the indexes alone.

    Returns:
        The manifest, and how many issues there are beside images that were left out and files that stay out.

    Raises:
        UserError: not one image could be decoded.
    """
    found, folder, tree = split.found, split.folder, split.found.tree
    entries, indexes = zip(*(shard_writer.shard_and_index(task.tar) for task in split.tasks), strict=True)
    issues: list[dict[str, Any]] = [
        {"name": f"{empty}/", "class": found.class_ids.get(empty), "issue": "no image in it", "policy": NO_IMAGES}
        for empty in tree.empty.get(split.name, [])
    ]
    absent: list[dict[str, Any]] = [
        {
            "name": printable(image.name),
            "class": found.class_ids[image.folder],
            "bytes": 0,
            "issue": why_absent(image),
            "policy": LEFT_OUT,
        }
        for image in tree.absent.get(split.name, [])
    ]
    issues += sorted(
        [*absent, *(issue for index in indexes for issue in index.about["issues"])],
        key=lambda issue: (issue["name"], issue["issue"]),
    )
    bad = sum(issue["policy"] == LEFT_OUT for issue in issues)
    kept = len(issues) - bad
    issues += [{**issue, "name": printable(issue["name"]), "policy": STAYS_OUT} for issue in tree.stays_out.issues()]
    if issues:
        write_atomically(folder / BAD_SAMPLES, "".join(json.dumps(issue) + "\n" for issue in issues))
    else:
        (folder / BAD_SAMPLES).unlink(missing_ok=True)
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
        class_counts=shard_writer.class_counts_of(indexes, len(found.classes)),
        shards=entries,
        bad_samples=bad,
        made={
            "tool": f"make_shards {request.kind}",
            **split.made,
            "ignored": tree.stays_out.count() - tree.stays_out.count(NO_OVERLAP),
            "plan": split.tasks[0].plan,
        },
    )
    shards.write_manifest(manifest)
    return manifest, kept
