"""The validation of masks (appendix A.2 of the paper): models' CAM masks beside segmentation masks, over a whole set.

A set is gone through chunk by chunk. What a chunk gives is a line of parts.jsonl, behind a line with all that decides
the numbers: a validation that was stopped resumes behind its last line, and one of anything else is refused.
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

from cfmask.data.segmented import Chunk, Segmented, SegmentedSet
from cfmask.errors import UserError
from cfmask.files import sha256_of
from cfmask.masking.cam import build_cam
from cfmask.masking.fills import OBJECT
from cfmask.masking.validation import Tally, add_up, coverage, mask_rates, masks_at, tally
from cfmask.models.head import ModelInfo
from cfmask.models.tower import Classifier, Normalise
from cfmask.recipe import Method, Recipe
from cfmask.runs import find_model
from cfmask.runtime.jsonl import append_lines, read_lines
from cfmask.runtime.progress import progress_bar

Tallies = list[dict[str, Tally]]
"""By model, by group."""


@dataclass(frozen=True)
class Part:
    """What a chunk of samples gave.

    chunk: its name. tallies: none if no sample of it has a mask. missing: keys of samples without a mask.
    """

    chunk: str
    tallies: Tallies
    missing: list[str]

    def to_line(self) -> dict[str, Any]:
        tallies = [{group: t.to_lists() for group, t in of_model.items()} for of_model in self.tallies]
        return {"chunk": self.chunk, "missing": self.missing, "tallies": tallies}

    @classmethod
    def from_line(cls, line: dict[str, Any]) -> Part:
        tallies = [{group: Tally.from_lists(t) for group, t in of_model.items()} for of_model in line["tallies"]]
        return cls(line["chunk"], tallies, line["missing"])


class Validation:
    """Models, a set with its masks, and what is measured.

    Args:
        paths: of the models.
        methods: of each model: its mask and CAM.
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
        """CAM (N, P) of each sample's class, and the classes (N,): of several that a sample may be of, the one that the
        model finds most probable."""
        cam_hook = build_cam(method)
        assert cam_hook is not None
        images = torch.stack([sample.image for sample in samples]).to(self._device)
        # The pixels ask for a gradient and the weights do not, so nothing is kept for theirs.
        logits = model.classify(model.encode(self._normalise(images).requires_grad_(), cam=cam_hook))
        possible = torch.zeros(logits.shape, dtype=torch.bool)
        for row, sample in zip(possible, samples, strict=True):
            row[list(sample.classes)] = True
        classes = logits.detach().masked_fill(~possible.to(self._device), -torch.inf).argmax(1)
        return cam_hook.compute(logits.gather(1, classes[:, None]).squeeze(1)), classes

    def part(self, chunk: Chunk, bar: tqdm) -> Part:
        """Go through one chunk's samples."""
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
        # All of the classes that a sample may be of are in a group, or none is.
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
        """What decides the numbers: parts of two validations can be put together only if all of it is the same."""
        return {
            "models": [sha256_of(find_model(path)) for path in self.paths],
            "cams": [[m.mask, m.cam, m.first_block] for m in self.methods],
            "images or masks": self.segmented.digest,
            "groups": {name: sorted(ids) for name, ids in self.groups.items()},
            "thresholds": list(self.thresholds),
        }

    def carry_out(self, record: Path, *, allow_missing: bool) -> list[Part]:
        """Go through what is not in ``record`` yet, and add it. All parts, in order.

        Raises:
            UserError: the record is of another validation; samples without a mask, unless that is allowed; none that
                has one.
            OSError: the record cannot be read or written.
        """
        parts = {part.chunk: part for part in _claim(record, self.identity())}
        chunks = self.segmented.chunks
        there = sum(len(chunk.ids) for chunk in chunks if chunk.name in parts)
        total = sum(len(chunk.ids) for chunk in chunks)
        with progress_bar(total=total, initial=there, unit="image", desc="masks") as bar:
            for chunk in chunks:
                if chunk.name in parts:
                    continue
                part = self.part(chunk, bar)
                if part.missing and not allow_missing:
                    raise UserError(
                        f"{len(part.missing)} of {len(chunk.ids)} samples of {chunk.place} have no mask, "
                        f"{part.missing[0]} for one. A mask is named by its sample's key, or like the file that the "
                        f"image was; a name that is there twice names none. --allow-missing-masks leaves such samples "
                        f"out, and says how many."
                    )
                append_lines(record, [part.to_line()])
                parts[chunk.name] = part
        if not any(part.tallies for part in parts.values()):
            raise UserError(f"None of the {total} samples has a mask.")
        return [parts[chunk.name] for chunk in chunks]


def method_to_validate(
    recorded: Method | None, *, mask: str | None, cam: str | None, first_block: int | None
) -> Method:
    """What is asked for, else what the model's run did (``recorded``), else what the paper does."""
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
    """The parts that are done; begins the file if there is none.

    Raises:
        UserError: it is of another validation.
    """
    lines = read_lines(record)
    if not lines:
        append_lines(record, [asked])
        return []
    begun, *parts = lines
    if begun != asked:
        other = ", ".join(name for name in asked if begun.get(name) != asked[name])
        raise UserError(
            f"{record.parent} holds a validation of other {other}. Choose another --out, or delete {record} if it is "
            f"not needed."
        )
    return [Part.from_line(line) for line in parts]
