"""What evaluations found, as tables and pictures: results.json (cfmask/evaluation.py has its layout) to Markdown, LaTeX
and PNG.

A Row is a line of a table: one model, or the same recipe's models of several seeds. A Split says which of the sets is
in-distribution and which are the shifted ones, whose mean is the robustness average.
"""

from __future__ import annotations

import json
import math
import statistics
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy.special import expit, logit, stdtrit

from cfmask.data.benchmarks import IMAGENET_A, IMAGENET_R, IMAGENET_SKETCH, IMAGENET_V2, OBJECTNET, SHIFTED, VAL
from cfmask.errors import UserError
from cfmask.evaluation import Evaluation

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

_COLUMNS = ("IN", *(LABELS[benchmark.name] for benchmark in SHIFTED), AVERAGE)


def _published(*values: float | None) -> dict[str, float | None]:
    return dict(zip(_COLUMNS, values, strict=True))


_UNKNOWN = _published(*[None] * len(_COLUMNS))
PUBLISHED: dict[str, dict[str, dict[str, float | None]]] = {
    "ViT-B-32": {
        "zero-shot": _published(63.3, 55.9, 69.3, 42.3, 43.5, 31.5, 48.5),
        "FT": _published(76.2, 64.2, 57.1, 38.7, 40.1, 21.0, 44.2),
        "WiSE-FT": _UNKNOWN,
        "this method": _UNKNOWN,
    },
    "ViT-B-16": {
        "zero-shot": _published(68.3, 61.9, 77.7, 48.3, 54.2, 50.0, 58.4),
        "FT": _published(81.3, 70.6, 65.6, 45.1, 50.5, 36.6, 53.7),
        "WiSE-FT": _published(82.5, 73.1, 75.1, 51.6, 55.7, 47.6, 60.6),
        "this method": _published(82.4, 73.4, 78.1, 53.4, 57.9, 53.5, 63.3),
    },
    "ViT-L-14": {
        "zero-shot": _published(75.6, 69.9, 87.9, 59.6, 66.6, 70.8, 70.9),
        "FT": _published(84.7, 75.3, 75.4, 54.4, 59.8, 55.7, 64.1),
        "WiSE-FT": _UNKNOWN,
        "this method": _UNKNOWN,
    },
}
"""Top-1 in percent by architecture, row and column, of OpenAI's CLIP fine-tuned on ImageNet, collected from tables of
later papers; None where no number was available."""

_ROUNDING = 0.05
"""Numbers are published with one decimal."""
_Z = 1.959963984540054


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, padded so that it reads well in a terminal."""
    widths = [max(len(line[i]) for line in (header, *rows)) for i in range(len(header))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in rows]
    head = "| " + " | ".join(cell.ljust(w) for cell, w in zip(header, widths, strict=True)) + " |"
    return "\n".join([head, "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines])


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
    """A results.json. chosen: index into ``models``, and chosen_on the set that chose it; None where nothing chose."""

    evaluation: Evaluation
    sets: dict[str, SetInfo]
    models: tuple[ModelResult, ...]
    chosen: int | None = None
    chosen_on: str | None = None
    ingredients: tuple[str, ...] = ()

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
    def of_rows(cls, rows: Sequence[Row]) -> Split:
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
class Row:
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


def rows_of(results: Results) -> list[Row]:
    """A row a model."""
    return [Row(model.name, (model,)) for model in results.models]


@dataclass(frozen=True)
class Difference:
    """A number beside the published one, in percent. noise: what they may differ by without meaning anything: half of
    our 95 % interval (``Estimate.noise``) and the 0.05 that publishing rounded away."""

    ours: float
    published: float
    noise: float

    @property
    def difference(self) -> float:
        return self.ours - self.published

    @property
    def within_noise(self) -> bool:
        return abs(self.difference) <= self.noise


def differences(row: Row, published: Mapping[str, float | None], split: Split | None = None) -> dict[str, Difference]:
    """By label of a column, where both have a number. published: such as PUBLISHED["ViT-B-16"]["FT"]. An average is
    compared only if it is over the paper's five sets."""
    split = split or Split.of_rows([row])
    found = {}
    for label, estimate in row.estimates(split).items():
        number = published.get(label)
        if number is not None and (label != AVERAGE or split.is_benchmark):
            found[label] = Difference(estimate.value, number, estimate.noise + _ROUNDING)
    return found


# --- tables -----------------------------------------------------------------------------------------------------------


