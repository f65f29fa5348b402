"""Set-up of a training run: data, models, the checkpoint to resume from, and the optimizer and batches of each
phase."""

from __future__ import annotations

import copy
import functools
import logging
import os
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cfmask.checkpoint import resume
from cfmask.checkpoint.state import Checkpoint, CheckpointDamaged, Input, list_checkpoints
from cfmask.checkpoint.writer import CheckpointWriter, Keep, remove_checkpoint
from cfmask.data.remote import node_cache
from cfmask.data.segmentation import ObjectReader
from cfmask.data.shards import Manifest, load_sets
from cfmask.data.stream import MicroBatch, train_batches
from cfmask.errors import UserError
from cfmask.masking.fills import DrawSpec
from cfmask.models.head import ModelInfo, check_same_kind, load_model, read_info, save_model
from cfmask.models.initial import initial_model
from cfmask.models.tower import Classifier, Normalise, store_products_in
from cfmask.optim import Phase, adamw
from cfmask.recipe import Data, Optim, Recipe
from cfmask.run_search import find_model
from cfmask.runs import RunFolder
from cfmask.runtime.distributed import DistributedContext
from cfmask.runtime.jsonl import JsonLines
from cfmask.runtime.patience import patiently
from cfmask.runtime.tensor_files import digest_of_tensors
from cfmask.session import check_inputs, check_progress, rank_0_first
from cfmask.step import Teachers
from cfmask.urls import is_remote

logger = logging.getLogger(__name__)


def load_training_sets(data: Data) -> tuple[Manifest, dict[str, Manifest]]:
    """The training set, and the evaluation sets by name.

    Shard files are not checked: the launcher has done so once for all ranks. A shard that is missing since then is
    handled when its samples are read.
    """
    cache = node_cache(data.cache_dir, data.cache_gb) if is_remote(data.shards) else None
    sets = load_sets(data.shards, [data.train_split, *data.eval_sets], cache=cache, check_files=False)
    return sets[data.train_split], {name: sets[name] for name in data.eval_sets}


def loader_workers(data: Data, context: DistributedContext) -> int:
    """Number of threads that read and decode: the recipe's, or by the cores of this rank."""
    return context.loader_workers if data.loader_workers is None else data.loader_workers


# --- models -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Models:
    """The models of a run, on the device."""

    model: Classifier
    """The student."""
    info: ModelInfo
    normalise: Normalise
    """For the input of all models."""
    teachers: Teachers


def load_models(
    recipe: Recipe, run: RunFolder, manifest: Manifest, context: DistributedContext, store: dist.Store
) -> Models:
    """The student as it is before step 0, and its teachers. Rank 0 writes their files at the run's first start.

    Raises:
        UserError: missing weights, or a model that does not fit the training set or the other models.
    """
    rank_0_first(store, context, "the initial model", lambda: _write_initial_models(recipe, run, manifest, context))
    model, info = patiently(lambda: load_model(run.initial), str(run.initial))
    model = model.to(context.device)
    model.recompute, model.compiled = recipe.run.activation_checkpointing, recipe.run.compile
    start = copy.deepcopy(model).requires_grad_(False) if recipe.method.distils else None
    ensemble = None
    if recipe.method.ensemble:
        other, _ = patiently(lambda: load_model(run.ensemble), str(run.ensemble))
        ensemble = other.to(context.device).requires_grad_(False)
    if recipe.run.precision == "bf16":
        for teacher in (start, ensemble):
            if teacher is not None:
                store_products_in(teacher, torch.bfloat16)
    normalise = Normalise(info.mean, info.std).to(context.device)
    return Models(model, info, normalise, Teachers(pretrained=start, ensemble=ensemble))


def _write_initial_models(recipe: Recipe, run: RunFolder, manifest: Manifest, context: DistributedContext) -> None:
    """Write RUN/initial.safetensors, and RUN/ensemble.safetensors if the method needs it, unless they exist.

    Raises:
        UserError: they cannot be made, or a run that has started with them has lost them.
    """
    if not _exists(run, run.initial):
        model, info = initial_model(
            recipe.model.name,
            recipe.model.pretrained,
            recipe.model.head,
            manifest.classes,
            device=str(context.device),
            mean=recipe.model.mean,
            std=recipe.model.std,
        )
        save_model(run.initial, model, info)
    if recipe.method.ensemble is not None and not _exists(run, run.ensemble):
        model, info = load_model(find_model(recipe.method.ensemble))
        check_same_kind(info, read_info(run.initial), recipe.method.ensemble)
        save_model(run.ensemble, model, info)


def _exists(run: RunFolder, path: Path) -> bool:
    """Whether a model file of a run exists. Raises UserError if a run that has started with it has lost it."""

    def look() -> bool:
        try:
            os.stat(path)
        except FileNotFoundError:
            return False
        return True

    if patiently(look, str(path)):
        return True
    where = str(run.root)
    begins_again = patiently(run.step_0_allowed, where) and not patiently(
        lambda: list_checkpoints(run.checkpoints), where
    )
    if patiently(run.has_started, where) and not begins_again:
        raise UserError(
            f"{path} is missing, and {run.root} has started with it before. If its file system is not mounted, mount "
            "it and start again. If the file was moved or deleted, restore it. If it is lost, and there are no "
            "checkpoints, the run can begin again at step 0: "
            f"python launch/submit.py --resume {shlex.quote(where)} --from-step-0"
        )
    return False


# --- resuming ---------------------------------------------------------------------------------------------------------


