"""The passes of a micro-batch, forward and backward: launched operator by operator, or replayed as a CUDA graph.

A step launches about two thousand kernels. With few images on a GPU, each kernel ends before the host has launched the
next one, and the GPU mostly waits. A CUDA graph is captured once and launched as a whole. It has the same kernels on
the same shapes in the same order, so the results of a rank are bitwise identical.

The graph contains ``step.training_step``, with gradients added to one flat buffer. Outside of it are the copy of the
batch into the graph's inputs, the averaging of gradients over ranks, clipping and AdamW. Gradients are averaged by one
all-reduce of the buffer after the last micro-batch. DDP would do it in buckets during the backward pass, so with three
or more ranks the sums may differ from DDP's in the last bit.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cfmask.data.stream import MicroBatch
from cfmask.masking.fills import Draws
from cfmask.masking.tensors import TensorFields
from cfmask.masking.validation import Coverage
from cfmask.models.tower import Classifier, Normalise
from cfmask.recipe import Recipe
from cfmask.runtime.heartbeat import WAITING, beat
from cfmask.session import autocast
from cfmask.step import Metrics, Teachers, training_step
from cfmask.training.ddp import data_parallel
from cfmask.training.step_clock import StepClock

logger = logging.getLogger(__name__)

GRAPHED_IMAGES = 128
"""The largest micro-batch on a GPU, in images, that ``--cuda-graphs auto`` captures. Times: docs/benchmarks.md."""


@dataclasses.dataclass(frozen=True)
class Inputs(TensorFields):
    """The tensors that the passes of a micro-batch read, all on one device (``data.stream.MicroBatch``)."""

    images: Tensor
    labels: Tensor
    draws: Draws
    objects: Coverage | None = None


def inputs_of(batch: MicroBatch) -> Inputs:
    return Inputs(batch.images, batch.labels, batch.draws, batch.objects)


class Passes:
    """The passes of a micro-batch, launched operator by operator.

    Args:
        student: a Classifier, or DDP around one; parameters that need no gradient are not trained.
        clock: ends its measurement where this rank may begin to wait for others.
    """

    def __init__(
        self,
        student: nn.Module,
        teachers: Teachers,
        normalise: Normalise,
        recipe: Recipe,
        clock: StepClock | None = None,
    ) -> None:
        self._student, self._teachers, self._normalise, self._recipe = student, teachers, normalise, recipe
        self._clock = clock
        self.device = normalise.mean.device
        if isinstance(student, DistributedDataParallel):
            student.register_forward_hook(lambda *_: self._may_wait())

    def _may_wait(self) -> None:
        """Called before the first operation that may wait for other ranks."""
        if self._clock is not None:
            self._clock.end()
        beat(WAITING)

    def __call__(self, inputs: Inputs, *, last: bool) -> Metrics:
        """Add the micro-batch's gradients to the parameters' ``grad``.

        Args:
            inputs: on the device, or in pinned memory, from which they are copied asynchronously.
            last: whether this is the step's last micro-batch: gradients are then averaged over ranks.
        """
        return self._run(self._on_device(inputs), synchronise=last)

    def _on_device(self, inputs: Inputs) -> Inputs:
        return inputs.map(lambda tensor: tensor.to(self.device, non_blocking=True))

    def _run(self, inputs: Inputs, *, synchronise: bool) -> Metrics:
        with autocast(self.device, self._recipe.run.precision):
            return training_step(
                self._student,
                self._teachers,
                self._normalise,
                inputs.images,
                inputs.labels,
                inputs.draws,
                self._recipe.method,
                weight=1 / self._recipe.optim.num_micro_batches,
                synchronise=synchronise,
                objects=inputs.objects,
            )


class GraphedPasses(Passes):
    """The passes of a micro-batch as a CUDA graph, captured at the first call. All micro-batches must have its shapes.

    Gradients lie in one buffer, which one all-reduce averages over the ranks; there is no DDP. If the capture fails on
    any rank, all ranks launch the passes operator by operator, with bitwise identical results, and rank 0 reports why.
    """

    _WARM_UP = 3  # passes before the capture, which load libraries, allocate workspaces and compile Triton kernels

    def __init__(
        self,
        model: Classifier,
        teachers: Teachers,
        normalise: Normalise,
        recipe: Recipe,
        clock: StepClock | None = None,
        *,
        report: Callable[[str], None] = logger.warning,
    ) -> None:
        super().__init__(model, teachers, normalise, recipe, clock)
        self._report = report
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self._flat, self._gradients = flat_gradients(self._trained)
        self._captured: _Captured | None = None
        self._tried = False
        self._between_steps = True  # whether the next micro-batch is the first of a step

    def __call__(self, inputs: Inputs, *, last: bool) -> Metrics:
        if not self._tried:
            self._captured, self._tried = self._capture_on_all_ranks(inputs), True
        if self._between_steps:
            self._flat.zero_()
            self._attach_gradients()
        if self._captured is None:
            metrics = self._run(self._on_device(inputs), synchronise=False)
        else:
            metrics = self._captured.replay(inputs)
        self._between_steps = last
        if last and dist.is_initialized() and dist.get_world_size() > 1:
            self._may_wait()
            self._flat /= dist.get_world_size()  # before the sum, as DDP does
            dist.all_reduce(self._flat)
        return metrics

    def _attach_gradients(self) -> None:
        for parameter, gradient in zip(self._trained, self._gradients, strict=True):
            parameter.grad = gradient

    def _capture_on_all_ranks(self, inputs: Inputs) -> _Captured | None:
        """The graph; None on all ranks if the capture fails on one."""
        why, captured = None, None
        try:
            captured = self._capture(inputs)
        except Exception as error:  # of any type: from the driver, a library or the compiler
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        failures: list[str | None] = [why]
        if dist.is_initialized():
            failures = [None] * dist.get_world_size()
            dist.all_gather_object(failures, why)
        if any(failures):
            captured = None
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            first = next(reason for reason in failures if reason)
            if _is_rank_0():
                self._report(f"CUDA graphs: the step cannot be captured ({first}); it is launched operator by operator")
        return captured

    def _capture(self, inputs: Inputs) -> _Captured:
        """Leaves gradients of the warm-up passes in the buffer."""
        static = inputs.map(lambda tensor: tensor.to(self.device, copy=True))
        self._attach_gradients()
        aside = torch.cuda.Stream(self.device)
        aside.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(aside):
            for _ in range(self._WARM_UP):
                self._run(static, synchronise=False)
        torch.cuda.current_stream(self.device).wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # A failed capture does not restore the current stream; the outer context does. Loader threads pin memory during
        # the capture, which the default error mode forbids.
        with torch.cuda.stream(aside), torch.cuda.graph(graph, capture_error_mode="thread_local"):
            metrics = self._run(static, synchronise=False)
        return _Captured(graph, static, metrics)


@dataclasses.dataclass(frozen=True)
class _Captured:
    """A graph, the inputs that it reads, and the metrics that it writes."""

    graph: torch.cuda.CUDAGraph
    inputs: Inputs
    metrics: Metrics

    def replay(self, inputs: Inputs) -> Metrics:
        for there, here in zip(self.inputs.tensors(), inputs.tensors(), strict=True):
            there.copy_(here, non_blocking=True)
        self.graph.replay()
        return self.metrics.map(torch.clone)  # the next replay overwrites the graph's own


def flat_gradients(parameters: list[nn.Parameter]) -> tuple[Tensor, list[Tensor]]:
    """A buffer of zeros for the gradients of ``parameters``, which have one dtype and device, and its view for each.

    Views begin at multiples of 64 elements, so that kernels read whole cache lines.
    """
    places, end = [], 0
    for parameter in parameters:
        places.append(end)
        end += -(-parameter.numel() // 64) * 64
    flat = torch.zeros(end, dtype=parameters[0].dtype, device=parameters[0].device)
    views = [flat[p : p + of.numel()].view_as(of) for p, of in zip(places, parameters, strict=True)]
    return flat, views


def uses_graphs(recipe: Recipe, device: torch.device, world_size: int) -> bool:
    """Whether the passes of a recipe are captured as a CUDA graph."""
    if device.type != "cuda" or recipe.run.compile or recipe.run.cuda_graphs == "off":
        return False
    images = recipe.optim.batch_size // world_size // recipe.optim.num_micro_batches
    return recipe.run.cuda_graphs == "on" or images <= GRAPHED_IMAGES


def make_passes(
    model: Classifier,
    teachers: Teachers,
    normalise: Normalise,
    recipe: Recipe,
    world_size: int,
    clock: StepClock | None = None,
) -> Passes:
    """The passes of a phase, which train the parameters that require a gradient. Every rank has to call it."""
    if uses_graphs(recipe, normalise.mean.device, world_size):
        return GraphedPasses(model, teachers, normalise, recipe, clock)
    if recipe.run.cuda_graphs == "on" and _is_rank_0():  # not with --compile, which a recipe refuses
        logger.warning("CUDA graphs: not used, because there is no GPU")
    student = data_parallel(model, normalise.mean.device) if dist.is_initialized() else model
    return Passes(student, teachers, normalise, recipe, clock)


def _is_rank_0() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0
