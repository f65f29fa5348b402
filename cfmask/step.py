"""The fused counterfactual step: everything that is computed for a batch, in order.

    clean pass → CAM → masks → counterfactual images → clean backward (gradients stay local)
    → masked teacher pass → masked student pass → backward (gradients synchronised)

One student graph is alive at a time. The CAM shares the clean pass. Every parameter takes part in the last backward
pass, so DDP synchronises the sum of both passes' gradients. A method without masked images has only the clean pass,
with a synchronised backward pass. Nothing here waits for the device.

Source: Xiao et al., "Masked Images Are Counterfactual Samples for Robust Fine-tuning", CVPR 2023.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cfmask.losses import (
    classification,
    feature_distillation,
    knowledge_distillation,
    relative_feature_distillation,
)
from cfmask.masking.cam import build_cam
from cfmask.masking.fills import NO_FILL, OBJECT, Draws, fill
from cfmask.masking.masks import context_mask, object_mask
from cfmask.masking.tensors import TensorFields
from cfmask.masking.validation import THRESHOLDS, Coverage, MaskRates, mask_rates, masks_at
from cfmask.models.tower import Classifier, ClassifierOutput, Normalise
from cfmask.recipe import Method


@dataclass(frozen=True)
class Teachers:
    """Frozen models."""

    pretrained: Classifier | None = None
    """The run's initial tower and head; for methods that distil."""
    ensemble: Classifier | None = None
    """The WiSE-FT ensemble; for wise-kd."""


@dataclass(frozen=True)
class Metrics(TensorFields):
    """Results of one micro-batch on this rank, on the device. Reading them waits for it.

    loss: ce + γ · kd + β · mse.
    kd, mse: 0 if the method has no such term. With --beta-relative, mse is relative to the teacher's features, and β is
        that weight.
    correct: number of clean images that are classified correctly.
    masked: share of patches that are masked; 0 if the method masks none.
    samples: number of images, N.
    finite: (N,) bool, whether all features and logits of a sample are finite.
    overlap: rates of CAM masks against objects, at validation.THRESHOLDS; None without segmentation masks.
    """

    loss: Tensor
    ce: Tensor
    kd: Tensor
    mse: Tensor
    correct: Tensor
    masked: Tensor
    samples: int
    finite: Tensor
    overlap: MaskRates | None = None


@dataclass(frozen=True)
class Counterfactual:
    """Input of the second pass.

    images: (N, 3, H, W), before normalisation.
    mask: (N, P) bool, the masked patches.
    keep: (N, K) int64, the patches that are not dropped; for random masks without fill.
    hidden: (N, P) bool, patches that attention must not see; for CAM masks without fill.
    """

    images: Tensor
    mask: Tensor
    keep: Tensor | None = None
    hidden: Tensor | None = None


