"""The evaluating worker: one process of a job. Makes the models that an Evaluation asks for, and counts on its sets.

A set is read once for all models. Ranks take batches in turn; counts are whole numbers, so the result is the same for
any number of ranks. Counts are kept from time to time, with the number of batches that they are of: a job that is
requeued, on any number of ranks, resumes behind the last of them.
"""

from __future__ import annotations

import copy
import hashlib
import json
import struct
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from cfmask.agreement import check_agreement
from cfmask.data.shards import Manifest, load_sets
from cfmask.data.stream import eval_batches
from cfmask.distributed import Place
from cfmask.ensemble import average, greedy_soup, interpolate_into
from cfmask.errors import UserError
from cfmask.evaluate import Counts, answers_of, check_classes, check_set
from cfmask.evaluation import Evaluation, files_of
from cfmask.files import read_bytes, replace_tensors, write_atomically
from cfmask.metrics import AsyncMetricReducer, Sum, stop_metrics, stop_of
from cfmask.model_origin import origin_of
from cfmask.models.head import ModelInfo, check_same_kind, load_model, save_model
from cfmask.models.initial import initial_model
from cfmask.models.tower import Classifier, Normalise
from cfmask.runs import RunFolder, find_model
from cfmask.runtime.heartbeat import PREPARING, WAITING, beat, restart_steps
from cfmask.runtime.jsonl import JsonLines
from cfmask.runtime.patience import patiently
from cfmask.secrets import mask_secrets
from cfmask.session import (
    FINISHED,
    Report,
    StopRequest,
    autocast,
    begin_attempt,
    choose_arithmetic,
    rank_0_first,
    session,
)

KEEP_S, LOG_S = 30.0, 5.0
"""How often counts are kept, and a line of progress is written."""

Candidates = Iterable[tuple[Classifier, Normalise]]
"""Models on the device, each with what its pixels need. One may be gone when the next one comes."""


class _Stopped(Exception):
    """A stop was asked for, which ``args`` has, and what was counted until then is kept."""


def run_evaluation(
    evaluation: Evaluation,
    run: RunFolder,
    place: Place,
    stop_request: StopRequest = lambda: None,
    failing: Report = lambda error: None,
) -> str:
    """Evaluate until all is counted or a stop is asked for. Takes and returns what ``train.train`` does.

    Raises:
        UserError: models that do not belong together or to the sets, a set that is not what it should be, a sample
            that cannot be read, logits that are not finite, another job on the folder.
    """
    choose_arithmetic(evaluation.precision, deterministic=True)
    with session(run, place, failing) as (store, leaving):
        is_main_process = place.rank == 0
        asked_for = evaluation
        # A run's best checkpoint is known when the run has ended, which may be long after the evaluation was queued.
        models = (patiently(partial(find_model, path), path) for path in evaluation.models)
        evaluation = replace(evaluation, models=tuple(map(str, models)))
        sets = load_sets_of(evaluation, check_files=is_main_process)
        asked = hashlib.sha256(evaluation.to_json().encode()).hexdigest()[:12]
        check_agreement({"the evaluation": asked, **{f"the set {name}": each.digest for name, each in sets.items()}})
        if evaluation.make == "zero-shot":
            rank_0_first(store, place, "the zero-shot head", lambda: _make_zero_shot(evaluation, run, sets, place))
        counter = _Counter(evaluation, run, place, sets, stop_request)
        if is_main_process:
            attempts = begin_attempt(run, place, from_step=counter.images)
            patiently(lambda: run.cut_history(counter.images), str(run.root))
        leaving.callback(counter.close)
        try:
            results = _evaluate(evaluation, run, counter, place.device)
        except _Stopped as stopped:
            [asked] = stopped.args
            if is_main_process:
                print(f"asked to stop ({asked}) after {counter.images} images", flush=True)
                run.end_attempt(f"stopped after {counter.images} images ({asked})")
            return asked
        if is_main_process:
            facts = {
                "evaluation": json.loads(mask_secrets(asked_for.to_json())),
                "of": files_of(asked_for) | files_of(evaluation),
                "checkpoints": [origin_of(path).to_json() for path in evaluation.models],
            }
            write_atomically(run.results, json.dumps({**facts, **results}, indent=2))
            run.remove_progress()
            attempts.write()
            run.end_attempt(FINISHED)
            print(f"finished: {run.results}", flush=True)
    return FINISHED


