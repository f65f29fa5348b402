"""Any tree of classes."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from cfmask.convert.sources.files import SPLITS, LabelledImage, Tree, chosen_tree
from cfmask.convert.sources.listing import Listing, Tick
from cfmask.errors import UserError


def folder_tree(source: Path, *, split: str | None, tick: Tick) -> Tree:
    """class/image or split/class/image, below any number of leading folders.

    Args:
        split: chooses one split of several; names the one there is where no folder does.

    Raises:
        UserError: no class folders, folders of different depth, a split that cannot be told.
    """
    listing = Listing(source, tick)
    found = list(listing.images())
    loose = next((file for file in found if len(file.parts) < 2), None)
    if loose or not found:
        others = "".join(f" {line}." for line in listing.stays_out.lines())
        raise UserError(
            f"{source} holds no class folders{f' ({loose.parts[-1]} lies at its top)' if loose else ' with images'}: "
            f"it has to look like <class>/<image> or <split>/<class>/<image>, or needs --labels FILE.{others}"
        )
    leading = _common_prefix({file.parts[:-2] for file in found})
    depths = {len(file.parts) - len(leading) - 2: file for file in found}
    if set(depths) - {0, 1} or len(depths) > 1:
        examples = " and ".join("/".join(file.parts) for _, file in sorted(depths.items())[:2])
        raise UserError(
            f"The images of {source} do not lie at one depth of <class>/<image> or <split>/<class>/<image>: "
            f"{examples}. Move what does not belong out of the source, or name a folder further down as --source."
        )
    images: dict[str, list[LabelledImage]] = {}
    below = [parts for parts in listing.folders if parts[: len(leading)] == leading]
    if 1 in depths:
        _refuse_one_split_twice({file.parts[len(leading)] for file in found}, source)
        for file in found:
            name = file.parts[len(leading)]
            images.setdefault(SPLITS.get(name.lower(), name), []).append(
                LabelledImage(file.parts[-2], file.parts[-1], file.blob)
            )
        seen = [(parts[-2], parts[-1]) for parts in below if len(parts) == len(leading) + 2]
        return chosen_tree(listing, images, [(SPLITS.get(s.lower(), s), c) for s, c in seen], split)
    # Nothing above the classes tells splits apart, unless it is named like one.
    above = leading[-1] if leading else source.name
    which = SPLITS.get(above.lower()) or split
    if which is None:
        raise UserError(
            f"{source} holds class folders ({found[0].parts[-2]}, …) but nothing says which split they are: add "
            f"--split NAME (train, val, …)."
        )
    images[which] = [LabelledImage(file.parts[-2], file.parts[-1], file.blob) for file in found]
    seen_classes = [(which, parts[-1]) for parts in below if len(parts) == len(leading) + 1]
    return chosen_tree(listing, images, seen_classes, split)


def _refuse_one_split_twice(folders: Iterable[str], source: Path) -> None:
    """Raises: UserError: two folders are one split by their names ("val" and "validation")."""
    first: dict[str, str] = {}
    for folder in sorted(folders):
        which = SPLITS.get(folder.lower(), folder)
        if (other := first.setdefault(which, folder)) != folder:
            raise UserError(
                f"{source} has the folders {other!r} and {folder!r}, and both are the split {which} by their names. "
                f"Rename one of them, or move it out of the source."
            )


def _common_prefix(paths: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(os.path.commonprefix([list(path) for path in paths]))
