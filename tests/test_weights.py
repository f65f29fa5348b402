"""Checkpoints of other programs: names become open_clip's, and no pickle can run code."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import zipfile

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from cfmask.errors import UserError
from cfmask.models.initial import describe
from cfmask.models.weights import find_weights, in_open_clips_names, read_weights
from towers import MEAN, TINY, tiny_clip

# Making such archives is deprecated; there are those that were made. And torch wonders about WiSE-FT's pickles.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:Detected pickle protocol 4"),
]


@pytest.fixture(scope="module")
def clip():
    return tiny_clip().eval()


def wrapped(state, prefix, **more):
    return {**{f"{prefix}{name}": value for name, value in state.items()}, **more}


def renamed(state, part, by):
    return {name.replace(part, by): value for name, value in state.items()}


def same(state, expected):
    return state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in expected)


# --- names ----------------------------------------------------------------------------------------------------------

WORD = st.text("abcdefghijklmnopqrstuvwxyz_0123456789", min_size=1, max_size=8)
NAMES = ("visual.conv1.weight", "visual.proj", "transformer.resblocks.0.ln_1.weight", "logit_scale")


@given(st.lists(WORD, max_size=4), st.data())
def test_names_of_a_wrapped_clip_become_open_clips(parts, data):
    tensors = {name: torch.tensor(float(i)) for i, name in enumerate(NAMES)}
    prefix = "".join(f"{part}." for part in parts)
    depth = data.draw(st.integers(0, len(parts)))
    outer = "".join(f"{part}." for part in parts[:depth])
    around = {f"{outer}classification_head.weight": torch.ones(3, 2), "epoch": torch.tensor(3)}
    found = in_open_clips_names(wrapped(tensors, prefix, **around))
    kept = {name: value for name, value in found.state.items() if name != "epoch"}
    assert same(kept, tensors)
    assert found.head is not None and torch.equal(found.head[0], torch.ones(3, 2))
    assert torch.equal(found.head[1], torch.zeros(3)), "a head without a bias has none"
    assert found.quick_gelu is None


@pytest.mark.parametrize(
    "kind",
    [
        *("plain", "ddp", "wise-ft", "flyp", "soup", "lightning", "tower", "safetensors", "old"),
        *("compiled", "compiled tower", "compiled blocks", "ddp in compile", "ddp tower"),
    ],
)
def test_checkpoints_of_common_programs_are_read(clip, tmp_path, kind):
    state = clip.state_dict()
    visual = {name: value for name, value in state.items() if name.startswith("visual.")}
    weight, bias = torch.randn(5, TINY.embed), torch.randn(5)
    head = {"classification_head.weight": weight, "classification_head.bias": bias}
    path = tmp_path / "checkpoint.pt"
    saved = {
        "plain": state,
        "ddp": {"state_dict": wrapped(state, "module."), "epoch": 3, "optimizer": {"state": {0: {"exp_avg": bias}}}},
        "wise-ft": wrapped(state, "image_encoder.model.", **head),
        "flyp": wrapped(state, "module.model."),
        "soup": wrapped(visual, "model.", **head),
        "lightning": {"state_dict": wrapped(state, "net.clip."), "hyper_parameters": {"lr": 1e-3}, "loops": [1, "x"]},
        "tower": {name.removeprefix("visual."): value for name, value in visual.items()},
        "compiled": wrapped(state, "_orig_mod."),
        "compiled tower": renamed(state, "visual.", "visual._orig_mod."),
        "compiled blocks": renamed(state, "resblocks.1.", "resblocks.1._orig_mod."),
        "ddp in compile": renamed(wrapped(state, "_orig_mod.module."), "visual.", "visual._fsdp_wrapped_module."),
        "ddp tower": renamed(state, "visual.", "visual.module."),
    }
    if kind == "safetensors":  # with any extension
        save_file(state, path)
    else:
        torch.save(saved.get(kind, state), path, _use_new_zipfile_serialization=kind != "old")
    found, shapes = read_weights(path), read_weights(path, shapes_only=True)
    assert same(found.state, visual if kind in ("soup", "tower") else state)
    assert shapes.state.keys() == found.state.keys() and all(value.is_meta for value in shapes.state.values())
    assert all(value.shape == shapes.state[name].shape for name, value in found.state.items())
    assert (found.head is not None) == (kind in ("wise-ft", "soup"))
    if found.head is not None:
        assert torch.equal(found.head[0], weight) and torch.equal(found.head[1], bias)


def test_openais_state_dicts_are_known_by_their_extra_entries(clip, tmp_path):
    markers = {name: torch.tensor(7) for name in ("input_resolution", "context_length", "vocab_size")}
    torch.save({**clip.state_dict(), **markers}, tmp_path / "openai.pt")
    found = read_weights(tmp_path / "openai.pt")
    assert found.quick_gelu and found.openai and same(found.state, clip.state_dict())


def test_ambiguous_checkpoints_are_refused(clip):
    state = clip.state_dict()
    with pytest.raises(UserError, match="holds 2 image towers, under 'ema.' and 'model.'"):
        in_open_clips_names({**wrapped(state, "model."), **wrapped(state, "ema.")})
    heads = {"head.weight": torch.ones(2, 8), "model.classification_head.weight": torch.ones(2, 8)}
    with pytest.raises(UserError, match="holds 2 heads, head and model.classification_head"):
        in_open_clips_names({**wrapped(state, "model."), **heads})
    with pytest.raises(UserError, match="holds visual.proj twice, as visual.proj and visual._orig_mod.proj"):
        in_open_clips_names({**state, "visual._orig_mod.proj": state["visual.proj"]})
    with pytest.raises(UserError, match="names of Hugging Face's transformers"):
        in_open_clips_names({"vision_model.encoder.layers.0.layer_norm1.weight": torch.ones(2)})
    with pytest.raises(UserError, match="its image tower is timm's"):
        in_open_clips_names({"visual.trunk.blocks.0.norm1.weight": torch.ones(2)})
    with pytest.raises(UserError, match="no visual.conv1.weight among its 1 tensors.*fc.weight"):
        in_open_clips_names({"fc.weight": torch.ones(2)})


# --- TorchScript ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["scripted", "traced"])
def test_an_archive_of_a_whole_clip_is_read_without_its_code(tmp_path, clip, how):
    path = tmp_path / "archive.pt"
    if how == "scripted":
        module = torch.jit.script(clip)
    else:  # in half precision, as OpenAI's
        inputs = (torch.randn(2, 3, TINY.image, TINY.image).half(), torch.zeros(2, 16, dtype=torch.long))
        module = torch.jit.trace(tiny_clip().half().eval(), inputs, strict=False, check_trace=False)
    torch.jit.save(module, path)
    found = read_weights(path)
    assert found.quick_gelu and not found.openai and found.state.keys() >= clip.state_dict().keys()
    assert same(found.state, torch.jit.load(path).state_dict())


def test_an_archive_whose_pickle_calls_something_is_refused(tmp_path):
    path, target = tmp_path / "evil.pt", tmp_path / "owned"
    argument = f"touch {target}".encode()
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("evil/constants.pkl", pickle.dumps(()))
        file.writestr("evil/data.pkl", b"\x80\x02cposix\nsystem\n\x8c%c%s\x85R." % (len(argument), argument))
    with pytest.raises(UserError, match="cannot be read as a checkpoint.*names posix.system"):
        read_weights(path)
    assert not target.exists()


# --- refused --------------------------------------------------------------------------------------------------------


class Whole(nn.Module):
    """A class that unpickles by running its code."""

    ran = False

    def __setstate__(self, state):
        type(self).ran = True
        super().__setstate__(state)


@pytest.mark.parametrize("how", ["torch.save", "torch.save, old", "pickle.dump", "beside"])
def test_a_pickled_module_is_refused_with_instructions_to_make_a_state_dict(tmp_path, how):
    path = tmp_path / "model.pt"
    if how == "pickle.dump":  # as WiSE-FT does
        path.write_bytes(pickle.dumps(Whole()))
    else:
        value = {"state_dict": {}, "model": Whole()} if how == "beside" else Whole()
        torch.save(value, path, _use_new_zipfile_serialization="old" not in how)
    with pytest.raises(UserError, match=r"torch.save\(model.state_dict\(\), 'state.pt'\)") as refused:
        read_weights(path)
    assert "pickle" in str(refused.value) and not Whole.ran
    if how != "pickle.dump":
        assert "Whole" in str(refused.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "begins with b''"),
        (b"<!DOCTYPE html><html>404</html>", "a download that failed"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        (b"\x10\x00\x00\x00\x00\x00\x00\x00{garbage garbage", "is not a whole safetensors file"),
        (b"\x80\x02garbage", "cannot be read"),
    ],
)
def test_a_file_that_is_not_a_checkpoint_is_refused(tmp_path, content, reason):
    path = tmp_path / "ViT-B-32.pt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=reason):
        read_weights(path)


@pytest.mark.parametrize("kind", ["safetensors", "zip", "torchscript"])
def test_a_truncated_file_is_refused(clip, tmp_path, kind):
    path = tmp_path / "torn.pt"
    if kind == "safetensors":
        save_file(clip.state_dict(), path)
    elif kind == "zip":
        torch.save(clip.state_dict(), path)
    else:
        torch.jit.save(torch.jit.script(nn.Linear(3, 2)), path)
    os.truncate(path, path.stat().st_size * 2 // 3)
    with pytest.raises(UserError, match="torn.pt"):
        read_weights(path)


@pytest.mark.parametrize("quick", [True, False])
def test_the_activation_is_read_from_the_code_of_an_archive(tmp_path, quick):
    path = tmp_path / "ViT-B-32.pt"
    torch.jit.save(torch.jit.script(tiny_clip(dataclasses.replace(TINY, quick=quick)).eval()), path)
    shapes = read_weights(path, shapes_only=True)
    assert shapes.quick_gelu is quick and not shapes.openai and shapes.state["visual.proj"].is_meta
    (tmp_path / "right.json").write_text(TINY.config(quick_gelu=quick))
    (tmp_path / "wrong.json").write_text(TINY.config(quick_gelu=not quick))
    assert describe(str(tmp_path / "right.json"), str(path)).info.mean == MEAN
    with pytest.raises(UserError, match=f'Use --model a configuration .* "quick_gelu": {json.dumps(quick)}'):
        describe(str(tmp_path / "wrong.json"), str(path))


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="is a folder. Give the file"):
        find_weights("ViT-B-32", str(tmp_path))
