"""Configuration files beside weights: a start uses them or is refused."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from types import SimpleNamespace

import open_clip
import pytest
import torch

import made
from cfmask.errors import UserError
from cfmask.models.architecture import read_config
from cfmask.models.export import whole_clip
from cfmask.models.head import check_same_kind, read_info, save_model
from cfmask.models.initial import check_initial_model, describe, initial_model, model_info
from cfmask.recipe import Model, Recipe
from cfmask.runs import RunFolder
from cfmask.runtime.distributed import DistributedContext
from cfmask.training import setup as train_setup
from launch.paper.cost import forward_flops
from launch.state.failure_reports import RankStart, would_recur
from launch.submission import training
from towers import MEAN, TINY, tiny_clip

NAMED = [(wnid, f"thing {i}") for i, wnid in enumerate(made.CLASSES)]
HALF = [0.5] * 3
CONFIG = TINY.info().config


@pytest.fixture(scope="module")
def clip():
    return tiny_clip().eval()


@pytest.fixture
def weights(tmp_path, clip) -> Path:
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    (tmp_path / "bare.json").write_text(json.dumps(CONFIG))
    return tmp_path / "clip.pt"


def described(weights: Path):
    return describe(str(weights.with_name("bare.json")), str(weights)).info


def beside(weights: Path, text: str | bytes) -> None:
    weights.with_name("open_clip_config.json").write_bytes(text if isinstance(text, bytes) else text.encode())


# --- how they are written ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"\xff\xfe{}", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[1]", "not an open_clip model configuration"),
        (b'{"architecture": "vit", "pretrained_cfg": {"mean": [0.5, 0.5, 0.5]}}', "not an open_clip model config"),
        (TINY.config(text_cfg="x").encode(), "not an open_clip model configuration"),
        (TINY.config(vision_cfg={**CONFIG["vision_cfg"], "register_tokens": 4}).encode(), r"register_tokens \(4 and N"),
        (TINY.config(text_cfg={**CONFIG["text_cfg"], "rotary": True}).encode(), r"text_cfg.rotary \(True and None\)"),
    ],
)
def test_an_invalid_or_unknown_configuration_is_refused(weights, text, reason):
    beside(weights, text)
    with pytest.raises(UserError, match=f"open_clip_config.json.*{reason}"):
        check_initial_model(str(weights.with_name("bare.json")), str(weights), None, NAMED)


def test_byte_order_marks_and_timm_names_are_accepted(weights):
    beside(weights, b"\xef\xbb\xbf" + TINY.config(mean=HALF).encode())
    assert described(weights).mean == (0.5, 0.5, 0.5)
    said = {"mean": HALF, "std": HALF, "crop_pct": 1.0, "crop_mode": "center"}
    beside(weights, json.dumps({"model_cfg": CONFIG, "pretrained_cfg": said}))
    assert described(weights).mean == (0.5, 0.5, 0.5)
    beside(weights, json.dumps({"model_cfg": CONFIG, "pretrained_cfg": {**said, "crop_pct": 0.9}}))
    with pytest.raises(UserError, match="crop_pct is 0.9, not 1"):
        described(weights)


def test_disabled_settings_and_old_names_are_not_differences(weights):
    vision = {**CONFIG["vision_cfg"], "global_average_pool": False}
    beside(weights, TINY.config(vision_cfg=vision, text_cfg={**CONFIG["text_cfg"], "proj": "mlp"}))
    assert check_initial_model(str(weights.with_name("bare.json")), str(weights), None, NAMED).info.mean == MEAN


def test_a_missing_resize_is_taken_from_the_tags(weights):
    """DFN5B's repositories have a mean but no resize_mode; its tag has "squash"."""

    def mean_with(name: str, **values: object) -> tuple[float, ...]:
        beside(weights, json.dumps({"model_cfg": open_clip.get_model_config(name), "preprocess_cfg": values}))
        return model_info(name, str(weights)).mean

    mean = {"mean": HALF, "std": HALF}
    with pytest.raises(UserError, match="resize_mode is 'squash', not 'shortest'"):
        mean_with("ViT-H-14-378-quickgelu", **mean)
    with pytest.raises(UserError, match='pretrained .* differ.*write "resize_mode": "shortest"'):
        mean_with("ViT-H-14-quickgelu", **mean)
    for name, said in (
        ("ViT-H-14-quickgelu", {**mean, "resize_mode": "shortest"}),
        ("ViT-H-14", mean),  # the one that is squashed is a QuickGELU model
        ("ViT-L-14", mean),
        ("ViT-S-16", mean),
    ):
        assert mean_with(name, **said) == (0.5, 0.5, 0.5)


# --- where they lie ---------------------------------------------------------------------------------------------------


