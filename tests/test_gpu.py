"""The step on a GPU: the CPU's numbers, and no wait for the device."""

from __future__ import annotations

import copy

import pytest
import torch

from cfmask.recipe import Method
from cfmask.step import training_step
from test_step import METHODS, make_batch, resolved, student_and_teacher
from towers import B32

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ALL = [Method(name="vanilla"), *METHODS]


@pytest.mark.parametrize("method", ALL, ids=lambda m: f"{m.name}-{m.fill}")
def test_fp64_gradients_are_the_cpus(method):
    method = resolved(method)
    student, teacher, normalise = student_and_teacher(B32)
    images, labels, draws = make_batch(B32, method, 4)
    there = [copy.deepcopy(m).cuda() for m in (student, teacher, normalise)]
    plain = method.mask is None
    training_step(student, None if plain else teacher, normalise, images, labels, draws, method)
    moved = (images.cuda(), labels.cuda(), draws.map(torch.Tensor.cuda))
    training_step(there[0], None if plain else there[1], there[2], *moved, method)
    for ours, theirs in zip(there[0].parameters(), student.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None
        torch.testing.assert_close(ours.grad.cpu(), theirs.grad, rtol=1e-9, atol=1e-9 * theirs.grad.abs().max().item())


@pytest.mark.parametrize("method", ALL, ids=lambda m: f"{m.name}-{m.fill}")
def test_a_bf16_step_never_waits_for_the_device(method):
    method = resolved(method)
    student, teacher, normalise = (m.float().cuda() for m in student_and_teacher(B32))
    images, labels, draws = make_batch(B32, method, 4)
    batch = (images.float().cuda(), labels.cuda(), draws.map(torch.Tensor.cuda))
    plain = method.mask is None

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            training_step(student, None if plain else teacher, normalise, *batch, method)

    step()  # libraries are loaded and workspaces allocated the first time
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.isfinite(p.grad).all() for p in student.parameters())
