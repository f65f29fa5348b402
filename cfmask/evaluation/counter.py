"""Counts of models on sets, over all ranks, saved in the run folder.

A set is read once for all models. Ranks take batches in turn, and counts are integers, so that the result is the same
for any number of ranks. Counts are saved from time to time with their number of batches; an interrupted evaluation
resumes after these, on any number of ranks.
"""

from __future__ import annotations

import hashlib
import json
import logging
import struct
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor

from cfmask.counting import Counts
from cfmask.data.label_space import label_space_of
from cfmask.data.shards import Manifest
from cfmask.data.stream import eval_batches
from cfmask.errors import UserError
from cfmask.evaluation.checks import check_classes
from cfmask.evaluation_spec import Evaluation, files_of
from cfmask.metrics import AsyncMetricReducer, Sum, stop_metrics, stop_of
from cfmask.models.tower import Classifier, Normalise
from cfmask.runs import RunFolder
from cfmask.runtime.distributed import DistributedContext
from cfmask.runtime.files import read_bytes
from cfmask.runtime.heartbeat import PREPARING, WAITING, beat, restart_steps
from cfmask.runtime.jsonl import JsonLines
from cfmask.runtime.patience import patiently
from cfmask.runtime.progress import progress_bar
from cfmask.runtime.tensor_files import replace_tensors
from cfmask.session import StopRequest, autocast

logger = logging.getLogger(__name__)

KEEP_S, LOG_S = 30.0, 5.0
"""Seconds between two saves of the counts, and between two lines of progress."""

Candidates = Iterable[tuple[Classifier, Normalise]]
"""Models on the device, each with its normalisation of pixels. A model is valid until the next one is requested."""


class Stopped(Exception):
    """A stop was requested, which ``args`` holds. The counts so far are saved."""


