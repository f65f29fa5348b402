"""COCO's panoptic format as distributed: JSON, PNGs of segment ids in a folder or zip, photographs."""

from __future__ import annotations

import json
import re
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import made
from cfmask.data import imagenet
from cfmask.data.coco import CocoMasks
from cfmask.data.filetree import FileTree
from cfmask.data.images import crop, crop_mask, decode
from cfmask.data.segmentation import class_groups, open_masks
from cfmask.data.segmented import SegmentedPhotos
from cfmask.errors import UserError
from cfmask.evaluation.mask_validation import Validation
from cfmask.models.head import load_model
from cfmask.recipe import Recipe
from tools import validate_masks
from towers import ODD

BIRD, CAT, DOG, SKY = 16, 17, 18, 187
WNIDS = tuple(imagenet.wnids()[i] for i in (1, 80, 151, 152, 281))  # goldfish; a bird, two dogs, a cat
SIZES = {139: (60, 52), 285: (52, 60), 632: (64, 64), 724: (60, 52)}

# Where each image's segments are: id, category, rows, columns. Ids need all three channels.
SEGMENTS = {
    139: [(3_226_956, DOG, (10, 40), (5, 30)), (70_000, DOG, (45, 55), (30, 50)), (9, SKY, (0, 10), (0, 52))],
    285: [(6_901_986, CAT, (0, 52), (20, 40)), (256, DOG, (0, 20), (0, 20))],
    632: [(65_536, BIRD, (30, 34), (30, 50))],
    724: [(5_000, SKY, (0, 30), (0, 52))],
}


def file_name(number: int, ending: str = "jpg") -> str:
    return f"{number:012}.{ending}"


def object_of(number: int, category: int) -> np.ndarray:
    mask = np.zeros(SIZES[number], bool)
    for _, of, rows, columns in SEGMENTS[number]:
        if of == category:
            mask[slice(*rows), slice(*columns)] = True
    return mask


def save_ids(path: Path, number: int) -> None:
    ids = np.zeros(SIZES[number], np.int64)
    for segment, _, rows, columns in SEGMENTS[number]:
        ids[slice(*rows), slice(*columns)] = segment
    colours = np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)
    Image.fromarray(colours).save(path)


@pytest.fixture(scope="module")
def distributed(tmp_path_factory) -> Path:
    """val2017/*.jpg, annotations/panoptic_val2017.json and annotations/panoptic_val2017/*.png."""
    root = tmp_path_factory.mktemp("coco")
    pngs = root / "annotations/panoptic_val2017"
    pngs.mkdir(parents=True)
    (root / "val2017").mkdir()
    rng = np.random.default_rng(0)
    for number, size in SIZES.items():
        save_ids(pngs / file_name(number, "png"), number)
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(root / "val2017" / file_name(number))
    categories = [(BIRD, "bird", 1), (CAT, "cat", 1), (DOG, "dog", 1), (SKY, "sky-other-merged", 0)]
    annotations = {
        "info": {"description": "COCO 2018 Panoptic Dataset"},
        "images": [{"id": n, "file_name": file_name(n), "height": h, "width": w} for n, (h, w) in SIZES.items()],
        "annotations": [
            {
                "image_id": number,
                "file_name": file_name(number, "png"),
                "segments_info": [
                    {"id": segment, "category_id": category, "iscrowd": int(segment == 70_000), "area": 1}
                    for segment, category, *_ in segments
                ],
            }
            for number, segments in SEGMENTS.items()
        ],
        "categories": [{"id": i, "name": name, "isthing": thing} for i, name, thing in categories],
    }
    (root / "annotations/panoptic_val2017.json").write_text(json.dumps(annotations))
    made.save_tiny_model(root / "model.safetensors", ODD, WNIDS)
    return root


@pytest.fixture
def copy(distributed, tmp_path) -> Path:
    """A copy to damage."""
    shutil.copytree(distributed / "annotations", tmp_path / "annotations")
    return tmp_path / "annotations/panoptic_val2017.json"


def zipped(folder: Path, out: Path) -> Path:
    """Like COCO's archives, which were packed on a Mac."""
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.iterdir()):
            archive.write(path, f"{folder.name}/{path.name}")
            archive.writestr(f"__MACOSX/{folder.name}/._{path.name}", b"")
    return out


