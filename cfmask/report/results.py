"""What is in a results.json, which set plays which part, and what several seeds come to."""

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
"""Names that ImageNet's validation set goes by."""

AVERAGE = "Avg."
LABELS = {
    **dict.fromkeys(IMAGENET, "IN"),
    IMAGENET_V2.name: "V2",
    IMAGENET_R.name: "R",
    IMAGENET_SKETCH.name: "Sketch",
    OBJECTNET.name: "ObjectNet",
    IMAGENET_A.name: "A",
}
"""The columns of papers' tables."""

_Z = 1.959963984540054


# --- what is in a results.json ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SetInfo:
    """A set; classes: among how many the answer is looked for."""

    samples: int
    classes: int


@dataclass(frozen=True)
class SetResult:
    """What a model answered on a set.

    top1, interval: percent; the interval is Wilson's of 95 %.
    ece: expected calibration error, in 0…1.
    calibration: by bin of the confidence: samples, right answers, sum of the confidences (each in 0…1).
    per_class: right answers and samples by class.
    """

    correct: int
    total: int
    top1: float
    interval: tuple[float, float]
    ece: float
    calibration: tuple[tuple[int, int, float], ...]
    per_class: dict[str, tuple[int, int]]


@dataclass(frozen=True)
class ModelResult:
    """A model's results by set. alpha: the fine-tuned model's share, if it is a mixture."""

    name: str
    sets: dict[str, SetResult]
    alpha: float | None = None


@dataclass(frozen=True)
class Results:
    """A results.json.

    chosen: index into ``models``, and chosen_on the set that chose it; None where nothing chose.
    origins: of the models that the evaluation took, in its order; empty in results of earlier versions.
    """

    evaluation: Evaluation
    sets: dict[str, SetInfo]
    models: tuple[ModelResult, ...]
    chosen: int | None = None
    chosen_on: str | None = None
    ingredients: tuple[str, ...] = ()
    origins: tuple[ModelOrigin, ...] = ()

    @property
    def split(self) -> Split:
        """What ``Split.of`` makes of its sets; the one that chose is neither in-distribution nor shifted."""
        return Split.of((*self.sets, *(name for model in self.models for name in model.sets)), self.chosen_on)


def read_results(path: str | Path) -> Results:
    """An evaluation's results, from its run folder or from the file itself.

    Raises:
        UserError: it cannot be read, or is no evaluation's.
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
        raise UserError(f"{file} is not JSON ({error}). Run the evaluation again: it writes the file anew.") from error
    if isinstance(content, dict) and {"step", "sets"} <= content.keys():
        raise UserError(
            f"{file} is what a training run found, not an evaluation: it has no models to compare. Evaluate the run "
            f"with tools/evaluate.py, and name that evaluation's run folder."
        )
    if not isinstance(content, dict) or not {"evaluation", "sets", "models"} <= content.keys():
        raise UserError(
            f"{file} is not an evaluation's results: it lacks “evaluation”, “sets” or “models”. Name the run folder of "
            "tools/evaluate.py, wise_ft.py or soup.py, or the results.json in it."
        )
    try:
        return _results(content)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{file} is not laid out as this version writes results ({type(error).__name__}: {error}). "
            "Evaluate again with this version."
        ) from error


def _results(content: Mapping[str, Any]) -> Results:
    models = tuple(
        ModelResult(
            model["name"], {name: _set_result(name, r) for name, r in model["sets"].items()}, model.get("alpha")
        )
        for model in content["models"]
    )
    chosen = content.get("chosen")
    if chosen is not None and not 0 <= chosen < len(models):
        raise UserError(f"“chosen” is {chosen}, and there are {len(models)} models. Evaluate again.")
    return Results(
        Evaluation.from_json(json.dumps(content["evaluation"])),
        {name: SetInfo(info["samples"], info["classes"]) for name, info in content["sets"].items()},
        models,
        chosen,
        content.get("chosen_on"),
        tuple(content.get("ingredients") or ()),
        tuple(ModelOrigin.from_json(each) for each in content.get("checkpoints") or ()),
    )


def _set_result(name: str, values: Mapping[str, Any]) -> SetResult:
    if not values["total"]:
        raise UserError(f"no sample of {name} was counted: there is no accuracy on an empty set. Evaluate without it.")
    low, high = values["interval"]
    return SetResult(
        values["correct"],
        values["total"],
        values["top1"],
        (low, high),
        values["ece"],
        tuple((n, correct, confidence) for n, correct, confidence in values["calibration"]),
        {name: (correct, n) for name, (correct, n) in values["per_class"].items()},
    )


# --- which sets are what ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """The part that each set plays. others: shown, and in no average: what chose a model, or is of no benchmark."""

    in_distribution: str | None
    shifted: tuple[str, ...]
    others: tuple[str, ...] = ()

    @classmethod
    def of(cls, names: Iterable[str], chosen_on: str | None = None) -> Split:
        """The split that the names of sets suggest, where nobody has said one.

        ImageNet's validation set, by its name, is in-distribution. If any of the five benchmarks is there, they are
        the shifted ones. Otherwise all but the first set are, or all but ImageNet's.
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
        """``of`` the sets that any row has."""
        return cls.of(name for row in rows for name in row.sets)

    @property
    def columns(self) -> dict[str, str | None]:
        """Label by label the set it is of, in a table's order; None for the average, which takes two sets."""
        average: dict[str, str | None] = {AVERAGE: None} if len(self.shifted) > 1 else {}
        home = () if self.in_distribution is None else (self.in_distribution,)
        return {
            **{self._label(name): name for name in (*home, *self.shifted)},
            **average,
            **{self._label(name): name for name in self.others},
        }

    def _label(self, name: str) -> str:
        # A set called val is ImageNet's only in ImageNet's company: other data has one as well.
        if name in IMAGENET and (name != self.in_distribution or not set(self.shifted) & set(LABELS)):
            return name
        return LABELS.get(name, name)

    @property
    def is_benchmark(self) -> bool:
        """The average is that of the paper: over its five sets, and no other."""
        return set(self.shifted) == {benchmark.name for benchmark in SHIFTED}


