"""Names of presets, run folders and jobs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cfmask.presets import ALIASES, PRESETS, canonical_name, nearest_preset
from cfmask.recipe import Data, Method, Optim, Recipe, Run
from cfmask.runs import RunFolder
from launch import submit
from launch.submission.recipe_arguments import recipe_from
from launch.submission.sbatch import job_name
from launch.submission.training import default_folder


def parsed(*flags: str):
    return submit.parser().parse_args(list(flags))


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("ft", "ft"),
        ("Object_Mask", "object-mask-single-fill"),
        ("context-mask", "context-mask-single-fill"),
        ("random-mask", "random-mask-single-fill"),
        ("kd", "kd-clean"),
        ("Object Mask", "object-mask-single-fill"),
        ("FD", "fd-clean"),
        ("clean-distillation", "fd-clean"),
        ("vanilla", "ft"),
    ],
)
def test_a_preset_is_found_by_the_names_that_people_use(name, preset):
    assert recipe_from(parsed("--preset", name)) == PRESETS[preset]
    assert parsed("--presets", name, "grad-cam").presets == [preset, "grad-cam"]


def test_no_alias_hides_a_preset():
    assert not ALIASES.keys() & PRESETS.keys() and set(ALIASES.values()) <= PRESETS.keys()
    assert all(canonical_name(name) == name for name in PRESETS)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("wise-ft", "'wise-ft' is not trained: train with --preset ft, then .* tools/wise_ft.py"),
        ("zero_shot", "is not trained: tools/evaluate.py"),
        ("objct-mask", "There is no preset 'objct-mask'. Did you mean object-mask?"),
        ("what", "There is no preset 'what'. Choose from linear-probe, .*wise-kd"),
    ],
)
def test_a_name_without_a_preset_is_explained(name, said, capsys):
    with pytest.raises(SystemExit):
        parsed("--preset", name)
    import re

    assert re.search(said, capsys.readouterr().err)


def of(preset: str) -> Recipe:
    ensemble = "e" if preset == "wise-kd" else None
    base = PRESETS[preset]
    return replace(base, method=replace(base.method, ensemble=ensemble), data=Data(shards="/s")).resolved()


@pytest.mark.parametrize("preset", PRESETS)
def test_run_folders_say_the_preset(preset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = default_folder(replace(of(preset), run=replace(of(preset).run, seed=2)))
    assert folder.parent == Path("runs") and folder.name.startswith(f"{preset}-ViT-B-32-quickgelu-s2-")


def test_flags_that_change_numbers_keep_the_name_of_the_preset():
    assert nearest_preset(Recipe(method=Method(beta=7.0, threshold=0.5)).resolved()) == "object-mask-single-fill"
    assert nearest_preset(Recipe(method=Method(cam="grad-cam", threshold=0.5)).resolved()) == "grad-cam"
    assert nearest_preset(Recipe(method=Method(name="kd", mask="random")).resolved()) is None
    one_cycle = Recipe(method=Method(name="vanilla"), optim=Optim(schedule="one-cycle")).resolved()
    assert nearest_preset(one_cycle) is None, "the preset ft has another schedule"


def test_a_run_is_found_under_the_name_that_an_earlier_version_gave_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = of("ft")
    earlier = Path("runs") / f"vanilla-ViT-B-32-quickgelu-s0-{recipe.digest()}"
    RunFolder(earlier).claim(recipe)
    assert default_folder(recipe) == earlier
    other = replace(recipe, run=Run(seed=1))
    assert default_folder(other).name.startswith("ft-")


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("ft-ViT-B-32-quickgelu-s0-1a2b3c4d", "ft-ViT-B-32-quickgelu-s0-1a2b3c4d"),
        ("my run 'é'\n%j", "my-run-j"),
        ("x" * 255, "x" * 100),
        ("é", "cfmask"),
    ],
)
def test_a_job_is_named_after_its_run_folder(folder, name):
    assert job_name(Path("/runs") / folder) == name
    assert job_name(Path("/runs") / folder, 3) == f"{name}+3"
