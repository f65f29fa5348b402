"""Curves of runs (plot_runs): which lines, labels and looks a chart has; names of runs and models; finding runs."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil

import pytest
from PIL import Image

import made
from cfmask.errors import UserError
from cfmask.evaluation_spec import Evaluation, WiseFT
from cfmask.presets import PRESETS, method_name
from cfmask.recipe import Recipe
from cfmask.report.curves import curves_figure
from cfmask.report.labels import model_names, run_groups
from cfmask.report.looks import looks
from cfmask.run_search import find_runs
from cfmask.runs import RunFolder
from cfmask.runtime.jsonl import append_lines, read_lines
from tools import plot_runs
from towers import TINY


def changed(recipe: Recipe, **settings) -> Recipe:
    """The recipe with settings by "group__name"."""
    for name, value in settings.items():
        group, _, name = name.partition("__")
        recipe = dataclasses.replace(recipe, **{group: dataclasses.replace(getattr(recipe, group), **{name: value})})
    return recipe


def make_run(root, preset: str, lines=(), *, seed: int = 0, **settings) -> RunFolder:
    """A run folder with the recipe of a preset, but for a learning rate of its own, and a log."""
    recipe = changed(PRESETS[preset], run__seed=seed, optim__lr=3e-4, data__shards="/shards", **settings).resolved()
    run = RunFolder(root)
    run.claim(recipe)
    if lines:
        append_lines(run.log, lines)
    return run


def log(mse: float = 0.0, *, ce=lambda step: 1 / step, sets=("val", "a-shift"), steps: int = 4) -> list[dict]:
    """Lines of log.jsonl as a run writes them: of each step, and of an evaluation at the last one."""
    lines = [
        {"step": n, "total_steps": steps, "loss": 1.0, "ce": ce(n), "kd": 0.0, "mse": mse * n, "accuracy": 5.0}
        for n in range(1, steps + 1)
    ]
    return [*lines, {"step": steps, "epoch": 1, "eval": {name: 50.0 + i for i, name in enumerate(sets)}}]


def drawn(*runs: RunFolder) -> dict[str, dict[str, object]]:
    """The lines of the chart by panel and label."""
    figure = curves_figure(run_groups(runs), {run.root: read_lines(run.log) for run in runs})
    for axis in figure.axes:
        assert axis.get_xlabel().startswith("optimizer step") and axis.get_ylabel()
    [legend] = figure.legends
    shown = {text.get_text() for text in legend.get_texts()}
    assert shown == {line.get_label() for axis in figure.axes for line in axis.get_lines()}
    return {axis.get_title(): {line.get_label(): line for line in axis.get_lines()} for axis in figure.axes}


CE, MSE, KL = "training: cross-entropy", "training: feature distillation", "training: logit distillation"


def test_a_loss_that_a_method_does_not_have_is_not_drawn(tmp_path):
    ft, masked = make_run(tmp_path / "a", "ft", log()), make_run(tmp_path / "b", "object-mask-single-fill", log(0.1))
    panels = drawn(ft, masked)
    assert list(panels) == [CE, MSE, "training: accuracy", "val", "a-shift"]  # sets in the order of the evaluation
    assert list(panels[CE]) == ["ft", "object-mask-single-fill"]
    assert list(panels[MSE]) == ["object-mask-single-fill"]
    assert MSE not in drawn(ft)
    kd = make_run(tmp_path / "c", "kd-clean", [{**line, "kd": 2.0} for line in log()])
    assert list(drawn(ft, kd)[KL]) == ["kd-clean"] and MSE not in drawn(ft, kd)


def test_values_that_are_missing_or_not_finite_are_gaps(tmp_path):
    lines = log(ce=lambda step: math.nan if step == 2 else 1.0)
    del lines[2]["ce"]
    lines[3]["ce"] = math.inf
    line = drawn(make_run(tmp_path / "a", "ft", lines))[CE]["ft"]
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([1], [1.0])
    nothing = [{"step": 1, "loss": math.nan, "ce": math.nan}]
    with pytest.raises(UserError, match="no finite value to draw"):
        drawn(make_run(tmp_path / "b", "ft", nothing))


def test_logs_without_a_recipe_are_drawn_by_the_folders_name(tmp_path):
    run = RunFolder(tmp_path / "mine")
    run.root.mkdir()
    append_lines(run.log, log())
    panels = drawn(run)
    assert list(panels[CE]) == ["mine"] and MSE not in panels


def test_seeds_of_a_recipe_are_one_line_with_a_band(tmp_path):
    def seed(n, steps):
        lines = log(ce=lambda step: 1.0 + n, steps=steps)
        return make_run(tmp_path / f"s{n}", "ft", lines, seed=n)

    [line] = drawn(seed(0, 4), seed(1, 4), seed(2, 3))[CE].values()
    assert line.get_label() == "ft (3 seeds)"
    assert list(line.get_xdata()) == [1, 2, 3, 4], "a seed that has just started does not hide the others"
    assert list(line.get_ydata()) == pytest.approx([2.0, 2.0, 2.0, 1.5])
    [band] = line.axes.collections
    ys = band.get_paths()[0].vertices[:, 1]
    # The standard deviation of 1, 2, 3 is 1, and that of 1, 2 is the root of a half.
    assert (min(ys), max(ys)) == pytest.approx((1.5 - math.sqrt(0.5), 3.0))


def test_equal_names_are_told_apart_by_what_differs(tmp_path):
    runs = [
        make_run(tmp_path / "x/a", "object-mask-single-fill", log()),
        make_run(tmp_path / "x/b", "object-mask-single-fill", log(), method__beta=10.0),
        make_run(tmp_path / "y/a", "ft", log()),
        make_run(tmp_path / "y/b", "ft", log()),  # the same recipe and seed again: no two seeds
        make_run(tmp_path / "z/a", "kd-clean", log(), model__name="ViT-B-16-quickgelu"),
        make_run(tmp_path / "z/b", "kd-clean", log(), seed=1),
    ]
    assert [group.label for group in run_groups(runs)] == [
        "object-mask-single-fill, beta 30.0",
        "object-mask-single-fill, beta 10.0",
        "ft, a",
        "ft, b",
        "kd-clean, ViT-B-16-quickgelu",
        "kd-clean, ViT-B-32-quickgelu",
    ]


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "wise-kd"])
def test_runs_are_named_by_their_preset(preset):
    exact = PRESETS[preset].resolved()
    assert method_name(exact) == preset
    if preset != "released-code":
        assert method_name(changed(PRESETS[preset], optim__lr=1e-4, run__precision="fp32").resolved()) == preset


def test_methods_of_no_preset_are_named_by_their_parts():
    other = changed(PRESETS["kd-clean"], method__mask="context", method__fill="multi-fill")
    assert method_name(other.resolved()) == "kd-context-mask-multi-fill"


def test_a_methods_look_does_not_depend_on_what_else_is_shown():
    names = ["zero-shot", *PRESETS, "wise-ft", "soup"]
    all_looks = dict(zip(names, looks(names), strict=True))
    assert len(set(all_looks.values())) == len(names)
    for name in names:
        assert looks([name]) == looks(["something", name])[1:] == looks([name, "ft, beta 3"])[:1] == [all_looks[name]]
    same = {
        "ft": ("FT", "FT-s0", "ft (3 seeds)", "fine-tuning", "vanilla", "ft, seed 1"),
        "object-mask-single-fill": ("object-mask", "FT + FD, object mask, single-fill", "this method", "object mask"),
        "context-mask-multi-fill": ("FT + FD, context mask, multi-fill", "context-mask-multi-fill-s2"),
        "fd-clean": ("FT + FD, clean images",),
        "wise-ft": ("WiSE-FT, α = 0.5", "WiSE-FT"),
        "wise-kd": ("WiSE-KD",),
        "zero-shot": ("ViT-B-32 zero-shot (published)", "Zero-shot, ViT-B-16"),
        "soup": ("model soup",),
        "lp-ft": ("LP-FT",),
    }
    for preset, aliases in same.items():
        for alias in aliases:
            assert looks([alias]) == [all_looks[preset]], alias


def test_lines_of_a_chart_differ_without_colour():
    shown = ["zero-shot", "ft", "wise-ft", "object-mask-single-fill", "context-mask-single-fill"]
    shown.append("random-mask-single-fill")
    assert len({look.dash for look in looks(shown)}) == len(shown) == len({look.marker for look in looks(shown)})
    gaps = {look.line()["zorder"]: sum(look.dash[1][1::2]) / sum(look.dash[1] or (1,)) for look in looks(shown)}
    assert len(gaps) == 6 and sorted(gaps.values()) == [gaps[above] for above in sorted(gaps)], (
        "gaps show what is below"
    )
    twice = looks(["ft, lr 1", "ft, lr 2", "ft, lr 3", "a", "b", "a"])
    assert len(set(twice)) == 6
    assert len({look.colour for look in twice[:3]}) == 1 and len({look.dash for look in twice[:3]}) == 3
    assert len(set(looks([f"model {n}" for n in range(700)]))) == 700
    assert len(set(looks([f"ft, seed {n}" for n in range(80)]))) == 80
    assert len(looks(["ft"] * 200)) == 200  # there are no more than 90 of a colour


def test_a_folder_of_runs_is_drawn_without_what_has_no_log(tmp_path, capsys):
    for n, preset in enumerate(("ft", "object-mask-single-fill")):
        make_run(tmp_path / f"runs/{preset}", preset, log(0.1 * n))
    make_run(tmp_path / "runs/waits", "ft", seed=7)
    RunFolder(tmp_path / "runs/evaluated").claim(Evaluation(models=("/m",), shards="/s", sets=("val",)))
    (tmp_path / "runs/notes").mkdir()
    out = tmp_path / "curves.png"
    assert plot_runs.main([str(tmp_path / "runs"), "--out", str(out)]) == 0
    said = capsys.readouterr().err
    assert "waits is left out: it has logged no step yet" in said and "evaluated is left out: it is an eval" in said
    width, height = Image.open(out).size
    assert width == 1000 and height > 500
    assert plot_runs.main([str(tmp_path / "runs/waits"), "--out", str(out)]) == 2
    assert "nothing to draw" in capsys.readouterr().err
    (tmp_path / "runs/unreadable/log.jsonl").mkdir(parents=True)
    assert plot_runs.main([str(tmp_path / "runs"), "--out", str(out)]) == 0
    assert "unreadable is left out: " in (said := capsys.readouterr().err) and "(Is a directory)" in said
    shutil.rmtree(tmp_path / "runs/unreadable")
    assert plot_runs.main([str(tmp_path / "runs"), "--out", str(tmp_path / "runs")]) == 2
    assert "no ending of an image format" in capsys.readouterr().err
    assert plot_runs.main([str(tmp_path / "run"), "--out", str(out)]) == 2
    assert capsys.readouterr().err.endswith("No such file or directory. Check the path. Did you mean runs?\n")
    assert plot_runs.main([str(tmp_path / "runs/notes"), "--out", str(out)]) == 2
    assert "neither a run folder nor a folder of runs" in capsys.readouterr().err
    twice = find_runs([tmp_path / "runs", tmp_path / "runs/ft"])
    assert [run.root.name for run in twice] == ["evaluated", "ft", "object-mask-single-fill", "waits"]


def test_models_are_named_by_preset_seed_and_step(tmp_path):
    def model(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        return made.save_tiny_model(path, TINY)

    start = model(tmp_path / "tower.safetensors")
    runs = [make_run(tmp_path / f"ft-s{n}", "ft", seed=n, model__pretrained=str(start)) for n in (0, 1)]
    mixed = RunFolder(tmp_path / "mixed")
    mixed.claim(WiseFT(models=(str(start), str(runs[0].final)), alphas=(0.5,)))
    files = [
        start,
        *(model(run.final) for run in runs),
        model(runs[0].checkpoints / "step-00001200/model.safetensors"),
        model(runs[0].checkpoints / "step-00000600/model.safetensors"),
        model(mixed.final),
        model(tmp_path / "elsewhere/other.safetensors"),
        model(tmp_path / "elsewhere/again/other.safetensors"),
    ]
    for run in runs:
        run.results.write_text(json.dumps({"step": 2400, "sets": {}}))
    assert model_names(files) == [
        "zero-shot",
        "ft, seed 0, step 2,400",
        "ft, seed 1",
        "ft, seed 0, step 1,200",
        "ft, seed 0, step 600",
        "WiSE-FT",
        "other, other.safetensors",
        "other, again/other.safetensors",
    ]
    for given in (["a"], ["a", " "]):
        with pytest.raises(UserError, match="^--names "):
            model_names(files[:2], given)
    assert model_names([runs[0].final]) == ["ft"] and model_names([runs[0].initial]) == ["zero-shot"]
