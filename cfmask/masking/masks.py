"""Patch masks. A mask is (N, P) bool on the patch grid, row-major; True is masked."""

from __future__ import annotations

from torch import Tensor


def normalised(cam: Tensor) -> Tensor:
    """(N, P) relevance → each image divided by (its maximum + 1e-8)."""
    return cam / (cam.amax(dim=1, keepdim=True) + 1e-8)


def object_mask(cam: Tensor, threshold: float) -> Tensor:
    """Patches that matter: normalised relevance above the threshold. All-zero relevance masks nothing."""
    return normalised(cam) > threshold


def context_mask(cam: Tensor, threshold: float) -> Tensor:
    """Patches that do not matter: the complement of the object mask."""
    return ~object_mask(cam, threshold)
