"""Effective robustness: how far accuracy on a shifted set exceeds what accuracy in distribution predicts.

Taori et al., Measuring Robustness to Natural Distribution Shifts in Image Classification, NeurIPS 2020; Miller et al.,
Accuracy on the Line, ICML 2021.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from scipy.special import expit, logit

from cfmask.errors import UserError
from cfmask.report.results import AVERAGE, ResultRow, Split
from cfmask.report.tables import markdown_text, signed, table


@dataclass(frozen=True)
class LogitFit:
    """logit(y) = slope · logit(x) + intercept, where x and y are shares of right predictions."""

    slope: float
    intercept: float

    def __call__(self, x: float) -> float:
        """Predicted top-1 in percent, for x in logits."""
        return 100 * float(expit(self.slope * x + self.intercept))


def clipped_logit(top1: float, samples: int) -> float:
    """Logit of an accuracy in percent. 0 and 100 %, which have none, are moved by half a sample."""
    half = 0.5 / samples
    return float(logit(min(max(top1 / 100, half), 1 - half)))


def fit_logits(x: Sequence[float], y: Sequence[float]) -> LogitFit:
    """Least squares through points in logits.

    Raises:
        UserError: fewer than two different x.
    """
    if len(set(x)) < 2:
        raise UserError(
            f"A line of effective robustness cannot be fitted through {len(set(x))} in-distribution accuracy: give two "
            "or more models of different accuracy to fit on, such as the zero-shot models of two architectures."
        )
    return LogitFit(*statistics.linear_regression(x, y))


@dataclass(frozen=True)
class RobustnessPanel:
    """Models on one shifted set."""

    fit: LogitFit
    points: dict[str, tuple[float, float]]
    """By model, logits of the accuracy in distribution and on the shifted set."""
    effective: dict[str, float]
    """By model, percentage points of top-1 above the line."""


def robustness_panels(
    points: Sequence[ResultRow], fit_on: Iterable[str], split: Split | None = None
) -> dict[str, RobustnessPanel]:
    """Panels by column heading of the shifted sets, each with the models that were evaluated on it.

    Args:
        points: models; the seeds of a row are one point, their mean.
        fit_on: names of the ``points`` to fit the line to.

    Raises:
        UserError: fewer than two models to fit on, two points of one name, no in-distribution or no shifted set.
    """
    split, fit_on = split or Split.of_rows(points), tuple(dict.fromkeys(fit_on))
    names = [row.name for row in points]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(
            f"Two models are called {twice[0]}, and their points could not be distinguished. Name them differently."
        )
    if missing := [name for name in fit_on if name not in names]:
        raise UserError(f"{missing[0]}, to fit on, is not among the models: {', '.join(names) or 'none'}.")
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
                f"Effective robustness on {name} needs a line through two models or more, and the number of those to "
                f"fit on that were evaluated on {home} and {name} is {len(fitted)}. Give the zero-shot models of two "
                "or more architectures, evaluated on both sets."
            )
        fit = fit_logits(*zip(*fitted, strict=True))
        panels[label] = RobustnessPanel(fit, logits, {n: means[n][1] - fit(logits[n][0]) for n in logits})
    return panels


def _samples(row: ResultRow, name: str) -> int:
    return row.per_seed[0].sets[name].total


def effective_values(panels: Mapping[str, RobustnessPanel]) -> dict[str, dict[str, float]]:
    """Effective robustness in percentage points by model and column heading. With two shifted sets or more, models that
    were evaluated on all of them have their mean as well."""
    names = list(dict.fromkeys(name for panel in panels.values() for name in panel.points))
    values = {name: {label: p.effective[name] for label, p in panels.items() if name in p.effective} for name in names}
    if len(panels) > 1:
        for of_model in values.values():
            if len(of_model) == len(panels):
                of_model[AVERAGE] = statistics.fmean(of_model.values())
    return values


def robustness_table(values: Mapping[str, Mapping[str, float]]) -> str:
    """A Markdown table of ``effective_values``."""
    labels = list(dict.fromkeys(label for of_model in values.values() for label in of_model))
    lines = [[markdown_text(n), *(signed(v.get(label)) for label in labels)] for n, v in values.items()]
    note = (
        "Percentage points of top-1 above (+) or below (−) the line that is fitted, in logits, to the models to fit on "
        "(Taori et al., 2020). Accuracies of 0 and 100 % are moved by half a sample."
    )
    return table(["effective robustness", *map(markdown_text, labels)], lines) + "\n\n" + note
