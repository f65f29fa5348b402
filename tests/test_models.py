"""Towers and heads: conversion from and to plain open_clip, and errors for weights that are not available."""

from __future__ import annotations

import copy
import dataclasses
import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch import nn

from cfmask.data.images import crop, decode
from cfmask.errors import UserError
from cfmask.models import preprocessing, tower
from cfmask.models.architecture import read_config
from cfmask.models.export import _registry
from cfmask.models.head import (
    build_tower,
    check_head,
    load_model,
    read_info,
    save_model,
)
from cfmask.models.initial import initial_model, model_info
from cfmask.models.tower import Classifier, Compiled, Normalise, encode, replace_attention
from cfmask.models.weights import find_weights
from cfmask.runtime.downloads import why_unreachable
from cfmask.runtime.tensor_files import save_tensors
from made import CLASSES, REPO, save_tiny_model
from towers import B32, ODD, TINY, tiny_clip

NAMED = [(wnid, f"thing {i}") for i, wnid in enumerate(CLASSES)]


@pytest.mark.parametrize("geometry", [B32, ODD], ids=["B/32-like", "odd"])
def test_a_tower_with_replaced_attention_computes_what_open_clip_computes(geometry):
    plain = build_tower(geometry.info())
    pixels = torch.randn(3, 3, geometry.image, geometry.image)
    with torch.no_grad():
        expected = plain(pixels)
        ours = replace_attention(copy.deepcopy(plain))
        torch.testing.assert_close(encode(ours, pixels), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours(pixels), expected, rtol=1e-5, atol=1e-5)


def test_layer_scale_and_a_missing_ln_pre_are_honoured():
    """As in DINOv2's towers."""
    info = ODD.info()
    config = {**info.config, "vision_cfg": {**info.config["vision_cfg"], "ls_init_value": 0.3, "no_ln_pre": True}}
    plain = build_tower(dataclasses.replace(info, config=config))
    pixels = torch.randn(3, 3, ODD.image, ODD.image)
    with torch.no_grad():
        expected = plain(pixels)
        torch.testing.assert_close(encode(replace_attention(plain), pixels), expected, rtol=1e-5, atol=1e-5)


def test_compiled_blocks_equal_uncompiled_ones(monkeypatch):
    monkeypatch.setattr(tower, "_run_compiled", Compiled(tower._run_block, backend="aot_eager"))
    model = B32.classifier()
    pixels = torch.randn(3, 3, B32.image, B32.image)
    hidden = torch.rand(3, B32.patches) < 0.5
    results = []
    for model.compiled in (False, True):
        features = model.encode(pixels, hidden=hidden)
        features.square().sum().backward()
        results.append([features.detach(), *(p.grad.clone() for p in model.visual.parameters())])
        model.zero_grad()
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-4 * plain.abs().max().item())