# --- annotations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["folder", "zip beside", "zip elsewhere"])
def test_pngs_are_read_from_the_folder_or_the_zip(copy, tmp_path, how):
    pngs = copy.with_suffix("")
    elsewhere = None
    if how != "folder":
        made_zip = zipped(pngs, copy.with_suffix(".zip") if how == "zip beside" else tmp_path / "pngs.zip")
        elsewhere = made_zip if how == "zip elsewhere" else None
        shutil.rmtree(pngs)
    masks = open_masks(copy, elsewhere)
    for number in SIZES:
        for name, category in (("bird", BIRD), ("cat", CAT), ("dog", DOG)):
            key = f"n02085620_{number:012}"
            found = masks.read(key, f"n02085620/{number:012}.JPEG", name)
            assert np.array_equal(found, object_of(number, category)), (number, name)


def test_missing_pngs_are_refused_at_once(copy, tmp_path):
    shutil.rmtree(copy.with_suffix(""))
    with pytest.raises(UserError, match="panoptic_val2017.zip exists.*--panoptic-pngs"):
        open_masks(copy)
    with pytest.raises(UserError, match="no such file or folder: .*/nowhere"):
        open_masks(copy, tmp_path / "nowhere")
    (tmp_path / "cut.zip").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(UserError, match="cannot be read as a zip archive"):
        open_masks(copy, tmp_path / "cut.zip")


def repaint(change: Callable[[Image.Image], Image.Image]) -> Callable[[Path], None]:
    def repainted(path: Path) -> None:
        change(Image.open(path)).save(path)

    return repainted


def _pixel(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    image.putpixel((51, 59), colour)
    return image


def _without_bird(image: Image.Image) -> Image.Image:
    return Image.new("RGB", image.size)


def _sixteen_bits(path: Path) -> None:
    pixels = np.asarray(Image.open(path)).astype(">u2") << 8  # the upper byte is what Pillow keeps
    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    )


def _transparent(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    image.putpixel((0, 0), (0, 0, 0, 0))
    return image


@pytest.mark.parametrize(
    ("damage", "number", "reason"),
    [
        (repaint(lambda image: _pixel(image, (9, 9, 9))), 139, "pixels of 1 segments .* does not list .id 592137"),
        (repaint(_without_bird), 632, "has no pixel of 1 segments .* lists .id 65536"),
        (repaint(lambda image: image.resize((26, 30), 0)), 139, "has 26 × 30 pixels, its image has 52 × 60"),
        (repaint(lambda image: image.resize((60, 52), 0)), 139, "has 60 × 52 pixels, its image has 52 × 60"),
        (repaint(lambda image: image.quantize()), 139, "three channels of 8 bits .* mode P"),
        (repaint(lambda image: image.getchannel(0)), 139, "three channels of 8 bits .* mode L"),
        (repaint(_transparent), 139, "transparent"),
        (_sixteen_bits, 139, "it has 16 bits"),
        (lambda path: path.write_bytes(path.read_bytes()[:100]), 139, "cannot be read as a PNG"),
        (lambda path: path.write_bytes(b"version https://git-lfs.github.com"), 139, "cannot be read as a PNG"),
        (Path.unlink, 139, "000000000139.png, which does not exist"),
    ],
)
def test_a_png_that_contradicts_the_json_is_refused(copy, damage, number, reason):
    damage(copy.with_suffix("") / file_name(number, "png"))
    masks = open_masks(copy)
    with pytest.raises(UserError, match=reason):
        masks.read(f"{number:012}", "", "bird")


def test_an_opaque_alpha_channel_changes_no_id(copy):
    repaint(lambda image: image.convert("RGBA"))(copy.with_suffix("") / file_name(139, "png"))
    assert np.array_equal(open_masks(copy).read(f"{139:012}", "", "dog"), object_of(139, DOG))


def _with(where: str, **values: Any) -> Callable[[dict], None]:
    def change(raw: dict) -> None:
        raw[where][0].update(values)

    return change


def _segment(**values: Any) -> Callable[[dict], None]:
    def change(raw: dict) -> None:
        raw["annotations"][0]["segments_info"][0].update(values)

    return change


def _twice(where: str, **values: Any) -> Callable[[dict], None]:
    def change(raw: dict) -> None:
        raw[where].append({**raw[where][0], **values})

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_segment(id=0), "the id 0. Ids must be whole numbers from 1"),
        (_segment(id="3226956"), "the id '3226956'"),
        (_segment(id=3226956.0), "the id 3226956.0"),
        (_segment(id=256**3), "the id 16777216"),
        (_segment(id=9), "two segments of 000000000139.jpg the id 9"),
        (_segment(category_id=0), "category id 0, which is not among .*bird 16, cat 17, dog 18"),
        (_segment(category_id="18"), r"category id '18'.*\(bird 16, cat 17, dog 18, …\).*as a number differs"),
        (_segment(category_id=[18]), "not a file of COCO annotations"),
        (_with("images", height="60"), "a height and width of '60' and 52"),
        (_with("images", width=0), "a height and width of 60 and 0"),
        (_with("images", file_name=""), "file_name is ''"),
        (_with("annotations", image_id=1), "annotation of the image 1"),
        (_with("annotations", file_name=None), "the PNG None"),
        (_twice("images"), "lists the image 139 .* twice"),
        (_twice("images", id=1), "lists the image 1 .* twice"),
        (_twice("annotations"), "two panoptic annotations of 000000000139.jpg"),
        (_twice("categories"), "two categories with the id 16"),
        (_twice("categories", id=1), "2 categories named 'bird'"),
        (lambda raw: raw["annotations"].clear(), "has no annotations"),
        (lambda raw: raw.pop("categories"), "not a file of COCO annotations .*KeyError"),
        (lambda raw: raw["annotations"][1].pop("segments_info"), "mixes panoptic annotations with others"),
    ],
)
def test_a_json_that_contradicts_itself_is_refused(copy, change, reason):
    raw = json.loads(copy.read_text())
    change(raw)
    copy.write_text(json.dumps(raw))
    with pytest.raises(UserError, match=reason):
        open_masks(copy).read(f"{632:012}", "", "bird")


