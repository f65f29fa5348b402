"""The step on a GPU: the CPU's numbers, and no wait for the device."""

from __future__ import annotations

import copy

import pytest
import torch

from cfmask.optim import Phase, Rates, adamw, take_step
from cfmask.recipe import Recipe
from cfmask.step import Teachers, training_step
from test_step import METHODS, assert_same_gradients, make_batch, name_of, resolved, student_and_teachers
from towers import B32

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def there(*models):
    """Models, or the models of a Teachers, on the GPU."""
    return [
        Teachers(*(m and copy.deepcopy(m).cuda() for m in (model.start, model.ensemble)))
        if isinstance(model, Teachers)
        else copy.deepcopy(model).cuda()
        for model in models
    ]


@pytest.mark.parametrize("recompute", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("method", METHODS, ids=name_of)
def test_fp64_gradients_are_the_cpus(method, recompute):
    method = resolved(method)
    here = student_and_teachers(B32, method)
    student, teachers, normalise = there(*here)
    student.recompute = recompute
    images, labels, draws = make_batch(B32, method, 4)
    training_step(*here, images, labels, draws, method)
    training_step(student, teachers, normalise, images.cuda(), labels.cuda(), draws.map(torch.Tensor.cuda), method)
    assert_same_gradients(student.cpu(), dict(here[0].named_parameters()))


@pytest.mark.parametrize("method", METHODS, ids=name_of)
def test_a_bf16_step_never_waits_for_the_device(method):
    method = resolved(method)
    student, teachers, normalise = there(*student_and_teachers(B32, method))
    for model in (student, teachers.start, teachers.ensemble, normalise):
        if model is not None:
            model.float()
    images, labels, draws = make_batch(B32, method, 4)
    batch = (images.float().cuda(), labels.cuda(), draws.map(torch.Tensor.cuda))
    phase = Phase(0, 10, tower=True, lr=1e-5, weight_decay=0.1)
    optimizer = adamw(student.parameters(), phase, Recipe().resolved().optim)

    def step() -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            training_step(student, teachers, normalise, *batch, method)
        return take_step(optimizer, Rates(1e-5, 0.9), clip_norm=1.0)

    step()  # libraries are loaded and workspaces allocated the first time
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        norm = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert norm.isfinite()