def markdown_table(
    rows: Sequence[Row], split: Split | None = None, *, uncertainty: bool = True, digits: int = 1
) -> str:
    """Top-1 in percent, with a line below that says what the numbers are. The best of a column is bold (all that look
    the same with so many digits).

    Raises:
        UserError: no row, or none with a set.
    """
    split = _checked(rows, split)
    cells = _cells(rows, split, uncertainty, digits, " ± ", "({}–{})", "**{}**", "–")
    lines = [[_markdown_text(row.name), *line] for row, line in zip(rows, cells, strict=True)]
    return table(["top-1 %", *map(_markdown_text, split.columns)], lines) + "\n\n" + _note(rows, split, uncertainty)


def latex_table(rows: Sequence[Row], split: Split | None = None, *, uncertainty: bool = True, digits: int = 1) -> str:
    r"""The same as a tabular, for \input in a paper; needs the package booktabs.

    Raises:
        UserError: no row, or none with a set.
    """
    split = _checked(rows, split)
    interval = r"{{\scriptsize [{}, {}]}}"
    cells = _cells(rows, split, uncertainty, digits, r" $\pm$ ", interval, r"\textbf{{{}}}", "--")
    lines = [[latex_text(row.name), *line] for row, line in zip(rows, cells, strict=True)]
    header = ["", *map(latex_text, split.columns)]
    comments = [f"% {line}" for line in textwrap.wrap(_note(rows, split, uncertainty), 110)]
    return "\n".join(
        [
            r"% \usepackage{booktabs}",
            *comments,
            rf"\begin{{tabular}}{{l{'c' * len(split.columns)}}}",
            r"\toprule",
            " & ".join(header) + r" \\",
            r"\midrule",
            *(" & ".join(line) + r" \\" for line in lines),
            r"\bottomrule",
            r"\end{tabular}",
        ]
    )


def comparison(
    rows: Sequence[Row], published: Mapping[str, Mapping[str, float | None]], split: Split | None = None
) -> str:
    """Rows beside the published numbers, as a Markdown table of three lines a row: ours, published, and ours less
    published, with ▲ or ▼ if that is more than noise (``Difference``) and ≈ if it is not.

    Args:
        published: by the row's name, such as PUBLISHED["ViT-B-16"]; a row that it lacks has no number there.

    Raises:
        UserError: no row, or none with a set.
    """
    split = _checked(rows, split)
    labels, lines = list(split.columns), []
    for row in rows:
        ours, known = row.estimates(split), published.get(row.name, {})
        found = differences(row, known, split)
        lines.append([_markdown_text(row.name), *(_plain(ours.get(label)) for label in labels)])
        lines.append(["published", *(f"{found[i].published:.1f}" if i in found else "–" for i in labels)])
        lines.append(["difference", *(_marked(found[label]) if label in found else "–" for label in labels)])
    rule = (
        "▲ ▼: above, below the published number by more than noise. ≈: within it, |difference| ≤ half of our 95 % "
        f"interval + {_ROUNDING} for the rounding of what is published. The interval is over draws of the test set "
        "and, with several seeds, of these: sqrt(h² + (t·sd/√n)²), h half of the test set's, t Student's. The "
        "published numbers' own noise is not known, and not counted."
    )
    header = table(["top-1 %", *map(_markdown_text, labels)], lines)
    return f"{header}\n\n{_note(rows, split, uncertainty=True)} {rule}"


def latex_text(text: str) -> str:
    """Text for LaTeX: its special characters, and those of ours that pdflatex does not know, escaped."""
    return "".join(_LATEX.get(character, character) for character in text)


