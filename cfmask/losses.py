"""The losses of the method: means over the batch, computed in fp32 or wider."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def classification(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy, batch mean, no label smoothing. logits (N, classes), labels (N,) int64."""
    return F.cross_entropy(_wide(logits), labels)


def feature_distillation(student: Tensor, teacher: Tensor) -> Tensor:
    """MSE of unnormalised features (N, D), mean over batch and feature dimension."""
    wide = _wide(student)
    return F.mse_loss(wide, teacher.to(wide.dtype))


def relative_feature_distillation(student: Tensor, teacher: Tensor) -> Tensor:
    """|student - teacher|² / |teacher|² of unnormalised features (N, D), batch mean: the MSE of each image, divided by
    the mean square of its teacher's feature. The features' scale cancels; at equal norms it is 2 - 2 cos."""
    wide = _wide(student)
    target = teacher.to(wide.dtype)
    return ((wide - target).square().sum(1) / target.square().sum(1)).mean()


def knowledge_distillation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T² · KL(teacher ‖ student) of logits (N, classes), batch mean (Hinton et al., 2015)."""
    wide = _wide(student)
    student_log = F.log_softmax(wide / temperature, dim=1)
    teacher_log = F.log_softmax(teacher.to(wide.dtype) / temperature, dim=1)
    return temperature**2 * F.kl_div(student_log, teacher_log, reduction="batchmean", log_target=True)


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
