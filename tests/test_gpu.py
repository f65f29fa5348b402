"""The step on a GPU: it equals the CPU's, repeats bitwise, also as a CUDA graph, and never waits for the device."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from safetensors.torch import load_file
from torch import nn

import made
from cfmask.masking.fills import DrawSpec, draw
from cfmask.models.head import build_tower
from cfmask.models.initial import model_info
from cfmask.models.tower import Classifier, Normalise, store_products_in
from cfmask.optim import LrAndBetas, Phase, adamw, take_step
from cfmask.recipe import Method, Recipe
from cfmask.session import choose_arithmetic
from cfmask.step import Teachers, training_step
from cfmask.training import passes as passes_module
from cfmask.training.ddp import data_parallel
from cfmask.training.passes import GraphedPasses, Inputs, Passes
from cfmask.training.step_clock import StepClock
from test_step import METHODS, assert_same_gradients, make_batch, name_of, resolved, student_and_teachers
from towers import B32, KEYS_197, KEYS_257, Geometry

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
HEADLINE = resolved(Method(mask="object", fill="single-fill"))


def on_gpu(*models):
    """Copies of models, or of the models of a Teachers, on the GPU."""
    return [
        Teachers(*(m and copy.deepcopy(m).cuda() for m in (model.pretrained, model.ensemble)))
        if isinstance(model, Teachers)
        else copy.deepcopy(model).cuda()
        for model in models
    ]


@pytest.fixture
def strict():
    """The default mode of a run."""
    choose_arithmetic("bf16", deterministic=True)
    yield
    choose_arithmetic("fp32", deterministic=False)


@pytest.mark.parametrize("recompute", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("method", METHODS, ids=name_of)
def test_fp64_gradients_equal_the_cpus(method, recompute):
    method = resolved(method)
    here = student_and_teachers(B32, method)
    student, teachers, normalise = on_gpu(*here)
    student.recompute = recompute
    images, labels, draws = make_batch(B32, method, 4)
    training_step(*here, images, labels, draws, method)
    training_step(student, teachers, normalise, images.cuda(), labels.cuda(), draws.map(torch.Tensor.cuda), method)
    assert_same_gradients(student.cpu(), dict(here[0].named_parameters()))


@pytest.mark.parametrize("recompute", [False, True], ids=["", "checkpointed"])
def test_fp32_gradients_of_kernels_are_as_exact_as_plain_ones(recompute):
    """Compared with the CPU's in fp64. In fp32 the CPU's have errors of a few 1e-4 of a tensor's largest value."""

    def gradients(dtype: torch.dtype, device: str):
        student, teachers, normalise = student_and_teachers(KEYS_257, HEADLINE)
        for model in (student, teachers.pretrained, normalise):
            model.to(device, dtype)
        student.recompute = recompute
        images, labels, draws = make_batch(KEYS_257, HEADLINE, 4)
        batch = Inputs(images.to(dtype), labels, draws).map(lambda tensor: tensor.to(device))
        training_step(student, teachers, normalise, batch.images, batch.labels, batch.draws, HEADLINE)
        return {name: p.grad.cpu().double() for name, p in student.named_parameters()}

    right = gradients(torch.float64, "cpu")

    def worst(found) -> float:
        return max(((found[name] - g).abs().max() / g.abs().max()).item() for name, g in right.items())

    by_kernels, plain = worst(gradients(torch.float32, "cuda")), worst(gradients(torch.float32, "cpu"))
    print(f"error {by_kernels:.1e}, without kernels {plain:.1e}")
    assert by_kernels < 3 * plain < 3e-3


# --- several steps ----------------------------------------------------------------------------------------------------


def recipe_of(method: Method, micro_batches: int = 1) -> Recipe:
    recipe = Recipe(method=method).resolved()
    return dataclasses.replace(
        recipe,
        method=method,
        optim=dataclasses.replace(recipe.optim, micro_batches=micro_batches),
        run=dataclasses.replace(recipe.run, precision="bf16"),
    )


