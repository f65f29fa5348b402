"""docs/notebook.md runs as it stands, and ``import cfmask`` is instant."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys

import pytest
import torch

import cfmask
import made
from cfmask.api import Counterfactuals, Model
from cfmask.errors import UserError
from cfmask.masking.fills import fill
from cfmask.report.results import read_results
from tools import evaluate

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def materials(tmp_path_factory):
    return made.make_materials(tmp_path_factory.mktemp("notebook"), per_class=8)


def test_the_page_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tools").symlink_to(made.REPO / "tools")
    blocks = BLOCK.findall((made.REPO / "docs/notebook.md").read_text())
    assert {language for language, _ in blocks} == {"python", "sh"}
    namespace: dict = {}
    for language, text in blocks:
        if language == "python":
            exec(compile(text, "docs/notebook.md", "exec"), namespace)
            continue
        for line in text.splitlines():
            program, *words = shlex.split(line)
            assert program == "python"
            subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
    printed = capsys.readouterr().out
    assert "24 images of ['blue', 'green', 'red']" in printed and "of 24" in printed


def test_the_page_names_what_the_package_exports():
    page = (made.REPO / "docs/notebook.md").read_text()
    named = set(re.findall(r"^\| `(\w+)\(", page, re.MULTILINE))
    assert named == set(cfmask.__all__) - {"Model"}
    assert set(cfmask.__all__) <= set(dir(cfmask)) and all(getattr(cfmask, name).__doc__ for name in cfmask.__all__)
    with pytest.raises(AttributeError, match="module 'cfmask' has no attribute 'nothing'"):
        cfmask.nothing  # noqa: B018


def test_import_loads_no_torch():
    code = "import sys, cfmask; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=made.REPO, capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"


def test_evaluate_gives_what_the_command_gives(materials, tmp_path):
    path = materials / "tiny.safetensors"
    flags = ["--shards", str(materials / "shards"), "--sets", "val", "--loader-workers", "0"]
    assert evaluate.main([str(path), *flags, "--batch-size", "7", "--out", str(tmp_path / "out")]) == 0
    [expected] = read_results(tmp_path / "out").models
    val = cfmask.load_set(materials / "shards/val")
    found = cfmask.evaluate(cfmask.load_model(path), val, batch_size=7, loader_workers=0)
    assert (found.correct, found.total, found.per_class) == (
        expected.sets["val"].correct,
        24,
        expected.sets["val"].per_class,
    )


@pytest.mark.parametrize("mask", ["object", "context", "random"])
@pytest.mark.parametrize("filled", ["no-fill", "single-fill", "multi-fill"])
def test_counterfactuals_replace_masked_patches_alone(materials, mask, filled):
    model = cfmask.load_model(materials / "tiny.safetensors")
    batch = next(cfmask.batches(cfmask.load_set(materials / "shards/val"), image_size=model.image_size, batch_size=5))
    method = cfmask.Method(mask=mask, fill=filled)
    made_of: Counterfactuals = cfmask.counterfactuals(model, batch.images, batch.labels, method, seed=3)
    assert made_of.images.dtype == torch.uint8 and (made_of.cam is None) == (mask == "random")
    if filled == "no-fill":
        assert made_of.donors is None and torch.equal(made_of.images, batch.images)
    else:
        assert made_of.donors is not None
        patch_size = model.classifier.patch_size
        assert torch.equal(made_of.images, fill(batch.images, made_of.mask, made_of.donors, patch_size))
    again = cfmask.counterfactuals(model, batch.images, batch.labels, method, seed=3)
    assert torch.equal(again.images, made_of.images) and torch.equal(again.mask, made_of.mask)
    assert all(parameter.grad is None for parameter in model.classifier.parameters())


def test_what_contradicts_itself_is_refused(materials, tmp_path):
    tiny, image = materials / "tiny.safetensors", tmp_path / "image.jpg"
    model: Model = cfmask.load_model(tiny)
    image.write_bytes(b"no image")
    images = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    for call, words in (
        (lambda: cfmask.load_model(tmp_path / "nowhere"), "neither a model file nor a run"),
        (lambda: cfmask.load_model(tiny, classes=[("a", "a")]), "would do nothing: the model file"),
        (lambda: cfmask.load_model("ViT-B-32", pretrained="openai"), "needs class names"),
        (lambda: model.preprocess(image), "image.jpg cannot be used"),
        (lambda: cfmask.counterfactuals(model, images, method=cfmask.Method(name="vanilla")), "masks no images"),
    ):
        with pytest.raises(UserError, match=words):
            call()
