"""WiSE-FT (Wortsman et al., "Robust fine-tuning of zero-shot models", CVPR 2022): interpolate the weights of a
zero-shot and a fine-tuned model,

    θ(α) = (1-α)·θ_zeroshot + α·θ_finetuned        over tower and head,

evaluate the mixture at each α, and keep the one that is best on a held-out set.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cfmask.errors import UserError
from cfmask.evaluation.counter import SetCounter
from cfmask.evaluation_spec import WiseFT
from cfmask.models.head import load_alike, save_model
from cfmask.models.tower import Classifier, Normalise
from cfmask.runs import RunFolder


def evaluate(evaluation: WiseFT, counter: SetCounter, run: RunFolder) -> dict[str, Any]:
    """Evaluate the mixture at each α, and write one to RUN/model.safetensors: that of a single α, or the one with the
    best accuracy on the held-out set (of ties, the first). Of several without a held-out set, none is chosen.

    Returns:
        ``sets`` and ``models`` of results.json, and with a choice ``chosen``, ``chosen_on`` and ``holdout``: top-1 in
        percent of each α on the held-out set.
    """
    alphas, holdout = evaluation.alphas, evaluation.holdout
    mixtures = Mixtures(evaluation.models, alphas, counter.device)
    counter.check_classes(mixtures.info.classes)
    counter.announce([*([holdout] if holdout else []), *evaluation.sets])
    rows: list[dict[str, Any]] = [{"name": f"α = {alpha:g}", "alpha": alpha} for alpha in alphas]

    choice: dict[str, Any] = {}
    if holdout:
        scores = counter.count("alphas", holdout, mixtures, [row["name"] for row in rows]).scores()
        best = max(range(len(alphas)), key=lambda i: scores[i].correct)
        choice = {"chosen_on": holdout, "holdout": [score.top1 for score in scores], "chosen": best}
    elif len(alphas) == 1:
        choice = {"chosen": 0}
    if choice and counter.is_main_process:
        mixtures.save(alphas[choice["chosen"]], run.final)
    return {**counter.results(evaluation.sets, mixtures, rows), **choice}


def interpolate_into(
    mixed: Mapping[str, Tensor], zero_shot: Mapping[str, Tensor], fine_tuned: Mapping[str, Tensor], alpha: float
) -> None:
    """Write (1-α)·zero_shot + α·fine_tuned into the tensors of ``mixed``, so that a sweep over α needs the memory of
    one model beside the two."""
    for key, out in mixed.items():
        torch.mul(zero_shot[key], 1 - alpha, out=out)
        out.add_(alpha * fine_tuned[key])


class Mixtures:
    """Iterates over the mixtures at each α, on the device. They share one model, whose weights each iteration replaces.

    info: metadata of both models.
    """

    def __init__(self, paths: Sequence[str], alphas: Sequence[float], device: torch.device) -> None:
        if len(paths) != 2:
            raise UserError(f"WiSE-FT mixes two models, zero-shot and fine-tuned, not {len(paths)}.")
        (zero, self.info), (fine, _) = load_alike(paths)
        self._paths, self._alphas = paths, alphas
        self._zero, self._fine = zero.to(device).state_dict(), fine.to(device).state_dict()
        self._model = copy.deepcopy(zero).eval().requires_grad_(False)
        self._normalise = Normalise(self.info.mean, self.info.std).to(device)

    def __iter__(self) -> Iterator[tuple[Classifier, Normalise]]:
        for alpha in self._alphas:
            interpolate_into(self._model.state_dict(), self._zero, self._fine, alpha)
            yield self._model, self._normalise

    def save(self, alpha: float, path: Path) -> None:
        """Write the model at α. Raises OSError."""
        interpolate_into(self._model.state_dict(), self._zero, self._fine, alpha)
        provenance = f"WiSE-FT, α = {alpha:g}, of {' and '.join(self._paths)}"
        save_model(path, self._model, replace(self.info, provenance=provenance))