def counterfactual(images: Tensor, cam: Tensor | None, draws: Draws, method: Method, patch_size: int) -> Counterfactual:
    """Mask and fill a batch.

    Args:
        images: (N, 3, H, W) before normalisation.
        cam: (N, P) relevance, unnormalised; None for random masks.
        draws: this batch's draws, on the images' device.
    """
    if draws.keep is not None:
        patches = (images.shape[2] // patch_size) * (images.shape[3] // patch_size)
        mask = torch.ones(len(images), patches, dtype=torch.bool, device=images.device)
        return Counterfactual(images, mask.scatter(1, draws.keep, False), keep=draws.keep)
    if method.by_cam:
        assert cam is not None and method.threshold is not None
        of = object_mask if method.mask == OBJECT else context_mask
        mask = of(cam, method.threshold)
    else:
        assert draws.mask is not None
        mask = draws.mask
    if method.fill == NO_FILL:
        return Counterfactual(images, mask, hidden=mask)
    assert draws.donors is not None
    return Counterfactual(fill(images, mask, draws.donors, patch_size), mask)


def training_step(
    student: nn.Module,
    teachers: Teachers,
    normalise: Normalise,
    images: Tensor,
    labels: Tensor,
    draws: Draws,
    method: Method,
    *,
    weight: float = 1.0,
    synchronise: bool = True,
    objects: Coverage | None = None,
) -> Metrics:
    """Add one micro-batch's gradients to the parameters' ``grad``. If the loss is not finite on one rank, the gradients
    are not finite on any.

    Args:
        student: a Classifier, or DDP around one; parameters that need no gradient are not trained.
        images: (N, 3, H, W), uint8 or in [0, 1].
        labels: (N,) int64.
        draws: of this batch; on the device of the images, like everything else.
        method: resolved.
        weight: of this micro-batch in its step: 1 / number of micro-batches. (DDP averages over ranks.)
        synchronise: average gradients over ranks; False for all but the last micro-batch of a step.
        objects: where the images' objects are, to compare with the CAM's masks.
    """
    model = student.module if isinstance(student, DistributedDataParallel) else student
    assert isinstance(model, Classifier)
    local = not synchronise and isinstance(student, DistributedDataParallel)
    # no_sync has to wrap a pass's forward as well as its backward.
    sync_scope = student.no_sync() if local else contextlib.nullcontext()  # type: ignore[operator]

    pixels = normalise(images)
    wise = None if teachers.ensemble is None else _teacher_forward(teachers.ensemble, pixels)

    def of_labels(logits: Tensor) -> _Loss:
        """Loss of clean images: cross entropy, and in WiSE-KD the divergence from the ensemble."""
        ce = classification(logits, labels)
        return _Loss(ce) if wise is None else _Loss(ce, kd=_kd(method, logits, wise.logits))

    if not method.masked:
        teacher_output = None if teachers.pretrained is None else _teacher_forward(teachers.pretrained, pixels)
        with sync_scope:
            output = student(pixels)
            loss = of_labels(output.logits)
            if teacher_output is not None:
                loss += _distillation(method, output, teacher_output)
            _backward(weight * loss.total(method), output.logits)
        return loss.metrics(method, labels, output.logits, finite=_finite(output.features, output.logits))

    # The clean pass calls the bare module, so DDP does not synchronise its gradients.
    assert teachers.pretrained is not None
    cam_hook = build_cam(method)
    features = model.encode(pixels, cam=cam_hook)
    logits = model.classify(features)
    cam = None if cam_hook is None else cam_hook.compute(logits.gather(1, labels[:, None]).squeeze(1))
    # The head's gradient is computed in the second pass; see Classifier.forward.
    (weight * of_labels(logits).total(method)).backward(inputs=list(model.visual.parameters()))

    overlap = None
    if objects is not None and cam is not None:
        overlap = mask_rates(masks_at(cam, THRESHOLDS, method.mask or OBJECT), objects)
    cf = counterfactual(images, cam, draws, method, model.patch_size)
    pixels = normalise(cf.images)
    teacher_output = _teacher_forward(teachers.pretrained, pixels, keep=cf.keep, hidden=cf.hidden)
    with sync_scope:
        output = student(pixels, keep=cf.keep, hidden=cf.hidden, clean_features=features.detach())
        loss = of_labels(output.clean_logits) + _distillation(method, output, teacher_output)
        _backward(weight * loss.total(method), output.clean_logits)
    metrics = loss.metrics(method, labels, logits, finite=_finite(features, logits, output.features), mask=cf.mask)
    return replace(metrics, overlap=overlap)


@dataclass(frozen=True)
class _Loss:
    """Terms of a loss, each (), at least fp32; 0.0 for terms that a pass does not have."""

    ce: Tensor | float = 0.0
    kd: Tensor | float = 0.0
    mse: Tensor | float = 0.0

    def __add__(self, other: _Loss) -> _Loss:
        return _Loss(self.ce + other.ce, self.kd + other.kd, self.mse + other.mse)

    def total(self, method: Method) -> Tensor:
        total = self.ce + (method.gamma or 0.0) * self.kd + method.mse_weight * self.mse
        assert isinstance(total, Tensor)
        return total

    def metrics(
        self, method: Method, labels: Tensor, clean_logits: Tensor, *, finite: Tensor, mask: Tensor | None = None
    ) -> Metrics:
        loss = self.total(method).detach()
        ce, kd, mse = (
            part.detach() if isinstance(part, Tensor) else loss.new_full((), part)
            for part in (self.ce, self.kd, self.mse)
        )
        return Metrics(
            loss=loss,
            ce=ce,
            kd=kd,
            mse=mse,
            correct=(clean_logits.detach().argmax(1) == labels).sum(),
            masked=loss.new_zeros(()) if mask is None else mask.float().mean(),
            samples=len(labels),
            finite=finite,
        )


def _distillation(method: Method, output: ClassifierOutput, teacher_output: ClassifierOutput) -> _Loss:
    """Loss of the student against the pre-trained model on the same images."""
    if method.name == "kd":
        return _Loss(kd=_kd(method, output.logits, teacher_output.logits))
    distance = feature_distillation if method.beta_relative is None else relative_feature_distillation
    return _Loss(mse=distance(output.features, teacher_output.features))


def _kd(method: Method, logits: Tensor, teacher_output: Tensor) -> Tensor:
    assert method.temperature is not None
    return knowledge_distillation(logits, teacher_output, method.temperature)


@torch.no_grad()
def _teacher_forward(
    teacher: Classifier, pixels: Tensor, keep: Tensor | None = None, hidden: Tensor | None = None
) -> ClassifierOutput:
    return teacher(pixels, keep=keep, hidden=hidden)


def _backward(loss: Tensor, logits: Tensor) -> None:
    """Backward pass of a loss. If it is not finite, neither is the head's gradient, and the reduction makes it so on
    every rank."""
    (loss + (0 * loss.detach()) * logits.sum()).backward()


def _finite(*values: Tensor) -> Tensor:
    """(N,) bool: rows in which all values are finite."""
    return torch.stack([value.detach().isfinite().all(1) for value in values]).all(0)
