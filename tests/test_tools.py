"""Contact sheets of masks (show_masks), and how a model is named."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from PIL import Image

import made
from cfmask.errors import UserError
from cfmask.recipe import Method, Recipe
from cfmask.report.contact_sheet import draws_for_sheet
from cfmask.report.sheet import Cell, contact_sheet, hatched
from cfmask.run_search import find_model
from launch.drills.materials import CLASSES
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


@pytest.mark.parametrize("n", [2, 3, 8, 40])
def test_no_sample_of_a_sheet_is_its_own_donor(n):
    method = Recipe(method=Method(mask="object", fill="single-fill")).resolved().method
    for seed in range(20):
        for count in {1, n // 2, n}:
            donors = draws_for_sheet(method, 16, n, count, seed).donors
            assert sorted(donors.tolist()) == list(range(n))  # a permutation, as in training
            assert all(int(donors[i]) != i for i in range(count))


@pytest.mark.parametrize("fill", ["single-fill", "multi-fill"])
def test_a_sheet_of_one_image_says_that_there_is_no_donor(shown, tmp_path, monkeypatch, fill):
    [image] = list((shown / "images/val").rglob("*.*"))[:1]
    cells = cells_of(monkeypatch, [shown / "zero.safetensors", "--images", image, "--fill", fill], tmp_path)
    assert [cell.picture for cell in cells[0] if isinstance(cell.picture, str)] == ["none: there is no other image"]


NAMES = [f"German Shepherd {name}" for name in CLASSES]


def test_donors_are_labelled_and_make_the_counterfactual(shown, tmp_path, monkeypatch):
    manifest = tmp_path / "shards/val/manifest.json"
    shutil.copytree(shown / "shards", tmp_path / "shards")
    content = json.loads(manifest.read_text())
    content["classes"] = list(map(list, zip(CLASSES, NAMES, strict=True)))  # the model file has none
    manifest.write_text(json.dumps(content))
    shards = ["--shards", tmp_path / "shards", "--mask", "context"]
    for count in (1, 4):
        cells = cells_of(monkeypatch, [shown / "zero.safetensors", *shards, "--count", count], tmp_path)
        assert len(cells) == count
        for image, _, mask, donor, counterfactual in cells:
            assert donor.caption in NAMES and not np.array_equal(donor.picture, image.picture)
            masked = (mask.picture != image.picture).any(2)
            assert masked.any() and np.array_equal(counterfactual.picture[masked], donor.picture[masked])
            assert np.array_equal(counterfactual.picture[~masked], image.picture[~masked])


@pytest.mark.parametrize("ground", [0, 64, 128, 216, 255])
def test_masked_patches_are_visible_on_any_ground_without_colour(ground):
    picture = np.full((112, 112, 3), ground, np.uint8)
    where = np.zeros((112, 112), bool)
    where[28:84, 28:84] = True
    shown = hatched(picture, where)
    assert np.array_equal(shown[~where], picture[~where]) and (shown == shown[..., :1]).all()
    for side in (shown[28:30, 28:84], shown[82:84, 28:84], shown[28:84, 28:30], shown[28:84, 82:84]):
        assert {0, 255} <= set(side.flat), "an outline of black and white"
    inside = shown[32:80, 32:80].astype(int)
    assert np.ptp(inside) > 80, "stripes"
    assert np.array_equal(hatched(picture, np.zeros_like(where)), picture)


def cells_of(monkeypatch, flags, folder):
    """The cells of a sheet, by sample."""
    caught = []

    def catch(labels, samples, **more):
        caught.append(samples)
        assert all(len(sample) == len(labels) for sample in samples)
        return contact_sheet(labels, samples, **more)

    monkeypatch.setattr("cfmask.report.contact_sheet.contact_sheet", catch)
    assert show_masks.main([*map(str, flags), "--out", str(folder / "sheet.png")]) == 0
    return caught[0]


@pytest.mark.parametrize("count", [1, 3, 4, 8, 20])
def test_sheets_are_wide_and_their_text_is_inside(count):
    samples = [[Cell(np.zeros((8, 8, 3), np.uint8), f"German Shepherd Dog {n}")] * 4 for n in range(count)]
    figure = contact_sheet(["image", "mask", "donor", "counterfactual"], samples, note="a note " * 30)
    width, height = figure.get_size_inches()
    assert width > height or count > 8
    renderer = FigureCanvasAgg(figure).get_renderer()
    for text in figure.findobj(Text):
        box = text.get_window_extent(renderer)
        if text.get_text().strip():
            assert box.x0 >= -2 and box.x1 <= figure.bbox.x1 + 2 and box.y0 >= -2 and box.y1 <= figure.bbox.y1 + 2
            assert text.get_fontsize() / 72 / width * 330 > 6.8  # pixels, at half of a column's width


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
