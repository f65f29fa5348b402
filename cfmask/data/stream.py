"""The stream of batches: a WebDataset pipeline whose source stage follows the plan.

    _Source     ids of the plan, one unit (micro-batch) after the other  → raw samples, read by offset
    wds.map     decode and crop                                          → pixels, label
    _Units      whole units                                              → Batch

Loader process k of K runs this pipeline for units k, k + K, …, and torch's DataLoader takes from the processes in
turn: batches come out in step order whatever K is. Which samples a unit holds, and its draws, follow from (seed, epoch,
step, lanes) alone; so they do not depend on the number of ranks or loaders, nor on where an epoch is resumed.
"""

from __future__ import annotations

import atexit
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
import webdataset as wds
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from cfmask.data import images, plan
from cfmask.data.process import die_with_parent, ignore_job_signals, loader_context
from cfmask.data.shards import Manifest, ShardReader
from cfmask.errors import UserError
from cfmask.masking.fills import Draws, DrawSpec, concat, draw

WINDOW_SHARDS = 4
"""Length of a lane's shuffle window in shards (see ``plan.lane_order``)."""


@dataclass(frozen=True)
class Batch:
    """A micro-batch of n samples: whole lanes in training, up to batch_size samples in evaluation.

    step: within the epoch. images: uint8 (n, 3, S, S). labels: int64 (n,). draws: donors point into these n samples.
    """

    epoch: int
    step: int
    images: Tensor
    labels: Tensor
    keys: list[str]
    draws: Draws

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, from which copies to a GPU run asynchronously."""
        return Batch(
            epoch=self.epoch,
            step=self.step,
            images=self.images.pin_memory(),
            labels=self.labels.pin_memory(),
            keys=self.keys,
            draws=self.draws.map(torch.Tensor.pin_memory),
        )


def train_batches(
    manifest: Manifest,
    *,
    image_size: int,
    batch_size: int,
    lanes: int,
    rank: int,
    world_size: int,
    seed: int,
    epoch: int,
    start_step: int = 0,
    loader_workers: int,
    draw_spec: DrawSpec | None,
    micro_batches: int = 1,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """What a rank trains on in one epoch, from ``start_step`` on.

    Args:
        batch_size: the global batch, of all ranks and micro-batches.
        lanes: lanes of the global batch; the rank owns lanes / world_size of them.
        loader_workers: processes that read and decode; 0 does it in this process.
        draw_spec: what is drawn for each lane; None draws nothing.
        micro_batches: batches yielded a step, each of whole lanes, in lane order.

    Yields:
        micro_batches × (steps - start_step) batches, in order.

    Raises:
        UserError: lanes, batch size, world size and micro-batches do not divide (at once, before anything is
            started), or a sample cannot be read (when its batch is due; names shard and key).
    """
    per_lane = plan.samples_per_lane(batch_size, lanes)
    owned = plan.lanes_of_rank(rank, world_size, lanes)
    steps = plan.steps_per_epoch(manifest.num_samples, batch_size)
    if micro_batches < 1 or len(owned) % micro_batches:
        fitting = ", ".join(map(str, plan.divisors(len(owned))))
        raise UserError(
            f"A rank's {len(owned)} lanes (of {lanes}, {world_size} workers) cannot be cut into {micro_batches} equal "
            f"micro-batches: use one of {fitting}."
        )
    if not 0 <= start_step <= steps:
        raise UserError(f"step {start_step} is not within an epoch of {steps} steps: the shards are not the same set.")
    if draw_spec is not None and draw_spec.fill == "multi-fill" and per_lane < 2:
        raise UserError(
            f"multi-fill takes patches from other images of the lane, but a batch of {batch_size} in {lanes} lanes "
            f"leaves one sample a lane: use at most {batch_size // 2} lanes."
        )
    source = _TrainSource(
        manifest=manifest,
        batch_size=batch_size,
        lanes=lanes,
        owned=owned,
        seed=seed,
        epoch=epoch,
        steps=range(start_step, steps),
        micro_batches=micro_batches,
        draw_spec=draw_spec,
    )
    return _run(source, image_size, loader_workers, pin_memory)


def eval_batches(
    manifest: Manifest,
    *,
    image_size: int,
    batch_size: int,
    rank: int,
    world_size: int,
    loader_workers: int,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """What a rank evaluates: over all ranks every sample exactly once, in manifest order, nothing padded.

    Args:
        batch_size: of this rank; its last batch may be smaller, and a rank may have no batch at all.

    Raises:
        UserError: a sample cannot be read (when its batch is due; names shard and key).
    """
    if batch_size < 1:
        raise UserError(f"the batch size of an evaluation must be at least 1, got {batch_size}.")
    ids = plan.eval_slice(manifest.num_samples, rank, world_size)
    return _run(_EvalSource(manifest, ids, batch_size), image_size, loader_workers, pin_memory)


# --- the pipeline's stages ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Unit:
    """What becomes one Batch: ids (n,) of its samples, and what its draws are keyed by."""

    epoch: int
    step: int
    ids: np.ndarray
    lanes: range


@dataclass(frozen=True)
class _TrainSource:
    manifest: Manifest
    batch_size: int
    lanes: int
    owned: range
    seed: int
    epoch: int
    steps: range
    micro_batches: int
    draw_spec: DrawSpec | None

    def units(self, first: int, stride: int) -> Iterator[_Unit]:
        together = len(self.owned) // self.micro_batches
        orders = {}
        for number in range(first, len(self.steps) * self.micro_batches, stride):
            step, micro = self.steps[number // self.micro_batches], number % self.micro_batches
            lanes = self.owned[micro * together : (micro + 1) * together]
            for lane in lanes:
                if lane not in orders:
                    orders[lane] = plan.lane_order(
                        self.manifest.sample_counts,
                        seed=self.seed,
                        epoch=self.epoch,
                        lane=lane,
                        lanes=self.lanes,
                        batch_size=self.batch_size,
                        window_shards=WINDOW_SHARDS,
                    )
            yield _Unit(self.epoch, step, np.concatenate([orders[lane][step] for lane in lanes]), lanes)

    def draws(self, unit: _Unit) -> Draws:
        per_lane = len(unit.ids) // len(unit.lanes)
        return concat(
            [
                draw(self.draw_spec, per_lane, plan.lane_generator(self.seed, unit.epoch, unit.step, lane))
                for lane in unit.lanes
            ]
        )

    @property
    def open_shards(self) -> int:
        # A window of average shards overlaps one shard more than it is long, and lanes drift into the next window.
        return len(self.owned) * (WINDOW_SHARDS + 2)


@dataclass(frozen=True)
class _EvalSource:
    manifest: Manifest
    ids: range
    batch_size: int

    def units(self, first: int, stride: int) -> Iterator[_Unit]:
        starts = range(self.ids.start, self.ids.stop, self.batch_size)
        for number in range(first, len(starts), stride):
            stop = min(starts[number] + self.batch_size, self.ids.stop)
            yield _Unit(0, number, np.arange(starts[number], stop), range(0))

    def draws(self, unit: _Unit) -> Draws:
        return Draws()

    open_shards = 2


def _read_units(source: _TrainSource | _EvalSource) -> Iterator[dict[str, Any]]:
    """First stage: the raw samples of this process's units, each with its unit."""
    worker = get_worker_info()
    first, stride = (0, 1) if worker is None else (worker.id, worker.num_workers)
    with ShardReader(source.manifest, max_open=source.open_shards) as reader:
        for unit in source.units(first, stride):
            for sample_id in unit.ids:
                yield {**reader.read(int(sample_id)), "__unit__": unit}


