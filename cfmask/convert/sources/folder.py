"""Any tree of classes."""

from __future__ import annotations

import os
from pathlib import Path

from cfmask.convert.request import Request
from cfmask.convert.sources.files import SPLITS, LabelledImage, SourceImages, source_images
from cfmask.convert.sources.listing import Listing, Tick
from cfmask.convert.tables import Classes
from cfmask.errors import UserError


def folder_images(request: Request, classes: Classes | None, tick: Tick) -> SourceImages:
    """The images of a tree class/image or split/class/image, below any number of leading folders. Classes are those of
    the list, or the class folders."""
    source, split = request.source, request.split
    listing = Listing(source, tick)
    found = list(listing.images())
    loose = next((file for file in found if len(file.parts) < 2), None)
    if loose or not found:
        others = "".join(f" {line}." for line in listing.ignored.lines())
        raise UserError(
            f"{source} holds no class folders{f' ({loose.parts[-1]} lies at its top)' if loose else ' with images'}. "
            f"It has to look like <class>/<image> or <split>/<class>/<image>, or needs --labels FILE.{others}"
        )
    leading = tuple(os.path.commonprefix([list(file.parts[:-2]) for file in found]))
    depths = {len(file.parts) - len(leading) - 2: file for file in found}
    if set(depths) - {0, 1} or len(depths) > 1:
        examples = " and ".join("/".join(file.parts) for _, file in sorted(depths.items())[:2])
        raise UserError(
            f"The images of {source} do not all lie at <class>/<image>, or all at <split>/<class>/<image>: "
            f"{examples}. Move files that do not belong to the set out of the source, or name a folder further down."
        )
    has_splits = 1 in depths
    if has_splits:
        _refuse_one_split_twice({file.parts[len(leading)] for file in found}, source)
        which = None
    else:
        # Without a level of split folders, the folder above the classes may still be named like a split.
        which = SPLITS.get((leading[-1] if leading else source.name).lower()) or split
        if which is None:
            raise UserError(
                f"{source} holds class folders ({found[0].parts[-2]}, …), but their split is unknown: add --split NAME "
                f"(train, val, …)."
            )

    def split_of(folder: str) -> str:
        return which or SPLITS.get(folder.lower(), folder)

    images: dict[str, list[LabelledImage]] = {}
    for file in found:
        image = LabelledImage(file.parts[-2], file.parts[-1], file.blob)
        images.setdefault(split_of(file.parts[len(leading)]), []).append(image)
    depth = len(leading) + 1 + has_splits
    below = [parts for parts in listing.folders if parts[: len(leading)] == leading and len(parts) == depth]
    seen = [(split_of(parts[len(leading)]), parts[-1]) for parts in below]
    return source_images(listing, images, seen, split=split, classes=classes)


def _refuse_one_split_twice(folders: set[str], source: Path) -> None:
    """Raises: UserError: two folders mean one split ("val" and "validation")."""
    first: dict[str, str] = {}
    for folder in sorted(folders):
        which = SPLITS.get(folder.lower(), folder)
        if (other := first.setdefault(which, folder)) != folder:
            raise UserError(
                f"{source} has the folders {other!r} and {folder!r}, and both names mean the split {which}. Rename one "
                f"of them, or move it out of the source."
            )
