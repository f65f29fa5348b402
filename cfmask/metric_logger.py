"""The metrics of a training run: log.jsonl, receipts.jsonl, TensorBoard curves, and log records."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from cfmask.checkpoint.state import Skips
from cfmask.counting import Score
from cfmask.data import receipts
from cfmask.log_lines import curves_of, straggler_of
from cfmask.metrics import StepResult
from cfmask.optim import Phase, lr_and_betas
from cfmask.recipe import Recipe
from cfmask.runs import RunFolder
from cfmask.runtime.jsonl import JsonLines
from cfmask.runtime.times import duration

logger = logging.getLogger(__name__)


class MetricLogger:
    """Writes the metrics of a run, on rank 0. A file that cannot be written does not end the run: its lines are written
    later, and curves end with a warning.

    Args:
        step: from which training resumes, or 0. Curves are cut after it.
        schedule: the phases of the run.
        nodes: node of each rank.
        also: other files of the run whose pending lines ``flush`` writes.
    """

    def __init__(
        self,
        recipe: Recipe,
        run: RunFolder,
        step: int,
        schedule: tuple[Phase, ...],
        nodes: Sequence[str] = (),
        *,
        also: Sequence[JsonLines] = (),
    ) -> None:
        self._every, self._total = recipe.run.log_steps, schedule[-1].end
        self._optim, self._schedule, self._nodes = recipe.optim, schedule, nodes
        self._board: SummaryWriter | None = None
        try:
            self._board = SummaryWriter(str(run.root / "tensorboard"), purge_step=step + 1)
        except OSError as error:
            self._end_curves(error)
        self._log, self._receipts = JsonLines(run.log), JsonLines(run.receipts)
        self._also = also
        self._window: list[StepResult] = []
        self._since = time.monotonic()

    def add_step(self, result: StepResult, skips: Skips) -> None:
        """Add a step; log averages every ``log_steps`` steps.

        Args:
            skips: skipped steps up to this one.
        """
        self._window.append(result)
        self._receipts.add({"step": result.step, "samples": result.samples, "receipt": receipts.as_hex(result.receipt)})
        if result.step % self._every and result.step != self._total:
            return
        samples_per_s = sum(r.samples for r in self._window) / (result.time - self._since)
        taken = [r.means for r in self._window if not r.skipped]
        means = {name: sum(m[name] for m in taken) / len(taken) for name in result.means} if taken else {}
        eta = (self._total - result.step) * result.samples / samples_per_s
        phase = next(p for p in self._schedule if result.step <= p.end)
        line: dict[str, Any] = {
            "step": result.step,
            "total_steps": self._total,
            **means,
            "lr": lr_and_betas(result.step - 1, phase, self._optim).lr,
            "skipped_steps": skips.total,
            "samples_per_s": samples_per_s,
            "eta_s": eta,
        }
        straggler = ""
        if result.rank_seconds:
            slowest = max(range(len(result.rank_seconds)), key=result.rank_seconds.__getitem__)
            line |= {
                "slowest_rank": slowest,
                "slowest_rank_node": self._nodes[slowest] if self._nodes else "",
                "slowest_rank_s": result.rank_seconds[slowest],
                "median_rank_s": statistics.median_low(result.rank_seconds),
            }
            straggler = straggler_of(line) or ""
        self.add_line(line)
        losses = " ".join(f"{name} {means[name]:.5g}" for name in ("loss", "ce", "kd", "mse") if means.get(name))
        logger.info(
            f"step {result.step}/{self._total} "
            + (f"{losses} accuracy {means['accuracy']:.1f} % " if means else "no step taken ")
            + (f"skipped {skips.total} " if skips.total else "")
            + f"{samples_per_s:.0f} samples/s ETA {duration(eta)}"
            + (f"; slowest: {straggler}" if straggler else "")
        )
        self._window.clear()
        self._since = result.time

    def add_scores(self, step: int, epoch: float, scores: Mapping[str, Score], *, seconds: float) -> None:
        """Log an evaluation.

        Args:
            epoch: passes over the training set so far.
            seconds: duration of the evaluation, which is excluded from the training rate.
        """
        top1 = {name: score.top1 for name, score in scores.items()}
        passes = int(epoch) if epoch == int(epoch) else epoch
        self.add_line({"step": step, "epoch": passes, "eval": top1})
        logger.info(f"epoch {epoch:.4g}: " + ", ".join(f"{name} {value:.2f} %" for name, value in top1.items()))
        self._since += seconds

    def add_line(self, line: dict[str, Any]) -> None:
        """Write a line of log.jsonl and its points in TensorBoard (``curves_of``)."""
        self._log.add(line)
        self._log.write()
        self._draw(curves_of(line), line["step"])

    def flush(self) -> None:
        """Write pending lines. Called before a checkpoint, because a resumed run logs only later steps again."""
        for file in (self._receipts, self._log, *self._also):
            file.write()
        if self._board is not None:
            try:
                self._board.flush()
            except OSError as error:
                self._end_curves(error)

    def _draw(self, curves: Mapping[str, float], step: int) -> None:
        if self._board is None:
            return
        try:
            for name, value in curves.items():
                self._board.add_scalar(name, value, step)
        except OSError as error:
            self._end_curves(error)

    def _end_curves(self, error: OSError) -> None:
        self._board = None
        logger.warning(f"TensorBoard curves cannot be written ({error.strerror}) and end here")
