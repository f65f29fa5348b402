"""The training worker: one process of a job. Builds everything from a Recipe and a run folder, and trains.

Whatever happens to it, the next start of the same job goes on from the last checkpoint, and ends with the
same weights, bit for bit, as a run that was left alone.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import math
import operator
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter

from cfmask import checkpoint
from cfmask.data import receipts
from cfmask.data.plan import steps_per_epoch
from cfmask.data.receipts import Consumed
from cfmask.data.remote import is_remote, node_cache
from cfmask.data.segmentation import ALL, ObjectReader, categories, class_groups, open_masks
from cfmask.data.shards import Manifest, load_sets
from cfmask.data.stream import BadSample, Batch, eval_batches, train_batches
from cfmask.distributed import Place
from cfmask.errors import UserError
from cfmask.evaluate import Score, answers_of, top1
from cfmask.files import write_atomically
from cfmask.masking.fills import DrawSpec
from cfmask.masking.validation import THRESHOLDS, Tally, add_up, tally
from cfmask.memory import choose_micro_batches, explained_out_of_memory
from cfmask.models.head import ModelInfo, check_same_kind, initial_model, load_model, read_info, save_model
from cfmask.models.tower import Classifier, Normalise
from cfmask.optim import Phase, Skips, adamw, phases, rates, take_step
from cfmask.recipe import Data, Optim, Recipe
from cfmask.runs import RunFolder, append_lines, find_model, read_lines
from cfmask.session import (
    FINISHED,
    QUIT,
    REQUEUE,
    Report,
    StopRequest,
    choose_arithmetic,
    rank_0_first,
    session,
)
from cfmask.step import Metrics, Teachers, training_step


def run_worker(
    recipe: Recipe,
    run: RunFolder,
    place: Place,
    stop_request: StopRequest = lambda: None,
    failing: Report = lambda error: None,
) -> str:
    """Train until the recipe is fulfilled or a stop is asked for.

    Args:
        stop_request: called at every step on every rank; returns REQUEUE, QUIT or None. One rank's request
            stops them all, at the same step boundary, after a checkpoint.
        failing: told of an error before anything is closed: a checkpoint that is being written is waited for then.

    Returns:
        FINISHED, REQUEUE or QUIT.

    Raises:
        UserError: bad settings or data, too many samples that cannot be read (on all ranks, after a checkpoint),
            another job on the folder, a final checkpoint that cannot be written, a GPU's memory that does not suffice.
        FloatingPointError: more steps in a row than the recipe allows had a loss or gradients that are not finite (on
            all ranks). The last checkpoint stays.
    """
    choose_arithmetic(recipe.run.precision, deterministic=recipe.run.deterministic)
    with session(run, place, failing) as (store, stack), explained_out_of_memory(place):
        return _train(recipe, run, place, store, stop_request, stack)


def _train(
    recipe: Recipe,
    run: RunFolder,
    place: Place,
    store: dist.Store,
    stop_request: StopRequest,
    leaving: contextlib.ExitStack,
) -> str:
    device, settings = place.device, recipe.optim
    chief = place.rank == 0

    # --- data ---------------------------------------------------------------------------------------------
    manifest, eval_sets = _load_sets(recipe.data)
    epoch_steps = steps_per_epoch(manifest.num_samples, settings.batch_size)
    schedule = phases(recipe, epoch_steps)
    total_steps = schedule[-1].end

    # --- model and teachers ---------------------------------------------------------------------------------
    rank_0_first(store, place, "the initial model", lambda: _write_initial_models(recipe, run, manifest, place))
    model, info = load_model(run.initial)
    model = model.to(device)
    model.recompute, model.compiled = recipe.run.activation_checkpointing, recipe.run.compile
    normalise = Normalise(info.mean, info.std).to(device)
    teachers = Teachers(
        start=copy.deepcopy(model).requires_grad_(False) if recipe.method.distils else None,
        ensemble=load_model(run.ensemble)[0].to(device).requires_grad_(False) if recipe.method.ensemble else None,
    )
    tower = any(phase.tower for phase in schedule)
    recipe = choose_micro_batches(recipe, run, place, model, teachers, normalise, tower=tower)
    settings = recipe.optim

    # --- resume -------------------------------------------------------------------------------------------
    found = _agree_on_checkpoint(run, chief)
    step, consumed, skips = 0, Consumed(), Skips()
    if found is not None:
        checkpoint.restore_weights(found, model)
        step, consumed, skips = found.step, found.consumed, found.skips
        if found.dataset != manifest.digest:
            raise UserError(
                f"{run.root} was begun with another training set than {manifest.root} is now (digest {found.dataset}, "
                f"now {manifest.digest}): its order would not be the same. Bring the set back, or begin a new run."
            )
        if step > total_steps:
            raise UserError(f"{run.root} has a checkpoint of step {step}, beyond the recipe's {total_steps} steps.")
    study = _mask_study(recipe, manifest, model, device)
    recorder = _Recorder(recipe, run, step, schedule, study) if chief else None
    writer = leaving.enter_context(_checkpoint_writer(recipe, run, epoch_steps, info, found)) if chief else None
    if chief:
        run.begin_attempt(
            job=place.attempt, nodes=place.nodes, world_size=place.world_size, device=str(device), from_step=step
        )
        run.cut_history(step)
        print(f"step {step} of {total_steps} ({epoch_steps} an epoch), {place.world_size} ranks, {device}", flush=True)

    # --- train --------------------------------------------------------------------------------------------
    bad_limit = max(1, int(recipe.data.max_bad_share * manifest.num_samples))
    exchange = _Exchange(device, place.world_size)
    scores: dict[str, Score] = {}
    current: Phase | None = None
    for batches, epoch in _epochs(recipe, manifest, model, place, step, epoch_steps, study):
        phase = next(p for p in schedule if step < p.end)
        if phase != current:
            student, optimizer = _begin_phase(phase, model, normalise, settings, found)
            if writer is not None:
                writer.reserve(model)
            current = phase
        while step < (epoch + 1) * epoch_steps:
            parts = []
            for part in range(settings.num_micro_batches):
                batch = next(batches)
                last = part == settings.num_micro_batches - 1
                metrics = _micro_batch(student, teachers, normalise, batch, recipe, last=last)
                overlap = None if study is None else study.sums(metrics, batch)
                receipt = batch.receipt.to(device, non_blocking=True)
                parts.append(_Done(metrics, receipt, batch.bad, batch.keys, overlap))
            norm = take_step(optimizer, rates(step, phase, settings), settings.clip_norm)
            step += 1

            # Sent now, read at the next step: nobody waits for a metric, and all ranks read the same requests.
            overdue = writer is not None and writer.overdue
            seen = exchange.send(step, parts, norm, stop_request(), overdue)
            epoch_end = step % epoch_steps == 0
            due = epoch_end or step % recipe.run.checkpoint_steps == 0
            evaluates = bool(eval_sets) and (epoch_end or step % (recipe.run.eval_steps or epoch_steps) == 0)
            if due or evaluates or any(s.stop or s.overdue or s.bad for s in seen):
                seen += exchange.drain()
            due = due or any(s.overdue for s in seen)
            for summary in seen:
                skips = skips.plus(summary.skipped)
                consumed = consumed.plus(
                    samples=summary.samples,
                    receipt=summary.receipt,
                    bad=summary.bad,
                    epoch_begins=(summary.step - 1) % epoch_steps == 0,
                )
                if recorder is not None:
                    recorder.add(summary, skips)
            if any(s.skipped for s in seen):
                exchange.report_skipped_steps(run)
                if skips.in_a_row > settings.max_skipped_steps:
                    _settle(writer)
                    raise FloatingPointError(
                        f"Loss or gradients of {skips.in_a_row} steps in a row were not finite, the last of them step "
                        f"{seen[-1].step}; --max-skipped-steps allows {settings.max_skipped_steps}. "
                        f"{run.skipped_steps} names the samples. None of these steps changed a weight, and the last "
                        f"checkpoint in {run.checkpoints} stays. A lower --lr, or --precision fp32, may help."
                    )
            if any(s.bad for s in seen):
                exchange.report_bad_samples(run, epoch_steps)
            # Asked when there are new ones: a set that was mended goes on, whatever its epoch has seen.
            spoilt = any(s.bad for s in seen) and consumed.bad_in_epoch > bad_limit
            stop = next((s.stop for s in seen if s.stop), None)
            if evaluates:
                began = time.monotonic()
                scores = _evaluate(model, normalise, eval_sets, recipe, place)
                if recorder is not None:
                    # Before a checkpoint of this step: a resume from it does not evaluate again.
                    recorder.add_scores(step, step / epoch_steps, scores, seconds=time.monotonic() - began)
            if epoch_end and recorder is not None:
                recorder.add_overlap(step, epoch + 1, since=step - epoch_steps)
            if recorder is not None and writer is not None and (due or stop or spoilt):
                recorder.flush()
                top1s = {name: score.top1 for name, score in scores.items()} if epoch_end else {}
                writer.start(checkpoint.State(step, manifest.digest, consumed, skips, top1s), model, optimizer)
            if spoilt:
                unwritten = _settle(writer)
                raise UserError(
                    f"{consumed.bad_in_epoch} samples of epoch {epoch + 1} could not be read, more than the "
                    f"{bad_limit} that --max-bad-share {recipe.data.max_bad_share:g} allows. {run.bad_samples} lists "
                    f"them with the reasons. Mend the set ({manifest.root}); the run goes on from step {step}."
                ) from unwritten
            if stop and step < total_steps:
                if chief:
                    print(f"asked to stop ({stop}) at step {step}", flush=True)
                unwritten = _settle(writer)
                if unwritten is not None:
                    raise unwritten
                if chief:
                    run.end_attempt(f"stopped at step {step} ({stop})")
                return stop

    # --- finish -------------------------------------------------------------------------------------------
    if not scores:
        scores = _evaluate(model, normalise, eval_sets, recipe, place)
    unwritten = _settle(writer)
    if unwritten is not None:
        raise unwritten
    if recorder is not None:
        recorder.flush()
        save_model(run.final, model, info)
        results = {name: {**asdict(score), "top1": score.top1} for name, score in scores.items()}
        write_atomically(
            run.results, json.dumps({"step": step, "skipped_steps": skips.total, "sets": results}, indent=2)
        )
        run.end_attempt(FINISHED)
        print(f"finished at step {step}: {run.final}", flush=True)
    return FINISHED


@dataclass(frozen=True)
class _Done:
    """What a micro-batch leaves on its rank: metrics, receipt and overlap (_MaskStudy.sums) on the device; which
    samples were bad; all keys."""

    metrics: Metrics
    receipt: Tensor
    bad: tuple[BadSample, ...]
    keys: list[str]
    overlap: Tensor | None


@dataclass(frozen=True)
class _MaskStudy:
    """How far masks fall on objects, measured in passing (appendix A.2).

    members: (classes, groups) bool, on the device: which class belongs to which of the groups.
    """

    reader: ObjectReader
    groups: tuple[str, ...]
    members: Tensor

    def sums(self, metrics: Metrics, batch: Batch) -> Tensor:
        """(groups, 3 T + 2) of a micro-batch: each group's Tally, to be added up over ranks. Waits for no device."""
        assert metrics.overlap is not None and batch.objects is not None
        device = self.members.device
        chosen = self.members[batch.labels.to(device, non_blocking=True)]
        chosen = chosen & batch.objects.known.to(device, non_blocking=True)[:, None]
        return torch.stack([tally(metrics.overlap, rows).to_vector() for rows in chosen.T])

    def tallies(self, sums: Sequence[float]) -> dict[str, Tally]:
        """Of ``sums``, flattened."""
        size = len(sums) // len(self.groups)
        return {name: Tally.from_vector(sums[i * size : (i + 1) * size]) for i, name in enumerate(self.groups)}