def batches_of(geometry: Geometry, method: Method, number: int, not_finite: int | None = None) -> list[Inputs]:
    """Micro-batches of 4 images in pinned memory. The one numbered ``not_finite`` has an infinite pixel."""
    batches = []
    for seed in range(number):
        images, labels, draws = make_batch(geometry, method, 4, seed=seed)
        images = images.float()
        if seed == not_finite:
            images[2, 0, 5, 5] = torch.inf
        batches.append(Inputs(images, labels, draws).map(torch.Tensor.pin_memory))
    return batches


def train(kind, geometry, method, batches, *, recompute=False, micro_batches=1, tower=True, report=None):
    """Weights after a step for each of ``batches``, and each step's metrics and gradient norm."""
    student, teachers, normalise = on_gpu(*student_and_teachers(geometry, method))
    for model in (student, normalise, teachers.pretrained, teachers.ensemble):
        if model is not None:
            model.float()
    for teacher in (teachers.pretrained, teachers.ensemble):
        if teacher is not None:
            store_products_in(teacher, torch.bfloat16)
    student.recompute = recompute
    student.visual.requires_grad_(tower)
    run = kind(student, teachers, normalise, recipe_of(method, micro_batches), **options_of(kind, report))
    phase = Phase(0, 10, tower=tower, lr=1e-3, weight_decay=0.1)
    optimizer = adamw([p for p in student.parameters() if p.requires_grad], phase, Recipe().resolved().optim)
    history = []
    for number, inputs in enumerate(batches):
        last = number % micro_batches == micro_batches - 1
        metrics = run(inputs, last=last)
        history += [metrics.loss, metrics.correct, metrics.masked, metrics.finite.sum()]
        if last:
            history.append(take_step(optimizer, LrAndBetas(1e-3, 0.9), clip_norm=1.0))
    return [*(p.detach() for p in student.parameters()), *(value.double() for value in history)]


def options_of(kind, report=None):
    """A graph that falls back fails the test."""
    return {} if kind is Passes else {"report": report or pytest.fail}


def assert_bitwise_equal(ours, theirs) -> None:
    differing = [i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if not same_bits(a, b)]
    assert not differing, f"{len(differing)} of {len(ours)} tensors differ"


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.nan_to_num(12345.0), b.nan_to_num(12345.0)) and torch.equal(a.isnan(), b.isnan())


