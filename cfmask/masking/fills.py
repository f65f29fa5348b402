"""Random draws of a batch (masks and donors), and fills.

Draws are made on the CPU with the batch, from a generator keyed by (seed, epoch, step, lane). So masks and donors are
the same for any number of ranks and loader workers. Donors come from the same lane.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cfmask.masking.tensors import TensorFields
from cfmask.recipe import Method

RANDOM, OBJECT, CONTEXT = "random", "object", "context"
NO_FILL, SINGLE_FILL, MULTI_FILL = "no-fill", "single-fill", "multi-fill"


@dataclass(frozen=True)
class DrawSpec:
    """What has to be drawn for each sample."""

    mask: str
    """RANDOM, OBJECT or CONTEXT."""
    fill: str
    """NO_FILL, SINGLE_FILL or MULTI_FILL."""
    rate: float
    """Masking rate of random masks; other masks do not use it."""
    patches: int
    """Patches of an image, P."""

    @classmethod
    def of(cls, method: Method, patches: int) -> DrawSpec | None:
        """The draws of a resolved method on images of so many patches; None if it masks no image."""
        if not method.masked:
            return None
        assert method.mask is not None and method.fill is not None
        return cls(method.mask, method.fill, method.rate or 0.0, patches)


@dataclass(frozen=True)
class Draws(TensorFields):
    """The draws of n samples. A field is None if the method does not need it."""

    mask: Tensor | None = None
    """(n, P) bool, random masks that are filled."""
    keep: Tensor | None = None
    """(n, K) int64, ascending: patches that a random mask without fill keeps."""
    donors: Tensor | None = None
    """Indices into the same n samples: (n,) int64 for single-fill, (n, P) int64 for multi-fill."""


def draw(spec: DrawSpec | None, n: int, rng: np.random.Generator) -> Draws:
    """The draws of one lane's n samples at one step.

    Single-fill donors are a random permutation of the lane (an image may be its own donor). Multi-fill
    donors are (i + s) mod n with s uniform in 1…n-1, per patch, so never the image itself.

    Raises:
        ValueError: multi-fill for fewer than two samples.
    """
    if spec is None:
        return Draws()
    mask = keep = donors = None
    if spec.mask == RANDOM and spec.fill == NO_FILL:
        kept = int(spec.patches * (1 - spec.rate))
        order = rng.permuted(np.tile(np.arange(spec.patches), (n, 1)), axis=1)
        keep = torch.from_numpy(np.sort(order[:, :kept], axis=1))
    elif spec.mask == RANDOM:
        mask = torch.from_numpy(rng.random((n, spec.patches)) < spec.rate)
    if spec.fill == SINGLE_FILL:
        donors = torch.from_numpy(rng.permutation(n))
    elif spec.fill == MULTI_FILL:
        if n < 2:
            raise ValueError("multi-fill takes patches from other images, so it needs two samples in each lane")
        shift = rng.integers(1, n, size=(n, spec.patches))
        donors = torch.from_numpy((np.arange(n)[:, None] + shift) % n)
    return Draws(mask=mask, keep=keep, donors=donors)


def concat(lanes: Sequence[Draws]) -> Draws:
    """The draws of a batch of several lanes of equal size: donors become indices into the batch."""
    masks = [lane.mask for lane in lanes if lane.mask is not None]
    keeps = [lane.keep for lane in lanes if lane.keep is not None]
    donors = [lane.donors for lane in lanes if lane.donors is not None]
    return Draws(
        mask=torch.cat(masks) if masks else None,
        keep=torch.cat(keeps) if keeps else None,
        donors=torch.cat([d + i * len(d) for i, d in enumerate(donors)]) if donors else None,
    )


def fill(images: Tensor, mask: Tensor, donors: Tensor, patch_size: int) -> Tensor:
    """Counterfactual images: masked patches are replaced by the donors' patches at the same location.

    Patches are moved as blocks through a view of the patch grid, without an index for each pixel. Pixels beyond the
    last whole patch, which the tower does not see, stay.

    Args:
        images: (N, 3, H, W), any dtype, before normalisation.
        mask: (N, P) bool.
        donors: (N,) int64, a donor per image, or (N, P) int64, a donor per patch.
        patch_size: side of a patch in pixels; P = (H // patch_size) · (W // patch_size).
    """
    n, channels, height, width = images.shape
    rows, columns = height // patch_size, width // patch_size
    whole = images[:, :, : rows * patch_size, : columns * patch_size]
    # (N, rows, columns, 3, patch, patch): a patch is one cell of the grid
    cells = whole.unflatten(3, (columns, patch_size)).unflatten(2, (rows, patch_size)).permute(0, 2, 4, 1, 3, 5)
    if donors.dim() == 1:
        donated = cells[donors]
    else:
        place = torch.arange(rows * columns, device=images.device)
        grid_donors = donors.view(n, rows, columns)
        donated = cells[grid_donors, (place // columns).view(rows, columns), (place % columns).view(rows, columns)]
    filled = torch.where(mask.view(n, rows, columns, 1, 1, 1), donated, cells)
    filled = filled.permute(0, 3, 1, 4, 2, 5).reshape(n, channels, rows * patch_size, columns * patch_size)
    if filled.shape == images.shape:
        return filled
    result = images.clone()
    result[:, :, : rows * patch_size, : columns * patch_size] = filled
    return result