def inputs_of(recipe: Recipe, run: RunFolder) -> dict[str, Input]:
    """Everything beside the training set that decides the weights, by name: settings, and digests of model files.

    Raises:
        StorageUnavailable: a file cannot be read.
    """
    files = [run.initial, run.ensemble] if recipe.method.ensemble is not None else [run.initial]
    return recipe.of_weights() | {
        path.name: patiently(functools.partial(digest_of_tensors, path), str(path)) for path in files
    }


def agree_on_checkpoint(
    recipe: Recipe,
    run: RunFolder,
    manifest: Manifest,
    total_steps: int,
    epoch_steps: int,
    *,
    is_main_process: bool,
) -> tuple[Checkpoint | None, Mapping[str, Input]]:
    """The checkpoint to resume from, or None to begin at step 0; and the inputs of the run (``inputs_of``). Rank 0
    chooses and verifies it for all ranks.

    Raises:
        UserError: on all ranks. The checkpoint is of another training set, other settings or models, or beyond
            ``total_steps``; files could not be read; or there is none although the run has made progress
            (``resume.check_progress``).
    """
    choice: list[Any] = [None, {}, None]
    if is_main_process:
        try:
            choice[0] = resume.latest(run.checkpoints, report=lambda text: logger.warning(f"{text}"))
            check_progress(run, choice[0], epoch_steps, recipe.run.checkpoint_steps)
            choice[1] = inputs_of(recipe, run)
            if choice[0] is not None:
                check_inputs(run, choice[0], choice[1])
        except UserError as error:
            choice[2] = str(error)
    dist.broadcast_object_list(choice)
    found: Checkpoint | None
    found, inputs, refusal = choice
    if refusal is not None:
        raise UserError(refusal)
    if found is None:
        return None, inputs
    if found.dataset != manifest.digest:
        raise UserError(
            f"{run.root} was begun with another training set than {manifest.root} is now (digest {found.dataset}, "
            f"now {manifest.digest}), so the order of samples would change. Restore the set, or begin a new run."
        )
    if found.step > total_steps:
        raise UserError(f"{run.root} has a checkpoint of step {found.step}, beyond the recipe's {total_steps} steps.")
    return found, inputs


def begin_history(run: RunFolder, step: int, store: dist.Store, context: DistributedContext) -> None:
    """Remove what an earlier start has logged beyond the checkpoint of ``step``. It waits until every rank has restored
    the checkpoint, so that a start that fails earlier changes nothing. A run that begins again at step 0 also loses its
    damaged checkpoints, which would count as progress at its next start.

    Raises:
        UserError, OSError: the files cannot be changed; on all ranks.
    """

    def cut() -> None:
        if step == 0:
            _remove_damaged_checkpoints(run)
        run.cut_history(step)
        run.clear_step_0()

    dist.barrier()
    rank_0_first(store, context, "the history", lambda: patiently(cut, str(run.root)))


def _remove_damaged_checkpoints(run: RunFolder) -> None:
    for path in list_checkpoints(run.checkpoints):
        try:
            resume.verified(path)
        except CheckpointDamaged:
            remove_checkpoint(path)
        else:
            raise UserError(
                f"The checkpoint {path} is undamaged, but was missing when this start looked for one: its file system "
                "may have been mounted since. Start the run again to resume from it."
            )


def checkpoint_writer(
    recipe: Recipe, run: RunFolder, epoch_steps: int, info: ModelInfo, found: Checkpoint | None
) -> CheckpointWriter:
    """The writer of the checkpoints of a run that resumes from ``found``."""
    settings = recipe.run
    keep = Keep(
        last=settings.keep_checkpoints,
        epoch_steps=epoch_steps if settings.keep_epochs else None,
        best_on=settings.best_on,
    )
    return CheckpointWriter(
        run.checkpoints,
        keep,
        info,
        resumed=found,
        minutes=settings.checkpoint_minutes,
        record=JsonLines(run.committed),
    )


# --- phases and epochs ------------------------------------------------------------------------------------------------


def begin_phase(phase: Phase, model: Classifier, settings: Optim, found: Checkpoint | None) -> torch.optim.AdamW:
    """The optimizer of a phase, with the moments of ``found`` if that checkpoint lies within the phase. Parameters that
    the phase does not train no longer require a gradient."""
    model.visual.requires_grad_(phase.tower)
    optimizer = adamw([p for p in model.parameters() if p.requires_grad], phase, settings)
    if found is not None and found.step > phase.start:
        resume.restore_optimizer(found, model, optimizer)
    return optimizer


def epochs(
    recipe: Recipe,
    manifest: Manifest,
    model: Classifier,
    context: DistributedContext,
    step: int,
    epoch_steps: int,
    objects: ObjectReader | None,
) -> Iterator[tuple[Iterator[MicroBatch], int]]:
    """For each epoch from ``step`` on: its batches (of the first epoch, those that are left) and its number from 0."""
    settings, draw_spec = recipe.optim, DrawSpec.of(recipe.method, model.patches)
    first, start = divmod(step, epoch_steps)
    for epoch in range(first, settings.total_epochs):
        batches = train_batches(
            manifest,
            image_size=model.image_size,
            batch_size=settings.batch_size,
            lanes=settings.lanes,
            rank=context.rank,
            world_size=context.world_size,
            seed=recipe.run.seed,
            epoch=epoch,
            start_step=start if epoch == first else 0,
            loader_workers=loader_workers(recipe.data, context),
            draw_spec=draw_spec,
            micro_batches=settings.num_micro_batches,
            objects=objects,
            pin_memory=context.device.type == "cuda",
        )
        yield batches, epoch
