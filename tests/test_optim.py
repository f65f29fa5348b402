"""Schedules, phases, and steps that are skipped because gradients are not finite."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cfmask.checkpoint.state import Skips
from cfmask.optim import LrAndBetas, Phase, adamw, lr_and_betas, phases, take_step
from cfmask.recipe import Method, Optim, Recipe

A1 = Recipe().resolved().optim


def phase(steps: int, start: int = 0) -> Phase:
    return Phase(start, start + steps, tower=True, lr=3e-5, weight_decay=0.1)


def test_appendix_a1_warms_up_for_500_steps_and_ends_at_zero():
    whole = phase(25_000)
    values = [lr_and_betas(step, whole, A1) for step in range(25_000)]
    assert values[0].lr == pytest.approx(3e-5 / 500)
    assert values[499].lr == values[500].lr == 3e-5 == max(v.lr for v in values)
    assert values[12_750].lr == pytest.approx(1.5e-5, rel=1e-3)
    assert 0 < values[-1].lr < 1e-12
    assert {v.beta1 for v in values} == {0.9}


@given(steps=st.integers(2, 400), start=st.integers(0, 100))
def test_one_cycle_is_torchs_with_its_default_momentum_cycling(steps, start):
    settings = Recipe(optim=Optim(schedule="one-cycle")).resolved().optim
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([parameter], lr=3e-5)
    try:
        oracle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-5, total_steps=steps, pct_start=0.02)
    except ZeroDivisionError:  # torch's own, where the warm-up is one step long
        return
    for step in range(steps):
        (group,) = optimizer.param_groups
        ours = lr_and_betas(start + step, phase(steps, start), settings)
        assert ours.lr == pytest.approx(group["lr"], rel=1e-9)
        assert ours.beta1 == pytest.approx(group["betas"][0], rel=1e-9)
        optimizer.step()
        if step + 1 < steps:
            oracle.step()


@given(steps=st.integers(1, 200), warmup=st.integers(0, 300))
def test_rates_are_positive_at_every_step_of_a_run_of_any_length(steps, warmup):
    for schedule, warm in (("cosine", warmup), ("one-cycle", None)):
        settings = Recipe(optim=Optim(schedule=schedule, warmup_steps=warm)).resolved().optim
        for step in range(steps):
            now = lr_and_betas(step, phase(steps), settings)
            assert 0 < now.lr <= 3e-5 * (1 + 1e-12) and 0 < now.beta1 < 1


def test_phases_follow_each_other_and_a_probe_has_no_weight_decay():
    def of(name: str, **optim) -> tuple[Phase, ...]:
        return phases(Recipe(method=Method(name=name), optim=Optim(epochs=3, **optim)).resolved(), 10)

    assert of("vanilla") == (Phase(0, 30, True, 3e-5, 0.1),)
    assert of("linear-probe") == (Phase(0, 30, False, 1e-3, 0.0),)
    assert of("lp-ft", probe_epochs=2) == (Phase(0, 20, False, 1e-3, 0.0), Phase(20, 50, True, 3e-5, 0.1))


def module(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def give_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_steps_are_plain_adamws_clipped_once():
    ours, plain = module(0), module(0)
    optimizer = adamw(ours.parameters(), phase(10), A1)
    oracle = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(5):
        give_gradients(ours, step)
        give_gradients(plain, step)
        expected = nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        oracle.step()
        assert torch.equal(take_step(optimizer, LrAndBetas(1e-2, 0.9), 1.0), expected)
        assert all(p.grad is None for p in ours.parameters())
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_skipped_step_changes_nothing(value):
    model, alone = module(0), module(0)
    optimizer, undisturbed = (adamw(m.parameters(), phase(10), A1) for m in (model, alone))
    for step in range(4):
        if step == 2:
            give_gradients(model, 99)
            model[0].weight.grad[1, 1] = value
            before = copy.deepcopy(model.state_dict())
            norm = take_step(optimizer, LrAndBetas(1e-2, 0.9), 1.0)
            assert not norm.isfinite()
            assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())
        for m, o in ((model, optimizer), (alone, undisturbed)):
            give_gradients(m, step)
            take_step(o, LrAndBetas(1e-2, 0.9), 1.0)
    for a, b in zip(model.parameters(), alone.parameters(), strict=True):
        assert torch.equal(a, b)
        assert all(torch.equal(optimizer.state[a][name], undisturbed.state[b][name]) for name in optimizer.state[a])


def test_successive_skips_are_reset_by_the_next_step_taken():
    skips = Skips()
    for skipped in (True, True, False, True):
        skips = skips.plus(skipped)
    assert skips == Skips(total=3, in_a_row=1)
