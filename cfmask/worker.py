"""The training worker: one process of a job. Builds everything from a Recipe and a run folder, and trains.

Whatever happens to it, the next start of the same job goes on from the last checkpoint, and ends with the
same weights, bit for bit, as a run that was left alone.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
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
from cfmask.data.shards import Manifest, find_set, load_manifest
from cfmask.data.stream import BadSample, Batch, eval_batches, train_batches
from cfmask.distributed import TIMEOUT, Place, call_off, process_group
from cfmask.errors import UserError
from cfmask.evaluate import Score, top1
from cfmask.files import write_atomically
from cfmask.masking.fills import DrawSpec
from cfmask.models.head import ModelInfo, initial_model, load_model, save_model
from cfmask.models.tower import Classifier, Normalise
from cfmask.optim import adamw, learning_rate
from cfmask.recipe import Data, Recipe
from cfmask.runs import RunFolder, append_lines
from cfmask.step import Metrics, training_step

FINISHED = "finished"
REQUEUE, QUIT = "requeue", "quit"
"""What a launcher may ask of a worker: to stop at the next step boundary, and whether the job is to come back."""

StopRequest = Callable[[], str | None]


def run_worker(recipe: Recipe, run: RunFolder, place: Place, stop_request: StopRequest = lambda: None) -> str:
    """Train until the recipe is fulfilled or a stop is asked for.

    Args:
        stop_request: called at every step on every rank; returns REQUEUE, QUIT or None. One rank's request
            stops them all, at the same step boundary, after a checkpoint.

    Returns:
        FINISHED, REQUEUE or QUIT.

    Raises:
        UserError: bad settings or data, too many samples that cannot be read (on all ranks, after a checkpoint),
            another job on the folder, a final checkpoint that cannot be written.
        FloatingPointError: the loss is not finite. The last checkpoint stays.
    """
    torch.set_num_threads(place.cpus)
    _be_deterministic()
    with contextlib.ExitStack() as stack:
        if place.rank == 0:
            try:
                stack.enter_context(run.locked())
            except UserError as error:
                call_off(place, run.root / "meeting", str(error))
                raise
        store = stack.enter_context(process_group(place, run.root / "meeting"))
        try:
            return _train(recipe, run, place, store, stop_request)
        except Exception as error:
            if place.rank == 0:
                run.end_attempt(f"failed: {type(error).__name__}: {str(error)[:500]}")
            raise


def _train(recipe: Recipe, run: RunFolder, place: Place, store: dist.Store, stop_request: StopRequest) -> str:
    device, settings, method = place.device, recipe.optim, recipe.method
    chief = place.rank == 0

    # --- data ---------------------------------------------------------------------------------------------
    manifest, eval_sets = _load_sets(recipe.data)
    epoch_steps = steps_per_epoch(manifest.num_samples, settings.batch_size)
    total_steps = settings.epochs * epoch_steps

    # --- model, teacher, optimizer --------------------------------------------------------------------------
    _write_initial_model(recipe, run, manifest, place, store)
    model, info = load_model(run.initial)
    model = model.to(device)
    normalise = Normalise(info.mean, info.std).to(device)
    teacher = copy.deepcopy(model.visual).requires_grad_(False) if method.mask is not None else None
    optimizer = adamw(model.parameters(), settings)

    # --- resume -------------------------------------------------------------------------------------------
    found = _agree_on_checkpoint(run, chief)
    if found is not None:
        checkpoint.restore(found, model, optimizer)
    step, consumed = (found.step, found.consumed) if found is not None else (0, Consumed())
    if found is not None and found.dataset != manifest.digest:
        raise UserError(
            f"{run.root} was begun with another training set than {manifest.root} is now (digest {found.dataset}, now "
            f"{manifest.digest}): its order would not be the same. Bring the set back, or begin a new run."
        )
    if step > total_steps:
        raise UserError(f"{run.root} has a checkpoint of step {step}, beyond the recipe's {total_steps} steps.")
    student = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
    _settle_buckets(student, normalise)
    recorder = _Recorder(recipe, run, step, total_steps) if chief else None
    if chief:
        run.begin_attempt(
            job=place.attempt, nodes=place.nodes, world_size=place.world_size, device=str(device), from_step=step
        )
        run.cut_history(step)
        print(f"step {step} of {total_steps} ({epoch_steps} an epoch), {place.world_size} ranks, {device}", flush=True)

    # --- train --------------------------------------------------------------------------------------------
    bad_limit = max(1, int(recipe.data.max_bad_share * manifest.num_samples))
    exchange = _Exchange(device, place.world_size)
    unwritten: checkpoint.CheckpointNotWritten | None = None
    scores: dict[str, Score] = {}
    for batches, epoch in _epochs(recipe, manifest, model, place, step, epoch_steps):
        while step < (epoch + 1) * epoch_steps:
            rate = learning_rate(step, total_steps, settings)
            for group in optimizer.param_groups:
                group["lr"] = rate
            parts = []
            for part in range(settings.micro_batches):
                batch = next(batches)
                last = part == settings.micro_batches - 1
                metrics = _micro_batch(student, teacher, normalise, batch, recipe, last=last)
                parts.append(_Done(metrics, batch.receipt.to(device, non_blocking=True), batch.bad))
            norm = nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1

            # Sent now, read at the next step: nobody waits for a metric, and all ranks read the same stop request.
            seen = exchange.send(step, parts, norm, stop_request())
            epoch_end = step % epoch_steps == 0
            due = epoch_end or step % recipe.run.checkpoint_steps == 0
            if due or any(s.stop or s.bad for s in seen):
                seen += exchange.drain()
            for summary in seen:
                summary.refuse_if_not_finite(run)
                consumed = consumed.plus(
                    samples=summary.samples,
                    receipt=summary.receipt,
                    bad=summary.bad,
                    epoch_begins=(summary.step - 1) % epoch_steps == 0,
                )
                if recorder is not None:
                    recorder.add(summary)
            if any(s.bad for s in seen):
                exchange.report_bad_samples(run, epoch_steps)
            # Asked when there are new ones: a set that was mended goes on, whatever its epoch has seen.
            spoilt = any(s.bad for s in seen) and consumed.bad_in_epoch > bad_limit
            stop = next((s.stop for s in seen if s.stop), None)
            if epoch_end and eval_sets:
                scores = _evaluate(model, normalise, eval_sets, recipe, place)
                if recorder is not None:
                    recorder.add_scores(step, epoch + 1, scores)
            if recorder is not None and (due or stop or spoilt):
                recorder.flush()
                unwritten = _save(run, step, model, info, optimizer, recipe, manifest, consumed)
            if spoilt:
                raise UserError(
                    f"{consumed.bad_in_epoch} samples of epoch {epoch + 1} could not be read, more than the "
                    f"{bad_limit} that --max-bad-share {recipe.data.max_bad_share:g} allows. {run.bad_samples} lists "
                    f"them with the reasons. Mend the set ({manifest.root}); the run goes on from step {step}."
                )
            if stop and step < total_steps:
                if chief:
                    print(f"asked to stop ({stop}) at step {step}", flush=True)
                    if unwritten is not None:
                        raise unwritten
                    run.end_attempt(f"stopped at step {step} ({stop})")
                return stop

    # --- finish -------------------------------------------------------------------------------------------
    if not scores:
        scores = _evaluate(model, normalise, eval_sets, recipe, place)
    if chief:
        if unwritten is not None:
            raise unwritten
        save_model(run.final, model, info)
        results = {name: {**asdict(score), "top1": score.top1} for name, score in scores.items()}
        write_atomically(run.results, json.dumps({"step": step, "sets": results}, indent=2))
        run.end_attempt(FINISHED)
        print(f"finished at step {step}: {run.final}", flush=True)
    return FINISHED


@dataclass(frozen=True)
class _Done:
    """What a micro-batch leaves on its rank: metrics and receipt on the device, and which samples were bad."""

    metrics: Metrics
    receipt: Tensor
    bad: tuple[BadSample, ...]


def _load_sets(data: Data) -> tuple[Manifest, dict[str, Manifest]]:
    """The training set, and the sets to evaluate on. Files are not looked at: the launcher has done it once for all
    ranks, and a shard that has gone missing since is a matter of its samples."""
    cache = node_cache(data.cache_dir, data.cache_gb) if is_remote(data.shards) else None

    def load(name: str) -> Manifest:
        return load_manifest(find_set(data.shards, name), cache=cache, check_files=False)

    return load(data.train_split), {name: load(name) for name in data.eval_sets}


def _epochs(
    recipe: Recipe, manifest: Manifest, model: Classifier, place: Place, step: int, epoch_steps: int
) -> Iterator[tuple[Iterator[Batch], int]]:
    """Each epoch from ``step`` on: its batches, from where the run stands, and its number from 0."""
    method, settings = recipe.method, recipe.optim
    draw_spec = None
    if method.mask is not None:
        assert method.fill is not None
        draw_spec = DrawSpec(method.mask, method.fill, method.rate or 0.0, model.patches)
    first, start = divmod(step, epoch_steps)
    for epoch in range(first, settings.epochs):
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
            loader_workers=recipe.data.loader_workers,
            draw_spec=draw_spec,
            micro_batches=settings.micro_batches,
            pin_memory=place.device.type == "cuda",
        )
        yield batches, epoch


def _micro_batch(
    student: nn.Module,
    teacher: nn.Module | None,
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
            teacher,
            normalise,
            batch.images.to(device, non_blocking=True),
            batch.labels.to(device, non_blocking=True),
            batch.draws.map(lambda tensor: tensor.to(device, non_blocking=True)),
            recipe.method,
            weight=1 / recipe.optim.micro_batches,
            synchronise=last,
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
            batch_size=max(1, 2 * recipe.optim.batch_size // place.world_size // recipe.optim.micro_batches),
            rank=place.rank,
            world_size=place.world_size,
            loader_workers=recipe.data.loader_workers,
        )
        [scores[name]] = top1([model], normalise, batches, place.device)
    return scores


def _save(
    run: RunFolder,
    step: int,
    model: Classifier,
    info: ModelInfo,
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    manifest: Manifest,
    consumed: Consumed,
) -> checkpoint.CheckpointNotWritten | None:
    """Write a checkpoint; on a full disk say so and go on: the next one may fit, and training is not lost."""
    try:
        checkpoint.save(
            run.checkpoints,
            step,
            model,
            info,
            optimizer,
            dataset=manifest.digest,
            consumed=consumed,
            keep=recipe.run.keep_checkpoints,
        )
        return None
    except checkpoint.CheckpointNotWritten as error:
        print(f"warning: {error}", flush=True)
        return error


# --- start ------------------------------------------------------------------------------------------------------


def _be_deterministic() -> None:
    """Kernels that give the same bits twice, where there is a choice."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    # It would fill every fresh tensor with NaN, which costs time and finds bugs that are not ours.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _write_initial_model(recipe: Recipe, run: RunFolder, manifest: Manifest, place: Place, store: dist.Store) -> None:
    """RUN/initial.safetensors, written by rank 0 at the first start; the other ranks wait for it."""
    if place.rank == 0:
        answer = "ready"
        try:
            if not run.initial.exists():
                model, info = initial_model(
                    recipe.model.name,
                    recipe.model.pretrained,
                    recipe.model.head,
                    manifest.classes,
                    device=str(place.device),
                )
                save_model(run.initial, model, info)
        except BaseException as error:
            answer = f"rank 0 could not make the initial model: {error}"
            raise
        finally:
            store.set("initial", answer)
    else:
        store.wait(["initial"], TIMEOUT)
        answer = store.get("initial").decode()
        if answer != "ready":
            raise UserError(answer)


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
    features, logits = student(pixels)
    (0 * (features.sum() + logits.sum())).backward()
    student.zero_grad(set_to_none=True)


