"""The content of a results.json, the role of each set, and estimates over several seeds."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy.special import stdtrit

from cfmask.data.benchmarks import IMAGENET_A, IMAGENET_R, IMAGENET_SKETCH, IMAGENET_V2, OBJECTNET, SHIFTED, VAL
from cfmask.errors import UserError
from cfmask.evaluation.model_origin import ModelOrigin
from cfmask.evaluation_spec import Evaluation

IMAGENET = (VAL.name, "imagenet")
"""Folder names of ImageNet's validation set."""

AVERAGE = "Avg."
LABELS = {
    **dict.fromkeys(IMAGENET, "IN"),
    IMAGENET_V2.name: "V2",
    IMAGENET_R.name: "R",
    IMAGENET_SKETCH.name: "Sketch",
    OBJECTNET.name: "ObjectNet",
    IMAGENET_A.name: "A",
}
"""Column headings, as in papers."""

_Z = 1.959963984540054


# --- what is in a results.json ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SetResult:
    """A model's result on a set."""

    correct: int
    """Number of right predictions."""
    total: int
    """Number of samples."""
    top1: float
    """Percent."""
    interval: tuple[float, float]
    """95 % interval of top1 in percent, Wilson's."""
    ece: float
    """Expected calibration error, in 0…1."""
    calibration: tuple[tuple[int, int, float], ...]
    """For each bin of the confidence: samples, right predictions, and the sum of the confidences (each in 0…1)."""
    per_class: dict[str, tuple[int, int]]
    """Right predictions and samples of each class."""

    @classmethod
    def from_json(cls, name: str, values: Mapping[str, Any]) -> SetResult:
        """The inverse of ``Counts.result``, for the set ``name``. Raises UserError if no sample was counted."""
        if not values["total"]:
            raise UserError(f"No sample of {name} was counted: an empty set has no accuracy. Evaluate without it.")
        low, high = values["interval"]
        return cls(
            values["correct"],
            values["total"],
            values["top1"],
            (low, high),
            values["ece"],
            tuple((n, correct, confidence) for n, correct, confidence in values["calibration"]),
            {name: (correct, n) for name, (correct, n) in values["per_class"].items()},
        )


@dataclass(frozen=True)
class ModelResult:
    """A model's results."""

    name: str
    """The name in tables."""
    sets: dict[str, SetResult]
    """Result by name of a set."""
    alpha: float | None = None
    """Share of the fine-tuned model in a WiSE-FT mixture; None for other models."""
    method: str | None = None
    """What made it, for its look in charts: a preset, "zero-shot", "wise-ft" or a soup; None if that is unknown."""


@dataclass(frozen=True)
class Results:
    """A results.json."""

    evaluation: Evaluation
    """What was evaluated."""
    sets: tuple[str, ...]
    """Names of the sets."""
    models: tuple[ModelResult, ...]
    """Result of each model."""
    chosen: int | None = None
    """Index in ``models`` of the model that was saved; None: no model was."""
    chosen_on: str | None = None
    """The set on which it was chosen."""
    origins: tuple[ModelOrigin, ...] = ()
    """Origin of each evaluated model, in the order of ``evaluation.models``; empty in results of earlier versions."""

    @property
    def split(self) -> Split:
        """``Split.of`` its sets; a set that chose a model is neither in-distribution nor shifted."""
        return Split.of((*self.sets, *(name for model in self.models for name in model.sets)), self.chosen_on)


def read_results(path: str | Path) -> Results:
    """Read the results of an evaluation.

    Args:
        path: its run folder, or its results.json.

    Raises:
        UserError: the file cannot be read, or is not of an evaluation.
    """
    path = Path(path)
    file = path / "results.json" if path.is_dir() else path
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError:
        raise UserError(
            f"{file} does not exist: the evaluation has not finished, or this is not its run folder. "
            "Name the run folder of a finished evaluation, or its results.json."
        ) from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error}). Delete it, and run the evaluation again.") from error
    if isinstance(content, dict) and {"step", "sets"} <= content.keys():
        raise UserError(
            f"{file} is of a training run, not of an evaluation: it has no models to compare. Evaluate the run with "
            "tools/evaluate.py, and name the folder of that evaluation."
        )
    if not isinstance(content, dict) or not {"evaluation", "sets", "models"} <= content.keys():
        raise UserError(
            f"{file} is not of an evaluation: “evaluation”, “sets” or “models” is missing. Name a folder that "
            "tools/evaluate.py, wise_ft.py or soup.py wrote, or the results.json in it."
        )
    try:
        return _results(content)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{file} has not the layout of this version's results ({type(error).__name__}: {error}). Evaluate again "
            "with this version."
        ) from error


