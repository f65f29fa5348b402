"""A head from the class means of a tower's features, for towers without a text tower.

Row c of the head is s · m̂_c. m̂_c is the mean of the L2-normalised features of the images of class c, normalised: as in
a zero-shot head, with images in place of captions. The scale s, at most CLIP's largest of 100, minimises the
cross-entropy on images of the set. There is no bias. Source: Snell et al., "Prototypical Networks", NeurIPS 2017, with
cosines.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cfmask.data.shards import Manifest
from cfmask.data.stream import eval_batches
from cfmask.errors import UserError
from cfmask.models.head import ModelInfo
from cfmask.models.initial import InitialWeights, initial_tower, origin_of
from cfmask.models.tower import Classifier, Normalise
from cfmask.runtime.progress import progress_bar

MAX_SCALE = 100.0
"""CLIP's largest logit scale."""
_SCALE_IMAGES = 4096
"""Images that decide the scale, at most; they are evenly spaced."""


@dataclass(frozen=True)
class FeatureScale:
    """Mean and standard deviation over images of |f|² / D, the mean square of an image's feature f (D,)."""

    mean: float
    std: float


def class_means_info(start: InitialWeights, manifest: Manifest) -> ModelInfo:
    """The info of ``class_means_model``, before it is made; equal infos mean equal models."""
    return replace(
        start.info,
        classes=tuple(wnid for wnid, _ in manifest.classes),
        class_names=tuple(display for _, display in manifest.classes),
        provenance=f"{origin_of(start)}; class means of {manifest.num_samples} images (set {manifest.digest})",
    )


def class_means_model(
    start: InitialWeights, manifest: Manifest, device: str, *, batch_size: int = 64, loader_workers: int = 2
) -> tuple[Classifier, ModelInfo, FeatureScale]:
    """The model of a tower and the class means of a set, on the CPU; and the scale of the tower's features there.

    Args:
        start: as returned by ``initial.describe``.
        manifest: the set.

    Raises:
        UserError: as ``initial_tower``; a class without images, or a feature that is zero or not finite.
    """
    info = class_means_info(start, manifest)
    tower, _ = initial_tower(start)
    model = Classifier(tower, nn.Linear(start.info.config["embed_dim"], len(info.classes))).to(device)
    normalise = Normalise(info.mean, info.std).to(device)
    sums = torch.zeros(model.head.weight.shape, dtype=torch.float64, device=device)
    counts = torch.zeros(len(sums), dtype=torch.float64, device=device)
    squares, kept_features, kept_labels = [], [], []
    stride, seen = -(-manifest.num_samples // _SCALE_IMAGES), 0
    batches = eval_batches(
        manifest,
        image_size=model.image_size,
        batch_size=batch_size,
        rank=0,
        world_size=1,
        loader_workers=loader_workers,
    )
    with torch.no_grad(), progress_bar(total=manifest.num_samples, unit=" images", desc="class means") as bar:
        for batch in batches:
            labels = batch.labels.to(device)
            features = model.encode(normalise(batch.images.to(device)))
            squares.append(features.double().square().mean(1))
            features = F.normalize(features, dim=1)
            sums.index_add_(0, labels, features.double())
            counts.index_add_(0, labels, torch.ones_like(labels, dtype=torch.float64))
            chosen = slice(-seen % stride, None, stride)
            kept_features.append(features[chosen])
            kept_labels.append(labels[chosen])
            seen += len(labels)
            bar.update(len(labels))
        if empty := [name for name, count in zip(info.classes, counts.tolist(), strict=True) if not count]:
            raise UserError(f"{manifest.root} has no images of {len(empty)} classes ({', '.join(empty[:5])}): no mean.")
        means = F.normalize(sums / counts[:, None], dim=1).float()
        scale = _best_scale(torch.cat(kept_features) @ means.T, torch.cat(kept_labels))
        model.head.weight.copy_(scale * means)
        model.head.bias.zero_()
    square = torch.cat(squares)
    if not square.isfinite().all() or not (square > 0).all():
        raise UserError(f"The tower gives features that are zero or not finite for images of {manifest.root}.")
    return model.cpu(), info, FeatureScale(square.mean().item(), square.std(correction=0).item())


def _best_scale(cosines: Tensor, labels: Tensor) -> float:
    """The scale in (0, MAX_SCALE] that minimises the cross-entropy of scaled cosines (N, classes), to 1e-6. The
    cross-entropy is convex in the scale, so the sign of its derivative decides each bisection."""
    cosines = cosines.double()
    right = cosines.gather(1, labels[:, None]).squeeze(1)
    low, high = 0.0, MAX_SCALE
    while high - low > 1e-6:
        scale = (low + high) / 2
        slope = ((scale * cosines).softmax(1) * cosines).sum(1) - right
        low, high = (scale, high) if slope.mean() < 0 else (low, scale)
    return high
