"""Mean and standard deviation of weights are never assumed, and models that cannot be trained are refused early."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import asdict
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.model import CLIPVisionCfg
from safetensors.torch import save_file

import made
from cfmask.errors import UserError
from cfmask.models.architecture import IDLE_SETTINGS, VISION_DEFAULTS, check_trainable, read_config
from cfmask.models.head import build_tower, load_model, read_info, save_model
from cfmask.models.initial import check_initial_model, describe, initial_model, model_info
from cfmask.models.preprocessing import OPENAI_MEAN, OPENAI_STD
from cfmask.models.tower import replace_attention
from cfmask.runs import RunFolder
from launch.state import follow
from launch.state.failure_reports import RankStart
from towers import B32, MEAN, ODD, STD, TINY, tiny_clip

NAMED = [(wnid, f"thing {i}") for i, wnid in enumerate(made.CLASSES)]
HALF = [0.5] * 3
CONFIG = TINY.info().config


@pytest.fixture(scope="module")
def clip():
    return tiny_clip().eval()


@pytest.fixture
def weights(tmp_path, clip) -> Path:
    """A CLIP's state dict with nothing beside it, and a bare.json without preprocessing."""
    torch.save(clip.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    (tmp_path / "bare.json").write_text(json.dumps(CONFIG))
    return tmp_path / "open_clip_pytorch_model.bin"


def bare(weights: Path) -> str:
    return str(weights.with_name("bare.json"))


def beside(weights: Path, text: str) -> None:
    weights.with_name("open_clip_config.json").write_text(text)


def preprocess(**values: object) -> str:
    return json.dumps({"model_cfg": CONFIG, "preprocess_cfg": values})


# --- which mean -----------------------------------------------------------------------------------------------------


def test_unknown_preprocessing_has_to_be_given(weights):
    with pytest.raises(UserError, match="preprocessing of .* is unknown.*open_clip_config.json.*--mean R G B"):
        describe(bare(weights), str(weights))
    info = describe(bare(weights), str(weights), mean=HALF, std=STD).info
    assert (info.mean, info.std) == ((0.5, 0.5, 0.5), STD)
    with pytest.raises(UserError, match="belong together"):
        describe(bare(weights), str(weights), mean=HALF)


@pytest.mark.parametrize("link", [False, True])
def test_preprocessing_is_read_from_the_configuration_beside_any_file(weights, tmp_path, link):
    beside(weights, TINY.config(mean=HALF))
    given = weights
    if link:  # as in the Hugging Face cache
        (tmp_path / "snapshot").mkdir()
        given = tmp_path / "snapshot/model.pt"
        given.symlink_to(weights)
    model, info = initial_model(bare(weights), str(given), None, NAMED)
    assert info.mean == (0.5, 0.5, 0.5)
    # and continues with the weights
    save_model(tmp_path / "made.safetensors", model, info)
    assert load_model(tmp_path / "made.safetensors")[1].mean == (0.5, 0.5, 0.5)
    with pytest.raises(UserError, match="contradict each other"):
        check_initial_model(bare(weights), str(tmp_path / "made.safetensors"), None, NAMED, mean=MEAN, std=STD)
    (tmp_path / "said.json").write_text(TINY.config())
    with pytest.raises(
        UserError, match="contradict each other .* The header of .*made.*mean 0.5.*said.json: mean 0.48"
    ):
        check_initial_model(str(tmp_path / "said.json"), str(tmp_path / "made.safetensors"), None, NAMED)


def test_a_configuration_beside_a_link_is_found(weights, tmp_path):
    (tmp_path / "snapshot").mkdir()
    given = tmp_path / "snapshot/model.pt"
    given.symlink_to(weights)
    beside(given, TINY.config(mean=HALF))
    assert describe(bare(weights), str(given)).info.mean == (0.5, 0.5, 0.5)


def test_sources_that_contradict_each_other_are_refused(weights, tmp_path):
    (tmp_path / "said.json").write_text(TINY.config(mean=HALF))
    assert describe(str(tmp_path / "said.json"), str(weights)).info.mean == (0.5, 0.5, 0.5)
    beside(weights, TINY.config())
    with pytest.raises(UserError, match="contradict each other.*open_clip_config.json: mean 0.48.*said.json: mean 0.5"):
        describe(str(tmp_path / "said.json"), str(weights))
    with pytest.raises(UserError, match="contradict each other.*--mean and --std: mean 0.5"):
        describe(bare(weights), str(weights), mean=HALF, std=HALF)
    assert describe(bare(weights), str(weights), mean=MEAN, std=STD).info.mean == MEAN


def test_openais_state_dicts_have_openais_mean(weights, clip):
    markers = {name: torch.tensor(7) for name in ("input_resolution", "context_length", "vocab_size")}
    torch.save({**clip.state_dict(), **markers}, weights)
    assert describe(bare(weights), str(weights)).info.mean == OPENAI_MEAN
    beside(weights, TINY.config(mean=HALF))
    with pytest.raises(UserError, match="is OpenAI's: mean 0.481"):
        describe(bare(weights), str(weights))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"mean": HALF}, "has mean alone"),
        ({"mean": [0.5], "std": HALF}, "three numbers"),
        ({"mean": [123.7, 116.3, 103.5], "std": [58.4, 57.1, 57.4]}, "for pixels in 0…1"),
        ({"mean": HALF, "std": [0, 0, 0]}, "std is"),
        ({"mean": HALF, "std": [float("nan")] * 3}, "std is"),
        ({"mean": ["0.5"] * 3, "std": HALF}, "mean is"),
        ({"mean": HALF, "std": HALF, "resize_mode": "squash"}, "resize_mode is 'squash', not 'shortest'"),
        ({"mean": HALF, "std": HALF, "resize_mode": "longest"}, "resize_mode is 'longest'"),
        ({"mean": HALF, "std": HALF, "interpolation": "bilinear"}, "interpolation is 'bilinear', not 'bicubic'"),
        ({"mean": HALF, "std": HALF, "mode": "BGR"}, "mode is 'BGR'"),
        ({"mean": HALF, "std": HALF, "size": 224}, "size 224.*16 × 16"),
        ({}, "is unknown"),
    ],
)
def test_unsupported_or_invalid_preprocessing_is_refused(weights, values, reason):
    beside(weights, preprocess(**values))
    with pytest.raises(UserError, match=reason):
        describe(bare(weights), str(weights))


