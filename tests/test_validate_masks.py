"""tools/validate_masks.py: its rates against a count of every pixel, interruption, bad input, pictures."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import made
from browser import assert_fits_and_prints, needs_chromium
from cfmask.data import imagenet
from cfmask.data.images import crop, decode
from cfmask.evaluation.mask_validation import Validation, method_to_validate
from cfmask.masking.cam import GradCam, Relevance
from cfmask.masking.masks import normalised
from cfmask.models.head import build_tower, load_model, save_model
from cfmask.models.initial import model_info
from cfmask.models.tower import Classifier, Normalise
from cfmask.presets import PRESETS
from cfmask.recipe import Method, Recipe
from cfmask.runs import RunFolder
from cfmask.synthetic import shapes
from cfmask.synthetic.shapes import CLASSES, draw_image
from cfmask.tool_arguments import recorded_method
from html_check import checked
from tools import make_shards, validate_masks
from towers import ODD

WNIDS = tuple(imagenet.wnids()[i] for i in (1, 80, 151, 281))  # goldfish; a bird, a dog, a cat
PER_CLASS = 3


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """The demo's drawings, with their exact masks, as shards of four of ImageNet's classes; two models that see them.
    One object lies where no pixel of it is left in the crop."""
    root = tmp_path_factory.mktemp("scene")
    for label, wnid in enumerate(WNIDS):
        for number in range(PER_CLASS):
            image, mask, _ = draw_image(0, "val", label + 2, number)
            if (label, number) == (2, 0):
                mask[:] = 0
                mask[0, 0] = mask[-1, -1] = 255  # corners are cut off: no drawing is square
            for kind, pixels, ending in (("images", image, "JPEG"), ("masks", mask, "png")):
                folder = root / kind / "val" / wnid
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(folder / f"{wnid}_{number}.{ending}")
    made.convert(root / "images", root / "shards", "--samples-per-shard", "4")
    made.save_tiny_model(root / "a.safetensors", ODD, WNIDS)
    model, info = load_model(root / "a.safetensors")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.2)
    save_model(root / "b.safetensors", model, info)
    return root


def command(root: Path, out: Path, *flags: object, models: tuple[str, ...] = ("a",)) -> list[str]:
    named = [str(root / f"{model}.safetensors") for model in models]
    sets = ["--shards", str(root / "shards"), "--segmentation", str(root / "masks"), "--loader-workers", "0"]
    return [*named, *sets, "--out", str(out), *map(str, flags)]


def by_hand(root: Path, model_file: str, threshold: float, *, context: bool = False, grad_cam: bool = False):
    """The rates of each image, from the files and the definitions: (wnid, image, object or NaN, IoU or NaN)."""
    model, info = load_model(root / f"{model_file}.safetensors")
    normalise, size, patch = Normalise(info.mean, info.std), model.image_size, model.patch_size
    for path in sorted((root / "images/val").rglob("*.JPEG")):
        whole = np.array(Image.open(root / "masks/val" / path.parent.name / f"{path.stem}.png"))
        # The short side becomes ``size``, each pixel takes the nearest one's value, and the centre is cropped.
        height, width = whole.shape
        scaled = [size if side == min(whole.shape) else int(size * side / min(whole.shape)) for side in whole.shape]
        rows = [int((i + 0.5) * height / scaled[0]) for i in range(scaled[0])]
        columns = [int((i + 0.5) * width / scaled[1]) for i in range(scaled[1])]
        top, left = (round((side - size) / 2) for side in scaled)
        m_seg = whole[rows][:, columns][top : top + size, left : left + size] > 0

        cam_hook = GradCam() if grad_cam else Relevance()
        pixels = normalise(crop(decode(path.read_bytes()), size)[None])
        logits = model.classify(model.encode(pixels, cam=cam_hook))
        cam = normalised(cam_hook.compute(logits[:, WNIDS.index(path.parent.name)]))[0]
        m_cam = np.zeros((size, size), bool)
        grid = size // patch
        for number, value in enumerate(cam.tolist()):
            y, x = number // grid * patch, number % grid * patch
            m_cam[y : y + patch, x : x + patch] = (value > threshold) != context
        both, either = int((m_cam & m_seg).sum()), int((m_cam | m_seg).sum())
        empty = not m_seg.any()
        yield (
            path.parent.name,
            int(m_cam.sum()) / size**2,
            math.nan if empty else both / int(m_seg.sum()),
            math.nan if empty else both / either,
        )


def results(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        ((), {}),
        (("--mask", "context"), {"context": True}),
        (("--cam", "grad-cam"), {"grad_cam": True}),
    ],
    ids=["object", "context", "grad-cam"],
)
def test_rates_are_those_of_every_pixel_of_every_image_by_group(scene, tmp_path, flags, options):
    thresholds = (0.15, 0.4)
    asked = command(scene, tmp_path, "--thresholds", *thresholds, "--batch-size", 3, *flags, models=("a", "b"))
    assert validate_masks.main(asked) == 0
    groups = {"bird": {WNIDS[1]}, "dog": {WNIDS[2]}, "cat": {WNIDS[3]}, "all": set(WNIDS[1:])}
    for model, of_model in zip(("a", "b"), results(tmp_path)["models"], strict=True):
        assert of_model["groups"].keys() == groups.keys()
        for i, threshold in enumerate(thresholds):
            rows = list(by_hand(scene, model, threshold, **options))
            for group, wnids in groups.items():
                found = of_model["groups"][group]
                values = np.array([row[1:] for row in rows if row[0] in wnids])
                assert found["images"] == len(values)
                assert found["without_object"] == np.isnan(values[:, 1]).sum() == (group in ("dog", "all"))
                ours = [found[name][i] for name in ("image_masking_rate", "object_masking_rate", "iou")]
                assert ours == pytest.approx([values[:, 0].mean(), *np.nanmean(values[:, 1:], 0)], abs=1e-9)


def test_table_and_pictures(scene, tmp_path, capsys):
    out = tmp_path / "made/out"
    assert validate_masks.main(command(scene, out, "--count", 4, models=("a", "b"))) == 0
    printed = capsys.readouterr().out
    text = (out / "table.md").read_text()
    assert text in printed + "\n"
    dog = results(out)["models"][1]["groups"]["dog"]
    row = next(line for line in text.split("\nb: object mask")[1].splitlines() if line.startswith("| 0.3 "))
    header = next(line for line in text.splitlines() if line.startswith("| threshold"))
    cells = dict(zip(*([cell.strip() for cell in line.split("|")] for line in (header, row)), strict=True))
    assert cells["dog: IoU"] == f"{100 * dog['iou'][2]:.1f}"
    assert cells["dog: object"] == f"{100 * dog['object_masking_rate'][2]:.1f}"
    assert "dog 3 (1)" in text and "all 9 (1)" in text
    assert str(scene) not in text  # models are named, not their paths
    assert [model["name"] for model in results(out)["models"]] == ["a", "b"]
    page = checked((out / "index.html").read_bytes())
    assert len(page.all("img")) == 2 and "first block" in page.text and "dog 3 (1)" in page.text
    rows = [part.split("</tr>")[0] for part in (out / "index.html").read_text().split('<tr><th scope="row">')[1:]]
    [_, iou] = [re.findall(r">([^<]+)</td>", row) for row in rows if row.startswith("dog: IoU</th>")]
    assert iou == [f"{100 * value:.1f}" for value in dog["iou"]]
    for name in ("curves.png", "sheet.png"):
        picture = np.asarray(Image.open(out / name).convert("RGB"))
        assert min(picture.shape[:2]) > 300 and picture.std() > 10


@needs_chromium
def test_the_page_fits_a_phone_and_prints(scene, tmp_path):
    out, run = tmp_path / "out", RunFolder(tmp_path / "runs/<b>ft")
    run.claim(PRESETS["object-mask-single-fill"].resolved())
    shutil.copyfile(scene / "a.safetensors", run.final)
    names = ["--names", "long_name_" * 12, "<script>alert(1)</script> 三毛猫"]
    asked = command(scene, out, "--count", 1, *names, models=("a", "b"))
    assert validate_masks.main([asked[0], str(run.root), *asked[2:]]) == 0
    page = checked((out / "index.html").read_bytes())
    assert "<script>alert(1)</script> 三毛猫" in page.text and "All settings of the recipe" in page.text
    assert_fits_and_prints(out / "index.html", tmp_path)
    # Without a sheet, there is none of an earlier command either.
    assert validate_masks.main(command(scene, tmp_path / "out", "--count", 0, *names, models=("a", "b"))) == 2
    (out / "parts.jsonl").unlink()
    assert validate_masks.main(command(scene, out, "--count", 0)) == 0
    page = checked((out / "index.html").read_bytes())
    assert len(page.all("img")) == 1 and "None was drawn." in page.text and not (out / "sheet.png").exists()


def test_an_interrupted_validation_resumes_with_the_same_results(scene, tmp_path, monkeypatch, capsys):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert validate_masks.main(command(scene, whole, "--count", 0)) == 0
    part, shards_done = Validation.part, []

    def part_until(self, shard, *arguments):
        if len(shards_done) == 2:
            raise KeyboardInterrupt
        shards_done.append(shard.name)
        return part(self, shard, *arguments)

    monkeypatch.setattr(Validation, "part", part_until)
    assert validate_masks.main(command(scene, stopped, "--count", 0)) == 130
    assert not (stopped / "results.json").exists()
    with open(stopped / "parts.jsonl", "a") as file:
        file.write('{"shard": "val-0000')  # torn by a kill
    monkeypatch.undo()

    def part_of_the_rest(self, shard, *arguments):
        assert shard.name not in shards_done
        return part(self, shard, *arguments)

    monkeypatch.setattr(Validation, "part", part_of_the_rest)
    assert validate_masks.main(command(scene, stopped, "--count", 0)) == 0
    assert results(stopped)["models"] == results(whole)["models"]
    # Another question is not put together with these answers.
    assert validate_masks.main(command(scene, stopped, "--count", 0, "--thresholds", 0.2)) == 2
    assert "a validation of other thresholds" in capsys.readouterr().err


def test_the_masks_of_a_run_are_the_default(scene, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "model.safetensors").write_bytes((scene / "a.safetensors").read_bytes())
    recipe = Recipe(method=Method(mask="context", fill="multi-fill", threshold=0.25, first_block=1)).resolved()
    (run / "recipe.json").write_text(recipe.to_json())
    recorded = recorded_method(run)
    assert method_to_validate(recorded, mask=None, cam=None, first_block=None) == dataclasses.replace(
        recipe.method, beta=30.0, temperature=None
    )
    changed = method_to_validate(recorded, mask="object", cam=None, first_block=None)
    assert (changed.mask, changed.threshold, changed.first_block) == ("object", 0.6, 1)


def test_samples_without_a_mask_are_an_error_unless_that_is_allowed(scene, tmp_path, capsys):
    some = tmp_path / "some"
    for path in sorted((scene / "masks/val" / WNIDS[2]).iterdir())[1:]:
        some.mkdir(exist_ok=True)
        (some / path.name).write_bytes(path.read_bytes())
    asked = command(scene, tmp_path / "out", "--segmentation", some)
    assert validate_masks.main(asked) == 2
    assert "have no mask" in capsys.readouterr().err
    assert validate_masks.main([*asked, "--allow-missing-masks"]) == 0
    found = results(tmp_path / "out")
    assert found["without_mask"] == 7 and found["models"][0]["groups"]["dog"]["images"] == 2
    assert found["models"][0]["groups"]["cat"]["iou"] == [None] * 9
    assert "Excluded because they have no mask: 7" in (tmp_path / "out/table.md").read_text()


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("--groups", "fish"), "Unknown group 'fish'"),
        (("--groups", "dog", "dog"), "repeats"),
        (("--thresholds", "1.0"), "--thresholds must be at least 0 and below 1"),
        (("--thresholds", "0.2", "0.2"), "repeats"),
        (("--segmentation", "nowhere"), "No such file or folder of masks: nowhere"),
        (("--set", "train"), "no folder of shards"),
        (("--batch-size", "0"), "--batch-size must be at least 1"),
        (("--cam", "grad-cam", "--first-block", "1"), "--first-block would do nothing"),
    ],
)
def test_invalid_flags_are_refused(scene, tmp_path, capsys, flags, reason):
    assert validate_masks.main(command(scene, tmp_path, *flags)) == 2
    assert reason in capsys.readouterr().err


def test_a_model_of_other_classes_and_masks_of_another_size_are_refused(scene, tmp_path, capsys):
    made.save_tiny_model(tmp_path / "other.safetensors", ODD, WNIDS[::-1])
    asked = command(scene, tmp_path / "out")
    assert validate_masks.main([str(tmp_path / "other.safetensors"), *asked[1:]]) == 2
    assert "labels and predictions would not mean the same" in capsys.readouterr().err
    for path in (scene / "masks/val").rglob("*.png"):
        Image.fromarray(np.zeros((30, 30), np.uint8)).save(tmp_path / path.name)
    assert validate_masks.main([*asked, "--segmentation", str(tmp_path)]) == 2
    assert "It must be the mask of this image" in capsys.readouterr().err


def test_the_demos_exact_masks_are_found_by_their_keys(tmp_path, monkeypatch):
    small = {name: dataclasses.replace(split, per_class=1) for name, split in shapes.SPLITS.items()}
    monkeypatch.setattr(shapes, "SPLITS", small)
    shapes.draw_tree(tmp_path / "images", processes=1, progress=False)
    source = ["--source", str(tmp_path / "images"), "--classes", str(tmp_path / "images/classes.txt"), "--split", "val"]
    assert make_shards.main(["folder", *source, "--out", str(tmp_path / "shards"), "--workers", "1"]) == 0
    wnids = tuple(shapes.class_folder(label) for label in range(len(CLASSES)))
    made.save_tiny_model(tmp_path / "model.safetensors", ODD, wnids)
    asked = [str(tmp_path / "model.safetensors"), "--shards", str(tmp_path / "shards"), "--out", str(tmp_path / "out")]
    masks = ["--segmentation", str(tmp_path / "images-masks/val"), "--groups", "star", "all", "--count", "2"]
    assert validate_masks.main([*asked, *masks]) == 0
    groups = results(tmp_path / "out")["models"][0]["groups"]
    assert groups["star"]["images"] == 1 and groups["all"]["images"] == 10 and groups["all"]["without_object"] == 0


DATA = made.REPO.parent / "shared/data"
REAL = [DATA / name for name in ("coco-panoptic.tar", "imagenet-sample.tar", "vit-s14-dinov2.safetensors")]


@pytest.mark.skipif(not all(path.exists() for path in REAL), reason=f"needs {', '.join(path.name for path in REAL)}")
def test_masks_of_a_trained_tower_fall_on_real_dogs_cats_and_birds(tmp_path, capsys):
    """COCO's photographs with their panoptic annotations; the head is made of class means of ImageNet's."""
    coco, photos, weights = REAL
    with tarfile.open(coco) as tar:
        tar.extractall(tmp_path)  # Python 3.10 has no filter
    annotations = tmp_path / "coco-panoptic/panoptic_segmentation/annotations/panoptic_train2017.json"
    raw = json.loads(annotations.read_text())
    names = {c["id"]: c["name"] for c in raw["categories"] if c["name"] in ("dog", "cat", "bird")}
    for annotation in raw["annotations"]:
        for name in {names[s["category_id"]] for s in annotation["segments_info"] if s["category_id"] in names}:
            (tmp_path / "images/val" / name).mkdir(parents=True, exist_ok=True)
            file = annotation["file_name"].replace(".png", ".jpg")
            (tmp_path / "coco-panoptic/images/train2017" / file).rename(tmp_path / "images/val" / name / file)

    known: dict[str, list[torch.Tensor]] = {"dog": [], "cat": [], "bird": []}
    with tarfile.open(photos) as tar:
        for number, member in enumerate(m for m in tar.getmembers() if m.name.endswith(".JPEG")):
            wnid = member.name.split("/")[-2]
            super_class = imagenet.super_class_of().get(wnid)
            if (super_class and len(known[super_class]) < 5) or (not super_class and number % 50 == 0):
                photo = crop(decode(tar.extractfile(member).read()), 224)
                known.setdefault(super_class or wnid, []).append(photo)
    config = {
        "embed_dim": 384,
        "vision_cfg": dict(
            image_size=224, patch_size=14, width=384, layers=12, head_width=64, ls_init_value=1e-5, no_ln_pre=True
        ),
        "preprocess_cfg": {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
    }
    (tmp_path / "vit.json").write_text(json.dumps(config))
    info = model_info(str(tmp_path / "vit.json"), classes=tuple(known))
    tower = build_tower(info)
    tower.load_state_dict({key.removeprefix("visual."): v.float() for key, v in load_file(weights).items()})
    model, normalise = Classifier(tower, nn.Linear(384, len(known))), Normalise(info.mean, info.std)
    with torch.no_grad():
        for row, of_class in zip(model.head.weight, known.values(), strict=True):
            features = model.encode(normalise(torch.stack(of_class)))
            row.copy_(100 * F.normalize(F.normalize(features, dim=-1).mean(0), dim=0))
        model.head.bias.zero_()
    save_model(tmp_path / "model.safetensors", model, info)

    (tmp_path / "classes.txt").write_text("".join(f"{name}\t{name}\n" for name in known))
    made.convert(tmp_path / "images", tmp_path / "shards", "--classes", str(tmp_path / "classes.txt"))
    asked = [str(tmp_path / "model.safetensors"), "--shards", str(tmp_path / "shards")]
    asked += ["--segmentation", str(annotations)]
    out = ["--out", str(tmp_path / "out"), "--groups", "dog", "cat", "bird", "all"]
    assert validate_masks.main([*asked, *out]) == 0
    groups = results(tmp_path / "out")["models"][0]["groups"]
    assert {name: group["images"] for name, group in groups.items()} == {"dog": 8, "cat": 1, "bird": 2, "all": 11}
    on_object, by_chance = (groups["all"][name][2] for name in ("object_masking_rate", "image_masking_rate"))
    print(f"at 0.3, {100 * on_object:.0f} % of the object is masked and {100 * by_chance:.0f} % of the image")
    assert on_object > by_chance + 0.15

    # The same photographs without shards, and the PNGs in the zip that COCO distributes, give the same numbers.
    with zipfile.ZipFile(annotations.with_suffix(".zip"), "w") as archive:
        for path in annotations.with_suffix("").iterdir():
            archive.writestr(f"panoptic_train2017/{path.name}", path.read_bytes())
    images = ["--images", str(tmp_path / "images"), "--panoptic-pngs", str(annotations.with_suffix(".zip"))]
    named = ["--segmentation", str(annotations), "--out", str(tmp_path / "photos"), "--groups", "dog", "cat", "bird"]
    assert validate_masks.main([asked[0], *images, *named, "--count", "5"]) == 0
    for name, found in results(tmp_path / "photos")["models"][0]["groups"].items():
        assert found.pop("images") == groups[name].pop("images")
        for rate, values in found.items():
            assert values == pytest.approx(groups[name][rate], abs=1e-9)
