"""The stream of batches: webdataset pipelines whose source follows the plan, run by threads.

    ShardReader.read_images   ids of a lane at a step, from the plan   → raw samples, read by offset
    wds.map                   decode and crop                          → pixels
    _Filler.fill              copy to the lane's rows of the batch

The samples and draws of a batch depend only on (seed, epoch, step, lanes): not on the number of ranks or threads, and
not on where an epoch is resumed. A sample that cannot be read is replaced by the next readable one of its lane.

The stream uses threads and not processes. Reading, decoding and resizing release Python's lock, so threads are as fast
(``tools/bench.py loader`` measures it). They write pixels directly into the batch in page-locked memory, where
processes need a queue and /dev/shm. They end with the trainer, and get no signals of the job.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import webdataset as wds
from numpy.typing import NDArray
from torch import Tensor

from cfmask.data import images, plan, receipts
from cfmask.data.segmentation import ObjectReader
from cfmask.data.shard_reader import SampleError, ShardReader, Target
from cfmask.data.shards import Manifest
from cfmask.errors import UserError
from cfmask.masking.fills import Draws, DrawSpec, concat, draw
from cfmask.masking.validation import Coverage, nothing_known
from cfmask.runtime import pinned

WINDOW_SHARDS = 4
"""Length of a lane's shuffle window in shards (see ``plan.lane_order``)."""

PREFETCH = 4
"""Batches that are prepared while one is trained on. It bounds the memory of the stream."""

_MOST_REPLACEMENTS = 100
"""Successive samples of a lane that may fail before the run ends with an error."""


@dataclass(frozen=True)
class BadSample:
    """A planned sample that could not be read or decoded."""

    epoch: int
    step: int
    """Within the epoch."""
    lane: int
    sample: int
    """Its global id."""
    shard: str
    key: str
    """"" if the index of the shard could not be read either."""
    reason: str
    substitute: str
    """Key of the sample that replaces it."""


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch of n samples: whole lanes in training, up to batch_size samples in evaluation."""

    epoch: int
    step: int
    """Within the epoch."""
    images: Tensor
    """(n, 3, S, S) uint8."""
    labels: Tensor
    """(n,) int64."""
    keys: list[str]
    draws: Draws
    """Donors are indices into these n samples."""
    receipt: Tensor
    """(receipts.DIGITS,) float32, the receipt of the keys as digits."""
    bad: tuple[BadSample, ...] = ()
    """Samples that were replaced."""
    objects: Coverage | None = None
    """Where the objects of the samples are, if the stream reads segmentation masks."""


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
    objects: ObjectReader | None = None,
    pin_memory: bool = False,
) -> Iterator[MicroBatch]:
    """The micro-batches of a rank in one epoch, from ``start_step`` on.

    Args:
        batch_size: the global batch, over all ranks and micro-batches.
        lanes: lanes of the global batch; the rank owns lanes / world_size of them.
        loader_workers: threads that read and decode; 0 reads in the caller's thread when a batch is requested.
        draw_spec: what to draw for each lane; None draws nothing.
        micro_batches: number of micro-batches of a step, each of whole lanes, in lane order.
        objects: reads where the objects of samples are.
        pin_memory: allocate batches in page-locked memory, from which copies to a GPU are asynchronous.

    Yields:
        micro_batches × (steps - start_step) micro-batches, in order.

    Raises:
        UserError: lanes, batch size, world size and micro-batches do not divide, or crops have another size (before
            anything is started); or a lane has no readable sample (when its batch is due).
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
    if world_size * micro_batches > receipts.MOST_PARTS:
        raise UserError(
            f"{world_size} workers × {micro_batches} micro-batches are more parts than a step may have "
            f"({receipts.MOST_PARTS})."
        )
    if not 0 <= start_step <= steps:
        raise UserError(f"step {start_step} is not within an epoch of {steps} steps: the shards are not the same set.")
    if draw_spec is not None and draw_spec.fill == "multi-fill" and per_lane < 2:
        raise UserError(
            f"multi-fill takes patches from other images of the lane, but a batch of {batch_size} in {lanes} lanes "
            f"leaves one sample a lane: use at most {batch_size // 2} lanes."
        )
    check_image_size(manifest, image_size)
    units = _train_units(
        manifest.sample_counts,
        owned,
        range(start_step, steps),
        together=len(owned) // micro_batches,
        draw_spec=draw_spec,
        seed=seed,
        epoch=epoch,
        lanes=lanes,
        batch_size=batch_size,
    )
    # A window overlaps one shard more than its length, and lanes drift into the next window.
    source = _Source(manifest, units, open_shards=len(owned) * (WINDOW_SHARDS + 2), objects=objects)
    return _run(source, image_size, loader_workers, pin_memory)


