"""tools/export.py: open_clip and onnxruntime compute from an export what cfmask computes."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from cfmask.data.images import crop
from cfmask.errors import UserError
from cfmask.models import export as exporting
from cfmask.models.head import build_tower, load_model, read_info, save_model
from cfmask.models.initial import describe
from cfmask.models.preprocessing import OPENAI_MEAN, OPENAI_STD
from cfmask.models.tower import Normalise
from cfmask.runtime.files import written_aside
from made import CLASSES, REPO
from tools import build_head, export
from towers import MEAN, ODD, STD, TINY, tiny_clip

WANT = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
needs_onnx = pytest.mark.skipif(bool(WANT), reason=f"not installed: {' '.join(WANT)} (tests/requirements.txt)")


@pytest.fixture
def tuned(tmp_path):
    """A fine-tuned model, its path, and the CLIP that it was fine-tuned from, also as clip.safetensors."""
    (tmp_path / "tiny.json").write_text(json.dumps(TINY.info().config))
    clip = tiny_clip().eval()
    save_file(clip.state_dict(), tmp_path / "clip.safetensors")
    model = TINY.classifier(seed=5, classes=len(CLASSES))
    info = dataclasses.replace(
        TINY.info(), name=str(tmp_path / "tiny.json"), classes=CLASSES, class_names=("cat", "dog", "bird")
    )
    save_model(tmp_path / "tuned.safetensors", model, info)
    return model.eval(), tmp_path / "tuned.safetensors", clip


def run(model: Path, kind: str, out: Path, *flags: object) -> int:
    return export.main([str(model), "--format", kind, "--out", str(out), *map(str, flags)])


def of(path: Path) -> tuple[str, Path]:
    return "--pretrained", path.with_name("clip.safetensors")


@pytest.fixture
def registered(monkeypatch):
    """open_clip's list of models, whose additions end with the test."""
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", [*open_clip.factory._MODEL_CONFIG_PATHS])
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", {**open_clip.factory._MODEL_CONFIGS})


def plain_tower(model):
    """open_clip's own, with the model's weights."""
    tower = build_tower(TINY.info())
    tower.load_state_dict(model.visual.state_dict())
    return tower.eval()


def pasted(printed: str) -> dict[str, Any]:
    """What the printed lines define."""
    found: dict[str, Any] = {}
    exec(printed.partition("To load it:\n")[2], found)
    return found


@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
def test_the_printed_lines_load_the_checkpoint_and_its_preprocessing(tuned, tmp_path, registered, ending, capsys):
    model, path, clip = tuned
    out = tmp_path / f"it's new/ViT-B-32{ending}"  # a name that open_clip has a model of
    assert run(path, "open-clip", out, *of(path)) == 0
    assert "ViT-B-32.open_clip" not in open_clip.list_models()
    path.with_suffix(".json").unlink(missing_ok=True)
    (tmp_path / "tiny.json").unlink()  # the export is whole without the files that it was made of
    found = pasted(capsys.readouterr().out)
    loaded = found["model"].eval()
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (61, 40, 3), dtype=np.uint8))
    pixels = found["preprocess"](image)[None]
    ours = Normalise(MEAN, STD)(crop(torch.from_numpy(np.array(image)).permute(2, 0, 1), TINY.image))[None]
    assert (pixels - ours).abs().max() < 2.01 / 255 / min(STD)
    texts = open_clip.SimpleTokenizer(context_length=16)(["a cat", "two dogs"])
    with torch.no_grad():
        assert torch.equal(loaded.encode_image(pixels), plain_tower(model)(pixels))
        torch.testing.assert_close(loaded.encode_image(pixels), model.encode(pixels), rtol=1e-5, atol=1e-5)
        assert torch.equal(loaded.encode_text(texts), clip.encode_text(texts))
    assert torch.equal(loaded.logit_scale, clip.logit_scale)
    written = {out.name, "ViT-B-32.open_clip.json"}
    assert {entry.name for entry in out.parent.iterdir()} == written, "nothing is left aside"

    # It is a start again, and what it was trained with is in the file.
    (tmp_path / "again.json").write_text(json.dumps(TINY.info().config))
    info = describe(str(tmp_path / "again.json"), str(out)).info
    assert (info.mean, info.std) == (MEAN, STD)
    with pytest.raises(UserError, match="contradict each other"):
        describe(str(tmp_path / "again.json"), str(out), mean=[0.5] * 3, std=[0.5] * 3)


