"""The fused counterfactual step: everything that happens to a batch, in the order it happens.

    clean pass → CAM → masks → counterfactual images → clean backward (gradients stay local)
    → masked teacher pass → masked student pass → backward (gradients synchronised)

One student graph is alive at a time, the CAM shares the clean pass, and every parameter takes part in the
last backward, so plain DDP synchronises the sum of both. Methods without masked images are the clean pass and its
synchronised backward alone. Nothing here waits for the device.

Source: Xiao et al., "Masked Images Are Counterfactual Samples for Robust Fine-tuning", CVPR 2023.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cfmask.losses import classification, feature_distillation, knowledge_distillation
from cfmask.masking.cam import build_cam
from cfmask.masking.fills import NO_FILL, OBJECT, Draws, fill
from cfmask.masking.masks import context_mask, object_mask
from cfmask.masking.validation import THRESHOLDS, Coverage, MaskRates, mask_rates, masks_at
from cfmask.models.tower import Classifier, ClassifierOutput, Normalise
from cfmask.recipe import Method


@dataclass(frozen=True)
class Teachers:
    """Frozen models.

    pretrained: the pre-trained tower with the head that the run started from; for methods that distil.
    ensemble: the WiSE-FT ensemble; for wise-kd.
    """

    pretrained: Classifier | None = None
    ensemble: Classifier | None = None


@dataclass(frozen=True)
class Metrics:
    """Scalars of one step on this rank, on the device: reading them waits, so it is done late.

    loss = ce + γ · kd + β · mse; kd, mse and masked (share of patches masked) are 0 where the method has no such part.
    correct counts right answers on clean images, among ``samples``. finite: (N,) bool, which samples' features and
    logits are numbers. overlap: how far CAM masks fall on objects, at validation.THRESHOLDS, where that was asked for.
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

    def map(self, function: Callable[[Tensor], Tensor]) -> Metrics:
        """``function`` applied to each tensor."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        mapped = {name: function(value) for name, value in values.items() if isinstance(value, Tensor)}
        overlap = None if self.overlap is None else self.overlap.map(function)
        return Metrics(**{**values, **mapped, "overlap": overlap})


@dataclass(frozen=True)
class Counterfactual:
    """What the second pass sees: images (N, 3, H, W) before normalisation, patches that stay (N, K) or
    are hidden (N, P) under no-fill, and the patch mask (N, P) that did it."""

    images: Tensor
    mask: Tensor
    keep: Tensor | None = None
    hidden: Tensor | None = None


def counterfactual(images: Tensor, cam: Tensor | None, draws: Draws, method: Method, patch_size: int) -> Counterfactual:
    """Mask and fill a batch as the method says.

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
    """Add one micro-batch's gradients to the parameters' ``grad``.

    A loss that is not finite leaves gradients that are not, on every rank.

    Args:
        student: a Classifier, or DDP around one; parameters that need no gradient are not trained.
        images: (N, 3, H, W) uint8 or [0, 1]; labels: (N,) int64; draws: the batch's, all on one device.
        method: resolved.
        weight: of this micro-batch in its step: 1 / micro-batches. (DDP averages over ranks.)
        synchronise: False for all but the last micro-batch of a step.
        objects: where the images' objects are, to be compared with the CAM's masks.
    """
    model = student.module if isinstance(student, DistributedDataParallel) else student
    assert isinstance(model, Classifier)
    local = not synchronise and isinstance(student, DistributedDataParallel)
    # no_sync has to wrap a pass's forward as well as its backward.
    sync_scope = student.no_sync() if local else contextlib.nullcontext()  # type: ignore[operator]

    pixels = normalise(images)
    wise = None if teachers.ensemble is None else _teacher_forward(teachers.ensemble, pixels)

    def of_labels(logits: Tensor) -> _Loss:
        """What is asked of the logits of clean images: the label, and in WiSE-KD the ensemble's answer."""
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

    # Clean pass, on the bare module: DDP is not listening, so its gradients stay on this rank.
    assert teachers.pretrained is not None
    cam_hook = build_cam(method)
    features = model.encode(pixels, cam=cam_hook)
    logits = model.classify(features)
    cam = None if cam_hook is None else cam_hook.compute(logits.gather(1, labels[:, None]).squeeze(1))
    # The head's share comes with the second pass; see Classifier.forward.
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
    """The parts of a loss, each (), at least fp32; 0.0 for what a pass has no part in."""

    ce: Tensor | float = 0.0
    kd: Tensor | float = 0.0
    mse: Tensor | float = 0.0

    def __add__(self, other: _Loss) -> _Loss:
        return _Loss(self.ce + other.ce, self.kd + other.kd, self.mse + other.mse)

    def total(self, method: Method) -> Tensor:
        total = self.ce + (method.gamma or 0.0) * self.kd + (method.beta or 0.0) * self.mse
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
    """What the pre-trained model asks of the student's view of the same images."""
    if method.name == "kd":
        return _Loss(kd=_kd(method, output.logits, teacher_output.logits))
    return _Loss(mse=feature_distillation(output.features, teacher_output.features))


def _kd(method: Method, logits: Tensor, teacher_output: Tensor) -> Tensor:
    assert method.temperature is not None
    return knowledge_distillation(logits, teacher_output, method.temperature)


@torch.no_grad()
def _teacher_forward(
    teacher: Classifier, pixels: Tensor, keep: Tensor | None = None, hidden: Tensor | None = None
) -> ClassifierOutput:
    return teacher(pixels, keep=keep, hidden=hidden)


def _backward(loss: Tensor, logits: Tensor) -> None:
    """Gradients of a loss; where it is not finite, those of the head are not either, whatever the arithmetic makes of
    it, and the reduction takes that to every rank."""
    (loss + (0 * loss.detach()) * logits.sum()).backward()


def _finite(*values: Tensor) -> Tensor:
    """(N,) bool: rows that hold nothing but numbers."""
    return torch.stack([value.detach().isfinite().all(1) for value in values]).all(0)