def load_sets_of(evaluation: Evaluation, *, check_files: bool = True) -> dict[str, Manifest]:
    """What an evaluation reads, by name. Raises UserError if a set is not what it should be."""
    names = [*evaluation.sets, *([evaluation.holdout] if evaluation.holdout else [])]
    sets = load_sets(evaluation.shards, names, check_files=check_files)
    for manifest in sets.values():
        check_set(manifest, allow_count_mismatch=evaluation.allow_count_mismatch)
    return sets


# --- the models -------------------------------------------------------------------------------------------------------


def _evaluate(evaluation: Evaluation, run: RunFolder, counter: _Counter, device: torch.device) -> dict[str, Any]:
    """Make the models, choose among them, and count: results.json as evaluation.py describes it."""
    make, sets, holdout = evaluation.make, list(evaluation.sets), evaluation.holdout
    more: dict[str, Any] = {}
    models: Candidates
    if make in ("nothing", "zero-shot"):
        paths = [str(run.final)] if make == "zero-shot" else list(evaluation.models)
        models, classes = _load(paths, device)
        rows: list[dict[str, Any]] = [{"name": make if make == "zero-shot" else path} for path in paths]
        counter.check(classes)
        counter.announce(sets)
    elif make == "wise-ft":
        mixture = _Mixture(evaluation.models, evaluation.alphas, device)
        counter.check(mixture.info.classes)
        models, rows = mixture, [{"name": f"α = {alpha:g}", "alpha": alpha} for alpha in evaluation.alphas]
        chosen = 0 if len(rows) == 1 else None
        counter.announce([*([holdout] if chosen is None and holdout else []), *sets])
        if chosen is None and holdout:
            scores = counter.count("alphas", holdout, models, len(rows)).scores()
            chosen = max(range(len(rows)), key=lambda i: scores[i].correct)
            more = {"chosen_on": holdout, "holdout": [score.top1 for score in scores]}
        if chosen is not None:
            more["chosen"] = chosen
            if counter.is_main_process:
                mixture.save(evaluation.alphas[chosen], run.final)
    else:
        ingredients = list(evaluation.models)
        if make == "greedy-soup":
            assert holdout is not None
            counter.announce([holdout] * len(ingredients) + sets)
            ingredients, more = _choose_ingredients(ingredients, holdout, counter, device)
        else:
            counter.announce(sets)
        model, info = _soup(ingredients)
        counter.check(info.classes)
        if counter.is_main_process:
            save_model(run.final, model, replace(info, provenance=f"{make} of {', '.join(ingredients)}"))
        models, rows = [(model.to(device), Normalise(info.mean, info.std).to(device))], [{"name": make}]
        more |= {"ingredients": ingredients, "chosen": 0}
    return {**_on_sets(sets, counter, models, rows), **more}


def _on_sets(names: Sequence[str], counter: _Counter, models: Candidates, rows: list[dict[str, Any]]) -> dict[str, Any]:
    counted = {name: counter.count("sets", name, models, len(rows), [row["name"] for row in rows]) for name in names}
    for i, row in enumerate(rows):
        row["sets"] = {name: counts.result(i, counter.classes(name)) for name, counts in counted.items()}
    about = {
        name: {"samples": counter.sets[name].num_samples, "classes": len(counter.answers[name].ids)} for name in names
    }
    return {"sets": about, "models": rows}


