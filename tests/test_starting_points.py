"""Runs that start from checkpoints of other programs: model soups, WiSE-FT and FLYP."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

import made
from cfmask.models.head import load_model
from cfmask.recipe import Data, Method, Model, Optim, Recipe, Run
from tools import build_head
from towers import TINY, tiny_clip


@pytest.fixture(scope="module")
def materials(tmp_path_factory) -> Path:
    root = made.make_materials(tmp_path_factory.mktemp("materials"))
    (root / "names.tsv").write_text("".join(f"{wnid}\tthing {i}\n" for i, wnid in enumerate(made.CLASSES)))
    return root


def under(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}": value for name, value in state.items()}


def released(kind: str, clip: nn.Module, head: nn.Linear) -> dict[str, torch.Tensor]:
    """A state dict of tower and head, with the remains of a text tower."""
    whole = clip.state_dict()
    without_text = {name: value for name, value in whole.items() if not name.startswith("transformer.")}
    return {
        "model soups": {**under("model.", without_text), **under("classification_head.", head.state_dict())},
        "model soups, of DataParallel": {
            **under("module.model.", without_text),
            **under("module.classification_head.", head.state_dict()),
        },
        "WiSE-FT": {**under("image_encoder.model.", whole), **under("classification_head.", head.state_dict())},
        "FLYP": under("module.model.", whole),
    }[kind]


@pytest.mark.parametrize("kind", ["model soups", "model soups, of DataParallel", "WiSE-FT", "FLYP"])
def test_a_run_starts_from_a_checkpoint_of_another_program(materials, tmp_path, kind):
    clip, head = tiny_clip(seed=7).eval(), nn.Linear(TINY.embed, len(made.CLASSES))
    torch.save(released(kind, clip, head), tmp_path / "released.pt")
    model, start = materials / "clip.json", tmp_path / "start.safetensors"
    model.write_text(TINY.config())
    keep = ["--keep-head"] if kind != "FLYP" else []  # FLYP tunes both towers: its head is what its text tower makes
    flags = ["--model", model, "--pretrained", tmp_path / "released.pt", "--classes", materials / "names.tsv"]
    assert build_head.main([*map(str, flags), *keep, "--device", "cpu", "--out", str(start)]) == 0

    run = made.train(
        Recipe(
            model=Model(name=str(model), pretrained=str(start)),
            method=Method(mask="object", fill="single-fill"),
            data=Data(shards=str(materials / "shards"), loader_workers=0),
            optim=Optim(epochs=1, batch_size=16, lanes=4, lr=1e-3, warmup_steps=2),
            run=Run(precision="fp32"),
        ).resolved(),
        tmp_path / "run",
    )
    begun, _ = load_model(run.initial)
    visual = clip.visual.state_dict()
    assert all(torch.equal(value, visual[name]) for name, value in begun.visual.state_dict().items())
    if keep:
        pixels = torch.randn(2, 3, TINY.image, TINY.image)
        with torch.no_grad():
            theirs = head(F.normalize(clip.encode_image(pixels), dim=-1))
            torch.testing.assert_close(begun(pixels).logits, theirs, rtol=1e-4, atol=1e-5)
    ended = load_file(run.final)
    assert not torch.equal(ended["visual.conv1.weight"], visual["conv1.weight"]), "it was trained"
    assert json.loads(run.results.read_text())["step"] == 6
