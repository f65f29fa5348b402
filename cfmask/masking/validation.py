"""Rates that measure how far masks fall on objects (appendix A.2 of the paper).

    image masking rate   n(M_CAM) / n(I)
    object masking rate  n(M_CAM ∩ M_seg) / n(M_seg)
    IoU                  n(M_CAM ∩ M_seg) / n(M_CAM ∪ M_seg)

n counts pixels of the model's input, M_CAM is the patch mask in pixels, M_seg the object's segmentation mask. A patch
is masked as a whole. So the object's pixels in each patch are counted once, and give the rates of any number of masks
in exact integers. A mask that is independent of the object has an object masking rate of about its image masking rate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cfmask.errors import UserError
from cfmask.masking.fills import CONTEXT, OBJECT
from cfmask.masking.masks import context_mask, object_mask
from cfmask.masking.tensors import TensorFields

THRESHOLDS = tuple(n / 10 for n in range(1, 10))
"""Thresholds at which masks are validated by default."""


def check_thresholds(thresholds: Sequence[float]) -> None:
    """Raises UserError if thresholds of a CAM are out of range or repeated."""
    if not all(0 <= threshold < 1 for threshold in thresholds):
        raise UserError("--thresholds must be at least 0 and below 1, the maximum of an image's relevance.")
    if len(set(thresholds)) != len(thresholds):
        raise UserError(f"--thresholds repeats a value: {' '.join(map(str, thresholds))}.")


@dataclass(frozen=True)
class Coverage(TensorFields):
    """Where the objects of N images are, on the patch grid."""

    patches: Tensor
    """(N, P) int32, pixels of the object in each patch."""
    total: Tensor
    """(N,) int64, pixels of the object in the image, or UNKNOWN. It is more than the sum of ``patches`` if the object
    reaches beyond the last whole patch."""
    patch_pixels: int
    """Pixels of a patch."""
    image_pixels: int
    """Pixels of an image."""

    @property
    def known(self) -> Tensor:
        """(N,) bool, which images have a segmentation."""
        return self.total != UNKNOWN


UNKNOWN = -1


def nothing_known(n: int, size: int, patch_size: int) -> Coverage:
    """The coverage of n images, ``size`` × ``size`` pixels, without segmentations."""
    patches = (size // patch_size) ** 2
    return Coverage(
        patches=torch.zeros(n, patches, dtype=torch.int32),
        total=torch.full((n,), UNKNOWN),
        patch_pixels=patch_size**2,
        image_pixels=size**2,
    )


def coverage(segmentation: Tensor, patch_size: int) -> Coverage:
    """Count the object's pixels on the patch grid.

    Args:
        segmentation: (N, H, W) bool, M_seg in the model's pixels.

    Raises:
        ValueError: another dtype or rank, or an image smaller than a patch.
    """
    if segmentation.dtype != torch.bool or segmentation.dim() != 3:
        raise ValueError(f"a segmentation is bool (N, H, W), not {segmentation.dtype} {tuple(segmentation.shape)}")
    n, height, width = segmentation.shape
    rows, columns = height // patch_size, width // patch_size
    if not rows or not columns:
        raise ValueError(f"an image of {height} × {width} pixels has no patch of {patch_size}")
    grid = segmentation[:, : rows * patch_size, : columns * patch_size]
    counts = grid.reshape(n, rows, patch_size, columns, patch_size).sum((2, 4), dtype=torch.int32)
    return Coverage(counts.flatten(1), segmentation.flatten(1).sum(1), patch_size**2, height * width)


def masks_at(cam: Tensor, thresholds: Sequence[float], mask: str = OBJECT) -> Tensor:
    """(N, P) relevance → (N, T, P) bool: the object or context mask at each threshold. Raises ValueError for other
    masks."""
    if mask not in (OBJECT, CONTEXT):
        raise ValueError(f"a {mask} mask does not depend on a threshold")
    of = object_mask if mask == OBJECT else context_mask
    return torch.stack([of(cam, threshold) for threshold in thresholds], 1)


@dataclass(frozen=True)
class MaskRates(TensorFields):
    """Rates of N images under T masks each: (N, T) float64, in 0…1."""

    image: Tensor
    object: Tensor
    """NaN if M_seg is empty, like ``iou``."""
    iou: Tensor


def mask_rates(masks: Tensor, where: Coverage) -> MaskRates:
    """The three rates of each image under each of its masks, (N, T, P) bool. Does not wait for the device."""
    masked = masks.sum(2) * where.patch_pixels
    both = (masks * where.patches[:, None, :]).sum(2)
    either = masked + where.total[:, None] - both
    empty = where.total[:, None] == 0

    def share(part: Tensor, whole: Tensor) -> Tensor:
        return (part.double() / whole.double()).masked_fill(empty, torch.nan)

    return MaskRates(masked.double() / where.image_pixels, share(both, where.total[:, None]), share(both, either))


@dataclass(frozen=True)
class Tally:
    """Sums of rates over images. They are summed further over batches, shards and ranks."""

    image: Tensor
    """(T,) float64, like ``object`` and ``iou``."""
    object: Tensor
    iou: Tensor
    images: Tensor
    """() int64, number of images."""
    with_object: Tensor
    """() int64, images whose M_seg is not empty; ``object`` and ``iou`` are averaged over these."""

    def __add__(self, other: Tally) -> Tally:
        return Tally(*(ours + theirs for ours, theirs in zip(self._parts, other._parts, strict=True)))

    @property
    def _parts(self) -> tuple[Tensor, ...]:
        return self.image, self.object, self.iou, self.images, self.with_object

    def to_vector(self) -> Tensor:
        """(3 T + 2,) float32, which can be summed over ranks; the inverse of ``from_vector``."""
        return torch.cat([part.reshape(-1).float() for part in self._parts])

    @classmethod
    def from_vector(cls, values: Sequence[float]) -> Tally:
        *sums, images, with_object = values
        n = len(sums) // 3
        return cls.from_lists([sums[:n], sums[n : 2 * n], sums[2 * n :], int(images), int(with_object)])

    def means(self) -> tuple[list[float], list[float], list[float]]:
        """Image masking rate, object masking rate and IoU by threshold; NaN without images."""
        means = self.image / self.images, self.object / self.with_object, self.iou / self.with_object
        return means[0].tolist(), means[1].tolist(), means[2].tolist()

    def to_result(self) -> dict[str, Any]:
        """Numbers of images, and mean rates in 0…1; None without images."""
        means = ([None if x != x else x for x in of_rate] for of_rate in self.means())
        named = dict(zip(("image_masking_rate", "object_masking_rate", "iou"), means, strict=True))
        return {"images": int(self.images), "without_object": int(self.images - self.with_object), **named}

    def to_lists(self) -> list[list[float] | int]:
        """Exact values for a JSON file; the inverse of ``from_lists``."""
        return [part.tolist() for part in self._parts]

    @classmethod
    def from_lists(cls, lists: Sequence[list[float] | int]) -> Tally:
        image, found, iou, images, with_object = lists
        return cls(
            image=torch.tensor(image, dtype=torch.float64),
            object=torch.tensor(found, dtype=torch.float64),
            iou=torch.tensor(iou, dtype=torch.float64),
            images=torch.tensor(images),
            with_object=torch.tensor(with_object),
        )


def tally(of: MaskRates, chosen: Tensor | None = None) -> Tally:
    """Sum the rates of all images, or of those in ``chosen``, (N,) bool."""
    if chosen is None:
        chosen = torch.ones(len(of.image), dtype=torch.bool, device=of.image.device)
    known = chosen & ~of.iou[:, 0].isnan()

    def total(values: Tensor, rows: Tensor) -> Tensor:
        return values.masked_fill(~rows[:, None], 0.0).sum(0)

    return Tally(
        image=total(of.image, chosen),
        object=total(of.object, known),
        iou=total(of.iou, known),
        images=chosen.sum(),
        with_object=known.sum(),
    )


def add_up(tallies: Sequence[Mapping[str, Tally]]) -> dict[str, Tally]:
    """Sum tallies by name."""
    total: dict[str, Tally] = {}
    for of_part in tallies:
        for name, part in of_part.items():
            total[name] = total[name] + part if name in total else part
    return total
