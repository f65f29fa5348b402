"""Exact top-1 accuracy, each sample counted once on any number of ranks."""

from __future__ import annotations

from collections.abc import Iterable
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
def count_correct(model: Classifier, normalise: Normalise, batches: Iterable[Batch], device: torch.device) -> Tensor:
    """(2,) int64 on the device: right answers and samples among ``batches``. Waits for nothing."""
    counts = torch.zeros(2, dtype=torch.int64, device=device)
    for batch in batches:
        _, logits = model(normalise(batch.images.to(device, non_blocking=True)))
        right = (logits.argmax(1) == batch.labels.to(device, non_blocking=True)).sum()
        counts += torch.stack([right, right.new_tensor(len(batch.labels))])
    return counts


def top1(model: Classifier, normalise: Normalise, batches: Iterable[Batch], device: torch.device) -> Score:
    """The score over all ranks' batches together; the same on every rank."""
    counts = count_correct(model, normalise, batches, device)
    if dist.is_initialized():
        dist.all_reduce(counts)
    correct, total = counts.tolist()
    return Score(correct, total)
