"""The passes of a micro-batch, forward and backward: launched operator by operator, or replayed as a CUDA graph.

A step launches some two thousand kernels. Where a GPU has few images each kernel is over before the host has launched
the next, and most of the GPU's time is waiting. A CUDA graph is captured once and launched as a whole: the same kernels
on the same shapes in the same order, and so the same bits.

In the graph: everything of ``step.training_step``, with gradients added to one flat buffer. Outside: copying the batch
into the graph's inputs, the average of gradients over ranks (one all-reduce of the flat buffer after the last
micro-batch, in place of DDP's, which overlaps the backward pass), clipping and AdamW.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cfmask.data.stream import Batch
from cfmask.masking.fills import Draws
from cfmask.masking.validation import Coverage
from cfmask.models.tower import Normalise
from cfmask.recipe import Recipe
from cfmask.step import Metrics, Teachers, training_step

GRAPHED_IMAGES = 128
"""Up to how many images of a micro-batch on a GPU ``--cuda-graphs auto`` captures: docs/benchmarks.md has the times."""


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a micro-batch's passes read, all on one device: see ``data.stream.Batch``."""

    images: Tensor
    labels: Tensor
    draws: Draws
    objects: Coverage | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> Inputs:
        """``function`` applied to each tensor."""
        objects = None if self.objects is None else self.objects.map(function)
        return Inputs(function(self.images), function(self.labels), self.draws.map(function), objects)

    def tensors(self) -> list[Tensor]:
        """All tensors, in a fixed order."""
        found: list[Tensor] = []
        self.map(lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
        return found


def inputs_of(batch: Batch) -> Inputs:
    return Inputs(batch.images, batch.labels, batch.draws, batch.objects)


class Passes:
    """A micro-batch's passes, operator by operator.

    Args:
        student: a Classifier, or DDP around one; parameters that need no gradient are not trained.
    """

    def __init__(self, student: nn.Module, teachers: Teachers, normalise: Normalise, recipe: Recipe) -> None:
        self._student, self._teachers, self._normalise, self._recipe = student, teachers, normalise, recipe
        self.device = normalise.mean.device

    def __call__(self, inputs: Inputs, *, last: bool) -> Metrics:
        """Add the micro-batch's gradients to the parameters' ``grad``.

        Args:
            inputs: on the device or in pinned memory, from which they are copied without waiting.
            last: of the step's micro-batches: gradients are averaged over ranks.
        """
        there = inputs.map(lambda tensor: tensor.to(self.device, non_blocking=True))
        return self._run(self._student, there, synchronise=last)

    def _run(self, student: nn.Module, inputs: Inputs, *, synchronise: bool) -> Metrics:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._recipe.run.precision == "bf16"):
            return training_step(
                student,
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
    """A micro-batch's passes as a CUDA graph, captured at the first call; all micro-batches have its shapes.

    Where the capture fails on any rank, all of them run operator by operator, and ``report`` is told why in one line.
    DDP has to have been made for it: ``data_parallel(…, captured=True)``.
    """

    _WARM_UP = 3  # passes before the capture: libraries are loaded, workspaces allocated and Triton kernels compiled

    def __init__(
        self,
        student: nn.Module,
        teachers: Teachers,
        normalise: Normalise,
        recipe: Recipe,
        *,
        report: Callable[[str], None],
    ) -> None:
        super().__init__(student, teachers, normalise, recipe)
        self._report = report
        self._model = student.module if isinstance(student, DistributedDataParallel) else student
        self._graph: torch.cuda.CUDAGraph | None = None
        self._failed = False
        self._between_steps = True  # whether the next micro-batch is a step's first

    def __call__(self, inputs: Inputs, *, last: bool) -> Metrics:
        if self._graph is None and not self._failed:
            self._failed = not self._prepare(inputs)
        if self._failed:
            return super().__call__(inputs, last=last)
        assert self._graph is not None
        if self._between_steps:
            self._flat.zero_()
        for there, here in zip(self._inputs.tensors(), inputs.tensors(), strict=True):
            there.copy_(here, non_blocking=True)
        self._graph.replay()
        # The graph's own results are overwritten by the next replay.
        metrics = self._metrics.map(torch.clone)
        self._between_steps = last
        if last:
            self._average_over_ranks()
            self._attach_gradients()
        return metrics

    def _prepare(self, inputs: Inputs) -> bool:
        """Capture the graph; False, on all ranks alike, if that fails on one."""
        why = self._try_to_capture(inputs)
        failures: list[str | None] = [why]
        if dist.is_initialized():
            failures = [None] * dist.get_world_size()
            dist.all_gather_object(failures, why)
        if any(failures):
            self._release()
            first = next(reason for reason in failures if reason)
            self._report(f"CUDA graphs: the step cannot be captured ({first}); it is launched operator by operator")
        return not any(failures)

    def _try_to_capture(self, inputs: Inputs) -> str | None:
        """Why the step cannot be captured; None if it has been."""
        # Gradients are accumulated on DDP's stream and made on another, which costs nothing in a graph.
        set_warning = getattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch", None)
        if set_warning is not None:  # versions that do not have it do not warn
            set_warning(False)
        try:
            self._inputs = inputs.map(lambda tensor: tensor.to(self.device, copy=True))
            self._trained = [p for p in self._model.parameters() if p.requires_grad]
            self._flat, self._gradients = flat_gradients(self._trained)
            self._attach_gradients()
            aside = torch.cuda.Stream(self.device)
            aside.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(aside):
                for _ in range(self._WARM_UP):
                    self._run(self._model, self._inputs, synchronise=False)
            torch.cuda.current_stream(self.device).wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            # Loader threads go on pinning memory meanwhile, which the stricter mode would not allow.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._metrics = self._run(self._model, self._inputs, synchronise=False)
            self._graph = graph
        except Exception as error:  # whatever the driver, a library or the compiler has to say
            return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        finally:
            self._model.zero_grad(set_to_none=True)
        return None

    def _release(self) -> None:
        for name in ("_graph", "_metrics", "_inputs", "_flat", "_gradients"):
            setattr(self, name, None)
        self._model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()

    def _attach_gradients(self) -> None:
        for parameter, gradient in zip(self._trained, self._gradients, strict=True):
            parameter.grad = gradient

    def _average_over_ranks(self) -> None:
        if dist.is_initialized() and dist.get_world_size() > 1:
            self._flat /= dist.get_world_size()  # before the sum, as DDP does
            dist.all_reduce(self._flat)


def flat_gradients(parameters: list[nn.Parameter]) -> tuple[Tensor, list[Tensor]]:
    """One buffer of zeros for the gradients of ``parameters``, all of one dtype and device, and each one's view of it.

    Views begin at multiples of 64 elements: kernels read them in whole cache lines.
    """
    places, end = [], 0
    for parameter in parameters:
        places.append(end)
        end += -(-parameter.numel() // 64) * 64
    flat = torch.zeros(end, dtype=parameters[0].dtype, device=parameters[0].device)
    views = [flat[p : p + of.numel()].view_as(of) for p, of in zip(places, parameters, strict=True)]
    return flat, views


def uses_graphs(recipe: Recipe, device: torch.device, world_size: int) -> bool:
    """Whether a recipe's passes are to be captured, on a device of this many."""
    if device.type != "cuda" or recipe.run.compile or recipe.run.cuda_graphs == "off":
        return False
    images = recipe.optim.batch_size // world_size // recipe.optim.num_micro_batches
    return recipe.run.cuda_graphs == "on" or images <= GRAPHED_IMAGES


def make_passes(
    student: nn.Module, teachers: Teachers, normalise: Normalise, recipe: Recipe, *, captured: bool
) -> Passes:
    """The passes of a phase. captured: see ``uses_graphs``. Where graphs are asked for in vain, rank 0 prints why."""
    rank_0 = not dist.is_initialized() or dist.get_rank() == 0
    report = partial(print, flush=True) if rank_0 else _say_nothing
    if not captured:
        if recipe.run.cuda_graphs == "on":  # not with --compile, which a recipe refuses
            report("CUDA graphs: not used, because there is no GPU")
        return Passes(student, teachers, normalise, recipe)
    return GraphedPasses(student, teachers, normalise, recipe, report=report)


def _say_nothing(line: str) -> None:
    pass
