"""Images of a source by split and class folder."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from cfmask.convert.sources.blobs import SourceBytes
from cfmask.convert.sources.listing import Absent, Listing, StaysOut
from cfmask.errors import UserError

# Folder names that say by themselves which split is in them.
SPLITS = {
    **{name: name for name in ("train", "val", "test", "dev", "holdout")},
    "training": "train",
    "valid": "val",
    "validation": "val",
}


class LabelledImage(NamedTuple):
    """folder: the class folder; file: the file's name in it."""

    folder: str
    file: str
    blob: SourceBytes

    @property
    def name(self) -> str:
        return f"{self.folder}/{self.file}"


@dataclass(frozen=True)
class Tree:
    """The images of a source.

    splits: images by split, each sorted by name, so that they do not depend on how the source lists them.
    folders: sorted class folders of all splits, the ones not chosen too.
    empty: class folders without an image, by split.
    absent: images by split that have a name in the source and no bytes. They are in no other attribute.
    stays_out: files of which no use is made.
    """

    splits: dict[str, list[LabelledImage]]
    folders: list[str]
    empty: dict[str, list[str]]
    absent: dict[str, list[LabelledImage]] = field(default_factory=dict)
    stays_out: StaysOut = field(default_factory=StaysOut)


def chosen_tree(
    listing: Listing,
    images: dict[str, list[LabelledImage]],
    seen: Iterable[tuple[str | None, str]],
    split: str | None,
) -> Tree:
    """The tree of the chosen split, or of all.

    Args:
        listing: its walk is done.
        seen: (split, class folder) of folders that were met, full or empty.

    Raises:
        UserError: there are no images, the split is not there, one image is there twice, or none has bytes.
    """
    source = listing.source
    if not images:
        others = "".join(f". {line}" for line in listing.stays_out.lines())
        raise UserError(f"{source} holds no class folders with images{others}.")
    if split is not None and split not in images:
        raise UserError(f"{source} has no split {split!r}; it has: {', '.join(sorted(images))}.")
    chosen: dict[str, list[LabelledImage]] = {}
    absent: dict[str, list[LabelledImage]] = {}
    for name in sorted(images):
        if split not in (None, name):
            continue
        found = sorted(images[name], key=lambda image: (image.folder, image.file))
        for a, b in zip(found, found[1:], strict=False):
            if (a.folder, a.file) == (b.folder, b.file):
                raise UserError(
                    f"{a.name} of the split {name} is there twice, in {a.blob.path} and in {b.blob.path}: the source "
                    f"holds the split twice or one file twice. Move one of them out of the source."
                )
        if without := [image for image in found if isinstance(image.blob, Absent)]:
            absent[name] = without
            found = [image for image in found if not isinstance(image.blob, Absent)]
            if not found:
                raise UserError(
                    f"None of the {len(without)} images of the split {name} of {source} has bytes: {without[0].name} "
                    f"is {why_absent(without[0])}. Copy what the links lead to as well."
                )
        chosen[name] = found
    full = {(name, image.folder) for name, found in chosen.items() for image in found}
    without_images = sorted({(name, folder) for name, folder in seen if name is not None} - full)
    empty = {name: [folder for its_split, folder in without_images if its_split == name] for name in chosen}
    folders = sorted({image.folder for found in images.values() for image in found})
    return Tree(chosen, folders, empty, absent, listing.stays_out)


def why_absent(image: LabelledImage) -> str:
    return image.blob.why if isinstance(image.blob, Absent) else ""
