"""Image towers without a text tower, and at another image size than that of their training: heads from class means, and
interpolated positional embeddings."""

from __future__ import annotations

import json
import tarfile

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

import made
from cfmask.data.shards import load_manifest
from cfmask.data.stream import eval_batches
from cfmask.models.head import load_model, read_info
from cfmask.models.tower import Normalise
from tools import build_head, export
from towers import MEAN, STD, TINY, tiny_clip

DATA = made.REPO.parent / "shared/data"


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("set")
    made.draw_images(folder / "images", per_class=16)
    made.convert(folder / "images", folder / "shards")
    return folder / "shards"


def config_of(image: int) -> dict:
    config = json.loads(json.dumps(TINY.info().config))
    config["vision_cfg"]["image_size"] = image
    return config


def save_tower(folder, image: int = TINY.image, dtype: torch.dtype = torch.float32):
    """--model for images of ``image`` pixels, and --pretrained: the tower of a CLIP for TINY.image pixels, alone."""
    folder.mkdir(parents=True, exist_ok=True)
    model, weights = folder / f"tower-{image}.json", folder / "tower.safetensors"
    model.write_text(json.dumps({"model_cfg": config_of(image), "preprocess_cfg": {"mean": MEAN, "std": STD}}))
    save_file({name: value.to(dtype) for name, value in tiny_clip().visual.state_dict().items()}, weights)
    return str(model), str(weights)


def build(model, pretrained, out, *flags) -> int:
    flags = ["--model", model, "--pretrained", pretrained, "--device", "cpu", "--out", str(out), *map(str, flags)]
    return build_head.main(flags) or 0


def test_rows_are_normalised_class_means_at_the_scale_of_least_cross_entropy(tmp_path, shards, capsys):
    out = tmp_path / "means.safetensors"
    tower = save_tower(tmp_path, dtype=torch.float16)
    assert build(*tower, out, "--class-means", shards / "train") == 0
    model, info = load_model(out)
    manifest = load_manifest(shards / "train")
    assert info.classes == tuple(wnid for wnid, _ in manifest.classes)

    read = {"image_size": model.image_size, "batch_size": 16, "rank": 0, "world_size": 1, "loader_workers": 0}
    batches = list(eval_batches(manifest, **read))
    labels = torch.cat([batch.labels for batch in batches])
    with torch.no_grad():
        features = torch.cat([model.encode(Normalise(info.mean, info.std)(batch.images)) for batch in batches])
    unit = F.normalize(features, dim=1)
    means = F.normalize(torch.stack([unit[labels == c].mean(0) for c in range(len(info.classes))]), dim=1)
    scale = model.head.weight.norm(dim=1)
    torch.testing.assert_close(model.head.weight, scale[:, None] * means, rtol=1e-4, atol=1e-5)
    assert torch.equal(model.head.bias, torch.zeros(len(means)))

    def cross_entropy(of: float) -> float:
        return F.cross_entropy(of * (unit @ means.T).double(), labels).item()

    best = scale[0].item()
    others = [0.9 * best, *([1.1 * best] if best < 99 else [])]
    assert cross_entropy(best) <= min(map(cross_entropy, others))
    said = capsys.readouterr().out
    assert f"mean square of the features: {features.square().mean():.4g}" in said

    written = out.stat().st_mtime_ns
    assert build(*tower, out, "--class-means", shards / "train") == 0
    assert "up to date" in capsys.readouterr().out and out.stat().st_mtime_ns == written
    assert build(*tower, out, "--class-means", shards / "val") == 0  # other images
    assert read_info(out) != info


def test_a_run_starts_from_class_means(tmp_path, shards):
    model, weights = save_tower(tmp_path)
    start = ["--model", model, "--batch-size", 16, "--lanes", 4, "--shards", shards, "--executor", "local"]
    start += ["--tasks-per-node", 1, "--dry-run", "--run", tmp_path / "run"]
    refused = made.submit(*start, "--pretrained", weights, check=False)
    assert refused.returncode == 2 and "--class-means" in refused.stderr
    out = tmp_path / "means.safetensors"
    assert build(model, weights, out, "--class-means", shards / "train") == 0
    done = made.submit(*start, "--pretrained", out, "--preset", "linear-probe", check=False)
    assert done.returncode == 0, done.stderr
    again = tmp_path / "again.safetensors"  # of a model file: its tower under another head
    assert build(model, str(out), again, "--class-means", shards / "train") == 0
    assert torch.equal(load_model(again)[0].head.weight, load_model(out)[0].head.weight)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--classes", "imagenet"], "--classes would do nothing with --class-means"),
        (["--templates", "file"], "--templates would do nothing with --class-means"),
        (["--keep-head"], "--keep-head would do nothing with --class-means"),
        (["--resize-positions"], "trained on 4 × 4 patches, as many as"),
    ],
)
def test_flags_without_effect_are_refused(tmp_path, shards, capsys, flags, reason):
    tower = save_tower(tmp_path)
    assert build(*tower, tmp_path / "out.safetensors", "--class-means", shards / "train", *flags) == 2
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize("image", [24, 8])
def test_resized_positions_give_open_clips_features(tmp_path, capsys, image):
    """As open_clip's force_image_size, for a whole CLIP whose configuration is beside it."""
    clip = tiny_clip()
    folder = tmp_path / "clip"
    folder.mkdir()
    save_file(clip.state_dict(), folder / "open_clip_model.safetensors")
    preprocess = {"mean": list(MEAN), "std": list(STD), "size": TINY.image}
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config_of(TINY.image), "preprocess_cfg": preprocess})
    )
    model = tmp_path / "resized.json"
    model.write_text(json.dumps(config_of(image)))
    names = tmp_path / "names.tsv"
    names.write_text("n0\tcat\nn1\tdog\n")
    weights, out = str(folder / "open_clip_model.safetensors"), tmp_path / "head.safetensors"
    assert build(str(model), weights, out, "--classes", names) == 2
    assert "differ in vision_cfg.image_size" in capsys.readouterr().err
    assert build(str(model), weights, out, "--classes", names, "--resize-positions") == 0

    expected = open_clip.create_model(f"local-dir:{folder}", force_image_size=image).eval()
    ours, info = load_model(out)
    assert info.config["vision_cfg"]["image_size"] == image and "interpolated" in info.provenance
    pixels = torch.randn(2, 3, image, image)
    with torch.no_grad():
        torch.testing.assert_close(ours.encode(pixels), expected.encode_image(pixels), rtol=1e-4, atol=1e-5)


