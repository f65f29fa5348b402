"""A conversion as the user asks for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cfmask.data import images


@dataclass(frozen=True)
class Request:
    """A conversion: its source, its output and its options.

    kind: imagenet, imagenet-v2, imagenet-r, imagenet-a, imagenet-sketch, objectnet or folder.
    source: folder or archive, or Parquet files.
    out: gets a folder for each split.
    split: the one to convert; None: all that exist. For the kind folder also the name of the source's only split.
    holdout: number of images to move from train to a split of that name.
    allow_count_mismatch: convert a copy of a known set that lacks images or classes.
    devkit: imagenet: file of labels of a validation set that is not sorted into class folders.
    mappings: objectnet: folder of its mapping files.
    border_removed: objectnet: this copy has lost its red border.
    classes: folder: class list.
    class_to_idx: folder: file with torchvision's mapping of class folders to class ids.
    labels: folder: table of paths and labels.
    image_column: Parquet: needed if several columns hold images.
    label_column: Parquet: needed if several columns may be labels.
    """

    kind: str
    source: Path
    out: Path
    seed: int = 0
    samples_per_shard: int = 1000
    store: str = images.ORIGINAL
    image_size: int | None = None
    split: str | None = None
    holdout: int | None = None
    allow_count_mismatch: bool = False
    devkit: Path | None = None
    mappings: Path | None = None
    border_removed: bool = False
    classes: Path | None = None
    class_to_idx: Path | None = None
    labels: Path | None = None
    image_column: str | None = None
    label_column: str | None = None