@pytest.mark.parametrize("recompute", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("geometry", [KEYS_197, KEYS_257], ids=["197 keys", "257 keys"])
@pytest.mark.parametrize("method", METHODS, ids=name_of)
def test_two_runs_of_every_method_end_bitwise_equal(method, geometry, recompute, strict):
    method = resolved(method)
    batches = batches_of(geometry, method, 3)
    runs = [train(Passes, geometry, method, batches, recompute=recompute) for _ in range(2)]
    assert_bitwise_equal(*runs)


@pytest.mark.parametrize("recompute", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("name, images", [("ViT-B-16-quickgelu", 32), ("ViT-L-14-quickgelu", 8)])
def test_two_runs_of_clips_own_towers_end_bitwise_equal(name, images, recompute, strict):
    info = model_info(name)
    torch.manual_seed(0)
    with torch.device("cuda"):
        first = Classifier(build_tower(info), nn.Linear(info.config["embed_dim"], 100))
    normalise = Normalise(info.mean, info.std).cuda()
    draws = draw(DrawSpec("object", "single-fill", 0.0, first.patches), images, np.random.default_rng(0))
    pixels = torch.randint(256, (images, 3, 224, 224), dtype=torch.uint8)
    inputs = Inputs(pixels, torch.randint(100, (images,)), draws)
    ends = []
    for _ in range(2):
        student, teacher = copy.deepcopy(first), copy.deepcopy(first).requires_grad_(False)
        student.recompute = recompute
        run = Passes(student, Teachers(teacher), normalise, recipe_of(HEADLINE))
        optimizer = adamw(student.parameters(), Phase(0, 9, True, 1e-4, 0.1), Recipe().resolved().optim)
        for _ in range(3):
            run(inputs, last=True)
            take_step(optimizer, LrAndBetas(1e-4, 0.9), clip_norm=1.0)
        ends.append([p.detach() for p in student.parameters()])
    assert_bitwise_equal(*ends)


# --- CUDA graphs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("method", METHODS, ids=name_of)
def test_a_graph_gives_the_same_bits_as_single_operators(method, recompute, strict):
    """With micro-batches, and a step that is skipped because a loss is not finite."""
    method = resolved(method)
    batches = batches_of(B32, method, 8, not_finite=5)
    ends = [train(kind, B32, method, batches, recompute=recompute, micro_batches=2) for kind in (Passes, GraphedPasses)]
    assert_bitwise_equal(*ends)


def test_a_graph_of_a_phase_that_trains_the_head_alone(strict):
    method = resolved(Method(name="vanilla"))
    batches = batches_of(B32, method, 4)
    assert_bitwise_equal(*(train(kind, B32, method, batches, tower=False) for kind in (Passes, GraphedPasses)))


def test_a_failed_capture_falls_back_to_operators_and_is_reported_once(monkeypatch, strict):
    def refuse(*arguments, **options):
        raise RuntimeError("this driver captures nothing")

    monkeypatch.setattr(passes_module.torch.cuda, "graph", refuse)
    lines: list[str] = []
    batches = batches_of(B32, HEADLINE, 3)
    ends = [
        train(Passes, B32, HEADLINE, batches),
        train(GraphedPasses, B32, HEADLINE, batches, report=lines.append),
    ]
    assert_bitwise_equal(*ends)
    assert len(lines) == 1 and "this driver captures nothing" in lines[0]


def test_a_failed_capture_restores_the_stream_and_the_memory(monkeypatch, strict):
    real, lines = passes_module.training_step, []

    def waits(*arguments, **options):
        metrics = real(*arguments, **options)
        if torch.cuda.is_current_stream_capturing():
            metrics.loss.item()
        return metrics

    batches = batches_of(B32, HEADLINE, 12)
    expected = train(Passes, B32, HEADLINE, batches)
    monkeypatch.setattr(passes_module, "training_step", waits)
    before = torch.cuda.current_stream()
    levels: list[int] = []

    def report(line: str) -> None:
        lines.append(line)
        levels.append(torch.cuda.memory_allocated())

    assert_bitwise_equal(train(GraphedPasses, B32, HEADLINE, batches, report=report), expected)
    assert torch.cuda.current_stream() == before
    assert len(lines) == 1 and "the step cannot be captured" in lines[0]
    assert torch.cuda.memory_allocated() < levels[0] + 1e6, "memory of steps is released"


def _rank(rank: int, folder: str) -> None:
    """One of two ranks that share a GPU, over gloo, because NCCL refuses two ranks on one GPU."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    choose_arithmetic("bf16", deterministic=True)
    ends = []
    for kind in (Passes, GraphedPasses):
        student, teachers, normalise = on_gpu(*student_and_teachers(B32, HEADLINE))
        for model in (student, normalise, teachers.pretrained):
            model.float()
        trained = data_parallel(student, torch.device("cuda", 0)) if kind is Passes else student
        run = kind(trained, teachers, normalise, recipe_of(HEADLINE), **options_of(kind))
        for number in range(3):
            [inputs] = batches_of(B32, HEADLINE, 2 * number + rank + 1)[-1:]
            run(inputs, last=True)
            if number < 2:
                student.zero_grad(set_to_none=True)
        ends.append([p.grad.cpu() for p in student.parameters()])
    torch.save(ends, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_graphed_ranks_average_their_gradients_as_ddp_does(tmp_path):
    multiprocessing.spawn(_rank, args=(str(tmp_path),), nprocs=2)
    (eager, graphed), (_, other) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for ours, theirs, ddps in zip(graphed, other, eager, strict=True):
        assert torch.equal(ours, theirs), "ranks differ"
        torch.testing.assert_close(ours, ddps, rtol=1e-5, atol=1e-6 * ddps.abs().max().item())


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def materials(tmp_path_factory) -> Path:
    root = made.make_materials(tmp_path_factory.mktemp("materials"))
    for name, geometry in (("k197", KEYS_197), ("k257", KEYS_257)):
        made.save_tiny_model(root / f"{name}.safetensors", geometry)
    return root


@pytest.mark.parametrize(
    "name, recompute, graphs",
    [("k197", False, "on"), ("k197", True, "off"), ("k257", False, "off"), ("k257", True, "on")],
)
def test_a_run_that_was_killed_and_resumed_ends_bitwise_equal(materials, tmp_path, name, recompute, graphs):
    """Over NCCL, and over eighteen steps, so that a nondeterministic kernel is likely to show."""

    def flags(run: Path) -> list[object]:
        return [
            *("--shards", materials / "shards", "--model", materials / f"{name}.json"),
            *("--pretrained", materials / f"{name}.safetensors", "--batch-size", 16, "--lanes", 4, "--epochs", 3),
            *("--warmup-steps", 2, "--lr", 1e-3, "--loader-workers", 2, "--log-steps", 1, "--checkpoint-steps", 4),
            *("--executor", "local", "--gpus-per-node", 1, "--precision", "bf16"),
            *("--cuda-graphs", graphs, "--run", run),
            *(["--activation-checkpointing"] if recompute else []),
        ]

    process = made.start(*flags(tmp_path / "killed"))
    whole = made.start(*flags(tmp_path / "whole"))
    made.wait_for_step(tmp_path / "killed", 10)
    made.kill_all(process)
    made.submit(*flags(tmp_path / "killed"))
    assert whole.wait(timeout=300) == 0
    for file in ("model.safetensors", "optimizer.safetensors"):
        ends = [load_file(max((tmp_path / run / "checkpoints").glob("step-*")) / file) for run in ("killed", "whole")]
        assert ends[0].keys() == ends[1].keys() and ends[0]
        differing = [key for key in ends[0] if not torch.equal(ends[0][key], ends[1][key])]
        assert not differing, f"{len(differing)} of {len(ends[0])} tensors of {file} differ"
    assert "CUDA graphs:" not in made.logs(tmp_path / "whole")


def test_a_hanging_rank_leaves_nccls_flight_recorder(materials, tmp_path):
    """The rank sleeps in the middle of a step, after the node check has passed."""
    hang = "\nimport time as _time\n_take_step, _taken = take_step, []\n"
    hang += "def take_step(*given):\n    _taken.append(1)\n    _time.sleep(600 * (len(_taken) == 9))\n"
    hang += "    return _take_step(*given)\n"
    clone, run = made.plant(tmp_path / "clone", cfmask__training__train=hang), tmp_path / "run"
    flags = [*made.recipe_flags(materials, run), "--model", materials / "k197.json", "--epochs", 3, "--retries", 0]
    flags += ["--pretrained", materials / "k197.safetensors", "--executor", "local", "--gpus-per-node", 1]
    ended = made.submit(*flags, "--hang-timeout", 0.2, repository=clone, check=False)
    assert ended.returncode == 1 and "hung: at step 9" in ended.stdout, ended.stdout + made.logs(run)
    assert "take_step" in made.logs(run), "its stacks"
    [recorded] = (run / "jobs/failures").glob("*.nccl_0")
    assert recorded.stat().st_size > 0


# --- waits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Passes, GraphedPasses])
@pytest.mark.parametrize("method", METHODS, ids=name_of)
def test_a_bf16_step_never_waits_for_the_device(method, kind):
    method = resolved(method)
    student, teachers, normalise = on_gpu(*student_and_teachers(B32, method))
    for model in (student, teachers.pretrained, teachers.ensemble, normalise):
        if model is not None:
            model.float()
    [inputs] = batches_of(B32, method, 1)
    phase = Phase(0, 10, tower=True, lr=1e-5, weight_decay=0.1)
    optimizer = adamw(student.parameters(), phase, Recipe().resolved().optim)
    run = kind(student, teachers, normalise, recipe_of(method), **options_of(kind))

    clock = StepClock(torch.device("cuda"))

    def step() -> torch.Tensor:
        clock.begin()
        run(inputs, last=True)
        clock.end()
        clock.mean()
        return take_step(optimizer, LrAndBetas(1e-5, 0.9), clip_norm=1.0)

    step()  # the first step loads libraries and allocates workspaces
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        norm = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert norm.isfinite()
