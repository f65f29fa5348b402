"""Contact sheets of masks (show_masks), and how a model is named."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

import made
from cfmask.errors import UserError
from cfmask.runs import find_model
from tools import show_masks
from towers import TINY


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    root = tmp_path_factory.mktemp("shown")
    made.draw_images(root / "images", per_class=5)
    made.convert(root / "images", root / "shards")
    made.save_tiny_model(root / "zero.safetensors")
    return root


@pytest.mark.parametrize("fill", ["single-fill", "multi-fill", "no-fill"])
@pytest.mark.parametrize("mask", ["object", "context", "random"])
def test_contact_sheets_of_all_masks_and_fills(shown, tmp_path, mask, fill):
    out = tmp_path / "sheet.png"
    command = [str(shown / "zero.safetensors"), "--shards", str(shown / "shards"), "--count", "3"]
    assert show_masks.main([*command, "--mask", mask, "--fill", fill, "--out", str(out)]) == 0
    sheet = np.asarray(Image.open(out).convert("RGB"))
    assert sheet.shape[1] > sheet.shape[0] > 300 and sheet.std() > 10


def test_the_class_of_an_image_file_is_that_of_its_folder(shown, tmp_path, capsys):
    out = tmp_path / "sheet.png"
    command = [str(shown / "zero.safetensors"), "--images", str(shown / "images/val"), "--count", "2"]
    assert show_masks.main([*command, "--out", str(out)]) == 0 and out.stat().st_size > 0
    assert show_masks.main([str(shown / "zero.safetensors"), "--images", str(tmp_path / "none.jpg")]) == 2
    assert "none.jpg cannot be read" in capsys.readouterr().err


def test_a_model_can_be_named_by_file_checkpoint_or_run(tmp_path):
    with pytest.raises(UserError, match="neither a model file nor"):
        find_model(tmp_path)
    for step in (3, 12):
        (tmp_path / f"checkpoints/step-{step:08d}").mkdir(parents=True)
        made.save_tiny_model(tmp_path / f"checkpoints/step-{step:08d}/model.safetensors", TINY)
    newest = tmp_path / "checkpoints/step-00000012/model.safetensors"
    assert find_model(tmp_path) == find_model(newest.parent) == find_model(newest) == newest
    made.save_tiny_model(tmp_path / "model.safetensors")
    assert find_model(tmp_path) == tmp_path / "model.safetensors"
