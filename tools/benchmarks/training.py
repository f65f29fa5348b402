"""Training steps that are measured, ours and the authors'.

Models have random weights: a student that has moved a little from its teacher, a head of 1000 classes, random images
and labels. A step is everything from uint8 images on the device to updated weights: normalisation, passes, one
clipping, AdamW.
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
from cfmask.models.head import build_tower
from cfmask.models.initial import model_info
from cfmask.models.tower import Classifier, Normalise, store_products_in
from cfmask.optim import LrAndBetas, Phase, adamw, take_step
from cfmask.recipe import Method, Recipe, Run
from cfmask.session import autocast
from cfmask.step import Teachers
from cfmask.training.passes import GraphedPasses, Inputs, Passes
from tools.benchmarks.authors_step import authors_step

CLASSES = 1000
OPTIM = Recipe().resolved().optim
LR, WEIGHT_DECAY, CLIP_NORM = 3e-5, 0.1, 1.0
VANILLA = Recipe(method=Method(name="vanilla")).resolved().method
HEADLINE = Recipe(method=Method(mask="object", fill="single-fill")).resolved().method


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
    """One way to take the step. method: None for the authors' way; graphs: the passes as a CUDA graph."""

    name: str
    precision: str
    method: Method | None
    recompute: bool = False
    compiled: bool = False
    deterministic: bool = False
    graphs: bool = False


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


def drawn(spec: DrawSpec | None, images: Tensor) -> Draws:
    return draw(spec, len(images), np.random.default_rng(0)).map(lambda tensor: tensor.to(images.device))


def copied(m: Materials, device: str) -> Materials:
    """The same on a device: what a contender may train while ``m`` keeps the state that all of them start from."""
    parts = {field.name: copy.deepcopy(getattr(m, field.name)) for field in fields(m)}
    draws = parts.pop("draws").map(lambda tensor: tensor.to(device))
    return Materials(draws=draws, **{name: part.to(device) for name, part in parts.items()})


class OurStep:
    """A step as a run takes it. Calling it takes one.

    model: what is trained, a Classifier around the materials' student; optimizer: its AdamW.
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
        self.optimizer = our_optimizer(self.model)

    def __call__(self) -> None:
        self.add_gradients()
        update(self.optimizer)

    def add_gradients(self) -> None:
        """The forward and backward passes alone."""
        self._passes(self._inputs, last=True)

    def operators(self) -> None:
        """A step launched operator by operator, even if it has been captured as a graph: what counters see."""
        Passes.__call__(self._passes, self._inputs, last=True)
        update(self.optimizer)


def _refuse(line: str) -> None:
    raise RuntimeError(line)


def our_optimizer(model: Classifier) -> torch.optim.AdamW:
    phase = Phase(0, 10, tower=True, lr=LR, weight_decay=WEIGHT_DECAY)
    return adamw([p for p in model.parameters() if p.requires_grad], phase, OPTIM)


def update(optimizer: torch.optim.AdamW) -> None:
    assert OPTIM.beta1 is not None
    take_step(optimizer, LrAndBetas(LR, OPTIM.beta1), CLIP_NORM)


def their_step(m: Materials, contender: Contender) -> Callable[[], None]:
    """The authors' step with the optimizer as PyTorch's documentation has it."""
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