def _load(paths: Sequence[str], device: torch.device) -> tuple[list[tuple[Classifier, Normalise]], tuple[str, ...]]:
    """Models with one class list, which comes with them, and one input size; of any architecture."""
    loaded: list[tuple[Classifier, Normalise]] = []
    first: tuple[Classifier, ModelInfo] | None = None
    for path in paths:
        model, info = load_model(path)
        first = first or (model, info)
        if info.classes != first[1].classes:
            raise UserError(f"{path} and {paths[0]} differ in classes: they cannot be evaluated side by side.")
        if model.image_size != first[0].image_size:
            raise UserError(
                f"{path} takes images of {model.image_size} pixels, {paths[0]} of {first[0].image_size}: sets are read "
                "once for all models. Evaluate them in two commands."
            )
        loaded.append((model.to(device).eval().requires_grad_(False), Normalise(info.mean, info.std).to(device)))
    assert first is not None
    return loaded, first[1].classes


def _load_alike(paths: Sequence[str]) -> Iterator[tuple[Classifier, ModelInfo]]:
    """Models whose weights may be averaged: one architecture, one preprocessing, one class list."""
    first = None
    for path in paths:
        model, info = load_model(path)
        if first is not None:
            check_same_kind(info, first, path, than=paths[0])
        first = first or info
        yield model.eval().requires_grad_(False), info


class _Mixture:
    """WiSE-FT at each α: two models' weights on the device, and one that they are mixed into while it is asked for."""

    def __init__(self, paths: Sequence[str], alphas: Sequence[float], device: torch.device) -> None:
        if len(paths) != 2:
            raise UserError(f"WiSE-FT mixes two models, zero-shot and fine-tuned; there are {len(paths)}.")
        (zero, self.info), (fine, _) = _load_alike(paths)
        self._paths, self._alphas = paths, alphas
        self._zero, self._fine = zero.to(device).state_dict(), fine.to(device).state_dict()
        self._model = copy.deepcopy(zero)
        self._normalise = Normalise(self.info.mean, self.info.std).to(device)

    def __iter__(self) -> Iterator[tuple[Classifier, Normalise]]:
        for alpha in self._alphas:
            interpolate_into(self._model.state_dict(), self._zero, self._fine, alpha)
            yield self._model, self._normalise

    def save(self, alpha: float, path: Path) -> None:
        interpolate_into(self._model.state_dict(), self._zero, self._fine, alpha)
        provenance = f"WiSE-FT, α = {alpha:g}, of {' and '.join(self._paths)}"
        save_model(path, self._model, replace(self.info, provenance=provenance))


def _soup(paths: Sequence[str]) -> tuple[Classifier, ModelInfo]:
    """The average of models, on the CPU; one is in memory at a time."""
    kept: list[tuple[Classifier, ModelInfo]] = []

    def states() -> Iterator[dict[str, Tensor]]:
        for model, info in _load_alike(paths):
            if not kept:
                kept.append((copy.deepcopy(model), info))
            yield model.state_dict()

    mean = average(states())
    model, info = kept[0]
    model.load_state_dict(mean)
    return model, info


def _choose_ingredients(
    paths: list[str], holdout: str, counter: _Counter, device: torch.device
) -> tuple[list[str], dict[str, Any]]:
    """A greedy soup's ingredients, in the order they went in, and what was tried."""
    alike = list(_load_alike(paths))
    counter.check(alike[0][1].classes)
    normalise = Normalise(alike[0][1].mean, alike[0][1].std).to(device)
    alone = [(model.to(device), normalise) for model, _ in alike]
    scores = counter.count("ingredients", holdout, alone, len(alone), paths).scores()
    tried: list[dict[str, Any]] = []
    mixed = copy.deepcopy(alone[0][0])

    def score(numbers: list[int]) -> int:
        # On the CPU, as the soup itself will be made.
        mixed.load_state_dict(average({k: v.cpu() for k, v in alone[i][0].state_dict().items()} for i in numbers))
        stage = "soup of " + " ".join(map(str, numbers))
        [found] = counter.count(stage, holdout, [(mixed, normalise)], 1).scores()
        tried.append({"ingredients": [paths[i] for i in numbers], "top1": found.top1})
        return found.correct

    chosen = greedy_soup([one.correct for one in scores], score)
    return [paths[i] for i in chosen], {
        "chosen_on": holdout,
        "holdout": [one.top1 for one in scores],
        "tried": tried,
    }


