"""The training steps that are measured, cfmask's and the authors'.

Weights are random: a student that differs a little from its teacher, and a head of 1000 classes. Images and labels are
random too. A step goes from uint8 images on the device to updated weights: normalisation, passes, clipping, AdamW.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
import torch
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from cfmask.errors import UserError
from cfmask.masking.fills import Draws, DrawSpec, draw
from cfmask.models.head import ModelInfo, build_tower
from cfmask.models.initial import model_info
from cfmask.models.tower import Classifier, Normalise, store_products_in
from cfmask.optim import LrAndBetas, Phase, adamw, take_step
from cfmask.recipe import Method, Recipe, Run
from cfmask.session import autocast
from cfmask.step import Teachers
from cfmask.training.passes import GraphedPasses, Inputs, Passes
from tools.benchmarks.authors_step import authors_step
from tools.benchmarks.metering import count_flops, peak_memory, start_of_memory, time_calls, wait

CLASSES = 1000
OPTIM = Recipe().resolved().optim
LR, WEIGHT_DECAY, CLIP_NORM = 3e-5, 0.1, 1.0
VANILLA = Recipe(method=Method(name="vanilla")).resolved().method
HEADLINE = Recipe(method=Method(mask="object", fill="single-fill")).resolved().method


@dataclass(frozen=True)
class Case:
    """What all contenders of a table have in common."""

    model: str
    """open_clip's name, or the path of a configuration."""
    batch: int
    device: str


@dataclass(frozen=True)
class Contender:
    """One way to compute the step."""

    name: str
    precision: str
    method: Method | None
    """None for the authors' algorithm."""
    recompute: bool = False
    compiled: bool = False
    deterministic: bool = False
    graphs: bool = False
    """Whether the passes run as a CUDA graph."""


@dataclass(frozen=True)
class Measured:
    """A contender's step."""

    seconds: float
    """On the device."""
    host: float
    """Seconds until the step is queued."""
    peak: int
    """Bytes at the peak; see ``peak_memory``."""
    flops: int
    """FLOPs of a step; 0 if they were not counted."""


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
        raise UserError(f"{case.model} has no plain ViT as its image tower. Choose a model with one, such as ViT-B-32.")
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


def drawn(spec: DrawSpec | None, images: Tensor) -> Draws:
    return draw(spec, len(images), np.random.default_rng(0)).map(lambda tensor: tensor.to(images.device))


def copied(m: Materials, device: str) -> Materials:
    """A copy on a device, for a contender to train. ``m`` keeps the state that all contenders start from."""
    parts = {field.name: copy.deepcopy(getattr(m, field.name)) for field in fields(m)}
    draws = parts.pop("draws").map(lambda tensor: tensor.to(device))
    return Materials(draws=draws, **{name: part.to(device) for name, part in parts.items()})


class OurStep:
    """A step as a run computes it. A call takes one step.

    Attributes:
        model: the trained model, around the student of the materials.
        optimizer: its AdamW.
    """

    def __init__(self, m: Materials, contender: Contender) -> None:
        assert contender.method is not None
        method = contender.method
        self.model = Classifier(m.student, m.head)
        self.model.recompute, self.model.compiled = contender.recompute, contender.compiled
        self.model.visual.requires_grad_(method.name != "linear-probe")

        def teacher() -> Classifier:
            frozen = Classifier(copy.deepcopy(m.teacher), copy.deepcopy(m.head)).requires_grad_(False)
            if contender.precision == "bf16":
                store_products_in(frozen, torch.bfloat16)
            return frozen

        teachers = Teachers(teacher() if method.distils else None, teacher() if method.ensemble else None)
        draws = drawn(DrawSpec.of(method, self.model.patches), m.images)
        recipe = Recipe(method=method, run=Run(precision=contender.precision))
        self._inputs = Inputs(m.images, m.labels, draws)
        self._passes = Passes(self.model, teachers, m.normalise, recipe)
        if contender.graphs:
            self._passes = GraphedPasses(self.model, teachers, m.normalise, recipe, report=_refuse)
        phase = Phase(0, 10, tower=True, lr=LR, weight_decay=WEIGHT_DECAY)
        self.optimizer = adamw([p for p in self.model.parameters() if p.requires_grad], phase, OPTIM)

    def __call__(self) -> None:
        self._passes(self._inputs, last=True)
        self._update()

    def operators(self) -> None:
        """A step launched operator by operator, even if it was captured as a graph, so that counters see it."""
        Passes.__call__(self._passes, self._inputs, last=True)
        self._update()

    def _update(self) -> None:
        assert OPTIM.beta1 is not None
        take_step(self.optimizer, LrAndBetas(LR, OPTIM.beta1), CLIP_NORM)


def _refuse(line: str) -> None:
    raise RuntimeError(line)


def their_step(m: Materials, contender: Contender) -> Callable[[], None]:
    """The authors' step with PyTorch's AdamW as documented."""
    parameters = [*m.student.parameters(), *m.head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=WEIGHT_DECAY)
    donors = m.draws.donors
    assert donors is not None

    def step() -> None:
        optimizer.zero_grad()
        with autocast(m.images.device, contender.precision):
            authors_step(m.student, m.head, m.teacher, m.normalise, m.images, m.labels, donors)
        nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
        optimizer.step()

    return step


def measure_step(m: Materials, contender: Contender, *, times: int, warm_up: int, count: bool = True) -> Measured:
    """Time and memory of a contender's steps, which train ``m``, and the FLOPs of one more step."""
    device = m.images.device.type
    step = their_step(m, contender) if contender.method is None else OurStep(m, contender)
    before = start_of_memory(device)
    timed = time_calls(step, device, times=times, warm_up=warm_up)
    peak = peak_memory(device, before)
    flops = count_flops(step.operators if isinstance(step, OurStep) else step) if count else 0
    return Measured(timed.device, timed.host, peak, flops)


def plain_training(model_name: str, device: str, batch: int) -> tuple[ModelInfo, Classifier, torch.optim.AdamW]:
    """A model with random weights whose optimizer state exists, for costs that do not depend on the method."""
    info = model_info(model_name, classes=tuple(str(i) for i in range(CLASSES)))
    model = Classifier(build_tower(info), nn.Linear(info.config["embed_dim"], CLASSES)).to(device)
    optimizer = adamw(model.parameters(), Phase(0, 1, tower=True, lr=1e-5, weight_decay=0.1), Recipe().optim)
    plain_step(model, optimizer, batch)
    return info, model, optimizer


def plain_step(model: Classifier, optimizer: torch.optim.AdamW, batch: int) -> None:
    """A step without CAM and teacher on random pixels. Waits for the device."""
    parameter = next(model.parameters())
    pixels = torch.randn(batch, 3, *model.visual.image_size, device=parameter.device)
    model(pixels).logits.square().mean().backward()
    take_step(optimizer, LrAndBetas(1e-5, 0.9), clip_norm=1.0)
    wait(parameter.device.type)
