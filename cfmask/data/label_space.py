"""Which classes may be predicted on a set, and which predictions are right for an image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cfmask.data import benchmarks
from cfmask.data.shards import Manifest


@dataclass(frozen=True)
class LabelSpace:
    """The classes that may be predicted on a set, and which predictions are right."""

    ids: Tensor
    """(A,) int64, sorted: classes that may be predicted. Other logits are removed before argmax and softmax."""
    right: Tensor | None = None
    """(C, C) bool, [label, prediction]: whether the prediction is right; None: only the label is."""

    def to(self, device: torch.device) -> LabelSpace:
        return LabelSpace(self.ids.to(device), None if self.right is None else self.right.to(device))


def label_space_of(manifest: Manifest) -> LabelSpace:
    """The label space of a set by the paper's rules.

    ImageNet-R and -A: the set's 200 classes. ObjectNet: the 125 ImageNet classes that its 113 classes map to; all that
    the image's class maps to are right. Other sets: all classes.
    """
    if manifest.split in (benchmarks.IMAGENET_R.name, benchmarks.IMAGENET_A.name):
        subset = set(benchmarks.wnids(manifest.split))
        return LabelSpace(torch.tensor([i for i, (wnid, _) in enumerate(manifest.classes) if wnid in subset]))
    if manifest.split == benchmarks.OBJECTNET.name:
        return LabelSpace(torch.tensor(benchmarks.right_ids(manifest)), _right(manifest))
    return LabelSpace(torch.arange(manifest.num_classes), _right(manifest) if manifest.accepted else None)


def _right(manifest: Manifest) -> Tensor:
    right = torch.eye(manifest.num_classes, dtype=torch.bool)
    for label, ids in manifest.accepted.items():
        right[label, list(ids)] = True
    return right
