"""ObjectNet: folders with names of its own, and the mapping files that explain them."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfmask.convert import tables
from cfmask.convert.sources.files import LabelledImage, Tree, chosen_tree
from cfmask.convert.sources.listing import Listing, Tick, is_image
from cfmask.data import benchmarks
from cfmask.errors import UserError

MAPPINGS = FOLDERS, OBJECTS, LABELS, NUMBERS = (
    "folder_to_objectnet_label.json",
    "objectnet_to_imagenet_1k.json",
    "imagenet_to_label_2012_v2",
    "pytorch_to_imagenet_2012_id.json",
)


NO_OVERLAP = "in a folder of ObjectNet that does not overlap with ImageNet"


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
    found, contents = [], {}
    for file in listing:
        if is_image(file.parts[-1]):
            found.append(file)
        elif file.parts[-1] in MAPPINGS:
            contents[file.parts[-1]] = file.blob.read()
        else:
            listing.leave(file)
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
            listing.leave(file, NO_OVERLAP)
        else:
            raise UserError(
                f"{'/'.join(file.parts)} of {source} lies in {folder!r}, which is none of ObjectNet's {len(known)} "
                f"folders (such as {known[0]}). Move what does not belong to ObjectNet out of the source."
            )
    name = benchmarks.OBJECTNET.name
    seen = [(name, parts[-1]) for parts in listing.folders if parts[-1] in class_ids]
    return ObjectNet(chosen_tree(listing, {name: images} if images else {}, seen, None), class_ids, left_out)


def _mapping_files(folder: Path) -> dict[str, bytes]:
    try:
        return {name: (folder / name).read_bytes() for name in MAPPINGS if (folder / name).is_file()}
    except OSError as error:
        raise UserError(f"ObjectNet's mapping files in {folder} cannot be read ({error.strerror}).") from None


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
        label_of = {folder: _text(label) for folder, label in _json_object(files[FOLDERS]).items()}
        texts_of = {label: _text(texts).split("; ") for label, texts in _json_object(files[OBJECTS]).items()}
        numbers = {_number(class_id): _number(number) for class_id, number in _json_object(files[NUMBERS]).items()}
        class_id_of = {number: class_id for class_id, number in numbers.items()}
        if len(class_id_of) != len(numbers):
            raise ValueError("two class ids have one number")
        lines = [line.strip() for line in files[LABELS].decode("utf-8-sig").split("\n")]
        ids: dict[str, int] = {text: class_id_of[number] for number, text in enumerate(lines) if text}
        folder_of = {label: folder for folder, label in label_of.items() if label in texts_of}
        if len(folder_of) != sum(label in texts_of for label in label_of.values()):
            raise ValueError("two folders have one label")
        # Two classes of ImageNet are called "crane"; were one of ObjectNet's too, nobody could say which is meant.
        ambiguous = {text for text, n in Counter(lines).items() if n > 1}
        if unclear := sorted(ambiguous & {text for texts in texts_of.values() for text in texts}):
            raise ValueError(f"{unclear[0]!r} is two classes")
        class_ids = {folder_of[label]: tuple(sorted(ids[text] for text in texts)) for label, texts in texts_of.items()}
        if strange := [i for of_folder in class_ids.values() for i in of_folder if not 0 <= i < 1000]:
            raise ValueError(f"class id {strange[0]}")
    except (ValueError, KeyError, RecursionError) as error:
        raise UserError(
            f"ObjectNet's mapping files do not fit together ({error!r}): copy all of objectnet-1.0/mappings from the "
            f"archive again."
        ) from None
    return label_of, class_ids


def _json_object(data: bytes) -> dict[str, Any]:
    """Raises: ValueError: ``data`` is no JSON object, or has a key twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a key is there twice")
        return found

    content = json.loads(data, object_pairs_hook=unique)
    if not isinstance(content, dict):
        raise ValueError("no JSON object")
    return content


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no text")
    return value


def _number(value: object) -> int:
    """A whole number, also one in quotes as keys of JSON objects are. Raises: ValueError."""
    number = tables.whole_number(value) if isinstance(value, str) else value
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise ValueError(f"{value!r} is no whole number")
    return number
