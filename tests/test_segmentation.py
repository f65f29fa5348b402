"""Masks from PNGs, run-length JSONs and COCO's annotations; they stay aligned with their images."""

from __future__ import annotations

import itertools
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import made
from cfmask.data import imagenet
from cfmask.data.images import crop, crop_mask
from cfmask.data.mask_files import decode_runs
from cfmask.data.segmentation import categories, class_groups, open_masks
from cfmask.data.segmented import segmented_samples
from cfmask.data.shards import load_manifest
from cfmask.errors import UserError

COCO = made.REPO.parent / "shared/data/coco-panoptic.tar"


def runs_of(mask: np.ndarray) -> list[int]:
    """COCO's runs: of zeros first, columns one after the other."""
    flat = mask.T.reshape(-1).tolist()
    runs = [(value, len(list(group))) for value, group in itertools.groupby(flat)]
    return ([0] if runs and runs[0][0] else []) + [length for _, length in runs]


def compressed(runs: list[int]) -> str:
    """maskApi.c's rleToString, line by line."""
    text = ""
    for i, run in enumerate(runs):
        x, more = run - (runs[i - 2] if i > 2 else 0), True
        while more:
            c = x & 0x1F
            x >>= 5
            more = x != -1 if c & 0x10 else x != 0
            text += chr((c | 0x20 if more else c) + 48)
    return text


def save_png(path: Path, mask: np.ndarray, value: int = 255) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask.astype(np.uint8) * value).save(path)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 40), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_runs_are_decoded_plain_and_compressed(height, width, share, seed):
    mask = np.random.default_rng(seed).random((height, width)) < share
    runs = runs_of(mask)
    assert np.array_equal(decode_runs(runs, height, width), mask)
    assert np.array_equal(decode_runs(compressed(runs), height, width), mask)


def test_compressed_runs_of_pycocotools_are_decoded():
    """Of a 25 × 30 mask: a box of rows 5…14 and columns 3…22, and rows 20…23 of column 27."""
    mask = np.zeros((25, 30), bool)
    mask[5:15, 3:23] = True
    mask[20:24, 27] = True
    assert np.array_equal(decode_runs(PYCOCOTOOLS, 25, 30), mask)


PYCOCOTOOLS = "`2:?0000000000000000000000000000000000000c3JaM"


@pytest.mark.parametrize(
    ("counts", "reason"),
    [([3, 4], "7 pixels"), ([3, -1, 4], "whole numbers"), ("0`", "end within"), ("0\x1f", "not a character")],
)
def test_invalid_runs_are_refused(counts, reason):
    with pytest.raises(UserError, match=reason):
        decode_runs(counts, 2, 3)