def test_all_forms_of_open_clips_preprocessing_are_read(weights):
    beside(
        weights, preprocess(mean=0.5, std=0.25, size=[16, 16], interpolation="random", resize_mode=None, fill_color=0)
    )
    info = describe(bare(weights), str(weights)).info
    assert (info.mean, info.std) == ((0.5,) * 3, (0.25,) * 3)


def test_preprocessing_is_that_of_tags_if_they_agree(tmp_path):
    assert model_info("ViT-B-32", str(tmp_path / "gone.pt")).mean == OPENAI_MEAN
    assert model_info("ViT-L-14", "laion2b_s32b_b82k").mean == (0.5, 0.5, 0.5)
    assert model_info("ViT-L-14", str(tmp_path / "gone.pt"), mean=HALF, std=HALF).mean == (0.5, 0.5, 0.5)
    with pytest.raises(UserError, match="ViT-L-14 differ .*laion400m_e31.*laion2b_s32b_b82k.*mean 0.5"):
        model_info("ViT-L-14", str(tmp_path / "gone.pt"))
    with pytest.raises(UserError, match="no pretrained ViT-S-16"):
        model_info("ViT-S-16", str(tmp_path / "gone.pt"))
    # DFN's images are squashed and MetaCLIP's are not, with the same mean.
    with pytest.raises(UserError, match="open_clip.s pretrained .* differ .*--model FILE.json"):
        model_info("ViT-H-14-quickgelu", str(tmp_path / "gone.pt"), mean=OPENAI_MEAN, std=OPENAI_STD)
    with pytest.raises(UserError, match="contradict each other"):
        model_info("ViT-L-14", "laion2b_s32b_b82k", mean=OPENAI_MEAN, std=OPENAI_STD)
    with pytest.raises(UserError, match="Its tags: openai"):
        model_info("ViT-L-14", "opneai")


