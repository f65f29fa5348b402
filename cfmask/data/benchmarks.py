"""The evaluation sets of the paper: numbers of images and classes, and the classes.

Wrong copies are common and give wrong results without an error (an ObjectNet of 23.7k images instead of 18.6k,
ImageNet-V2 with its folders sorted as strings). So counts are checked before a set is converted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cfmask.data import imagenet
from cfmask.data.shards import Manifest


@dataclass(frozen=True)
class Benchmark:
    """Counts of a complete copy of a set."""

    name: str
    images: int
    classes: int = 1000
    """Folders that hold images."""
    class_ids: int = 1000
    """Class ids of ImageNet that are right for some image; more than ``classes`` if a class of the set is several of
    ImageNet."""

    def deviations(self, images: Mapping[str, int], class_ids: int) -> list[str]:
        """Differences of a copy, in words; [] for a complete one.

        Args:
            images: number of images by class folder, possibly with empty folders.
            class_ids: as the field of this name.
        """
        found = {
            "images": (sum(images.values()), self.images),
            "classes with images": (sum(n > 0 for n in images.values()), self.classes),
            "ImageNet class ids": (class_ids, self.class_ids),
        }
        return [f"{has:,} {what} instead of {should:,}" for what, (has, should) in found.items() if has != should]


TRAIN = Benchmark("train", 1_281_167)
VAL = Benchmark("val", 50_000)
IMAGENET_V2 = Benchmark("imagenet-v2", 10_000)
IMAGENET_R = Benchmark("imagenet-r", 30_000, 200, 200)
IMAGENET_SKETCH = Benchmark("imagenet-sketch", 50_889)
OBJECTNET = Benchmark("objectnet", 18_574, 113, 125)
IMAGENET_A = Benchmark("imagenet-a", 7_500, 200, 200)

SHIFTED = (IMAGENET_V2, IMAGENET_R, IMAGENET_SKETCH, OBJECTNET, IMAGENET_A)
"""The five sets of the robustness average, in the order of the paper's tables."""

ALIASES = {
    "imagenet": VAL.name,
    "v2": IMAGENET_V2.name,
    "r": IMAGENET_R.name,
    "sketch": IMAGENET_SKETCH.name,
    "objectnet": OBJECTNET.name,
    "a": IMAGENET_A.name,
}
"""Short names of the paper's six sets."""

BENCHMARKS = {benchmark.name: benchmark for benchmark in (TRAIN, VAL, *SHIFTED)}


def deviations_of(manifest: Manifest) -> list[str]:
    """Differences of a set from the known set of its name, in words; [] for a complete copy or an unknown set. A set
    named train or val is a known one only if it has ImageNet's classes."""
    known = BENCHMARKS.get(manifest.split)
    classes = [wnid for wnid, _ in manifest.classes]
    if known is None or (known in (TRAIN, VAL) and tuple(classes) != imagenet.wnids()):
        return []
    counts = {wnid: n for wnid, n in zip(classes, manifest.class_counts, strict=True) if n}
    deviations = known.deviations(counts, len(right_ids(manifest)))
    if known is not OBJECTNET and (foreign := sorted(set(counts) - set(wnids(known.name)))):
        deviations.append(f"images of {len(foreign)} classes that are not its, such as {foreign[0]}")
    return deviations


def right_ids(manifest: Manifest) -> list[int]:
    """Class ids that are right for some image of a set, sorted."""
    seen = (label for label, count in enumerate(manifest.class_counts) if count)
    return sorted({i for label in seen for i in manifest.accepted.get(label, (label,))})


def wnids(name: str) -> tuple[str, ...]:
    """The sorted wnids of a known set: 200 for ImageNet-R and -A, else all 1000."""
    return {"imagenet-r": imagenet.r_wnids, "imagenet-a": imagenet.a_wnids}.get(name, imagenet.wnids)()