def test_images_without_an_annotation_are_counted(copy):
    raw = json.loads(copy.read_text())
    del raw["annotations"][0]
    copy.write_text(json.dumps(raw))
    with pytest.warns(UserWarning, match="1 of 4 images have no annotation"):
        open_masks(copy)


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("annotations/panoptic_val2017", "give the JSON of its annotations"),
        ("panoptic_annotations_trainval2017.zip", "is an archive. Unpack it"),
    ],
)
def test_a_path_beside_the_json_is_refused_with_the_jsons_path(copy, tmp_path, place, reason):
    zipped(copy.parent / "panoptic_val2017", tmp_path / "panoptic_annotations_trainval2017.zip")
    with pytest.raises(UserError, match=reason):
        open_masks(tmp_path / place).read(f"{139:012}", "", "dog")


def test_a_palette_in_another_order_does_not_invert_a_mask(tmp_path):
    mask = Image.fromarray(np.eye(4, dtype=np.uint8))
    for name, palette in (("voc", [0, 0, 0, 128, 0, 0]), ("white-first", [255, 255, 255, 0, 0, 0])):
        image = mask.copy()
        image.putpalette(palette)
        image.save(tmp_path / f"{name}.png")
    assert np.array_equal(open_masks(tmp_path).read("voc", "", "dog"), np.eye(4, dtype=bool))
    with pytest.raises(UserError, match="index 0 is not black"):
        open_masks(tmp_path).read("white-first", "", "dog")


# --- photographs ------------------------------------------------------------------------------------------------------


def photos(root: Path, images: Path, groups: list[str] | None = None, **options: Any) -> SegmentedPhotos:
    classes = [(wnid, wnid) for wnid in WNIDS]
    masks = CocoMasks(root / "annotations/panoptic_val2017.json")
    options = {"allow_missing": False, "image_size": 32, "threads": 0, **options}
    return SegmentedPhotos(masks, images, classes, class_groups(classes, groups), **options)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("threads", [0, 2])
def test_photographs_come_once_for_each_category_with_their_masks(distributed, tmp_path, packed, threads):
    images = distributed / "val2017"
    found = photos(distributed, zipped(images, tmp_path / "val2017.zip") if packed else images, threads=threads)
    [chunk] = found.chunks
    samples = list(found.samples(chunk.ids))
    expected = [
        (139, "dog", DOG, (2, 3)),
        (285, "cat", CAT, (4,)),
        (285, "dog", DOG, (2, 3)),
        (632, "bird", BIRD, (1,)),
    ]
    assert len(samples) == len(expected)
    for sample, (number, name, category, classes) in zip(samples, expected, strict=True):
        assert (sample.key, sample.classes) == (f"{file_name(number)} ({name})", classes)
        assert torch.equal(sample.image, crop(decode((images / file_name(number)).read_bytes()), 32))
        assert torch.equal(sample.mask, crop_mask(torch.from_numpy(object_of(number, category)), 32))


