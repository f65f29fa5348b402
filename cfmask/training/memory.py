"""Choice of the number of micro-batches (``--micro-batches auto``): the smallest that fits into memory on every rank.

Before the first step, the step's own passes (CAM, masks, teachers, both backward passes) run over synthetic images:

    1. The peaks of a pass over one lane and of one over two give the bytes of an image and the fixed bytes of a pass.
    2. count = the smallest divisor of a rank's lanes for which
           fixed + per_image · images of a micro-batch ≤ (1 - MARGIN) · free
       ``fixed`` includes gradients, and what these passes do not allocate: AdamW's two moments and DDP's buckets, three
       times the trained parameters (ranks that replay a CUDA graph have no buckets and need less). Over all ranks, the
       least ``free`` and the largest ``fixed`` and ``per_image`` count.
    3. A pass over a micro-batch of that size, with moments, buckets and margin allocated, confirms the choice on every
       rank. If it fails on one, the next divisor is tried.

The count is written into RUN/recipe.json before the first step, with the number of ranks that it was chosen for. Later
starts on as many ranks use it, so it is part of the recipe as if it had been given. A start on another number of ranks
chooses again: its ranks have other lanes, so their gradients are summed in another order anyway.

The passes draw no random numbers of torch, and leave no gradient, optimizer state or memory behind.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from cfmask.data import plan
from cfmask.errors import UserError
from cfmask.masking.fills import Draws, DrawSpec, concat, draw
from cfmask.masking.validation import nothing_known
from cfmask.models.tower import Classifier, Normalise
from cfmask.recipe import Recipe
from cfmask.runs import RunFolder
from cfmask.runtime.distributed import DistributedContext
from cfmask.step import Teachers
from cfmask.training.passes import Inputs, Passes

logger = logging.getLogger(__name__)

MARGIN = 0.08
"""Share of the free memory that is kept free: for fragments of the caching allocator, kernels that are loaded later,
and further channels of NCCL."""


@dataclass(frozen=True)
class Footprint:
    """Memory of a GPU, in bytes."""

    free: float
    """What this process may still allocate."""
    fixed: float
    """What a step needs independently of the size of its micro-batches."""
    per_image: float
    """What each image of a micro-batch adds."""


def fewest_micro_batches(need: Footprint, lanes: int, lane_size: int) -> int:
    """The smallest number of micro-batches that fits: a divisor of ``lanes``, because micro-batches are whole lanes.

    Args:
        lanes: number of lanes of a rank.
        lane_size: images of a lane in a step.

    Returns:
        ``lanes``, which gives the smallest micro-batches, if no number fits by this estimate.
    """
    room = (1 - MARGIN) * need.free
    for count in plan.divisors(lanes):
        if need.fixed + need.per_image * (lanes // count) * lane_size <= room:
            return count
    return lanes


def choose_micro_batches(
    recipe: Recipe,
    run: RunFolder,
    context: DistributedContext,
    model: Classifier,
    teachers: Teachers,
    normalise: Normalise,
    *,
    tower: bool,
) -> Recipe:
    """The recipe with its number of micro-batches. Every rank has to call it, before the first step.

    A number that was given, or that was chosen for as many ranks, is kept. Otherwise one is chosen and written into the
    run folder; on CPUs it is 1.

    Args:
        tower: whether any phase of the run trains the tower.

    Raises:
        UserError: a lane does not fit into the memory of a GPU, or the run folder cannot be written; on all ranks.
    """
    recipe = _recipe_of_rank_0(recipe)
    if not recipe.optim.is_open_for(context.world_size):
        return recipe
    lanes = len(plan.lanes_of_rank(context.rank, context.world_size, recipe.optim.lanes))
    trial = None if lanes == 1 else trial_on(context.device, recipe, model, teachers, normalise, tower=tower)
    if trial is None:
        count = 1
    else:
        count = _measured(trial, lanes, context)
        trial.forget()
    optim = replace(recipe.optim, micro_batches=count, micro_batches_for=context.world_size)
    chosen = replace(recipe, optim=optim)
    failure: list[str | None] = [None]
    if context.rank == 0:
        try:
            run.record_recipe(chosen)
        except OSError as error:
            failure = [f"{run.root} cannot be written: {error.strerror}."]
        images = lanes // count * plan.samples_per_lane(optim.batch_size, optim.lanes)
        logger.info(f"micro-batches: {count}, of {images} images on each of {context.world_size} ranks")
    # No rank takes a step before the choice is recorded.
    dist.broadcast_object_list(failure)
    if failure[0] is not None:
        raise UserError(failure[0])
    return chosen


def _recipe_of_rank_0(recipe: Recipe) -> Recipe:
    """The recipe with rank 0's choice: on NFS, another rank may have read recipe.json as it was before the choice of an
    earlier start was recorded."""
    choice = [(recipe.optim.micro_batches, recipe.optim.micro_batches_for)]
    dist.broadcast_object_list(choice)
    [(count, ranks)] = choice
    return replace(recipe, optim=replace(recipe.optim, micro_batches=count, micro_batches_for=ranks))


@contextlib.contextmanager
def explained_out_of_memory(context: DistributedContext) -> Iterator[None]:
    """Turn CUDA's out-of-memory error into one that names the flags that help.

    Raises:
        UserError: in place of ``torch.OutOfMemoryError``.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        details = " ".join(str(error).split())
        raise UserError(
            f"Rank {context.rank} of {context.world_size} ran out of memory on {context.device}. Start a new run with "
            "more --micro-batches (auto chooses as many as are needed) or with --activation-checkpointing; both are "
            "part of a run's recipe. Or resume this run on more GPUs: submit.py --resume RUN --gpus-per-node N. "
            f"PyTorch's error: {details}"
        ) from error


