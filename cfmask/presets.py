"""Presets: recipes for the rows of the paper's tables, and for what the authors' code does."""

from __future__ import annotations

import dataclasses

from cfmask.recipe import Method, Optim, Recipe, Run, resolve_method

PRESETS: dict[str, Recipe] = {
    "linear-probe": Recipe(method=Method(name="linear-probe")),
    "lp-ft": Recipe(method=Method(name="lp-ft")),
    "ft": Recipe(method=Method(name="vanilla")),
    "kd-clean": Recipe(method=Method(name="kd", mask="none")),
    "kd-masked": Recipe(method=Method(name="kd", mask="object", fill="single-fill")),
    "fd-clean": Recipe(method=Method(mask="none")),
    **{
        f"{mask}-mask-{fill}": Recipe(method=Method(mask=mask, fill=fill))
        for mask in ("random", "object", "context")
        for fill in ("no-fill", "single-fill", "multi-fill")
    },
    "grad-cam": Recipe(method=Method(mask="object", fill="single-fill", cam="grad-cam")),
    "wise-kd": Recipe(method=Method(name="wise-kd", mask="object", fill="single-fill")),
    # The authors' code, with its method unless --method names another one. It has one learning rate for all methods and
    # no autocast. (Their PyTorch 1.11 multiplied matrices in TF32 on Ampere GPUs: --precision tf32.) The --probe-lr of
    # lp-ft has to be given: a preset for all methods cannot contain a setting of one method.
    "released-code": Recipe(optim=Optim(schedule="one-cycle", lr=3e-5), run=Run(precision="fp32")),
}


ALIASES = {
    **dict.fromkeys(("vanilla", "fine-tune", "fine-tuned", "fine-tuning"), "ft"),
    **dict.fromkeys(("finetune", "finetuned", "finetuning", "full-ft"), "ft"),
    **dict.fromkeys(("lp", "linear-probing"), "linear-probe"),
    "lpft": "lp-ft",
    **dict.fromkeys(("kd", "clean-kd"), "kd-clean"),
    "masked-kd": "kd-masked",
    **dict.fromkeys(("fd", "clean-distillation"), "fd-clean"),
    **{f"{mask}-mask": f"{mask}-mask-single-fill" for mask in ("random", "object", "context")},
    "gradcam": "grad-cam",
}
"""Other names by which presets can be asked for. The fill of a mask without one is the paper's."""


def canonical_name(name: str) -> str:
    """The preset's own name for one that people use, with any case, and blanks or _ for -; other names are
    returned unchanged."""
    plain = "-".join(name.lower().replace("_", " ").split())
    return plain if plain in PRESETS else ALIASES.get(plain, name)


def preset_of(recipe: Recipe) -> str | None:
    """The preset whose method, schedule, learning rate and precision a resolved recipe has; None if flags have changed
    one of these."""
    for name, preset in PRESETS.items():
        decided = (preset.method.name, preset.optim.schedule, preset.optim.lr, preset.run.precision)
        found = (recipe.method.name, recipe.optim.schedule, recipe.optim.lr, recipe.run.precision)
        if all(ours in (None, "auto", theirs) for ours, theirs in zip(decided, found, strict=True)):
            method = dataclasses.replace(preset.method, ensemble=recipe.method.ensemble)
            if resolve_method(method) == recipe.method:
                return name
    return None


def nearest_preset(recipe: Recipe) -> str | None:
    """``preset_of`` a resolved recipe; else the preset with its schedule and the same method, mask, fill and CAM, from
    which flags have changed numbers; None if there is none."""
    if name := preset_of(recipe):
        return name
    ours = recipe.method
    for name, preset in PRESETS.items():
        if (preset.optim.schedule, preset.method.name) == (recipe.optim.schedule, ours.name):
            method = resolve_method(dataclasses.replace(preset.method, ensemble=ours.ensemble))
            if (method.mask, method.fill, method.cam) == (ours.mask, ours.fill, ours.cam):
                return name
    return None


def method_name(recipe: Recipe) -> str:
    """``nearest_preset``, or else the parts of the method: "kd-context-mask-multi-fill"."""
    method = recipe.method
    return nearest_preset(recipe) or (method.row if method.cam != "grad-cam" else f"{method.row}, grad-cam")
