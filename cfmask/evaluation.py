"""The Evaluation: what a job makes of models, and on which sets it counts their right answers.

An evaluation has a run folder like a training run (runs.py), with evaluation.json in recipe.json's place:

    RUN/evaluation.json         what is evaluated; a folder belongs to one evaluation
    RUN/progress.safetensors    counts so far, so that a job that comes back goes on where it was stopped
    RUN/model.safetensors       the model that was made: a zero-shot head, the chosen α, a soup
    RUN/results.json            at the end:

    {"evaluation": {…},                        evaluation.json's content
     "sets": {"imagenet-r": {"samples": 30000, "classes": 200}},        classes: among which the answer is looked for
     "models": [{"name": "α = 0.5", "alpha": 0.5, "sets": {"imagenet-r": {
         "correct": …, "total": …, "top1": …,                           top1 in percent
         "interval": [low, high],                                       95 %, Wilson's
         "ece": …, "calibration": [[samples, correct, sum of confidences], …],   by 15 bins of the confidence
         "per_class": {"n01443537": [correct, total], …}}}}],
     "checkpoints": [{"file": "RUN/checkpoints/step-00024810/model.safetensors", "run": "RUN", "step": 24810,
         "chosen": "best on holdout", "chosen_on": "holdout", "top1": 76.3}],    of each model that was taken
     "chosen": 1, "chosen_on": "holdout",      row of "models" that model.safetensors is, and the set that chose it
     "ingredients": ["…"]}                     of a soup, in the order they went in

Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfmask.errors import UserError
from cfmask.record import Record
from cfmask.runtime.patience import patiently

MAKES = ("nothing", "zero-shot", "wise-ft", "uniform-soup", "greedy-soup")


@dataclass(frozen=True)
class Evaluation(Record):
    """What an evaluation does. All paths are absolute.

    make: nothing: ``models`` are evaluated as they are. zero-shot: ``architecture`` with the weights ``pretrained``
        (and ``mean`` and ``std``, as in recipe.Model) gets a zero-shot head for the classes of the first set. wise-ft:
        ``models`` are ZERO and FINE, mixed at each of ``alphas``. uniform-soup, greedy-soup: ``models`` are averaged,
        all of them, or each that does not make accuracy on ``holdout`` worse, best first.
    models: what runs.find_model takes, when the evaluation begins: RUN/checkpoints/best.json is the best checkpoint of
        a run that may still have to be trained.
    shards, sets: folders or URLs of sets (shards.find_set); sets may be empty where something is made.
    holdout: the set that chooses among several alphas, or a greedy soup's ingredients. Never a test set.
    batch_size: images that go through a model together. Part of the result's last bits, not of a rank: batches are the
        same whatever the number of ranks.
    precision: fp32, tf32 or bf16.
    loader_workers: threads that read; None: the rank's cores less one.
    allow_count_mismatch: take a set that is known and has other counts than it should.
    """

    make: str = "nothing"
    models: tuple[str, ...] = ()
    alphas: tuple[float, ...] = ()
    architecture: str = ""
    pretrained: str = ""
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    shards: str = ""
    sets: tuple[str, ...] = ()
    holdout: str | None = None
    batch_size: int = 256
    precision: str = "fp32"
    loader_workers: int | None = None
    allow_count_mismatch: bool = False

    def checked(self) -> Evaluation:
        """This evaluation, if it makes sense.

        Raises:
            UserError: it contradicts itself, or would do nothing.
        """
        if self.make not in MAKES:
            raise UserError(f"There is no making of {self.make!r}; there is {', '.join(MAKES)}.")
        if self.make == "nothing" and not self.sets:
            raise UserError("Nothing to do: name the sets to evaluate on with --sets.")
        if self.make == "nothing" and not self.models:
            raise UserError("Nothing to do: name the models to evaluate.")
        if (self.sets or self.holdout or self.make == "zero-shot") and not self.shards:
            raise UserError("--shards is missing: the folder (or URL) that holds the sets.")
        for what, names in (("--sets", self.sets), ("MODEL", self.models), ("--alphas", self.alphas)):
            if len(set(names)) != len(names):
                raise UserError(f"{what} names one of them twice: {' '.join(map(str, names))}.")
        if self.make == "wise-ft" and not self.alphas:
            raise UserError("--alphas is missing: the shares of the fine-tuned model, such as 0 0.5 1.")
        if not all(0 <= alpha <= 1 for alpha in self.alphas):
            raise UserError(f"--alphas must lie in 0…1, not {' '.join(map(str, self.alphas))}.")
        if self.make == "greedy-soup" and self.holdout is None:
            raise UserError("A greedy soup is chosen on a held-out set: name it with --holdout. (Not a test set.)")
        if self.holdout is not None and self.holdout in self.sets:
            raise UserError(
                f"--holdout {self.holdout} is one of the --sets: a set that chooses a model cannot test it as well."
            )
        if self.batch_size < 1:
            raise UserError(f"--batch-size is {self.batch_size}; it must be at least 1.")
        return self

    @classmethod
    def from_json(cls, text: str) -> Evaluation:
        """The inverse of ``to_json``.

        Raises:
            UserError: not an evaluation, or one with settings that this version does not know.
        """
        try:
            values: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in json.loads(text).items()}
            return cls(**values)
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"This is not an evaluation as cfmask writes it ({error}).") from error


def files_of(evaluation: Evaluation) -> dict[str, list[int]]:
    """Size and time of the model files that an evaluation reads. If any of these change, its counts are invalid.

    Raises:
        StorageUnavailable: a file cannot be looked at.
    """
    paths = (*evaluation.models, evaluation.pretrained)
    stamps = {path: patiently(functools.partial(_stamp, path), path) for path in paths}
    return {path: stamp for path, stamp in stamps.items() if stamp is not None}


def is_of_other_models(results: Mapping[str, Any]) -> bool:
    """Whether models that were evaluated have been written anew since. One that is gone, or cannot be looked at, is as
    it was.

    Args:
        results: a results.json.
    """
    for path, evaluated in results.get("of", {}).items():
        with contextlib.suppress(OSError):
            if _stamp(path) not in (None, evaluated):
                return True
    return False


def _stamp(path: str) -> list[int] | None:
    """Size and time of a file; None if there is none. Unlike os.path.isfile, raises OSError where that is unknown."""
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return [status.st_size, status.st_mtime_ns] if stat.S_ISREG(status.st_mode) else None


def load_evaluation(path: Path) -> Evaluation:
    """Raises UserError if it cannot be read."""
    try:
        return Evaluation.from_json(patiently(path.read_text, str(path)))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