def _mask_study(recipe: Recipe, manifest: Manifest, model: Classifier, device: torch.device) -> _MaskStudy | None:
    if recipe.data.segmentation is None:
        return None
    groups = class_groups(manifest.classes)
    if len(groups) > 1:
        del groups[ALL]  # the others' sum
    shown = categories(manifest.classes)
    reader = ObjectReader(
        masks=open_masks(recipe.data.segmentation),
        classes={i: shown[i] for i in frozenset().union(*groups.values())},
        size=model.image_size,
        patch_size=model.patch_size,
    )
    members = torch.tensor([[i in ids for ids in groups.values()] for i in range(manifest.num_classes)])
    return _MaskStudy(reader, tuple(groups), members.to(device))


def _load_sets(data: Data) -> tuple[Manifest, dict[str, Manifest]]:
    """The training set, and the sets to evaluate on. Files are not looked at: the launcher has done it once for all
    ranks, and a shard that has gone missing since is a matter of its samples."""
    cache = node_cache(data.cache_dir, data.cache_gb) if is_remote(data.shards) else None

    sets = load_sets(data.shards, [data.train_split, *data.eval_sets], cache=cache, check_files=False)
    return sets[data.train_split], {name: sets[name] for name in data.eval_sets}


def _epochs(
    recipe: Recipe,
    manifest: Manifest,
    model: Classifier,
    place: Place,
    step: int,
    epoch_steps: int,
    study: _MaskStudy | None,
) -> Iterator[tuple[Iterator[Batch], int]]:
    """Each epoch from ``step`` on: its batches, from where the run stands, and its number from 0."""
    method, settings = recipe.method, recipe.optim
    draw_spec = None
    if method.masked:
        assert method.mask is not None and method.fill is not None
        draw_spec = DrawSpec(method.mask, method.fill, method.rate or 0.0, model.patches)
    first, start = divmod(step, epoch_steps)
    for epoch in range(first, settings.total_epochs):
        batches = train_batches(
            manifest,
            image_size=model.image_size,
            batch_size=settings.batch_size,
            lanes=settings.lanes,
            rank=place.rank,
            world_size=place.world_size,
            seed=recipe.run.seed,
            epoch=epoch,
            start_step=start if epoch == first else 0,
            loader_workers=_loader_workers(recipe.data, place),
            draw_spec=draw_spec,
            micro_batches=settings.num_micro_batches,
            objects=None if study is None else study.reader,
            pin_memory=place.device.type == "cuda",
        )
        yield batches, epoch


