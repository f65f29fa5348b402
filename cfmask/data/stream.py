"""The stream of batches: webdataset pipelines whose source stage follows the plan, run by threads.

    ShardReader.read_images   ids of one lane at one step, from the plan   → raw samples, read by offset
    wds.map                   decode and crop                              → pixels
    _Filler.fill              into the rows of the batch that are the lane's

Which samples a batch holds, and its draws, follow from (seed, epoch, step, lanes) alone; so they do not depend on the
number of ranks or threads, nor on where an epoch is resumed. A sample that cannot be read is replaced by the next one
of its lane that can, which depends on nothing else either.

Threads, not processes: reading, decoding and resizing leave Python's lock alone, so threads go as fast (measured:
``tools/bench.py loader``), put pixels straight into the batch in page-locked memory, where a process would send them
through a queue and /dev/shm, and nothing of them outlives the trainer or hears the job's signals.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
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
"""Batches that are under way while one is trained on. It bounds the memory that the stream takes."""

_MOST_SUBSTITUTES = 100
"""Samples of a lane that may fail one after the other before there is no point in going on."""


@dataclass(frozen=True)
class BadSample:
    """A sample of the plan that could not be read or decoded, and the key of the one that was taken for it.

    step: within the epoch. sample: its global id. key is "" where the shard's index could not be read either.
    """

    epoch: int
    step: int
    lane: int
    sample: int
    shard: str
    key: str
    reason: str
    substitute: str


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch of n samples: whole lanes in training, up to batch_size samples in evaluation.

    step: within the epoch. images: uint8 (n, 3, S, S). labels: int64 (n,). draws: donors point into these n samples.
    receipt: float32 (receipts.DIGITS,), of the keys. bad: samples that others stand in for. objects: where the objects
    of the samples are, if that was asked for.
    """

    epoch: int
    step: int
    images: Tensor
    labels: Tensor
    keys: list[str]
    draws: Draws
    receipt: Tensor
    bad: tuple[BadSample, ...] = ()
    objects: Coverage | None = None


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
    """What a rank trains on in one epoch, from ``start_step`` on.

    Args:
        batch_size: the global batch, of all ranks and micro-batches.
        lanes: lanes of the global batch; the rank owns lanes / world_size of them.
        loader_workers: threads that read and decode; 0 does it in this one, when a batch is asked for.
        draw_spec: what is drawn for each lane; None draws nothing.
        micro_batches: batches yielded a step, each of whole lanes, in lane order.
        objects: reads where the samples' objects are, beside their images.
        pin_memory: batches lie in page-locked memory, from which copies to a GPU run asynchronously.

    Yields:
        micro_batches × (steps - start_step) batches, in order.

    Raises:
        UserError: lanes, batch size, world size and micro-batches do not divide, or the set's crops have another size
            (at once, before anything is started); or a lane has no readable sample (when its batch is due).
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
        objects=objects,
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
    start: int = 0,
    pin_memory: bool = False,
) -> Iterator[MicroBatch]:
    """What a rank evaluates: over all ranks every sample exactly once, nothing padded; ``plan.eval_batches`` says in
    which batches.

    Args:
        start: number of batches of the set that have been evaluated already.
        loader_workers, pin_memory: as for training.

    Raises:
        UserError: the set's crops have another size (at once); a sample cannot be read (when its batch is due; names
            shard and key): nothing may stand in for a sample that is counted.
    """
    if batch_size < 1:
        raise UserError(f"the batch size of an evaluation must be at least 1, got {batch_size}.")
    check_image_size(manifest, image_size)
    ids = plan.eval_batches(manifest.num_samples, batch_size, rank, world_size, start)
    return _run(_EvalSource(manifest, ids), image_size, loader_workers, pin_memory)


def check_image_size(manifest: Manifest, image_size: int) -> None:
    """Raises UserError if a set of crops has others than a model of this input size needs."""
    if manifest.image_size not in (None, image_size):
        raise UserError(
            f"The set {manifest.root} holds crops of {manifest.image_size} × {manifest.image_size} pixels, the model "
            f"takes {image_size} × {image_size}. Convert the set with --image-size {image_size}, or with --store "
            f"original, which serves every size."
        )


# --- what is read, in which order -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """Consecutive rows of a batch that one thread fills: in training, one lane's at one step.

    ids (n,): the samples. replacements: ids that may replace a bad sample of a row, in this order.
    """

    first_row: int
    lane: int
    ids: NDArray[np.int64]
    order: NDArray[np.int64] | None
    position: int

    def replacements(self, row: int) -> NDArray[np.int64]:
        """What follows in the lane, from its end on at its beginning; nothing in an evaluation."""
        if self.order is None:
            return np.empty(0, np.int64)
        count = min(_MOST_SUBSTITUTES, self.order.size - 1)
        return self.order[(self.position + row + 1 + np.arange(count)) % self.order.size]


@dataclass(frozen=True)
class _Unit:
    """What becomes one MicroBatch."""

    epoch: int
    step: int
    parts: list[_Part]

    def __len__(self) -> int:
        return sum(len(part.ids) for part in self.parts)


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
    objects: ObjectReader | None

    def units(self) -> Iterator[_Unit]:
        per_lane = self.batch_size // self.lanes
        orders = {
            lane: plan.lane_order(
                self.manifest.sample_counts,
                seed=self.seed,
                epoch=self.epoch,
                lane=lane,
                lanes=self.lanes,
                batch_size=self.batch_size,
                window_shards=WINDOW_SHARDS,
            )
            for lane in self.owned
        }
        together = len(self.owned) // self.micro_batches
        for step in self.steps:
            for begin in range(0, len(self.owned), together):
                lanes = self.owned[begin : begin + together]
                yield _Unit(
                    self.epoch,
                    step,
                    [
                        _Part(n * per_lane, lane, orders[lane][step], orders[lane].reshape(-1), step * per_lane)
                        for n, lane in enumerate(lanes)
                    ],
                )

    def draws(self, unit: _Unit) -> Draws:
        return concat(
            [
                draw(self.draw_spec, len(part.ids), plan.lane_generator(self.seed, unit.epoch, unit.step, part.lane))
                for part in unit.parts
            ]
        )

    @property
    def open_shards(self) -> int:
        # A window of average shards overlaps one shard more than it is long, and lanes drift into the next window.
        return len(self.owned) * (WINDOW_SHARDS + 2)


@dataclass(frozen=True)
class _EvalSource:
    manifest: Manifest
    batches: list[range]

    def units(self) -> Iterator[_Unit]:
        for number, samples in enumerate(self.batches):
            ids = np.arange(samples.start, samples.stop)
            parts = [_Part(row, 0, ids[row : row + 32], None, 0) for row in range(0, len(ids), 32)]
            yield _Unit(0, number, parts)

    def draws(self, unit: _Unit) -> Draws:
        return Draws()

    open_shards = 4
    objects = None


# --- the pipeline's stages ------------------------------------------------------------------------------------------


def _decode(sample: dict[str, Any], image_size: int, manifest: Manifest) -> dict[str, Any]:
    """Bytes to pixels, ``image``; a raw crop has been read to where it belongs."""
    if "__error__" in sample or images.RAW in sample:
        return sample
    extension = next(name for name in sample if not name.startswith("__"))
    try:
        sample["image"] = images.pixels(sample[extension], extension, image_size, border=manifest.border)
    except UserError as reason:
        key, shard = sample["__key__"], sample["__url__"]
        remedy = (
            "Indexing reads no images. Get the shard again from where it came from, or write it without this sample; "
            "then run tools/index_shards.py on the folder again."
            if manifest.is_indexed
            else "Its bytes are as they were written, so convert the set again: the conversion leaves out what does "
            "not decode, and lists it."
        )
        message = f"Sample {key} of shard {shard} cannot be used: {reason}. {remedy}"
        sample["__error__"] = SampleError(message, key=key, shard=shard, reason=str(reason))
    return sample


class _Filler:
    """The rows of a batch, filled by any number of threads, each with parts of its own."""

    def __init__(self, source: _TrainSource | _EvalSource, unit: _Unit, image_size: int, pin_memory: bool):
        self._source, self._unit, self._size = source, unit, image_size
        n = len(unit)
        self._images = torch.empty(n, 3, image_size, image_size, dtype=torch.uint8, pin_memory=pin_memory)
        self._labels = torch.empty(n, dtype=torch.int64, pin_memory=pin_memory)
        self._keys = [""] * n
        self._pin = pin_memory
        reader = source.objects
        self._objects = None if reader is None else nothing_known(n, reader.size, reader.patch_size)
        # Through numpy: torch copies with as many threads as it has for computing.
        self._pixels, self._classes = self._images.numpy(), self._labels.numpy()

    def fill(self, part: _Part, reader: ShardReader) -> list[BadSample]:
        """Read, decode and place one part's samples.

        Raises:
            UserError: a sample cannot be used, and none of its lane stands in for it.
        """
        bad = []
        rows = range(part.first_row, part.first_row + len(part.ids))
        for row, sample in enumerate(self._samples(reader, part.ids, rows)):
            if error := sample.get("__error__"):
                sample = self._stand_in(reader, part, row, error)
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
        """ids (n,), and the rows of the batch that they are for."""

        def in_place(number: int, size: int) -> Target:
            header, pixels = images.raw_header(self._size), self._pixels[rows[number]]
            if size != len(header) + pixels.nbytes:
                raise UserError(f"a raw crop of {size} bytes, where {len(header) + pixels.nbytes} are needed")
            return Target(memoryview(pixels.reshape(-1)), skip=len(header), crc=zlib.crc32(header))

        target = in_place if self._source.manifest.store == images.CROP_RAW else None
        return wds.DataPipeline(
            lambda: reader.read_images(ids, target),
            wds.map(lambda sample: _decode(sample, self._size, self._source.manifest)),
        )

    def _stand_in(self, reader: ShardReader, part: _Part, row: int, error: SampleError) -> dict[str, Any]:
        ids = part.replacements(row)
        for sample in self._samples(reader, ids, [part.first_row + row] * len(ids)):
            if "__error__" not in sample:
                return sample
        raise error

    def batch(self, bad: list[BadSample]) -> MicroBatch:
        """The batch, once every part is filled."""
        unit = self._unit
        digits = receipts.to_digits(receipts.receipt(self._keys, unit.epoch))
        receipt, draws = torch.tensor(digits, dtype=torch.float32), self._source.draws(unit)
        if self._pin:
            receipt, draws = receipt.pin_memory(), draws.map(torch.Tensor.pin_memory)
        objects = self._objects
        if objects is not None and self._pin:
            objects = objects.map(torch.Tensor.pin_memory)
        return MicroBatch(
            unit.epoch, unit.step, self._images, self._labels, self._keys, draws, receipt, tuple(bad), objects
        )


def _run(source: _TrainSource | _EvalSource, image_size: int, threads: int, pin_memory: bool) -> Iterator[MicroBatch]:
    """The source's batches, in order."""
    if pin_memory:
        pinned.allocate_exact_sizes()
    return _batches(source, image_size, threads, pin_memory)


def _batches(
    source: _TrainSource | _EvalSource, image_size: int, threads: int, pin_memory: bool
) -> Iterator[MicroBatch]:
    with ShardReader(source.manifest, max_open=source.open_shards) as reader:
        fillers = ((_Filler(source, unit, image_size, pin_memory), unit.parts) for unit in source.units())
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
            # What has not begun never will; what has is waited for, because the reader is closed next.
            pool.shutdown(cancel_futures=True)