def test_the_configuration_of_a_link_to_a_link_is_found(weights, tmp_path):
    """A link to a file of a Hugging Face snapshot, which is a link itself."""
    for folder in ("blobs", "snapshot", "mine"):
        (tmp_path / folder).mkdir()
    os.rename(weights, tmp_path / "blobs/0a1b")
    (tmp_path / "snapshot/clip.pt").symlink_to("../blobs/0a1b")
    beside(tmp_path / "snapshot/clip.pt", TINY.config(mean=HALF))
    (tmp_path / "mine/clip.pt").symlink_to("../snapshot/clip.pt")
    info = describe(str(tmp_path / "bare.json"), str(tmp_path / "mine/clip.pt")).info
    assert info.mean == (0.5, 0.5, 0.5)


def test_the_folder_above_overrides_the_tags(weights, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    below = tmp_path / "checkpoints/epoch_32.pt"
    os.rename(weights, below)
    config = open_clip.get_model_config("ViT-B-32")
    beside(weights, json.dumps({"model_cfg": config, "preprocess_cfg": {"mean": HALF, "std": HALF}}))
    with pytest.raises(UserError, match="contradict each other .*open_clip's tags of ViT-B-32: .*mean 0.5"):
        model_info("ViT-B-32", str(below))
    assert model_info("ViT-B-32", str(below), mean=HALF, std=HALF).mean == (0.5, 0.5, 0.5)
    beside(weights, TINY.config(mean=HALF))  # of another model: not about these weights
    assert model_info("ViT-B-32", str(below)).mean != (0.5, 0.5, 0.5)


def test_a_job_gets_the_resolved_path(tmp_path, monkeypatch):
    (tmp_path / "far/sub").mkdir(parents=True)
    (tmp_path / "latest").symlink_to("far/sub")
    for folder in (tmp_path, tmp_path / "far"):
        (folder / "clip.pt").write_text(folder.name)
    monkeypatch.chdir(tmp_path)
    assert Path(training._absolute("latest/../clip.pt")).read_text() == "far"
    before = training._absolute("clip.pt")
    (tmp_path / "clip.pt").unlink()
    assert training._absolute("clip.pt") == before  # the run's recipe is still the same


def test_a_run_keeps_its_preprocessing_when_the_configuration_changes(weights, tmp_path):
    beside(weights, TINY.config(mean=HALF))
    model = Model(name=str(weights.with_name("bare.json")), pretrained=str(weights))
    recipe = dataclasses.replace(Recipe(), model=model)
    run, context = RunFolder(tmp_path / "run"), DistributedContext(attempt="here", cpus=1, gpu=False)
    run.root.mkdir()
    for _ in range(2):
        train_setup._write_initial_models(recipe, run, SimpleNamespace(classes=NAMED), context)
        assert read_info(run.initial).mean == (0.5, 0.5, 0.5)
        beside(weights, TINY.config())
        weights.with_name("bare.json").unlink(missing_ok=True)


# --- what belongs together --------------------------------------------------------------------------------------------


def test_a_head_of_another_tower_of_the_same_width_is_refused(weights, tmp_path):
    beside(weights, TINY.config())
    deeper = dataclasses.replace(TINY, layers=3)
    head = made.save_tiny_model(tmp_path / "head.safetensors", geometry=deeper)
    with pytest.raises(UserError, match=r"for the features of .* and not of .*vision_cfg.layers \(3 and 2\)"):
        check_initial_model(str(weights.with_name("bare.json")), str(weights), str(head), NAMED)


def test_means_that_differ_by_rounding_are_the_same(tmp_path):
    own = made.save_tiny_model(tmp_path / "own.safetensors")
    info = read_info(own)
    assert info is not None
    check_same_kind(dataclasses.replace(info, mean=tuple(x + 1e-8 for x in info.mean)), info, str(own))
    with pytest.raises(UserError, match="takes pixels with mean"):
        check_same_kind(dataclasses.replace(info, mean=tuple(x + 1e-3 for x in info.mean)), info, str(own))


def test_the_text_tower_of_an_export_is_compared_with_its_configuration(weights):
    info = dataclasses.replace(TINY.info(classes=3), classes=made.CLASSES)
    model = TINY.classifier(classes=3)
    beside(weights, TINY.config())
    assert torch.equal(whole_clip(model, info, str(weights))["visual.proj"], model.visual.proj)
    beside(weights, TINY.config(text_cfg={**CONFIG["text_cfg"], "no_causal_mask": True}))
    with pytest.raises(UserError, match="another text tower than tiny.*no_causal_mask.*was fine-tuned from"):
        whole_clip(model, info, str(weights))
    with pytest.raises(UserError, match="'openai' were trained with QuickGELU and ViT-B-16 computes GELU. Give the w"):
        whole_clip(model, model_info("ViT-B-16"), "openai")


def test_a_clip_that_was_saved_with_a_custom_text_tower_is_read(weights, clip):
    beside(weights, TINY.config())
    expected, _ = initial_model(str(weights.with_name("bare.json")), str(weights), None, NAMED, templates=["{}"])
    state = {k if k.startswith(("visual.", "logit")) else f"text.{k}": v for k, v in clip.state_dict().items()}
    torch.save(state, weights)
    found, _ = initial_model(str(weights.with_name("bare.json")), str(weights), None, NAMED, templates=["{}"])
    assert torch.equal(found.head.weight, expected.head.weight)


# --- what is no file of weights ---------------------------------------------------------------------------------------


def test_partial_weights_and_files_of_other_versions_are_named(weights, tmp_path):
    part = weights.rename(tmp_path / "model-00001-of-00002.bin")
    with pytest.raises(UserError, match="one of 2 files of one model"):
        described(part)
    whole = part.rename(tmp_path / "model-00001-of-00001.bin")
    beside(whole, TINY.config())
    assert described(whole).mean == MEAN
    for pretrained in ("hf-hub:laion/CLIP", "local-dir:/x"):
        with pytest.raises(UserError, match=f"--pretrained {pretrained}: names of repositories are not accepted"):
            describe("ViT-B-32", pretrained)
    info = dataclasses.replace(TINY.info(classes=3), classes=made.CLASSES)
    newer = SimpleNamespace(classes=info.classes, to_metadata=lambda: {"cfmask": json.dumps({"depth": 3})})
    save_model(tmp_path / "newer.safetensors", TINY.classifier(classes=3), newer)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="header of .*newer.safetensors has another form"):
        describe("ViT-B-32", str(tmp_path / "newer.safetensors"))


