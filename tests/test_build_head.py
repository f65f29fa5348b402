"""tools/build_head.py: open_clip's own zero-shot classifier, in a file that runs and tools take."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

import made
from cfmask.data import imagenet
from cfmask.models.head import load_model, read_info
from cfmask.models.initial import initial_model
from cfmask.models.tower import Normalise
from cfmask.models.zero_shot import openai_templates
from tools import build_head, evaluate
from towers import ODD, TINY, tiny_clip

NAMES = ("striped cat", "jack-o'-lantern", "T-shirt", "café au lait", "a {} of braces")
TEMPLATES = ("a photo of a {}.", "the {0} that is no placeholder, but the {}", "itap of {}!")


def save_clip(folder, clip, config):
    """A folder that open_clip loads by itself, whose files our flags take too: (its name, --model, --pretrained)."""
    folder.mkdir(parents=True, exist_ok=True)
    preprocess = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.25]}
    model = folder / "open_clip_config.json"
    model.write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    weights = folder / "open_clip_model.safetensors"
    save_file(clip.state_dict(), weights)
    return f"local-dir:{folder}", str(model), str(weights)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    clip = tiny_clip()
    with torch.no_grad():
        clip.logit_scale.fill_(3.2)
    return save_clip(folder, clip, TINY.info().config)


def class_file(folder, names=NAMES):
    path = folder / "names.tsv"
    path.write_text("".join(f"n{i:08d}\t{name}\n" for i, name in enumerate(names)))
    return path


def build(tiny, out, *flags):
    return build_head.main(["--model", tiny[1], "--pretrained", tiny[2], "--device", "cpu", "--out", str(out), *flags])


@pytest.mark.parametrize("given", ["80 templates", "a file"])
@pytest.mark.parametrize("kind", ["clip", "custom text"])
def test_logits_are_those_of_open_clips_own_zero_shot_path(tmp_path, tiny, given, kind):
    if kind == "custom text":  # a text tower of its own module, another activation and geometry
        config = {**ODD.info().config, "custom_text": True}
        clip = open_clip.CustomTextCLIP(**{k: v for k, v in config.items() if k != "custom_text"})
        tiny = save_clip(tmp_path / "odd", clip, config)
    templates = openai_templates()
    flags = ["--classes", str(class_file(tmp_path))]
    if given == "a file":
        (tmp_path / "templates.txt").write_text("\n".join(TEMPLATES) + "\n\n")
        flags += ["--templates", str(tmp_path / "templates.txt")]
        templates = TEMPLATES
    out = tmp_path / "new/head.safetensors"
    assert build(tiny, out, *flags) == 0

    clip, _, _ = open_clip.create_model_and_transforms(tiny[0])
    classifier = open_clip.build_zero_shot_classifier(
        clip.eval(),
        open_clip.get_tokenizer(tiny[0]),
        NAMES,
        [lambda name, t=t: t.replace("{}", name) for t in templates],
    )
    model, info = load_model(out)
    images = torch.rand(4, 3, model.image_size, model.image_size)
    with torch.no_grad():
        expected = clip.encode_image(open_clip_normalised(clip, images), normalize=True) @ classifier
        logits = model(Normalise(info.mean, info.std)(images)).logits
        torch.testing.assert_close(logits / clip.logit_scale.exp(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(model.head.bias, torch.zeros(len(NAMES)))
    for name, value in clip.visual.state_dict().items():
        assert torch.equal(model.visual.state_dict()[name], value)
    assert info.class_names == NAMES and info.mean == (0.5, 0.4, 0.3) and info.std == (0.2, 0.3, 0.25)
    assert f"zero-shot head, {len(templates)} templates" in info.provenance
    assert "open_clip_model.safetensors (sha256 " in info.provenance


def open_clip_normalised(clip, images):
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (clip.visual.image_mean, clip.visual.image_std))
    return (images - mean) / std


def test_the_templates_are_open_clips():
    assert len(openai_templates()) == 80
    assert [t.replace("{}", "tench") for t in openai_templates()] == [
        template("tench") for template in open_clip.OPENAI_IMAGENET_TEMPLATES
    ]


def test_imagenets_classes_are_the_default_in_the_order_of_their_ids(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(
        open_clip,
        "build_zero_shot_classifier",
        lambda model, tokenizer, names, templates, *_: torch.zeros(TINY.embed, len(names)),
    )
    out = tmp_path / "imagenet.safetensors"
    assert build(tiny, out) == 0
    info = read_info(out)
    assert info is not None and list(zip(info.classes, info.class_names, strict=True)) == list(imagenet.classes())


def test_a_run_starts_from_it_and_evaluate_accepts_it(tmp_path, tiny, capsys):
    made.draw_images(tmp_path / "images", per_class=16)
    made.convert(tmp_path / "images", tmp_path / "shards")
    out = tmp_path / "head.safetensors"
    assert build(tiny, out, "--classes", str(tmp_path / "shards/train")) == 0
    shards = ["--shards", str(tmp_path / "shards")]
    assert (
        evaluate.main(
            [str(out), *shards, "--sets", "val", "--loader-workers", "0", "--out", str(tmp_path / "evaluated")]
        )
        == 0
    )

    start = ["--model", tiny[1], "--pretrained", out, "--head", out, "--batch-size", 16, "--lanes", 4]
    start += ["--executor", "local", "--tasks-per-node", 1]
    done = made.submit(*start, *shards, "--run", tmp_path / "run", "--dry-run", check=False)
    assert done.returncode == 0, done.stderr
    wnids = read_info(out).classes
    model, _ = initial_model(tiny[1], str(out), str(out), [(wnid, wnid) for wnid in wnids])
    for name, value in load_model(out)[0].state_dict().items():
        assert torch.equal(model.state_dict()[name], value)

    other = tmp_path / "other.safetensors"
    (tmp_path / "names.tsv").write_text("".join(f"{wnid}\tthing\n" for wnid in reversed(wnids)))
    assert build(tiny, other, "--classes", str(tmp_path / "names.tsv")) == 0
    done = made.submit(*start, "--head", other, *shards, "--run", tmp_path / "run", "--dry-run", check=False)
    assert done.returncode == 2 and "another class order" in done.stderr


def test_an_interrupted_build_resumes_and_the_head_is_bitwise_identical(tmp_path, tiny, monkeypatch, capsys):
    classes = ["--classes", str(class_file(tmp_path, [f"thing {i}" for i in range(34)]))]
    own = open_clip.build_zero_shot_classifier
    asked: list[tuple[str, ...]] = []

    def counting(model, tokenizer, names, *rest):
        if len(asked) == stop_after:
            raise KeyboardInterrupt
        asked.append(tuple(names))
        return own(model, tokenizer, names, *rest)

    monkeypatch.setattr(open_clip, "build_zero_shot_classifier", counting)
    stop_after = 99
    whole, out = tmp_path / "whole.safetensors", tmp_path / "head.safetensors"
    assert build(tiny, whole, *classes) == 0
    expected = [*asked]

    asked, stop_after = [], 2
    assert build(tiny, out, *classes) == 130
    assert not out.exists() and (tmp_path / ".head.safetensors.rows").exists()
    stop_after = 99
    assert build(tiny, out, *classes) == 0
    assert asked == expected and not list(tmp_path.glob(".*"))
    for name, value in load_model(whole)[0].state_dict().items():
        assert torch.equal(load_model(out)[0].state_dict()[name], value)
    assert read_info(out) == read_info(whole)

    asked = []
    assert build(tiny, out, *classes) == 0
    assert not asked and "up to date" in capsys.readouterr().out


def test_rows_of_another_head_are_not_used(tmp_path, tiny, monkeypatch):
    out = tmp_path / "head.safetensors"
    kept = tmp_path / ".head.safetensors.rows"
    classes = ["--classes", str(class_file(tmp_path))]

    def interrupt(*_):  # with exec, Python would end the tests' own process by SIGINT
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build_head, "save_model", interrupt)
        assert build(tiny, out, *classes) == 130
    (tmp_path / "templates.txt").write_text("a {}")
    rows = kept.read_bytes()
    assert build(tiny, out, *classes, "--templates", str(tmp_path / "templates.txt")) == 0
    other = load_model(out)[0].head.weight
    assert not kept.exists()
    kept.write_bytes(rows[:-7])  # torn
    assert build(tiny, out, *classes) == 0
    assert not torch.allclose(load_model(out)[0].head.weight, other)


def test_the_head_of_a_checkpoint_is_kept_if_its_classes_are_given(tmp_path, tiny, capsys):
    """As in a uniform soup, a state dict of tower and head."""
    clip = tiny_clip(seed=3)
    visual = {f"module.model.visual.{k}": v for k, v in clip.visual.state_dict().items()}
    head = nn.Linear(TINY.embed, len(NAMES))
    path = tmp_path / "soup.pt"
    torch.save({**visual, **{f"module.classification_head.{k}": v for k, v in head.state_dict().items()}}, path)
    soup = (None, tiny[1], str(path))
    out = tmp_path / "soup.safetensors"
    classes = ["--classes", str(class_file(tmp_path))]
    assert build(soup, out, *classes) == 2
    assert "has a head of 5 classes and does not state which they are" in capsys.readouterr().err
    assert build(soup, out, *classes, "--keep-head") == 0
    model, info = load_model(out)
    assert torch.equal(model.head.weight, head.weight) and torch.equal(model.head.bias, head.bias)
    pixels = torch.randn(2, 3, TINY.image, TINY.image)
    with torch.no_grad():
        expected = head(F.normalize(clip.encode_image(pixels), dim=-1))
        torch.testing.assert_close(model(pixels).logits, expected, rtol=1e-4, atol=1e-5)

    for flags, reason in (
        (["--classes", "imagenet", "--keep-head"], "shape (5, 8) and a bias of shape (5,), the class list has 1000"),
        ([*classes, "--keep-head", "--templates", str(path)], "--templates would do nothing with --keep-head"),
    ):
        assert build(soup, out, *flags) == 2
        assert reason in capsys.readouterr().err
    assert build(tiny, out, *classes, "--keep-head") == 2
    assert "has no head to keep" in capsys.readouterr().err
    assert build((None, tiny[1], str(out)), tmp_path / "again.safetensors", *classes) == 2
    assert "is a cfmask model file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--templates", "{tmp}/none.txt"], "none.txt cannot be read"),
        (["--templates", "{tmp}/bare.txt"], "bare.txt, line 2: a template must have exactly one {}"),
        (["--templates", "{tmp}/empty.txt"], "empty.txt holds no templates"),
        (["--classes", "{tmp}/none.tsv"], "none.tsv cannot be read"),
        (["--classes", "{tmp}"], "no manifest.json"),
        (["--pretrained", "openai"], "Unknown weights 'openai'"),
        (["--model", "ViT-B-32", "--pretrained", "openai"], "Use --model ViT-B-32-quickgelu"),
        (["--model", "ViT-B-32"], "trained with QuickGELU and --model ViT-B-32 computes GELU"),
        (
            ["--model", "ViT-B-16-quickgelu"],
            "Give the model that they were made with: --model {tmp}/clip/open_clip_config.json",
        ),
        (["--model", "RN50-quickgelu", "--pretrained", "{tmp}/tiny.pt"], "its image tower is a ResNet"),
        (["--out", "{tmp}/head.pt"], "has to end in .safetensors"),
    ],
)
def test_invalid_requests_are_refused(tmp_path, tiny, capsys, flags, reason):
    (tmp_path / "bare.txt").write_text("a {}\na photo\n")
    (tmp_path / "empty.txt").write_text("\n")
    torch.save(tiny_clip().state_dict(), tmp_path / "tiny.pt")
    assert build(tiny, tmp_path / "head.safetensors", *(flag.replace("{tmp}", str(tmp_path)) for flag in flags)) == 2
    assert reason.replace("{tmp}/clip", str(Path(tiny[1]).parent)) in capsys.readouterr().err
    assert not list(tmp_path.glob("*.safetensors"))


def test_weights_of_another_architecture_are_refused_with_the_ones_that_they_fit(tmp_path, capsys):
    config = open_clip.get_model_config("ViT-S-32")
    tower = open_clip.model._build_vision_tower(config["embed_dim"], config["vision_cfg"])
    state = {f"visual.{name}": value for name, value in tower.state_dict().items()}
    torch.save(state, tmp_path / "small.pt")
    flags = ["--pretrained", str(tmp_path / "small.pt"), "--out", str(tmp_path / "head.safetensors")]
    assert build_head.main(["--model", "ViT-S-16", *flags]) == 2
    assert "its shapes are those of ViT-S-32, ViT-S-32-alt" in capsys.readouterr().err
    flags += ["--mean", "0.5", "0.5", "0.5", "--std", "0.5", "0.5", "0.5"]
    assert build_head.main(["--model", "ViT-S-32", *flags]) == 2
    assert "image tower only" in capsys.readouterr().err


def with_tokenizer(tmp_path, tiny):
    """The same CLIP, with a tokenizer of Hugging Face that does not exist."""
    config = json.loads(open(tiny[1]).read())
    config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "nobody/none"
    (tmp_path / "hf.json").write_text(json.dumps(config))
    return None, str(tmp_path / "hf.json"), str(shutil.copy(tiny[2], tmp_path / "bare.bin"))


def test_a_tokenizer_that_cannot_be_downloaded_is_named(tmp_path, tiny, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # no waiting for a network
    given = with_tokenizer(tmp_path, tiny)
    assert build(given, tmp_path / "head.safetensors", "--classes", str(class_file(tmp_path))) == 2
    said = capsys.readouterr().err
    assert "needs the tokenizer nobody/none of Hugging Face, which is not available" in said and "the network" in said
    assert not list(tmp_path.glob("*.safetensors")) and not list(tmp_path.glob(".*"))


def test_a_tokenizer_without_transformers_says_what_to_install(tmp_path, tiny, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)  # an import of it fails
    given = with_tokenizer(tmp_path, tiny)
    assert build(given, tmp_path / "head.safetensors", "--classes", str(class_file(tmp_path))) == 2
    assert "`pip install transformers`" in capsys.readouterr().err