# --- the trial ----------------------------------------------------------------------------------------------------


def trial_on(
    device: torch.device,
    recipe: Recipe,
    model: Classifier,
    teachers: Teachers,
    normalise: Normalise,
    *,
    tower: bool,
) -> Trial | None:
    """None on CPUs, whose free memory is shared with other processes and the page cache."""
    return Trial(recipe, model, teachers, normalise, tower=tower) if device.type == "cuda" else None


class Trial:
    """Passes over synthetic images on this rank's GPU, whose memory is measured.

    Compiled blocks run uncompiled here, which needs at least as much memory. Compiling them for these sizes would take
    a minute, and would make the batch a dynamic dimension."""

    def __init__(
        self, recipe: Recipe, model: Classifier, teachers: Teachers, normalise: Normalise, *, tower: bool
    ) -> None:
        self._recipe, self._model, self._teachers, self._normalise = recipe, model, teachers, normalise
        self._tower = tower
        self._device = normalise.mean.device
        self.lane_size = plan.samples_per_lane(recipe.optim.batch_size, recipe.optim.lanes)

    def footprint(self) -> Footprint:
        """Measured with one lane and with two. ``per_image`` is infinite if two do not fit."""
        self.fits(1)  # loads kernels and allocates workspaces, which stay
        one, two = self._peak(1), self._peak(2)
        per_image = max(0.0, two - one) / self.lane_size if math.isfinite(two) else math.inf
        of_a_pass = one - per_image * self.lane_size if math.isfinite(per_image) else one
        return Footprint(self._free(), of_a_pass + self._unseen_bytes(), per_image)

    def fits(self, lanes: int, *, with_step: bool = False) -> bool:
        """Whether a pass over so many lanes ends without an out-of-memory error.

        Args:
            with_step: allocate the rest of what a step needs, and the margin, during the pass.
        """
        held = int(self._unseen_bytes() + MARGIN * self._free()) if with_step else 0
        fitted = True
        try:
            ballast = torch.empty(held, dtype=torch.uint8, device=self._device)
            self.run(lanes)
            del ballast
        except torch.OutOfMemoryError:
            fitted = False
        # Not in the handler: the traceback of the error holds the tensors of the pass.
        self._give_back()
        return fitted

    def run(self, lanes: int) -> None:
        """A pass over so many lanes, which leaves nothing behind."""
        n, size, device = lanes * self.lane_size, self._model.image_size, self._device
        objects = None
        if self._recipe.data.segmentation is not None:
            objects = nothing_known(n, size, self._model.patch_size).map(lambda tensor: tensor.to(device))
        inputs = Inputs(
            torch.zeros(n, 3, size, size, dtype=torch.uint8, device=device),
            torch.zeros(n, dtype=torch.int64, device=device),
            self._draws(lanes).map(lambda tensor: tensor.to(device)),
            objects,
        )
        whole = replace(self._recipe, optim=replace(self._recipe.optim, micro_batches=1))
        with self._as_in_training():
            Passes(self._model, self._teachers, self._normalise, whole)(inputs, last=True)

    @contextlib.contextmanager
    def _as_in_training(self) -> Iterator[None]:
        """The model as in the phase that trains most, with gradients allocated, as from the second micro-batch on."""
        model = self._model
        parameters = list(model.parameters())
        required, compiled = [parameter.requires_grad for parameter in parameters], model.compiled
        teachers = [teacher for teacher in (self._teachers.pretrained, self._teachers.ensemble) if teacher is not None]
        compiled_teachers = [teacher.compiled for teacher in teachers]
        try:
            model.visual.requires_grad_(self._tower)
            for each in (model, *teachers):
                each.compiled = False
            for parameter in parameters:
                if parameter.requires_grad:
                    parameter.grad = torch.zeros_like(parameter)
            yield
        finally:
            for parameter, was_required in zip(parameters, required, strict=True):
                parameter.grad = None
                parameter.requires_grad_(was_required)
            model.compiled = compiled
            for teacher, was_compiled in zip(teachers, compiled_teachers, strict=True):
                teacher.compiled = was_compiled

    def _draws(self, lanes: int) -> Draws:
        spec = DrawSpec.of(self._recipe.method, self._model.patches)
        return concat([draw(spec, self.lane_size, plan.lane_generator(0, 0, 0, lane)) for lane in range(lanes)])

    def _unseen_bytes(self) -> int:
        """What a step allocates beyond its passes: AdamW's two moments, and DDP's buckets, which mirror gradients."""
        trained = self._model.parameters() if self._tower else self._model.head.parameters()
        return 3 * sum(parameter.numel() * parameter.element_size() for parameter in trained)

    # The methods below call CUDA.

    def _peak(self, lanes: int) -> float:
        """Peak bytes of a pass; inf if it does not fit."""
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        if not self.fits(lanes):
            return math.inf
        return float(torch.cuda.max_memory_allocated(self._device) - before)

    def _free(self) -> float:
        self._give_back()
        free, total = torch.cuda.mem_get_info(self._device)
        reserved = torch.cuda.memory_reserved(self._device)
        cached = reserved - torch.cuda.memory_allocated(self._device)
        if hasattr(torch.cuda, "get_per_process_memory_fraction"):  # from torch 2.8 on
            share = torch.cuda.get_per_process_memory_fraction(self._device)
            free = min(free, int(share * total) - reserved)
        return float(max(0, free + cached))

    def _give_back(self) -> None:
        torch.cuda.empty_cache()

    def forget(self) -> None:
        """Reset the statistics of the GPU's memory."""
        torch.cuda.reset_peak_memory_stats(self._device)