_LATEX = {
    **{c: f"\\{c}" for c in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
    "|": "$|$",
    "α": r"$\alpha$",
    "β": r"$\beta$",
    "γ": r"$\gamma$",
    "θ": r"$\theta$",
    "±": r"$\pm$",
    "×": r"$\times$",
    "·": r"$\cdot$",
    "−": "$-$",
    "≤": r"$\le$",
    "≥": r"$\ge$",
    "→": r"$\rightarrow$",
    "∞": r"$\infty$",
    "–": "--",
    "—": "---",
    "…": r"\ldots{}",
}


def _checked(rows: Sequence[Row], split: Split | None) -> Split:
    if not rows:
        raise UserError("There is no result to show: name at least one evaluation with a model.")
    split = split or Split.of_rows(rows)
    if not any(row.estimates(split) for row in rows):
        wanted = ", ".join(name for name in split.columns.values() if name) or "a set"
        models = ", ".join(row.name for row in rows)
        raise UserError(f"None of {models} was evaluated on {wanted}. Evaluate at least one there with --sets.")
    return split


def _cells(
    rows: Sequence[Row],
    split: Split,
    uncertainty: bool,
    digits: int,
    plus_minus: str,
    interval: str,
    bold: str,
    missing: str,
) -> list[list[str]]:
    """A line of cells a row; the notation is the last four arguments'."""
    estimates = [row.estimates(split) for row in rows]
    best = {
        label: max((round(e[label].value, digits) for e in estimates if label in e), default=math.nan)
        for label in split.columns
    }
    lines = []
    for of_row in estimates:
        line = []
        for label in split.columns:
            if label not in of_row:
                line.append(missing)
                continue
            e = of_row[label]
            text = f"{e.value:.{digits}f}"
            several = e.seeds > 1 and uncertainty
            if several:
                text += f"{plus_minus}{e.sd:.{digits}f}"
            if len(rows) > 1 and round(e.value, digits) == best[label]:
                text = bold.format(text)
            if uncertainty and not several:
                text += " " + interval.format(f"{e.low:.{digits}f}", f"{e.high:.{digits}f}")
            line.append(text)
        lines.append(line)
    return lines


def _note(rows: Sequence[Row], split: Split, uncertainty: bool) -> str:
    """What a table's numbers are, in sentences."""
    seeds = sorted({len(row.per_seed) for row in rows if len(row.per_seed) > 1})
    numbers = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}" if seeds else ""
    average = AVERAGE in split.columns
    parts = []
    if seeds:
        parts.append(f"Mean {'± sample standard deviation ' if uncertainty else ''}over {numbers} seeds.")
    if uncertainty and any(len(row.per_seed) == 1 for row in rows):
        of_average = ", of the average by the sets' binomial variances" if average else ""
        parts.append(f"Of one seed, the 95 % interval over draws of the test set (Wilson's{of_average}).")
    if average:
        shifted = [label for label, name in split.columns.items() if name in split.shifted]
        parts.append(f"{AVERAGE}: mean of {', '.join(shifted)}.")
    return " ".join(parts)


def _plain(estimate: Estimate | None) -> str:
    if estimate is None:
        return "–"
    if estimate.seeds > 1:
        return f"{estimate.value:.1f} ± {estimate.sd:.1f}"
    return f"{estimate.value:.1f} ({estimate.low:.1f}–{estimate.high:.1f})"


def _marked(found: Difference) -> str:
    mark = "≈" if found.within_noise else "▲" if found.difference > 0 else "▼"
    return f"{mark} {_signed(found.difference)}"


def _markdown_text(text: str) -> str:
    return text.replace("|", r"\|").replace("*", r"\*").replace("\n", " ")


# --- effective robustness ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LogitFit:
    """logit(y) = slope · logit(x) + intercept, x and y shares of right answers."""

    slope: float
    intercept: float

    def __call__(self, x: float) -> float:
        """Top-1 in percent that the line gives at x, the logit of one."""
        return 100 * float(expit(self.slope * x + self.intercept))


def clipped_logit(top1: float, samples: int) -> float:
    """Logit of an accuracy in percent. 0 and 100 % have none: they are taken for half a sample more and less."""
    half = 0.5 / samples
    return float(logit(min(max(top1 / 100, half), 1 - half)))


def fit_logits(x: Sequence[float], y: Sequence[float]) -> LogitFit:
    """Least squares through the points of logits (Taori et al., NeurIPS 2020; Miller et al., ICML 2021).

    Raises:
        UserError: fewer than two different x: no line goes through them, or every.
    """
    if len(set(x)) < 2:
        raise UserError(
            f"A line of effective robustness cannot be fitted through {len(set(x))} in-distribution accuracy: give two "
            "or more models of different accuracy to fit on, such as the zero-shot models of two architectures."
        )
    x_mean, y_mean = statistics.fmean(x), statistics.fmean(y)
    slope = sum((a - x_mean) * (b - y_mean) for a, b in zip(x, y, strict=True)) / sum((a - x_mean) ** 2 for a in x)
    return LogitFit(slope, y_mean - slope * x_mean)


@dataclass(frozen=True)
class RobustnessPanel:
    """Models on one shifted set. points: logits in and out of distribution by model; effective: percentage points that
    a model's top-1 is above the line."""

    fit: LogitFit
    points: dict[str, tuple[float, float]]
    effective: dict[str, float]


