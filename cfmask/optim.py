"""AdamW and its learning rate, as appendix A.1 has them."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from cfmask.recipe import Optim


def learning_rate(step: int, total_steps: int, settings: Optim) -> float:
    """Rate of optimizer step ``step`` (from 0): linear warm-up to the peak, then a cosine that ends at 0.

    A run shorter than its warm-up only warms up.
    """
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(1, total_steps - settings.warmup_steps)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * progress))


def adamw(parameters: Iterable[nn.Parameter], settings: Optim) -> torch.optim.AdamW:
    """AdamW with weight decay on all parameters; one fused kernel on GPUs."""
    parameters = list(parameters)
    return torch.optim.AdamW(
        parameters,
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=parameters[0].is_cuda,
    )
