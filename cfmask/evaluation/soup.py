"""Model soups (Wortsman et al., "Model soups", ICML 2022): average the weights of models that were fine-tuned from the
same initial weights.

A uniform soup averages all of them. A greedy soup tries them best first, and omits each that lowers the accuracy on a
held-out set.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cfmask.evaluation.counter import SetCounter
from cfmask.evaluation_spec import GreedySoup, UniformSoup
from cfmask.models.head import ModelInfo, load_alike, save_model
from cfmask.models.tower import Classifier, Normalise
from cfmask.runs import RunFolder

StateDict = Mapping[str, Tensor]


def evaluate(evaluation: UniformSoup, counter: SetCounter, run: RunFolder) -> dict[str, Any]:
    """Choose the ingredients, write their average to RUN/model.safetensors, and evaluate it.

    Returns:
        ``sets``, ``models``, ``ingredients`` and ``chosen`` of results.json, and for a greedy soup those of
        ``choose_ingredients``.
    """
    ingredients = list(evaluation.models)
    choice: dict[str, Any] = {}
    if isinstance(evaluation, GreedySoup):
        assert evaluation.holdout is not None, "checked() refuses a greedy soup without a held-out set"
        counter.announce([evaluation.holdout] * len(ingredients) + list(evaluation.sets))
        ingredients, choice = choose_ingredients(ingredients, evaluation.holdout, counter)
    else:
        counter.announce(evaluation.sets)
    model, info = averaged_model(ingredients)
    counter.check_classes(info.classes)
    if counter.is_main_process:
        save_model(run.final, model, replace(info, provenance=f"{evaluation.make} of {', '.join(ingredients)}"))
    models = [(model.to(counter.device), Normalise(info.mean, info.std).to(counter.device))]
    results = counter.results(evaluation.sets, models, [{"name": evaluation.make}])
    return {**results, **choice, "ingredients": ingredients, "chosen": 0}


def choose_ingredients(paths: Sequence[str], holdout: str, counter: SetCounter) -> tuple[list[str], dict[str, Any]]:
    """The ingredients of a greedy soup, in the order in which they were added.

    Returns:
        Their paths, and of results.json ``chosen_on``, ``holdout`` (top-1 in percent of each model alone) and ``tried``
        (each soup that was tried, with its top-1).
    """
    alike = list(load_alike(paths))
    info = alike[0][1]
    counter.check_classes(info.classes)
    normalise = Normalise(info.mean, info.std).to(counter.device)
    alone = [(model.to(counter.device).eval().requires_grad_(False), normalise) for model, _ in alike]
    scores = counter.count("ingredients", holdout, alone, paths).scores()
    tried: list[dict[str, Any]] = []
    mixed = copy.deepcopy(alone[0][0])

    def score(numbers: list[int]) -> int:
        # Averaged on the CPU, like the soup that is saved.
        mixed.load_state_dict(average({k: v.cpu() for k, v in alone[i][0].state_dict().items()} for i in numbers))
        stage = "soup of " + " ".join(map(str, numbers))
        called = [f"The soup of {', '.join(paths[i] for i in numbers)}"]
        [found] = counter.count(stage, holdout, [(mixed, normalise)], called).scores()
        tried.append({"ingredients": [paths[i] for i in numbers], "top1": found.top1})
        return found.correct

    chosen = greedy_soup([one.correct for one in scores], score)
    return [paths[i] for i in chosen], {
        "chosen_on": holdout,
        "holdout": [one.top1 for one in scores],
        "tried": tried,
    }


def average(states: Iterable[StateDict]) -> dict[str, Tensor]:
    """The mean of weights, added in the order given. One state at a time is in memory beside the sum, which is fp64 so
    that rounding does not grow with the number of ingredients."""
    total: dict[str, Tensor] = {}
    first: StateDict = {}
    count = 0
    for state in states:
        if not total:
            first, total = state, {key: torch.zeros_like(value, dtype=torch.float64) for key, value in state.items()}
        for key, value in total.items():
            value += state[key]
        count += 1
    return {key: (value / count).to(first[key].dtype) for key, value in total.items()}


def greedy_soup(accuracies: Sequence[int], score: Callable[[list[int]], int]) -> list[int]:
    """The greedy soup (algorithm 1 of the paper): models are tried in order of decreasing accuracy on the held-out set,
    ties in the order given. Each is added if the average with it is not worse there than without it.

    Args:
        accuracies: right predictions of each model alone.
        score: right predictions of the average of some models, given their numbers. The order of calls is
        deterministic.

    Returns:
        Numbers of the models, in the order in which they were added.
    """
    order = sorted(range(len(accuracies)), key=lambda i: -accuracies[i])
    chosen, best = order[:1], accuracies[order[0]]
    for candidate in order[1:]:
        found = score([*chosen, candidate])
        if found >= best:
            chosen, best = [*chosen, candidate], found
    return chosen


def averaged_model(paths: Sequence[str]) -> tuple[Classifier, ModelInfo]:
    """The average of models, on the CPU. One model at a time is in memory beside the sum."""
    kept: list[tuple[Classifier, ModelInfo]] = []

    def states() -> Iterator[StateDict]:
        for model, info in load_alike(paths):
            if not kept:
                kept.append((copy.deepcopy(model).eval().requires_grad_(False), info))
            yield model.state_dict()

    mean = average(states())
    model, info = kept[0]
    model.load_state_dict(mean)
    return model, info
