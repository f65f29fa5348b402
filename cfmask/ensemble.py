"""Weight-space ensembles of models that share an architecture and a class list: WiSE-FT, and soups."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from cfmask.errors import UserError

State = Mapping[str, Tensor]


def interpolate_into(mixed: State, zero_shot: State, fine_tuned: State, alpha: float) -> None:
    """WiSE-FT (Wortsman et al., CVPR 2022): (1-α)·θ_zeroshot + α·θ_finetuned over tower and head, of one architecture,
    into tensors that are there: a sweep of α needs the memory of one model."""
    for key, out in mixed.items():
        torch.mul(zero_shot[key], 1 - alpha, out=out)
        out.add_(alpha * fine_tuned[key])


def average(states: Iterable[State]) -> dict[str, Tensor]:
    """The uniform soup (Wortsman et al., ICML 2022): the mean of the weights, in the order given. One state is held at
    a time beside the sum, which is in fp64: a soup does not depend on its ingredients' number by rounding.

    Raises:
        UserError: no states, or of several architectures.
    """
    total: dict[str, Tensor] = {}
    first: State = {}
    count = 0
    for state in states:
        if not total:
            first, total = state, {key: torch.zeros_like(value, dtype=torch.float64) for key, value in state.items()}
        _check_alike(first, state)
        for key, value in total.items():
            value += state[key]
        count += 1
    if not count:
        raise UserError("A soup of no models: name at least one.")
    return {key: (value / count).to(first[key].dtype) for key, value in total.items()}


def greedy_soup(accuracies: Sequence[int], score: Callable[[list[int]], int]) -> list[int]:
    """The greedy soup (Wortsman et al., ICML 2022, algorithm 1): models by falling accuracy on the held-out set, each
    kept if the average with it is not worse there than without it.

    Args:
        accuracies: right answers of each model alone.
        score: right answers of the average of some models, by their numbers; asked in the same order every time.

    Returns:
        Numbers of the models, in the order they went in. Of equals the one that was named first comes first.
    """
    order = sorted(range(len(accuracies)), key=lambda i: -accuracies[i])
    chosen, best = order[:1], accuracies[order[0]]
    for candidate in order[1:]:
        found = score([*chosen, candidate])
        if found >= best:
            chosen, best = [*chosen, candidate], found
    return chosen


def _check_alike(one: State, other: State) -> None:
    if one.keys() != other.keys() or any(one[k].shape != other[k].shape for k in one):
        raise UserError(
            "These two models have different tensors: weights can be averaged within one architecture only."
        )