def test_names_in_the_annotations_may_have_folders_and_backslashes(copy, distributed, tmp_path):
    raw = json.loads(copy.read_text())
    for entry, folder in ((raw["images"], "val2017"), (raw["annotations"], "panoptic_val2017")):
        for image, spelling in zip(entry, (f"{folder}/", f"{folder}\\", f"./{folder}/", ""), strict=True):
            image["file_name"] = spelling + image["file_name"]
    copy.write_text(json.dumps(raw))
    for name in ("val2017", "annotations/panoptic_val2017"):
        zipped(distributed / name, tmp_path / f"{Path(name).name}.zip")
    for images in (distributed / "val2017", distributed, tmp_path / "val2017.zip"):
        assert len(list(photos(tmp_path, images).samples(range(4)))) == 4
    pngs = CocoMasks(copy, tmp_path / "panoptic_val2017.zip")
    assert np.array_equal(pngs.read(f"{139:012}", "", "dog"), object_of(139, DOG))


def test_images_of_several_categories_are_counted_once(distributed, tmp_path):
    shutil.copytree(distributed / "val2017", tmp_path / "images")
    (tmp_path / "images" / file_name(285)).unlink()  # a cat and a dog
    assert photos(distributed, tmp_path / "images", allow_missing=True).left_out == [file_name(285)]


def test_photographs_that_contradict_the_annotations_are_refused(distributed, tmp_path):
    images = tmp_path / "images"
    shutil.copytree(distributed / "val2017", images)
    Image.open(images / file_name(139)).resize((26, 30)).save(images / file_name(139))
    with pytest.raises(UserError, match="has 26 × 30 pixels, and 52 × 60 in the annotations"):
        list(photos(distributed, images).samples([0]))
    (images / file_name(139)).unlink()
    with pytest.raises(UserError, match="lacks 1 of 3 images .* dog.*000000000139.jpg"):
        photos(distributed, images)
    some = photos(distributed, images, allow_missing=True)
    assert some.left_out == [file_name(139)] and len(some.chunks[0].ids) == 3
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="lacks 3 of 3"):
        photos(distributed, tmp_path / "none", allow_missing=True)
    (images / "more").mkdir()
    for folder in ("more", "again"):
        (images / folder).mkdir(exist_ok=True)
        shutil.copy(distributed / "val2017" / file_name(139), images / folder)
    with pytest.raises(UserError, match=f"holds {file_name(139)} 2 times"):
        photos(distributed, images)


@pytest.mark.parametrize(
    ("groups", "reason"),
    [([WNIDS[2]], "is a dog too. Choose whole categories"), ([WNIDS[0]], "no category 'n01443537'")],
)
def test_groups_that_the_annotations_cannot_distinguish_are_refused(distributed, groups, reason):
    with pytest.raises(UserError, match=reason):
        photos(distributed, distributed / "val2017", groups)