def _results(content: Mapping[str, Any]) -> Results:
    evaluation = Evaluation.from_json(json.dumps(content["evaluation"]))
    origins = tuple(ModelOrigin.from_json(each) for each in content.get("checkpoints") or ())
    # Only an evaluation of models as they are has an origin for each of its results.
    as_they_are = evaluation.make == Evaluation.make and len(origins) == len(content["models"])
    models = tuple(
        ModelResult(
            model["name"],
            {name: SetResult.from_json(name, r) for name, r in model["sets"].items()},
            model.get("alpha"),
            origins[i].method if as_they_are else None,
        )
        for i, model in enumerate(content["models"])
    )
    chosen = content.get("chosen")
    if chosen is not None and not 0 <= chosen < len(models):
        raise UserError(f"“chosen” is {chosen}, and there are {len(models)} models. Evaluate again.")
    return Results(
        evaluation,
        tuple(content["sets"].keys()),
        models,
        chosen,
        content.get("chosen_on"),
        origins,
    )


# --- the role of each set ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """The role of each set, by name."""

    in_distribution: str | None
    """The set with the distribution of the training set; None: there is none."""
    shifted: tuple[str, ...]
    """The sets under distribution shift, over which robustness is averaged."""
    others: tuple[str, ...] = ()
    """Sets that are shown and are in no average: a set that chose a model, or is of no benchmark."""

    @classmethod
    def of(cls, names: Iterable[str], chosen_on: str | None = None) -> Split:
        """The split that the names of sets suggest.

        ImageNet's validation set, by its name, is in-distribution; without it and without a benchmark, the first set
        is. Shifted are those of the paper's five benchmarks that are present; without any, all other sets.

        Args:
            chosen_on: a set that chose a model, which has no role.
        """
        names = list(dict.fromkeys(names))
        known = tuple(benchmark.name for benchmark in SHIFTED if benchmark.name in names)
        candidates = [name for name in names if name != chosen_on]
        home = next((name for name in IMAGENET if name in candidates), None)
        if not known and home is None and candidates:
            home = candidates[0]
        shifted = known or tuple(name for name in candidates if name != home)
        return cls(home, shifted, tuple(name for name in names if name != home and name not in shifted))

    @classmethod
    def of_rows(cls, rows: Sequence[ResultRow]) -> Split:
        """The split of all sets of some rows."""
        return cls.of(name for row in rows for name in row.sets)

    @property
    def columns(self) -> dict[str, str | None]:
        """By column heading, in a table's order, its set; None for the average, which needs two shifted sets."""
        average: dict[str, str | None] = {AVERAGE: None} if len(self.shifted) > 1 else {}
        home = () if self.in_distribution is None else (self.in_distribution,)
        return {
            **{self._label(name): name for name in (*home, *self.shifted)},
            **average,
            **{self._label(name): name for name in self.others},
        }

    def _label(self, name: str) -> str:
        # "val" is ImageNet's only beside ImageNet's shifted sets: other data has a set of this name as well.
        if name in IMAGENET and (name != self.in_distribution or not set(self.shifted) & set(LABELS)):
            return name
        return LABELS.get(name, name)

    @property
    def is_benchmark(self) -> bool:
        """Whether the average is over the paper's five sets, and no other."""
        return set(self.shifted) == {benchmark.name for benchmark in SHIFTED}


# --- numbers ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """An accuracy in percent, of one seed or averaged over several."""

    value: float
    low: float
    """One seed: lower end of the 95 % interval over draws of the test set. Several: mean - standard deviation."""
    high: float
    """The upper end, likewise."""
    noise: float
    """Half of the 95 % interval over draws of the test set and of seeds (``combined_noise``)."""
    seeds: int

    @property
    def sd(self) -> float:
        """Sample standard deviation over seeds; 0 for one seed."""
        return (self.high - self.low) / 2 if self.seeds > 1 else 0.0


