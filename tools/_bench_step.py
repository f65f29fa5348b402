"""What `python tools/bench.py step` measures: training steps, what they compute, and the machine's matrix products.

Each measurement is one function that runs in a process of its own (``fresh``), on models with random weights: a
student that has moved a little from its teacher, a head of 1000 classes, random images and labels. A step is everything
from uint8 images on the device to updated weights: normalisation, passes, one clipping, AdamW.

FLOPs are those of matrix products and convolutions, as torch's counter sees them, in the whole step; the counter's own
list leaves out the CPU's fused attention, which is added here.
"""

from __future__ import annotations

import copy
import itertools
import multiprocessing
import os
import signal
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils import flop_counter

from cfmask.errors import UserError
from cfmask.losses import classification, feature_distillation
from cfmask.masking.fills import Draws, DrawSpec, draw
from cfmask.models.head import build_tower, model_info
from cfmask.models.tower import Classifier, Normalise
from cfmask.optim import Phase, Rates, adamw, take_step
from cfmask.recipe import Method, Recipe
from cfmask.session import choose_arithmetic
from cfmask.step import Teachers, camera_of, counterfactual, training_step
from tools._authors_step import authors_step

CLASSES = 1000
# What takes seconds to import, and runs nothing; optimizers import torch._dynamo when they are made.
SHARED_IMPORTS = ["torch", "torch._dynamo", "torch.utils.tensorboard", "open_clip.transformer"]
LR, WEIGHT_DECAY, CLIP_NORM = 3e-5, 0.1, 1.0
WARM_UP = {"cpu": 1, "cuda": 3}
VANILLA = Recipe(method=Method(name="vanilla")).resolved().method
HEADLINE = Recipe(method=Method(mask="object", fill="single-fill")).resolved().method
PARTS = (
    "clean forward",
    "CAM backward",
    "clean backward",
    "masks and fill",
    "teacher forward",
    "masked forward",
    "masked backward",
    "clip and AdamW",
)


@dataclass(frozen=True)
class Case:
    """What all contenders of a table do. model: open_clip's name or a configuration's path; steps: timed ones of a
    round."""

    model: str
    batch: int
    device: str
    steps: int


@dataclass(frozen=True)
class Contender:
    """One way to take the step. method: None for the authors' way."""

    name: str
    precision: str
    method: Method | None
    recompute: bool = False
    compiled: bool = False
    deterministic: bool = False


@dataclass(frozen=True)
class Measured:
    """seconds: of a step; peak: bytes, see ``peak_memory``; flops: of a step, None where they were not asked for."""

    seconds: float
    peak: int
    flops: int | None


@dataclass(frozen=True)
class Parts:
    """Each of PARTS in the headline method's step. seconds: step by step; flops: None where they were not asked for."""

    seconds: list[dict[str, float]]
    flops: dict[str, float] | None


@dataclass(frozen=True)
class Forward:
    """What all contenders share. flops: F; relevance: those of the relevance kernel in a step of ours, which the
    counter does not see; state: bytes of gradients and AdamW's moments; gpu: its name, or nothing."""

    flops: int
    relevance: int
    state: int
    gpu: str


class DoesNotFit(UserError):
    """A measurement ran out of memory."""


# --- processes ------------------------------------------------------------------------------------------------------


def fresh(measure: Callable[..., Any], *arguments: Any) -> Any:
    """``measure(*arguments)`` in a process that has run nothing before; imports of torch and open_clip are shared.

    Raises:
        DoesNotFit: it ran out of memory, or was killed, as Linux does then.
        UserError: what it raised.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(SHARED_IMPORTS)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, measure, arguments))
    process.start()
    sender.close()
    try:
        answer = receiver.recv()
    except EOFError:
        process.join()
        if process.exitcode == -signal.SIGKILL:
            raise DoesNotFit("it was killed, most often for lack of memory") from None
        raise UserError(f"{measure.__name__} ended with exit code {process.exitcode}") from None
    finally:
        process.kill()
        process.join()
    if isinstance(answer, Exception):
        raise answer
    return answer


def _answer(sender: Any, measure: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    try:
        answer = measure(*arguments)
    except UserError as error:
        answer = error
    except (MemoryError, RuntimeError) as error:
        if not _of_memory(error):
            traceback.print_exc()
        words = str(error) or type(error).__name__
        answer = (DoesNotFit if _of_memory(error) else UserError)(words.splitlines()[0])
    sender.send(answer)


def _of_memory(error: Exception) -> bool:
    """Whether an allocation failed; on the CPU and in cuBLAS the text alone says so."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return any(words in str(error) for words in ("can't allocate memory", "not enough memory", "ALLOC_FAILED"))


# --- what is trained ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Materials:
    """Unmodified towers, and a batch of uint8 images (N, 3, H, W), all on the device."""

    student: VisionTransformer
    head: nn.Linear
    teacher: VisionTransformer
    normalise: Normalise
    images: Tensor
    labels: Tensor
    draws: Draws


