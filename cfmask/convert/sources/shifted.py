"""ImageNet-V2, -R, -A and -Sketch: a folder a class."""

from __future__ import annotations

from pathlib import Path

from cfmask.convert.sources.files import LabelledImage, Tree, chosen_tree
from cfmask.convert.sources.listing import Listing, Tick
from cfmask.data import benchmarks, imagenet
from cfmask.errors import UserError


def benchmark_tree(source: Path, name: str, *, tick: Tick) -> tuple[Tree, dict[str, int]]:
    """ImageNet-V2, -R, -A or -Sketch: a folder a class, at any depth. One split, called ``name``.

    Returns:
        The tree, and the class id of each class folder.

    Raises:
        UserError: nothing to convert, or a folder that is no class of this set.
    """
    listing = Listing(source, tick)
    found = list(listing.images())
    folders = {file.parts[-2] for file in found if len(file.parts) > 1}
    class_ids = {wnid: imagenet.wnids().index(wnid) for wnid in benchmarks.wnids(name)}
    what = f"one of the {len(class_ids)} wnids of {name} (such as {next(iter(class_ids))})"
    if name == benchmarks.IMAGENET_V2.name and not folders & set(class_ids):
        # As numbers: sorted as strings, "10" would come before "2", and 988 of 1000 labels be wrong.
        class_ids = {str(number): number for number in range(1000)}
        what = "a class number 0 … 999, nor a wnid"
    images: list[LabelledImage] = []
    for file in found:
        folder = file.parts[-2] if len(file.parts) > 1 else "no folder"
        if folder not in class_ids:
            raise UserError(
                f"{'/'.join(file.parts)} of {source} lies in {folder!r}, which is not {what}. Is this {name}? If so, "
                f"move what does not belong to it out of the source."
            )
        images.append(LabelledImage(folder, file.parts[-1], file.blob))
    seen = [(name, parts[-1]) for parts in listing.folders if parts[-1] in class_ids]
    return chosen_tree(listing, {name: images} if images else {}, seen, None), class_ids
