"""The losses of the method, each a mean over the batch it is given."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def classification(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy, batch mean, no label smoothing. logits (N, classes), labels (N,) int64."""
    return F.cross_entropy(logits.float() if logits.dtype.itemsize < 4 else logits, labels)


def feature_distillation(student: Tensor, teacher: Tensor) -> Tensor:
    """MSE of unnormalised features (N, D), mean over batch and feature dimension."""
    wide = student.float() if student.dtype.itemsize < 4 else student
    return F.mse_loss(wide, teacher.to(wide.dtype))