def test_a_clip_at_another_image_size_is_exported_for_open_clip(tmp_path):
    save_file(tiny_clip().state_dict(), weights := tmp_path / "clip.safetensors")
    (model := tmp_path / "resized.json").write_text(
        json.dumps({"model_cfg": config_of(24), "preprocess_cfg": {"mean": MEAN, "std": STD}})
    )
    (names := tmp_path / "names.tsv").write_text("n0\tcat\nn1\tdog\n")
    start = tmp_path / "head.safetensors"
    assert build(str(model), str(weights), start, "--classes", names, "--resize-positions") == 0
    command = [str(start), "--format", "open-clip", "--pretrained", str(weights), "--out", str(tmp_path / "out.pt")]
    assert not export.main(command)  # which compares open_clip's features with ours


@pytest.mark.parametrize("form", ["open-clip", "hub"])
@pytest.mark.parametrize("text", [{}, {"text_cfg": None}])
def test_export_of_an_image_tower_names_the_format_that_it_can_have(tmp_path, shards, capsys, form, text):
    _, weights = save_tower(tmp_path)
    config = {key: value for key, value in config_of(TINY.image).items() if key != "text_cfg"} | text
    model = tmp_path / "alone.json"
    model.write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {"mean": MEAN, "std": STD}}))
    out = tmp_path / "means.safetensors"
    assert build(str(model), weights, out, "--class-means", shards / "train") == 0
    command = [
        str(out),
        "--format",
        form,
        "--pretrained",
        weights,
        "--out",
        str(tmp_path / ("out.pt" if form == "open-clip" else "out")),
    ]
    assert export.main(command) == 2
    assert "is an image tower alone" in (said := capsys.readouterr().err) and "--format onnx" in said


def test_weights_of_another_image_size_are_refused_with_the_remedy(tmp_path, shards, capsys):
    model, weights = save_tower(tmp_path, image=24)
    out = tmp_path / "out.safetensors"
    assert build(model, weights, out, "--class-means", shards / "train") == 2
    assert "positional_embedding has the shape (17, 16), the model's (37, 16)" in (said := capsys.readouterr().err)
    assert "build_head.py --resize-positions" in said
    assert build(model, weights, out, "--class-means", shards / "train", "--resize-positions") == 0
    assert build(model, str(out), out, "--class-means", shards / "train", "--resize-positions") == 2
    assert "is a cfmask model file" in capsys.readouterr().err
    # Another tower, whose positions are another size as well: interpolation would not help.
    wide = config_of(24) | {"embed_dim": 12}
    (tmp_path / "wide.json").write_text(json.dumps({"model_cfg": wide, "preprocess_cfg": {"mean": MEAN, "std": STD}}))
    assert build(str(tmp_path / "wide.json"), weights, out, "--class-means", shards / "train") == 2
    assert "--resize-positions" not in capsys.readouterr().err


def test_a_trained_fp16_tower_at_half_its_size_recognises_photographs(tmp_path):
    """A DINOv2 tower: LayerScale, no ln_pre, half precision, no preprocessing beside it."""
    weights, photos = DATA / "vit-s14-dinov2.safetensors", DATA / "pacs.tar"
    if not (weights.exists() and photos.exists()):
        pytest.skip(f"needs {weights.name} and {photos.name}")
    with tarfile.open(photos) as tar:
        wanted = [m for m in tar.getmembers() if "/photo/" in m.name and m.isfile()][::10]
        for number, member in enumerate(wanted):
            file = tar.extractfile(member)
            assert file is not None
            path = tmp_path / "images" / ("val" if number % 2 else "train") / member.name.split("/", 2)[2]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(file.read())
    made.convert(tmp_path / "images", tmp_path / "shards")
    config = {
        "embed_dim": 384,
        "vision_cfg": {
            **{"image_size": 112, "patch_size": 14, "width": 384, "layers": 12, "head_width": 64, "mlp_ratio": 4.0},
            **{"ls_init_value": 1e-5, "no_ln_pre": True, "pool_type": "tok"},
        },
    }
    model, out = tmp_path / "vit.json", tmp_path / "means.safetensors"
    model.write_text(json.dumps(config))
    flags = ["--resize-positions", "--class-means", tmp_path / "shards/train"]
    assert build(str(model), str(weights), out, *flags) == 2  # mean and standard deviation are unknown
    flags += ["--mean", 0.485, 0.456, 0.406, "--std", 0.229, 0.224, 0.225]
    assert build(str(model), str(weights), out, *flags) == 0
    classifier, info = load_model(out)
    manifest = load_manifest(tmp_path / "shards/val")
    right = total = 0
    for batch in eval_batches(manifest, image_size=112, batch_size=16, rank=0, world_size=1, loader_workers=0):
        with torch.no_grad():
            logits = classifier(Normalise(info.mean, info.std)(batch.images)).logits
        right, total = right + (logits.argmax(1) == batch.labels).sum().item(), total + len(batch.labels)
    assert total >= 20 and right / total > 3 / 7  # chance is 1 / 7
