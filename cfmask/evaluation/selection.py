"""Which sets may choose a model: a checkpoint, WiSE-FT's α, the ingredients of a soup.

On a set that has chosen a model, the model's accuracy is too high. The paper chooses on 10,240 images that are held out
of ImageNet's training set; ImageNet's validation set and the five shifted sets are for evaluation alone.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path, PurePath

import numpy as np
from numpy.typing import NDArray

from cfmask.data import imagenet
from cfmask.data.benchmarks import (
    ALIASES,
    BENCHMARKS,
    IMAGENET_A,
    IMAGENET_R,
    IMAGENET_SKETCH,
    OBJECTNET,
    TRAIN,
    VAL,
    wnids,
)
from cfmask.data.shard_index import Index
from cfmask.data.shards import Manifest
from cfmask.errors import UserError

logger = logging.getLogger(__name__)

HOLDOUT = "holdout"
"""Name of the set that tools/make_shards.py --holdout splits off the training set."""
IMAGENET_VAL = "ImageNet's validation set"
FLAG = "--select-on-test-set"
FLAG_HELP = (
    "choose on a known test set, which is refused otherwise: accuracies on it are then too high, and not comparable "
    "with published ones"
)
_NAMES = re.compile(
    r"(?<![a-z])(imagenet|ilsvrc|in(?=[^a-z]|v2))[^a-z0-9]*(\d+k?[^a-z0-9]*)?(img[^a-z0-9]*)?"
    r"([raco](?![a-z0-9])|(v2|renditions?|adversarial|sketch|val|validation|test)(?![a-z]))"
    r"|object[^a-z0-9]?net(?![a-z])"
    r"|(?<![a-z])test(set)?(?![a-z])"
)
"""Usual names of test sets, in lower case: imagenetv2-matched-frequency, wds_objectnet, in1k-val …"""


def known_test_set(name: str, manifest: Manifest | None = None) -> str | None:
    """The test set that a set is, by its name or content; None if it is not a known one.

    Short names (``val``, ``imagenet``, ``v2``, ``r`` …) are common for other data as well, and mean the paper's sets
    only with ImageNet's 1000 classes. Under any folder name, a set is recognised by its counts, except ImageNet-V2,
    which has as many images and classes as a held-out set of 10,000.

    Args:
        name: its folder, or a path of it.
        manifest: of the set; None: not available.
    """
    names = {PurePath(name).name}
    if manifest is not None:
        names |= {manifest.split, *([manifest.root.resolve().name] if isinstance(manifest.root, Path) else [])}
    for each in sorted(names):
        if _NAMES.search(each.lower()):
            return each
    if manifest is None or tuple(wnid for wnid, _ in manifest.classes) != imagenet.wnids():
        return None
    for each in sorted(names):
        benchmark = ALIASES.get(each.lower(), each)
        if benchmark in BENCHMARKS and benchmark != TRAIN.name:
            return IMAGENET_VAL if benchmark == VAL.name else benchmark
    if manifest.split == HOLDOUT and "holdout" in manifest.made:  # split off the training set by tools/make_shards.py
        return None
    counts = {wnid: n for (wnid, _), n in zip(manifest.classes, manifest.class_counts, strict=True) if n}
    images = sum(counts.values()) + manifest.bad_samples
    for known in (VAL, IMAGENET_SKETCH, IMAGENET_R, OBJECTNET, IMAGENET_A):
        same = (images, len(counts)) == (known.images, known.classes)
        even = known is not VAL or max(counts.values()) == known.images // known.classes
        if same and even and counts.keys() <= set(wnids(known.name)):
            return IMAGENET_VAL if known is VAL else known.name
    return None


def check_selection(what: str, name: str, manifest: Manifest | None, *, allowed: bool) -> bool:
    """Refuse a choice on a test set, unless the user allowed it with ``FLAG``; then log a warning.

    Args:
        what: the choice as the user gave it, such as "--holdout objectnet".
        name, manifest: the set, as in ``known_test_set``.
        allowed: whether ``FLAG`` was given.

    Returns:
        Whether the set is a test set.

    Raises:
        UserError: it is a test set, and ``allowed`` is false.
    """
    test_set = known_test_set(name, manifest)
    if test_set is None:
        return False
    called = name if test_set == name else f"{name} ({test_set})"
    why = (
        f"{what} chooses a model on {called}, which is a test set: the model's accuracy there is too high, and not "
        "comparable with the paper's, which chooses on images held out of the training set"
    )
    if not allowed:
        raise UserError(
            f"{why}. Choose on held-out images (tools/make_shards.py imagenet … --holdout 10240 makes the set "
            f"{HOLDOUT}), or allow the test set with {FLAG}."
        )
    logger.warning(f"{why} ({FLAG}).")
    return True


def refuse_idle_flag(allowed: bool, on_test_set: bool) -> None:
    """Raises UserError if ``FLAG`` was given and nothing is chosen on a test set."""
    if allowed and not on_test_set:
        raise UserError(f"{FLAG} would do nothing: no known test set chooses a model here. Leave it out.")


# --- images that are trained on ---------------------------------------------------------------------------------------


def trained_on(chooses: Manifest, train: Manifest) -> str | None:
    """A sentence about images of a set that chooses that are in the training set as well; None if there are none. This
    happens when the two sets were split by different seeds.

    One conversion with --holdout splits without overlap and records this in both manifests. Otherwise the indexes of
    both sets are compared, or, if one is behind a URL, a warning is logged.

    Raises:
        UserError: an index cannot be read.
    """
    facts = ("source", "seed", "holdout")
    ours, theirs = ([of.made.get(fact) for fact in facts] for of in (train, chooses))
    if ours == theirs and None not in ours:
        return None
    if isinstance(train.root, str) or isinstance(chooses.root, str):
        logger.warning(
            f"{chooses.root} and {train.root} are not from one conversion with --holdout, and sets behind a URL are "
            "not compared. Make sure that they share no image."
        )
        return None
    shared = _shared_keys(chooses, train)
    if not shared:
        return None
    return (
        f"{len(shared):,} of the {chooses.num_samples:,} images of {chooses.root} are in {train.root} as well, for "
        f"example {shared[0]}: checkpoints would be chosen on images that they were trained on. Conversions with "
        "another seed or another number of --holdout split differently."
    )


def _shared_keys(chooses: Manifest, train: Manifest) -> list[str]:
    """Keys of samples that are in both sets. In sets other than ImageNet, different images may have the same name
    (cat/001.jpg): there the bytes of the images must be equal as well, which only equal stores can show."""
    alike = (chooses.store, chooses.image_size) == (train.store, train.image_size)
    unique_names = tuple(wnid for wnid, _ in train.classes) == imagenet.wnids()
    if not (alike or unique_names):
        return []
    held: dict[bytes, tuple[int, int | None]] = {}
    for shard in chooses.shards:
        held.update(_images_by_key(chooses.open_index(shard)))
    keys = np.array(list(held), np.bytes_)
    shared = []
    for shard in train.shards:
        index = train.open_index(shard)
        for key, (size, crc) in _images_by_key(index, np.isin(index.keys, keys)).items():
            of_held = held[key]
            same_bytes = size == of_held[0] and (None in (crc, of_held[1]) or crc == of_held[1])
            if unique_names or same_bytes:
                shared.append(key.decode())
    return sorted(shared)


def _images_by_key(index: Index, chosen: NDArray[np.bool_] | None = None) -> dict[bytes, tuple[int, int | None]]:
    """Size and CRC of the image of each sample of a shard, or of those ``chosen``; None if no CRC was computed."""
    rows = np.arange(len(index)) if chosen is None else np.flatnonzero(chosen)
    members = index.image[rows]
    sizes = index.size[members].tolist()
    crcs = index.crc32[members].tolist() if len(index.crc32) else [None] * len(rows)
    return dict(zip(index.keys[rows].tolist(), zip(sizes, crcs, strict=True), strict=True))