def _make_zero_shot(evaluation: Evaluation, run: RunFolder, sets: dict[str, Manifest], place: Place) -> None:
    if run.final.exists():
        return
    if not sets:
        raise UserError("A zero-shot head is for the classes of a set: name at least one with --sets.")
    classes = next(iter(sets.values())).classes
    rows = run.head_rows
    model, info = initial_model(
        evaluation.architecture,
        evaluation.pretrained,
        None,
        classes,
        str(place.device),
        mean=evaluation.mean,
        std=evaluation.std,
        kept_rows=rows,
    )
    save_model(run.final, model, info)
    rows.unlink(missing_ok=True)


# --- counting ---------------------------------------------------------------------------------------------------------


class _Counter:
    """Counts of each stage and set, over all ranks; kept in RUN/progress.safetensors.

    images: how many have been counted, of how many there are to count (``announce``).
    """

    def __init__(
        self,
        evaluation: Evaluation,
        run: RunFolder,
        place: Place,
        sets: dict[str, Manifest],
        stop_request: StopRequest,
    ) -> None:
        self._evaluation, self._run, self._place, self._stop_request = evaluation, run, place, stop_request
        self.sets = sets
        self.answers = {name: answers_of(manifest).to(place.device) for name, manifest in sets.items()}
        self.is_main_process = place.rank == 0
        self._facts = json.dumps([files_of(evaluation), {name: m.digest for name, m in sets.items()}])
        progress = [self._read() if self.is_main_process else {}]
        dist.broadcast_object_list(progress)
        self._kept: dict[str, tuple[int, dict[str, Tensor]]] = progress[0]
        self.images = self._kept_images()
        self._kept_at = self._logged_at = time.monotonic()
        self._logged_images = self.images
        self._log = JsonLines(run.log)
        self._bar: tqdm | None = None
        if self.is_main_process:
            pace = 0.2 if sys.stderr.isatty() else 30
            self._bar = tqdm(unit="image", initial=self.images, dynamic_ncols=True, mininterval=pace)

    def announce(self, names: Sequence[str]) -> None:
        """What will be counted, at most: for the progress."""
        self._total = sum(self.sets[name].num_samples for name in names)
        if self._bar is not None:
            self._bar.total = self._total

    def check(self, classes: Sequence[str]) -> None:
        """Raises UserError if a set has another class list than the models."""
        for manifest in self.sets.values():
            check_classes(manifest, classes)

    def classes(self, name: str) -> list[str]:
        return [wnid for wnid, _ in self.sets[name].classes]

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def count(self, stage: str, name: str, models: Candidates, number: int, names: Sequence[str] = ()) -> Counts:
        """All ranks' counts of ``number`` models on a set.

        Args:
            stage: tells apart what is counted on one set. names: of the models, for an error.

        Raises:
            _Stopped: a stop was asked for on some rank; on all of them.
            UserError: the models' classes are not the set's, or logits are not finite.
        """
        manifest, answers, device = self.sets[name], self.answers[name], self._place.device
        size, world = self._evaluation.batch_size, self._place.world_size
        batches_in_all = -(-manifest.num_samples // size)
        key = f"{stage}: {name}"
        done, sofar = self._kept.get(key, (0, None))
        total = Counts(number, manifest.num_classes, device)
        if sofar is not None:
            total.load(sofar)
        if done < batches_in_all:
            fresh = Counts(number, manifest.num_classes, device)
            reducer = AsyncMetricReducer(device)
            if self._bar is not None:
                self._bar.set_description(name)
            restart_steps()
            for number, batch in enumerate(self._rounds(manifest, next(iter(models))[0], done)):
                beat("evaluating", number)
                if batch is not None:
                    images = batch.images.to(device, non_blocking=True)
                    labels = batch.labels.to(device, non_blocking=True)
                    for i, (model, normalise) in enumerate(models):
                        fresh.add(i, self._logits(model, normalise(images)), labels, answers)
                before, done = done, min(batches_in_all, done + world)
                self._advance(min(done * size, manifest.num_samples) - before * size, name)
                overdue = self.is_main_process and time.monotonic() - self._kept_at > KEEP_S
                reducer.add({"overdue": Sum(overdue), **stop_metrics(self._stop_request())})
                reducer.send(done)
                beat(WAITING)
                # What the ranks asked for a batch ago: nobody waits for the slowest, and all of them read the same.
                asked, keep = None, False
                for reduced in reducer.receive(before=done):
                    asked, keep = stop_of(reduced), bool(reduced.scalar("overdue"))
                if asked or keep or done == batches_in_all:
                    fresh.sum_over_ranks()
                    total.take(fresh)
                    self._keep(key, done, total)
                if asked and done < batches_in_all:
                    raise _Stopped(asked)
            reducer.receive()
            restart_steps()
            beat(PREPARING)
        for i, bad in enumerate(total.not_finite.tolist()):
            if bad:
                raise UserError(
                    f"{names[i] if names else 'A model'} gives logits that are not finite for {bad} of "
                    f"{manifest.num_samples} images of {name}: its weights are damaged, or too large for "
                    f"{self._evaluation.precision}. Try --precision fp32."
                )
        return total

    def _rounds(self, manifest: Manifest, model: Classifier, done: int) -> Iterator[Any]:
        """A batch a round, until no rank has one; None in a last round that has none for this rank."""
        size, world = self._evaluation.batch_size, self._place.world_size
        workers = self._evaluation.loader_workers
        batches = eval_batches(
            manifest,
            image_size=model.image_size,
            batch_size=size,
            rank=self._place.rank,
            world_size=world,
            loader_workers=self._place.loader_workers if workers is None else workers,
            start=done,
            pin_memory=self._place.device.type == "cuda",
        )
        for _ in range(done, -(-manifest.num_samples // size), world):
            yield next(batches, None)

    @torch.no_grad()
    def _logits(self, model: Classifier, pixels: Tensor) -> Tensor:
        with autocast(pixels.device, self._evaluation.precision):
            return model(pixels)[1]

    def _advance(self, images: int, name: str) -> None:
        """Say how far it is."""
        self.images += images
        if self._bar is None:
            return
        self._bar.update(images)
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
        """Keep what was counted; on a full disk that is a warning, and counted again if it has to be."""
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
            print(f"warning: {self._run.progress} cannot be written ({error}); counting goes on", flush=True)

    def _kept_images(self) -> int:
        return sum(int(counted["per_class"][0, :, 0].sum()) for _, counted in self._kept.values())

    def _read(self) -> dict[str, tuple[int, dict[str, Tensor]]]:
        """What an earlier start has kept; nothing, if it was counted on other models or sets, or is damaged.

        Raises:
            StorageUnavailable: it cannot be read.
        """
        path = self._run.progress
        try:
            data = patiently(lambda: read_bytes(path), str(path))
        except FileNotFoundError:
            return {}
        try:
            tensors = safetensors.torch.load(data)
            about = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])["__metadata__"]
            digest = about.pop("digest")
            if digest != _digest_of(tensors, about):
                raise ValueError("its digest is not that of its counts")
            if about["facts"] != self._facts:
                print("Models or sets are not what they were: all is counted anew.", flush=True)
                return {}
            return {
                key: (done, {name: tensors[f"{key}|{name}"] for name in Counts.NAMES})
                for key, done in json.loads(about["batches"]).items()
            }
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
            print(f"warning: {path} is not what was written ({error}): all is counted anew.", flush=True)
            return {}


def _digest_of(tensors: dict[str, Tensor], about: dict[str, str]) -> str:
    """sha256 of counts and of what they are of."""
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
