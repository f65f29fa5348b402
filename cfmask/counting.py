"""Exact counts of right predictions and of confidences. Each sample is counted once, on any number of ranks.

All counts are integers (confidences in units of 2^-24), so that sums do not depend on the order of additions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cfmask.data.label_space import LabelSpace
from cfmask.data.stream import MicroBatch
from cfmask.models.tower import Classifier, Normalise
from cfmask.runtime.heartbeat import WAITING, beat

BINS = 15
"""Bins of the confidence, of equal width, as in Guo et al., "On Calibration of Modern Neural Networks", ICML 2017."""
_UNIT = 1 << 24


@dataclass(frozen=True)
class Score:
    """Accuracy as counts."""

    correct: int
    total: int

    @property
    def top1(self) -> float:
        """Percent."""
        return 100 * self.correct / self.total if self.total else float("nan")

    @property
    def interval(self) -> tuple[float, float]:
        """95 % confidence interval of top1 in percent: Wilson's score interval, valid near 0 and 100 % as well."""
        if not self.total:
            return float("nan"), float("nan")
        z, n, p = 1.959963984540054, self.total, self.correct / self.total
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return 100 * max(0.0, middle - half), 100 * min(1.0, middle + half)


class Counts:
    """Counts of M models for C classes, on a device.

    per_class: (M, C, 2) int64: samples of the class, right predictions.
    bins: (M, BINS, 3) int64, by confidence: samples, right predictions, sum of confidences in units of 2^-24.
    not_finite: (M,) int64: samples with logits that are not finite.
    """

    NAMES = ("per_class", "bins", "not_finite")

    def __init__(self, models: int, classes: int, device: torch.device) -> None:
        self.per_class = torch.zeros(models, classes, 2, dtype=torch.int64, device=device)
        self.bins = torch.zeros(models, BINS, 3, dtype=torch.int64, device=device)
        self.not_finite = torch.zeros(models, dtype=torch.int64, device=device)

    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.NAMES}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in self.tensors().items():
            tensor.copy_(tensors[name])

    def take(self, other: Counts) -> None:
        """Add the counts of ``other``, and set them to zero there."""
        for own, others in zip(self.tensors().values(), other.tensors().values(), strict=True):
            own += others
            others.zero_()

    def add(self, model: int, logits: Tensor, labels: Tensor, label_space: LabelSpace) -> None:
        """Count a batch, (N, C) logits and (N,) labels, without waiting for the device."""
        logits = logits.float()[:, label_space.ids]
        finite = logits.isfinite().all(1)
        confidence, place = logits.softmax(1).nan_to_num(0.0).max(1)
        prediction = label_space.ids[place]
        is_right = prediction == labels if label_space.right is None else label_space.right[labels, prediction]
        right = is_right & finite
        ones, right = torch.ones_like(labels), right.long()
        self.per_class[model].index_add_(0, labels, torch.stack([ones, right], 1))
        number = (confidence * BINS).long().clamp_(max=BINS - 1)
        fixed = (confidence.double() * _UNIT).round().long()
        self.bins[model].index_add_(0, number, torch.stack([ones, right, fixed], 1))
        self.not_finite[model] += (~finite).sum()

    def sum_over_ranks(self) -> None:
        """Replace each rank's counts by the sum over all ranks."""
        flat = torch.cat([tensor.flatten() for tensor in self.tensors().values()])
        dist.all_reduce(flat)
        for tensor, part in zip(
            self.tensors().values(), flat.split([t.numel() for t in self.tensors().values()]), strict=True
        ):
            tensor.copy_(part.view_as(tensor))

    def scores(self) -> list[Score]:
        """The score of each model. Waits for the device."""
        return [Score(correct, total) for total, correct in self.per_class.sum(1).tolist()]

    def result(self, model: int, classes: Sequence[str]) -> dict[str, Any]:
        """A model's entry for a set in results.json, without classes that have no samples."""
        score = self.scores()[model]
        bins = [[n, right, fixed / _UNIT] for n, right, fixed in self.bins[model].tolist()]
        counted = zip(classes, self.per_class[model].tolist(), strict=True)
        return {
            "correct": score.correct,
            "total": score.total,
            "top1": score.top1,
            "interval": list(score.interval),
            "ece": calibration_error(bins),
            "calibration": bins,
            "per_class": {name: [right, n] for name, (n, right) in counted if n},
        }


def calibration_error(bins: Sequence[Sequence[float]]) -> float:
    """Expected calibration error, in 0…1 (Guo et al., ICML 2017, eq. 3): the difference between accuracy and mean
    confidence of a bin, averaged over samples.

    Args:
        bins: samples, right predictions and sum of confidences of each bin.
    """
    total = sum(n for n, _, _ in bins)
    return sum(abs(right - confidence) for _, right, confidence in bins) / total if total else float("nan")


@torch.no_grad()
def top1(
    models: Sequence[Classifier],
    normalise: Normalise,
    batches: Iterable[MicroBatch],
    device: torch.device,
    label_space: LabelSpace | None = None,
) -> list[Score]:
    """Score of each model over the batches of all ranks, the same on every rank. Data is read once for all models.

    Args:
        label_space: None: all classes may be predicted, and only the label is right.
    """
    classes = models[0].head.out_features
    label_space = (label_space or LabelSpace(torch.arange(classes))).to(device)
    counts = Counts(len(models), classes, device)
    beat("evaluating")  # reading the first batch counts as well
    for number, batch in enumerate(batches):
        beat("evaluating", number)
        pixels = normalise(batch.images.to(device, non_blocking=True))
        labels = batch.labels.to(device, non_blocking=True)
        for i, model in enumerate(models):
            counts.add(i, model(pixels)[1], labels, label_space)
    beat(WAITING)
    if dist.is_initialized():
        counts.sum_over_ranks()
    return counts.scores()