def robustness_panels(
    points: Sequence[Row], fit_on: Iterable[str], split: Split | None = None
) -> dict[str, RobustnessPanel]:
    """By label of a shifted set, of the models that have it.

    Args:
        points: several seeds are one point, their mean.
        fit_on: names of ``points`` through which the line goes.

    Raises:
        UserError: fewer than two models to fit on, two points of one name, no in-distribution or no shifted set.
    """
    split, fit_on = split or Split.of_rows(points), tuple(dict.fromkeys(fit_on))
    names = [row.name for row in points]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(
            f"Two models are called {twice[0]}: their points could not be told apart. Name them differently."
        )
    if missing := [name for name in fit_on if name not in names]:
        raise UserError(f"{missing[0]}, to fit on, is not among the models: {', '.join(names) or 'there is none'}.")
    home = split.in_distribution
    if home is None or not split.shifted:
        raise UserError(
            "Effective robustness compares accuracy in distribution with accuracy on shifted sets, and there is no "
            f"{'in-distribution' if home is None else 'shifted'} set. Evaluate the models on one of each, such as val "
            "and imagenet-r."
        )
    panels = {}
    for label, name in split.columns.items():
        if name not in split.shifted:
            continue
        there = {row.name: row for row in points if {home, name} <= set(row.sets)}
        means = {n: (row.estimate(home).value, row.estimate(name).value) for n, row in there.items()}
        logits = {
            n: (clipped_logit(means[n][0], _samples(row, home)), clipped_logit(means[n][1], _samples(row, name)))
            for n, row in there.items()
        }
        if len(fitted := [logits[n] for n in fit_on if n in logits]) < 2:
            raise UserError(
                f"Effective robustness on {name} needs a line through two models at least, and of those to fit on "
                f"{len(fitted)} was evaluated on {home} and {name}. Give the zero-shot models of two or more "
                "architectures, evaluated on both sets."
            )
        fit = fit_logits(*zip(*fitted, strict=True))
        panels[label] = RobustnessPanel(fit, logits, {n: means[n][1] - fit(logits[n][0]) for n in logits})
    return panels


def _samples(row: Row, name: str) -> int:
    return row.per_seed[0].sets[name].total


def effective_values(panels: Mapping[str, RobustnessPanel]) -> dict[str, dict[str, float]]:
    """Effective robustness in percentage points by model, by label of a set; and their mean, of a model that has all
    sets, if these are two at least."""
    names = list(dict.fromkeys(name for panel in panels.values() for name in panel.points))
    values = {name: {label: p.effective[name] for label, p in panels.items() if name in p.effective} for name in names}
    if len(panels) > 1:
        for of_model in values.values():
            if len(of_model) == len(panels):
                of_model[AVERAGE] = statistics.fmean(of_model.values())
    return values


def robustness_table(values: Mapping[str, Mapping[str, float]]) -> str:
    """What ``effective_robustness`` returned, as a Markdown table."""
    labels = list(dict.fromkeys(label for of_model in values.values() for label in of_model))
    lines = [[_markdown_text(n), *(_signed(v.get(label)) for label in labels)] for n, v in values.items()]
    note = (
        "Top-1 above (+) or below (−) the line, in logits, through the models it is fitted on, percentage points "
        "(Taori et al., 2020). An accuracy of 0 or 100 % is placed half a sample away from it."
    )
    return table(["effective robustness", *map(_markdown_text, labels)], lines) + "\n\n" + note


def _signed(value: float | None) -> str:
    """One decimal, a minus as wide as the plus, and no sign for what rounds to nothing; – for None."""
    if value is None:
        return "–"
    return f"{round(value, 1) or 0.0:+.1f}".replace("-", "−").replace("+0.0", "0.0")


# --- pictures ---------------------------------------------------------------------------------------------------------

# Okabe and Ito's colours that can be told apart with any colour vision, less the yellow, which is faint on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#000000", "#8A8A8A")
_MARKERS = "osD^vPX<>phd*"
_DASHES = ("-", "--", ":", "-.")
_HATCHES = ("", "////", "....", "xxxx")
_WIDTH = 8.0
_LINE = 0.19
"""Inches: of every picture, and of a line of small text."""
_SMALL = 8
"""Points."""


