"""What a plan reads: data sets and weights, whether they are there, and the commands that make what is missing. With
the published counts of known sets, a plan can be shown and its cost estimated before any shard exists."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cfmask.data import imagenet
from cfmask.data.benchmarks import BENCHMARKS, TRAIN, VAL
from cfmask.data.shards import MANIFEST, Manifest, find_set, manifest_if_there
from cfmask.evaluation.selection import HOLDOUT
from cfmask.models.weights import in_cache, is_path
from cfmask.recipe import Model
from cfmask.urls import is_remote
from launch.paper.holdout import IMAGES
from launch.submission.training import load_set


@dataclass(frozen=True)
class Source:
    """Where a known set comes from."""

    kind: str
    """The word of tools/make_shards.py."""
    files: str
    """What --source is given: the download, or the folder in it."""
    gigabytes: float | None
    """Size of the download in GB of 1e9 bytes, rounded; None: it is much larger than the set."""


_IMAGENET = Source("imagenet", "ILSVRC2012", 155)
SOURCES = {
    **dict.fromkeys((TRAIN.name, VAL.name, HOLDOUT), _IMAGENET),
    "imagenet-v2": Source("imagenet-v2", "imagenetv2-matched-frequency-format-val", 1.3),
    "imagenet-r": Source("imagenet-r", "imagenet-r.tar", 2.2),
    "imagenet-sketch": Source("imagenet-sketch", "ImageNet-Sketch.zip", 8),
    "objectnet": Source("objectnet", "objectnet-1.0", None),
    "imagenet-a": Source("imagenet-a", "imagenet-a.tar", 0.7),
}
"""By name of the set. Docs: docs/reproduce.md."""

WEIGHTS = {"ViT-B-32": "605 MB", "ViT-B-16": "599 MB", "ViT-L-14": "1.7 GB"}
"""Size of OpenAI's weights by architecture, in fp32 with the text tower, as open_clip downloads them from the hub.
(OpenAI's own files, in fp16, are half as large.)"""


CROP_BYTES = 3 * 224 * 224
"""Size of an image in shards of --store crop-raw."""


@dataclass(frozen=True)
class Materials:
    """The sets of a plan."""

    shards: str
    there: Mapping[str, Manifest]
    """Manifests of the sets that exist, by name."""
    missing: Mapping[str, int]
    """By name, the number of images that a missing set of the paper will have."""
    held_out: str | None
    """Name of the set that is held out of the training set, if one is."""

    @property
    def images(self) -> dict[str, int]:
        return {name: manifest.num_samples for name, manifest in self.there.items()} | dict(self.missing)

    def __str__(self) -> str:
        total = sum(self.images.values())
        return (
            f"{total:,} images in {len(self.images)} sets: as shards they are as large as the files that they are made "
            f"of, or {total * CROP_BYTES / 1e9:,.0f} GB with --store crop-raw."
        )

    @property
    def classes(self) -> tuple[tuple[str, str], ...]:
        """(wnid, display name) by class id; ImageNet's if no set exists."""
        return next((manifest.classes for manifest in self.there.values()), imagenet.classes())

    def selection(self, train_split: str) -> str:
        """A sentence: how many images will be trained on and held out."""
        trained_on = counted(self.held_out is not None)[TRAIN.name]
        if train_split in self.there and self.held_out not in self.missing:
            trained_on = self.images[train_split]
        held_out = f"{self.images[self.held_out]:,}" if self.held_out else "none"
        return f"Will train on {trained_on:,} images; {held_out} will be held out."

    def to_do(self) -> list[str]:
        """The commands that make the missing sets, each below a comment that says what it makes."""
        by_source: dict[Source, list[str]] = {}
        for name in self.missing:
            by_source.setdefault(SOURCES[name], []).append(name)
        lines = []
        for source, names in by_source.items():
            words = ["python", "tools/make_shards.py", source.kind, "--source", source.files, "--out", self.shards]
            words += ["--holdout", str(IMAGES)] if source is _IMAGENET and self.held_out else []
            note = "" if source.gigabytes is None else f": a download of {source.gigabytes:g} GB"
            if self.held_out in names and TRAIN.name in self.there:
                note += "; choose another folder: the training set has to be without these images"
            lines += [f"# {', '.join(names)}{note}", shlex.join(words)]
        return lines


def counted(holdout: bool) -> dict[str, int]:
    """Number of images of the paper's sets by name."""
    counts = {name: known.images for name, known in BENCHMARKS.items()}
    return counts | ({TRAIN.name: TRAIN.images - IMAGES, HOLDOUT: IMAGES} if holdout else {})


def look_for(shards: str, names: Iterable[str], held_out: str | None, *, may_be_missing: bool) -> Materials:
    """The sets of these names, and the held-out one. Whether that is as it should be is left to ``check_holdout``.

    Args:
        held_out: name of the set that is held out of the training set, if one is.
        may_be_missing: accept that a set of the paper does not exist yet, unless another one of the sets exists and
            has other classes than ImageNet's.

    Raises:
        UserError: a set is missing or damaged.
    """
    names = [name for name in dict.fromkeys(names) if name != held_out]
    local = not is_remote(shards)
    absent = [name for name in names if local and not os.path.exists(f"{find_set(shards, name)}/{MANIFEST}")]
    there = {name: load_set(shards, name) for name in names if name not in absent}
    counts = counted(held_out is not None)
    if held_out is not None and (manifest := manifest_if_there(find_set(shards, held_out))):
        there[held_out] = manifest
    ours = all(tuple(wnid for wnid, _ in manifest.classes) == imagenet.wnids() for manifest in there.values())
    accepted = may_be_missing and ours
    for name in absent:
        if not (accepted and name in counts):
            load_set(shards, name)  # raises the reason
    if held_out is not None and held_out not in there and accepted and held_out in counts:
        absent.append(held_out)
    return Materials(shards, there, {name: counts[name] for name in absent}, held_out)


def weights_to_do(model: Model, arch: str | None) -> list[str]:
    """The command that gets the weights of a model, below a comment; nothing if they are on this machine."""
    if in_cache(model.name, model.pretrained):
        return []
    if is_path(model.pretrained):
        return [f"# {model.pretrained} does not exist: copy the weights there, or give another path with --pretrained"]
    size = f": a download of {WEIGHTS[arch]}" if arch in WEIGHTS else ""
    name = f"weights/{model.name}.safetensors"
    words = ["python", "tools/build_head.py", "--model", model.name, "--pretrained", model.pretrained, "--out", name]
    return [f"# weights{size}, which jobs find in open_clip's cache", shlex.join(words)]