@pytest.mark.parametrize(("height", "width"), [(40, 60), (91, 64), (64, 64), (33, 32), (250, 333)])
def test_a_mask_is_cropped_as_its_image_is(height, width):
    """A mask's crop and the bicubic crop of the same picture differ only at edges, without a shift."""
    y, x = np.mgrid[:height, :width]
    mask = (np.hypot(y - 0.45 * height, x - 0.55 * width) < 0.3 * min(height, width)) | (x < width // 3)
    picture = torch.from_numpy(np.repeat(mask[None] * np.uint8(255), 3, 0))
    for size in (32, 64):
        ours, wanted = crop_mask(torch.from_numpy(mask), size), crop(picture, size)[0] > 127
        assert ours.dtype == torch.bool and ours.shape == (size, size)
        shifted = [wanted.roll(by, axis) for axis in (0, 1) for by in (-1, 1)]
        wrong, *wrong_shifted = ((ours != other).float().mean() for other in (wanted, *shifted))
        assert wrong < 0.03 and wrong < 0.7 * min(wrong_shifted)


def test_each_pixel_takes_the_value_of_the_nearest():
    mask = torch.from_numpy(np.random.default_rng(0).random((50, 70)) < 0.5)
    # 50 → 32: the centre of pixel i lies at (i + ½) · 50 / 32 of the source; the long side becomes int(44.8).
    rows = torch.tensor([int((i + 0.5) * 50 / 32) for i in range(32)])
    columns = torch.tensor([int((i + 0.5) * 70 / 44) for i in range(44)])[6 : 6 + 32]
    assert torch.equal(crop_mask(mask, 32), mask[rows][:, columns])


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def mask() -> np.ndarray:
    return np.random.default_rng(1).random((6, 9)) < 0.4


def test_a_folder_of_pngs_and_run_length_files_is_read_by_key_folder_and_name(tmp_path, mask):
    save_png(tmp_path / "deep/n1_a.png", mask, 255)
    save_png(tmp_path / "dog/pic_1.png", ~mask, 1)
    save_png(tmp_path / "cat/pic_1.png", mask, 7)
    (tmp_path / "n1_b.json").write_text(json.dumps({"size": [6, 9], "counts": runs_of(mask)}))
    top, bottom = mask.copy(), mask.copy()
    top[3:], bottom[:3] = False, False
    parts = [{"size": [6, 9], "counts": compressed(runs_of(part))} for part in (top, bottom)]
    (tmp_path / "n1_c.json").write_text(json.dumps(parts))
    masks = open_masks(tmp_path)
    for key in ("n1_a", "n1_b", "n1_c"):
        assert np.array_equal(masks.read(key, "", "dog"), mask)
    assert np.array_equal(masks.read("dog_pic_1", "dog/pic_1.jpg", "dog"), ~mask)
    assert np.array_equal(masks.read("cat_pic_1", "val/cat/pic_1.jpg", "cat"), mask)
    assert masks.read("bird_pic_1", "bird/pic_1.jpg", "bird") is None  # two files have this bare name
    assert masks.read("n1_d", "", "dog") is None


def test_files_that_are_not_masks_are_refused_with_the_reason(tmp_path, mask):
    save_png(tmp_path / "labels.png", mask + 2 * mask[::-1], 100)
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "colours.png")
    (tmp_path / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "torn.json").write_text("{")
    (tmp_path / "other.json").write_text(json.dumps({"masks": []}))
    (tmp_path / "polygons.json").write_text(json.dumps([[1, 2, 3, 4]]))
    (tmp_path / "short.json").write_text(json.dumps({"size": [6, 9], "counts": [3]}))
    (tmp_path / "empty.json").write_text("[]")
    (tmp_path / "torn.png").rename(tmp_path / "cut.png")
    masks = open_masks(tmp_path)
    for key, reason in {
        "labels": "4 values",
        "colours": "3 channels",
        "cut": "cannot be read as a PNG",
        "torn": "cannot be read as JSON",
        "other": "no run-length encoded mask",
        "polygons": "polygons",
        "short": "its runs have 3 pixels",
        "empty": "empty list",
    }.items():
        with pytest.raises(UserError, match=reason):
            masks.read(key, "", "dog")


def test_paths_without_masks_are_refused(tmp_path):
    with pytest.raises(UserError, match="No such file or folder of masks"):
        open_masks(tmp_path / "none")
    with pytest.raises(UserError, match="holds no masks"):
        open_masks(tmp_path)
    save_png(tmp_path / "a.png", np.zeros((2, 2)))
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(UserError, match="Keep only the one"):
        open_masks(tmp_path)
    (tmp_path / "coco.json").write_text(json.dumps({"images": [], "annotations": []}))
    with pytest.raises(UserError, match="not a file of COCO annotations"):
        open_masks(tmp_path / "coco.json")


# --- COCO -------------------------------------------------------------------------------------------------------------


def coco(tmp_path: Path, annotations: list[dict]) -> Path:
    images = [{"id": 7, "file_name": "0007.jpg", "height": 6, "width": 9}]
    images += [{"id": 8, "file_name": "0008.jpg", "height": 6, "width": 9}]
    known = [{"id": 17, "name": "cat"}, {"id": 18, "name": "dog"}]
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps({"images": images, "categories": known, "annotations": annotations}))
    return path


