"""Effective robustness: how far accuracy on a shifted set exceeds what accuracy in distribution predicts.

Taori et al., Measuring Robustness to Natural Distribution Shifts in Image Classification, NeurIPS 2020; Miller et al.,
Accuracy on the Line, ICML 2021.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scipy.special import expit, logit

from cfmask.data.benchmarks import BENCHMARKS, VAL
from cfmask.errors import UserError
from cfmask.evaluation.model_origin import ZERO_SHOT, origin_of
from cfmask.models.architecture import vision_differences
from cfmask.models.head import read_info
from cfmask.report.results import AVERAGE, IMAGENET, LABELS, ModelResult, ResultRow, SetResult, Split
from cfmask.report.tables import PUBLISHED, markdown_text, signed, table


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


# --- models that the line is fitted to --------------------------------------------------------------------------------

PUBLISHED_LINE = "published"
"""What --fit-on takes for the published zero-shot models."""
WHY_TWO = (
    "Effective robustness is the distance from a line through zero-shot models of two backbones or more. A line "
    "through zero-shot and fine-tuned model of one backbone would give fine-tuning 0 by construction."
)


@dataclass(frozen=True)
class Line:
    """Zero-shot models that the line is fitted to."""

    backbones: dict[str, str]
    """Their backbones by the names of their rows."""
    published: tuple[ResultRow, ...] = ()
    """Those of them that are published rows instead of models that were evaluated."""

    @classmethod
    def of(cls, files: Mapping[str, str], split: Split, *, published: bool) -> Line:
        """The line through models and, if asked for, published rows.

        Args:
            files: model files by the names of their rows.
            published: also fit to the published zero-shot rows.

        Raises:
            UserError: a model is not zero-shot, there are fewer than two backbones, or no set has published rows.
        """
        rows = published_zero_shot(split) if published else []
        backbones = _backbones(files) | {row.name: row.name for row in rows}
        if len(set(backbones.values())) < 2:
            raise UserError(
                f"{WHY_TWO} --fit-on names {len(files)} of {len(set(backbones.values()))} backbone. Add a zero-shot "
                f"model of another one, or --fit-on {PUBLISHED_LINE}."
            )
        return cls(backbones, tuple(rows))


def _backbones(files: Mapping[str, str]) -> dict[str, str]:
    """By name, the name of the first model with the same architecture. Raises UserError if a model is not zero-shot."""
    configs: dict[str, dict[str, Any]] = {}
    backbones: dict[str, str] = {}
    for name, file in files.items():
        origin, info = origin_of(file), read_info(file)
        if info is None or origin.method not in (None, ZERO_SHOT):
            what = f"is of the method {origin.method}" if info else "is no cfmask model file"
            raise UserError(f"--fit-on {name} is not a zero-shot model: {file} {what}. {WHY_TWO}")
        config = {**info.config, "quick_gelu": False}  # OpenAI's ViT-B/32 and LAION's are one backbone
        alike = [other for other, theirs in configs.items() if not vision_differences(theirs, config)]
        configs[name], backbones[name] = config, backbones[alike[0]] if alike else name
    return backbones


def published_zero_shot(split: Split) -> list[ResultRow]:
    """The published zero-shot accuracies of OpenAI's CLIP as rows, on the sets of ImageNet in a split.

    Raises:
        UserError: the split lacks ImageNet's validation set, or its shifted sets.
    """
    if split.in_distribution not in IMAGENET or not set(split.shifted) & set(LABELS):
        raise UserError(
            f"--fit-on {PUBLISHED_LINE} needs ImageNet's validation set ({VAL.name}) and one of its five shifted sets: "
            "the published accuracies are on these."
        )
    rows = []
    for arch, published in PUBLISHED.items():
        sets = {}
        for name in (split.in_distribution, *split.shifted):
            top1 = published[ZERO_SHOT].get(LABELS.get(name, ""))
            if top1 is not None:
                total = BENCHMARKS[VAL.name if name in IMAGENET else name].images
                sets[name] = SetResult(round(top1 / 100 * total), total, top1, (top1, top1), 0.0, (), {})
        name = f"{ZERO_SHOT} {arch} (published)"
        rows.append(ResultRow(name, (ModelResult(name, sets, method=ZERO_SHOT),)))
    return rows


# --- distances from the line ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RobustnessPanel:
    """Models on one shifted set."""

    fit: LogitFit
    points: dict[str, tuple[float, float]]
    """By model, logits of the accuracy in distribution and on the shifted set."""
    effective: dict[str, float]
    """By model, percentage points of top-1 above the line."""


def robustness_panels(
    points: Sequence[ResultRow], fit_on: Mapping[str, str], split: Split | None = None
) -> dict[str, RobustnessPanel]:
    """Panels by column heading of the shifted sets, each with the models that were evaluated on it.

    Args:
        points: models; the seeds of a row are one point, their mean.
        fit_on: by names of those ``points`` that are zero-shot models, to which the line is fitted, their backbones.

    Raises:
        UserError: fewer than two backbones to fit on, two points of one name, no in-distribution or no shifted set.
    """
    split = split or Split.of_rows(points)
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
        fitted = [logits[n] for n in fit_on if n in logits]
        if len({fit_on[n] for n in fit_on if n in logits}) < 2:
            given = ", ".join(n for n in fit_on if n in logits) or "none"
            raise UserError(f"{WHY_TWO} On {home} and {name}, there are of such models: {given}.")
        fit = fit_logits(*zip(*fitted, strict=True))
        panels[label] = RobustnessPanel(fit, logits, {n: means[n][1] - fit(logits[n][0]) for n in logits})
    return panels


def _samples(row: ResultRow, name: str) -> int:
    return row.per_seed[0].sets[name].total


def effective_values(
    panels: Mapping[str, RobustnessPanel], fit_on: Collection[str] = ()
) -> dict[str, dict[str, float]]:
    """Effective robustness in percentage points by model and column heading. With two shifted sets or more, models that
    were evaluated on all of them have their mean as well.

    Args:
        fit_on: models that the line is fitted to, which are left out: through two models, their distance is 0.
    """
    names = dict.fromkeys(name for panel in panels.values() for name in panel.points if name not in fit_on)
    values = {name: {label: p.effective[name] for label, p in panels.items() if name in p.effective} for name in names}
    if len(panels) > 1:
        for of_model in values.values():
            if len(of_model) == len(panels):
                of_model[AVERAGE] = statistics.fmean(of_model.values())
    return values


def robustness_table(values: Mapping[str, Mapping[str, float]], fit_on: Iterable[str]) -> str:
    """A Markdown table of ``effective_values``.

    Args:
        fit_on: names of the models that the line is fitted to.
    """
    labels = list(dict.fromkeys(label for of_model in values.values() for label in of_model))
    lines = [[markdown_text(n), *(signed(v.get(label)) for label in labels)] for n, v in values.items()]
    note = (
        f"Percentage points of top-1 above (+) or below (−) the line that is fitted, in logits, to {', '.join(fit_on)} "
        "(Taori et al., 2020): a model at 0 is as robust as zero-shot models of its accuracy. "
        "Accuracies of 0 and 100 % are moved by half a sample."
    )
    return table(["effective robustness", *map(markdown_text, labels)], lines) + "\n\n" + note
