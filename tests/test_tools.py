"""The tools that show what a run gave: evaluate, wise_ft, show_masks, plot_runs."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

import made
from cfmask.errors import UserError
from cfmask.models.head import load_model, save_model
from cfmask.runs import RunFolder, append_lines, find_model
from tools import evaluate, plot_runs, show_masks, wise_ft
from towers import TINY


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    root = tmp_path_factory.mktemp("shown")
    made.draw_images(root / "images", per_class=5)
    made.convert(root / "images", root / "shards")
    made.save_tiny_model(root / "zero.safetensors")
    model, info = load_model(root / "zero.safetensors")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1
    save_model(root / "fine.safetensors", model, info)
    return root


def test_evaluate_prints_and_writes_what_each_model_got_right(shown, capsys, tmp_path):
    out = tmp_path / "counts.json"
    models = [str(shown / "zero.safetensors"), str(shown / "fine.safetensors")]
    command = [*models, "--shards", str(shown / "shards"), "--sets", "val", "train", "--loader-workers", "0"]
    assert evaluate.main([*command, "--out", str(out)]) == 0
    counts = json.loads(out.read_text())
    assert {c["val"]["total"] for c in counts.values()} == {15}
    printed = capsys.readouterr().out
    assert all(f"{counts[m]['val']['top1']:.2f}" in printed for m in models)


def test_wise_ft_is_each_model_at_its_end_and_the_mean_in_the_middle(shown, tmp_path):
    zero, fine = (load_model(shown / f"{n}.safetensors")[0].state_dict() for n in ("zero", "fine"))
    for alpha in (0, 0.5, 1):
        out = tmp_path / f"{alpha}.safetensors"
        ends = [str(shown / "zero.safetensors"), str(shown / "fine.safetensors")]
        assert wise_ft.main([*ends, "--alphas", str(alpha), "--out", str(out)]) == 0
        mixed = load_model(out)[0].state_dict()
        for name in zero:
            torch.testing.assert_close(mixed[name], (1 - alpha) * zero[name] + alpha * fine[name])


def test_models_with_other_classes_are_not_compared(shown, tmp_path, capsys):
    other = made.save_tiny_model(tmp_path / "two.safetensors", classes=made.CLASSES[:2])
    sets = ["--shards", str(shown / "shards"), "--sets", "val"]
    assert evaluate.main([str(shown / "zero.safetensors"), str(other), *sets]) == 2
    assert "differ in classes" in capsys.readouterr().err
    assert evaluate.main([str(other), *sets]) == 2
    assert "labels and answers would not mean the same" in capsys.readouterr().err


@pytest.mark.parametrize("fill", ["single-fill", "multi-fill", "no-fill"])
@pytest.mark.parametrize("mask", ["object", "context", "random"])
def test_a_contact_sheet_of_every_mask_and_fill(shown, tmp_path, mask, fill):
    out = tmp_path / "sheet.png"
    command = [str(shown / "zero.safetensors"), "--shards", str(shown / "shards"), "--count", "3"]
    assert show_masks.main([*command, "--mask", mask, "--fill", fill, "--out", str(out)]) == 0
    sheet = np.asarray(Image.open(out).convert("RGB"))
    assert sheet.shape[1] > sheet.shape[0] > 300 and sheet.std() > 10


def test_a_contact_sheet_of_image_files_takes_the_class_from_the_folder(shown, tmp_path, capsys):
    out = tmp_path / "sheet.png"
    command = [str(shown / "zero.safetensors"), "--images", str(shown / "images/val"), "--count", "2"]
    assert show_masks.main([*command, "--out", str(out)]) == 0 and out.stat().st_size > 0
    assert show_masks.main([str(shown / "zero.safetensors"), "--images", str(tmp_path / "none.jpg")]) == 2
    assert "none.jpg cannot be read" in capsys.readouterr().err


def test_curves_of_two_runs_and_an_error_for_a_run_without_any(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        run = RunFolder(tmp_path / name)
        for step in range(1, 5):
            line = {"step": step, "total_steps": 4, "loss": 1 / step, "ce": 1.0, "mse": 0.1, "accuracy": 5.0}
            append_lines(run.log, [line])
        append_lines(run.log, [{"step": 4, "epoch": 1, "eval": {"val": 50.0}}])
    out = tmp_path / "curves.png"
    assert plot_runs.main([str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(out)]) == 0
    assert Image.open(out).size[0] > 500
    assert plot_runs.main([str(tmp_path)]) == 2
    assert "no log yet" in capsys.readouterr().err


def test_a_model_is_named_by_file_checkpoint_or_run(tmp_path):
    with pytest.raises(UserError, match="neither a model file nor"):
        find_model(tmp_path)
    for step in (3, 12):
        (tmp_path / f"checkpoints/step-{step:08d}").mkdir(parents=True)
        made.save_tiny_model(tmp_path / f"checkpoints/step-{step:08d}/model.safetensors", TINY)
    newest = tmp_path / "checkpoints/step-00000012/model.safetensors"
    assert find_model(tmp_path) == find_model(newest.parent) == find_model(newest) == newest
    made.save_tiny_model(tmp_path / "model.safetensors")
    assert find_model(tmp_path) == tmp_path / "model.safetensors"