def materials(case: Case) -> Materials:
    info = model_info(case.model)
    torch.manual_seed(0)
    student = build_tower(info)
    if not isinstance(student, VisionTransformer):
        raise UserError(f"{case.model} has no plain ViT for an image tower: neither side could train it.")
    head = nn.Linear(student.output_dim, CLASSES)
    teacher = copy.deepcopy(student).requires_grad_(False)
    with torch.no_grad():
        head.weight.copy_(100 * nn.functional.normalize(torch.randn_like(head.weight), dim=1))
        head.bias.zero_()
        for parameter in student.parameters():
            parameter += 1e-3 * torch.randn_like(parameter)
    rows, columns = student.grid_size
    images = torch.randint(256, (case.batch, 3, *student.image_size), dtype=torch.uint8).to(case.device)
    return Materials(
        student.to(case.device),
        head.to(case.device),
        teacher.to(case.device),
        Normalise(info.mean, info.std).to(case.device),
        images,
        torch.randint(CLASSES, (case.batch,)).to(case.device),
        drawn(DrawSpec("object", "single-fill", 0.0, rows * columns), images),
    )


def drawn(spec: DrawSpec, images: Tensor) -> Draws:
    return draw(spec, len(images), np.random.default_rng(0)).map(lambda tensor: tensor.to(images.device))


def our_step(m: Materials, contender: Contender) -> Callable[[], None]:
    """A step as cfmask/worker.py takes it."""
    assert contender.method is not None
    method = contender.method
    model = Classifier(m.student, m.head)
    model.recompute, model.compiled = contender.recompute, contender.compiled
    model.visual.requires_grad_(method.name != "linear-probe")

    def teacher() -> Classifier:
        return Classifier(copy.deepcopy(m.teacher), copy.deepcopy(m.head)).requires_grad_(False)

    teachers = Teachers(teacher() if method.distils else None, teacher() if method.ensemble else None)
    draws = m.draws
    if method.masked:
        assert method.mask is not None and method.fill is not None
        draws = drawn(DrawSpec(method.mask, method.fill, method.rate or 0.0, model.patches), m.images)
    update = our_update(model)

    def step() -> None:
        with autocast(m.images.device.type, contender.precision):
            training_step(model, teachers, m.normalise, m.images, m.labels, draws, method)
        update()

    return step


def our_update(model: Classifier) -> Callable[[], Tensor]:
    phase = Phase(0, 10, tower=True, lr=LR, weight_decay=WEIGHT_DECAY)
    optim = Recipe().resolved().optim
    optimizer = adamw([p for p in model.parameters() if p.requires_grad], phase, optim)
    assert optim.beta1 is not None
    now = Rates(LR, optim.beta1)
    return lambda: take_step(optimizer, now, CLIP_NORM)


def their_step(m: Materials, contender: Contender) -> Callable[[], None]:
    """The authors' step with the optimizer as PyTorch's documentation has it."""
    parameters = [*m.student.parameters(), *m.head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=WEIGHT_DECAY)
    donors = m.draws.donors
    assert donors is not None

    def step() -> None:
        optimizer.zero_grad()
        with autocast(m.images.device.type, contender.precision):
            authors_step(m.student, m.head, m.teacher, m.normalise, m.images, m.labels, donors)
        nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
        optimizer.step()

    return step


def autocast(device: str, precision: str) -> torch.autocast:
    return torch.autocast(device, torch.bfloat16, enabled=precision == "bf16")


# --- measurements ---------------------------------------------------------------------------------------------------


def measure_step(case: Case, contender: Contender, count: bool) -> Measured:
    """Time and memory of a contender's steps, and what one more step computes."""
    choose_arithmetic(contender.precision, deterministic=contender.deterministic)
    m = materials(case)
    step = their_step(m, contender) if contender.method is None else our_step(m, contender)
    before = start_of_memory(case.device)
    for _ in range(WARM_UP[case.device]):
        step()
    wait(case.device)
    begun = time.perf_counter()
    for _ in range(case.steps):
        step()
    wait(case.device)
    seconds = (time.perf_counter() - begun) / case.steps
    return Measured(seconds, peak_memory(case.device, before), count_flops(step) if count else None)


def measure_parts(case: Case, precision: str, count: bool) -> Parts:
    """Time of the headline method's step part by part, and what the parts of one more compute."""
    choose_arithmetic(precision, deterministic=False)
    m = materials(case)
    model, teacher = Classifier(m.student, m.head), Classifier(m.teacher, copy.deepcopy(m.head))
    update = our_update(model)

    def clock() -> float:
        wait(case.device)
        return time.perf_counter()

    def take(meter: Callable[[], float]) -> dict[str, float]:
        scope = autocast(case.device, precision)
        return step_in_parts(model, teacher, m.normalise, m.images, m.labels, m.draws, scope, update, meter)

    for _ in range(WARM_UP[case.device]):
        take(clock)
    seconds = [take(clock) for _ in range(case.steps)]
    if not count:
        return Parts(seconds, None)
    with counter() as counting:
        return Parts(seconds, take(counting.get_total_flops))


