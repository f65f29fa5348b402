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

from scipy.special import stdtrit

from cfmask.data.benchmarks import IMAGENET_A, IMAGENET_R, IMAGENET_SKETCH, IMAGENET_V2, OBJECTNET, SHIFTED, VAL
from cfmask.errors import UserError
from cfmask.evaluation import Evaluation
from tools._shared import table

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
        home = () if self.in_distribution is None else (self.in_distribution,)
        average: dict[str, str | None] = {AVERAGE: None} if len(self.shifted) > 1 else {}
        return {
            **{LABELS.get(name, name): name for name in (*home, *self.shifted)},
            **average,
            **{LABELS[n] if n in LABELS and n not in IMAGENET else n: n for n in self.others},
        }

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
    # A minus as wide as the plus, and no sign for what rounds to nothing.
    return f"{mark} {round(found.difference, 1) or 0.0:+.1f}".replace("-", "−").replace("+0.0", "0.0")


def _markdown_text(text: str) -> str:
    return text.replace("|", r"\|").replace("*", r"\*").replace("\n", " ")
