"""The mask study of a training run: what it logs, and that it does not change training."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import made
from cfmask.data import imagenet
from cfmask.errors import UserError
from cfmask.masking.validation import THRESHOLDS
from cfmask.recipe import Data, Method, Model, Optim, Recipe, Run
from cfmask.runs import RunFolder
from cfmask.runtime.jsonl import read_lines
from tools import plot_runs, validate_masks
from towers import TINY

WNIDS = tuple(imagenet.wnids()[i] for i in (1, 80, 151))  # goldfish; a bird, a dog


@pytest.fixture(scope="module")
def materials(tmp_path_factory) -> Path:
    """16 images a class, of which two dogs have no mask, and one bird's has no pixel."""
    root = tmp_path_factory.mktemp("materials")
    rng = np.random.default_rng(0)
    (root / "masks").mkdir()
    for label, wnid in enumerate(WNIDS):
        folder = root / "images/train" / wnid
        folder.mkdir(parents=True)
        for i in range(16):
            pixels = rng.integers(0, 120, (20, 23, 3), dtype=np.uint8)
            pixels[:, :, label] += 100
            Image.fromarray(pixels).save(folder / f"{wnid}_{i}.JPEG", quality=95)
            mask = (rng.random((20, 23)) < 0.4) & ((label, i) != (1, 0))
            if (label, i) not in ((2, 0), (2, 1)):
                Image.fromarray(mask).save(root / "masks" / f"{wnid}_{i}.png")
    made.convert(root / "images", root / "shards", "--samples-per-shard", "10")
    made.save_tiny_model(root / "tiny.safetensors", TINY, WNIDS)
    return root


def recipe_of(materials: Path, *, segmentation: bool = True, lr: float = 1e-3) -> Recipe:
    return Recipe(
        model=Model(name=str(materials / "tiny.json"), pretrained=str(materials / "tiny.safetensors")),
        method=Method(mask="object", fill="single-fill"),
        data=Data(
            shards=str(materials / "shards"),
            loader_workers=0,
            segmentation=str(materials / "masks") if segmentation else None,
        ),
        optim=Optim(epochs=2, batch_size=16, lanes=4, micro_batches=2, lr=lr, warmup_steps=2),
        run=Run(precision="fp32", checkpoint_steps=2, log_steps=1),
    )


def train(recipe: Recipe, folder: Path, stop_at: int | None = None) -> RunFolder:
    return made.train(recipe.resolved(), folder, stop_at)


def overlaps(run: RunFolder) -> list[dict]:
    return [line for line in read_lines(run.log) if "overlap" in line]


@pytest.fixture(scope="module")
def measured(materials, tmp_path_factory) -> RunFolder:
    return train(recipe_of(materials), tmp_path_factory.mktemp("measured") / "run")


def test_an_epoch_of_a_model_that_stands_still_logs_what_validate_masks_finds(materials, tmp_path):
    """Each of the 48 samples once; at a learning rate of next to nothing the model is the initial one throughout."""
    run = train(recipe_of(materials, lr=1e-12), tmp_path / "run")
    asked = [str(run.initial), "--shards", str(materials / "shards"), "--set", "train", "--count", "0"]
    masks = ["--segmentation", str(materials / "masks"), "--out", str(tmp_path / "out"), "--allow-missing-masks"]
    assert validate_masks.main([*asked, *masks]) == 0
    [model] = json.loads((tmp_path / "out/results.json").read_text())["models"]
    first, second = overlaps(run)
    assert (first["step"], first["epoch"], first["thresholds"]) == (3, 1, list(THRESHOLDS))
    assert (second["step"], second["epoch"]) == (6, 2)
    for line in (first, second):
        assert line["overlap"].keys() == model["groups"].keys() == {"dog", "bird", "all"}
        for group, wanted in model["groups"].items():
            found = line["overlap"][group]
            assert (found["images"], found["without_object"]) == (wanted["images"], wanted["without_object"])
            for rate in ("image_masking_rate", "object_masking_rate", "iou"):
                assert found[rate] == pytest.approx(wanted[rate], abs=1e-5)
    assert first["overlap"]["dog"]["images"] == 14 and first["overlap"]["bird"]["without_object"] == 1


