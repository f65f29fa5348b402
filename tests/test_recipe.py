"""Recipes: the paper's values by default, nothing silently ignored, the same after a round trip."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest

from cfmask.errors import UserError
from cfmask.presets import PRESETS
from cfmask.recipe import Data, Method, Model, Optim, Recipe, Run
from cfmask.runs import load_recipe
from cfmask.runtime.patience import StorageUnavailable, impatient
from launch.submit import parser
from made import REPO


def test_defaults_are_those_of_appendix_a1():
    recipe = Recipe().resolved()
    assert recipe.optim == Optim(
        epochs=10,
        batch_size=512,
        lanes=16,
        micro_batches=1,
        lr=3e-5,
        schedule="cosine",
        warmup_steps=500,
        weight_decay=0.1,
        beta1=0.9,
        beta2=0.999,
        eps=1e-8,
        clip_norm=1.0,
    )
    assert recipe.method == Method(
        "feature-distillation", "object", "single-fill", threshold=0.3, cam="relevance", first_block=0, beta=30.0
    )


@pytest.mark.parametrize(
    ("preset", "value"),
    [
        ("random-mask-no-fill", 0.75),
        ("object-mask-no-fill", 0.3),
        ("context-mask-no-fill", 0.6),
        ("random-mask-single-fill", 0.5),
        ("object-mask-single-fill", 0.3),
        ("context-mask-single-fill", 0.5),
        ("random-mask-multi-fill", 0.5),
        ("object-mask-multi-fill", 0.6),
        ("context-mask-multi-fill", 0.3),
    ],
)
def test_presets_have_the_authors_thresholds_and_rates(preset, value):
    method = PRESETS[preset].resolved().method
    assert (method.rate if method.mask == "random" else method.threshold) == value


@pytest.mark.parametrize(
    ("method", "flag"),
    [
        (Method(name="vanilla", mask="object"), "--mask"),
        (Method(name="vanilla", fill="single-fill"), "--fill"),
        (Method(name="vanilla", beta=1.0), "--beta"),
        (Method(name="vanilla", beta_relative=1.0), "--beta-relative"),
        (Method(name="kd", beta_relative=1.0), "--beta-relative"),
        (Method(name="linear-probe", ensemble="x"), "--ensemble"),
        (Method(mask="none", fill="single-fill"), "--fill"),
        (Method(mask="object", rate=0.5), "--rate"),
        (Method(mask="random", threshold=0.5), "--threshold"),
        (Method(mask="random", cam="relevance"), "--cam"),
        (Method(mask="random", first_block=3), "--first-block"),
        (Method(cam="grad-cam", first_block=3), "--first-block"),
        (Method(gamma=1.0), "--gamma"),
        (Method(name="kd", beta=1.0), "--beta"),
    ],
)
def test_a_setting_without_effect_is_refused(method, flag):
    with pytest.raises(UserError, match=f"{flag}.* would do nothing"):
        Recipe(method=method).resolved()


@pytest.mark.parametrize(
    ("recipe", "flag"),
    [
        (Recipe(optim=Optim(probe_epochs=1)), "--probe-epochs"),
        (Recipe(optim=Optim(probe_lr=1.0)), "--probe-lr"),
        (Recipe(optim=Optim(schedule="one-cycle", warmup_steps=5)), "--warmup-steps"),
        (Recipe(optim=Optim(schedule="one-cycle", beta1=0.9)), "--adam-beta1"),
        (Recipe(method=Method(name="linear-probe"), optim=Optim(weight_decay=0.1)), "--weight-decay"),
    ],
)
def test_an_optimizer_setting_without_effect_is_refused(recipe, flag):
    with pytest.raises(UserError, match=f"{flag}.* would do nothing"):
        recipe.resolved()


def test_wise_kd_requires_an_ensemble():
    with pytest.raises(UserError, match="--ensemble FILE.*tools/wise_ft.py"):
        PRESETS["wise-kd"].resolved()
    method = dataclasses.replace(PRESETS["wise-kd"].method, ensemble="file")
    resolved = Recipe(method=method).resolved().method
    assert (resolved.beta, resolved.gamma, resolved.temperature) == (30.0, 1.0, 10.0)


def test_a_relative_beta_replaces_beta():
    resolved = Recipe(method=Method(beta_relative=6.0)).resolved()
    assert resolved.method.beta is None and resolved.method.mse_weight == 6.0
    assert resolved.resolved() == resolved
    assert resolved.of_weights()["method.beta_relative"] == 6.0
    with pytest.raises(UserError, match="--beta and --beta-relative"):
        Recipe(method=Method(beta=30.0, beta_relative=6.0)).resolved()


def test_a_recipe_of_an_earlier_version_is_read():
    values = Recipe().resolved().as_dict()
    del values["method"]["beta_relative"]
    assert Recipe.from_json(json.dumps(values)) == Recipe().resolved()


@pytest.mark.parametrize("name", sorted(set(PRESETS) - {"wise-kd"}))
def test_resolving_a_preset_is_idempotent(name):
    once = PRESETS[name].resolved()
    assert once.resolved() == once


@pytest.mark.parametrize(
    ("recipe", "flag"),
    [
        (Recipe(optim=Optim(batch_size=500)), "--batch-size 500"),
        (Recipe(optim=Optim(lr=float("nan"))), "--lr"),
        (Recipe(optim=Optim(epochs=0)), "--epochs"),
        (Recipe(optim=Optim(beta2=1.0)), "--adam-beta2"),
        (Recipe(method=Method(threshold=1.5)), "--threshold"),
        (Recipe(method=Method(beta=-1.0)), "--beta"),
        (Recipe(method=Method(fill="multi-fill"), optim=Optim(batch_size=16, lanes=16)), "multi-fill"),
        (Recipe(data=Data(eval_sets=("val", "val"))), "--eval-sets"),
        (Recipe(run=Run(seed=-1)), "--seed"),
    ],
)
def test_invalid_numbers_are_refused_by_flag(recipe, flag):
    with pytest.raises(UserError, match=flag):
        recipe.resolved()


def test_a_recipe_survives_its_file_and_lists_differences():
    recipe = Recipe(model=Model(head="h"), data=Data(shards="/s", eval_sets=("a", "b"))).resolved()
    assert Recipe.from_json(recipe.to_json()) == recipe
    other = dataclasses.replace(recipe, run=dataclasses.replace(recipe.run, seed=3))
    assert recipe.differences(other) == ["run.seed: 0 → 3"]
    assert recipe.digest() != other.digest()


def test_a_recipe_file_with_unknown_settings_is_refused():
    text = Recipe().to_json().replace('"lr"', '"learning_rate"')
    with pytest.raises(UserError, match="optim.learning_rate"):
        Recipe.from_json(text)
    with pytest.raises(UserError, match="not a recipe"):
        Recipe.from_json("[1, 2")
    with pytest.raises(UserError, match="holds no settings"):
        Recipe.from_json("[1, 2]")


def test_a_recipe_that_cannot_be_read_is_told_from_one_that_is_wrong(tmp_path, monkeypatch):
    path = tmp_path / "recipe.json"
    path.write_bytes(b"\xff{")
    with pytest.raises(UserError, match=f"^{path}: This is not a recipe"):
        load_recipe(path)

    def denied(*_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(type(path), "read_text", denied)
    with impatient(), pytest.raises(StorageUnavailable, match=f"^{path} cannot be read"):
        load_recipe(path)


def test_every_field_is_a_documented_flag():
    text = parser().format_help()
    for group in dataclasses.fields(Recipe):
        for setting in dataclasses.fields(group.default):
            assert setting.metadata["help"]
            flag = setting.metadata["flag"] or "--" + setting.name.replace("_", "-")
            assert (flag in text) is not setting.metadata["recorded"]


def test_help_needs_no_torch():
    code = "import sys; from launch.submit import parser; parser().format_help(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
