"""The benchmark of the step: the authors' algorithm gives the same gradients as ours, the table has every row, and our
steps take no more FLOPs than the method needs."""

from __future__ import annotations

import copy
import json
import os
import signal

import numpy as np
import pytest
import torch

from cfmask.masking.cam import Relevance
from cfmask.masking.fills import DrawSpec, draw
from cfmask.models.head import build_tower
from cfmask.models.tower import Classifier
from cfmask.recipe import Method
from cfmask.session import choose_arithmetic
from cfmask.step import Teachers, counterfactual, training_step
from test_step import assert_same_gradients, make_batch, resolved, student_and_teachers
from tools import bench
from tools.benchmarks import fresh_process, metering, step, training
from tools.benchmarks.authors_step import authors_step
from towers import B16, B32, TINY

HEADLINE = resolved(Method(mask="object", fill="single-fill"))


def plain(model: Classifier, geometry):
    """open_clip's own tower with a Classifier's weights."""
    visual = build_tower(geometry.info()).double()
    visual.load_state_dict(model.visual.state_dict())
    return visual


@pytest.mark.parametrize("geometry", [B32, B16], ids=["B/32-like", "B/16-like"])
def test_the_authors_step_and_ours_give_the_same_loss_mask_and_gradients(geometry):
    student, teachers, normalise = student_and_teachers(geometry, HEADLINE)
    images, labels, draws = make_batch(geometry, HEADLINE, 6)
    visual, head = plain(student, geometry), copy.deepcopy(student.head)

    result = authors_step(visual, head, plain(teachers.pretrained, geometry), normalise, images, labels, draws.donors)

    cam_hook = Relevance()
    logits = student.classify(student.encode(normalise(images), cam=cam_hook))
    cam = cam_hook.compute(logits.gather(1, labels[:, None]).squeeze(1))
    assert torch.equal(result.mask, counterfactual(images, cam, draws, HEADLINE, geometry.patch).mask)
    assert 0 < result.mask.float().mean() < 1
    metrics = training_step(student, teachers, normalise, images, labels, draws, HEADLINE)
    torch.testing.assert_close(metrics.loss, result.loss, rtol=1e-9, atol=0)
    theirs = {f"visual.{name}": parameter for name, parameter in visual.named_parameters()}
    assert_same_gradients(student, theirs | {f"head.{name}": parameter for name, parameter in head.named_parameters()})


def test_the_table_has_every_contender(tmp_path, capsys, monkeypatch):
    """In this process: fresh ones are tested below."""
    monkeypatch.setattr(step, "fresh", lambda measure, *arguments: measure(*arguments))
    monkeypatch.setattr(step, "measure_matmul", lambda *_: 1e12)
    (tmp_path / "tiny.json").write_text(json.dumps(TINY.info().config))
    flags = ["--model", str(tmp_path / "tiny.json"), "--device", "cpu", "--batch-size", "4", "--precision", "bf16"]
    try:
        assert bench.main(["step", *flags, "--rounds", "1", "--steps", "1"]) == 0
    finally:
        choose_arithmetic("fp32", deterministic=False)
    output = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in output.splitlines() if line[:1] == "|"]
    steps = [row[:2] for row in rows if len(row) > 4 and "--" not in row[0]]
    assert steps == [
        ["step", "precision"],
        ["vanilla FT", "bf16"],
        ["cfmask", "bf16"],
        ["cfmask, deterministic", "bf16"],
        ["cfmask, activations recomputed", "bf16"],
        ["as the authors compute it", "fp32"],
        ["as the authors compute it", "bf16"],
    ]
    assert all(cell for row in rows for cell in row)


def run_out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory.")


def get_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_measurement_that_needs_too_much_memory_does_not_fit():
    for measure in (run_out_of_memory, get_killed):
        with pytest.raises(fresh_process.DoesNotFit, match="memory"):
            fresh_process.fresh(measure)


# --- FLOPs ----------------------------------------------------------------------------------------------------------

COSTS = {
    "linear-probe": (Method(name="vanilla"), 1.0),
    "vanilla": (Method(name="vanilla"), 3.0),
    "kd-clean": (Method(name="kd", mask="none"), 4.0),
    "clean": (Method(mask="none"), 4.0),
    "random-no-fill": (Method(mask="random", fill="no-fill", rate=0.75), 4.1),
    "grad-cam": (Method(mask="object", fill="single-fill", cam="grad-cam"), 7.0),
    "relevance": (Method(mask="object", fill="single-fill"), 7.6),
}
"""What a method's step needs on B/16, in forwards of open_clip's plain tower. A count far below means that the counter
misses something."""


@pytest.fixture(scope="module")
def b16():
    """Models and a batch of B/16, and F."""
    materials = training.materials(training.Case("ViT-B-16-quickgelu", 1, "cpu"))
    with torch.no_grad():
        forward = metering.count_flops(lambda: materials.student(materials.normalise(materials.images)))
    return materials, forward


def test_the_authors_step_costs_nine_forwards(b16):
    m, forward = b16

    def take_step():
        return authors_step(m.student, m.head, m.teacher, m.normalise, m.images, m.labels, m.draws.donors)

    assert 8.9 <= metering.count_flops(take_step) / forward <= 9.1


@pytest.mark.parametrize("row", COSTS)
def test_a_step_costs_no_more_forwards_than_its_method_needs(b16, row):
    m, forward = b16
    method, most = resolved(COSTS[row][0]), COSTS[row][1]
    model = Classifier(copy.deepcopy(m.student), m.head)
    model.visual.requires_grad_(row != "linear-probe")
    teachers = Teachers(pretrained=Classifier(copy.deepcopy(m.teacher), m.head) if method.distils else None)
    spec = DrawSpec(method.mask, method.fill, method.rate or 0.0, model.patches) if method.masked else None
    draws = draw(spec, len(m.images), np.random.default_rng(0))

    def take_step():
        return training_step(model, teachers, m.normalise, m.images, m.labels, draws, method)

    cost = metering.count_flops(take_step) / forward
    print(f"{row}: {cost:.3f} F")
    assert 0.8 * most <= cost <= most