def bar_chart(rows: Sequence[Row], path: Path, split: Split | None = None) -> None:
    """Top-1 as a group of bars a set, with the 95 % interval of one seed, the standard deviation of several.

    Raises:
        UserError: nothing to show, or the picture cannot be written.
    """
    split = _checked(rows, split)
    plt = _pyplot()
    estimates, labels = [row.estimates(split) for row in rows], list(split.columns)
    names = [row.name for row in rows]
    figure, axis = plt.subplots(figsize=(_WIDTH, 3.6 + _legend_height(names)), layout="constrained")
    width = 0.84 / len(rows)
    for i, of_row in enumerate(estimates):
        there = [n for n, label in enumerate(labels) if label in of_row]
        values = [of_row[labels[n]] for n in there]
        places = [n + (i - (len(rows) - 1) / 2) * width for n in there]
        axis.bar(
            places,
            [e.value for e in values],
            width * 0.92,
            yerr=[[max(0.0, e.value - e.low) for e in values], [max(0.0, e.high - e.value) for e in values]],
            error_kw={"elinewidth": 0.9, "capsize": min(3, 14 / len(rows)), "ecolor": "#333333"},
            label=_wrapped(names[i]),
            color=_COLOURS[i % len(_COLOURS)],
            hatch=_HATCHES[i // len(_COLOURS) % len(_HATCHES)],
            edgecolor="white",
            linewidth=0,
        )
        if len(rows) * len(labels) <= 21:  # more would run into each other
            for place, e in zip(places, values, strict=True):
                axis.annotate(
                    f"{e.value:.1f}", (place, e.high), (0, 2), textcoords="offset points", ha="center", fontsize=7
                )
    if AVERAGE in labels:
        axis.axvline(labels.index(AVERAGE) - 0.5, color="#999999", linewidth=0.8, linestyle=":")
    axis.set(xlim=(-0.5, len(labels) - 0.5), ylabel="top-1, %")
    axis.set_xticks(range(len(labels)), [textwrap.fill(label, max(8, 84 // len(labels))) for label in labels])
    axis.tick_params(axis="x", length=0)
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)
    _despine(axis)
    handles, texts = axis.get_legend_handles_labels()
    _legend(figure, handles, texts, title=_whiskers(rows))
    _save(figure, path)


def _whiskers(rows: Sequence[Row]) -> str:
    """What the error bars are."""
    several = [len(row.per_seed) > 1 for row in rows]
    of_one, of_several = "95 % interval over draws of the test set", "standard deviation over seeds"
    if all(several):
        return f"error bars: {of_several}"
    return f"error bars: {of_one}" + (f" (one seed) or {of_several}" if any(several) else "")


def reliability_chart(models: Sequence[ModelResult], path: Path, split: Split | None = None) -> None:
    """For each set, accuracy over confidence by bin (the larger a marker, the more of the samples), and below it the
    expected calibration error of each model.

    Raises:
        UserError: nothing to show, or the picture cannot be written.
    """
    split = _checked([Row(model.name, (model,)) for model in models], split)
    plt = _pyplot()
    from matplotlib.lines import Line2D

    sets = {label: n for label, n in split.columns.items() if n is not None and any(n in m.sets for m in models)}
    columns = min(3, len(sets))
    lines = -(-len(sets) // columns)
    errors_height = 0.55 + 0.15 * len(models)
    names = [model.name for model in models]
    figure = plt.figure(figsize=(_WIDTH, lines * (2.75 + errors_height) + _legend_height(names)), layout="constrained")
    grid = figure.add_gridspec(2 * lines, max(columns, 2), height_ratios=[2.75, errors_height] * lines)
    largest = max(m.sets[name].ece for m in models for name in sets.values() if name in m.sets)
    for n, (label, name) in enumerate(sets.items()):
        line, column = divmod(n, columns)
        axis, errors = (figure.add_subplot(grid[2 * line + below, column]) for below in (0, 1))
        axis.plot([0, 100], [0, 100], color="#999999", linewidth=0.8, linestyle="--")
        for i, model in enumerate(models):
            if name not in model.sets:
                continue
            bins = [b for b in model.sets[name].calibration if b[0]]
            total = sum(samples for samples, _, _ in bins)
            x = [100 * confidence / samples for samples, _, confidence in bins]
            y = [100 * correct / samples for samples, correct, _ in bins]
            axis.plot(x, y, color=_colour(i), linestyle=_dashes(i), linewidth=0.9)
            sizes = [3 + 90 * samples / total for samples, _, _ in bins]
            axis.scatter(x, y, sizes, color=_colour(i), marker=_MARKERS[i % len(_MARKERS)], linewidths=0)
            error = 100 * model.sets[name].ece
            errors.barh(
                i, error, 0.75, color=_colour(i), hatch=_HATCHES[i // len(_COLOURS) % len(_HATCHES)], edgecolor="w"
            )
            errors.annotate(f"{error:.1f}", (error, i), (3, 0), textcoords="offset points", va="center", fontsize=7)
        axis.set(xlim=(0, 100), ylim=(0, 100), aspect="equal")
        axis.set_title(label, fontsize=10)
        axis.set_xlabel("confidence, %", fontsize=_SMALL)
        if column == 0:
            axis.set_ylabel("accuracy, %", fontsize=_SMALL)
        errors.set(xlim=(0, 125 * largest or 1), ylim=(len(models) - 0.4, -0.6), yticks=[])
        errors.set_xlabel("ECE, %", fontsize=_SMALL)
        for panel in (axis, errors):
            panel.tick_params(labelsize=7)
            panel.grid(alpha=0.3, axis="both" if panel is axis else "x")
            panel.set_axisbelow(True)
            _despine(panel)
    handles = [
        Line2D([], [], color=_colour(i), linestyle=_dashes(i), marker=_MARKERS[i % len(_MARKERS)], markersize=5)
        for i in range(len(models))
    ]
    _legend(figure, handles, [_wrapped(name) for name in names])
    _save(figure, path)


def sweep_chart(results: Results, path: Path, split: Split | None = None) -> None:
    """What each share α of the fine-tuned model gives: the curve from in-distribution to shifted accuracy, where there
    is both, and each set over α. The chosen α is marked.

    Raises:
        UserError: the models are no mixtures, were not evaluated, or the picture cannot be written.
    """
    split = split or results.split
    mixed = [model for model in results.models if model.alpha is not None]
    if not mixed:
        raise UserError(
            "There is no α to draw over: none of these models is a mixture. Give the results of tools/wise_ft.py."
        )
    models = sorted(mixed, key=lambda model: model.alpha or 0.0)
    rows = [Row(model.name, (model,)) for model in models]
    _checked(rows, split)
    alphas = [model.alpha or 0.0 for model in models]
    estimates = [row.estimates(split) for row in rows]
    best = None if results.chosen is None else results.models[results.chosen]
    chosen = models.index(best) if best in models else None
    columns = [label for label in split.columns if all(label in e for e in estimates)]
    series = {label: [e[label].value for e in estimates] for label in columns}
    home = next((label for label in columns if split.columns[label] == split.in_distribution), None)
    shifted = AVERAGE if AVERAGE in series else next((c for c in columns if split.columns[c] in split.shifted), None)

    plt = _pyplot()
    from matplotlib.lines import Line2D

    both = home is not None and shifted is not None
    height = 3.7 + _legend_height(columns)
    figure, axes = plt.subplots(1, 1 + both, figsize=(_WIDTH, height), squeeze=False, layout="constrained")
    over = axes[0, -1]
    mark, colours = _COLOURS[1], [colour for colour in _COLOURS[:6] if colour != _COLOURS[1]]
    for i, label in enumerate(columns):
        look: dict[str, Any] = {"marker": _MARKERS[i % len(_MARKERS)], "markersize": 4, "linewidth": 1.2}
        if label == home:
            look |= {"color": "#000000", "linewidth": 2.2}
        elif label == AVERAGE:
            look |= {"color": "#5A5A5A", "linewidth": 2.2, "linestyle": "--"}
        elif split.columns[label] in split.others:
            look |= {"color": "#8A8A8A", "linestyle": ":"}
        else:
            look["color"] = colours[i % len(colours)]
        over.plot(alphas, series[label], label=label, **look)
    over.set(xlabel="α, share of the fine-tuned model", xlim=(-0.05, 1.05), ylabel="top-1, %")
    if chosen is not None:
        over.axvline(alphas[chosen], color=mark, linewidth=1, linestyle=(0, (4, 2)), zorder=0)
    if home is not None and shifted is not None:
        curve = axes[0, 0]
        x, y = series[home], series[shifted]
        curve.plot(x, y, "o-", color=_COLOURS[0], markersize=4, linewidth=1.4)
        if chosen is not None:
            curve.plot(x[chosen], y[chosen], "*", color=mark, markersize=14, zorder=3)
        curve.set(xlabel=f"{home}, top-1 %")
        curve.set_ylabel(f"mean of shifted sets ({AVERAGE}), top-1 %" if shifted == AVERAGE else f"{shifted}, top-1 %")
        curve.margins(0.14)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        _despine(axis)
    handles, labels = over.get_legend_handles_labels()
    if chosen is not None:
        handles.append(Line2D([], [], color=mark, marker="*", markersize=11, linestyle=(0, (4, 2)), linewidth=1))
        where = f", on {results.chosen_on}" if results.chosen_on else ""
        labels.append(f"chosen{where}: α = {alphas[chosen]:g}")
    _legend(figure, handles, labels)
    if both:
        _label_points(
            figure, axes[0, 0], x, y, [f"α = {a:g}" if i == 0 else f"{a:g}" for i, a in enumerate(alphas)], chosen
        )
    _save(figure, path)


def _label_points(
    figure: Any, axis: Any, x: Sequence[float], y: Sequence[float], labels: Sequence[str], first: int | None
) -> None:
    """Labels beside the points of a curve: of its ends, of ``first``, and of all others that have room."""
    figure.canvas.draw()  # places are known once the layout is
    figure.set_layout_engine("none")
    scale = 72 / figure.dpi
    places = [(a * scale, b * scale) for a, b in axis.transData.transform(list(zip(x, y, strict=True)))]
    middle = [statistics.fmean(p[d] for p in places) for d in (0, 1)]
    order = [i for i in (first, 0, len(x) - 1) if i is not None]
    taken: list[tuple[float, float]] = []
    for i in dict.fromkeys([*order, *range(len(x))]):
        # Across the curve, on the side away from its middle, and so far that the text is clear of the point.
        before, after = places[max(0, i - 1)], places[min(len(x) - 1, i + 1)]
        across = (before[1] - after[1], after[0] - before[0])
        length = math.hypot(*across)
        across = (across[0] / length, across[1] / length) if length else (0.0, 1.0)
        if sum((places[i][d] - middle[d]) * across[d] for d in (0, 1)) < 0:
            across = (-across[0], -across[1])
        step = 6 + 2.4 * len(labels[i]) * abs(across[0]) + 4 * abs(across[1]) + 3 * (i == first)
        offset = (across[0] * step, across[1] * step)
        place = (places[i][0] + offset[0], places[i][1] + offset[1])
        room = all(abs(place[0] - p[0]) > 22 or abs(place[1] - p[1]) > 10 for p in taken)
        if not room or any(math.dist(place, p) < 8 for p in places):
            continue
        taken.append(place)
        axis.annotate(
            labels[i], (x[i], y[i]), offset, textcoords="offset points", ha="center", va="center", fontsize=_SMALL
        )


def effective_robustness(
    points: Sequence[Row], fit_on: Iterable[str], path: Path, split: Split | None = None
) -> dict[str, dict[str, float]]:
    """A panel a shifted set: accuracy on it over accuracy in distribution, on logit scales, with the line through the
    models ``fit_on``, and y = x. Below, how far each model is above the line.

    Taori et al., Measuring Robustness to Natural Distribution Shifts in Image Classification, NeurIPS 2020; Miller et
    al., Accuracy on the Line, ICML 2021.

    Returns:
        Effective robustness in percentage points, as ``effective_values`` has it.

    Raises:
        UserError: as ``robustness_panels``, or the picture cannot be written.
    """
    fit_on = set(fit_on)
    split = split or Split.of_rows(points)
    panels = robustness_panels(points, [row.name for row in points if row.name in fit_on] + sorted(fit_on), split)
    values = effective_values(panels)
    plt = _pyplot()
    from matplotlib.lines import Line2D

    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    right, room = _number_columns(values)
    names = {name: _wrapped(name, room) for name in values}
    heights = [0.22 + 0.145 * names[name].count("\n") for name in values]
    table_height = sum(heights) + 2 * _LINE
    figure = plt.figure(figsize=(_WIDTH, 2.7 * lines + table_height + 0.35), layout="constrained")
    grid = figure.add_gridspec(lines + 1, max(2, columns), height_ratios=[2.7] * lines + [table_height])
    home = next(label for label, name in split.columns.items() if name == split.in_distribution)
    looks = {
        name: {
            "marker": _MARKERS[i % len(_MARKERS)],
            "color": _colour(i),
            "markerfacecolor": "white" if name in fit_on else _colour(i),
            "markersize": 6,
            "linestyle": "",
        }
        for i, name in enumerate(values)
    }
    for n, (label, panel) in enumerate(panels.items()):
        axis = figure.add_subplot(grid[divmod(n, columns)])
        xs, ys = zip(*panel.points.values(), strict=True)
        lower, upper = min(xs), max(xs)
        margin = 0.08 * (upper - lower)
        ends = [lower - margin, upper + margin]
        fitted = [panel.fit.slope * x + panel.fit.intercept for x in ends]
        bottom, top = min(*ys, *fitted), max(*ys, *fitted)
        for name, (x, y) in panel.points.items():
            axis.plot(x, y, **looks[name], zorder=3)
        axis.plot(ends, fitted, color="#333333", linewidth=1.1)
        axis.plot([-20, 20], [-20, 20], color="#999999", linewidth=0.9, linestyle="--")
        axis.set(xlim=ends, ylim=(bottom - 0.08 * (top - bottom), top + 0.08 * (top - bottom)))
        _percent_ticks(axis.xaxis, ends)
        _percent_ticks(axis.yaxis, axis.get_ylim())
        axis.set_title(label, fontsize=10)
        axis.set_xlabel(f"{home}, top-1 %", fontsize=_SMALL)
        if n % columns == 0:
            axis.set_ylabel("shifted set, top-1 %", fontsize=_SMALL)
        axis.grid(alpha=0.3)
        _despine(axis)
    _robustness_legend(figure.add_subplot(grid[lines, :]), values, names, looks, right, heights)
    figure.legend(
        [
            Line2D([], [], color="#333333", linewidth=1.1),
            Line2D([], [], color="#999999", linewidth=0.9, linestyle="--"),
            Line2D([], [], color="#333333", marker="o", markerfacecolor="white", linestyle=""),
        ],
        ["fit in logits", "y = x", "fitted on"],
        loc="outside upper center",
        ncols=3,
        fontsize=_SMALL,
        frameon=False,
    )
    _save(figure, path)
    return values


def _number_columns(values: Mapping[str, Mapping[str, float]]) -> tuple[dict[str, float], int]:
    """Right edges of the columns of numbers by label, as shares of the picture's width, and how many characters of a
    name fit beside them."""
    character, gap = 0.0082, 0.02
    labels = dict.fromkeys(label for of_model in values.values() for label in of_model)
    right, edge = {}, 1.0
    for label in reversed(labels):
        right[label] = edge
        edge -= gap + character * max(5, len(label))
    return dict(reversed(right.items())), max(20, int((edge - 0.035) / character))


def _robustness_legend(
    axis: Any,
    values: Mapping[str, Mapping[str, float]],
    names: Mapping[str, str],
    looks: Mapping[str, dict[str, Any]],
    right: Mapping[str, float],
    heights: Sequence[float],
) -> None:
    """The models' markers and names, and their numbers: legend and table in one.

    names: wrapped, by name. looks: of markers. right: ``_number_columns``. heights: of the lines, in inches.
    """
    axis.set(xlim=(0, 1), ylim=(sum(heights) + 2 * _LINE, 0))
    axis.set_axis_off()
    axis.text(0.035, _LINE, "effective robustness, points", fontsize=_SMALL, va="center", style="italic")
    for label, x in right.items():
        axis.text(x, _LINE, label, fontsize=_SMALL, va="center", ha="right", style="italic")
    y = 1.7 * _LINE
    axis.plot([0, 1], [y, y], color="#999999", linewidth=0.8)
    for (name, of_model), height in zip(values.items(), heights, strict=True):
        y += height
        axis.plot(0.012, y - height / 2, **looks[name])
        axis.text(0.035, y - height / 2, names[name], fontsize=_SMALL, va="center", linespacing=1.05)
        for label, x in right.items():
            axis.text(x, y - height / 2, _signed(of_model.get(label)), fontsize=_SMALL, va="center", ha="right")


def _percent_ticks(axis: Any, limits: Sequence[float]) -> None:
    """Ticks in percent on an axis of logits."""
    from matplotlib.ticker import MaxNLocator

    low, high = (100 * float(expit(limit)) for limit in limits)
    steps: Sequence[float] = MaxNLocator(5).tick_values(low, high)
    if limits[1] - limits[0] > 4:  # equal steps in percent would crowd where percents are close together
        steps = (0.001, 0.01, 0.1, 1, 5, 20, 50, 80, 95, 99, 99.9, 99.99, 99.999)
    ticks = [t for t in steps if low <= t <= high and 0 < t < 100]
    axis.set_ticks([float(logit(t / 100)) for t in ticks], [f"{t:g}" for t in ticks], fontsize=7)


def _colour(i: int) -> str:
    return _COLOURS[i % len(_COLOURS)]


def _dashes(i: int) -> Any:
    return _DASHES[i // len(_COLOURS) % len(_DASHES)]


def _despine(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)


def _wrapped(name: str, width: int = 100) -> str:
    """A name that is too long for a line, on several."""
    return textwrap.fill(name, width)


def _legend_columns(labels: Sequence[str]) -> int:
    """As many as fit beside each other: some 125 characters of small text are as wide as a picture."""
    longest = max(len(line) for label in labels for line in label.split("\n"))
    return max(1, min(len(labels), 4, 125 // (longest + 8)))


def _legend_height(names: Sequence[str]) -> float:
    """Inches that ``_legend`` takes."""
    labels = [_wrapped(name) for name in names]
    lines = sum(label.count("\n") + 1 for label in labels)
    return 0.2 + _LINE * -(-lines // _legend_columns(labels))


def _legend(figure: Any, handles: Sequence[Any], labels: Sequence[str], title: str | None = None) -> None:
    """Below all panels, where it hides nothing."""
    figure.legend(
        handles,
        labels,
        title=title,
        title_fontsize=_SMALL,
        loc="outside lower center",
        ncols=_legend_columns(labels),
        fontsize=_SMALL,
        frameon=False,
        handlelength=2.6,
    )


def _save(figure: Any, path: Path) -> None:
    """Write a picture and forget it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}). Choose another place.") from error
    except ValueError as error:
        raise UserError(f"{path} is no picture that can be written: {error}. Name it .png, .pdf or .svg.") from error
    finally:
        _pyplot().close(figure)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