def _loader_workers(data: Data, place: Place) -> int:
    return place.loader_workers if data.loader_workers is None else data.loader_workers


def _begin_phase(
    phase: Phase, model: Classifier, normalise: Normalise, settings: Optim, found: checkpoint.Checkpoint | None
) -> tuple[DistributedDataParallel, torch.optim.AdamW]:
    """The model wrapped and the optimizer for what a phase trains; with its moments, if the checkpoint is of within."""
    model.visual.requires_grad_(phase.tower)
    device = normalise.mean.device
    student = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
    _settle_buckets(student, normalise)
    optimizer = adamw([p for p in model.parameters() if p.requires_grad], phase, settings)
    if found is not None and found.step > phase.start:
        checkpoint.restore_optimizer(found, model, optimizer)
    return student, optimizer


def _micro_batch(
    student: nn.Module,
    teachers: Teachers,
    normalise: Normalise,
    batch: Batch,
    recipe: Recipe,
    *,
    last: bool,
) -> Metrics:
    device = normalise.mean.device
    with torch.autocast(device.type, torch.bfloat16, enabled=recipe.run.precision == "bf16"):
        return training_step(
            student,
            teachers,
            normalise,
            batch.images.to(device, non_blocking=True),
            batch.labels.to(device, non_blocking=True),
            batch.draws.map(lambda tensor: tensor.to(device, non_blocking=True)),
            recipe.method,
            weight=1 / recipe.optim.num_micro_batches,
            synchronise=last,
            objects=None
            if batch.objects is None
            else batch.objects.map(lambda tensor: tensor.to(device, non_blocking=True)),
        )


