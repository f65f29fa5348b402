"""The training loop of one rank. Builds everything from a Recipe and a run folder, and trains.

After an interruption, the next start resumes from the last checkpoint. Its final weights are bitwise identical to those
of an uninterrupted run.

``_train`` is longer than other functions, so that the loop reads from top to bottom.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from dataclasses import asdict

import torch.distributed as dist

from cfmask.checkpoint import resume
from cfmask.checkpoint.state import CheckpointState, Skips
from cfmask.checkpoint.writer import insist_on_checkpoint, wait_for_checkpoint
from cfmask.counting import Score, top1
from cfmask.data.label_space import LabelSpace, label_space_of
from cfmask.data.plan import steps_per_epoch
from cfmask.data.receipts import DataProgress
from cfmask.data.shards import Manifest
from cfmask.data.stream import eval_batches
from cfmask.metric_logger import MetricLogger
from cfmask.metrics import AsyncMetricReducer, StepResult, micro_batch_metrics, rank_metrics, step_metrics
from cfmask.models.head import save_model
from cfmask.models.tower import Classifier, Normalise
from cfmask.optim import Phase, lr_and_betas, phases, take_step
from cfmask.recipe import Recipe
from cfmask.runs import RunFolder
from cfmask.runtime.agreement import check_agreement
from cfmask.runtime.distributed import DistributedContext
from cfmask.runtime.files import write_atomically
from cfmask.runtime.heartbeat import PREPARING, WAITING, beat, restart_steps
from cfmask.sample_reports import SampleReports, too_many_bad_samples, too_many_skipped_steps
from cfmask.session import (
    FINISHED,
    FailureCallback,
    SecondsLeft,
    StopRequest,
    autocast,
    begin_attempt,
    choose_arithmetic,
    session,
)
from cfmask.training.mask_study import MaskStudy, MaskStudyLog
from cfmask.training.memory import choose_micro_batches, explained_out_of_memory
from cfmask.training.passes import inputs_of, make_passes
from cfmask.training.setup import (
    agree_on_checkpoint,
    begin_history,
    begin_phase,
    checkpoint_writer,
    epochs,
    load_models,
    load_training_sets,
    loader_workers,
)
from cfmask.training.step_clock import StepClock

logger = logging.getLogger(__name__)


def train(
    recipe: Recipe,
    run: RunFolder,
    context: DistributedContext,
    stop_request: StopRequest = lambda: None,
    failing: FailureCallback = lambda error: None,
    seconds_left: SecondsLeft = lambda: 0.0,
) -> str:
    """Train until all steps are done or a stop is requested.

    Args:
        stop_request: called at every step on every rank; returns REQUEUE, QUIT or None. The request of one rank stops
            all ranks at the same step boundary, after a checkpoint.
        failing: called with an error before anything is closed: closing waits for a checkpoint that is being written.
        seconds_left: called on rank 0 after a stop was requested; returns how long ranks may still run. Writing the
            checkpoint is retried until then. If it fails, the run stops with its earlier checkpoints.

    Returns:
        FINISHED, REQUEUE or QUIT.

    Raises:
        UserError: bad settings or data, too many samples that cannot be read (on all ranks, after a checkpoint),
            another job in the folder, a final checkpoint that cannot be written, or too little memory on a GPU.
        FloatingPointError: the loss or gradients were not finite in more successive steps than the recipe allows, or in
            all steps of an epoch or a phase (on all ranks). The last checkpoint is kept.
    """
    choose_arithmetic(recipe.run.precision, deterministic=recipe.run.deterministic)
    with session(run, context, failing) as (store, stack), explained_out_of_memory(context):
        return _train(recipe, run, context, store, stop_request, stack, seconds_left)


def _train(
    recipe: Recipe,
    run: RunFolder,
    context: DistributedContext,
    store: dist.Store,
    stop_request: StopRequest,
    leaving: contextlib.ExitStack,
    seconds_left: SecondsLeft,
) -> str:
    device, settings = context.device, recipe.optim
    is_main_process = context.rank == 0

    # --- data and models ------------------------------------------------------------------------------------
    manifest, eval_sets = load_training_sets(recipe.data)
    sets = (manifest, *eval_sets.values())
    nodes = check_agreement({"the recipe": recipe.digest(), **{f"the set {each.root}": each.digest for each in sets}})
    label_spaces = {name: label_space_of(of_set).to(device) for name, of_set in eval_sets.items()}
    epoch_steps = steps_per_epoch(manifest.num_samples, settings.batch_size)
    schedule = phases(recipe, epoch_steps)
    total_steps = schedule[-1].end
    models = load_models(recipe, run, manifest, context, store)
    model, normalise, teachers = models.model, models.normalise, models.teachers
    trains_tower = any(phase.tower for phase in schedule)
    recipe = choose_micro_batches(recipe, run, context, model, teachers, normalise, tower=trains_tower)
    settings = recipe.optim
    study = None
    if recipe.data.segmentation is not None:
        study = MaskStudy.of(recipe.data.segmentation, manifest, model, device)

    # --- resume -----------------------------------------------------------------------------------------------
    found, inputs = agree_on_checkpoint(
        recipe, run, manifest, total_steps, epoch_steps, is_main_process=is_main_process
    )
    step, consumed, skips = 0, DataProgress(), Skips()
    if found is not None:
        resume.restore_weights(found, model)
        step, consumed, skips = found.step, found.consumed, found.skips
    metric_logger, study_log, writer = None, None, None
    reports = SampleReports(run, epoch_steps)
    if is_main_process:
        attempts = begin_attempt(run, context, from_step=step)
        metric_logger = MetricLogger(recipe, run, step, schedule, nodes, also=[attempts, *reports.files])
        study_log = MaskStudyLog(study, run, metric_logger, step) if study is not None else None
        writer = leaving.enter_context(checkpoint_writer(recipe, run, epoch_steps, models.info, found))
        logger.info(f"step {step} of {total_steps} ({epoch_steps} an epoch), {context.world_size} ranks, {device}")

    # --- train --------------------------------------------------------------------------------------------------
    bad_limit = max(1, int(recipe.data.max_bad_share * manifest.num_samples))
    reducer, clock = AsyncMetricReducer(device), StepClock(device)
    scores: dict[str, Score] = {}
    current: Phase | None = None
    objects = None if study is None else study.reader
    for batches, epoch in epochs(recipe, manifest, model, context, step, epoch_steps, objects):
        phase = next(p for p in schedule if step < p.end)
        if phase != current:
            restart_steps()
            beat(PREPARING)
            optimizer = begin_phase(phase, model, settings, found)
            passes = make_passes(model, teachers, normalise, recipe, context.world_size, clock)
            if writer is not None:
                writer.reserve(model)
            if current is None:
                begin_history(run, step, store, context)
            current = phase
        while step < (epoch + 1) * epoch_steps:
            step += 1
            clock.begin()
            for part in range(settings.num_micro_batches):
                beat("loading data", step)
                batch = next(batches)
                beat("computing", step)
                last = part == settings.num_micro_batches - 1
                metrics = passes(inputs_of(batch), last=last)
                reducer.add(micro_batch_metrics(metrics, batch))
                if study is not None:
                    reducer.add(study.metrics(metrics, batch))
                reports.add(step, metrics, batch)
            grad_norm = take_step(optimizer, lr_and_betas(step - 1, phase, settings), settings.clip_norm)
            overdue = writer is not None and writer.overdue
            reducer.add(step_metrics(grad_norm, stop=stop_request(), overdue=overdue))
            if context.world_size > 1 and step % recipe.run.log_steps == 0:
                reducer.add(rank_metrics(clock.mean(), context.rank, context.world_size))
            reducer.send(step)
            beat(WAITING, step)

            # Read the previous step, which is over or nearly so, while the device computes this one. All ranks read the
            # same values. This step is waited for only if a checkpoint or an evaluation needs it.
            results = [StepResult.of(reduced) for reduced in reducer.receive(before=step)]
            epoch_end = step % epoch_steps == 0
            due = epoch_end or step % recipe.run.checkpoint_steps == 0
            evaluates = bool(eval_sets) and (epoch_end or step % (recipe.run.eval_steps or epoch_steps) == 0)
            if due or evaluates or any(r.stop or r.overdue or r.bad for r in results):
                results += [StepResult.of(reduced) for reduced in reducer.receive()]
            due = due or any(r.overdue for r in results)
            stop = next((r.stop for r in results if r.stop), None)

            for result in results:
                skips = skips.plus(result.skipped)
                consumed = consumed.plus(
                    samples=result.samples,
                    receipt=result.receipt,
                    bad=result.bad,
                    epoch_begins=(result.step - 1) % epoch_steps == 0,
                )
                reports.close(result)
                if metric_logger is not None:
                    metric_logger.add_step(result, skips)
                if study_log is not None:
                    study_log.add_step(result)
            if any(r.skipped for r in results):
                reports.write_skipped_steps()
                # A phase whose last epoch has changed no weight is not finished.
                untrained = step == phase.end and skips.in_a_row >= epoch_steps
                if untrained or skips.in_a_row > settings.max_skipped_steps:
                    wait_for_checkpoint(writer)
                    raise too_many_skipped_steps(skips, results[-1].step, epoch_steps, recipe, run)
            # Checked only if there are new ones, so that a run resumes on a set that was repaired during its epoch.
            too_many_bad = False
            if any(r.bad for r in results):
                reports.write_bad_samples()
                too_many_bad = consumed.bad_in_epoch > bad_limit

            if evaluates:
                began = time.monotonic()
                scores = _evaluate(model, normalise, eval_sets, label_spaces, recipe, context)
                if metric_logger is not None:
                    # Before a checkpoint of this step: a resume from it does not evaluate again.
                    metric_logger.add_scores(step, step / epoch_steps, scores, seconds=time.monotonic() - began)
            if study_log is not None and epoch_end:
                study_log.end_epoch(step, epoch + 1, since=step - epoch_steps)
            if metric_logger is not None and writer is not None and (due or stop or too_many_bad):
                metric_logger.flush()
                if study_log is not None:
                    study_log.flush()
                # The checkpoints of LP-FT's first phase are no candidates for the best checkpoint.
                candidate = epoch_end and phase == schedule[-1]
                top1s = {name: score.top1 for name, score in scores.items()} if candidate else {}
                writer.start(CheckpointState(step, manifest.digest, consumed, skips, top1s, inputs), model, optimizer)
            if too_many_bad:
                not_written = wait_for_checkpoint(writer)
                raise too_many_bad_samples(consumed, epoch, bad_limit, step, manifest, recipe, run) from not_written
            if stop:
                if is_main_process:
                    logger.info(f"asked to stop ({stop}) at step {step}")
                not_written = insist_on_checkpoint(writer, seconds_left)
                if step < total_steps or not_written is not None:
                    # If the checkpoint failed, earlier ones are intact: the run stops as requested.
                    if is_main_process:
                        why = f"stopped at step {step} ({stop})"
                        run.end_attempt(why if not_written is None else f"{why}, without a checkpoint: {not_written}")
                    return stop

    # --- finish -------------------------------------------------------------------------------------------------
    restart_steps()
    beat(PREPARING)
    if not scores:
        scores = _evaluate(model, normalise, eval_sets, label_spaces, recipe, context)
    not_written = wait_for_checkpoint(writer)
    if not_written is not None:
        raise not_written
    if metric_logger is not None:
        metric_logger.flush()
        if study_log is not None:
            study_log.flush()
        save_model(run.final, model, models.info)
        scored = {name: {**asdict(score), "top1": score.top1} for name, score in scores.items()}
        write_atomically(
            run.results, json.dumps({"step": step, "skipped_steps": skips.total, "sets": scored}, indent=2)
        )
        run.end_attempt(FINISHED)
        if skips.in_a_row:
            logger.warning(f"the last {skips.in_a_row} steps were skipped: the weights are those before them")
        logger.info(f"finished at step {step}: {run.final}")
    return FINISHED


def _evaluate(
    model: Classifier,
    normalise: Normalise,
    sets: dict[str, Manifest],
    label_spaces: dict[str, LabelSpace],
    recipe: Recipe,
    context: DistributedContext,
) -> dict[str, Score]:
    """Top-1 on each set, over all ranks. Draws no random number, so it does not change training. Waits for the device
    once for each set."""
    scores = {}
    restart_steps()
    for name, manifest in sets.items():
        batches = eval_batches(
            manifest,
            image_size=model.image_size,
            # Twice the smallest micro-batch of training: there are no gradients to keep.
            batch_size=2 * recipe.optim.batch_size // recipe.optim.lanes,
            rank=context.rank,
            world_size=context.world_size,
            loader_workers=loader_workers(recipe.data, context),
            pin_memory=context.device.type == "cuda",
        )
        with autocast(context.device, recipe.run.precision):
            [scores[name]] = top1([model], normalise, batches, context.device, label_spaces[name])
    restart_steps()
    beat(PREPARING)
    return scores