# --- the configuration beside, but for its preprocessing ------------------------------------------------------------


@pytest.mark.parametrize("name", ["open_clip_pytorch_model.bin", "open_clip_model.safetensors", "mine.pt"])
def test_the_activation_is_read_from_the_configuration_beside(tmp_path, clip, name):
    if name.endswith(".safetensors"):
        save_file(clip.state_dict(), tmp_path / name)
    else:
        torch.save(clip.state_dict(), tmp_path / name)
    beside(tmp_path / name, TINY.config(quick_gelu=False))
    (tmp_path / "quick.json").write_text(TINY.config())
    with pytest.raises(UserError, match="trained with GELU and --model .* computes QuickGELU"):
        describe(str(tmp_path / "quick.json"), str(tmp_path / name))


@pytest.mark.parametrize(
    ("part", "setting", "reason"),
    [
        ("vision_cfg", {"head_width": 4}, r"differ in vision_cfg.head_width \(4 and 8\)"),
        ("vision_cfg", {"norm_kwargs": {"eps": 1e-6}}, "vision_cfg.norm_kwargs"),
        ("text_cfg", {"no_causal_mask": True}, r"differ in text_cfg.no_causal_mask \(True and False\)"),
        ("text_cfg", {"hf_tokenizer_name": "a/b"}, "text_cfg.hf_tokenizer_name"),
    ],
)
def test_settings_that_shapes_do_not_show_are_compared_with_the_configuration_beside(
    weights, tmp_path, part, setting, reason
):
    beside(weights, TINY.config(**{part: {**CONFIG[part], **setting}}))
    with pytest.raises(UserError, match=reason):
        check_initial_model(bare(weights), str(weights), None, NAMED)
    if part == "text_cfg":  # of no concern where the head is given
        head = made.save_tiny_model(tmp_path / "head.safetensors")
        assert check_initial_model(bare(weights), str(weights), str(head), NAMED).info.mean == MEAN


def test_defaults_may_be_written_out(weights):
    beside(weights, TINY.config(vision_cfg={**CONFIG["vision_cfg"], "pool_type": "tok", "image_size": [16, 16]}))
    assert check_initial_model(bare(weights), str(weights), None, NAMED).info.class_names[0] == "thing 0"


def test_an_invalid_configuration_is_named(weights):
    beside(weights, "{}")
    with pytest.raises(UserError, match="open_clip_config.json"):
        describe(bare(weights), str(weights))


# --- refused before a job is queued ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (lambda state: {**state, "visual.proj": state["visual.proj"][:, :4]}, r"proj has the shape \(16, 4\)"),
        (lambda state: {**state, "visual.extra": state["visual.proj"]}, "extra is unknown"),
        (lambda state: {k: v for k, v in state.items() if k != "visual.ln_post.bias"}, "ln_post.bias is missing"),
        (lambda state: {**state, "visual.proj": state["visual.proj"].to(torch.int8)}, "proj is int8"),
        (lambda state: {k: v for k, v in state.items() if k.startswith("visual.")}, "image tower only"),
        (lambda state: {k: v for k, v in state.items() if k != "ln_final.bias"}, "lack ln_final.bias"),
        (lambda state: {**state, "text_projection": state["text_projection"][:, :4]}, "text_projection has the shape"),
        (lambda state: {**state, "head.weight": torch.ones(3, 8)}, "has a head of 3 classes"),
    ],
)
def test_weights_of_another_shape_are_refused_by_their_header(weights, tmp_path, clip, changed, reason):
    (tmp_path / "tiny.json").write_text(TINY.config())
    torch.save(changed(clip.state_dict()), weights)
    with pytest.raises(UserError, match=reason):
        check_initial_model(str(tmp_path / "tiny.json"), str(weights), None, NAMED)