class SetCounter:
    """Counts of each stage and set, over all ranks, saved in RUN/progress.safetensors.

    sets, label_spaces: by name.
    images: number of images that have been counted.
    """

    def __init__(
        self,
        evaluation: Evaluation,
        run: RunFolder,
        context: DistributedContext,
        sets: dict[str, Manifest],
        stop_request: StopRequest,
    ) -> None:
        self._evaluation, self._run, self._context, self._stop_request = evaluation, run, context, stop_request
        self.sets = sets
        self.label_spaces = {name: label_space_of(manifest).to(context.device) for name, manifest in sets.items()}
        self.device, self.is_main_process = context.device, context.rank == 0
        self._facts = json.dumps([files_of(evaluation), {name: m.digest for name, m in sets.items()}])
        progress = [self._read() if self.is_main_process else {}]
        dist.broadcast_object_list(progress)
        self._kept: dict[str, tuple[int, dict[str, Tensor]]] = progress[0]
        self.images = self._kept_images()
        self._kept_at = self._logged_at = time.monotonic()
        self._logged_images = self.images
        self._log = JsonLines(run.log)
        self._bar = progress_bar(unit="samples", initial=self.images, disable=not (self.is_main_process and sets))

    def announce(self, names: Sequence[str]) -> None:
        """State the sets that will be counted, for the progress; a set that is counted twice is named twice."""
        self._total = self._bar.total = sum(self.sets[name].num_samples for name in names)

    def check_classes(self, classes: Sequence[str]) -> None:
        """Raises UserError if the class list of a set differs from the models'."""
        for manifest in self.sets.values():
            check_classes(manifest, classes)

    def close(self) -> None:
        self._bar.close()

    def count(self, stage: str, name: str, models: Candidates, called: Sequence[str]) -> Counts:
        """Count models on a set, over all ranks.

        Args:
            stage: distinguishes several counts on one set.
            name: of the set.
            called: name of each model in errors.

        Raises:
            Stopped: a stop was requested on some rank; raised on all ranks.
            UserError: logits are not finite.
        """
        manifest, key = self.sets[name], f"{stage}: {name}"
        done, kept = self._kept.get(key, (0, None))
        counts = Counts(len(called), manifest.num_classes, self.device)
        if kept is not None:
            counts.load(kept)
        if done < self._num_batches(manifest):
            self._count_rest(key, name, models, counts, done)
        for model, bad in zip(called, counts.not_finite.tolist(), strict=True):
            if bad:
                raise UserError(
                    f"{model} gives logits that are not finite for {bad} of {manifest.num_samples} images of {name}: "
                    f"its weights are damaged, or too large for {self._evaluation.precision}. Try --precision fp32."
                )
        return counts

    def _count_rest(self, key: str, name: str, models: Candidates, total: Counts, done: int) -> None:
        """Add to ``total`` the batches of a set after the first ``done``, and save it from time to time.

        Raises:
            Stopped: a stop was requested; ``total`` is saved.
        """
        manifest, label_space, device = self.sets[name], self.label_spaces[name], self.device
        size, world, last = self._evaluation.batch_size, self._context.world_size, self._num_batches(manifest)
        fresh = Counts(len(total.not_finite), manifest.num_classes, device)
        reducer = AsyncMetricReducer(device)
        self._bar.set_description(name, refresh=False)
        restart_steps()
        for number, batch in enumerate(self._rounds(manifest, next(iter(models))[0], done)):
            beat("evaluating", number)
            if batch is not None:
                images = batch.images.to(device, non_blocking=True)
                labels = batch.labels.to(device, non_blocking=True)
                for i, (model, normalise) in enumerate(models):
                    fresh.add(i, self._logits(model, normalise(images)), labels, label_space)
            before, done = done, min(last, done + world)
            self._advance(min(done * size, manifest.num_samples) - before * size, name)
            overdue = self.is_main_process and time.monotonic() - self._kept_at > KEEP_S
            reducer.add({"overdue": Sum(overdue), **stop_metrics(self._stop_request())})
            reducer.send(done)
            beat(WAITING)
            # Requests of the previous batch: no rank waits for the slowest, and all ranks read the same values.
            asked, keep = None, False
            for reduced in reducer.receive(before=done):
                asked, keep = stop_of(reduced), bool(reduced.scalar("overdue"))
            if asked or keep or done == last:
                fresh.sum_over_ranks()
                total.take(fresh)
                self._keep(key, done, total)
            if asked and done < last:
                raise Stopped(asked)
        reducer.receive()
        restart_steps()
        beat(PREPARING)

    def _num_batches(self, manifest: Manifest) -> int:
        return -(-manifest.num_samples // self._evaluation.batch_size)

    def results(self, names: Sequence[str], models: Candidates, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Count models on sets: ``sets`` and ``models`` of results.json.

        Args:
            names: of the sets.
            rows: the entry of each model in ``models``, with its ``name``; its results are added.
        """
        called = [row["name"] for row in rows]
        counted = {name: self.count("sets", name, models, called) for name in names}
        entries = []
        for i, row in enumerate(rows):
            of_sets = {
                name: counts.result(i, [wnid for wnid, _ in self.sets[name].classes])
                for name, counts in counted.items()
            }
            entries.append({**row, "sets": of_sets})
        about = {
            name: {"samples": self.sets[name].num_samples, "classes": len(self.label_spaces[name].ids)}
            for name in names
        }
        return {"sets": about, "models": entries}

    def _rounds(self, manifest: Manifest, model: Classifier, done: int) -> Iterator[Any]:
        """The rank's batch of each round; None in the last round if there is none for this rank."""
        size, world = self._evaluation.batch_size, self._context.world_size
        workers = self._evaluation.loader_workers
        batches = eval_batches(
            manifest,
            image_size=model.image_size,
            batch_size=size,
            rank=self._context.rank,
            world_size=world,
            loader_workers=self._context.loader_workers if workers is None else workers,
            start=done,
            pin_memory=self._context.device.type == "cuda",
        )
        for _ in range(done, self._num_batches(manifest), world):
            yield next(batches, None)

    @torch.no_grad()
    def _logits(self, model: Classifier, pixels: Tensor) -> Tensor:
        with autocast(pixels.device, self._evaluation.precision):
            return model(pixels)[1]

    def _advance(self, images: int, name: str) -> None:
        """Log progress, and write a line of it."""
        self.images += images
        self._bar.update(images)
        if not self.is_main_process:
            return
        now = time.monotonic()
        if now - self._logged_at < LOG_S and self.images < self._total:
            return
        rate = (self.images - self._logged_images) / max(now - self._logged_at, 1e-3)
        line = {
            "step": self.images,
            "total_steps": self._total,
            "set": name,
            "samples_per_s": rate,
            "eta_s": max(0, self._total - self.images) / rate,
        }
        self._log.add(line)
        self._log.write()
        self._logged_at, self._logged_images = now, self.images

    def _keep(self, key: str, done: int, counts: Counts) -> None:
        """Save the counts. A full disk causes a warning only: after an interruption, the set is counted again."""
        self._kept[key] = done, {n: t.cpu() for n, t in counts.tensors().items()}
        self._kept_at = time.monotonic()
        if not self.is_main_process:
            return
        tensors = {f"{key}|{n}": t for key, (_, kept) in self._kept.items() for n, t in kept.items()}
        batches = json.dumps({key: done for key, (done, _) in self._kept.items()})
        about = {"batches": batches, "facts": self._facts, "images": str(self._kept_images())}
        try:
            replace_tensors(self._run.progress, tensors, {**about, "digest": _digest_of(tensors, about)})
        except OSError as error:
            logger.warning(f"{self._run.progress} cannot be written ({error}); counting continues")

    def _kept_images(self) -> int:
        return sum(int(counted["per_class"][0, :, 0].sum()) for _, counted in self._kept.values())

    def _read(self) -> dict[str, tuple[int, dict[str, Tensor]]]:
        """The counts that an earlier start has saved; none if they are damaged, or of other models or sets.

        Raises:
            StorageUnavailable: the file cannot be read.
        """
        path = self._run.progress
        try:
            data = patiently(lambda: read_bytes(path), str(path))
        except FileNotFoundError:
            return {}
        try:
            tensors = safetensors.torch.load(data)
            # Parsed here, because safetensors reads metadata from files only.
            about = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])["__metadata__"]
            digest = about.pop("digest")
            if digest != _digest_of(tensors, about):
                raise ValueError("its digest differs from that of its counts")
            if about["facts"] != self._facts:
                logger.info("Models or sets have changed since the last start: counting starts again.")
                return {}
            return {
                key: (done, {name: tensors[f"{key}|{name}"] for name in Counts.NAMES})
                for key, done in json.loads(about["batches"]).items()
            }
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
            logger.warning(f"{path} is damaged ({error}): counting starts again.")
            return {}


def _digest_of(tensors: dict[str, Tensor], about: dict[str, str]) -> str:
    """sha256 of counts and their metadata."""
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