def _decode(sample: dict[str, Any], image_size: int) -> dict[str, Any]:
    """Second stage: bytes to pixels and label."""
    key, url = sample["__key__"], sample["__url__"]
    data = next((sample[name] for name in images.EXTENSIONS.values() if name in sample), None)
    try:
        if data is None:
            raise UserError("has no image among its members")
        pixels = images.crop(images.decode(data), image_size)
        label = int(sample["cls"])
    except (UserError, ValueError, KeyError) as error:
        raise UserError(
            f"Sample {key} of shard {url} cannot be used: {error}. Its bytes are as they were written, so convert the "
            f"set again: the conversion leaves out what does not decode, and lists it."
        ) from None
    return {"__key__": key, "__unit__": sample["__unit__"], "image": pixels, "label": label}


def _collate(samples: Iterable[dict[str, Any]], source: _TrainSource | _EvalSource) -> Iterator[Batch]:
    """Third stage: whole units. Unlike ``wds.batched`` it does not wait for the first sample of the next unit before
    it gives one out, so a sample that cannot be read never takes the batch before it along."""
    samples = iter(samples)
    while head := next(samples, None):
        unit: _Unit = head["__unit__"]
        group = [head, *islice(samples, len(unit.ids) - 1)]
        yield Batch(
            epoch=unit.epoch,
            step=unit.step,
            images=torch.stack([sample["image"] for sample in group]),
            labels=torch.tensor([sample["label"] for sample in group], dtype=torch.int64),
            keys=[sample["__key__"] for sample in group],
            draws=source.draws(unit),
        )