def _evaluate(
    model: Classifier, normalise: Normalise, sets: dict[str, Manifest], recipe: Recipe, place: Place
) -> dict[str, Score]:
    """Top-1 on each set, over all ranks. Draws no random number: training goes on as if it had not been."""
    scores = {}
    for name, manifest in sets.items():
        batches = eval_batches(
            manifest,
            image_size=model.image_size,
            # Of any rank, twice the least that it trains on at a time: there are no gradients to keep.
            batch_size=2 * recipe.optim.batch_size // recipe.optim.lanes,
            rank=place.rank,
            world_size=place.world_size,
            loader_workers=_loader_workers(recipe.data, place),
        )
        with torch.autocast(place.device.type, torch.bfloat16, enabled=recipe.run.precision == "bf16"):
            [scores[name]] = top1([model], normalise, batches, place.device, answers_of(manifest))
    return scores


def _settle(writer: checkpoint.Writer | None) -> checkpoint.CheckpointNotWritten | None:
    """Wait for the checkpoint that is being written, on all ranks: none leaves, or asks to be started again, before it
    is whole, and a launcher that ends a job with its first rank ends none in the middle of it.

    Returns:
        Why the latest checkpoint is not there, on every rank; None if it is.
    """
    told = [writer.wait() if writer is not None else None]
    dist.broadcast_object_list(told)
    return told[0]