def test_sizes_may_be_pairs():
    vision = {**CONFIG["vision_cfg"], "image_size": [16, 16], "patch_size": [4, 4]}
    assert forward_flops({**CONFIG, "vision_cfg": vision}) == forward_flops(CONFIG)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"head.weight": torch.tensor(1.0)}, "a linear head has the shape"),
        ({"head.weight": torch.ones(3, 8, dtype=torch.int8)}, "and type int8; a linear head has the shape"),
        ({"visual.positional_embedding": torch.tensor(1.0)}, r"positional_embedding has the shape \(\)"),
        ({"text_projection": torch.ones(32, 8, dtype=torch.int8)}, "text_projection as int8"),
        ({"visual.proj": torch.full((16, 8), float("nan"))}, "The proj of the model that .* is not finite"),
        ({"text_projection": torch.full((32, 8), float("inf"))}, "The head of the model that .* is not finite"),
    ],
)
def test_invalid_weight_tensors_are_refused(weights, clip, changed, reason):
    beside(weights, TINY.config())
    torch.save({**clip.state_dict(), **changed}, weights)
    with pytest.raises(UserError, match=reason):
        initial_model(str(weights.with_name("bare.json")), str(weights), None, NAMED, templates=["{}"])


@pytest.mark.parametrize("changed", [{"mean": HALF[:1]}, {"mean": None}, {"std": [58.4] * 3}, {"config": {}}])
def test_the_header_of_a_model_file_is_checked(tmp_path, changed):
    info = dataclasses.replace(TINY.info(classes=3), classes=made.CLASSES)
    header = SimpleNamespace(
        classes=made.CLASSES, to_metadata=lambda: {"cfmask": json.dumps({**info.__dict__, **changed})}
    )
    save_model(tmp_path / "own.safetensors", TINY.classifier(classes=3), header)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="The header of .*own.safetensors"):
        read_info(tmp_path / "own.safetensors")


def test_models_that_are_proposed_can_be_trained():
    with pytest.raises(UserError, match="Unknown model 'ViT-B/32'") as refused:
        read_config("ViT-B/32")
    assert "ViT-B-32" in str(refused.value) and "SigLIP" not in str(refused.value)


def test_a_broken_connection_is_a_transient_failure(tmp_path):
    here = RankStart(RunFolder(tmp_path), "123-0", 0, local=True, nodes=1, world_size=1)
    for error, broken_off, again in (
        ("RuntimeError: Connection closed by peer", True, False),
        ("DistNetworkError: address already in use", False, False),
        ("RuntimeError: shapes", False, True),
    ):
        here.file.unlink(missing_ok=True)
        here.write_failure(error, traceback="Traceback …", broken_off=broken_off)
        here.mark("txt").write_text(error)
        assert would_recur(here.run, "123") is again, error
