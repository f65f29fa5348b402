"""AdamW, its learning-rate schedule and the phases of a run: appendix A.1, or the authors' code.

Schedules are functions of the step and not torch's schedulers, so that a resumed run needs no schedule state.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cfmask.recipe import Optim, Recipe

# Defaults of torch.optim.lr_scheduler.OneCycleLR; the share of warm-up is that of the authors' code.
_ONE_CYCLE_WARMUP = 0.02
_ONE_CYCLE_START, _ONE_CYCLE_END = 25.0, 1e4
_ONE_CYCLE_BETA1 = (0.85, 0.95)

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state of a parameter, except its number of updates."""


@dataclass(frozen=True)
class Phase:
    """Steps ``start`` … ``end`` - 1 of a run, with one optimizer and one schedule."""

    start: int
    end: int
    tower: bool
    """Whether the image tower is trained; otherwise the head alone."""
    lr: float
    """Peak learning rate."""
    weight_decay: float


@dataclass(frozen=True)
class LrAndBetas:
    """Values that a schedule sets at a step."""

    lr: float
    beta1: float


def phases(recipe: Recipe, epoch_steps: int) -> tuple[Phase, ...]:
    """The phases of a resolved recipe, in order: one; or for LP-FT (Kumar et al., ICLR 2022) the head alone, then the
    whole model."""
    o = recipe.optim
    assert o.lr is not None
    probe = (o.probe_epochs or 0) * epoch_steps
    end = o.total_epochs * epoch_steps
    main = Phase(probe, end, recipe.method.name != "linear-probe", o.lr, o.weight_decay or 0.0)
    if not probe:
        return (main,)
    assert o.probe_lr is not None
    return Phase(0, probe, False, o.probe_lr, 0.0), main


def lr_and_betas(step: int, phase: Phase, settings: Optim) -> LrAndBetas:
    """The learning rate and β1 of step ``step`` of the run (from 0), which lies in ``phase``."""
    taken, steps = step - phase.start, phase.end - phase.start
    if settings.schedule == "one-cycle":
        return _one_cycle(taken, steps, phase.lr)
    assert settings.warmup_steps is not None and settings.beta1 is not None
    return LrAndBetas(phase.lr * warmup_then_cosine(taken, steps, settings.warmup_steps), settings.beta1)


def warmup_then_cosine(taken: int, steps: int, warmup: int) -> float:
    """Learning rate as a share of its peak: a linear warm-up, then a cosine down to 0. A run that is shorter than its
    warm-up has only the warm-up."""
    if taken < warmup:
        return (taken + 1) / warmup
    progress = (taken - warmup) / max(1, steps - warmup)
    return 0.5 * (1 + math.cos(math.pi * progress))


def _one_cycle(taken: int, steps: int, peak: float) -> LrAndBetas:
    """OneCycleLR with momentum cycling (Smith and Topin, 2019; torch.optim.lr_scheduler.OneCycleLR)."""
    low, high = _ONE_CYCLE_BETA1
    top = _ONE_CYCLE_WARMUP * steps - 1  # the step of the peak; not necessarily a whole number
    start = peak / _ONE_CYCLE_START
    if taken < top:
        share = taken / top
        return LrAndBetas(_cosine(start, peak, share), _cosine(high, low, share))
    share = (taken - top) / (steps - 1 - top)
    return LrAndBetas(_cosine(peak, start / _ONE_CYCLE_END, share), _cosine(low, high, share))


def _cosine(begin: float, end: float, share: float) -> float:
    return end + (begin - end) / 2 * (1 + math.cos(math.pi * share))


def adamw(parameters: Iterable[nn.Parameter], phase: Phase, settings: Optim) -> torch.optim.AdamW:
    """AdamW over a phase's parameters, weight decay on all of them, in one fused kernel."""
    return torch.optim.AdamW(
        parameters,
        lr=phase.lr,
        betas=(settings.beta1 or _ONE_CYCLE_BETA1[1], settings.beta2),
        eps=settings.eps,
        weight_decay=phase.weight_decay,
        fused=True,
    )


def trained_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Names and parameters that require a gradient."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def take_step(optimizer: torch.optim.AdamW, now: LrAndBetas, clip_norm: float) -> Tensor:
    """Clip all gradients once and take a step, or skip it if they are not finite. Sets the gradients to None.

    The device decides, so the host does not wait. A skipped step changes no weight, no moment and no count.

    Returns:
        The L2 norm of the gradients before clipping, (): nan or inf if the step was skipped.
    """
    for group in optimizer.param_groups:
        group["lr"], group["betas"] = now.lr, (now.beta1, group["betas"][1])
    norm = nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip_norm)
    # The fused kernel skips the step if found_inf is set; torch.amp.GradScaler uses it too.
    optimizer.grad_scale, optimizer.found_inf = None, (~norm.isfinite()).float()  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
