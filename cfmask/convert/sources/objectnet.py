"""ObjectNet: class folders with names of its own, and the mapping files that relate them to ImageNet's classes."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from cfmask.convert import tables
from cfmask.convert.request import Request
from cfmask.convert.sources.files import LabelledImage, SourceImages, source_images
from cfmask.convert.sources.listing import Listing, Tick, is_image
from cfmask.data import benchmarks, imagenet
from cfmask.errors import UserError

MAPPINGS = FOLDERS, OBJECTS, LABELS, NUMBERS = (
    "folder_to_objectnet_label.json",
    "objectnet_to_imagenet_1k.json",
    "imagenet_to_label_2012_v2",
    "pytorch_to_imagenet_2012_id.json",
)
NO_OVERLAP = "in a folder of ObjectNet that does not overlap with ImageNet"
BORDER = 2
"""Pixels of the red frame around ObjectNet's images, which is not part of the picture."""


def objectnet_images(request: Request, tick: Tick) -> SourceImages:
    """The part of ObjectNet that overlaps with ImageNet. One split, called "objectnet"."""
    source, mappings = request.source, request.mappings
    listing = Listing(source, tick)
    found, contents = [], {}
    for file in listing:
        if is_image(file.parts[-1]):
            found.append(file)
        elif file.parts[-1] in MAPPINGS:
            contents[file.parts[-1]] = file.blob.read()
        else:
            listing.ignore(file)
    if mappings is not None or not contents:
        mappings = mappings or source.parent / "mappings"
        contents = read_mappings(mappings)
    if missing := [name for name in MAPPINGS if name not in contents]:
        raise UserError(
            f"ObjectNet's mapping files relate its folders to ImageNet's classes, and {', '.join(missing)} cannot be "
            f"found in {mappings or source}. They are in the archive, in objectnet-1.0/mappings: name that folder with "
            f"--mappings."
        )
    labels, class_ids = classes_of(contents)
    known = sorted(labels)
    images = []
    for file in found:
        folder = file.parts[-2] if len(file.parts) > 1 else "no folder"
        if folder in class_ids:
            images.append(LabelledImage(folder, file.parts[-1], file.blob))
        elif folder in known:
            listing.ignore(file, NO_OVERLAP)
        else:
            raise UserError(
                f"{'/'.join(file.parts)} of {source} lies in {folder!r}, which is none of ObjectNet's {len(known)} "
                f"folders (such as {known[0]}). Move files that do not belong to ObjectNet out of the source."
            )
    name = benchmarks.OBJECTNET.name
    result = source_images(
        listing,
        {name: images} if images else {},
        [(name, parts[-1]) for parts in listing.folders if parts[-1] in class_ids],
        split=None,
        classes=imagenet.classes(),
        class_ids={folder: ids[0] for folder, ids in class_ids.items()},
    )
    result.accepted = {ids[0]: ids for ids in class_ids.values() if len(ids) > 1}
    result.border = 0 if request.border_removed else BORDER
    result.facts["border_removed_before"] = request.border_removed
    result.facts["left_out_by_design"] = listing.ignored.count(NO_OVERLAP)
    return result


def read_mappings(folder: Path) -> dict[str, bytes]:
    """The contents of those of the mapping files that are in the folder, by name."""
    try:
        return {name: (folder / name).read_bytes() for name in MAPPINGS if (folder / name).is_file()}
    except OSError as error:
        raise UserError(f"ObjectNet's mapping files in {folder} cannot be read ({error.strerror}).") from None


def classes_of(files: dict[str, bytes]) -> tuple[dict[str, str], dict[str, tuple[int, ...]]]:
    """ObjectNet's label of each folder, and for each folder that overlaps with ImageNet all correct class ids, sorted.

    FOLDERS: folder → ObjectNet's label. OBJECTS: label → texts of ImageNet classes, joined by "; ". LABELS: one text a
    line. NUMBERS: class id → number of the line in LABELS, from 0.
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
        # ImageNet has two classes called "crane". A text of two classes must not be used by ObjectNet.
        ambiguous = {text for text, n in Counter(lines).items() if n > 1}
        if unclear := sorted(ambiguous & {text for texts in texts_of.values() for text in texts}):
            raise ValueError(f"{unclear[0]!r} is two classes")
        class_ids = {folder_of[label]: tuple(sorted(ids[text] for text in texts)) for label, texts in texts_of.items()}
        if invalid := [i for of_folder in class_ids.values() for i in of_folder if not 0 <= i < 1000]:
            raise ValueError(f"class id {invalid[0]}")
    except (ValueError, KeyError, RecursionError) as error:
        raise UserError(
            f"ObjectNet's mapping files contradict each other ({error!r}): copy all of objectnet-1.0/mappings from the "
            f"archive again."
        ) from None
    return label_of, class_ids


def _json_object(data: bytes) -> dict[str, Any]:
    """Raises: ValueError: ``data`` is not a JSON object, or has a key twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a key occurs twice")
        return found

    content = json.loads(data, object_pairs_hook=unique)
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    return content


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not a string")
    return value


def _number(value: object) -> int:
    """A whole number, or a string of one, as keys of JSON objects are. Raises: ValueError."""
    number = tables.whole_number(value) if isinstance(value, str) else value
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise ValueError(f"{value!r} is not a whole number")
    return number
