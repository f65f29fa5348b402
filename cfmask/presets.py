"""Presets: recipes for the rows of the paper's tables, and for what the authors' code does."""

from __future__ import annotations

import dataclasses

from cfmask.recipe import Method, Optim, Recipe, Run, resolve_method

# A preset is a row of the paper's tables, or what the authors' code does in its place.
PRESETS: dict[str, Recipe] = {
    "linear-probe": Recipe(method=Method(name="linear-probe")),
    "lp-ft": Recipe(method=Method(name="lp-ft")),
    "ft": Recipe(method=Method(name="vanilla")),
    "kd-clean": Recipe(method=Method(name="kd", mask="none")),
    "kd-masked": Recipe(method=Method(name="kd", mask="object", fill="single-fill")),
    "fd-clean": Recipe(method=Method(mask="none")),
    **{
        f"{mask}-mask-{chosen_fill}": Recipe(method=Method(mask=mask, fill=chosen_fill))
        for mask in ("random", "object", "context")
        for chosen_fill in ("no-fill", "single-fill", "multi-fill")
    },
    "grad-cam": Recipe(method=Method(mask="object", fill="single-fill", cam="grad-cam")),
    "wise-kd": Recipe(method=Method(name="wise-kd", mask="object", fill="single-fill")),
    # The authors' code: the method, unless --method names another. Its learning rate is the same whatever is trained,
    # and it has no autocast. (Their PyTorch 1.11 multiplied matrices in TF32 on Ampere GPUs: --precision tf32.) Of
    # lp-ft, the first phase's --probe-lr stays to be said: a setting that one method has is not for a preset of all.
    "released-code": Recipe(optim=Optim(schedule="one-cycle", lr=3e-5), run=Run(precision="fp32")),
}


def preset_of(recipe: Recipe) -> str | None:
    """The preset that a resolved recipe has the method of, and what else the preset decides (schedule, learning rate,
    precision); None if flags have changed these."""
    for name, preset in PRESETS.items():
        decided = (preset.method.name, preset.optim.schedule, preset.optim.lr, preset.run.precision)
        found = (recipe.method.name, recipe.optim.schedule, recipe.optim.lr, recipe.run.precision)
        if all(ours in (None, "auto", theirs) for ours, theirs in zip(decided, found, strict=True)):
            method = dataclasses.replace(preset.method, ensemble=recipe.method.ensemble)
            if resolve_method(method) == recipe.method:
                return name
    return None
