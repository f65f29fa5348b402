"""tools/segment.py with a small Mask2Former of random weights: the pipeline from shards to validated masks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import made
from cfmask.convert import mask2former, segmentation
from cfmask.data import imagenet
from cfmask.data.segmentation import open_masks
from cfmask.data.shard_reader import ShardReader
from cfmask.data.shards import load_manifest
from cfmask.errors import UserError
from tools import segment, validate_masks, verify_shards
from towers import TINY

pytestmark = pytest.mark.usefixtures("all_imports")

WNIDS = tuple(imagenet.wnids()[i] for i in (1, 80, 151))  # goldfish; a bird, a dog
CATEGORIES = ("person", "bird", "cat", "dog", "grass")


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """Shards of three of ImageNet's classes: 4 images of each, in two sizes, 3 in a shard."""
    root = tmp_path_factory.mktemp("segment")
    rng = np.random.default_rng(0)
    for wnid in WNIDS:
        folder = root / "images/val" / wnid
        folder.mkdir(parents=True)
        for i in range(4):
            pixels = rng.integers(0, 256, (40 + 9 * (i % 2), 52, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{wnid}_{i}.JPEG")
    made.convert(root / "images", root / "shards", "--samples-per-shard", "3")
    return root


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory) -> Path:
    """A folder like Mask2Former's on the hub. Half of the queries find birds everywhere and half find dogs, so each
    image has pixels of some category."""
    import transformers  # in tests/requirements.txt

    folder = tmp_path_factory.mktemp("mask2former")
    backbone = transformers.SwinConfig(
        image_size=64, embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 2, 2, 2], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = transformers.Mask2FormerConfig(
        backbone_config=backbone, hidden_dim=32, feature_size=32, mask_feature_size=32, encoder_layers=1,
        decoder_layers=2, num_attention_heads=2, dim_feedforward=32, encoder_feedforward_dim=32, num_queries=8,
        id2label=dict(enumerate(CATEGORIES)),
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.Mask2FormerForUniversalSegmentation(config)
        with torch.no_grad():
            model.class_predictor.weight.mul_(40)
            model.class_predictor.bias[1] = model.class_predictor.bias[3] = 20
            queries = model.model.transformer_module.queries_features.weight
            queries.normal_(std=3)
    model.save_pretrained(folder)
    transformers.Mask2FormerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


def command(scene: Path, segmenter: Path, out: Path, *flags: object) -> list[str]:
    named = ["--shards", scene / "shards", "--set", "val", "--segmenter", segmenter, "--out", out, "--device", "cpu"]
    return [str(part) for part in (*named, *flags)]


def by_hand(segmenter: Path, image: Path, category: str) -> np.ndarray:
    """Panoptic segmentation of one image, as in Hugging Face's documentation."""
    import transformers

    processor = transformers.Mask2FormerImageProcessor.from_pretrained(segmenter)
    model = transformers.Mask2FormerForUniversalSegmentation.from_pretrained(segmenter).eval()
    picture = Image.open(image).convert("RGB")
    with torch.no_grad():
        outputs = model(**processor(images=picture, return_tensors="pt"))
    [found] = processor.post_process_panoptic_segmentation(outputs, target_sizes=[picture.size[::-1]])
    label = CATEGORIES.index(category)
    wanted = [s["id"] for s in found["segments_info"] if s["label_id"] == label]
    return np.isin(found["segmentation"].numpy(), wanted)


def test_masks_are_those_of_the_model_for_the_groups_images_alone(scene, segmenter, tmp_path, capsys):
    assert segment.main(command(scene, segmenter, tmp_path, "--batch-size", 2)) == 0
    manifest = load_manifest(tmp_path / "val")
    assert manifest.num_samples == 8 and manifest.made["tool"] == "segment"
    masks, some = open_masks(tmp_path / "val"), []
    for wnid, category in zip(WNIDS, ("goldfish", "bird", "dog"), strict=True):
        for i in range(4):
            found = masks.read(f"{wnid}_{i}", "", category)
            if category == "goldfish":
                assert found is None
                continue
            wanted = by_hand(segmenter, scene / f"images/val/{wnid}/{wnid}_{i}.JPEG", category)
            assert found.shape == wanted.shape
            assert (found == wanted).mean() > 0.999  # batches add in another order
            some.append(found.mean())
    assert 0 < np.mean(some) < 1, "this model finds the object nowhere or everywhere"
    assert f"8 masks, {sum(share == 0 for share in some)} of them without" in capsys.readouterr().out
    assert verify_shards.main([str(tmp_path / "val"), "--full"]) == 0
    with ShardReader(manifest) as reader:
        facts = json.loads(reader.read(0)["json"])
    assert facts["category"] in ("bird", "dog") and {facts["width"]} == {52}


def test_masks_of_shards_are_validated_on(scene, segmenter, tmp_path):
    assert segment.main(command(scene, segmenter, tmp_path / "masks", "--groups", "bird", "dog")) == 0
    made.save_tiny_model(tmp_path / "tiny.safetensors", TINY, WNIDS)
    asked = [str(tmp_path / "tiny.safetensors"), "--shards", str(scene / "shards"), "--count", "2"]
    masks = ["--segmentation", str(tmp_path / "masks/val"), "--out", str(tmp_path / "out")]
    assert validate_masks.main([*asked, *masks]) == 0
    groups = json.loads((tmp_path / "out/results.json").read_text())["models"][0]["groups"]
    assert groups["dog"]["images"] == groups["bird"]["images"] == 4


def test_after_an_interruption_only_missing_shards_are_made(scene, segmenter, tmp_path, monkeypatch, capsys):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert segment.main(command(scene, segmenter, whole)) == 0
    one, done = segmentation.segment_shard, []

    def one_and_no_more(task):
        if done:
            raise KeyboardInterrupt
        done.append(task.tar.name)
        return one(task)

    monkeypatch.setattr(segmentation, "segment_shard", one_and_no_more)
    assert segment.main(command(scene, segmenter, stopped)) == 130
    assert not (stopped / "val/manifest.json").exists()
    monkeypatch.undo()
    before = (stopped / "val" / done[0]).stat().st_mtime_ns
    assert segment.main(command(scene, segmenter, stopped)) == 0
    assert "1 of 4 shards exist already" in capsys.readouterr().out
    assert (stopped / "val" / done[0]).stat().st_mtime_ns == before
    names = sorted(path.name for path in (whole / "val").iterdir() if path.is_file())
    assert names == sorted(path.name for path in (stopped / "val").iterdir() if path.is_file())
    for name in names:
        assert (whole / "val" / name).read_bytes() == (stopped / "val" / name).read_bytes(), name
    # Other groups make another plan.
    assert segment.main(command(scene, segmenter, stopped, "--groups", "dog")) == 2
    assert "shards of another plan" in capsys.readouterr().err


def test_several_processes_make_the_same(scene, segmenter, tmp_path):
    assert segment.main(command(scene, segmenter, tmp_path / "one")) == 0
    assert segment.main(command(scene, segmenter, tmp_path / "two", "--workers", 2)) == 0
    ones, twos = (load_manifest(tmp_path / name / "val") for name in ("one", "two"))
    assert [shard.sha256 for shard in ones.shards] == [shard.sha256 for shard in twos.shards]


@pytest.mark.slurm
def test_an_array_makes_the_same(slurm_cluster, scene, segmenter, tmp_path):
    assert segment.main(command(scene, segmenter, tmp_path / "one")) == 0
    there = [
        "--executor",
        "slurm",
        "--array",
        2,
        "--gpus-per-task",
        0,
        "--cpus-per-task",
        1,
        "--logs",
        tmp_path / "jobs",
    ]
    assert segment.main(command(scene, segmenter, tmp_path / "two", *there)) == 0
    ones, twos = (load_manifest(tmp_path / name / "val") for name in ("one", "two"))
    assert [shard.sha256 for shard in ones.shards] == [shard.sha256 for shard in twos.shards]
    assert not list((tmp_path / "jobs").iterdir())


def test_a_model_that_cannot_be_loaded_names_the_files_to_download(scene, segmenter, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # no waiting for the network
    empty = tmp_path / "empty"
    empty.mkdir()
    for given in (empty, mask2former.DEFAULT):
        assert segment.main(command(scene, given, tmp_path / "out")) == 2
        said = capsys.readouterr().err
        assert "config.json, preprocessor_config.json and model.safetensors" in said
        assert f"https://huggingface.co/{mask2former.DEFAULT}" in said and "--segmenter DIR" in said
    assert segment.main(command(scene, segmenter, tmp_path / "out", "--groups", WNIDS[0])) == 2
    assert "does not know" in capsys.readouterr().err


def test_without_transformers_it_says_what_to_install(monkeypatch):
    import builtins

    real = builtins.__import__

    def none(name, *arguments, **options):
        if name == "transformers":
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", none)
    with pytest.raises(UserError, match="pip install -r tools/segment-requirements.txt"):
        mask2former.read_config("anything")


def test_flags_that_would_do_nothing_are_refused(scene, tmp_path, capsys):
    assert segment.main(command(scene, tmp_path, tmp_path, "--gpus-per-task", 2)) == 2
    assert "--gpus-per-task without --executor slurm would do nothing" in capsys.readouterr().err
    assert segment.main(command(scene, tmp_path, tmp_path, "--workers", 0)) == 2
    assert "--workers must be at least 1" in capsys.readouterr().err