def test_a_head_of_another_width_and_a_truncated_model_file_are_refused(weights, tmp_path):
    (tmp_path / "tiny.json").write_text(TINY.config())
    head = made.save_tiny_model(tmp_path / "wide.safetensors", geometry=B32)
    with pytest.raises(UserError, match="takes 24-d features.*gives 8-d"):
        check_initial_model(str(tmp_path / "tiny.json"), str(weights), str(head), NAMED)
    own = made.save_tiny_model(tmp_path / "own.safetensors")
    os.truncate(own, own.stat().st_size - 5)
    with pytest.raises(UserError, match="not a whole safetensors file"):
        check_initial_model(str(tmp_path / "tiny.json"), str(own), None, NAMED)


REASONS = {
    "timm": "its image tower is timm's",
    "resnet": "its image tower is a ResNet",
    "coca": "it is a CoCa",
    "clipa": "its image tower pools by 'avg'",
}


def kind_of(config: dict) -> str | None:
    """By open_clip's own rules (create_model, _build_vision_tower)."""
    vision = CLIPVisionCfg(**config["vision_cfg"])
    if vision.timm_model_name:
        return "timm"
    if isinstance(vision.layers, list):
        return "resnet"
    if "multimodal_cfg" in config:
        return "coca"
    return None if vision.pool_type == "tok" and not vision.attentional_pool else "clipa"


def test_every_model_that_open_clip_lists_can_be_trained_or_is_refused_in_a_sentence():
    found: dict[str | None, list[str]] = {}
    for name in open_clip.list_models():
        config = read_config(name)
        kind = kind_of(config)
        found.setdefault(kind, []).append(name)
        if kind is not None:
            with pytest.raises(UserError) as refused:
                check_trainable(name, config)
            said = str(refused.value)
            assert said.startswith(f"The model {name} cannot be trained: {REASONS[kind]}") and "\n" not in said
            continue
        info = model_info(name)
        cut = {**config, "vision_cfg": {**config["vision_cfg"], "layers": 1}}  # blocks are alike
        with torch.device("meta"):
            replace_attention(build_tower(dataclasses.replace(info, config=cut)))
    assert {kind: len(names) > 3 for kind, names in found.items()} == dict.fromkeys((None, *REASONS), True)


def test_every_tag_of_a_model_that_can_be_trained_has_its_preprocessing_or_is_refused():
    refused = set()
    for name, tag in open_clip.list_pretrained():
        config = open_clip.get_model_config(name)
        if config is None or kind_of(config) is not None:
            continue
        known = open_clip.pretrained.get_pretrained_cfg(name, tag)
        if (known["resize_mode"], known["interpolation"]) == ("shortest", "bicubic"):
            info = model_info(name, tag)
            assert (info.mean, info.std) == (known["mean"], known["std"])
        else:
            with pytest.raises(UserError, match="trained with another preprocessing"):
                model_info(name, tag)
            refused.add(tag)
    listed = {tag for _, tag in open_clip.list_pretrained()}  # open_clip 3.0 has no metaclip2
    assert refused == {"dfn5b", "metaclip2_worldwide"} & listed


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ({"attentional_pool": True}, "pools by attention"),
        ({"qk_norm": True}, "another attention"),
        ({"block_type": "custom"}, "another attention"),
        ({"pos_embed_type": "sin_cos_2d"}, "positional embedding"),
        ({"image_size": [16, 32]}, "image_size is .16, 32., not the side of a square"),
        ({"patch_size": "4"}, "patch_size is '4'"),
        ({"head_width": 5}, "not a multiple of head_width 5"),
        ({"layers": 0}, "layers is 0"),
        ({"patch_size": 32}, "patches of 32 pixels"),
        ({"register_tokens": 4}, r"unknown settings \(register_tokens\)"),
        ({"heads": 6}, r"unknown settings \(heads: a configuration has head_width"),
    ],
)
def test_a_custom_configuration_that_cannot_be_trained_is_refused(setting, reason):
    with pytest.raises(UserError, match=f"cannot be trained: .*{reason}"):
        check_trainable("mine.json", {**CONFIG, "vision_cfg": {**CONFIG["vision_cfg"], **setting}})