def test_panoptic_annotations_give_the_union_of_a_categorys_segments(tmp_path):
    segments = np.random.default_rng(2).choice([0, 5, 300, 70_000], (6, 9))
    colours = np.stack([segments % 256, segments // 256 % 256, segments // 65536], -1).astype(np.uint8)
    info = [{"id": 5, "category_id": 18}, {"id": 300, "category_id": 17}, {"id": 70_000, "category_id": 18}]
    path = coco(tmp_path, [{"image_id": 7, "file_name": "0007.png", "segments_info": info}])
    (tmp_path / "annotations").mkdir()
    Image.fromarray(colours).save(tmp_path / "annotations/0007.png")
    masks = open_masks(path)
    assert np.array_equal(masks.read("dog_0007", "dog/0007.jpg", "dog"), np.isin(segments, [5, 70_000]))
    assert np.array_equal(masks.read("0007", "", "cat"), segments == 300)
    assert not masks.read("0008", "", "cat").any()  # an image without any annotation
    assert masks.read("0009", "", "cat") is None
    with pytest.raises(UserError, match="no category 'star'"):
        masks.read("0007", "", "star")
    (tmp_path / "annotations/0007.png").unlink()
    with pytest.raises(UserError, match="0007.png, which cannot be read"):
        masks.read("0007", "", "cat")


def test_instances_give_the_union_of_a_categorys_runs(tmp_path, mask):
    other = ~mask
    other[3:] = False
    of_mask, of_other = ({"size": [6, 9], "counts": runs_of(m)} for m in (mask, other))
    path = coco(
        tmp_path,
        [
            {"image_id": 7, "category_id": 18, "segmentation": of_mask},
            {"image_id": 7, "category_id": 18, "segmentation": of_other},
            {"image_id": 7, "category_id": 17, "segmentation": of_other},
            {"image_id": 8, "category_id": 17, "segmentation": [[0, 0, 1, 1, 2, 2]]},
            {"image_id": 8, "category_id": 18, "segmentation": {"size": [9, 6], "counts": [54]}},
        ],
    )
    masks = open_masks(path)
    assert np.array_equal(masks.read("0007", "", "dog"), mask | other)
    assert np.array_equal(masks.read("0007", "", "cat"), other)
    with pytest.raises(UserError, match="polygons"):
        masks.read("0008", "", "cat")
    with pytest.raises(UserError, match="has 9 × 6 pixels, but an annotation of it has 6 × 9"):
        masks.read("0008", "", "dog")


@pytest.mark.skipif(not COCO.exists(), reason=f"needs {COCO.name}")
def test_real_panoptic_annotations_have_as_many_pixels_as_coco_says(tmp_path):
    with tarfile.open(COCO) as tar:
        wanted = [m for m in tar.getmembers() if "panoptic_segmentation" in m.name]
        tar.extractall(tmp_path, wanted)  # Python 3.10 has no filter
    path = tmp_path / "coco-panoptic/panoptic_segmentation/annotations/panoptic_train2017.json"
    raw = json.loads(path.read_text())
    masks, ids = open_masks(path), {c["name"]: c["id"] for c in raw["categories"]}
    seen = 0
    for annotation in raw["annotations"]:
        for name in ("dog", "cat", "bird"):
            area = sum(s["area"] for s in annotation["segments_info"] if s["category_id"] == ids[name])
            key = annotation["file_name"].removesuffix(".png")
            if area:
                seen += 1
                assert masks.read(f"n02085620_{key}", f"n02085620/{key}.jpg", name).sum() == area
    assert seen == 11


# --- groups and samples -----------------------------------------------------------------------------------------------


def test_groups_are_restricted_imagenets():
    classes = imagenet.classes()
    groups = class_groups(classes)
    assert {name: len(ids) for name, ids in groups.items()} == {"dog": 118, "cat": 5, "bird": 21, "all": 144}
    named = {name: sorted(classes[i][1] for i in ids) for name, ids in groups.items()}
    assert "Chihuahua" in named["dog"] and "tabby cat" in named["cat"] and "goldfish" not in named["all"]
    assert {classes[i][1] for i in groups["bird"]} >= {"peafowl", "goose", "black swan"}
    of_class = categories(classes)
    assert of_class[151] == "dog" and of_class[285] == "cat" and of_class[80] == "bird" and of_class[1] == "goldfish"


def test_groups_of_other_sets_are_their_classes():
    classes = [("n90000001", "star"), ("n90000002", "ring")]
    assert class_groups(classes) == {"all": frozenset({0, 1})}
    assert class_groups(classes, ["ring", "n90000001"]) == {"ring": frozenset({1}), "n90000001": frozenset({0})}
    for names, reason in (
        (["dog"], "none of ImageNet's 118"),
        (["fish"], "Unknown group 'fish'"),
        (["all", "all"], "repeats"),
    ):
        with pytest.raises(UserError, match=reason):
            class_groups(classes, names)
    some = class_groups([("n01440764", "tench"), (imagenet.wnids()[281], "tabby cat")])
    assert some == {"cat": frozenset({1}), "all": frozenset({1})}


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Images of 20 × 23 pixels in shards, as originals and as crops, and their masks."""
    root = tmp_path_factory.mktemp("segmented")
    made.draw_images(root / "images", per_class=3, splits=("val",))
    made.convert(root / "images", root / "shards")
    made.convert(root / "images", root / "crops", "--store", "crop-raw", "--image-size", "16")
    rng = np.random.default_rng(0)
    for image in (root / "images/val").rglob("*.JPEG"):
        save_png(root / "masks" / f"{image.stem}.png", rng.random((20, 23)) < 0.3)
    return root


def read(root: Path, store: str, masks: Path, threads: int = 0):
    manifest = load_manifest(root / store / "val")
    ids = list(range(manifest.num_samples))
    found = segmented_samples(
        manifest, ids, open_masks(masks), image_size=16, category=lambda label: "dog", threads=threads
    )
    return list(found)


def test_samples_come_with_their_masks_in_order_from_originals_and_from_crops(converted):
    originals, crops = read(converted, "shards", converted / "masks"), read(converted, "crops", converted / "masks")
    threaded = read(converted, "shards", converted / "masks", threads=3)
    assert len(originals) == 9
    for sample, of_crop, of_thread in zip(originals, crops, threaded, strict=True):
        assert sample.key == of_crop.key == of_thread.key
        assert torch.equal(sample.image, of_crop.image) and torch.equal(sample.mask, of_crop.mask)
        assert torch.equal(sample.image, of_thread.image) and torch.equal(sample.mask, of_thread.mask)
        whole = np.array(Image.open(converted / "masks" / f"{sample.key}.png")) > 0
        assert torch.equal(sample.mask, crop_mask(torch.from_numpy(whole), 16))


def test_a_mask_of_another_size_is_refused_but_a_mask_of_the_crop_accepted(converted, tmp_path):
    key = read(converted, "shards", converted / "masks")[0].key
    save_png(tmp_path / f"{key}.png", np.ones((16, 16), bool))
    with pytest.raises(UserError, match=rf"{key} has 16 × 16 pixels, and its original image has 23 × 20"):
        read(converted, "shards", tmp_path)
    found = {sample.key: sample.mask for sample in read(converted, "crops", tmp_path)}
    assert found.pop(key).all() and not any(mask is not None for mask in found.values())


def test_shards_of_images_are_refused_as_masks(converted):
    with pytest.raises(UserError, match="a set of images and not of masks"):
        open_masks(converted / "shards/val")
    with pytest.raises(UserError, match="holds several. Give one of them: .*shards/val"):
        open_masks(converted / "shards")
