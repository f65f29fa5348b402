"""Masks of a set's images by Mask2Former, as shards: one shard of masks for each shard of images."""

from __future__ import annotations

import functools
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from cfmask.convert import shard_writer
from cfmask.convert.mask2former import Segmenter, category_labels, read_config
from cfmask.convert.planning import is_made
from cfmask.data import images, shards
from cfmask.data.segmentation import MADE_BY, categories, class_groups
from cfmask.data.segmented import facts_of, samples_of_classes
from cfmask.data.shard_reader import ShardReader
from cfmask.data.shards import Manifest, load_sets
from cfmask.errors import UserError
from cfmask.runtime.files import remove_leftovers
from cfmask.runtime.pool import worker_number


@dataclass(frozen=True)
class MaskTask:
    """A shard of masks to make, with everything that a process needs for it.

    where: folder or URL of the sets.
    set: name of the set of images.
    ids: of the samples to segment.
    categories: COCO's category of each class id.
    segmenter: name of a Mask2Former on the hub, or its folder.
    """

    tar: Path
    plan: str
    where: str
    set: str
    ids: tuple[int, ...]
    categories: tuple[str, ...]
    segmenter: str
    device: str
    batch_size: int


def plan_masks(
    manifest: Manifest,
    *,
    source: str,
    groups: Sequence[str] | None,
    segmenter: str,
    device: str,
    batch_size: int,
    folder: Path,
) -> tuple[list[MaskTask], dict[str, Any]]:
    """A task for each shard with images to segment, and the facts that the masks depend on.

    Args:
        manifest: of the set ``folder.name`` in ``source``, a folder or URL.
        groups: as in ``class_groups``.
        segmenter: name of a Mask2Former on the hub, or its folder.
        folder: gets the masks.
    """
    of_group = class_groups(manifest.classes, groups)
    wanted = sorted(frozenset().union(*of_group.values()))
    config = read_config(segmenter)
    known, names = category_labels(config), categories(manifest.classes)
    if unknown := sorted({names[i] for i in wanted} - known.keys()):
        raise UserError(
            f"{segmenter} does not know {', '.join(unknown[:5])}{' …' if len(unknown) > 5 else ''}: it "
            f"segments {', '.join(sorted(known)[:12])} …. Choose --groups whose classes it knows."
        )
    # The configuration that belongs to the weights, without the version of the library that read it.
    described = {key: value for key, value in config.to_dict().items() if key not in ("transformers_version", "dtype")}
    facts: dict[str, Any] = {
        "of": manifest.digest,
        "groups": sorted(of_group),
        "segmenter": Path(segmenter).name,
        "segmenter_digest": _digest(json.dumps(described, sort_keys=True, default=str))[:16],
    }
    identity = _digest(json.dumps([shards.VERSION, facts, wanted]))
    tasks = [
        MaskTask(
            tar=folder / shard.name,
            plan=identity,
            where=source,
            set=folder.name,
            ids=tuple(ids),
            categories=tuple(names),
            segmenter=segmenter,
            device=device,
            batch_size=batch_size,
        )
        for shard, ids in samples_of_classes(manifest, wanted)
    ]
    if not tasks:
        raise UserError(f"{manifest.root} has no image of {', '.join(of_group)}.")
    return tasks, facts


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# --- one shard ------------------------------------------------------------------------------------------------------


def segment_shard(task: MaskTask) -> int:
    """Segment the images of one shard, unless its masks exist; return their number."""
    if not is_made(task.tar, task.plan):
        about: dict[str, Any] = {"plan": task.plan, "without_object": 0}
        try:
            shard_writer.write_shard(task.tar, _samples(task, about), about=about)
        except OSError as error:
            raise UserError(f"{task.tar} cannot be written ({error.strerror}).") from None
    return len(task.ids)


def _samples(task: MaskTask, about: dict[str, Any]) -> Iterator[tuple[str, int, dict[str, bytes]]]:
    segmenter = _segmenter(task.segmenter, task.device)
    with ShardReader(_manifest(task.where, task.set)) as reader:
        for begin in range(0, len(task.ids), task.batch_size):
            batch = [reader.read(i) for i in task.ids[begin : begin + task.batch_size]]
            pixels = [_pixels(sample) for sample in batch]
            names = [task.categories[sample["__label__"]] for sample in batch]
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
    """One for each process. The processes are distributed over the machine's GPUs, or its cores."""
    number = worker_number()
    if number is not None:
        torch.set_num_threads(1)
        if device == "cuda":
            device = f"cuda:{number % torch.cuda.device_count()}"
    return Segmenter(name, device)


# --- the set --------------------------------------------------------------------------------------------------------


def commit_masks(folder: Path, of: Manifest, tasks: list[MaskTask], facts: dict[str, Any]) -> Manifest:
    """Write the manifest, from the indexes alone."""
    entries, indexes = zip(*(shard_writer.shard_and_index(task.tar) for task in tasks), strict=True)
    manifest = Manifest(
        root=folder,
        split=folder.name,
        store=images.ORIGINAL,
        classes=of.classes,
        class_counts=shard_writer.class_counts_of(indexes, of.num_classes),
        shards=entries,
        made={
            "tool": MADE_BY,
            **facts,
            "without_object": sum(index.about["without_object"] for index in indexes),
            "plan": tasks[0].plan,
        },
    )
    shards.write_manifest(manifest)
    remove_leftovers(folder)
    return manifest
