"""Segmentation masks: where the object of a sample is, read from files.

    DIR/…/KEY.png                one mask a sample: 0, and one other value where the object is
    DIR/…/KEY.json               the same run-length encoded: {"size": [H, W], "counts": …}, as COCO has it; or a list
                                 of such, whose union it is
    FILE.json                    COCO annotations of a whole set (cfmask/data/coco.py): panoptic ones with their PNGs of
                                 segment ids, or run-length encoded instances
    SET/manifest.json            shards of masks, as tools/segment.py writes them

Masks belong to the images as they were before the recipe's resize and crop, and go through the same, each pixel taking
the value of the nearest one. A sample's mask is found by its key; or where its image was a file of another name, by
FOLDER/NAME (DIR/…/n02085620/n02085620_1.png) or NAME, without ending, of that file.
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
from cfmask.errors import UserError
from cfmask.masking.validation import Coverage, coverage

MADE_BY = "segment"
"""``made["tool"]`` in the manifest of shards of masks."""

_FORMS = (
    "Give a folder of PNGs or run-length JSONs named by sample key, a COCO annotation file (.json), or shards of masks "
    "that tools/segment.py made."
)


class Masks(Protocol):
    """Where masks are read from. Threads may share it."""

    def read(self, key: str, name: str, category: str) -> Mask | None:
        """The mask of one sample.

        Args:
            key: of the sample. name: of the file that its image was (folder/file), or "".
            category: COCO's name of what the sample shows; masks of one object a sample need none.

        Returns:
            bool (H, W), possibly without any pixel; None if there is no mask for this sample.

        Raises:
            UserError: it cannot be read, or is no mask.
        """
        ...

    def has(self, key: str) -> bool:
        """Whether the sample of this key has a mask, so far as its key alone tells."""
        ...

    def digest(self) -> str:
        """A hash that changes when the masks do."""
        ...


def open_masks(where: str | Path, panoptic_pngs: Path | None = None) -> Masks:
    """The masks that a path names.

    Args:
        panoptic_pngs: folder or zip of the PNGs of panoptic annotations, if it is not beside them.

    Raises:
        UserError: there is nothing, or nothing of the forms above.
    """
    path = Path(where)
    if path.is_file() and path.suffix.lower() == ".json":
        return CocoMasks(path, panoptic_pngs)
    if panoptic_pngs is not None:
        raise UserError(
            f"--panoptic-pngs would do nothing: the PNGs of panoptic annotations belong to a JSON, and --segmentation "
            f"names {path}."
        )
    if path.is_file() and path.suffix.lower() == ".zip":
        raise UserError(
            f"{path} is an archive. Unpack it and give the COCO annotation file (.json) or the folder of masks in it; "
            f"the zip of PNGs that lies beside a panoptic JSON can stay packed."
        )
    if (path / MANIFEST).is_file() or any(path.glob(f"*/{MANIFEST}")):  # of a folder of sets, its error says which
        return _ShardMasks(load_manifest(path))
    if path.is_dir():
        return _FileMasks(path)
    raise UserError(f"There are no masks at {path}. {_FORMS}")


# --- classes ----------------------------------------------------------------------------------------------------------

ALL = "all"

Classes = Sequence[tuple[str, str]]
"""(wnid or folder name, display name) by class id."""


def categories(classes: Classes) -> list[str]:
    """COCO's name of what each class shows: its super-class, or else its own name."""
    known = imagenet.super_class_of()
    return [known.get(folder, name) for folder, name in classes]


def class_groups(classes: Classes, names: Sequence[str] | None = None) -> dict[str, frozenset[int]]:
    """Class ids by group.

    Args:
        names: dog, cat, bird: ImageNet's classes of these super-classes (``imagenet.SUPER_CLASSES``); all: those of all
            three, or every class of a set that has none of them; or a single class, by folder or display name. By
            default, those of the first four that the set has.

    Raises:
        UserError: a group that is none of these, or that is named twice.
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
                f"{len(classes)} classes begin with {classes[0][0]}. Leave --groups out, or name classes of the set."
            )
        if name not in groups:
            raise UserError(
                f"There is no group {name!r}: groups are {', '.join(imagenet.SUPER_CLASSES)}, {ALL}, and each class of "
                f"the set by its folder or display name ({', '.join(classes[0])}, for one)."
            )
    if len(set(names)) != len(names):
        raise UserError(f"--groups names a group twice: {' '.join(names)}.")
    return {name: groups[name] for name in names}


# --- a mask a sample --------------------------------------------------------------------------------------------------


class _FileMasks:
    """A folder of PNGs and run-length JSONs."""

    def __init__(self, root: Path) -> None:
        found = sorted(path for path in root.rglob("*") if path.suffix.lower() in (".png", ".json") and path.is_file())
        if not found:
            raise UserError(f"{root} holds no masks: there is no .png or .json in it. {_FORMS}")
        endings: dict[Path, list[str]] = {}
        for path in found:
            endings.setdefault(path.with_suffix(""), []).append(path.suffix)
        if twice := [stem for stem, of_stem in endings.items() if len(of_stem) > 1]:
            raise UserError(
                f"{twice[0]} is there as {' and as '.join(endings[twice[0]])}: which of them is the mask? Keep one."
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
            raise UserError(f"{path} is an empty list: a mask without any pixel has its size, and counts [H · W].")
        parts = [decode_mask(part, path) for part in encoded]
        if len({part.shape for part in parts}) > 1:
            raise UserError(f"{path} holds masks of several sizes, which cannot be of one image.")
        return np.logical_or.reduce(parts)

    def has(self, key: str) -> bool:
        return self._names.find(key, "") is not None

    def digest(self) -> str:
        return FileTree(self._root).digest()


class _ShardMasks:
    """Shards of masks."""

    def __init__(self, manifest: Manifest) -> None:
        if manifest.made.get("tool") != MADE_BY:
            raise UserError(f"{manifest.root} is a set of images, not of masks. {_FORMS}")
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
    """Reads where the objects of training samples are, as far as patch masks can tell; by key alone.

    masks: of the training set.
    classes: COCO's name of what a class's samples show, by class id, for those classes that masks are validated on.
    size, patch_size: of the model.
    """

    masks: Masks
    classes: Mapping[int, str]
    size: int
    patch_size: int

    def read(self, key: str, label: int) -> Coverage | None:
        """Of one sample, N = 1; None if it is of another class, or there is no mask for it. A mask that cannot be used
        is none, with a warning: what is only measured ends no training."""
        if label not in self.classes:
            return None
        try:
            mask = self.masks.read(key, "", self.classes[label])
            cropped = None if mask is None else images.crop_mask(torch.from_numpy(mask.copy()), self.size)
        except UserError as error:
            warnings.warn(f"{key} takes no part in the validation of masks: {error}", stacklevel=2)
            return None
        return None if cropped is None else coverage(cropped[None], self.patch_size)