def test_if_compilation_fails_blocks_run_uncompiled_with_one_warning(monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(tower, "_run_compiled", Compiled(tower._run_block, backend=broken))
    model = TINY.classifier()
    pixels = torch.randn(3, 3, TINY.image, TINY.image)
    expected = model.encode(pixels)
    model.compiled = True
    with pytest.warns(UserWarning, match="no compiler here.*uncompiled") as said:
        for _ in range(2):
            assert torch.equal(model.encode(pixels), expected)
    assert len([w for w in said if "torch.compile" in str(w.message)]) == 1


def test_state_dicts_are_those_of_plain_open_clip():
    clip = tiny_clip()
    before = {k: v.clone() for k, v in clip.visual.state_dict().items()}
    model = Classifier(copy.deepcopy(clip.visual), nn.Linear(TINY.embed, 3))
    after = {k.removeprefix("visual."): v for k, v in model.state_dict().items() if k.startswith("visual.")}
    assert list(after) == list(before)
    fresh = tiny_clip(seed=1)
    fresh.visual.load_state_dict(after, strict=True)
    pixels = torch.randn(2, 3, TINY.image, TINY.image)
    torch.testing.assert_close(fresh.encode_image(pixels), clip.encode_image(pixels))


def test_towers_without_a_class_token_row_are_refused():
    info = TINY.info()
    pooled = dict(info.config["vision_cfg"], pool_type="avg")
    with pytest.raises(UserError, match="class token"):
        replace_attention(build_tower(dataclasses.replace(info, config={**info.config, "vision_cfg": pooled})))
    with pytest.raises(UserError, match="Conv2d"):
        replace_attention(nn.Conv2d(3, 3, 1))


def test_a_model_file_keeps_weights_and_metadata(tmp_path):
    path = save_tiny_model(tmp_path / "m.safetensors")
    model, info = load_model(path)
    assert info == read_info(path) and info.classes == CLASSES
    again = tmp_path / "again.safetensors"
    save_model(again, model, info)
    assert read_info(again) == info
    for name, value in load_model(again)[0].state_dict().items():
        assert torch.equal(value, model.state_dict()[name])
    assert not list(tmp_path.glob(".*")), "nothing is left aside"
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode, "as readable as any other file"


def test_a_model_file_that_does_not_match_its_header_is_refused(tmp_path):
    path = save_tiny_model(tmp_path / "m.safetensors")
    model, info = load_model(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    with pytest.raises(UserError, match="m.safetensors is not a whole safetensors file"):
        load_model(path)
    for other in (
        dataclasses.replace(info, classes=CLASSES[:2]),
        dataclasses.replace(info, config=B32.info().config),
        dataclasses.replace(info, config={**info.config, "vision_cfg": {**info.config["vision_cfg"], "layers": 1}}),
    ):
        save_tensors(path, model.state_dict(), other.to_metadata())
        with pytest.raises(UserError, match="m.safetensors do not match its header"):
            load_model(path)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_whole_clip_checkpoint_gives_tower_and_zero_shot_head(tmp_path, suffix):
    clip = tiny_clip()
    config = tmp_path / "tiny.json"
    config.write_text(TINY.config())
    path = tmp_path / f"clip{suffix}"
    if suffix == ".pt":
        torch.save({"state_dict": {f"module.{k}": v for k, v in clip.state_dict().items()}}, path)
    else:
        from safetensors.torch import save_file

        save_file(clip.state_dict(), path)
    model, info = initial_model(str(config), str(path), None, NAMED)
    assert info.classes == CLASSES and info.class_names == tuple(name for _, name in NAMED)
    pixels = torch.randn(2, 3, TINY.image, TINY.image)

    # open_clip's own zero-shot path, written out
    tokenizer = open_clip.SimpleTokenizer(context_length=16)
    rows = []
    with torch.no_grad():
        for _, name in NAMED:
            texts = clip.encode_text(tokenizer([t(name) for t in open_clip.OPENAI_IMAGENET_TEMPLATES]), normalize=True)
            rows.append(nn.functional.normalize(texts.mean(0), dim=0))
        expected = clip.logit_scale.exp() * clip.encode_image(pixels, normalize=True) @ torch.stack(rows).T
        torch.testing.assert_close(model(pixels)[1], expected, rtol=1e-4, atol=1e-4)
    assert not model.head.bias.any()


def test_an_image_tower_alone_needs_a_head(tmp_path):
    config = tmp_path / "tiny.json"
    config.write_text(TINY.config())
    path = tmp_path / "tower.pt"
    torch.save(build_tower(TINY.info()).state_dict(), path)
    with pytest.raises(UserError, match="--head"):
        initial_model(str(config), str(path), None, NAMED)
    head = save_tiny_model(tmp_path / "head.safetensors")
    model, _ = initial_model(str(config), str(path), str(head), NAMED)
    assert torch.equal(model.head.weight, load_model(head)[0].head.weight)


def test_weights_of_another_architecture_are_refused(tmp_path):
    path = save_tiny_model(tmp_path / "m.safetensors")
    other = tmp_path / "other.json"
    other.write_text(json.dumps(B32.info().config))
    with pytest.raises(UserError, match="belong to tiny"):
        initial_model(str(other), str(path), None, NAMED)


def test_openai_weights_on_a_gelu_model_are_an_error_not_a_warning():
    with pytest.raises(UserError, match="Use --model ViT-B-32-quickgelu"):
        find_weights("ViT-B-32", "openai")


OPENAI_REPOSITORY = "timm/vit_base_patch32_clip_224.openai"


@pytest.fixture
def hub_cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of the hub's client."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_a_failed_download_names_the_command_to_fetch_the_files(hub_cache, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    command = rf"HF_HUB_OFFLINE is set.*`curl -L --remote-name-all \S+{OPENAI_REPOSITORY}/\S+ \S+open_clip_config.json`"
    with pytest.raises(UserError, match=f"{command}.*--pretrained open_clip_model.safetensors"):
        find_weights("ViT-B-32-quickgelu", "openai")


def test_a_network_that_never_answers_is_reported_with_the_command_to_fetch_the_files(hub_cache, monkeypatch):
    assert why_unreachable("http://127.0.0.1:1"), "an earlier question, without a proxy"
    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts connections, and says nothing
        for name in ("https_proxy", "HTTPS_PROXY", "http_proxy", "HTTP_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{server.getsockname()[1]}")
        started = time.monotonic()
        with pytest.raises(UserError, match=r"huggingface.co cannot be reached \(no answer within 2.2 s\).*curl"):
            find_weights("ViT-B-32-quickgelu", "openai")
        assert time.monotonic() - started < 60, "the hub's client retries for minutes"


def test_names_of_models_and_tags_are_looked_up_without_importing_open_clip():
    code = (
        "import json, sys; from cfmask.models import open_clip_tables as tables, weights\n"
        "names = tables.model_names(); configs = [tables.model_config(name) for name in names]\n"
        "tags = {name: tables.tags_of_model(name) for name in names}\n"
        "assert tables.model_config('ViT-B-33') is None and tables.tag_config('ViT-B-32', 'openay') is None\n"
        "assert 'torch' not in sys.modules and 'open_clip' not in sys.modules\n"
        "import open_clip, safetensors.torch; from open_clip import pretrained\n"
        "assert sorted(names) == sorted(open_clip.list_models())\n"
        "assert configs == [open_clip.get_model_config(name) for name in names]\n"
        "for name in names:\n"
        "    assert list(tags[name]) == open_clip.list_pretrained_tags_by_model(name)\n"
        "    assert all(config == pretrained.get_pretrained_cfg(name, tag) for tag, config in tags[name].items())\n"
        "assert tables.tag_config('ViT-B-32', 'laion2b-s34b-b79k') == tags['ViT-B-32']['laion2b_s34b_b79k']\n"
        "print(len(names), sum(map(len, tags.values())))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    models, tags = map(int, done.stdout.split())
    assert models > 100 and tags > 100


def test_models_registered_with_open_clip_are_found(tmp_path):
    config = {"embed_dim": 4, "vision_cfg": {"width": 8}, "text_cfg": {}}
    (tmp_path / "ViT-registered.json").write_text(json.dumps(config))
    with _registry():
        open_clip.add_model_config(tmp_path / "ViT-registered.json")
        assert read_config("ViT-registered") == config
    with pytest.raises(UserError, match="Unknown model 'ViT-registered'"):
        read_config("ViT-registered")


def test_cached_weights_need_no_network(hub_cache, monkeypatch):
    monkeypatch.setattr("cfmask.models.downloads.why_unreachable", lambda url: pytest.fail("asked the network"))
    folder = hub_cache / f"models--{OPENAI_REPOSITORY.replace('/', '--')}"
    for file, text in (("refs/main", "abc"), ("snapshots/abc/open_clip_model.safetensors", "weights")):
        (folder / file).parent.mkdir(parents=True)
        (folder / file).write_text(text)
    assert find_weights("ViT-B-32-quickgelu", "openai") == folder / "snapshots/abc/open_clip_model.safetensors"


def test_missing_files_and_unknown_names_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        find_weights("ViT-B-32-quickgelu", str(tmp_path / "none.pt"))
    with pytest.raises(UserError, match="Did you mean openai\\? Its tags: .*openai"):
        find_weights("ViT-B-32-quickgelu", "opneai")
    with pytest.raises(UserError, match="Unknown model 'ViT-Z'"):
        model_info("ViT-Z")
    garbage = tmp_path / "garbage.pt"
    garbage.write_bytes(b"not a checkpoint")
    config = tmp_path / "tiny.json"
    config.write_text(TINY.config())
    with pytest.raises(UserError, match="cannot be read as a checkpoint"):
        initial_model(str(config), str(garbage), None, NAMED)


def test_a_pickle_that_would_run_code_is_not_unpickled(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    path = tmp_path / "evil.pt"
    torch.save({"state_dict": Evil()}, path)
    config = tmp_path / "tiny.json"
    config.write_text(TINY.config())
    with pytest.raises(UserError, match="cannot be read"):
        initial_model(str(config), str(path), None, NAMED)
    assert not (tmp_path / "owned").exists()


def test_a_head_for_other_classes_is_refused(tmp_path):
    path = save_tiny_model(tmp_path / "m.safetensors")
    check_head(path, CLASSES)
    with pytest.raises(UserError, match="has 3 classes, the shards 2"):
        check_head(path, CLASSES[:2])
    with pytest.raises(UserError, match="row 0 is n00000000"):
        check_head(path, CLASSES[::-1])


def test_normalised_pixels_are_those_of_open_clips_preprocessing():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (301, 433, 3), dtype=np.uint8))
    import io

    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    expected = open_clip.image_transform(224, is_train=False)(image)
    normalise = Normalise(open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    ours = normalise(crop(decode(buffer.getvalue()), 224)[None])[0]
    # Up to the rounding of the resize: two levels in less than one value of a hundred.
    off = (ours - expected).abs()
    assert off.max() < 2.01 / 255 / min(open_clip.OPENAI_DATASET_STD) and (off > 2e-6).float().mean() < 0.01


def test_the_default_mean_and_deviation_are_open_clips():
    assert preprocessing.OPENAI_MEAN == open_clip.OPENAI_DATASET_MEAN
    assert preprocessing.OPENAI_STD == open_clip.OPENAI_DATASET_STD