def test_the_cam_is_that_of_the_categorys_most_probable_class(distributed):
    model, info = load_model(distributed / "model.safetensors")
    found = photos(distributed, distributed / "val2017", image_size=model.image_size)
    method = Recipe().resolved().method
    validation = Validation(["m"], [model], [method], info, found, {}, [0.3], device="cpu", batch_size=4)
    samples = list(found.samples(found.chunks[0].ids))
    with torch.no_grad():
        model.head.bias[0] += 1e3  # classes of other categories do not matter
        model.head.bias[3] += 500
    cam, classes = validation.relevance(model, method, samples)
    assert classes.tolist() == [3, 4, 3, 1]
    assert cam.shape == (4, (model.image_size // model.patch_size) ** 2)


def command(root: Path, out: Path, *flags: object) -> list[str]:
    where = ("--images", root / "val2017", "--segmentation", root / "annotations/panoptic_val2017.json")
    return [str(part) for part in (root / "model.safetensors", *where, "--out", out, "--loader-workers", 0, *flags)]


def test_a_validation_on_the_photographs_ends_and_resumes(distributed, copy, tmp_path, capsys):
    shutil.copytree(distributed / "val2017", tmp_path / "val2017")
    shutil.copy(distributed / "model.safetensors", tmp_path)
    out = tmp_path / "out"
    assert validate_masks.main(command(tmp_path, out, "--count", 2)) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["without_image"] == results["without_mask"] == 0
    groups = results["models"][0]["groups"]
    assert {name: group["images"] for name, group in groups.items()} == {"dog": 2, "cat": 1, "bird": 1, "all": 4}
    assert "the model's most probable class in the category" in capsys.readouterr().out
    assert (out / "sheet.png").exists()
    assert validate_masks.main(command(tmp_path, out, "--count", 0)) == 0  # nothing is left to do
    save_ids(copy.with_suffix("") / file_name(139, "png"), 139)  # the same pixels in a new file
    assert validate_masks.main(command(tmp_path, out, "--count", 0)) == 2
    assert "a validation of other images or masks" in capsys.readouterr().err


def test_objects_that_the_crop_cuts_off_count_as_images_without_one(distributed, copy, tmp_path, capsys):
    shutil.copytree(distributed / "val2017", tmp_path / "val2017")
    shutil.copy(distributed / "model.safetensors", tmp_path)
    for number, segments in ((139, (3_226_956, 70_000, 9)), (285, (6_901_986, 256))):
        ids = np.zeros(SIZES[number], np.int64)
        long = ids if number == 139 else ids.T
        long[: len(segments), 0] = segments  # a pixel each, at an end of the long side
        colours = np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)
        Image.fromarray(colours).save(copy.with_suffix("") / file_name(number, "png"))
    out = tmp_path / "out"
    assert validate_masks.main(command(tmp_path, out, "--groups", "dog", "--thresholds", 0.5)) == 0
    said = capsys.readouterr().out
    assert "Images (without a pixel of the object): dog 2 (2)." in said and "No contact sheet" in said
    assert not (out / "sheet.png").exists()
    [group] = json.loads((out / "results.json").read_text())["models"][0]["groups"].values()
    assert group["iou"] == group["object_masking_rate"] == [None] and group["image_masking_rate"][0] > 0


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("--shards", "x"), "--shards would do nothing with --images"),
        (("--set", "val"), "--set would do nothing"),
        (("--segmentation", "."), "--images needs COCO annotations|holds no masks"),
        (("--segmentation", ".", "--panoptic-pngs", "x"), "--panoptic-pngs has no effect"),
        (("--groups", "fish"), "Unknown group 'fish'"),
        (("--images", "nowhere"), "nowhere cannot be read"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(distributed, tmp_path, monkeypatch, capsys, flags, reason):
    monkeypatch.chdir(tmp_path)
    Image.new("L", (2, 2)).save(tmp_path / "a.png")
    assert validate_masks.main(command(distributed, tmp_path / "out", *flags)) == 2
    assert re.search(reason, capsys.readouterr().err)


# --- folders and zips -------------------------------------------------------------------------------------------------


def test_files_of_a_zip_from_windows_are_found(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in ("v\\1.png", "v\\.hidden\\2.png"):
            archive.writestr(name, name)
    tree = FileTree(tmp_path / "a.zip")
    assert tree.read(tree.find("1.png")) == tree.read(tree.find("v/1.png")) == b"v\\1.png"
    assert tree.find("2.png") is None


def test_masks_of_other_folders_and_endings(tmp_path):
    for name in ("cat/1.png", "dog/2.PNG", "dog/3.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("L", (4, 4), 255).save(tmp_path / name)
    masks = open_masks(tmp_path)
    assert masks.read("key", "dog/2.jpg", "dog").all(), "an ending in capitals"
    assert masks.read("key", "n02085620/3.jpg", "dog").all(), "a folder that has no masks"
    assert masks.read("key", "cat/3.jpg", "cat") is None, "the mask of a dog"
    shutil.copy(tmp_path / "cat/1.png", tmp_path / "cat/1.PNG")
    with pytest.raises(UserError, match="exists as .PNG and as .png"):
        open_masks(tmp_path)


def test_a_mask_larger_than_any_image_is_refused_before_memory_is_allocated(tmp_path):
    (tmp_path / "1.json").write_text(json.dumps({"size": [10**9, 10**9], "counts": [10**18]}))
    with pytest.raises(UserError, match="more than any image"):
        open_masks(tmp_path).read("1", "", "dog")


def test_a_tree_finds_files_by_the_end_of_their_path_and_its_digest_changes_with_them(tmp_path):
    folder = tmp_path / "a"
    for name in ("x/1.png", "y/1.png", "y/2.png", ".hidden/2.png", "._2.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    tree = FileTree(folder)
    assert (tree.find("2.png"), tree.find("y/1.png"), tree.find("3.png")) == ("y/2.png", "y/1.png", None)
    with pytest.raises(UserError, match="holds 1.png 2 times"):
        tree.find("1.png")
    before = FileTree(folder).digest()
    assert before == tree.digest()
    (folder / "y/2.png").write_text("longer than before")
    assert FileTree(folder).digest() != before
    assert FileTree(folder).digest({"x/1.png"}) == tree.digest({"x/1.png"})


def test_a_damaged_archive_entry_is_refused(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("v/1.png", b"pixels")
    path.write_bytes(path.read_bytes().replace(b"pixels", b"pixelz"))
    tree = FileTree(path)
    with pytest.raises(UserError, match="1.png in .*a.zip cannot be read: .*Download it again"):
        tree.read(tree.find("1.png"))
