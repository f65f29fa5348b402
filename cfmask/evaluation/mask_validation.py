"""The validation of masks (appendix A.2 of the paper): CAM masks of models against segmentation masks, over a set.

The set is processed in chunks. parts.jsonl begins with a line that identifies the validation, followed by a line of
results for each chunk. An interrupted validation is resumed after its last line; another validation is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from cfmask.data.coco import CocoMasks
from cfmask.data.segmentation import Masks, class_groups
from cfmask.data.segmented import Chunk, Segmented, SegmentedPhotos, SegmentedSet, SegmentedShards
from cfmask.data.shards import load_sets
from cfmask.data.stream import check_image_size
from cfmask.errors import UserError
from cfmask.evaluation.checks import check_classes
from cfmask.masking.cam import build_cam
from cfmask.masking.fills import OBJECT
from cfmask.masking.validation import Tally, add_up, coverage, mask_rates, masks_at, tally
from cfmask.models.head import ModelInfo
from cfmask.models.tower import Classifier, Normalise
from cfmask.recipe import Method, Recipe
from cfmask.run_search import find_model
from cfmask.runtime.files import sha256_of
from cfmask.runtime.jsonl import append_lines, read_lines
from cfmask.runtime.progress import progress_bar

Tallies = list[dict[str, Tally]]
"""For each model, by group."""


@dataclass(frozen=True)
class Part:
    """Results of a chunk."""

    chunk: str
    """Its name."""
    tallies: Tallies
    """Empty if no sample has a mask."""
    missing: list[str]
    """Keys of samples without a mask."""

    def to_line(self) -> dict[str, Any]:
        tallies = [{group: t.to_lists() for group, t in of_model.items()} for of_model in self.tallies]
        return {"chunk": self.chunk, "missing": self.missing, "tallies": tallies}

    @classmethod
    def from_line(cls, line: dict[str, Any]) -> Part:
        tallies = [{group: Tally.from_lists(t) for group, t in of_model.items()} for of_model in line["tallies"]]
        return cls(line["chunk"], tallies, line["missing"])


class Validation:
    """A validation of models on a set.

    Args:
        paths: of the models.
        methods: mask and CAM of each model.
        groups: class ids by group.
        thresholds: of the CAM.
    """

    def __init__(
        self,
        paths: Sequence[str],
        models: Sequence[Classifier],
        methods: Sequence[Method],
        info: ModelInfo,
        segmented: SegmentedSet,
        groups: Mapping[str, frozenset[int]],
        thresholds: Sequence[float],
        *,
        device: str,
        batch_size: int,
    ) -> None:
        self.paths, self.methods, self.segmented = paths, methods, segmented
        self.groups, self.thresholds = groups, thresholds
        self.models = [model.to(device).eval().requires_grad_(False) for model in models]
        self._normalise = Normalise(info.mean, info.std).to(device)
        self._device, self._batch_size = device, batch_size

    def relevance(self, model: Classifier, method: Method, samples: Sequence[Segmented]) -> tuple[Tensor, Tensor]:
        """The CAM (N, P) of each sample's class, and the classes (N,). If a sample has several possible classes, the
        model's most probable one is used."""
        cam_hook = build_cam(method)
        assert cam_hook is not None
        images = torch.stack([sample.image for sample in samples]).to(self._device)
        # Only pixels require a gradient, so nothing is kept for gradients of weights.
        logits = model.classify(model.encode(self._normalise(images).requires_grad_(), cam=cam_hook))
        possible = torch.zeros(logits.shape, dtype=torch.bool)
        for row, sample in zip(possible, samples, strict=True):
            row[list(sample.classes)] = True
        classes = logits.detach().masked_fill(~possible.to(self._device), -torch.inf).argmax(1)
        return cam_hook.compute(logits.gather(1, classes[:, None]).squeeze(1)), classes

    def part(self, chunk: Chunk, bar: tqdm) -> Part:
        """The results of a chunk."""
        batches: list[Tallies] = []
        missing: list[str] = []
        batch: list[Segmented] = []
        for sample in self.segmented.samples(chunk.ids):
            if sample.mask is None:
                missing.append(sample.key)
            else:
                batch.append(sample)
            if len(batch) == self._batch_size:
                batches.append(self._tallies(batch))
                batch = []
            bar.update()
        if batch:
            batches.append(self._tallies(batch))
        return Part(chunk.name, [add_up(of_model) for of_model in zip(*batches, strict=True)], missing)

    def _tallies(self, batch: Sequence[Segmented]) -> Tallies:
        segmentation = torch.stack([s.mask for s in batch if s.mask is not None]).to(self._device)
        # A group has all possible classes of a sample or none.
        labels = np.array([sample.classes[0] for sample in batch])
        chosen = {
            group: torch.from_numpy(np.isin(labels, list(classes))).to(self._device)
            for group, classes in self.groups.items()
        }
        found: Tallies = []
        for model, method in zip(self.models, self.methods, strict=True):
            cam, _ = self.relevance(model, method, batch)
            masks = masks_at(cam, self.thresholds, method.mask or OBJECT)
            of_images = mask_rates(masks, coverage(segmentation, model.patch_size))
            found.append({group: tally(of_images, rows) for group, rows in chosen.items()})
        return found

    def identity(self) -> dict[str, Any]:
        """Everything that decides the results: only parts with equal identities may be combined."""
        return {
            "models": [sha256_of(find_model(path)) for path in self.paths],
            "cams": [[m.mask, m.cam, m.first_block] for m in self.methods],
            "images or masks": self.segmented.digest,
            "groups": {name: sorted(ids) for name, ids in self.groups.items()},
            "thresholds": list(self.thresholds),
        }

    def carry_out(self, record: Path, *, allow_missing: bool) -> list[Part]:
        """Compute the parts that are not in ``record`` yet, and add them to it. Returns all parts, in order.

        Raises:
            UserError: the record of another validation; samples without a mask, unless they are allowed; or no sample
                with a mask.
            OSError: the record cannot be read or written.
        """
        parts = {part.chunk: part for part in _claim(record, self.identity())}
        chunks = self.segmented.chunks
        there = sum(len(chunk.ids) for chunk in chunks if chunk.name in parts)
        total = sum(len(chunk.ids) for chunk in chunks)
        with progress_bar(total=total, initial=there, unit=" images", desc="masks") as bar:
            for chunk in chunks:
                if chunk.name in parts:
                    continue
                part = self.part(chunk, bar)
                if part.missing and not allow_missing:
                    raise UserError(
                        f"{len(part.missing)} of {len(chunk.ids)} samples of {chunk.place} have no mask, for example "
                        f"{part.missing[0]}. Name a mask by the key of its sample, or as the original file of its "
                        "image; names must be unique. --allow-missing-masks leaves out such samples and reports their "
                        "number."
                    )
                append_lines(record, [part.to_line()])
                parts[chunk.name] = part
        if not any(part.tallies for part in parts.values()):
            raise UserError(f"None of the {total} samples has a mask.")
        return [parts[chunk.name] for chunk in chunks]