# --- start ------------------------------------------------------------------------------------------------------


def _checkpoint_writer(
    recipe: Recipe, run: RunFolder, epoch_steps: int, info: ModelInfo, found: checkpoint.Checkpoint | None
) -> checkpoint.Writer:
    settings = recipe.run
    keep = checkpoint.Keep(
        last=settings.keep_checkpoints,
        epoch_steps=epoch_steps if settings.keep_epochs else None,
        best_on=settings.best_on,
    )
    return checkpoint.Writer(run.checkpoints, keep, info, resumed=found, minutes=settings.checkpoint_minutes)


def _write_initial_models(recipe: Recipe, run: RunFolder, manifest: Manifest, place: Place) -> None:
    """RUN/initial.safetensors, and RUN/ensemble.safetensors if there is one, if they are not there yet."""
    if not run.initial.exists():
        model, info = initial_model(
            recipe.model.name,
            recipe.model.pretrained,
            recipe.model.head,
            manifest.classes,
            device=str(place.device),
        )
        save_model(run.initial, model, info)
    if recipe.method.ensemble is not None and not run.ensemble.exists():
        model, info = load_model(find_model(recipe.method.ensemble))
        check_same_kind(info, read_info(run.initial), recipe.method.ensemble)
        save_model(run.ensemble, model, info)


def _agree_on_checkpoint(run: RunFolder, chief: bool) -> checkpoint.Checkpoint | None:
    """Rank 0 verifies and chooses, all ranks take the same."""
    choice: list[Any] = [None]
    if chief:
        choice[0] = checkpoint.latest(run.checkpoints, report=lambda text: print(f"warning: {text}", flush=True))
    dist.broadcast_object_list(choice)
    return choice[0]


def _settle_buckets(student: DistributedDataParallel, normalise: Normalise) -> None:
    """Take a pass that changes nothing, so that DDP's buckets are from the first step on what they will be.

    DDP arranges its buckets anew after the first backward it sees. Where in a bucket a gradient lies decides the
    order in which ranks' values are added, so a resumed run would differ in the last bit from one left alone.
    """
    model = student.module
    assert isinstance(model, Classifier)
    pixels = normalise.mean.new_zeros(1, 3, *model.visual.image_size)
    seen = student(pixels)
    (0 * (seen.features.sum() + seen.logits.sum())).backward()
    student.zero_grad(set_to_none=True)


