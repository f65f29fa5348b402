"""What an evaluation does: one class for each kind of evaluation.

    Evaluation      models as they are
    ZeroShot        a model with a zero-shot head, which is built first
    WiseFT          mixtures of a zero-shot and a fine-tuned model
    UniformSoup     the average of all models
    GreedySoup      the average of those models that help on a held-out set

An evaluation has a run folder like a training run (runs.py), with evaluation.json in place of recipe.json:

    RUN/evaluation.json         what is evaluated; a folder belongs to one evaluation
    RUN/progress.safetensors    counts so far, from which an interrupted evaluation resumes
    RUN/model.safetensors       the resulting model: with a zero-shot head, at the chosen α, or a soup
    RUN/results.json            written at the end:

    {"evaluation": {…},                        content of evaluation.json
     "of": {"RUN/…/model.safetensors": [size, time]},                   each model file: bytes, nanoseconds
     "sets": {"imagenet-r": {"samples": 30000, "classes": 200}},        classes: number that may be predicted
     "models": [{"name": "α = 0.5", "alpha": 0.5, "sets": {"imagenet-r": {
         "correct": …, "total": …, "top1": …,                           top1 in percent
         "interval": [low, high],                                       95 %, Wilson's
         "ece": …, "calibration": [[samples, correct, sum of confidences], …],   by 15 bins of the confidence
         "per_class": {"n01443537": [correct, total], …}}}}],
     "checkpoints": [{"file": "RUN/checkpoints/step-00024820/model.safetensors", "run": "RUN", "step": 24820,
         "chosen": "best on holdout", "chosen_on": "holdout", "top1": 76.3}],    origin of each model
     "chosen": 1, "chosen_on": "holdout",      index in "models" of model.safetensors; the set on which it was chosen
     "ingredients": ["…"]}                     models in a soup, in the order in which they were added

Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from cfmask.errors import UserError
from cfmask.record import Record
from cfmask.runtime.patience import patiently

_Kind = TypeVar("_Kind", bound="Evaluation")


@dataclass(frozen=True)
class Evaluation(Record):
    """Evaluates ``models`` as they are. The kinds below first make a model of them. All paths are absolute."""

    make: ClassVar[str] = "nothing"
    """Name of the kind in evaluation.json."""

    models: tuple[str, ...] = ()
    """Paths for run_search.find_model when the evaluation starts. RUN/checkpoints/best.json is the best checkpoint of a
    run, which may still have to be trained."""
    shards: str = ""
    """Folder or URL of the sets."""
    sets: tuple[str, ...] = ()
    """Names of sets in ``shards``. Kinds that make a model can do without."""
    batch_size: int = 256
    """Images in a forward pass. It can change the last bits of logits; the number of ranks cannot, because batches do
    not depend on it."""
    precision: str = "fp32"
    """fp32, tf32 or bf16."""
    loader_workers: int | None = None
    """Threads that read and decode; None: one less than the rank's cores."""
    allow_count_mismatch: bool = False
    """Accept a known set with other counts than the published ones."""

    @property
    def chooses_on(self) -> str | None:
        """The held-out set on which the model is chosen; None: nothing is chosen."""
        return None

    @property
    def num_candidates(self) -> int:
        """Number of models that are evaluated on each of ``sets``."""
        return len(self.models)

    def checked(self: _Kind) -> _Kind:
        """This evaluation. Raises UserError if it contradicts itself or would do nothing."""
        self._check_kind()
        if (self.sets or self.chooses_on) and not self.shards:
            raise UserError("--shards is missing: the folder (or URL) that holds the sets.")
        _check_unique("--sets", self.sets)
        _check_unique("MODEL", self.models)
        if self.chooses_on is not None and self.chooses_on in self.sets:
            raise UserError(
                f"--holdout {self.chooses_on} is one of the --sets: a set that chooses a model cannot test it as well."
            )
        if self.batch_size < 1:
            raise UserError(f"--batch-size is {self.batch_size}; it must be at least 1.")
        return self

    def _check_kind(self) -> None:
        """Checks for this kind. Raises UserError."""
        if not self.sets:
            raise UserError("Nothing to do: name the sets to evaluate on with --sets.")
        if not self.models:
            raise UserError("Nothing to do: name the models to evaluate.")

    def as_kind(self, kind: type[_Kind], **fields: Any) -> _Kind:
        """An evaluation of another kind on the same sets.

        Args:
            fields: of the new evaluation; those that all kinds share default to this one's.
        """
        shared = {field.name: getattr(self, field.name) for field in dataclasses.fields(Evaluation)}
        return kind(**{**shared, **fields})

    def as_dict(self) -> dict[str, Any]:
        """Content of evaluation.json, with the same keys for all kinds."""
        return {name: getattr(self, name, empty) for name, empty in _LAYOUT.items()}

    @staticmethod
    def from_json(text: str) -> Evaluation:
        """The inverse of ``to_json``: an evaluation of the kind that the text names.

        Raises:
            UserError: not an evaluation, or one with unknown settings.
        """
        try:
            values: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in json.loads(text).items()}
            make = values.pop("make", Evaluation.make)
            if make not in KINDS:
                raise ValueError(f"unknown “make” {make!r}; choose from {', '.join(KINDS)}")
            own = {field.name for field in dataclasses.fields(KINDS[make])}
            for name in _LAYOUT.keys() & values.keys() - own:
                if values.pop(name) != _LAYOUT[name]:
                    raise ValueError(f"“{name}” has no meaning where “make” is {make!r}")
            return KINDS[make](**values)
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"This is not an evaluation as cfmask writes it ({error}).") from error