def eval_batches(
    manifest: Manifest,
    *,
    image_size: int,
    batch_size: int,
    rank: int,
    world_size: int,
    loader_workers: int,
    start: int = 0,
    pin_memory: bool = False,
) -> Iterator[MicroBatch]:
    """The batches of a rank in an evaluation, without padding: over all ranks, every sample exactly once. See
    ``plan.eval_batches``.

    Args:
        start: number of batches of the set that have been evaluated already.
        loader_workers, pin_memory: as for training.

    Raises:
        UserError: crops have another size (at once); or a sample cannot be read (when its batch is due). In an
            evaluation no sample is replaced.
    """
    if batch_size < 1:
        raise UserError(f"the batch size of an evaluation must be at least 1, got {batch_size}.")
    check_image_size(manifest, image_size)
    batches = plan.eval_batches(manifest.num_samples, batch_size, rank, world_size, start)
    return _run(_Source(manifest, _eval_units(batches), open_shards=4), image_size, loader_workers, pin_memory)


def check_image_size(manifest: Manifest, image_size: int) -> None:
    """Raises UserError if the crops of a set have another size than the model's input."""
    if manifest.image_size not in (None, image_size):
        raise UserError(
            f"The set {manifest.root} holds crops of {manifest.image_size} × {manifest.image_size} pixels, and the "
            f"model takes {image_size} × {image_size}. Convert the set with --image-size {image_size}, or with --store "
            f"original, which fits every size."
        )


# --- what is read, in which order -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """Consecutive rows of a batch that one thread fills: in training, those of a lane."""

    first_row: int
    lane: int
    ids: NDArray[np.int64]
    """(n,) ids of the samples."""
    order: NDArray[np.int64] | None
    """The lane's order of the epoch; None in an evaluation."""
    position: int
    """Of the first sample in the order."""

    def replacements(self, row: int) -> NDArray[np.int64]:
        """Ids that may replace the sample of a row, by preference: those that follow it in the lane, cyclically. None
        in an evaluation."""
        if self.order is None:
            return np.empty(0, np.int64)
        count = min(_MOST_REPLACEMENTS, self.order.size - 1)
        return self.order[(self.position + row + 1 + np.arange(count)) % self.order.size]


@dataclass(frozen=True)
class _Unit:
    """The plan of a MicroBatch."""

    epoch: int
    step: int
    parts: list[_Part]
    draws: Draws

    def __len__(self) -> int:
        return sum(len(part.ids) for part in self.parts)


@dataclass(frozen=True)
class _Source:
    """The units of a rank."""

    manifest: Manifest
    units: Iterator[_Unit]
    open_shards: int
    """How many shards are kept open."""
    objects: ObjectReader | None = None


def _train_units(
    sample_counts: NDArray[np.int64],
    owned: range,
    steps: range,
    *,
    together: int,
    draw_spec: DrawSpec | None,
    seed: int,
    epoch: int,
    lanes: int,
    batch_size: int,
) -> Iterator[_Unit]:
    """``owned``: the lanes of the rank. ``together``: number of lanes of a micro-batch."""
    per_lane = batch_size // lanes
    order = partial(
        plan.lane_order,
        sample_counts,
        seed=seed,
        epoch=epoch,
        lanes=lanes,
        batch_size=batch_size,
        window_shards=WINDOW_SHARDS,
    )
    orders = {lane: order(lane=lane) for lane in owned}
    for step in steps:
        for begin in range(0, len(owned), together):
            of_unit = owned[begin : begin + together]
            parts = [
                _Part(n * per_lane, lane, orders[lane][step], orders[lane].reshape(-1), step * per_lane)
                for n, lane in enumerate(of_unit)
            ]
            draws = [draw(draw_spec, per_lane, plan.lane_generator(seed, epoch, step, lane)) for lane in of_unit]
            yield _Unit(epoch, step, parts, concat(draws))


def _eval_units(batches: list[range]) -> Iterator[_Unit]:
    for number, samples in enumerate(batches):
        ids = np.arange(samples.start, samples.stop)
        parts = [_Part(row, 0, ids[row : row + 32], None, 0) for row in range(0, len(ids), 32)]
        yield _Unit(0, number, parts, Draws())


# --- the pipeline's stages ------------------------------------------------------------------------------------------


def _decode(sample: dict[str, Any], image_size: int, manifest: Manifest) -> dict[str, Any]:
    """Add the pixels as ``image``. A raw crop was read into the batch already."""
    if "__error__" in sample or images.RAW in sample:
        return sample
    extension = next(name for name in sample if not name.startswith("__"))
    try:
        sample["image"] = images.pixels(sample[extension], extension, image_size, border=manifest.border)
    except UserError as reason:
        key, shard = sample["__key__"], sample["__url__"]
        remedy = (
            "Indexing reads no images. Copy the shard again from its source, or write it without this sample; then run "
            "tools/index_shards.py on the folder again."
            if manifest.is_indexed
            else "Its checksum is right, so convert the set again: the conversion lists images that do not decode and "
            "leaves them out."
        )
        message = f"Sample {key} of shard {shard} cannot be used: {reason}. {remedy}"
        sample["__error__"] = SampleError(message, key=key, shard=shard, reason=str(reason))
    return sample