# --- metrics ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """Metrics of one step over all ranks. samples, receipt: of the whole batch; bad: samples of it that others stand in
    for; time: when it was taken, monotonic seconds; stop, overdue: what ranks asked for: to stop, a checkpoint;
    overlap: _MaskStudy.sums, flattened."""

    step: int
    samples: int
    receipt: int
    bad: int
    time: float
    loss: float
    ce: float
    kd: float
    mse: float
    accuracy: float
    masked: float
    grad_norm: float
    stop: str | None
    overdue: bool
    overlap: tuple[float, ...]

    @property
    def skipped(self) -> bool:
        """Whether it was left out; ``optim.take_step`` decides by the same number."""
        return not math.isfinite(self.grad_norm)


class _Exchange:
    """One small all-reduce a step carries metrics and requests; its result is read a step later."""

    def __init__(self, device: torch.device, world_size: int) -> None:
        self._device = device
        self._world_size = world_size
        self._under_way: list[tuple[int, float, Any, Tensor]] = []
        self._bad: list[BadSample] = []
        self._parts: dict[int, list[_Done]] = {}
        self._skipped: list[dict[str, Any]] = []

    def send(self, step: int, parts: list[_Done], norm: Tensor, stop: str | None, overdue: bool) -> list[Summary]:
        """Start step's reduction; return what has arrived of earlier ones."""
        arrived = self.drain()
        bad = [sample for part in parts for sample in part.bad]
        self._bad += bad
        metrics = [part.metrics for part in parts]
        share = 1 / (self._world_size * len(parts))
        scalars = torch.stack(
            [
                *(
                    share * torch.stack([getattr(m, name) for m in metrics]).sum()
                    for name in ("loss", "ce", "kd", "mse", "masked")
                ),
                torch.stack([m.correct for m in metrics]).sum().float(),
                norm / self._world_size,
                # new_full is a kernel; a tensor made from a list would be a copy that waits
                norm.new_full((), sum(m.samples for m in metrics)),
                norm.new_full((), len(bad)),
                norm.new_full((), stop == REQUEUE),
                norm.new_full((), stop == QUIT),
                norm.new_full((), overdue),
            ]
        )
        overlaps = [part.overlap for part in parts if part.overlap is not None]
        overlap = [torch.stack(overlaps).sum(0).flatten()] if overlaps else []
        values = torch.cat([scalars, torch.stack([part.receipt for part in parts]).sum(0), *overlap])
        self._parts[step] = parts
        self._under_way.append((step, time.monotonic(), dist.all_reduce(values, async_op=True), values))
        return arrived

    def drain(self) -> list[Summary]:
        """All that is under way, waited for."""
        summaries = []
        for step, sent, work, values in self._under_way:
            work.wait()
            loss, ce, kd, mse, masked, correct, norm, samples, bad, *rest = values.tolist()
            requeue, leave, overdue, *rest = rest
            digits, overlap = rest[: receipts.DIGITS], rest[receipts.DIGITS :]
            summaries.append(
                Summary(
                    step=step,
                    samples=int(samples),
                    receipt=receipts.from_digits(digits),
                    bad=int(bad),
                    time=sent,
                    loss=loss,
                    ce=ce,
                    kd=kd,
                    mse=mse,
                    accuracy=100 * correct / samples,
                    masked=masked,
                    grad_norm=norm,
                    stop=QUIT if leave else REQUEUE if requeue else None,
                    overdue=bool(overdue),
                    overlap=tuple(overlap),
                )
            )
            parts = self._parts.pop(step)
            if summaries[-1].skipped:
                self._skipped.append(_suspects(step, loss, norm, parts))
        self._under_way.clear()
        return summaries

    def report_bad_samples(self, run: RunFolder, epoch_steps: int) -> None:
        """Bring all ranks' bad samples since the last report into RUN/bad_samples.jsonl. Every rank has to call it."""
        found: list[Any] | None = [None] * self._world_size if dist.get_rank() == 0 else None
        dist.gather_object(self._bad, found)
        self._bad = []
        if found is None:
            return
        lines = [
            {"rank": rank, **asdict(bad), "step": bad.epoch * epoch_steps + bad.step + 1}
            for rank, of_rank in enumerate(found)
            for bad in of_rank
        ]
        append_lines(run.bad_samples, lines)
        for line in lines:
            print(
                f"warning: step {line['step']}: {line['key'] or line['sample']} of {line['shard']} cannot be used "
                f"({line['reason']}); {line['substitute']} stands in for it",
                flush=True,
            )

    def report_skipped_steps(self, run: RunFolder) -> None:
        """Bring the steps left out since the last report into RUN/skipped_steps.jsonl, with the samples to blame: those
        whose outputs are not finite, or if there is none, all of the batch. Every rank has to call it."""
        found: list[Any] | None = [None] * self._world_size if dist.get_rank() == 0 else None
        dist.gather_object(self._skipped, found)
        self._skipped = []
        if found is None:
            return
        lines = []
        for of_ranks in zip(*found, strict=True):
            blamed = [key for of_rank in of_ranks for key in of_rank["not_finite"]]
            batch = [key for of_rank in of_ranks for key in of_rank["keys"]]
            first = of_ranks[0]
            why = "outputs not finite" if blamed else "gradients not finite, all outputs finite"
            line = {"step": first["step"], "loss": first["loss"], "grad_norm": first["grad_norm"]}
            lines.append({**line, "why": why, "keys": blamed or batch})
            print(
                f"warning: step {first['step']} is left out: loss {first['loss']}, gradient norm {first['grad_norm']}; "
                f"{why}: {', '.join(lines[-1]['keys'][:8])}{' …' if len(lines[-1]['keys']) > 8 else ''}",
                flush=True,
            )
        append_lines(run.skipped_steps, lines)