# --- numbers ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """An accuracy in percent.

    low, high: of one seed, the 95 % interval over draws of the test set; of several, mean ∓ sample standard deviation.
    noise: half of the 95 % interval, over draws of the test set and of seeds (``combined_noise``).
    """

    value: float
    low: float
    high: float
    noise: float
    seeds: int

    @property
    def sd(self) -> float:
        """Sample standard deviation over seeds; 0 of one."""
        return (self.high - self.low) / 2 if self.seeds > 1 else 0.0


def combined_noise(sampling: float, values: Sequence[float]) -> float:
    """Half of a 95 % interval of the mean over seeds, in percent: sqrt(sampling² + (t·sd/√n)²).

    sampling: half of the 95 % interval over draws of the test set. Seeds share the test set, so they do not lessen it.
    values: by seed. t: 97.5 % quantile of Student's t with n - 1 degrees of freedom. One seed says nothing of others.
    """
    if len(values) < 2:
        return sampling
    n = len(values)
    return math.hypot(sampling, float(stdtrit(n - 1, 0.975)) * statistics.stdev(values) / math.sqrt(n))


@dataclass(frozen=True)
class ResultRow:
    """A line of a table: a model, or a recipe's models, one a seed, evaluated on the same sets.

    Raises:
        UserError: no model, or models of different sets.
    """

    name: str
    per_seed: Sequence[ModelResult]

    def __post_init__(self) -> None:
        if not self.per_seed:
            raise UserError(f"{self.name} has no result: a row needs a model of at least one seed.")
        first = self.per_seed[0]
        for other in self.per_seed[1:]:
            for name in {**first.sets, **other.sets}:
                counts = [model.sets[name].total if name in model.sets else 0 for model in (first, other)]
                if counts[0] != counts[1]:
                    raise UserError(
                        f"{self.name}: {first.name} was evaluated on {counts[0]} samples of {name}, and {other.name} "
                        f"on {counts[1]}. Seeds make one row only if all are evaluated on the same sets: evaluate "
                        "them again, together."
                    )

    @property
    def sets(self) -> tuple[str, ...]:
        return tuple(self.per_seed[0].sets)

    def estimate(self, name: str) -> Estimate:
        """Top-1 on a set that the row has."""
        results = [model.sets[name] for model in self.per_seed]
        half = statistics.fmean((r.interval[1] - r.interval[0]) / 2 for r in results)
        return _estimate([r.top1 for r in results], results[0].interval, half)

    def average(self, names: Sequence[str]) -> Estimate:
        """Mean of the top-1 on k sets that the row has, for each seed first.

        Interval of one seed: value ∓ 1.96·sqrt(Σ p_i·(1 - p_i)/n_i)/k, p_i of n_i samples right on set i: the
        variance of a mean of independent binomial shares.
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
        """By label of a column; without sets that the row lacks, and without the average if one of its sets is."""
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


def rows_of(results: Results) -> list[ResultRow]:
    """A row a model."""
    return [ResultRow(model.name, (model,)) for model in results.models]
