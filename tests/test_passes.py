"""Whether passes run operator by operator or as a CUDA graph. (test_gpu.py tests what graphs compute.)"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from cfmask.errors import UserError
from cfmask.recipe import Recipe, Run
from cfmask.training.passes import (
    GRAPHED_IMAGES,
    GraphedPasses,
    Inputs,
    Passes,
    flat_gradients,
    make_passes,
    uses_graphs,
)
from test_step import make_batch, student_and_teachers
from towers import TINY

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def recipe(graphs: str, *, batch_size: int = 512, micro_batches: int = 1, compile: bool = False) -> Recipe:
    made = Recipe(run=Run(cuda_graphs=graphs, compile=compile)).resolved()
    return dataclasses.replace(
        made, optim=dataclasses.replace(made.optim, batch_size=batch_size, micro_batches=micro_batches)
    )


@pytest.mark.parametrize(
    ("graphs", "device", "ranks", "micro_batches", "used"),
    [
        ("auto", GPU, 1, 1, False),  # 512 images at a time
        ("auto", GPU, 512 // GRAPHED_IMAGES, 1, True),
        ("auto", GPU, 1, 512 // GRAPHED_IMAGES, True),
        ("on", GPU, 1, 1, True),
        ("off", GPU, 16, 1, False),
        ("on", CPU, 16, 1, False),
        ("auto", CPU, 16, 1, False),
    ],
)
def test_graphs_are_used_for_few_images_on_a_gpu_or_on_request(graphs, device, ranks, micro_batches, used):
    assert uses_graphs(recipe(graphs, micro_batches=micro_batches), device, ranks) == used


def test_compiled_passes_are_not_captured():
    assert not uses_graphs(recipe("auto", compile=True), GPU, 16)
    with pytest.raises(UserError, match="--cuda-graphs on and --compile exclude each other"):
        recipe("on", compile=True)


@pytest.mark.parametrize("graphs", ["on", "auto"])
def test_without_a_gpu_nothing_is_captured_and_a_request_for_graphs_gets_a_warning(graphs, caplog):
    passes = make_passes(*student_and_teachers(TINY, recipe(graphs).method), recipe(graphs), 1)
    assert type(passes) is Passes
    assert caplog.messages == ["CUDA graphs: not used, because there is no GPU"] * (graphs == "on")


def test_passes_that_cannot_be_captured_run_by_operators_with_the_same_gradients():
    """On a machine without CUDA every capture fails."""
    if torch.cuda.is_available():
        pytest.skip("a capture succeeds here")
    method = recipe("on").method
    lines: list[str] = []
    gradients = []
    for kind, options in ((Passes, {}), (GraphedPasses, {"report": lines.append})):
        student, teachers, normalise = student_and_teachers(TINY, method)
        run = kind(student, teachers, normalise, recipe("on", micro_batches=2), **options)
        for seed in range(2):
            run(Inputs(*make_batch(TINY, method, 4, seed)), last=seed == 1)
        gradients.append([parameter.grad for parameter in student.parameters()])
    assert len(lines) == 1 and lines[0].startswith("CUDA graphs: the step cannot be captured (")
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.equal(ours, theirs)


def test_flat_gradients_are_views_of_one_buffer_that_begin_at_cache_lines():
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((3,), (64, 2), (5, 7), ())]
    flat, views = flat_gradients(parameters)
    for number, (parameter, view) in enumerate(zip(parameters, views, strict=True), 1):
        assert view.shape == parameter.shape and view.storage_offset() % 64 == 0
        view.fill_(number)
    assert [int((flat == number).sum()) for number in range(1, 5)] == [3, 128, 35, 1]