def test_a_known_model_of_open_clip_needs_no_configuration_file(tmp_path, registered):
    (tmp_path / "ViT-B-32-quickgelu.json").write_text("{}")
    config = open_clip.get_model_config("ViT-B-32-quickgelu")
    info = dataclasses.replace(TINY.info(), name=str(tmp_path / "ViT-B-32-quickgelu.json"), config=config)
    told = exporting.how_to_create(info, tmp_path / "a.pt").splitlines()[-1]
    assert "(model_name='ViT-B-32-quickgelu', pretrained=" in told and f"image_mean={MEAN}, image_std={STD})" in told
    plain = dataclasses.replace(info, mean=OPENAI_MEAN, std=OPENAI_STD)
    assert "image_mean" not in exporting.how_to_create(plain, tmp_path / "a.pt")


def test_a_hub_folder_loads_with_its_preprocessing_and_can_be_fine_tuned(tuned, tmp_path, capsys):
    model, path, clip = tuned
    folder = tmp_path / "hub/robust"
    assert run(path, "hub", folder, *of(path)) == 0
    loaded, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    pixels = torch.randn(3, 3, TINY.image, TINY.image)
    with torch.no_grad():
        assert torch.equal(loaded.eval().encode_image(pixels), plain_tower(model)(pixels))
    normalise = preprocess.transforms[-1]
    assert (tuple(normalise.mean), tuple(normalise.std)) == (TINY.info().mean, TINY.info().std)
    assert open_clip.get_tokenizer(f"local-dir:{folder}")("a cat").shape == (1, 16)

    with safe_open(folder / "classifier.safetensors", "pt") as file:
        assert json.loads(file.metadata()["classes"]) == list(CLASSES)
        assert json.loads(file.metadata()["class_names"]) == ["cat", "dog", "bird"]
    head = load_file(folder / "classifier.safetensors")
    with torch.no_grad():
        logits = F.linear(F.normalize(loaded.encode_image(pixels), dim=-1), head["weight"], head["bias"])
        torch.testing.assert_close(logits, model(pixels).logits, rtol=1e-4, atol=1e-4)
    assert "random weights" in (folder / "README.md").read_text()

    again = tmp_path / "again.safetensors"
    flags = ["--model", f"{folder}/open_clip_config.json", "--pretrained", f"{folder}/open_clip_model.safetensors"]
    (tmp_path / "names.tsv").write_text("".join(f"{wnid}\tthing\n" for wnid in CLASSES))
    assert build_head.main([*flags, "--classes", str(tmp_path / "names.tsv"), "--out", str(again)]) == 0
    for name, value in load_model(again)[0].visual.state_dict().items():
        assert torch.equal(value, model.visual.state_dict()[name])
    assert read_info(again).mean == TINY.info().mean

    assert run(path, "hub", folder, *of(path)) == 2
    assert "exists already" in capsys.readouterr().err


@needs_onnx
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("large", [False, True])
def test_onnxruntime_gives_equal_features_and_logits_for_any_batch(tuned, tmp_path, monkeypatch, large):
    import onnx
    import onnxruntime

    model, path, _ = tuned
    if large:
        monkeypatch.setattr(exporting, "_ONNX_BYTES", 1000)
    out = tmp_path / "new/robust.onnx"
    assert run(path, "onnx", out) == 0
    written = {out.name, f"{out.name}.data"} if large else {out.name}
    assert {entry.name for entry in out.parent.iterdir()} == written
    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    info = TINY.info()
    for batch in (1, 2, 7):
        pixels = torch.rand(batch, 3, TINY.image, TINY.image)
        features, logits = session.run(["features", "logits"], {"pixels": pixels.numpy()})
        with torch.no_grad():
            seen = model(Normalise(info.mean, info.std)(pixels))
        torch.testing.assert_close(torch.from_numpy(features), seen.features, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.from_numpy(logits), seen.logits, rtol=1e-5, atol=1e-4)
    [told] = onnx.load(out, load_external_data=False).metadata_props
    assert told.key == "cfmask" and json.loads(told.value)["classes"] == list(CLASSES)


