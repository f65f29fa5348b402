"""The demo's data set and tower."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from cfmask.data.images import crop
from cfmask.data.shards import load_manifest
from cfmask.models.head import load_model
from cfmask.models.initial import initial_model
from cfmask.models.tower import encode
from cfmask.synthetic import shapes as images
from cfmask.synthetic.tower import FEATURE_MEAN_SQUARE, KINDS, pretrain
from tools import make_shards

SMALL = {
    name: images.Split(4, settings.own, settings.rest, settings.sketched, settings.paper, settings.turn)
    for name, settings in images.SPLITS.items()
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tree of four images a class instead of hundreds."""
    monkeypatch.setattr(images, "SPLITS", SMALL)


def digest(folder: Path) -> str:
    total = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        total.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return total.hexdigest()


def kinds_of(split: str, label: int, count: int) -> list[str]:
    return [images.draw_image(0, split, label, number)[2] for number in range(count)]


def test_images_depend_on_the_seed_and_not_on_the_number_of_processes(tmp_path: Path, small: None) -> None:
    for name, seed, processes in (("a", 0, 1), ("b", 0, 2), ("c", 1, 1)):
        images.draw_tree(tmp_path / name, seed=seed, processes=processes, progress=False)
    assert digest(tmp_path / "a") == digest(tmp_path / "b") != digest(tmp_path / "c")
    assert digest(tmp_path / "a-masks") == digest(tmp_path / "b-masks")
    assert {path.name for path in (tmp_path / "a").iterdir()} == {*images.SPLITS, "classes.txt"}


def test_the_share_of_own_backgrounds_is_that_of_the_split() -> None:
    label = 6
    own = images.BACKGROUNDS[label]
    shares = {split: np.mean([k == own for k in kinds_of(split, label, 100)]) for split in images.SPLITS}
    assert 0.9 <= shares["train"] <= 1.0 and 0.9 <= shares["val"] <= 1.0
    assert shares["shift-swapped"] == 0
    assert shares["pretrain"] < 0.25 and shares["shift-random"] < 0.25
    assert set(kinds_of("shift-style", label, 20)) == {images.PAPER}
    assert len(set(kinds_of("shift-swapped", label, 100))) == len(images.BACKGROUNDS) - 1
    assert len(images.CLASSES) == len(images.BACKGROUNDS) >= 10


@pytest.mark.parametrize("name", images.CLASSES)
def test_the_object_lies_in_the_centre_crop_with_background_around_it(name: str) -> None:
    for number in range(10):
        image, mask, _ = images.draw_image(0, "val", images.CLASSES.index(name), number)
        assert mask.shape == image.shape[:2] and set(np.unique(mask)) == {0, 255}
        cropped = crop(torch.from_numpy(mask).expand(3, -1, -1), min(mask.shape))[0].numpy()
        assert (cropped > 127).sum() == (mask > 127).sum()
        assert not cropped[0].any() and not cropped[-1].any() and not cropped[:, 0].any() and not cropped[:, -1].any()
        assert 0.02 < (cropped > 127).mean() < 0.4


def test_a_run_can_start_from_the_pretrained_model(tmp_path: Path, small: None) -> None:
    images.draw_tree(tmp_path / "tree", processes=1, progress=False)
    source, shards = str(tmp_path / "tree"), tmp_path / "shards"
    classes = ["--classes", str(tmp_path / "tree" / "classes.txt")]
    make_shards.main(["folder", "--source", source, "--out", str(shards), "--workers", "1", *classes])
    out = tmp_path / "pretrained.safetensors"
    config = pretrain(shards / "pretrain", out, steps=3, progress=False)
    assert json.loads(config.read_text())["vision_cfg"]["image_size"] == 56

    manifest = load_manifest(shards / "train")
    assert [name for _, name in manifest.classes] == list(images.CLASSES)
    model, info = initial_model(str(config), str(out), None, manifest.classes)
    assert info.classes == tuple(wnid for wnid, _ in manifest.classes)
    norms = model.head.weight.norm(dim=1)
    assert torch.allclose(norms, norms[:1].expand_as(norms), rtol=1e-4) and not model.head.bias.any()
    features = encode(model.visual, torch.randn(64, 3, 56, 56))
    assert FEATURE_MEAN_SQUARE / 3 < features.square().mean() < FEATURE_MEAN_SQUARE * 3

    again = tmp_path / "again.safetensors"
    pretrain(shards / "pretrain", again, steps=3, progress=False)
    first, second = load_model(out)[0].state_dict(), load_model(again)[0].state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_every_kind_of_background_has_a_caption() -> None:
    drawn = {kind for split in images.SPLITS for kind in kinds_of(split, 0, 60)}
    assert drawn == set(KINDS)