def open_images(
    info: ModelInfo,
    image_size: int,
    masks: Masks,
    groups: Sequence[str] | None,
    *,
    shards: tuple[str, str] | None,
    photos: Path | None,
    threads: int,
    allow_missing: bool,
) -> tuple[SegmentedSet, dict[str, frozenset[int]]]:
    """The images with their masks, and class ids by group: of ``shards`` (a place and a set), else photographs of COCO
    annotations.

    Raises:
        UserError: classes that are not the model's, another image size, or photographs without COCO annotations.
    """
    how: dict[str, Any] = {"image_size": image_size, "threads": threads}
    if shards is not None:
        where, name = shards
        [manifest] = load_sets(where, [name]).values()
        check_classes(manifest, info.classes)
        check_image_size(manifest, image_size)
        found = class_groups(manifest.classes, groups)
        return SegmentedShards(manifest, masks, wanted=frozenset().union(*found.values()), **how), found
    assert photos is not None
    if not isinstance(masks, CocoMasks):
        raise UserError("--images needs COCO annotations (.json), and --segmentation names no such file (.json).")
    classes = list(zip(info.classes, info.class_names or info.classes, strict=True))
    found = class_groups(classes, groups)
    return SegmentedPhotos(masks, photos, classes, found, allow_missing=allow_missing, **how), found


def method_to_validate(
    recorded: Method | None, *, mask: str | None, cam: str | None, first_block: int | None
) -> Method:
    """The mask and CAM that are given; else those of the model's run (``recorded``); else those of the paper."""
    if recorded is None or not recorded.by_cam:
        recorded = Recipe().resolved().method
    mask, cam = mask or recorded.mask, cam or recorded.cam
    if first_block is None and cam == recorded.cam:
        first_block = recorded.first_block
    method = Method(
        mask=mask,
        fill=recorded.fill,
        threshold=recorded.threshold if mask == recorded.mask else None,
        cam=cam,
        first_block=first_block,
    )
    return Recipe(method=method).resolved().method


def _claim(record: Path, asked: dict[str, Any]) -> list[Part]:
    """The parts in a record, which is created if it is missing. Raises UserError if it is that of another
    validation."""
    lines = read_lines(record)
    if not lines:
        append_lines(record, [asked])
        return []
    begun, *parts = lines
    if begun != asked:
        other = ", ".join(name for name in asked if begun.get(name) != asked[name])
        raise UserError(
            f"{record.parent} holds a validation of other {other}. Choose another --out, or delete {record} if it is "
            "not needed."
        )
    return [Part.from_line(line) for line in parts]