def test_known_settings_are_those_of_open_clip():
    theirs = asdict(CLIPVisionCfg())
    assert {**theirs, **VISION_DEFAULTS} == theirs and {*VISION_DEFAULTS, *IDLE_SETTINGS} == set(theirs)


def test_patch_dropout_is_off():
    config = {**CONFIG, "vision_cfg": {**CONFIG["vision_cfg"], "patch_dropout": 0.5}}
    check_trainable("mine.json", config)
    assert isinstance(build_tower(dataclasses.replace(ODD.info(), config=config)).patch_dropout, torch.nn.Identity)


@pytest.fixture(scope="module")
def materials(tmp_path_factory) -> Path:
    return made.make_materials(tmp_path_factory.mktemp("materials"), per_class=16)


def test_submission_refuses_what_the_job_would(materials, tmp_path, clip, capsys):
    from launch import submit

    (tmp_path / "tiny.json").write_text(json.dumps(CONFIG))
    torch.save(clip.state_dict(), tmp_path / "clip.pt")

    def submitted(*flags: object) -> tuple[int, str]:
        words = [*made.recipe_flags(materials, tmp_path / "run"), "--executor", "local", "--tasks-per-node", 1]
        code = submit.main([str(word) for word in (*words, "--dry-run", *flags)])
        return code, capsys.readouterr().err

    start = ["--model", tmp_path / "tiny.json", "--pretrained", tmp_path / "clip.pt"]
    mean = ["--mean", 0.5, 0.4, 0.3, "--std", 0.2, 0.2, 0.3]
    for flags, reason in (
        (start, "--mean R G B"),
        (["--model", "RN50-quickgelu", "--pretrained", "openai"], "is a ResNet"),
        (["--model", "EVA02-L-14", "--pretrained", "merged2b_s4b_b131k"], "is timm's eva02"),
        (["--model", "ViT-L-14-CLIPA", "--pretrained", "datacomp1b"], "pools by 'avg'"),
        (["--model", "coca_ViT-B-32", "--pretrained", "laion2b_s13b_b90k"], "is a CoCa"),
        (["--model", "ViT-B-16-quickgelu", "--pretrained", tmp_path / "clip.pt"], "Choose the --model"),
        ([*start[:2], *mean], "contradict each other"),  # tiny.safetensors has another
    ):
        code, error = submitted(*flags)
        assert code == 2 and reason in error and not (tmp_path / "run").exists(), (flags, error)
    code, error = submitted(*start, *mean)
    assert code == 0, error


def test_the_end_of_a_run_suggests_no_command_that_would_fail(tmp_path, capsys):
    (tmp_path / "recipe.json").write_text("{}")
    here = RankStart(RunFolder(tmp_path), "123-0", 0, local=True, nodes=1, world_size=1)
    for error, kind, again in (
        ("UserError: no such weights", "raised", True),
        ("RuntimeError: shapes", "raised", True),
        ("OSError: disk", "raised", False),
        ("was killed by signal 9", "killed", False),
    ):
        here.file.unlink(missing_ok=True)
        here.write_failure(error, kind=kind, traceback="Traceback …" if kind == "raised" else "")
        here.mark("txt").write_text(f"{error}\n")
        assert follow.print_end(here.run, "123", "The same command resumes.") == 1
        said = capsys.readouterr().out
        assert ("would fail in the same way: remove the cause first" in said) is again, said


def test_a_run_keeps_the_mean_of_the_flags(tmp_path, clip):
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    (tmp_path / "tiny.json").write_text(json.dumps(CONFIG))
    model, info = initial_model(str(tmp_path / "tiny.json"), str(tmp_path / "clip.pt"), None, NAMED, mean=HALF, std=STD)
    save_model(tmp_path / "initial.safetensors", model, info)
    found = read_info(tmp_path / "initial.safetensors")
    assert found is not None and found.mean == (0.5, 0.5, 0.5) and found.std == STD
