"""Values of log.jsonl and results.json for other programs: curves, which TensorBoard and Weights & Biases show under
the same names, accuracies, and stragglers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_NO_CURVES = ("step", "total_steps", "eta_s", "slowest_rank")


def curves_of(line: Mapping[str, Any]) -> dict[str, float]:
    """A line's values by the names of their curves: averages of training steps, top-1 by set, overlap of masks with
    objects, or the rate of an evaluation."""
    if "eval" in line:
        return {f"eval/{name}": top1 for name, top1 in line["eval"].items()}
    if "overlap" in line:
        return {
            f"overlap_{group}/{rate}_at_{threshold:g}": value
            for group, of_group in line["overlap"].items()
            for rate in ("image_masking_rate", "object_masking_rate", "iou")
            for threshold, value in zip(line["thresholds"], of_group[rate], strict=True)
            if value is not None
        }
    kind = "evaluation" if "set" in line else "train"
    numbers = {name: value for name, value in line.items() if name not in _NO_CURVES and isinstance(value, int | float)}
    return {f"{kind}/{name}": value for name, value in numbers.items()}


def top1_of(results: Mapping[str, Any]) -> dict[str, Any]:
    """Top-1 in results.json, in percent: by set, or for an evaluation by model and set."""
    if "models" in results:
        return {model["name"]: _by_set(model["sets"]) for model in results["models"]}
    return _by_set(results["sets"])


def _by_set(sets: Mapping[str, Any]) -> dict[str, float]:
    return {name: score["top1"] for name, score in sets.items()}


_STRAGGLER_FACTOR = 1.2
"""A rank is a straggler if it takes this many times the median."""


def straggler_of(line: Mapping[str, Any]) -> str | None:
    """Description of the slowest rank in a line of log.jsonl; None if no rank is much slower than the median."""
    seconds, median = line.get("slowest_rank_s"), line.get("median_rank_s")
    if not seconds or not median or seconds < _STRAGGLER_FACTOR * median:
        return None
    return f"rank {line['slowest_rank']} on {line['slowest_rank_node']} ({seconds / median:.1f} × the median)"
