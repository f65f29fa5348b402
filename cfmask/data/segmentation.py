"""Segmentation masks of the objects of samples.

    DIR/…/KEY.png                a mask of one sample: 0 outside of the object, one other value in it
    DIR/…/KEY.json               the same in COCO's run-length encoding: {"size": [H, W], "counts": …}, or a list of
                                 such, whose union is the mask
    FILE.json                    COCO annotations of a whole set (cfmask/data/coco.py): panoptic ones with their PNGs of
                                 segment ids, or run-length encoded instances
    SET/manifest.json            shards of masks by tools/segment.py

Masks are those of images before the recipe's resize and crop, and are resized and cropped in the same way, each pixel
taking the value of the nearest one. A mask is found by the sample's key, or by FOLDER/NAME
(DIR/…/n02085620/n02085620_1.png) or NAME, without extension, of the image's original file.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from cfmask.data import imagenet, images
from cfmask.data.coco import CocoMasks
from cfmask.data.filetree import FileTree
from cfmask.data.mask_files import Mask, Names, decode_mask, read_json, read_object_mask
from cfmask.data.shard_reader import ShardReader
from cfmask.data.shards import MANIFEST, Manifest, load_manifest
from cfmask.errors import UserError, did_you_mean_path
from cfmask.masking.validation import Coverage, coverage

MADE_BY = "segment"
"""``made["tool"]`` in the manifest of shards of masks."""

_FORMS = (
    "Give a folder of PNGs or run-length JSONs named by sample key, a COCO annotation file (.json), or shards of masks "
    "by tools/segment.py."
)


class Masks(Protocol):
    """A source of masks. Threads may share it."""

    def read(self, key: str, name: str, category: str) -> Mask | None:
        """The mask of a sample.

        Args:
            key: of the sample.
            name: of the original file of its image (folder/file), or "".
            category: COCO's name of the object; not used by masks of one object for each sample.

        Returns:
            bool (H, W), which may be all False; None if there is no mask.

        Raises:
            UserError: it cannot be read, or is not a mask.
        """
        ...

    def has(self, key: str) -> bool:
        """Whether a mask is found by the key of a sample alone."""
        ...

    def digest(self) -> str:
        """A hash that changes when the masks do."""
        ...


def open_masks(where: str | Path, panoptic_pngs: Path | None = None) -> Masks:
    """Open masks of any of the forms above.

    Args:
        panoptic_pngs: folder or zip of the PNGs of panoptic annotations, if it is not beside them.

    Raises:
        UserError: a missing path, or none of these forms.
    """
    path = Path(where)
    if path.is_file() and path.suffix.lower() == ".json":
        return CocoMasks(path, panoptic_pngs)
    if panoptic_pngs is not None:
        raise UserError(
            "--panoptic-pngs has no effect: it gives the PNGs of a JSON of panoptic annotations, and --segmentation "
            f"is {path}."
        )
    if path.is_file() and path.suffix.lower() == ".zip":
        raise UserError(
            f"{path} is an archive. Unpack it and give the COCO annotation file (.json) or the folder of masks in it. "
            f"(A zip of PNGs beside a panoptic JSON need not be unpacked.)"
        )
    if (path / MANIFEST).is_file() or any(path.glob(f"*/{MANIFEST}")):  # of a folder of sets, its error says which
        return _ShardMasks(load_manifest(path))
    if path.is_dir():
        return _FileMasks(path)
    raise UserError(f"No such file or folder of masks: {path}.{did_you_mean_path(path)} {_FORMS}")


# --- classes ----------------------------------------------------------------------------------------------------------

ALL = "all"

Classes = Sequence[tuple[str, str]]
"""(wnid or folder name, display name) by class id."""


def categories(classes: Classes) -> list[str]:
    """COCO's category of each class: its super-class, or else its own name."""
    known = imagenet.super_class_of()
    return [known.get(folder, name) for folder, name in classes]


