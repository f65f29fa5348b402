"""Exact counts of right answers, and of how sure a model was of them, each sample counted once on any number of ranks.

All that is counted is whole numbers (confidences too, in units of 2^-24): sums do not depend on who adds what first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cfmask.data import benchmarks
from cfmask.data.shards import Manifest
from cfmask.data.stream import Batch
from cfmask.errors import UserError
from cfmask.models.tower import Classifier, Normalise
from cfmask.runtime.heartbeat import WAITING, beat

BINS = 15
"""Of the confidence, equally wide: as in Guo et al., "On Calibration of Modern Neural Networks", ICML 2017."""
_UNIT = 1 << 24


# --- what is a right answer -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answers:
    """Among which classes the answer to a set's images is looked for, and which are right.

    ids: (A,) int64, sorted; the others' logits are left out before argmax and softmax. right: (C, C) bool, [label,
    answer]; None: the label alone is.
    """

    ids: Tensor
    right: Tensor | None = None

    def to(self, device: torch.device) -> Answers:
        return Answers(self.ids.to(device), None if self.right is None else self.right.to(device))


def answers_of(manifest: Manifest) -> Answers:
    """The paper's rules. ImageNet-R and -A: the set's 200 classes. ObjectNet: the 125 ids that its 113 classes are,
    and right is each id of the image's class. Other sets: all classes."""
    classes = manifest.num_classes
    if manifest.split in (benchmarks.IMAGENET_R.name, benchmarks.IMAGENET_A.name):
        subset = set(benchmarks.wnids(manifest.split))
        return Answers(torch.tensor([i for i, (wnid, _) in enumerate(manifest.classes) if wnid in subset]))
    if manifest.split == benchmarks.OBJECTNET.name:
        return Answers(torch.tensor(benchmarks.right_ids(manifest)), _right(manifest))
    return Answers(torch.arange(classes), _right(manifest) if manifest.accepted else None)


def _right(manifest: Manifest) -> Tensor:
    right = torch.eye(manifest.num_classes, dtype=torch.bool)
    for label, ids in manifest.accepted.items():
        right[label, list(ids)] = True
    return right


def check_set(manifest: Manifest, *, allow_count_mismatch: bool = False) -> None:
    """Refuse a copy of a known set that is not what it should be: it gives a wrong number without any error.

    Raises:
        UserError: other counts, or other classes, than the set of this name has.
    """
    deviations = benchmarks.deviations_of(manifest)
    if deviations and not allow_count_mismatch:
        raise UserError(
            f"{manifest.root} is no whole copy of {manifest.split}: {', '.join(deviations)}. Convert a whole copy, or "
            "take this one with --allow-count-mismatch."
        )


def check_classes(manifest: Manifest, classes: Sequence[str]) -> None:
    """Refuse a set with another class list than a model's, in its order.

    Raises:
        UserError: labels and answers would not mean the same.
    """
    if tuple(wnid for wnid, _ in manifest.classes) != tuple(classes):
        raise UserError(
            f"The set {manifest.root} has {manifest.num_classes} classes, the model {len(classes)}, or they are in "
            "another order: labels and answers would not mean the same. Convert the set with the class list that the "
            "model was trained on."
        )


# --- counting ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """correct of total samples."""

    correct: int
    total: int

    @property
    def top1(self) -> float:
        """Percent."""
        return 100 * self.correct / self.total if self.total else float("nan")

    @property
    def interval(self) -> tuple[float, float]:
        """95 % confidence interval of top1 in percent: Wilson's score interval, which holds near 0 and 100 % too."""
        if not self.total:
            return float("nan"), float("nan")
        z, n, p = 1.959963984540054, self.total, self.correct / self.total
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return 100 * max(0.0, middle - half), 100 * min(1.0, middle + half)


class Counts:
    """What M models answered, on a device.

    per_class: (M, C, 2) int64: samples of the class, and right answers to them.
    bins: (M, BINS, 3) int64: by confidence: samples, right answers, sum of confidences in units of 2^-24.
    not_finite: (M,) int64: samples whose logits were not finite.
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
        """Add what another has counted, and leave it with nothing."""
        for mine, its in zip(self.tensors().values(), other.tensors().values(), strict=True):
            mine += its
            its.zero_()

    def add(self, model: int, logits: Tensor, labels: Tensor, answers: Answers) -> None:
        """Count a batch, (N, C) logits and (N,) labels, without waiting for the device."""
        logits = logits.float()[:, answers.ids]
        finite = logits.isfinite().all(1)
        confidence, place = logits.softmax(1).nan_to_num(0.0).max(1)
        answer = answers.ids[place]
        right = (answer == labels if answers.right is None else answers.right[labels, answer]) & finite
        ones, right = torch.ones_like(labels), right.long()
        self.per_class[model].index_add_(0, labels, torch.stack([ones, right], 1))
        number = (confidence * BINS).long().clamp_(max=BINS - 1)
        fixed = (confidence.double() * _UNIT).round().long()
        self.bins[model].index_add_(0, number, torch.stack([ones, right, fixed], 1))
        self.not_finite[model] += (~finite).sum()

    def sum_over_ranks(self) -> None:
        """Make each rank's what all of them counted together."""
        flat = torch.cat([tensor.flatten() for tensor in self.tensors().values()])
        dist.all_reduce(flat)
        for tensor, part in zip(
            self.tensors().values(), flat.split([t.numel() for t in self.tensors().values()]), strict=True
        ):
            tensor.copy_(part.view_as(tensor))

    def scores(self) -> list[Score]:
        """Of each model. Waits for the device."""
        return [Score(correct, total) for total, correct in self.per_class.sum(1).tolist()]

    def result(self, model: int, classes: Sequence[str]) -> dict[str, Any]:
        """What evaluation.py says of a model on a set in results.json, with classes that have samples only."""
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
    """Expected calibration error, in 0…1 (Guo et al., ICML 2017, eq. 3): the mean over samples of how far the accuracy
    of their bin is from its mean confidence. bins: samples, right answers, sum of confidences of each."""
    total = sum(n for n, _, _ in bins)
    return sum(abs(right - confidence) for _, right, confidence in bins) / total if total else float("nan")


@torch.no_grad()
def top1(
    models: Sequence[Classifier],
    normalise: Normalise,
    batches: Iterable[Batch],
    device: torch.device,
    answers: Answers | None = None,
) -> list[Score]:
    """Each model's score over all ranks' batches together; the same on every rank. Data is read once.

    Args:
        answers: None: among all classes, and the label alone is right.
    """
    classes = models[0].head.out_features
    answers = (answers or Answers(torch.arange(classes))).to(device)
    counts = Counts(len(models), classes, device)
    beat("evaluating")  # the first batch included
    for number, batch in enumerate(batches):
        beat("evaluating", number)
        pixels = normalise(batch.images.to(device, non_blocking=True))
        labels = batch.labels.to(device, non_blocking=True)
        for i, model in enumerate(models):
            counts.add(i, model(pixels)[1], labels, answers)
    beat(WAITING)
    if dist.is_initialized():
        counts.sum_over_ranks()
    return counts.scores()