@needs_onnx
def test_a_wrong_onnx_export_is_removed(tuned, tmp_path, monkeypatch):
    import onnxruntime

    class Wrong(onnxruntime.InferenceSession):
        def run(self, *arguments):
            return [value + 0.1 for value in super().run(*arguments)]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Wrong)
    with pytest.raises(RuntimeError, match="onnxruntime computes other features"):
        run(tuned[1], "onnx", tmp_path / "new/robust.onnx")
    assert not list((tmp_path / "new").iterdir())


def test_a_wrong_checkpoint_export_is_removed(tuned, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "whole_clip", lambda *_: tiny_clip(seed=9).state_dict())
    for kind, name in (("open-clip", "robust.pt"), ("hub", "robust")):
        with pytest.raises(RuntimeError, match="open_clip computes other features"):
            run(tuned[1], kind, tmp_path / "new" / name, *of(tuned[1]))
    assert not list((tmp_path / "new").iterdir())


def test_files_of_a_killed_export_are_removed_by_the_next(tuned, tmp_path):
    """Nothing can be cleared up by a process that SIGKILL ends while it writes."""
    out = tmp_path / "new/robust.pt"
    code = f"""
import os, signal, sys, torch
from tools import export
def save(state, path):
    open(path, "wb").write(b"torn")
    os.kill(os.getpid(), signal.SIGKILL)
torch.save = save
export.main({["tuned.safetensors", "--format", "open-clip", *map(str, of(tuned[1])), "--out", str(out)]!r})
"""
    command = [sys.executable, "-c", code.replace("'tuned.", f"'{tmp_path}/tuned.")]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr
    [left] = out.parent.iterdir()
    assert (left / out.name).read_bytes() == b"torn"
    assert run(tuned[1], "open-clip", out, *of(tuned[1])) == 0
    assert {entry.name for entry in out.parent.iterdir()} == {out.name, "robust.open_clip.json"}
    open_clip.load_checkpoint(tiny_clip(), str(out))


def test_two_exports_cannot_write_the_same_file(tuned, tmp_path, capsys):
    out = tmp_path / "new/robust.pt"
    with written_aside(out):
        assert run(tuned[1], "open-clip", out, *of(tuned[1])) == 2
    assert "Another process is writing" in capsys.readouterr().err
    assert not list(out.parent.iterdir())


def test_missing_packages_are_named(tuned, tmp_path, monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name.startswith("onnx") else found(name))
    assert run(tuned[1], "onnx", tmp_path / "robust.onnx") == 2
    assert "pip install onnx onnxscript onnxruntime" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "name", "flags", "reason"),
    [
        ("open-clip", "a.pt", [], "needs --pretrained"),
        ("open-clip", "a.onnx", ["--pretrained", "clip.safetensors"], "has to end in .safetensors or .pt"),
        ("onnx", "a.onnx", ["--pretrained", "clip.safetensors"], "--pretrained would do nothing"),
        ("hub", "a", ["--pretrained", "tuned.safetensors"], "is a cfmask model file, which has no text tower"),
        ("hub", "a", ["--pretrained", "tower.pt"], "they have no text tower"),
        ("open-clip", "a.pt", ["--pretrained", "odd.pt"], "are not those of the CLIP"),
        ("open-clip", "a.pt", ["--pretrained", "openai"], "Unknown weights 'openai': neither a tag"),
        ("open-clip", "a.pt", ["--pretrained", "none.pt"], "no such file"),
    ],
)
def test_invalid_requests_are_refused(tuned, tmp_path, monkeypatch, capsys, kind, name, flags, reason):
    _, path, clip = tuned
    torch.save(clip.visual.state_dict(), tmp_path / "tower.pt")
    torch.save(tiny_clip(ODD).state_dict(), tmp_path / "odd.pt")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    assert run(path, kind, Path(name), *flags) == 2
    assert reason in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_a_text_tower_that_was_trained_with_the_other_activation_is_refused(tuned, tmp_path, capsys):
    """Of OpenAI's state dicts it is known."""
    _, _, clip = tuned
    markers = {name: torch.tensor(7) for name in ("input_resolution", "context_length", "vocab_size")}
    torch.save({**clip.state_dict(), **markers}, tmp_path / "openai.pt")
    info = dataclasses.replace(ODD.info(), classes=CLASSES)
    save_model(tmp_path / "gelu.safetensors", ODD.classifier(classes=len(CLASSES)), info)
    assert run(tmp_path / "gelu.safetensors", "hub", tmp_path / "a", "--pretrained", tmp_path / "openai.pt") == 2
    assert "trained with QuickGELU" in capsys.readouterr().err