def step_in_parts(
    model: Classifier,
    teacher: Classifier,
    normalise: Normalise,
    images: Tensor,
    labels: Tensor,
    draws: Draws,
    scope: torch.autocast,
    update: Callable[[], object],
    meter: Callable[[], float],
) -> dict[str, float]:
    """``training_step`` of the headline method, call by call as it makes them, and the update.

    Returns:
        By how much the meter, read after each of PARTS, went on in it.
    """
    readings = [meter()]
    with scope:
        camera = camera_of(HEADLINE)
        assert camera is not None
        features = model.encode(normalise(images), cam=camera)
        logits = model.classify(features)
        readings.append(meter())
        cam = camera.of(logits.gather(1, labels[:, None]).squeeze(1))
        readings.append(meter())
        classification(logits, labels).backward(inputs=list(model.visual.parameters()))
        readings.append(meter())
        pixels = normalise(counterfactual(images, cam, draws, HEADLINE, model.patch_size).images)
        readings.append(meter())
        with torch.no_grad():
            wanted = teacher(pixels)
        readings.append(meter())
        seen = model(pixels, clean_features=features.detach())
        loss = classification(seen.clean_logits, labels)
        loss = loss + (HEADLINE.beta or 0.0) * feature_distillation(seen.features, wanted.features)
        readings.append(meter())
        loss.backward()
        readings.append(meter())
    update()
    readings.append(meter())
    return {part: after - before for part, (before, after) in zip(PARTS, itertools.pairwise(readings), strict=True)}


def measure_forward(case: Case) -> Forward:
    """F: the FLOPs of one forward of open_clip's own tower on the batch."""
    m = materials(case)
    with torch.no_grad():  # in train mode: in eval mode torch would run blocks that the counter does not see
        flops = count_flops(lambda: m.student(m.normalise(m.images)))
    trained = [*m.student.parameters(), *m.head.parameters()]
    return Forward(
        flops=flops,
        relevance=_relevance_flops(m),
        state=3 * sum(p.numel() * p.element_size() for p in trained),
        gpu=torch.cuda.get_device_name() if case.device == "cuda" else "",
    )


def _relevance_flops(m: Materials) -> int:
    """What cfmask.masking.relevance_kernel multiplies: q kᵀ twice and dO vᵀ, the last block for one query only."""
    length, width = m.student.positional_embedding.shape
    queries = (len(m.student.transformer.resblocks) - 1) * length + 1
    return 3 * 2 * len(m.images) * queries * length * width


def measure_matmul(device: str, precision: str) -> float:
    """The machine's FLOP/s in a big square matrix product: what a share of the peak is a share of."""
    choose_arithmetic(precision, deterministic=False)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    times = 20 if device == "cuda" else 1

    def seconds(a: Tensor) -> float:
        wait(device)
        begun = time.perf_counter()
        for _ in range(times):
            a @ a
        wait(device)
        return (time.perf_counter() - begun) / times

    size = 8192 if device == "cuda" else 256
    a = torch.randn(size, size, device=device).to(dtype)
    seconds(a)
    # No size suits every CPU: arithmetic that it does not have takes it a hundred times as long.
    while device == "cpu" and seconds(a) < 0.05:
        size *= 2
        a = torch.randn(size, size).to(dtype)
    return 2 * size**3 / statistics.median(seconds(a) for _ in range(7))


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


# --- FLOPs and memory -----------------------------------------------------------------------------------------------


def counter() -> flop_counter.FlopCounterMode:
    """torch's counter, which goes through the step operator by operator, with the CPU's fused attention in its list."""

    def forward(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
        return flop_counter.sdpa_flop_count(q, k, v)

    def backward(d_out: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
        return flop_counter.sdpa_backward_flop_count(d_out, q, k, v)

    of_cpu = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: forward,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    return flop_counter.FlopCounterMode(display=False, custom_mapping=of_cpu)


def count_flops(run: Callable[[], object]) -> int:
    with counter() as counting:
        run()
    return counting.get_total_flops()


def start_of_memory(device: str) -> int:
    """What ``peak_memory`` is to be told: bytes that are taken before the first step. Forgets earlier peaks."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return 0
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass  # the peak is that of the process's whole life then
    return _resident("VmRSS")


def peak_memory(device: str, before: int) -> int:
    """Bytes at the peak: on a GPU all that tensors took, weights included; on a CPU what the process's memory grew by
    from the first step on, so gradients and moments, but not the weights."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return _resident("VmHWM") - before


def _resident(what: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(what))
