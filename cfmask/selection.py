"""Which sets may choose a model: a checkpoint, WiSE-FT's α, the ingredients of a soup.

A set that has chosen a model overrates it. The paper chooses on 10,240 images that are held out of ImageNet's training
set; ImageNet's validation set and the five shifted sets are there for evaluation alone.
"""

from __future__ import annotations

import re
import sys

from cfmask.data import imagenet
from cfmask.data.benchmarks import IMAGENET_A, IMAGENET_R, IMAGENET_SKETCH, OBJECTNET, SHIFTED, VAL, wnids
from cfmask.data.shards import Manifest
from cfmask.errors import UserError

HOLDOUT = "holdout"
"""The set that tools/make_shards.py --holdout takes out of the training set."""
FLAG = "--select-on-test-set"
FLAG_HELP = (
    "choose on a set that is known as a test set, which is refused otherwise: its accuracies are then too high, and "
    "not comparable with published ones"
)
_NAMES = re.compile(
    r"(wds[^a-z0-9]*)?"
    r"(imagenet[^a-z0-9]*(v2|r|renditions?|a|adversarial|c|o|sketch|val|validation|test)|objectnet)(?![a-z])"
)
"""Names of test sets as people write them, in lower case: imagenetv2-matched-frequency, wds_objectnet …"""


def known_test_set(name: str, manifest: Manifest | None = None) -> str | None:
    """The test set that a set is, by its name or by what is in it; None if it is not known as one.

    ``val`` and ``imagenet`` are names that everybody uses, and mean ImageNet's only with its 1000 classes. A set is
    recognised by its counts whatever its folder is called, but for ImageNet-V2, which has as many images and classes as
    a held-out set of 10,000.

    Args:
        name: of its folder.
        manifest: of the set; None: it is not there to be looked at.
    """
    names = {name, *([manifest.split] if manifest is not None else [])}
    for each in names:
        if each in {benchmark.name for benchmark in SHIFTED} or each == "test":
            return each
        if _NAMES.match(each.lower()):
            return each
    if manifest is None or tuple(wnid for wnid, _ in manifest.classes) != imagenet.wnids():
        return None
    if names & {VAL.name, "imagenet"}:
        return "ImageNet's validation set"
    if "holdout" in manifest.made:  # split off the training set by tools/make_shards.py
        return None
    counts = {wnid: n for (wnid, _), n in zip(manifest.classes, manifest.class_counts, strict=True) if n}
    for benchmark in (VAL, IMAGENET_SKETCH, IMAGENET_R, OBJECTNET, IMAGENET_A):
        same = (sum(counts.values()), len(counts)) == (benchmark.images, benchmark.classes)
        even = benchmark is not VAL or set(counts.values()) == {50}
        if same and even and counts.keys() <= set(wnids(benchmark.name)):
            return "ImageNet's validation set" if benchmark is VAL else benchmark.name
    return None


def check_selection(what: str, name: str, manifest: Manifest | None, *, allowed: bool) -> bool:
    """Refuse a choice on a test set unless it is asked for in so many words; then warn.

    Args:
        what: the choice, as the user gave it, such as "--holdout objectnet".
        name, manifest: the set, as for ``known_test_set``.
        allowed: whether ``FLAG`` was given.

    Returns:
        Whether it is a test set.

    Raises:
        UserError: it is one, and that was not asked for.
    """
    test_set = known_test_set(name, manifest)
    if test_set is None:
        return False
    called = name if test_set == name else f"{name} ({test_set})"
    why = (
        f"{what} chooses a model on {called}, which is a test set: the accuracy of what it chooses is too high there, "
        "and no longer comparable with the paper's, which chooses on images held out of the training set"
    )
    if not allowed:
        raise UserError(
            f"{why}. Choose on such a set (tools/make_shards.py imagenet … --holdout 10240 makes it: {HOLDOUT}), or go "
            f"on in spite of this with {FLAG}."
        )
    print(f"warning: {why} ({FLAG}).", file=sys.stderr)
    return True


def refuse_idle_flag(allowed: bool, on_test_set: bool) -> None:
    """Raises UserError if ``FLAG`` was given and nothing is chosen on a test set."""
    if allowed and not on_test_set:
        raise UserError(f"{FLAG} would do nothing: no set that is known as a test set chooses here. Leave it out.")