def _suspects(step: int, loss: float, norm: float, parts: list[_Done]) -> dict[str, Any]:
    """A rank's own word on a step that was left out. Numbers as text: JSON has no nan."""
    keys = [key for part in parts for key in part.keys]
    finite = torch.cat([part.metrics.finite for part in parts]).tolist()
    blamed = [key for key, good in zip(keys, finite, strict=True) if not good]
    return {"step": step, "loss": str(loss), "grad_norm": str(norm), "not_finite": blamed, "keys": keys}


class _Recorder:
    """Rank 0's log.jsonl, receipts.jsonl, TensorBoard curves and printed lines. None of them can end a run: what cannot
    be written is tried again, curves end with a warning."""

    def __init__(
        self, recipe: Recipe, run: RunFolder, step: int, schedule: tuple[Phase, ...], study: _MaskStudy | None
    ) -> None:
        self._run, self._every, self._total = run, recipe.run.log_steps, schedule[-1].end
        self._optim, self._schedule = recipe.optim, schedule
        self._board: SummaryWriter | None = SummaryWriter(str(run.root / "tensorboard"), purge_step=step + 1)
        self._window: list[Summary] = []
        self._log: list[dict[str, Any]] = []
        self._receipts: list[dict[str, Any]] = []
        self._study, self._step = study, step
        # Of the steps since the last checkpoint; then a line, so that no run that is resumed has it twice or half.
        self._overlap: dict[str, Tally] = {}
        self._overlaps: list[dict[str, Any]] = []
        self._since = time.monotonic()

    def add(self, summary: Summary, skips: Skips) -> None:
        self._window.append(summary)
        self._step = summary.step
        if self._study is not None and not summary.skipped:
            self._overlap = add_up([self._overlap, self._study.tallies(summary.overlap)])
        self._receipts.append(
            {"step": summary.step, "samples": summary.samples, "receipt": receipts.as_hex(summary.receipt)}
        )
        if summary.step % self._every and summary.step != self._total:
            return
        samples_per_s = sum(s.samples for s in self._window) / (summary.time - self._since)
        taken = [s for s in self._window if not s.skipped]
        averaged = ("loss", "ce", "kd", "mse", "accuracy", "masked", "grad_norm")
        means = {name: sum(getattr(s, name) for s in taken) / len(taken) for name in averaged} if taken else {}
        eta = (self._total - summary.step) * summary.samples / samples_per_s
        phase = next(p for p in self._schedule if summary.step <= p.end)
        line = {
            "step": summary.step,
            "total_steps": self._total,
            **means,
            "lr": rates(summary.step - 1, phase, self._optim).lr,
            "skipped_steps": skips.total,
            "samples_per_s": samples_per_s,
            "eta_s": eta,
        }
        self._log.append(line)
        self._append(self._run.log, self._log)
        names = (*means, "lr", "skipped_steps", "samples_per_s")
        self._draw({f"train/{name}": line[name] for name in names}, summary.step)
        parts = " ".join(f"{name} {means[name]:.5g}" for name in ("loss", "ce", "kd", "mse") if means.get(name))
        print(
            f"step {summary.step}/{self._total} "
            + (f"{parts} accuracy {means['accuracy']:.1f} % " if means else "no step taken ")
            + (f"skipped {skips.total} " if skips.total else "")
            + f"{samples_per_s:.0f} samples/s ETA {eta:.0f} s",
            flush=True,
        )
        self._window.clear()
        self._since = summary.time

    def add_scores(self, step: int, epoch: float, scores: dict[str, Score], *, seconds: float) -> None:
        """Log an evaluation. ``epoch``: passes over the training set until then; ``seconds``: what it took, which is no
        part of the training's rate."""
        self._draw({f"eval/{name}": score.top1 for name, score in scores.items()}, step)
        passes = int(epoch) if epoch == int(epoch) else epoch
        self._log.append({"step": step, "epoch": passes, "eval": {n: s.top1 for n, s in scores.items()}})
        self._append(self._run.log, self._log)
        print(f"epoch {epoch:.4g}: " + ", ".join(f"{n} {s.top1:.2f} %" for n, s in scores.items()), flush=True)
        self._since += seconds

    def add_overlap(self, step: int, epoch: int, *, since: int) -> None:
        """Log how far the masks of an epoch, the steps after ``since``, fell on objects."""
        if self._study is None:
            return
        lines = [line for line in [*read_lines(self._run.overlaps), *self._overlaps] if since < line["step"]]
        of_lines = [{name: Tally.from_lists(t) for name, t in line["tallies"].items()} for line in lines]
        total = add_up([*of_lines, self._overlap])
        if len(total) > 1:
            total[ALL] = functools.reduce(operator.add, total.values())
        result = {name: sums.to_result() for name, sums in total.items()}
        self._log.append({"step": step, "epoch": epoch, "thresholds": THRESHOLDS, "overlap": result})
        self._append(self._run.log, self._log)
        curves = {
            f"overlap_{name}/{rate}_at_{threshold:g}": value
            for name, of_group in result.items()
            for rate in ("image_masking_rate", "object_masking_rate", "iou")
            for threshold, value in zip(THRESHOLDS, of_group[rate], strict=True)
            if value is not None
        }
        if curves:
            self._draw(curves, step)
        for name, of_group in result.items():
            best = max(range(len(THRESHOLDS)), key=lambda i: of_group["iou"][i] or 0.0)
            iou = of_group["iou"][best]
            found = f"IoU up to {100 * iou:.1f} % at {THRESHOLDS[best]:g}" if iou is not None else "no object seen"
            print(f"epoch {epoch}: masks on objects, {name}: {of_group['images']} images, {found}", flush=True)

    def flush(self) -> None:
        """Curves and receipts reach the disk before the checkpoint does: what comes after it is done again if it has to
        be, what comes before it never is."""
        self._draw({}, 0)
        self._append(self._run.receipts, self._receipts)
        if self._overlap:
            tallies = {name: sums.to_lists() for name, sums in self._overlap.items()}
            self._overlaps.append({"step": self._step, "tallies": tallies})
            self._overlap = {}
        if self._overlaps:
            self._append(self._run.overlaps, self._overlaps)
        if self._log:
            self._append(self._run.log, self._log)

    def _append(self, path: Path, lines: list[dict[str, Any]]) -> None:
        """Write ``lines`` and empty it; those that cannot be written stay, and go with the next ones."""
        try:
            append_lines(path, lines)
            lines.clear()
        except OSError as error:
            print(f"warning: {path} cannot be written ({error.strerror}); its lines wait for the next", flush=True)

    def _draw(self, curves: dict[str, float], step: int) -> None:
        """Add points to the curves, and flush them if there are none to add."""
        if self._board is None:
            return
        try:
            for name, value in curves.items():
                self._board.add_scalar(name, value, step)
            if not curves:
                self._board.flush()
        except OSError as error:
            self._board = None
            print(f"warning: TensorBoard's curves end here: they cannot be written ({error.strerror})", flush=True)
