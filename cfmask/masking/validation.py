"""How far masks fall on objects (appendix A.2 of the paper): what is masked beside where the object is known to be.

    image masking rate   n(M_CAM) / n(I)
    object masking rate  n(M_CAM ∩ M_seg) / n(M_seg)
    IoU                  n(M_CAM ∩ M_seg) / n(M_CAM ∪ M_seg)

n counts pixels of the model's input, M_CAM is the patch mask in pixels, M_seg the object's segmentation mask. A patch
is masked as a whole, so the object's pixels in each patch are counted once, and give all three for any number of masks:
nothing is blown up to pixels, and every count is an exact integer. A mask that knew nothing of the object would have an
object masking rate of about its image masking rate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cfmask.errors import UserError
from cfmask.masking.fills import CONTEXT, OBJECT
from cfmask.masking.masks import context_mask, object_mask

THRESHOLDS = tuple(n / 10 for n in range(1, 10))
"""At which masks are validated, unless others are asked for."""


def check_thresholds(thresholds: Sequence[float]) -> None:
    """Raises UserError: thresholds of a CAM that are out of range, or there twice."""
    if not all(0 <= threshold < 1 for threshold in thresholds):
        raise UserError("--thresholds must lie in 0…1, 1 excluded: no patch's relevance is above its image's maximum.")
    if len(set(thresholds)) != len(thresholds):
        raise UserError(f"--thresholds has a value twice: {' '.join(map(str, thresholds))}.")


@dataclass(frozen=True)
class Coverage:
    """Where the objects of N images are, as far as patch masks can tell.

    patches: (N, P) int32, pixels of the object in each patch. total: (N,) int64, in the whole image; more than the sum
    of ``patches`` where the image is not a multiple of the patch and the object reaches into what is left over;
    UNKNOWN where nobody knows. patch_pixels, image_pixels: pixels of a patch, of an image.
    """

    patches: Tensor
    total: Tensor
    patch_pixels: int
    image_pixels: int

    @property
    def known(self) -> Tensor:
        """(N,) bool, of which images there is a segmentation."""
        return self.total != UNKNOWN

    def map(self, function: Callable[[Tensor], Tensor]) -> Coverage:
        """``function`` applied to each tensor (moving to a device, pinning)."""
        return replace(self, patches=function(self.patches), total=function(self.total))


UNKNOWN = -1


def nothing_known(n: int, size: int, patch_size: int) -> Coverage:
    """The coverage of n images of ``size`` × ``size`` pixels without a segmentation."""
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
    """(N, P) relevance → (N, T, P) bool: the mask of this kind (object, context) at each threshold.

    Raises:
        ValueError: another kind of mask: a random one has no threshold.
    """
    if mask not in (OBJECT, CONTEXT):
        raise ValueError(f"a {mask} mask does not depend on a threshold")
    of = object_mask if mask == OBJECT else context_mask
    return torch.stack([of(cam, threshold) for threshold in thresholds], 1)


@dataclass(frozen=True)
class MaskRates:
    """(N, T) float64 each, in 0…1: of N images under T masks each. object and iou are NaN where M_seg is empty."""

    image: Tensor
    object: Tensor
    iou: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> MaskRates:
        """``function`` applied to each tensor."""
        return MaskRates(function(self.image), function(self.object), function(self.iou))


def mask_rates(masks: Tensor, where: Coverage) -> MaskRates:
    """The three rates of each image under each of its masks. masks: (N, T, P) bool. Waits for no device."""
    masked = masks.sum(2) * where.patch_pixels
    both = (masks * where.patches[:, None, :]).sum(2)
    either = masked + where.total[:, None] - both
    empty = where.total[:, None] == 0

    def share(part: Tensor, whole: Tensor) -> Tensor:
        return (part.double() / whole.double()).masked_fill(empty, torch.nan)

    return MaskRates(masked.double() / where.image_pixels, share(both, where.total[:, None]), share(both, either))


@dataclass(frozen=True)
class Tally:
    """Sums over images, which add up over batches, shards and ranks.

    image, object, iou: (T,) float64, sums of rates. images, with_object: () int64, images counted, and those whose
    M_seg is not empty: the averages of ``object`` and ``iou`` are over these.
    """

    image: Tensor
    object: Tensor
    iou: Tensor
    images: Tensor
    with_object: Tensor

    def __add__(self, other: Tally) -> Tally:
        return Tally(*(ours + theirs for ours, theirs in zip(self._parts, other._parts, strict=True)))

    @property
    def _parts(self) -> tuple[Tensor, ...]:
        return self.image, self.object, self.iou, self.images, self.with_object

    def to_vector(self) -> Tensor:
        """(3 T + 2,) float32, to be added up over ranks; ``from_vector`` takes it back."""
        return torch.cat([part.reshape(-1).float() for part in self._parts])

    @classmethod
    def from_vector(cls, values: Sequence[float]) -> Tally:
        *sums, images, with_object = values
        n = len(sums) // 3
        return cls.from_lists([sums[:n], sums[n : 2 * n], sums[2 * n :], int(images), int(with_object)])

    def means(self) -> tuple[list[float], list[float], list[float]]:
        """Image masking rate, object masking rate, IoU, each by threshold; NaN where there is no image to average."""
        image, found, iou = (self.image / self.images, self.object / self.with_object, self.iou / self.with_object)
        return image.tolist(), found.tolist(), iou.tolist()

    def to_result(self) -> dict[str, Any]:
        """For a reader: numbers of images and mean rates as shares of 1, None where there is nothing to average."""
        means = ([None if x != x else x for x in of_rate] for of_rate in self.means())
        named = dict(zip(("image_masking_rate", "object_masking_rate", "iou"), means, strict=True))
        return {"images": int(self.images), "without_object": int(self.images - self.with_object), **named}

    def to_lists(self) -> list[list[float] | int]:
        """For a JSON file, exactly; ``from_lists`` takes it back."""
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
    """Sum the rates of images; of all, or of those ``chosen``, (N,) bool."""
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
    """Tallies by name, each added up."""
    total: dict[str, Tally] = {}
    for of_part in tallies:
        for name, part in of_part.items():
            total[name] = total[name] + part if name in total else part
    return total
