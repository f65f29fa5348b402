"""ImageNet-V2, -R, -A and -Sketch: a folder for each class."""

from __future__ import annotations

from cfmask.convert.request import Request
from cfmask.convert.sources.files import LabelledImage, SourceImages, source_images
from cfmask.convert.sources.listing import Listing, Tick
from cfmask.data import benchmarks, imagenet
from cfmask.errors import UserError


def shifted_images(request: Request, tick: Tick) -> SourceImages:
    """ImageNet-V2, -R, -A or -Sketch: class folders at any depth. One split, with the name of the set."""
    source, name = request.source, request.kind
    listing = Listing(source, tick)
    found = list(listing.images())
    folders = {file.parts[-2] for file in found if len(file.parts) > 1}
    class_ids = {wnid: imagenet.wnids().index(wnid) for wnid in benchmarks.wnids(name)}
    what = f"one of the {len(class_ids)} wnids of {name} (such as {next(iter(class_ids))})"
    if name == benchmarks.IMAGENET_V2.name and not folders & set(class_ids):
        # As numbers: sorted as strings, "10" would come before "2", and 988 of 1000 labels be wrong.
        class_ids = {str(number): number for number in range(1000)}
        what = "a class number 0 … 999 or a wnid"
    images: list[LabelledImage] = []
    for file in found:
        folder = file.parts[-2] if len(file.parts) > 1 else "no folder"
        if folder not in class_ids:
            raise UserError(
                f"{'/'.join(file.parts)} of {source} lies in {folder!r}, which is not {what}. Is this {name}? If so, "
                f"move files that do not belong to it out of the source."
            )
        images.append(LabelledImage(folder, file.parts[-1], file.blob))
    seen = [(name, parts[-1]) for parts in listing.folders if parts[-1] in class_ids]
    classes = imagenet.classes()
    return source_images(
        listing, {name: images} if images else {}, seen, split=None, classes=classes, class_ids=class_ids
    )
