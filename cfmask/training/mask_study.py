"""The mask study (appendix A.2 of the paper): how far masks fall on objects, measured during training.

``MaskStudy`` adds a metric to each micro-batch; ``MaskStudyLog`` sums it on rank 0 and logs the sums of each epoch.
"""

from __future__ import annotations

import functools
import logging
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cfmask.data.segmentation import ALL, Masks, ObjectReader, categories, class_groups, open_masks
from cfmask.data.shards import Manifest
from cfmask.data.stream import MicroBatch
from cfmask.errors import UserError
from cfmask.masking.validation import THRESHOLDS, Tally, add_up, tally
from cfmask.metric_logger import MetricLogger
from cfmask.metrics import Metric, StepResult, Sum
from cfmask.models.tower import Classifier
from cfmask.runs import RunFolder
from cfmask.runtime.jsonl import JsonLines, read_lines
from cfmask.step import Metrics

logger = logging.getLogger(__name__)

_NAME = "overlap"


@dataclass(frozen=True)
class MaskStudy:
    """The measurement, for groups of classes."""

    reader: ObjectReader
    """Reads where the objects are."""
    groups: tuple[str, ...]
    """Names of the groups."""
    members: Tensor
    """(classes, groups) bool, on the device: which class belongs to which group."""

    @classmethod
    def of(cls, segmentation: str, manifest: Manifest, model: Classifier, device: torch.device) -> MaskStudy:
        """The study of a training set with the masks in ``segmentation``.

        Raises:
            UserError: the masks cannot be read, or no sample of the groups has one.
        """
        groups = class_groups(manifest.classes)
        if len(groups) > 1:
            del groups[ALL]  # the sum of the others
        shown = categories(manifest.classes)
        masks, wanted = open_masks(segmentation), sorted(frozenset().union(*groups.values()))
        if not _has_any(masks, manifest, wanted):
            raise UserError(
                f"--segmentation {segmentation} has no mask of any sample of {', '.join(groups)} in {manifest.root}, "
                "so nothing would be measured. In training, masks are found only by the keys of samples: name the "
                "masks by key (tools/validate_masks.py also finds them by file name). COCO annotations fit shards "
                "whose keys are COCO's file names without extension."
            )
        reader = ObjectReader(
            masks=masks,
            classes={i: shown[i] for i in wanted},
            size=model.image_size,
            patch_size=model.patch_size,
        )
        members = torch.tensor([[i in ids for ids in groups.values()] for i in range(manifest.num_classes)])
        return cls(reader, tuple(groups), members.to(device))

    def metrics(self, metrics: Metrics, batch: MicroBatch) -> dict[str, Metric]:
        """The Tally of each group in a micro-batch, (groups, 3 T + 2). Does not wait for the device."""
        assert metrics.overlap is not None and batch.objects is not None
        device = self.members.device
        chosen = self.members[batch.labels.to(device, non_blocking=True)]
        # ``known`` is computed on the device: only tensors in page-locked memory are moved without waiting.
        chosen = chosen & batch.objects.map(lambda tensor: tensor.to(device, non_blocking=True)).known[:, None]
        return {_NAME: Sum(torch.stack([tally(metrics.overlap, rows).to_vector() for rows in chosen.T]))}

    def tallies(self, values: Sequence[float]) -> dict[str, Tally]:
        """Tallies by group, from the concatenated vectors of ``metrics``."""
        size = len(values) // len(self.groups)
        return {name: Tally.from_vector(values[i * size : (i + 1) * size]) for i, name in enumerate(self.groups)}


def _has_any(masks: Masks, manifest: Manifest, wanted: Sequence[int]) -> bool:
    """Whether any sample of these class ids has a mask. Usually the first shard has one."""
    indexes = map(manifest.open_index, manifest.shards)
    return any(masks.has(key.decode()) for i in indexes for key in i.keys[np.isin(i.labels, wanted)].tolist())


class MaskStudyLog:
    """Sums of a study, on rank 0: a line of overlaps.jsonl for each checkpoint, and a line of the log for each epoch.

    Lines are written only with checkpoints, so that a resumed run repeats none.

    Args:
        step: from which training resumes, or 0.
    """

    def __init__(self, study: MaskStudy, run: RunFolder, logger: MetricLogger, step: int) -> None:
        self._study, self._logger, self._step = study, logger, step
        self._lines = JsonLines(run.overlaps)
        self._since_checkpoint: dict[str, Tally] = {}

    def add_step(self, result: StepResult) -> None:
        """Add a step, unless it was skipped."""
        self._step = result.step
        if not result.skipped:
            tallies = self._study.tallies(result.reduced.values[_NAME])
            self._since_checkpoint = add_up([self._since_checkpoint, tallies])

    def end_epoch(self, step: int, epoch: int, *, since: int) -> None:
        """Log the sums of an epoch: the steps after ``since``, up to ``step``."""
        try:
            written = read_lines(self._lines.path)
        except OSError as error:
            logger.warning(f"{self._lines.path} cannot be read ({error.strerror}): epoch {epoch} is not summed up")
            return
        lines = [line for line in [*written, *self._lines.pending] if since < line["step"]]
        of_lines = [{name: Tally.from_lists(t) for name, t in line["tallies"].items()} for line in lines]
        total = add_up([*of_lines, self._since_checkpoint])
        if len(total) > 1:
            total[ALL] = functools.reduce(operator.add, total.values())
        result = {name: sums.to_result() for name, sums in total.items()}
        self._logger.add_line({"step": step, "epoch": epoch, "thresholds": THRESHOLDS, _NAME: result})
        for name, of_group in result.items():
            best = max(range(len(THRESHOLDS)), key=lambda i: of_group["iou"][i] or 0.0)
            iou = of_group["iou"][best]
            found = f"IoU up to {100 * iou:.1f} % at {THRESHOLDS[best]:g}" if iou is not None else "no object seen"
            logger.info(f"epoch {epoch}: masks on objects, {name}: {of_group['images']} images, {found}")

    def flush(self) -> None:
        """Write the sums since the last call. Call it before each checkpoint."""
        if self._since_checkpoint:
            tallies = {name: sums.to_lists() for name, sums in self._since_checkpoint.items()}
            self._lines.add({"step": self._step, "tallies": tallies})
            self._since_checkpoint = {}
        self._lines.write()
