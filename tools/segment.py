#!/usr/bin/env python3
"""Segment the images of a set with Mask2Former: where is the dog, the cat, the bird? For tools/validate_masks.py.

    python tools/segment.py --shards DIR --set train --out masks
    python tools/segment.py --shards DIR --set train --out masks --executor slurm --array 16

    OUT/train/manifest.json  train-000000.tar  train-000000.index.safetensors  …  plan.json

The masks are shards as images are: one mask an image of the groups' classes, a PNG of the image's own size under the
image's key, white where the model sees the category that the class belongs to. One shard of masks is made of one of
images; stopped at any moment, by any signal, the same command goes on with those that are missing.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import io
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

from cfmask.data import images, shards  # noqa: E402
from cfmask.data.segmentation import MADE_BY, categories, class_groups, facts_of  # noqa: E402
from cfmask.data.shards import Manifest, ShardReader, load_sets  # noqa: E402
from cfmask.errors import UserError, exits_cleanly  # noqa: E402
from cfmask.files import sole_writer  # noqa: E402
from tools._array import add_array_arguments, resolve_array, run_array, run_here  # noqa: E402
from tools._segmenter import DEFAULT, Segmenter, category_labels, read_config  # noqa: E402
from tools._shared import DATA_HELP, add_device_argument  # noqa: E402
from tools.make_shards import claim, progress  # noqa: E402


@dataclass(frozen=True)
class Task:
    """One shard of masks to make; everything that a process needs for it.

    ids: samples of the set. labels: COCO's name of what each class id's samples show.
    """

    tar: Path
    plan: str
    where: str
    set: str
    ids: tuple[int, ...]
    labels: tuple[str, ...]
    segmenter: str
    device: str
    batch_size: int


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    arguments = parser().parse_args(argv)
    for flag in ("batch_size", "workers"):
        if (value := getattr(arguments, flag)) is not None and value < 1:
            raise UserError(f"--{flag.replace('_', '-')} must be at least 1.")
    array = resolve_array(arguments)
    if array is not None and arguments.workers:
        raise UserError("--workers would do nothing with --executor slurm: --gpus-per-task says how many there are.")
    [manifest] = load_sets(_absolute(arguments.shards), [arguments.set]).values()
    tasks, facts = plan(manifest, arguments)
    folder = arguments.out.absolute() / arguments.set
    with sole_writer(folder):
        claim(folder, tasks[0].plan, facts)
        missing = [task for task in tasks if not is_made(task)]
        total, to_do = (sum(len(task.ids) for task in some) for some in (tasks, missing))
        if len(missing) < len(tasks):
            print(f"{arguments.set}: {len(tasks) - len(missing)} of {len(tasks)} shards are there already")
        with progress(total=total, initial=total - to_do, desc=arguments.set, unit=" images") as bar:
            if array is not None and missing:
                run_array(segment_shard, missing, array, name="segment", resumes=True, progress=bar.update)
            elif missing:
                workers = arguments.workers or max(1, torch.cuda.device_count() if arguments.device == "cuda" else 1)
                preload = ("tools.segment", "transformers.models.mask2former.modeling_mask2former")
                run_here(segment_shard, missing, workers=workers, preload=preload, progress=bar.update)
        made = commit(folder, manifest, tasks, facts)
    empty = made.made["without_object"]
    print(f"{arguments.set}: {made.num_samples} masks, {empty} of them without a pixel of the object, in {folder}")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("--shards", required=True, metavar="DIR_OR_URL", help=DATA_HELP)
    p.add_argument("--set", default="train", metavar="SET", help="folder under --shards (default: train)")
    p.add_argument(
        "--groups",
        nargs="+",
        metavar="GROUP",
        help="classes whose images are segmented: dog, cat, bird (ImageNet's 118, 5 and 21), all, or a class of the "
        "set by folder or display name, if COCO has it (default: those of the first three that the set has)",
    )
    p.add_argument(
        "--segmenter",
        default=DEFAULT,
        metavar="NAME_OR_DIR",
        help=f"a Mask2Former of Hugging Face's, or a folder with its files (default: {DEFAULT})",
    )
    p.add_argument("--batch-size", type=int, default=4, metavar="N", help="images at a time (default: 4)")
    add_device_argument(p)
    p.add_argument("--workers", type=int, metavar="N", help="processes on this machine (default: one a GPU)")
    add_array_arguments(p, gpus=True)
    p.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder that gets a folder of masks, named as the set"
    )
    return p


def _absolute(where: str) -> str:
    return where if "://" in where or where.startswith("pipe:") else str(Path(where).absolute())


def plan(manifest: Manifest, arguments: argparse.Namespace) -> tuple[list[Task], dict[str, Any]]:
    """A task for each shard with images to segment, and the facts that decide them.

    Raises:
        UserError: the model cannot be had, does not know a category, or there is nothing to segment.
    """
    groups = class_groups(manifest.classes, arguments.groups)
    wanted = sorted(frozenset().union(*groups.values()))
    config = read_config(arguments.segmenter)
    known, names = category_labels(config), categories(manifest.classes)
    if strangers := sorted({names[i] for i in wanted} - known.keys()):
        raise UserError(
            f"{arguments.segmenter} does not know {', '.join(strangers[:5])}{' …' if len(strangers) > 5 else ''}: it "
            f"segments {', '.join(sorted(known)[:12])} …. Choose --groups whose classes it knows."
        )
    # Of the configuration, what the weights were made for; not, say, the version of the program that read it.
    described = {key: value for key, value in config.to_dict().items() if key not in ("transformers_version", "dtype")}
    facts: dict[str, Any] = {
        "of": manifest.digest,
        "groups": sorted(groups),
        "segmenter": Path(arguments.segmenter).name,
        "segmenter_digest": hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()[
            :16
        ],
    }
    identity = hashlib.sha256(json.dumps([shards.VERSION, facts, wanted]).encode()).hexdigest()
    first = 0
    tasks = []
    for shard in manifest.shards:
        rows = np.flatnonzero(np.isin(manifest.open_index(shard).labels, wanted))
        if len(rows):
            tasks.append(
                Task(
                    tar=arguments.out.absolute() / arguments.set / shard.name,
                    plan=identity,
                    where=_absolute(arguments.shards),
                    set=arguments.set,
                    ids=tuple((first + rows).tolist()),
                    labels=tuple(names),
                    segmenter=arguments.segmenter,
                    device=arguments.device,
                    batch_size=arguments.batch_size,
                )
            )
        first += shard.samples
    if not tasks:
        raise UserError(f"{manifest.root} has no image of {', '.join(groups)}.")
    return tasks, facts


def is_made(task: Task) -> bool:
    about = shards.vouched_for(task.tar)
    return about is not None and about.get("plan") == task.plan


# --- one shard ------------------------------------------------------------------------------------------------------


def segment_shard(task: Task) -> int:
    """Segment the images of one shard, unless it is done. How many they were.

    Raises:
        UserError: an image cannot be read, or the shard cannot be written.
    """
    if not is_made(task):
        about: dict[str, Any] = {"plan": task.plan, "without_object": 0}
        try:
            shards.write_shard(task.tar, _samples(task, about), about=about)
        except OSError as error:
            raise UserError(f"{task.tar} cannot be written ({error.strerror}).") from None
    return len(task.ids)


def _samples(task: Task, about: dict[str, Any]) -> Iterator[tuple[str, int, dict[str, bytes]]]:
    segmenter = _segmenter(task.segmenter, task.device)
    with ShardReader(_manifest(task.where, task.set)) as reader:
        for begin in range(0, len(task.ids), task.batch_size):
            batch = [reader.read(i) for i in task.ids[begin : begin + task.batch_size]]
            pixels = [_pixels(sample) for sample in batch]
            names = [task.labels[sample["__label__"]] for sample in batch]
            for sample, name, mask in zip(batch, names, segmenter.masks(pixels, names), strict=True):
                about["without_object"] += not mask.any()
                facts = {
                    "key": sample["__key__"],
                    "class": sample["__label__"],
                    "category": name,
                    "name": facts_of(sample).get("name", ""),
                    "width": mask.shape[1],
                    "height": mask.shape[0],
                }
                members = {
                    "png": _png(mask),
                    "cls": str(sample["__label__"]).encode(),
                    "json": json.dumps(facts).encode(),
                }
                yield sample["__key__"], sample["__label__"], members


def _pixels(sample: dict[str, Any]) -> np.ndarray:
    """(H, W, 3) uint8 of the stored image."""
    extension = next((name for name in sample if name in images.MEMBERS), None)
    if extension is None:
        raise UserError(f"Sample {sample['__key__']} of shard {sample['__url__']} has no image among its members.")
    if extension == images.RAW:
        return np.load(io.BytesIO(sample[extension]), allow_pickle=False).transpose(1, 2, 0)
    try:
        return images.decode(sample[extension]).permute(1, 2, 0).numpy()
    except UserError as reason:
        raise UserError(f"Sample {sample['__key__']} of shard {sample['__url__']} cannot be used: {reason}.") from None


def _png(mask: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8) * 255).convert("1").save(buffer, format="PNG")
    return buffer.getvalue()


@functools.cache
def _manifest(where: str, name: str) -> Manifest:
    [manifest] = load_sets(where, [name], check_files=False).values()
    return manifest


@functools.cache
def _segmenter(name: str, device: str) -> Segmenter:
    """One a process. Processes share the GPUs of a machine out among them, or its cores."""
    number = _process_number()
    if number is not None:
        torch.set_num_threads(1)
        if device == "cuda":
            device = f"cuda:{number % torch.cuda.device_count()}"
    return Segmenter(name, device)


def _process_number() -> int | None:
    """From 0 among the processes that run_here started; None in a process that it did not."""
    import multiprocessing

    identity = multiprocessing.current_process()._identity  # type: ignore[attr-defined]
    return identity[-1] - 1 if identity else None


# --- the set --------------------------------------------------------------------------------------------------------


def commit(folder: Path, of: Manifest, tasks: list[Task], facts: dict[str, Any]) -> Manifest:
    """The manifest, from the indexes alone."""
    entries, indexes = zip(*(shards.shard_and_index(task.tar) for task in tasks), strict=True)
    manifest = Manifest(
        root=folder,
        split=folder.name,
        store=images.ORIGINAL,
        classes=of.classes,
        class_counts=shards.class_counts_of(indexes, of.num_classes),
        shards=entries,
        made={
            "tool": MADE_BY,
            **facts,
            "without_object": sum(index.about["without_object"] for index in indexes),
            "plan": tasks[0].plan,
        },
    )
    shards.write_manifest(manifest)
    for leftover in folder.glob(".*.part"):  # of writers that were killed
        leftover.unlink(missing_ok=True)
    return manifest


if __name__ == "__main__":
    sys.exit(main())
