"""Reports of all ranks on bad samples: those that could not be read, and those of skipped steps."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cfmask.checkpoint.state import Skips
from cfmask.data.receipts import DataProgress
from cfmask.data.shards import Manifest
from cfmask.data.stream import BadSample, MicroBatch
from cfmask.errors import UserError
from cfmask.metrics import StepResult
from cfmask.recipe import Recipe
from cfmask.runs import RunFolder
from cfmask.runtime.jsonl import JsonLines
from cfmask.step import Metrics

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _MicroBatch:
    """A micro-batch of a step whose result is not known yet.

    keys: of the samples.
    finite: (N,) bool, on the device: whether a sample's outputs are finite.
    """

    keys: list[str]
    finite: Tensor


class SampleReports:
    """Collects this rank's bad samples and skipped steps until all ranks write them into the run folder. Lines that
    cannot be written, for example on a full disk, are written with the next ones."""

    def __init__(self, run: RunFolder, epoch_steps: int) -> None:
        self._epoch_steps = epoch_steps
        self._bad: list[BadSample] = []
        self._pending: dict[int, list[_MicroBatch]] = {}
        self._skipped: list[dict[str, Any]] = []
        self._bad_lines, self._skipped_lines = JsonLines(run.bad_samples), JsonLines(run.skipped_steps)

    def add(self, step: int, metrics: Metrics, batch: MicroBatch) -> None:
        """Keep a micro-batch of ``step`` until the step's result is known."""
        self._bad += batch.bad
        self._pending.setdefault(step, []).append(_MicroBatch(batch.keys, metrics.finite))

    def close(self, result: StepResult) -> None:
        """Drop a step's micro-batches. If the step was skipped, keep this rank's report on it; that waits for the
        device."""
        parts = self._pending.pop(result.step)
        if not result.skipped:
            return
        keys = [key for part in parts for key in part.keys]
        finite = torch.cat([part.finite for part in parts]).tolist()
        self._skipped.append(
            {
                "step": result.step,
                # As text: JSON has no nan.
                "loss": str(result.means["loss"]),
                "grad_norm": str(result.means["grad_norm"]),
                "not_finite": [key for key, good in zip(keys, finite, strict=True) if not good],
                "keys": keys,
            }
        )

    def write_bad_samples(self) -> None:
        """Append the bad samples of all ranks since the last call to bad_samples.jsonl. A collective."""
        found = _gather(self._bad)
        self._bad = []
        if found is None:
            return
        lines = [
            {"rank": rank, **asdict(bad), "step": bad.epoch * self._epoch_steps + bad.step + 1}
            for rank, of_rank in enumerate(found)
            for bad in of_rank
        ]
        self._bad_lines.extend(lines)
        for line in lines:
            logger.warning(
                f"step {line['step']}: {line['key'] or line['sample']} of {line['shard']} cannot be used "
                f"({line['reason']}); {line['substitute']} replaces it"
            )
        self._bad_lines.write()

    def write_skipped_steps(self) -> None:
        """Append the steps skipped since the last call to skipped_steps.jsonl, each with the samples whose outputs are
        not finite, or with the whole batch if there are none. A collective."""
        found = _gather(self._skipped)
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
            logger.warning(
                f"step {first['step']} is skipped: loss {first['loss']}, gradient norm {first['grad_norm']}; "
                f"{why}: {', '.join(lines[-1]['keys'][:8])}{' …' if len(lines[-1]['keys']) > 8 else ''}"
            )
        self._skipped_lines.extend(lines)
        self._skipped_lines.write()

    @property
    def files(self) -> tuple[JsonLines, JsonLines]:
        """The files that rank 0 writes. Lines may be pending."""
        return self._bad_lines, self._skipped_lines


def too_many_skipped_steps(
    skips: Skips, step: int, epoch_steps: int, recipe: Recipe, run: RunFolder
) -> FloatingPointError:
    """The error of a run whose latest steps up to ``step`` were skipped: more than the recipe allows, or the whole last
    epoch of a phase."""
    allowed = recipe.optim.max_skipped_steps
    if skips.in_a_row > allowed:
        limit = f"--max-skipped-steps allows {allowed}"
    else:
        limit = f"an epoch has {epoch_steps} steps, so the last epoch trained nothing"
    return FloatingPointError(
        f"Loss or gradients of {skips.in_a_row} steps in a row were not finite, the last of them step {step}; {limit}. "
        f"{run.skipped_steps} names the samples. None of these steps changed a weight; the last checkpoint in "
        f"{run.checkpoints} is intact. A lower --lr, or --precision fp32, may help."
    )


def too_many_bad_samples(
    progress: DataProgress, epoch: int, limit: int, step: int, manifest: Manifest, recipe: Recipe, run: RunFolder
) -> UserError:
    """The error of a run with a checkpoint of ``step`` if more than ``limit`` samples of an epoch are bad."""
    return UserError(
        f"{progress.bad_in_epoch} samples of epoch {epoch + 1} could not be read, more than the {limit} that "
        f"--max-bad-share {recipe.data.max_bad_share:g} allows. {run.bad_samples} lists them with the reasons. Repair "
        f"the set ({manifest.root}) and resume the run; it continues from step {step}."
    )


def _gather(own: list[Any]) -> list[Any] | None:
    """Each rank's list, on rank 0; None on the others."""
    found: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(own, found)
    return found