class _Pipeline(IterableDataset):
    """The stages as webdataset runs them. A UserError travels as an item: raised in a loader process, torch would
    wrap it in a page of traceback."""

    def __init__(self, source: _TrainSource | _EvalSource, image_size: int):
        self._source = source
        self._image_size = image_size

    def __iter__(self) -> Iterator[Batch | UserError]:
        stages = wds.DataPipeline(
            lambda: _read_units(self._source),
            wds.map(lambda sample: _decode(sample, self._image_size)),
            lambda samples: _collate(samples, self._source),
        )
        try:
            yield from stages
        except UserError as error:
            yield error


def _start_loader(worker_id: int) -> None:
    die_with_parent()
    ignore_job_signals()
    torch.set_num_threads(1)


def _run(source: _TrainSource | _EvalSource, image_size: int, loader_workers: int, pin_memory: bool) -> Iterator[Batch]:
    loader = DataLoader(
        _Pipeline(source, image_size),
        batch_size=None,
        num_workers=loader_workers,
        multiprocessing_context=loader_context() if loader_workers else None,
        worker_init_fn=_start_loader,
        pin_memory=pin_memory,
        # Its own generator: the loader draws a seed for its processes, and that draw must not advance torch's global
        # generator, or a resumed run would differ from an uninterrupted one.
        generator=torch.Generator(),
    )

    def batches() -> Iterator[Batch]:
        items: Any = iter(loader)
        loaders = getattr(items, "_workers", [])  # none when this process does the loading

        def kill() -> None:
            for process in loaders:
                process.kill()

        # An exception in the training loop leaves this generator suspended. multiprocessing would then send the loaders
        # the SIGTERM that they ignore, and wait for them for ever.
        atexit.register(kill)
        try:
            yield from _checked(items)
        finally:
            atexit.unregister(kill)
            if loaders:
                # Not left to garbage collection, which ends the queues before it ends their owner: loaders would never
                # be told. The deadline is for when this very line is run by garbage collection.
                deadline = threading.Timer(3, kill)
                deadline.start()
                items._shutdown_workers()
                deadline.cancel()

    return batches()


def _checked(items: Iterator[Batch | UserError]) -> Iterator[Batch]:
    while True:
        try:
            item = next(items, None)
        except (ConnectionError, EOFError, FileNotFoundError, RuntimeError) as error:
            if not _lost_a_loader(error):
                raise
            item = UserError(
                f"A data loader process was killed ({error}), most often for lack of memory. Give the job more memory "
                f"(and /dev/shm, through which batches travel), or use fewer loader workers."
            )
        if item is None:
            return
        if isinstance(item, UserError):
            raise item
        yield item


def _lost_a_loader(error: Exception) -> bool:
    """Whether torch's DataLoader failed because a process of it is gone. It says so when it notices first; otherwise
    fetching a batch from the dead process fails. What is raised inside a loader comes with its traceback as text."""
    text = str(error)
    if isinstance(error, RuntimeError):
        return "DataLoader worker" in text and ("exited unexpectedly" in text or "killed by signal" in text)
    return "in DataLoader worker process" not in text