def _measured(trial: Trial, lanes: int, context: DistributedContext) -> int:
    """The number that fits on all ranks: estimated, then confirmed.

    Raises:
        UserError: a single lane does not fit; on all ranks.
    """
    _worst([0.0], context)  # NCCL allocates its buffers before free memory is measured
    own = trial.footprint()
    less_free, fixed, per_image = _worst([-own.free, own.fixed, own.per_image], context)
    need = Footprint(-less_free, fixed, per_image)
    first = fewest_micro_batches(need, lanes, trial.lane_size)
    for count in plan.divisors(lanes):
        if count < first:
            continue
        failed = not trial.fits(lanes // count, with_step=True)
        if not _worst([float(failed)], context)[0]:
            if context.rank == 0:
                logger.info(
                    f"memory: {need.free / 1e9:.1f} GB free, {need.fixed / 1e9:.2f} GB for a step and "
                    f"{need.per_image / 1e6:.1f} MB for each image of a micro-batch (largest of all ranks)"
                )
            return count
    raise UserError(
        f"--micro-batches auto: a single lane of {trial.lane_size} images does not fit into the memory of the GPU with "
        f"the least free memory of {context.world_size} ({need.free / 1e9:.1f} GB). Use more --lanes, which makes each "
        "smaller, or --activation-checkpointing."
    )


def _worst(values: list[float], context: DistributedContext) -> list[float]:
    """Each value's maximum over ranks."""
    worst = torch.tensor(values, dtype=torch.float64, device=context.device)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    found: Tensor = worst.cpu()
    return list(map(float, found))