# --- metrics ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """Metrics of one step over all ranks. samples, receipt: of the whole batch; bad: samples of it that others stand in
    for; time: when it was taken, monotonic seconds."""

    step: int
    samples: int
    receipt: int
    bad: int
    time: float
    loss: float
    ce: float
    mse: float
    accuracy: float
    masked: float
    grad_norm: float
    stop: str | None

    def refuse_if_not_finite(self, run: RunFolder) -> None:
        if not math.isfinite(self.loss) or not math.isfinite(self.grad_norm):
            raise FloatingPointError(
                f"The loss of step {self.step} is {self.loss} and its gradient norm {self.grad_norm}. The last "
                f"checkpoint in {run.checkpoints} was made before that. A lower --lr, or --precision fp32, may help."
            )


class _Exchange:
    """One small all-reduce a step carries metrics and stop requests; its result is read a step later."""

    def __init__(self, device: torch.device, world_size: int) -> None:
        self._device = device
        self._world_size = world_size
        self._under_way: list[tuple[int, float, Any, Tensor]] = []
        self._bad: list[BadSample] = []

    def send(self, step: int, parts: list[_Done], norm: Tensor, stop: str | None) -> list[Summary]:
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
                    for name in ("loss", "ce", "mse", "masked")
                ),
                torch.stack([m.correct for m in metrics]).sum().float(),
                norm / self._world_size,
                # new_full is a kernel; a tensor made from a list would be a copy that waits
                norm.new_full((), sum(m.samples for m in metrics)),
                norm.new_full((), len(bad)),
                norm.new_full((), stop == REQUEUE),
                norm.new_full((), stop == QUIT),
            ]
        )
        values = torch.cat([scalars, torch.stack([part.receipt for part in parts]).sum(0)])
        self._under_way.append((step, time.monotonic(), dist.all_reduce(values, async_op=True), values))
        return arrived

    def drain(self) -> list[Summary]:
        """All that is under way, waited for."""
        summaries = []
        for step, sent, work, values in self._under_way:
            work.wait()
            loss, ce, mse, masked, correct, norm, samples, bad, requeue, leave, *digits = values.tolist()
            summaries.append(
                Summary(
                    step=step,
                    samples=int(samples),
                    receipt=receipts.from_digits(digits),
                    bad=int(bad),
                    time=sent,
                    loss=loss,
                    ce=ce,
                    mse=mse,
                    accuracy=100 * correct / samples,
                    masked=masked,
                    grad_norm=norm,
                    stop=QUIT if leave else REQUEUE if requeue else None,
                )
            )
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


class _Recorder:
    """Rank 0's log.jsonl, TensorBoard curves and printed lines."""

    def __init__(self, recipe: Recipe, run: RunFolder, step: int, total_steps: int) -> None:
        self._run, self._every, self._total = run, recipe.run.log_steps, total_steps
        self._optim = recipe.optim
        self._board = SummaryWriter(str(run.root / "tensorboard"), purge_step=step + 1)
        self._window: list[Summary] = []
        self._receipts: list[dict[str, Any]] = []
        self._since = time.monotonic()

    def add(self, summary: Summary) -> None:
        self._window.append(summary)
        self._receipts.append(
            {"step": summary.step, "samples": summary.samples, "receipt": receipts.as_hex(summary.receipt)}
        )
        if summary.step % self._every and summary.step != self._total:
            return
        samples_per_s = sum(s.samples for s in self._window) / (summary.time - self._since)
        names = ("loss", "ce", "mse", "accuracy", "masked", "grad_norm")
        means = {name: sum(getattr(s, name) for s in self._window) / len(self._window) for name in names}
        eta = (self._total - summary.step) * summary.samples / samples_per_s
        line = {
            "step": summary.step,
            "total_steps": self._total,
            **means,
            "lr": learning_rate(summary.step - 1, self._total, self._optim),
            "samples_per_s": samples_per_s,
            "eta_s": eta,
        }
        append_lines(self._run.log, [line])
        for name in (*means, "lr", "samples_per_s"):
            self._board.add_scalar(f"train/{name}", line[name], summary.step)
        print(
            f"step {summary.step}/{self._total} loss {means['loss']:.4f} ce {means['ce']:.4f} mse {means['mse']:.5f} "
            f"accuracy {means['accuracy']:.1f} % {samples_per_s:.0f} samples/s ETA {eta:.0f} s",
            flush=True,
        )
        self._window.clear()
        self._since = summary.time

    def add_scores(self, step: int, epoch: int, scores: dict[str, Score]) -> None:
        for name, score in scores.items():
            self._board.add_scalar(f"eval/{name}", score.top1, step)
        scored = {"step": step, "epoch": epoch, "eval": {n: s.top1 for n, s in scores.items()}}
        append_lines(self._run.log, [scored])
        print(f"epoch {epoch}: " + ", ".join(f"{n} {s.top1:.2f} %" for n, s in scores.items()), flush=True)
        self._since = time.monotonic()

    def flush(self) -> None:
        """Curves and receipts reach the disk before the checkpoint does: what comes after it is done again if it has to
        be, what comes before it never is."""
        self._board.flush()
        try:
            append_lines(self._run.receipts, self._receipts)
        except OSError as error:
            print(
                f"warning: {self._run.receipts} cannot be written ({error.strerror}); the next checkpoint tries again"
            )
            return
        self._receipts.clear()
