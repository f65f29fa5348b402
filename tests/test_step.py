"""The fused step equals the dense reference: relevance, masks, counterfactuals, losses, every gradient."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

import reference
from cfmask.losses import relative_feature_distillation
from cfmask.masking.cam import GradCam, Relevance
from cfmask.masking.fills import DrawSpec, concat, draw
from cfmask.masking.masks import object_mask
from cfmask.models.tower import Normalise, visible_first
from cfmask.recipe import Method, Recipe
from cfmask.step import Teachers, counterfactual, training_step
from towers import B16, B32, ODD, TINY, Geometry

MASKED = [
    Method(mask=mask, fill=fill)
    for mask in ("random", "object", "context")
    for fill in ("no-fill", "single-fill", "multi-fill")
]
METHODS = [
    Method(name="vanilla"),
    *MASKED,
    Method(mask="none"),
    Method(mask="none", beta_relative=6.0),
    Method(mask="object", beta_relative=6.0),
    Method(mask="object", cam="grad-cam"),
    Method(mask="context", fill="no-fill", cam="grad-cam"),
    Method(mask="object", first_block=1),
    Method(name="kd", mask="none"),
    Method(name="kd", mask="object"),
    Method(name="kd", mask="random", fill="no-fill"),
    Method(name="wise-kd", mask="object", ensemble="ensemble"),
    Method(name="wise-kd", mask="none", ensemble="ensemble"),
]
CLOSE = dict(rtol=1e-9, atol=1e-12)


def resolved(method: Method) -> Method:
    return Recipe(method=method).resolved().method


def make_batch(geometry: Geometry, method: Method, n: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(n, 3, geometry.image, geometry.image, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 5, (n,), generator=generator)
    spec = None
    if method.masked:
        spec = DrawSpec(method.mask, method.fill, method.rate or 0.0, geometry.patches)
    return images, labels, draw(spec, n, np.random.default_rng(seed))


def name_of(method: Method) -> str:
    return "-".join(
        [
            method.row,
            *([method.cam] if method.cam else []),
            *(["late"] if method.first_block else []),
            *(["relative"] if method.beta_relative else []),
        ]
    )


def student_and_teachers(geometry: Geometry, method: Method, seed: int = 0):
    """A student that has moved away from its teacher, in fp64; and what its method needs for teachers."""
    student = geometry.classifier(seed, dtype=torch.float64)

    def moved(far: float, seed: int):
        model = copy.deepcopy(student)
        with torch.no_grad():
            generator = torch.Generator().manual_seed(seed)
            for parameter in model.parameters():
                parameter += far * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        return model

    teachers = Teachers(
        pretrained=copy.deepcopy(student).requires_grad_(False) if method.distils else None,
        ensemble=moved(0.03, seed + 2).requires_grad_(False) if method.ensemble else None,
    )
    info = geometry.info()
    return moved(0.05, seed + 1), teachers, Normalise(info.mean, info.std).double()


def dense(geometry: Geometry, student, teachers, normalise, images, labels, draws, method):
    parameters = {k: v.detach().clone().requires_grad_() for k, v in student.named_parameters()}
    result = reference.step(
        parameters,
        dict((teachers.pretrained or student).named_parameters()),
        images,
        labels,
        draws,
        method,
        ensemble=dict(teachers.ensemble.named_parameters()) if teachers.ensemble else None,
        mean=normalise.mean,
        std=normalise.std,
        layers=geometry.layers,
        heads=geometry.heads,
        patch=geometry.patch,
        quick=geometry.quick,
    )
    return result, parameters


def assert_same_gradients(student, parameters) -> None:
    for name, parameter in student.named_parameters():
        expected = parameters[name].grad
        # relative to the tensor: single entries may cancel to nothing
        torch.testing.assert_close(
            parameter.grad, expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item(), msg=name
        )


@pytest.mark.parametrize("recompute", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("geometry", [B32, B16, ODD], ids=["B/32-like", "B/16-like", "odd"])
@pytest.mark.parametrize("method", METHODS, ids=name_of)
def test_every_method_equals_the_dense_reference(geometry, method, recompute):
    method = resolved(method)
    student, teachers, normalise = student_and_teachers(geometry, method)
    student.recompute = recompute
    images, labels, draws = make_batch(geometry, method, 4)
    expected, parameters = dense(geometry, student, teachers, normalise, images, labels, draws, method)

    metrics = training_step(student, teachers, normalise, images, labels, draws, method)

    for part in ("ce", "kd", "mse", "loss"):
        if part in expected:
            torch.testing.assert_close(getattr(metrics, part), expected[part], **CLOSE)
        else:
            assert getattr(metrics, part) == 0
    if method.masked:
        assert 0 < expected["mask"].float().mean() < 1, "a mask of all or nothing would prove nothing"
        torch.testing.assert_close(metrics.masked, expected["mask"].float().mean(), rtol=1e-6, atol=0)
    assert_same_gradients(student, parameters)


CAMS = [Method(mask="object"), Method(mask="object", first_block=1), Method(mask="object", cam="grad-cam")]


@pytest.mark.parametrize("geometry", [B32, B16, ODD], ids=["B/32-like", "B/16-like", "odd"])
@pytest.mark.parametrize("method", CAMS, ids=name_of)
def test_a_streamed_cam_equals_its_definition(geometry, method):
    method = resolved(method)
    student, teachers, normalise = student_and_teachers(geometry, method)
    images, labels, draws = make_batch(geometry, method, 3)
    cam_hook = GradCam() if method.cam == "grad-cam" else Relevance(method.first_block)
    logits = student.classify(student.encode(normalise(images), cam=cam_hook))

    cam = cam_hook.compute(logits.gather(1, labels[:, None]).squeeze(1))

    expected, _ = dense(geometry, student, teachers, normalise, images, labels, draws, method)
    torch.testing.assert_close(cam, expected["cam"], rtol=1e-9, atol=1e-15)
    cf = counterfactual(images, cam, draws, method, geometry.patch)
    assert torch.equal(cf.mask, expected["mask"])
    assert torch.equal(cf.images, expected["cf"])


@pytest.mark.parametrize("cam_hook", [Relevance(), GradCam()], ids=["relevance", "grad-cam"])
def test_a_cam_computes_no_weight_gradient(cam_hook):
    student, _, normalise = student_and_teachers(TINY, Method())
    images, labels, _ = make_batch(TINY, Method(name="vanilla"), 3)
    logits = student.classify(student.encode(normalise(images), cam=cam_hook))
    weights = [p.register_hook(lambda _: pytest.fail("a weight's gradient was computed")) for p in student.parameters()]
    cam_hook.compute(logits.gather(1, labels[:, None]).squeeze(1))
    assert weights and all(parameter.grad is None for parameter in student.parameters())


@pytest.mark.parametrize("method", METHODS, ids=name_of)
def test_micro_batches_of_whole_lanes_add_up_to_the_whole_batch(method):
    method = resolved(method)
    whole, teachers, normalise = student_and_teachers(B32, method)
    parts = copy.deepcopy(whole)
    lanes = [make_batch(B32, method, 3, seed=lane) for lane in range(4)]

    joined = (torch.cat([x for x, _, _ in lanes]), torch.cat([y for _, y, _ in lanes]), concat([d for *_, d in lanes]))
    training_step(whole, teachers, normalise, *joined, method)
    for images, labels, draws in lanes:
        training_step(parts, teachers, normalise, images, labels, draws, method, weight=1 / 4)

    for (name, ours), theirs in zip(parts.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-13, msg=name)


def test_hidden_patches_give_the_class_token_what_dropped_patches_give():
    student, _, normalise = student_and_teachers(B32, Method())
    images, _, draws = make_batch(B32, resolved(Method(mask="random", fill="no-fill")), 4)
    hidden = torch.ones(4, B32.patches, dtype=torch.bool).scatter(1, draws.keep, False)
    pixels = normalise(images)
    torch.testing.assert_close(student.encode(pixels, keep=draws.keep), student.encode(pixels, hidden=hidden), **CLOSE)


def test_ragged_hidden_patches_are_dropped_as_far_as_the_fullest_image_allows():
    hidden = torch.tensor([[1, 0, 1, 1], [0, 1, 0, 1], [1, 1, 1, 1]], dtype=torch.bool)
    keep, left = visible_first(hidden)
    assert keep.tolist() == [[1, 0], [0, 2], [0, 1]]
    assert left is not None and left.tolist() == [[False, True], [False, False], [True, True]]
    keep, left = visible_first(torch.tensor([[1, 0], [0, 1]], dtype=torch.bool))
    assert keep.tolist() == [[1], [0]] and left is None


def test_an_all_zero_cam_masks_no_object_and_the_whole_context():
    images = torch.rand(2, 3, TINY.image, TINY.image)
    cam = torch.zeros(2, TINY.patches)
    for mask, share in (("object", 0.0), ("context", 1.0)):
        method = resolved(Method(mask=mask))
        draws = make_batch(TINY, method, 2)[2]
        assert counterfactual(images, cam, draws, method, TINY.patch).mask.float().mean() == share


def test_bf16_passes_add_relevance_up_in_fp32():
    student = B32.classifier()
    images, labels, _ = make_batch(B32, Method(name="vanilla"), 16)
    pixels = Normalise(B32.info().mean, B32.info().std)(images.float())

    def cam(low: bool) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            cam_hook = Relevance()
            logits = student.classify(student.encode(pixels, cam=cam_hook))
            return cam_hook.compute(logits.gather(1, labels[:, None]).squeeze(1))

    ours, exact = cam(True), cam(False)
    assert ours.dtype == torch.float32
    assert len(ours.unique()) > 0.99 * ours.numel(), "sums rounded to bf16 would coincide"
    correlation = torch.corrcoef(torch.stack([ours.flatten(), exact.flatten()]))[0, 1]
    assert correlation > 0.98
    assert (object_mask(ours, 0.3) == object_mask(exact, 0.3)).float().mean() > 0.98


# A patch whose relevance lies at the threshold may go the other way in bf16, and takes its gradient along; so the
# gradients are compared where no CAM decides, and the masks themselves above.
@pytest.mark.parametrize("method", [m for m in METHODS if not m.by_cam], ids=name_of)
def test_bf16_gradients_point_where_fp32_ones_do(method):
    method = resolved(method)
    student, teachers, normalise = student_and_teachers(B32, method)
    for model in (student, teachers.pretrained, teachers.ensemble, normalise):
        if model is not None:
            model.float()
    images, labels, draws = make_batch(B32, method, 4)
    gradients = []
    for low in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            training_step(student, teachers, normalise, images.float(), labels, draws, method)
        gradients.append(torch.cat([p.grad.flatten() for p in student.parameters()]))
        student.zero_grad()
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.95


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("method", [Method(name="vanilla"), Method(mask="none"), Method(mask="random")], ids=name_of)
def test_a_sample_that_is_not_finite_is_named_and_makes_gradients_not_finite(method, value):
    """1e30: features whose squares overflow, with gradients that would be finite once clipped."""
    method = resolved(method)
    student, teachers, normalise = student_and_teachers(TINY, method)
    for model in (student, teachers.pretrained, normalise):
        if model is not None:
            model.float()
    images, labels, draws = make_batch(TINY, method, 4)
    images = images.float()
    images[2] = value
    metrics = training_step(student, teachers, normalise, images, labels, draws, method)
    bad_loss = not metrics.loss.isfinite()
    assert bad_loss or value == 1e30
    norm = torch.nn.utils.get_total_norm([p.grad for p in student.parameters()])
    assert bool(norm.isfinite()) != bool(bad_loss)
    if value != 1e30:
        blamed = (~metrics.finite).nonzero().flatten().tolist()
        assert 2 in blamed


def test_a_loss_that_overflows_with_finite_gradients_leaves_gradients_that_are_not():
    method = resolved(Method(mask="none"))
    student, teachers, normalise = student_and_teachers(TINY, method)
    for model in (student, teachers.pretrained, normalise):
        model.float()
    with torch.no_grad():
        student.visual.proj *= 1e25  # squared, beyond fp32; its gradient is not
    images, labels, draws = make_batch(TINY, method, 4)
    metrics = training_step(student, teachers, normalise, images.float(), labels, draws, method)
    assert metrics.loss.isinf() and metrics.finite.all()
    assert not student.head.bias.grad.isfinite().any()


def test_relative_distillation_does_not_depend_on_the_scale_of_features():
    teacher, moved = torch.randn(2, 8, 24, dtype=torch.float64)
    student = teacher + 0.1 * moved
    loss = relative_feature_distillation(student, teacher)
    torch.testing.assert_close(relative_feature_distillation(7 * student, 7 * teacher), loss)
    # At equal norms it is the cosine distance.
    student = student / student.norm(dim=1, keepdim=True) * teacher.norm(dim=1, keepdim=True)
    cosine = torch.nn.functional.cosine_similarity(student, teacher)
    torch.testing.assert_close(relative_feature_distillation(student, teacher), (2 - 2 * cosine).mean())
