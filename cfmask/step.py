"""The fused counterfactual step: everything that happens to a batch, in the order it happens.

    clean pass → relevance → masks → counterfactual images → clean backward (gradients stay local)
    → masked teacher pass → masked student pass → backward (gradients synchronised)

One student graph is alive at a time, the CAM shares the clean pass, and every parameter takes part in the
last backward, so plain DDP synchronises the sum of both. Nothing here waits for the device.

Source: Xiao et al., "Masked Images Are Counterfactual Samples for Robust Fine-tuning", CVPR 2023.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cfmask.losses import classification, feature_distillation
from cfmask.masking.fills import CONTEXT, NO_FILL, OBJECT, Draws, fill
from cfmask.masking.masks import context_mask, object_mask
from cfmask.masking.relevance import relevance
from cfmask.models.tower import Classifier, Normalise, encode
from cfmask.recipe import Method


@dataclass(frozen=True)
class Metrics:
    """Scalars of one step on this rank, on the device: reading them waits, so it is done late.

    loss = ce + β · mse; mse and masked (share of patches masked) are 0 where the method has no such part. correct
    counts right answers on clean images, among ``samples``.
    """

    loss: Tensor
    ce: Tensor
    mse: Tensor
    correct: Tensor
    masked: Tensor
    samples: int


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
    if method.mask == OBJECT:
        assert cam is not None and method.threshold is not None
        mask = object_mask(cam, method.threshold)
    elif method.mask == CONTEXT:
        assert cam is not None and method.threshold is not None
        mask = context_mask(cam, method.threshold)
    else:
        assert draws.mask is not None
        mask = draws.mask
    if method.fill == NO_FILL:
        return Counterfactual(images, mask, hidden=mask)
    assert draws.donors is not None
    return Counterfactual(fill(images, mask, draws.donors, patch_size), mask)


def training_step(
    student: nn.Module,
    teacher: nn.Module | None,
    normalise: Normalise,
    images: Tensor,
    labels: Tensor,
    draws: Draws,
    method: Method,
    *,
    weight: float = 1.0,
    synchronise: bool = True,
) -> Metrics:
    """Add one micro-batch's gradients to the parameters' ``grad``.

    Args:
        student: a Classifier, or DDP around one.
        teacher: the frozen pre-trained image tower; None for plain fine-tuning.
        images: (N, 3, H, W) uint8 or [0, 1]; labels: (N,) int64; draws: the batch's, all on one device.
        weight: of this micro-batch in its step: 1 / micro-batches. (DDP averages over ranks.)
        synchronise: False for all but the last micro-batch of a step.
    """
    model = student.module if isinstance(student, DistributedDataParallel) else student
    assert isinstance(model, Classifier)
    local = not synchronise and isinstance(student, DistributedDataParallel)
    # no_sync has to wrap a pass's forward as well as its backward.
    sync_scope = student.no_sync() if local else contextlib.nullcontext()  # type: ignore[operator]

    if teacher is None:
        with sync_scope:
            _, logits = student(normalise(images))
            ce = classification(logits, labels)
            (weight * ce).backward()
        zero = ce.new_zeros(())
        return Metrics(ce.detach(), ce.detach(), zero, _correct(logits, labels), zero, len(labels))

    beta = method.beta
    assert beta is not None
    # Clean pass, on the bare module: DDP is not listening, so its gradients stay on this rank.
    cam, needs_cam = None, method.mask in (OBJECT, CONTEXT)
    features, traces = encode(model.visual, normalise(images), trace=needs_cam)
    logits = model.classify(features)
    ce = classification(logits, labels)
    if needs_cam:
        target = logits.gather(1, labels[:, None]).squeeze(1)
        cam = relevance(target, traces, method.first_block or 0)
    del traces
    # The head's share comes with the second pass; see Classifier.forward.
    (weight * ce).backward(inputs=list(model.visual.parameters()))

    cf = counterfactual(images, cam, draws, method, model.patch_size)
    pixels = normalise(cf.images)
    with torch.no_grad():
        wanted, _ = encode(teacher, pixels, keep=cf.keep, hidden=cf.hidden)
    with sync_scope:
        masked_features, clean_logits = student(pixels, keep=cf.keep, hidden=cf.hidden, head_input=features.detach())
        mse = feature_distillation(masked_features, wanted)
        (weight * (classification(clean_logits, labels) + beta * mse)).backward()

    ce, mse = ce.detach(), mse.detach()
    return Metrics(ce + beta * mse, ce, mse, _correct(logits, labels), cf.mask.float().mean(), len(labels))


def _correct(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.detach().argmax(1) == labels).sum()