@dataclass(frozen=True)
class ZeroShot(Evaluation):
    """Builds a zero-shot head for the classes of the first set, and evaluates the model."""

    make: ClassVar[str] = "zero-shot"

    architecture: str = ""
    """``name`` in recipe.Model."""
    pretrained: str = ""
    """``pretrained`` in recipe.Model."""
    mean: tuple[float, ...] | None = None
    """``mean`` in recipe.Model."""
    std: tuple[float, ...] | None = None
    """``std`` in recipe.Model."""

    @property
    def num_candidates(self) -> int:
        return 1

    def _check_kind(self) -> None:
        if not self.shards:
            raise UserError("--shards is missing: the folder (or URL) that holds the sets.")
        if not self.sets:
            raise UserError("A zero-shot head needs the classes of a set: name at least one with --sets.")


@dataclass(frozen=True)
class WiseFT(Evaluation):
    """Mixes two ``models``, zero-shot and fine-tuned, at each of ``alphas``."""

    make: ClassVar[str] = "wise-ft"

    alphas: tuple[float, ...] = ()
    """Shares of the fine-tuned model, in 0…1."""
    holdout: str | None = None
    """The set on which one of several alphas is chosen; not a test set. None: of several, no model is saved."""

    @property
    def chooses_on(self) -> str | None:
        return self.holdout

    @property
    def num_candidates(self) -> int:
        return len(self.alphas)

    def _check_kind(self) -> None:
        _check_unique("--alphas", self.alphas)
        if not self.alphas:
            raise UserError("--alphas is missing: the shares of the fine-tuned model, such as 0 0.5 1.")
        if not all(0 <= alpha <= 1 for alpha in self.alphas):
            raise UserError(f"--alphas must lie in 0…1, not {' '.join(map(str, self.alphas))}.")
        if self.holdout is not None and len(self.alphas) == 1:
            raise UserError(
                f"--holdout {self.holdout} would do nothing: it chooses among several α, and there is one. Leave it "
                "out, or give more --alphas."
            )


@dataclass(frozen=True)
class UniformSoup(Evaluation):
    """Averages the weights of all ``models``."""

    make: ClassVar[str] = "uniform-soup"

    @property
    def num_candidates(self) -> int:
        return 1

    def _check_kind(self) -> None:
        if not self.models:
            raise UserError("Nothing to do: name the models to average.")


@dataclass(frozen=True)
class GreedySoup(UniformSoup):
    """Averages weights of ``models``, added best first; a model that lowers the accuracy on ``holdout`` is omitted."""

    make: ClassVar[str] = "greedy-soup"

    holdout: str | None = None
    """The set that chooses; not a test set."""

    @property
    def chooses_on(self) -> str | None:
        return self.holdout

    def _check_kind(self) -> None:
        super()._check_kind()
        if self.holdout is None:
            raise UserError("A greedy soup needs a held-out set, not a test set: name it with --holdout.")


KINDS: dict[str, type[Evaluation]] = {
    kind.make: kind for kind in (Evaluation, ZeroShot, WiseFT, UniformSoup, GreedySoup)
}
"""All kinds, by their names in evaluation.json."""

_LAYOUT: dict[str, Any] = {
    **{"make": "", "models": (), "alphas": (), "architecture": "", "pretrained": "", "mean": None, "std": None},
    **{"shards": "", "sets": (), "holdout": None, "batch_size": 0, "precision": "", "loader_workers": None},
    "allow_count_mismatch": False,
}
"""Keys of evaluation.json in their order, with the value for kinds that lack the field. The default folder of an
evaluation is named by the digest of this JSON: if the layout changed, a repeated command would not find its folder."""


def _check_unique(what: str, values: tuple[Any, ...]) -> None:
    if len(set(values)) != len(values):
        raise UserError(f"{what} names one of them twice: {' '.join(map(str, values))}. Name each once.")


def files_of(evaluation: Evaluation) -> dict[str, list[int]]:
    """Size and modification time of the model files that an evaluation reads. If any change, its counts are invalid.

    Raises:
        StorageUnavailable: the status of a file cannot be read.
    """
    paths = (*evaluation.models, *([evaluation.pretrained] if isinstance(evaluation, ZeroShot) else []))
    stamps = {path: patiently(functools.partial(_stamp, path), path) for path in paths}
    return {path: stamp for path, stamp in stamps.items() if stamp is not None}


def is_of_other_models(results: Mapping[str, Any]) -> bool:
    """Whether a model file was replaced after its evaluation. A missing or unreadable file counts as unchanged.

    Args:
        results: content of results.json.
    """
    for path, evaluated in results.get("of", {}).items():
        with contextlib.suppress(OSError):
            if _stamp(path) not in (None, evaluated):
                return True
    return False


def _stamp(path: str) -> list[int] | None:
    """Size and modification time of a file; None if missing. Unlike os.path.isfile, raises OSError on I/O errors."""
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return [status.st_size, status.st_mtime_ns] if stat.S_ISREG(status.st_mode) else None


def load_evaluation(path: Path) -> Evaluation:
    """Read an evaluation.json. Raises UserError if it cannot be read."""
    try:
        text = patiently(lambda: path.read_text(errors="replace"), str(path))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    try:
        return Evaluation.from_json(text)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
