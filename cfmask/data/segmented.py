"""Samples with the masks of their objects: from a set of shards, or the photographs of COCO annotations."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from cfmask.data import images
from cfmask.data.coco import CocoImage, CocoMasks
from cfmask.data.filetree import FileTree
from cfmask.data.mask_files import Mask, shown_size
from cfmask.data.segmentation import Classes, Masks, categories
from cfmask.data.shard_reader import ShardReader
from cfmask.data.shards import Manifest, Shard
from cfmask.errors import UserError

_T = TypeVar("_T")
_CHUNK = 256


@dataclass(frozen=True)
class Segmented:
    """A sample and its mask."""

    key: str
    """Of the sample in its set."""
    classes: tuple[int, ...]
    """Its class id; several if only its COCO category is known."""
    image: Tensor
    """(3, S, S) uint8."""
    mask: Tensor | None
    """(S, S) bool; None for a sample without a mask."""


@dataclass(frozen=True)
class Chunk:
    """Consecutive samples whose results are recorded together."""

    name: str
    """Unique in the set."""
    place: str
    """Path of the samples, for messages."""
    ids: Sequence[int]


class SegmentedSet(Protocol):
    """Samples with masks."""

    where: str
    """Folder or URL of the images."""
    digest: str
    """A hash that changes with images or masks."""
    classes: Classes
    """Of the model."""
    chunks: list[Chunk]
    left_out: list[str]
    """Images that are annotated but missing."""
    note: str
    """A remark for readers of the results, or ""."""

    def samples(self, ids: Sequence[int]) -> Iterator[Segmented]:
        """Samples in the order of ``ids``. Raises UserError if a sample or its mask cannot be used."""
        ...


def _in_order(read: Callable[[int], _T], ids: Sequence[int], threads: int) -> Iterator[_T]:
    """``read`` of each id, in order, by threads that work ahead; with 0 threads, on request."""
    if threads == 0:
        yield from map(read, ids)
        return
    with ThreadPoolExecutor(threads, thread_name_prefix="cfmask-masks") as pool:
        under_way: deque[Future[_T]] = deque()
        try:
            for sample_id in ids:
                under_way.append(pool.submit(read, sample_id))
                if len(under_way) > 8 * threads:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


# --- shards -----------------------------------------------------------------------------------------------------------


class SegmentedShards:
    """The samples of certain classes in a set of shards.

    Args:
        wanted: class ids.
        image_size: side of the crop.
        threads: number of threads that read and decode; 0 reads in the caller's thread.

    Raises:
        UserError: the set has no sample of these classes.
    """

    def __init__(
        self, manifest: Manifest, masks: Masks, *, wanted: frozenset[int], image_size: int, threads: int
    ) -> None:
        self.where = str(manifest.root)
        self.classes: Classes = manifest.classes
        self.digest = hashlib.sha256(f"{manifest.digest} {masks.digest()}".encode()).hexdigest()
        self.left_out: list[str] = []
        self.note = ""
        self.chunks: list[Chunk] = []
        for shard, ids in samples_of_classes(manifest, wanted):
            self.chunks.append(Chunk(shard.name, str(manifest.place(shard)), ids))
        if not self.chunks:
            names = ", ".join(manifest.classes[i][1] for i in sorted(wanted)[:5])
            raise UserError(f"{manifest.root} has no sample of {names}{', …' if len(wanted) > 5 else ''}.")
        self._manifest, self._masks, self._size, self._threads = manifest, masks, image_size, threads
        self._category = categories(manifest.classes).__getitem__

    def samples(self, ids: Sequence[int]) -> Iterator[Segmented]:
        return segmented_samples(
            self._manifest,
            ids,
            self._masks,
            image_size=self._size,
            category=self._category,
            threads=self._threads,
        )


def samples_of_classes(manifest: Manifest, wanted: Collection[int]) -> Iterator[tuple[Shard, list[int]]]:
    """The ids of the samples of certain classes, by shard; without shards that have none."""
    first = 0
    for shard in manifest.shards:
        rows = np.flatnonzero(np.isin(manifest.open_index(shard).labels, sorted(wanted)))
        if len(rows):
            yield shard, (first + rows).tolist()
        first += shard.samples


def segmented_samples(
    manifest: Manifest,
    ids: Sequence[int],
    masks: Masks,
    *,
    image_size: int,
    category: Callable[[int], str],
    threads: int,
) -> Iterator[Segmented]:
    """Samples of a set with their masks, in the order of ``ids``.

    Args:
        category: returns COCO's category of a class id.
        threads: as in ``SegmentedShards``.

    Raises:
        UserError: a sample or its mask cannot be read, or the mask has another size than the image.
    """
    with ShardReader(manifest) as reader:

        def read(sample_id: int) -> Segmented:
            sample = reader.read(sample_id)
            key, label = sample["__key__"], sample["__label__"]
            extension = next((name for name in sample if name in images.MEMBERS), None)
            if extension is None:
                raise UserError(f"Sample {key} of shard {sample['__url__']} has no image among its members.")
            about = facts_of(sample)
            try:
                image = images.pixels(sample[extension], extension, image_size, border=manifest.border)
            except UserError as reason:
                raise UserError(f"Sample {key} of shard {sample['__url__']} cannot be used: {reason}.") from None
            mask = masks.read(key, about.get("name", ""), category(label))
            if mask is None:
                return Segmented(key, (label,), image, None)
            _check_size(mask, sample, extension, about, manifest, image_size)
            if manifest.border and not manifest.image_size:
                mask = mask[manifest.border : -manifest.border, manifest.border : -manifest.border]
            return Segmented(key, (label,), image, images.crop_mask(torch.from_numpy(mask.copy()), image_size))

        yield from _in_order(read, ids, threads)


def facts_of(sample: Mapping[str, Any]) -> dict[str, Any]:
    """The facts that make_shards wrote beside an image (name, width, height …); {} for shards of other programs."""
    try:
        facts = json.loads(bytes(sample.get("json", b"{}")))
    except ValueError:
        return {}
    known = isinstance(facts, dict) and isinstance(facts.get("name"), str) and {"width", "height"} <= facts.keys()
    return facts if known else {}


def _check_size(
    mask: Mask, sample: Mapping[str, Any], extension: str, about: Mapping[str, Any], manifest: Manifest, size: int
) -> None:
    if about:
        right = (about["height"], about["width"])
    elif manifest.image_size:
        return  # crops of another program: the size of the original is unknown
    else:
        facts = images.inspect(sample[extension])
        right = (facts.height, facts.width)
    # For a crop, a mask of the crop is accepted too.
    if mask.shape != right and not (manifest.image_size and mask.shape == (size, size)):
        raise UserError(
            f"The mask of sample {sample['__key__']} has {shown_size(mask.shape)} pixels, and its original image has "
            f"{shown_size(right)}. It must be the mask of this image before any resizing."
        )


# --- COCO's photographs -----------------------------------------------------------------------------------------------


class SegmentedPhotos:
    """The photographs of COCO annotations that show certain categories: a sample for each photograph and category.

    The annotations have categories (dog) and not classes (Chihuahua), so the ``classes`` of a sample are all classes of
    the model in the category.

    Args:
        photos: folder or zip with the files of the annotations.
        classes: of the model.
        groups: class ids by group. A group has to consist of whole categories.
        allow_missing: leave out photographs that are not in ``photos``.
        image_size: side of the crop.
        threads: as in ``SegmentedShards``.

    Raises:
        UserError: a group that is not made of whole categories, no photograph of the groups, or missing ones.
    """

    def __init__(
        self,
        masks: CocoMasks,
        photos: Path,
        classes: Classes,
        groups: Mapping[str, frozenset[int]],
        *,
        allow_missing: bool,
        image_size: int,
        threads: int,
    ) -> None:
        self.where = str(photos)
        self.classes: Classes = classes
        self._masks, self._tree, self._size, self._threads = masks, FileTree(photos), image_size, threads
        self._members = _members(classes, groups)
        self._samples: list[tuple[CocoImage, str, str]] = []  # image, category, path in the tree
        self.left_out: list[str] = []
        self.note = (
            "The annotations have only categories, so the CAM is that of the model's most probable class in the "
            "category."
        )
        taken: dict[str, CocoImage] = {}
        shown = masks.images_with(self._members)
        for image, category in shown:
            path = self._tree.find(image.file)
            if path is None:
                if image.file not in self.left_out[-1:]:  # the categories of an image follow each other
                    self.left_out.append(image.file)
            elif taken.setdefault(path, image) is not image:
                raise UserError(
                    f"{photos / path} matches two images of the annotations, {taken[path].file} and {image.file}. Give "
                    f"the folder at which the file names of the annotations begin."
                )
            else:
                self._samples.append((image, category, path))
        if not shown:
            raise UserError(f"No image of the annotations shows {', '.join(self._members)}. Choose other --groups.")
        if not self._samples or (self.left_out and not allow_missing):
            number = len({image.file for image, _ in shown})
            raise UserError(
                f"{photos} lacks {len(self.left_out)} of {number} images of {', '.join(self._members)} in the "
                f"annotations, for example {self.left_out[0]}. Give the folder or zip of their photographs (val2017 "
                "for panoptic_val2017.json); file names must match those of the JSON, including folders and case. "
                "--allow-missing-masks leaves out missing images and reports their number."
            )
        count = len(self._samples)
        self.chunks = [
            Chunk(f"samples {first} to {end - 1}", str(photos), range(first, end))
            for first in range(0, count, _CHUNK)
            for end in (min(first + _CHUNK, count),)
        ]
        self.digest = hashlib.sha256(f"{masks.digest()} {self._tree.digest(taken)}".encode()).hexdigest()

    def samples(self, ids: Sequence[int]) -> Iterator[Segmented]:
        return _in_order(self._read, ids, self._threads)

    def _read(self, sample_id: int) -> Segmented:
        image, category, path = self._samples[sample_id]
        shown = self._tree.place / path
        data = self._tree.read(path)
        try:
            pixels = images.decode(data)
            if pixels.shape[1:] != image.size:
                raise UserError(
                    f"it has {shown_size(pixels.shape[1:])} pixels, and {shown_size(image.size)} in the annotations. "
                    "It is another image, or was resized or rotated: use the photographs as they are distributed"
                )
            cropped = images.crop(pixels, self._size)
        except UserError as reason:
            raise UserError(f"{shown} cannot be used: {reason}.") from None
        mask = torch.from_numpy(self._masks.mask(image, category).copy())
        return Segmented(
            f"{image.file} ({category})", self._members[category], cropped, images.crop_mask(mask, self._size)
        )


def _members(classes: Classes, groups: Mapping[str, frozenset[int]]) -> dict[str, tuple[int, ...]]:
    """Class ids by category, for the categories in groups. Raises UserError for a group that has only some classes of a
    category."""
    names = categories(classes)
    found: dict[str, tuple[int, ...]] = {}
    for group, ids in groups.items():
        for category in sorted({names[i] for i in ids}):
            whole = tuple(i for i, name in enumerate(names) if name == category)
            if strangers := [i for i in whole if i not in ids]:
                raise UserError(
                    f"The annotations have the category {category} and not its classes, so the images of the group "
                    f"{group} are unknown: {classes[strangers[0]][1]} is a {category} too. Choose whole categories "
                    f"(--groups {category})."
                )
            found[category] = whole
    return found
