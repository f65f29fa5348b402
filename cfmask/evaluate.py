"""Exact top-1 accuracy, each sample counted once on any number of ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from cfmask.data.stream import Batch
from cfmask.models.tower import Classifier, Normalise


@dataclass(frozen=True)
class Score:
    """correct of total samples."""

    correct: int
    total: int

    @property
    def top1(self) -> float:
        """Percent."""
        return 100 * self.correct / self.total if self.total else float("nan")


@torch.no_grad()
def count_correct(
    models: Sequence[Classifier], normalise: Normalise, batches: Iterable[Batch], device: torch.device
) -> tuple[Tensor, int]:
    """Right answers of each model (models,) int64, on the device, and the number of samples. Data is read once."""
    correct = torch.zeros(len(models), dtype=torch.int64, device=device)
    total = 0
    for batch in batches:
        pixels = normalise(batch.images.to(device, non_blocking=True))
        labels = batch.labels.to(device, non_blocking=True)
        correct += torch.stack([(model(pixels)[1].argmax(1) == labels).sum() for model in models])
        total += len(batch.labels)
    return correct, total


def top1(
    models: Sequence[Classifier], normalise: Normalise, batches: Iterable[Batch], device: torch.device
) -> list[Score]:
    """Each model's score over all ranks' batches together; the same on every rank."""
    correct, total = count_correct(models, normalise, batches, device)
    counts = torch.cat([correct, correct.new_full((1,), total)])
    if dist.is_initialized():
        dist.all_reduce(counts)
    *right, seen = counts.tolist()
    return [Score(r, seen) for r in right]
