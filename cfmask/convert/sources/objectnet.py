"""ObjectNet: folders with names of its own, and the mapping files that explain them."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from cfmask.convert.sources.files import LabelledImage, Listing, Tick, Tree, chosen_tree, is_image
from cfmask.data import benchmarks
from cfmask.errors import UserError

MAPPINGS = FOLDERS, OBJECTS, LABELS, NUMBERS = (
    "folder_to_objectnet_label.json",
    "objectnet_to_imagenet_1k.json",
    "imagenet_to_label_2012_v2",
    "pytorch_to_imagenet_2012_id.json",
)


@dataclass(frozen=True)
class ObjectNet:
    """class_ids: of each folder that overlaps with ImageNet, all class ids that are right for it, sorted. left_out:
    images in folders that do not."""

    tree: Tree
    class_ids: dict[str, tuple[int, ...]]
    left_out: int


def objectnet_tree(source: Path, *, mappings: Path | None, tick: Tick) -> ObjectNet:
    """The part of ObjectNet that overlaps with ImageNet. One split, called "objectnet".

    Args:
        mappings: folder of ObjectNet's mapping files; by default they are looked for in the source and beside it.

    Raises:
        UserError: nothing to convert, a folder that is not ObjectNet's, mapping files that are missing or odd.
    """
    listing = Listing(source, tick)
    found, ignored, contents = [], [], {}
    for file in listing:
        if is_image(file.parts[-1]):
            found.append(file)
        elif file.parts[-1] in MAPPINGS:
            contents[file.parts[-1]] = file.blob.read()
        else:
            ignored.append("/".join(file.parts))
    if mappings is not None or not contents:
        mappings = mappings or source.parent / "mappings"
        contents = _mapping_files(mappings)
    if missing := [name for name in MAPPINGS if name not in contents]:
        raise UserError(
            f"ObjectNet's own mapping files say which of its folders are which of ImageNet's classes, and "
            f"{', '.join(missing)} cannot be found in {mappings or source}. They are in the archive, in "
            f"objectnet-1.0/mappings: name that folder with --mappings."
        )
    labels, class_ids = classes_of(contents)
    known = sorted(labels)
    images, left_out = [], 0
    for file in found:
        folder = file.parts[-2] if len(file.parts) > 1 else "no folder"
        if folder in class_ids:
            images.append(LabelledImage(folder, file.parts[-1], file.blob))
        elif folder in known:
            left_out += 1
        else:
            raise UserError(
                f"{'/'.join(file.parts)} of {source} lies in {folder!r}, which is none of ObjectNet's {len(known)} "
                f"folders (such as {known[0]}). Move what does not belong to ObjectNet out of the source."
            )
    name = benchmarks.OBJECTNET.name
    seen = [(name, parts[-1]) for parts in listing.folders if parts[-1] in class_ids]
    return ObjectNet(chosen_tree(source, {name: images} if images else {}, seen, ignored, None), class_ids, left_out)


def _mapping_files(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in MAPPINGS if (folder / name).is_file()}


def read_mappings(folder: Path) -> dict[str, bytes] | None:
    """The contents of the mapping files by name; None if one of them is not in the folder."""
    files = _mapping_files(folder)
    return files if len(files) == len(MAPPINGS) else None


def classes_of(files: dict[str, bytes]) -> tuple[dict[str, str], dict[str, tuple[int, ...]]]:
    """ObjectNet's label of each folder, and the class ids of each folder that overlaps with ImageNet.

    FOLDERS: folder → ObjectNet's label. OBJECTS: label → texts of ImageNet classes, joined by "; ". LABELS: a text a
    line; the line's number, from 0, counts as the devkit's ILSVRC2012_ID does. NUMBERS: class id → that number.
    """
    try:
        label_of = {str(folder): str(label) for folder, label in json.loads(files[FOLDERS]).items()}
        texts_of = {str(label): str(texts).split("; ") for label, texts in json.loads(files[OBJECTS]).items()}
        class_id_of = {int(number): int(class_id) for class_id, number in json.loads(files[NUMBERS]).items()}
        lines = [line.strip() for line in files[LABELS].decode().splitlines()]
        ids: dict[str, int] = {text: class_id_of[number] for number, text in enumerate(lines) if text}
        folder_of = {label: folder for folder, label in label_of.items()}
        # Two classes of ImageNet are called "crane"; were one of ObjectNet's too, nobody could say which is meant.
        ambiguous = {text for text, n in Counter(lines).items() if n > 1}
        if unclear := sorted(ambiguous & {text for texts in texts_of.values() for text in texts}):
            raise ValueError(f"{unclear[0]!r} is two classes")
        class_ids = {folder_of[label]: tuple(sorted(ids[text] for text in texts)) for label, texts in texts_of.items()}
        if strange := [i for of_folder in class_ids.values() for i in of_folder if not 0 <= i < 1000]:
            raise ValueError(f"class id {strange[0]}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"ObjectNet's mapping files do not fit together ({error!r}): copy all of objectnet-1.0/mappings from the "
            f"archive again."
        ) from None
    return label_of, class_ids