def class_groups(classes: Classes, names: Sequence[str] | None = None) -> dict[str, frozenset[int]]:
    """Class ids by group.

    Args:
        names: dog, cat, bird: ImageNet's classes of these super-classes (``imagenet.SUPER_CLASSES``); all: the union of
            these, or every class of a set without them; or a single class, by folder or display name. By default,
            those of dog, cat, bird and all that the set has.

    Raises:
        UserError: an unknown group, or a repeated one.
    """
    known = imagenet.super_class_of()
    groups = {
        name: frozenset(i for i, (folder, _) in enumerate(classes) if known.get(folder) == name)
        for name in imagenet.SUPER_CLASSES
    }
    groups = {name: ids for name, ids in groups.items() if ids}
    groups[ALL] = frozenset().union(*groups.values()) or frozenset(range(len(classes)))
    if names is None:
        return groups
    for i, (folder, name) in enumerate(classes):
        groups.setdefault(folder, frozenset([i]))
        groups.setdefault(name, frozenset([i]))
    for name in names:
        if name in imagenet.SUPER_CLASSES and name not in groups:
            raise UserError(
                f"The set has none of ImageNet's {len(imagenet.SUPER_CLASSES[name])} classes of the group {name}: its "
                f"{len(classes)} classes begin with {classes[0][0]}. Leave out --groups, or give classes of the set."
            )
        if name not in groups:
            raise UserError(
                f"Unknown group {name!r}. Groups are {', '.join(imagenet.SUPER_CLASSES)}, {ALL}, and each class of the "
                f"set by its folder or display name (for example {', '.join(classes[0])})."
            )
    if len(set(names)) != len(names):
        raise UserError(f"--groups repeats a group: {' '.join(names)}.")
    return {name: groups[name] for name in names}


# --- one mask for each sample -----------------------------------------------------------------------------------------


class _FileMasks:
    """A folder of PNGs and run-length JSONs."""

    def __init__(self, root: Path) -> None:
        found = sorted(path for path in root.rglob("*") if path.suffix.lower() in (".png", ".json") and path.is_file())
        if not found:
            raise UserError(f"{root} holds no masks: it has no .png or .json. {_FORMS}")
        endings: dict[Path, list[str]] = {}
        for path in found:
            endings.setdefault(path.with_suffix(""), []).append(path.suffix)
        if twice := [stem for stem, of_stem in endings.items() if len(of_stem) > 1]:
            raise UserError(
                f"{twice[0]} exists as {' and as '.join(endings[twice[0]])}. Keep only the one that is the mask."
            )
        self._root, self._names = root, Names(found)

    def read(self, key: str, name: str, category: str) -> Mask | None:
        path = self._names.find(key, name)
        if path is None:
            return None
        if path.suffix.lower() == ".png":
            try:
                data = path.read_bytes()
            except OSError as error:
                raise UserError(f"{path} cannot be read ({error.strerror}).") from None
            return read_object_mask(path, data)
        entry = read_json(path)
        encoded = entry if isinstance(entry, list) else [entry]
        if not encoded:
            raise UserError(f"{path} is an empty list. A mask without pixels must have its size, and counts [H · W].")
        parts = [decode_mask(part, path) for part in encoded]
        if len({part.shape for part in parts}) > 1:
            raise UserError(f"{path} holds masks of several sizes, which cannot belong to one image.")
        return np.logical_or.reduce(parts)

    def has(self, key: str) -> bool:
        return self._names.find(key, "") is not None

    def digest(self) -> str:
        return FileTree(self._root).digest()


class _ShardMasks:
    """Shards of masks."""

    def __init__(self, manifest: Manifest) -> None:
        if manifest.made.get("tool") != MADE_BY:
            raise UserError(f"{manifest.root} is a set of images and not of masks. {_FORMS}")
        self._manifest, self._reader = manifest, ShardReader(manifest)
        first = np.concatenate([[0], np.cumsum(manifest.sample_counts)])
        self._ids = {
            key.decode(): int(first[number]) + row
            for number, shard in enumerate(manifest.shards)
            for row, key in enumerate(manifest.open_index(shard).keys.tolist())
        }

    def read(self, key: str, name: str, category: str) -> Mask | None:
        if key not in self._ids:
            return None
        sample = self._reader.read(self._ids[key])
        return read_object_mask(f"{key} of {sample['__url__']}", sample["png"])

    def has(self, key: str) -> bool:
        return key in self._ids

    def digest(self) -> str:
        return self._manifest.digest


# --- in training ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ObjectReader:
    """Reads the coverage of training samples, whose masks are found by key."""

    masks: Masks
    """Of the training set."""
    classes: Mapping[int, str]
    """COCO's category by class id, for the classes in which masks are validated."""
    size: int
    """Of the model's images."""
    patch_size: int
    """Of the model."""

    def read(self, key: str, label: int) -> Coverage | None:
        """The coverage of one sample, N = 1; None for other classes and samples without a mask. A mask that cannot be
        used is only a warning, because it is used for a measurement and not for training."""
        if label not in self.classes:
            return None
        try:
            mask = self.masks.read(key, "", self.classes[label])
            cropped = None if mask is None else images.crop_mask(torch.from_numpy(mask.copy()), self.size)
        except UserError as error:
            warnings.warn(f"{key} is left out of the validation of masks: {error}", stacklevel=2)
            return None
        return None if cropped is None else coverage(cropped[None], self.patch_size)
