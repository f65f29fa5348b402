"""The images of a source by split and class folder: what every module of this package returns."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from cfmask.convert.sources.listing import IgnoredFiles, Listing
from cfmask.convert.sources.unpacking import UnpackTask
from cfmask.convert.tables import Classes
from cfmask.data.blobs import Absent, SourceBytes
from cfmask.errors import UserError
from cfmask.runtime.output import printable

SPLITS = {
    **{name: name for name in ("train", "val", "test", "dev", "holdout")},
    "training": "train",
    "valid": "val",
    "validation": "val",
}
"""Splits by the folder names that are known to mean them."""


class LabelledImage(NamedTuple):
    """folder: the class folder. file: the file's name in it."""

    folder: str
    file: str
    blob: SourceBytes

    @property
    def name(self) -> str:
        return f"{self.folder}/{self.file}"


@dataclass
class SourceImages:
    """The images of a source, and what its class folders mean.

    splits: images by split, sorted by name, so that they do not depend on how the source lists them.
    folders: sorted class folders of all splits, those not chosen included.
    empty: class folders without an image, by split.
    absent: images by split that have a name in the source but no bytes. They are in no other attribute.
    ignored: files that are not used.
    classes: (class folder or wnid, display name) by class id.
    class_ids: class id by class folder.
    accepted: as the manifest's.
    border: pixels at each side of an image that are not part of the picture.
    facts: for the manifest's ``made``.
    count_mismatch: deviations from the known set, by split.
    unpack: Parquet files of the source whose images have to be unpacked before shards are made of them.
    """

    splits: dict[str, list[LabelledImage]]
    folders: list[str]
    empty: dict[str, list[str]]
    absent: dict[str, list[LabelledImage]]
    ignored: IgnoredFiles
    classes: Classes
    class_ids: dict[str, int]
    accepted: dict[int, tuple[int, ...]] = field(default_factory=dict)
    border: int = 0
    facts: dict[str, Any] = field(default_factory=dict)
    count_mismatch: dict[str, list[str]] = field(default_factory=dict)
    unpack: tuple[UnpackTask, ...] = ()


def source_images(
    listing: Listing,
    images: dict[str, list[LabelledImage]],
    seen: Iterable[tuple[str | None, str]],
    *,
    split: str | None,
    classes: Classes | None,
    class_ids: dict[str, int] | None = None,
) -> SourceImages:
    """The images of the chosen split, or of all.

    Args:
        listing: after its walk.
        seen: (split, class folder) of all class folders, empty ones included.
        classes: by default the class folders, sorted.
        class_ids: by default those of ``classes``.
    """
    source = listing.source
    if not images:
        others = "".join(f" {line}." for line in listing.ignored.lines())
        raise UserError(f"{source} holds no class folders with images.{others}")
    if split is not None and split not in images:
        raise UserError(f"{source} has no split {split!r}; it has: {', '.join(sorted(images))}.")
    folders = sorted({image.folder for found in images.values() for image in found})
    images = {
        name: sorted(found, key=lambda image: (image.folder, image.file))
        for name, found in sorted(images.items())
        if split in (None, name)
    }
    for name, found in images.items():
        for a, b in zip(found, found[1:], strict=False):
            if (a.folder, a.file) == (b.folder, b.file):
                raise UserError(
                    f"The split {name} has {a.name} twice, in {a.blob.path} and in {b.blob.path}: the source holds the "
                    f"split or the file twice. Move one of them out of the source."
                )
    chosen: dict[str, list[LabelledImage]] = {}
    absent: dict[str, list[LabelledImage]] = {}
    for name, found in images.items():
        chosen[name] = [image for image in found if not isinstance(image.blob, Absent)]
        absent[name] = [image for image in found if isinstance(image.blob, Absent)]
        if not chosen[name]:
            raise UserError(
                f"None of the {len(found)} images of the split {name} of {source} has bytes: {found[0].name} is "
                f"{why_absent(found[0])}. Copy the targets of the links as well."
            )
    empty: dict[str, list[str]] = {name: [] for name in chosen}
    full = {(name, image.folder) for name, found in chosen.items() for image in found}
    for its_split, folder in sorted({(name, folder) for name, folder in seen if name is not None} - full):
        if its_split in empty:
            empty[its_split].append(folder)
    classes = classes or tuple((folder, printable(folder)) for folder in folders)
    class_ids = class_ids or {folder: i for i, (folder, _) in enumerate(classes)}
    return SourceImages(chosen, folders, empty, absent, listing.ignored, classes, class_ids)


def why_absent(image: LabelledImage) -> str:
    return image.blob.why if isinstance(image.blob, Absent) else ""