class _Filler:
    """The tensors of a batch, which threads fill part by part."""

    def __init__(self, source: _Source, unit: _Unit, image_size: int, pin_memory: bool):
        self._source, self._unit, self._size = source, unit, image_size
        n = len(unit)
        self._images = torch.empty(n, 3, image_size, image_size, dtype=torch.uint8, pin_memory=pin_memory)
        self._labels = torch.empty(n, dtype=torch.int64, pin_memory=pin_memory)
        self._keys = [""] * n
        self._pin = pin_memory
        reader = source.objects
        self._objects = None if reader is None else nothing_known(n, reader.size, reader.patch_size)
        # numpy copies, because torch would use all its threads.
        self._pixels, self._classes = self._images.numpy(), self._labels.numpy()

    def fill(self, part: _Part, reader: ShardReader) -> list[BadSample]:
        """Read and decode the samples of a part into the batch.

        Raises:
            UserError: a sample cannot be used, and no other one replaces it.
        """
        bad = []
        rows = range(part.first_row, part.first_row + len(part.ids))
        for row, sample in enumerate(self._samples(reader, part.ids, rows)):
            if error := sample.get("__error__"):
                sample = self._replacement(reader, part, row, error)
                unit = self._unit
                bad.append(
                    BadSample(
                        epoch=unit.epoch,
                        step=unit.step,
                        lane=part.lane,
                        sample=int(part.ids[row]),
                        shard=error.shard,
                        key=error.key,
                        reason=error.reason,
                        substitute=sample["__key__"],
                    )
                )
            place = part.first_row + row
            if "image" in sample:
                np.copyto(self._pixels[place], sample["image"].numpy())
            self._classes[place] = sample["__label__"]
            self._keys[place] = sample["__key__"]
            if self._objects is not None and self._source.objects is not None:
                found = self._source.objects.read(sample["__key__"], sample["__label__"])
                if found is not None:
                    self._objects.patches[place], self._objects.total[place] = found.patches[0], found.total[0]
        return bad

    def _samples(self, reader: ShardReader, ids: NDArray[np.int64], rows: Sequence[int]) -> wds.DataPipeline:
        """ids: (n,). rows: of the batch, for these samples."""

        def in_place(number: int, size: int) -> Target:
            header, pixels = images.raw_header(self._size), self._pixels[rows[number]]
            if size != len(header) + pixels.nbytes:
                raise UserError(f"a raw crop of {size} bytes where {len(header) + pixels.nbytes} are needed")
            return Target(memoryview(pixels.reshape(-1)), skip=len(header), crc=zlib.crc32(header))

        target = in_place if self._source.manifest.store == images.CROP_RAW else None
        return wds.DataPipeline(
            lambda: reader.read_images(ids, target),
            wds.map(lambda sample: _decode(sample, self._size, self._source.manifest)),
        )

    def _replacement(self, reader: ShardReader, part: _Part, row: int, error: SampleError) -> dict[str, Any]:
        ids = part.replacements(row)
        for sample in self._samples(reader, ids, [part.first_row + row] * len(ids)):
            if "__error__" not in sample:
                return sample
        raise error

    def batch(self, bad: list[BadSample]) -> MicroBatch:
        """The batch. Call it after all parts are filled."""
        unit = self._unit
        digits = receipts.to_digits(receipts.receipt(self._keys, unit.epoch))
        receipt, draws, objects = torch.tensor(digits, dtype=torch.float32), unit.draws, self._objects
        if self._pin:
            receipt, draws = receipt.pin_memory(), draws.map(torch.Tensor.pin_memory)
            objects = objects and objects.map(torch.Tensor.pin_memory)
        return MicroBatch(
            unit.epoch, unit.step, self._images, self._labels, self._keys, draws, receipt, tuple(bad), objects
        )


def _run(source: _Source, image_size: int, threads: int, pin_memory: bool) -> Iterator[MicroBatch]:
    """The batches of a source, in order."""
    if pin_memory:
        pinned.allocate_exact_sizes()
    with ShardReader(source.manifest, max_open=source.open_shards) as reader:
        fillers = ((_Filler(source, unit, image_size, pin_memory), unit.parts) for unit in source.units)
        if threads == 0:
            for filler, parts in fillers:
                yield filler.batch([bad for part in parts for bad in filler.fill(part, reader)])
            return
        pool = ThreadPoolExecutor(threads, thread_name_prefix="cfmask-loader")
        under_way: deque[tuple[_Filler, list[Future[list[BadSample]]]]] = deque()
        try:
            while True:
                while len(under_way) < PREFETCH and (following := next(fillers, None)):
                    filler, parts = following
                    under_way.append((filler, [pool.submit(filler.fill, part, reader) for part in parts]))
                if not under_way:
                    return
                filler, futures = under_way.popleft()
                yield filler.batch([bad for future in futures for bad in future.result()])
        finally:
            # Waits for parts that have begun, because the reader is closed next.
            pool.shutdown(cancel_futures=True)