def test_the_mask_study_changes_no_weight(materials, measured, tmp_path):
    plain = train(recipe_of(materials, segmentation=False), tmp_path / "plain")
    ours, theirs = load_file(measured.final), load_file(plain.final)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not overlaps(plain) and not plain.overlaps.exists()
    assert overlaps(measured)[0]["overlap"] != overlaps(measured)[1]["overlap"]  # the model has moved


@pytest.mark.parametrize("stop_at", [1, 2, 4])
def test_a_run_that_was_stopped_logs_each_image_once(materials, measured, tmp_path, stop_at):
    train(recipe_of(materials), tmp_path / "run", stop_at=stop_at)
    run = train(recipe_of(materials), tmp_path / "run")
    for ours, theirs in zip(overlaps(run), overlaps(measured), strict=True):
        assert ours["step"] == theirs["step"]
        for group, wanted in theirs["overlap"].items():
            found = ours["overlap"][group]
            assert found["images"] == wanted["images"]
            assert found["iou"] == pytest.approx(wanted["iou"], abs=1e-6)


def test_sums_after_the_last_checkpoint_are_computed_again(materials, measured, tmp_path):
    """As after a kill: the sums of steps that are taken again are gone."""
    run = train(recipe_of(materials), tmp_path / "run", stop_at=2)
    with open(run.overlaps, "a") as file:
        line = read_lines(run.overlaps)[-1]
        file.write(json.dumps({**line, "step": 3}) + "\n")
        file.write('{"step": 4, "tall')
    run = train(recipe_of(materials), tmp_path / "run")
    assert [line["overlap"]["all"]["images"] for line in overlaps(run)] == [30, 30]
    assert overlaps(run)[0]["overlap"]["all"]["iou"] == pytest.approx(
        overlaps(measured)[0]["overlap"]["all"]["iou"], abs=1e-6
    )


def test_two_ranks_log_what_one_does(materials, measured, tmp_path):
    run = RunFolder(tmp_path / "run")
    made.submit(
        *("--shards", materials / "shards", "--model", materials / "tiny.json", "--run", run.root),
        *("--pretrained", materials / "tiny.safetensors", "--batch-size", 16, "--lanes", 4, "--epochs", 2),
        *("--warmup-steps", 2, "--lr", 1e-3, "--loader-workers", 1, "--log-steps", 1, "--checkpoint-steps", 2),
        *("--segmentation", materials / "masks", "--executor", "local", "--tasks-per-node", 2),
    )
    for ours, theirs in zip(overlaps(run), overlaps(measured), strict=True):
        for group, wanted in theirs["overlap"].items():
            assert ours["overlap"][group]["images"] == wanted["images"]
            # Rounding may move a relevance across a threshold.
            assert ours["overlap"][group]["iou"] == pytest.approx(wanted["iou"], abs=0.02)


def test_masks_that_cannot_be_used_are_left_out_with_a_warning(materials, tmp_path):
    for path in (materials / "masks").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / f"{WNIDS[1]}_3.png").write_bytes(b"torn")
    recipe = recipe_of(materials)
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, segmentation=str(tmp_path)))
    with pytest.warns(UserWarning, match=f"{WNIDS[1]}_3 is left out"):
        run = train(recipe, tmp_path / "run")
    assert overlaps(run)[0]["overlap"]["bird"]["images"] == 15


def test_masks_of_other_samples_are_refused_before_training(materials, tmp_path):
    """Nothing would be measured: here they are named as the photographs were, and not by key."""
    for path in (materials / "masks").glob(f"{WNIDS[1]}_*"):
        (tmp_path / path.name.removeprefix(f"{WNIDS[1]}_")).write_bytes(path.read_bytes())
    recipe = recipe_of(materials)
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, segmentation=str(tmp_path)))
    with pytest.raises(UserError, match="has no mask of any sample of dog, bird .* only by the keys of samples"):
        train(recipe, tmp_path / "run")


def test_the_mask_study_is_refused_without_a_cam(materials):
    for method in (Method(name="vanilla"), Method(mask="random"), Method(mask="none")):
        with pytest.raises(UserError, match="--segmentation would do nothing"):
            dataclasses.replace(recipe_of(materials), method=method).resolved()


def test_curves_show_the_mask_study(measured, tmp_path):
    out = tmp_path / "curves.png"
    assert plot_runs.main([str(measured.root), "--out", str(out)]) == 0
    assert Image.open(out).size[1] > 500  # a second row of panels