def combined_noise(sampling: float, values: Sequence[float]) -> float:
    """Half of a 95 % interval of the mean over seeds, in percent: sqrt(sampling² + (t·sd/√n)²), where t is the 97.5 %
    quantile of Student's t with n - 1 degrees of freedom. For one seed, ``sampling``.

    Args:
        sampling: half of the 95 % interval over draws of the test set. Seeds share the test set: they do not reduce it.
        values: by seed.
    """
    if len(values) < 2:
        return sampling
    n = len(values)
    return math.hypot(sampling, float(stdtrit(n - 1, 0.975)) * statistics.stdev(values) / math.sqrt(n))


@dataclass(frozen=True)
class ResultRow:
    """A row of a table.

    Raises:
        UserError: no model, or models that were evaluated on different sets.
    """

    name: str
    """The name in tables."""
    per_seed: Sequence[ModelResult]
    """One model, or the models of a recipe, one for each seed."""

    def __post_init__(self) -> None:
        if not self.per_seed:
            raise UserError(f"The row {self.name} has no model: it needs at least one seed.")
        first = self.per_seed[0]
        for other in self.per_seed[1:]:
            for name in {**first.sets, **other.sets}:
                counts = [model.sets[name].total if name in model.sets else 0 for model in (first, other)]
                if counts[0] != counts[1]:
                    raise UserError(
                        f"{self.name}: {first.name} was evaluated on {counts[0]} samples of {name}, {other.name} on "
                        f"{counts[1]}. The seeds of a row must be evaluated on the same sets: evaluate them together."
                    )

    @property
    def sets(self) -> tuple[str, ...]:
        return tuple(self.per_seed[0].sets)

    @property
    def method(self) -> str:
        """What decides its look in charts (``looks.looks``): the method of its first model, or its name."""
        return self.per_seed[0].method or self.name

    def estimate(self, name: str) -> Estimate:
        """Top-1 on one of ``sets``."""
        results = [model.sets[name] for model in self.per_seed]
        half = statistics.fmean((r.interval[1] - r.interval[0]) / 2 for r in results)
        return _estimate([r.top1 for r in results], results[0].interval, half)

    def average(self, names: Sequence[str]) -> Estimate:
        """Mean of the top-1 on k of ``sets``, for each seed first.

        The interval of one seed is value ∓ 1.96·sqrt(Σ p_i·(1 - p_i)/n_i)/k, where p_i is the share of the n_i samples
        of set i that is right: the variance of a mean of independent binomial shares.
        """
        means, halves = [], []
        for model in self.per_seed:
            results = [model.sets[name] for name in names]
            shares = [(r.correct / r.total, r.total) for r in results]
            means.append(statistics.fmean(r.top1 for r in results))
            halves.append(100 * _Z * math.sqrt(sum(p * (1 - p) / n for p, n in shares)) / len(names))
        half = statistics.fmean(halves)
        return _estimate(means, (max(0.0, means[0] - half), min(100.0, means[0] + half)), half)

    def estimates(self, split: Split) -> dict[str, Estimate]:
        """By column heading; without the sets that the row lacks, and without the average if one of its sets is
        missing."""
        values = {
            label: self.estimate(name)
            for label, name in split.columns.items()
            if name is not None and name in self.sets
        }
        if AVERAGE in split.columns and set(split.shifted) <= set(self.sets):
            values[AVERAGE] = self.average(split.shifted)
        return {label: values[label] for label in split.columns if label in values}


def _estimate(values: Sequence[float], interval: tuple[float, float], sampling: float) -> Estimate:
    mean, noise = statistics.fmean(values), combined_noise(sampling, values)
    if len(values) == 1:
        return Estimate(mean, *interval, noise, 1)
    sd = statistics.stdev(values)
    return Estimate(mean, mean - sd, mean + sd, noise, len(values))


def rows_of(models: Iterable[ModelResult], names: Sequence[str] = ()) -> list[ResultRow]:
    """A row for each name, whose models of the same name are its seeds. Without names, a row for each model."""
    if not names:
        return [ResultRow(model.name, (model,)) for model in models]
    by_name: dict[str, list[ModelResult]] = {}
    for name, model in zip(names, models, strict=True):
        by_name.setdefault(name, []).append(model)
    return [ResultRow(name, per_seed) for name, per_seed in by_name.items()]
