"""The same steps from one state, twice, in deterministic mode: are weights and moments bitwise identical?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tools.benchmarks.gpu.runner import Section
from tools.benchmarks.gpu.setting import B16, L14, Setting, free_memory, set_arithmetic
from tools.benchmarks.training import HEADLINE, Contender, Materials, OurStep, copied

STEPS = 3
CASES = [(B16, 64, False), (B16, 64, True), (L14, 16, False), (L14, 16, True)]
"""Model, batch, whether activations are recomputed. L/14 has 257 keys, three blocks of fused attention."""


def bits(setting: Setting, section: Section) -> dict[str, Any]:
    """Write the table, then fail if any tensor differs."""
    set_arithmetic("bf16", deterministic=True)
    rows: list[list[object]] = []
    result: dict[str, Any] = {}
    made: dict[str, Materials] = {}
    for model, batch, recompute in CASES:
        name = f"{model} at {batch}{', with recomputation' if recompute else ''}"
        if model not in made:
            made = {model: setting.materials(model, batch)}
        first, second = (end_of_steps(made[model], recompute, setting) for _ in range(2))
        free_memory(setting.device)
        differing = [key for key, value in first.items() if not torch.equal(value, second[key])]
        what = f"{len(differing)} of {len(first)} tensors differ" if differing else f"same bits, {len(first)} tensors"
        rows.append([name, what, ", ".join(differing[:3])])
        result[name] = {"tensors": len(first), "differing": differing[:20]}
    section.table(["step", f"after {STEPS} steps, twice", "such as"], rows)
    wrong = [name for name, found in result.items() if found["differing"]]
    assert not wrong, f"not deterministic: {', '.join(wrong)}"
    return result


def end_of_steps(m: Materials, recompute: bool, setting: Setting) -> dict[str, Tensor]:
    """Weights and moments after STEPS steps of a copy."""
    step = OurStep(copied(m, setting.device), Contender("bits", "bf16", HEADLINE, recompute=recompute))
    for _ in range(STEPS):
        step()
    found = {}
    for name, parameter in step.model.named_parameters():
        found[name] = parameter.detach()
        found |= {f"{key} of {name}": value for key, value in step.optimizer.state[parameter].items()}
    return found
