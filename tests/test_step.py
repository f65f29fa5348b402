"""The fused step equals the dense reference: relevance, masks, counterfactuals, losses, every gradient."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

import reference
from cfmask.masking.fills import DrawSpec, draw
from cfmask.masking.masks import object_mask
from cfmask.masking.relevance import relevance
from cfmask.models.tower import Normalise, encode
from cfmask.recipe import Method, Recipe
from cfmask.step import counterfactual, training_step
from towers import B16, B32, ODD, TINY, Geometry

METHODS = [
    Method(name=f"{mask}-mask", fill=fill)
    for mask in ("random", "object", "context")
    for fill in ("no-fill", "single-fill", "multi-fill")
]
CLOSE = dict(rtol=1e-9, atol=1e-12)


def resolved(method: Method) -> Method:
    return Recipe(method=method).resolved().method


def make_batch(geometry: Geometry, method: Method, n: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(n, 3, geometry.image, geometry.image, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 5, (n,), generator=generator)
    spec = None
    if method.mask is not None:
        spec = DrawSpec(method.mask, method.fill, method.rate or 0.0, geometry.patches)
    return images, labels, draw(spec, n, np.random.default_rng(seed))


def student_and_teacher(geometry: Geometry, seed: int = 0):
    student = geometry.classifier(seed, dtype=torch.float64)
    teacher = copy.deepcopy(student.visual).requires_grad_(False)
    with torch.no_grad():  # a student that has moved away from its teacher
        generator = torch.Generator().manual_seed(seed + 1)
        for parameter in student.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    info = geometry.info()
    return student, teacher, Normalise(info.mean, info.std).double()


def dense(geometry: Geometry, student, teacher, normalise, images, labels, draws, method):
    parameters = {k: v.detach().clone().requires_grad_() for k, v in student.named_parameters()}
    result = reference.step(
        parameters,
        {f"visual.{k}": v for k, v in teacher.named_parameters()},
        images,
        labels,
        draws,
        method,
        mean=normalise.mean,
        std=normalise.std,
        layers=geometry.layers,
        heads=geometry.heads,
        patch=geometry.patch,
        quick=geometry.quick,
    )
    return result, parameters


@pytest.mark.parametrize("geometry", [B32, B16, ODD], ids=["B/32-like", "B/16-like", "odd"])
@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{m.name}-{m.fill}")
def test_every_mask_and_fill_equals_the_dense_reference(geometry, method):
    method = resolved(method)
    student, teacher, normalise = student_and_teacher(geometry)
    images, labels, draws = make_batch(geometry, method, 4)
    expected, parameters = dense(geometry, student, teacher, normalise, images, labels, draws, method)

    metrics = training_step(student, teacher, normalise, images, labels, draws, method)

    assert 0 < expected["mask"].float().mean() < 1, "a mask of all or nothing would prove nothing"
    torch.testing.assert_close(metrics.ce, expected["ce"], **CLOSE)
    torch.testing.assert_close(metrics.mse, expected["mse"], **CLOSE)
    torch.testing.assert_close(metrics.loss, expected["loss"], **CLOSE)
    torch.testing.assert_close(metrics.masked, expected["mask"].float().mean(), rtol=1e-6, atol=0)
    for name, parameter in student.named_parameters():
        reference_gradient = parameters[name].grad
        # relative to the tensor: single entries may cancel to nothing
        torch.testing.assert_close(
            parameter.grad, reference_gradient, rtol=1e-9, atol=1e-9 * reference_gradient.abs().max().item(), msg=name
        )


@pytest.mark.parametrize("geometry", [B32, B16, ODD], ids=["B/32-like", "B/16-like", "odd"])
@pytest.mark.parametrize("first_block", [0, 1])
def test_streamed_relevance_equals_products_of_whole_maps(geometry, first_block):
    student, _, normalise = student_and_teacher(geometry)
    method = resolved(Method(name="object-mask", first_block=first_block))
    images, labels, draws = make_batch(geometry, method, 3)
    features, traces = encode(student.visual, normalise(images), trace=True)
    target = student.classify(features).gather(1, labels[:, None]).squeeze(1)

    cam = relevance(target, traces, first_block)

    expected, _ = dense(geometry, student, student.visual, normalise, images, labels, draws, method)
    torch.testing.assert_close(cam, expected["cam"], rtol=1e-9, atol=1e-15)
    cf = counterfactual(images, cam, draws, method, geometry.patch)
    assert torch.equal(cf.mask, expected["mask"])
    assert torch.equal(cf.images, expected["cf"])


def test_relevance_computes_no_weight_gradient():
    student, _, normalise = student_and_teacher(TINY)
    images, labels, _ = make_batch(TINY, Method(name="vanilla"), 3)
    features, traces = encode(student.visual, normalise(images), trace=True)
    relevance(student.classify(features).gather(1, labels[:, None]).squeeze(1), traces)
    assert all(parameter.grad is None for parameter in student.parameters())


def test_vanilla_fine_tuning_equals_the_dense_reference():
    student, teacher, normalise = student_and_teacher(B32)
    method = resolved(Method(name="vanilla"))
    images, labels, draws = make_batch(B32, method, 4)
    expected, parameters = dense(B32, student, teacher, normalise, images, labels, draws, method)
    metrics = training_step(student, None, normalise, images, labels, draws, method)
    torch.testing.assert_close(metrics.loss, expected["loss"], **CLOSE)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(parameter.grad, parameters[name].grad, rtol=1e-9, atol=1e-13, msg=name)


def test_micro_batches_of_whole_lanes_add_up_to_the_whole_batch():
    method = resolved(Method(name="object-mask"))
    student, teacher, normalise = student_and_teacher(B32)
    whole, parts = copy.deepcopy(student), copy.deepcopy(student)
    lanes = [make_batch(B32, method, 3, seed=lane) for lane in range(4)]

    from cfmask.masking.fills import concat

    joined = (torch.cat([x for x, _, _ in lanes]), torch.cat([y for _, y, _ in lanes]), concat([d for *_, d in lanes]))
    training_step(whole, teacher, normalise, *joined, method)
    for images, labels, draws in lanes:
        training_step(parts, teacher, normalise, images, labels, draws, method, weight=1 / 4)

    for (name, ours), theirs in zip(parts.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-13, msg=name)


def test_hidden_patches_give_the_class_token_what_dropped_patches_give():
    student, _, normalise = student_and_teacher(B32)
    images, _, draws = make_batch(B32, resolved(Method(name="random-mask", fill="no-fill")), 4)
    hidden = torch.ones(4, B32.patches, dtype=torch.bool).scatter(1, draws.keep, False)
    dropped, _ = encode(student.visual, normalise(images), keep=draws.keep)
    unseen, _ = encode(student.visual, normalise(images), hidden=hidden)
    torch.testing.assert_close(dropped, unseen, **CLOSE)


def test_an_all_zero_cam_masks_no_object_and_the_whole_context():
    images = torch.rand(2, 3, TINY.image, TINY.image)
    cam = torch.zeros(2, TINY.patches)
    for name, share in (("object-mask", 0.0), ("context-mask", 1.0)):
        method = resolved(Method(name=name))
        draws = make_batch(TINY, method, 2)[2]
        assert counterfactual(images, cam, draws, method, TINY.patch).mask.float().mean() == share


def test_bf16_passes_add_relevance_up_in_fp32():
    student = B32.classifier()
    images, labels, _ = make_batch(B32, Method(name="vanilla"), 16)
    pixels = Normalise(B32.info().mean, B32.info().std)(images.float())

    def cam(low: bool) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            features, traces = encode(student.visual, pixels, trace=True)
            assert traces[0].q.dtype == (torch.bfloat16 if low else torch.float32)
            return relevance(student.classify(features).gather(1, labels[:, None]).squeeze(1), traces)

    ours, exact = cam(True), cam(False)
    assert ours.dtype == torch.float32
    assert len(ours.unique()) > 0.99 * ours.numel(), "sums rounded to bf16 would coincide"
    correlation = torch.corrcoef(torch.stack([ours.flatten(), exact.flatten()]))[0, 1]
    assert correlation > 0.98
    assert (object_mask(ours, 0.3) == object_mask(exact, 0.3)).float().mean() > 0.98


# A patch whose relevance lies at the threshold may go the other way in bf16, and takes its gradient along; so the
# gradients are compared where masks are drawn, and the masks themselves above.
@pytest.mark.parametrize("method", METHODS[:3], ids=lambda m: f"{m.name}-{m.fill}")
def test_bf16_gradients_point_where_fp32_ones_do(method):
    method = resolved(method)
    student, teacher, normalise = student_and_teacher(B32)
    student, teacher, normalise = student.float(), teacher.float(), normalise.float()
    images, labels, draws = make_batch(B32, method, 4)
    gradients = []
    for low in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            training_step(student, teacher, normalise, images.float(), labels, draws, method)
        gradients.append(torch.cat([p.grad.flatten() for p in student.parameters()]))
        student.zero_grad()
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.95
