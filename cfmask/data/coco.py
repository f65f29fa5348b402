"""COCO's annotations: panoptic ones as they are distributed, and run-length encoded instances.

    annotations/panoptic_val2017.json       images, categories, and the segments of each image with their categories
    annotations/panoptic_val2017/*.png      segment ids of each image, R + 256 G + 65536 B; 0 is no segment
    annotations/panoptic_val2017.zip        the same PNGs as they are downloaded, read in place

The mask of a category is the union of its segments, including ``iscrowd`` ones (groups outlined as a whole). The JSON
is checked for contradictions, and against the PNGs: an id that only one of them has would be a missed object.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cfmask.data.filetree import FileTree, posix
from cfmask.data.mask_files import Mask, Names, decode_mask, read_json, read_segment_ids, shown_size
from cfmask.errors import UserError
from cfmask.runtime.files import sha256_of

_MIXED = (
    "The PNGs and the JSON are not from the same download, or the PNGs were converted. Use both from the same source."
)


@dataclass(frozen=True)
class CocoImage:
    """An image of the annotations."""

    file: str
    """File name."""
    size: tuple[int, int]
    """Height and width."""
    annotations: list[dict[str, Any]] = field(default_factory=list)
    """One with all segments if panoptic, else one for each instance."""


class CocoMasks:
    """Masks from a file of COCO annotations. Threads may share it.

    Args:
        path: the JSON.
        pngs: folder or zip of the panoptic PNGs; by default, the one beside the JSON with the same name.

    Raises:
        UserError: the file does not have COCO's annotations or contradicts itself, or the PNGs are missing.
    """

    def __init__(self, path: Path, pngs: Path | None = None) -> None:
        self._path = path
        raw = read_json(path)
        try:
            self._categories = self._read_categories(raw["categories"])
            self._images = self._read_images(raw["images"])
            self._panoptic = self._read_annotations(raw["annotations"])
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path} is not a file of COCO annotations ({error!r}), which has images (id, file_name, height, "
                "width), categories (id, name) and annotations (image_id; segments_info and file_name, or category_id "
                "and segmentation). If it is a single mask, put it into a folder, named by the sample's key."
            ) from None
        self._by_file = {Path(image.file): image for image in self._images.values()}
        self._names = Names(list(self._by_file))
        if pngs is not None and not self._panoptic:
            raise UserError(f"{path} has no panoptic annotations, so the PNGs of segment ids ({pngs}) are not needed.")
        self._pngs = self._open_pngs(pngs) if self._panoptic else None

    # --- reading masks ------------------------------------------------------------------------------------------------

    def read(self, key: str, name: str, category: str) -> Mask | None:
        """As ``segmentation.Masks.read``."""
        file = self._names.find(key, name)
        return None if file is None else self.mask(self._by_file[file], category)

    def has(self, key: str) -> bool:
        """As ``segmentation.Masks.has``."""
        return self._names.find(key, "") is not None

    def images_with(self, categories: Collection[str]) -> list[tuple[CocoImage, str]]:
        """Pairs of an image and a category that it shows, sorted by file name. Raises UserError for a category that the
        annotations do not have."""
        numbers = {self._category_id(name): name for name in categories}
        found = []
        for image in sorted(self._images.values(), key=lambda image: image.file):
            entries = (s for a in image.annotations for s in (a["segments_info"] if self._panoptic else [a]))
            shown = {numbers[entry["category_id"]] for entry in entries if entry["category_id"] in numbers}
            found += [(image, name) for name in sorted(shown)]
        return found

    def mask(self, image: CocoImage, category: str) -> Mask:
        """bool (H, W): the pixels of a category in an image.

        Raises:
            UserError: the annotations do not have the category, or a mask cannot be read.
        """
        number = self._category_id(category)
        mask: Mask = np.zeros(image.size, bool)
        for annotation in image.annotations:
            if self._panoptic:
                mask |= self._segments(image, annotation, number)
            elif annotation["category_id"] == number:
                part = decode_mask(annotation.get("segmentation"), self._path)
                if part.shape != image.size:
                    raise UserError(
                        f"According to {self._path}, {image.file} has {shown_size(image.size)} pixels, but an "
                        f"annotation of it has {shown_size(part.shape)}."
                    )
                mask |= part
        return mask

    def digest(self) -> str:
        """A hash that changes with the annotations or their PNGs."""
        pngs = "" if self._pngs is None else self._pngs.digest()
        return hashlib.sha256(f"{sha256_of(self._path)} {pngs}".encode()).hexdigest()

    def _segments(self, image: CocoImage, annotation: Mapping[str, Any], category: int) -> Mask:
        assert self._pngs is not None
        name = annotation["file_name"]
        found = self._pngs.find(name)
        shown = self._pngs.place / (found or name)
        if found is None:
            raise UserError(
                f"{self._path} refers to {shown}, which does not exist. COCO distributes the PNGs of segment ids with "
                "the JSON, as a zip: unpack all of it, or give the zip with --panoptic-pngs. If the file exists under "
                "another spelling, rename it."
            )
        try:
            data = self._pngs.read(found)
        except UserError as reason:
            raise UserError(f"{self._path} refers to {shown}, which cannot be read. {reason}") from None
        ids = read_segment_ids(shown, data, image.size)
        segments = {segment["id"]: segment for segment in annotation["segments_info"]}
        there = set(np.unique(ids).tolist()) - {0}
        if strangers := sorted(there - segments.keys()):
            raise UserError(
                f"{shown} has pixels of {len(strangers)} segments that {self._path} does not list (id {strangers[0]}). "
                + _MIXED
            )
        if lost := sorted(number for number in segments.keys() - there if segments[number].get("area") != 0):
            raise UserError(
                f"{shown} has no pixel of {len(lost)} segments that {self._path} lists (id {lost[0]}). {_MIXED}"
            )
        return np.isin(ids, [number for number, segment in segments.items() if segment["category_id"] == category])

    def _category_id(self, name: str) -> Any:
        numbers = self._categories.get(name, [])
        if len(numbers) == 1:
            return numbers[0]
        if numbers:
            raise UserError(
                f"{self._path} has {len(numbers)} categories named {name!r}; it is unclear which one is meant."
            )
        known = sorted(self._categories)
        raise UserError(
            f"{self._path} has no category {name!r}. Its categories: {', '.join(known[:12])}"
            f"{' …' if len(known) > 12 else ''}. Choose other --groups, or masks of one object for each sample (PNGs)."
        )

    # --- reading the file ---------------------------------------------------------------------------------------------

    def _read_categories(self, entries: list[dict[str, Any]]) -> dict[str, list[Any]]:
        """Ids by name."""
        names: dict[Any, str] = {}
        for entry in entries:
            if entry["id"] in names:
                raise UserError(f"{self._path} has two categories with the id {entry['id']!r}.")
            names[entry["id"]] = str(entry["name"])
        self._category_ids = names.keys()
        found: dict[str, list[Any]] = {}
        for number, name in names.items():
            found.setdefault(name, []).append(number)
        return found

    def _read_images(self, entries: list[dict[str, Any]]) -> dict[Any, CocoImage]:
        """Images by id."""
        found: dict[Any, CocoImage] = {}
        files: set[str] = set()
        for entry in entries:
            file, size = entry["file_name"], (entry["height"], entry["width"])
            if not isinstance(file, str) or not Path(posix(file)).name:
                raise UserError(f"{self._path} has an image whose file_name is {file!r}.")
            file = posix(file)
            if not all(type(side) is int and side > 0 for side in size):
                raise UserError(f"{self._path} gives {file} a height and width of {size[0]!r} and {size[1]!r}.")
            if entry["id"] in found or file in files:
                raise UserError(
                    f"{self._path} lists the image {entry['id']!r} ({file}) twice, by id or file name, so it is "
                    "unclear which annotations are its own."
                )
            files.add(file)
            found[entry["id"]] = CocoImage(file, size)
        return found

    def _read_annotations(self, entries: list[dict[str, Any]]) -> bool:
        """Assign annotations to their images. Returns whether they are panoptic."""
        if not entries:
            raise UserError(f"{self._path} has no annotations. COCO does not distribute those of test sets.")
        panoptic = "segments_info" in entries[0]
        for entry in entries:
            if entry["image_id"] not in self._images:
                raise UserError(
                    f"{self._path} has an annotation of the image {entry['image_id']!r}, which is not in it."
                )
            image = self._images[entry["image_id"]]
            if ("segments_info" in entry) != panoptic:
                raise UserError(f"{self._path} mixes panoptic annotations with others (one of {image.file}).")
            segments = entry["segments_info"] if panoptic else [entry]
            if panoptic:
                self._check_segments(image, entry)
            if strangers := [s["category_id"] for s in segments if s["category_id"] not in self._category_ids]:
                raise UserError(
                    f"{self._path} has an annotation of {image.file} with the category id {strangers[0]!r}, which is "
                    f"not among its categories ({self._examples()}). If the ids are those of a model's outputs (0, 1, "
                    "2, …), convert them to COCO's ids (bird 16, cat 17, dog 18). An id as a number differs from the "
                    "same id as text."
                )
            image.annotations.append(entry)
        if panoptic and (bare := sum(not image.annotations for image in self._images.values())):
            warnings.warn(
                f"{self._path}: {bare} of {len(self._images)} images have no annotation. They count as images without "
                "the "
                f"object.",
                stacklevel=4,
            )
        return panoptic

    def _examples(self) -> str:
        """Some categories and their ids."""
        some = [f"{name} {numbers[0]!r}" for name, numbers in list(self._categories.items())[:3]]
        return f"{', '.join(some)}{', …' if len(self._categories) > 3 else ''}" if some else "there are none"

    def _check_segments(self, image: CocoImage, entry: dict[str, Any]) -> None:
        if image.annotations:
            raise UserError(f"{self._path} has two panoptic annotations of {image.file}; there can be only one.")
        if not isinstance(entry["file_name"], str):
            raise UserError(f"{self._path} gives {image.file} the PNG {entry['file_name']!r}, not a file name.")
        seen: set[int] = set()
        for segment in entry["segments_info"]:
            number = segment["id"]
            if type(number) is not int or not 0 < number < 256**3:
                raise UserError(
                    f"{self._path} gives a segment of {image.file} the id {number!r}. Ids must be whole numbers from 1 "
                    f"to {256**3 - 1}, the values of three channels of a PNG."
                )
            if number in seen:
                raise UserError(f"{self._path} gives two segments of {image.file} the id {number}.")
            seen.add(number)

    def _open_pngs(self, given: Path | None) -> FileTree:
        for place in (given,) if given else (self._path.with_suffix(""), self._path.with_suffix(".zip")):
            if place.exists():
                return FileTree(place)
        folder = given or self._path.with_suffix("")
        raise UserError(
            f"The PNGs of segment ids of {self._path} are missing: "
            + (f"no such file or folder: {given}." if given else f"neither {folder} nor {folder.name}.zip exists.")
            + " COCO distributes them with the JSON. Put them beside it, or give their folder or zip with "
            "--panoptic-pngs."
        )
