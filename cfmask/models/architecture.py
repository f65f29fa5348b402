"""open_clip model configurations: reading, which can be trained here, and in what two of them differ.

torch and open_clip take seconds to import, and are imported only by the functions that need them: a launcher checks
configurations without them.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfmask.errors import UserError, did_you_mean, did_you_mean_path
from cfmask.models.open_clip_tables import model_config, model_names

if TYPE_CHECKING:
    from torch import Tensor

HUB_CONFIG = "open_clip_config.json"
"""open_clip's name of the configuration file in a Hugging Face repository."""

_CUSTOM_BLOCKS = ("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc")
VISION_DEFAULTS: dict[str, Any] = {
    "layers": 12,
    "width": 768,
    "head_width": 64,
    "mlp_ratio": 4.0,
    "patch_size": 16,
    "image_size": 224,
    "ls_init_value": None,
    "no_ln_pre": False,
    "act_kwargs": None,
    "norm_kwargs": None,
    "pos_embed_type": "learnable",
    "pool_type": "tok",
    "attentional_pool": False,
    "block_type": None,
    "timm_model_name": None,
    **dict.fromkeys(_CUSTOM_BLOCKS, False),
}
"""Settings of open_clip's CLIPVisionCfg that decide what an image tower computes, with their defaults."""

IDLE_SETTINGS = (
    *("patch_dropout", "output_tokens", "final_ln_after_pool", "attn_pooler_queries", "attn_pooler_heads"),
    *("timm_model_pretrained", "timm_pool", "timm_proj", "timm_proj_bias", "timm_drop", "timm_drop_path"),
)
"""Settings that do not change the features of a ViT that pools by its class token. (Patch dropout acts in training.)"""

_OF_CONSTRUCTOR = {
    "heads": "a configuration has head_width, which is width / heads",
    "output_dim": "a configuration has embed_dim, beside vision_cfg",
}
"""Arguments of open_clip's VisionTransformer that have another name in a configuration."""

_OLD_TEXT_NAMES = {"proj": "hf_proj_type", "pooler_type": "hf_pooler_type"}
"""Earlier names of settings of text_cfg."""


def read_config(name: str) -> dict[str, Any]:
    """An open_clip model configuration (``embed_dim``, ``vision_cfg``, ``quick_gelu`` …).

    Args:
        name: open_clip's name of a model; or the path of a .json file: a model configuration, or the
            open_clip_config.json of a Hugging Face repository, whose ``preprocess_cfg`` is kept.

    Raises:
        UserError: open_clip has no such model, or the file is not a configuration.
    """
    refuse_repository("--model", name)
    if name.endswith(".json"):
        try:
            return parse_config(Path(name).read_bytes(), name)
        except OSError as error:
            raise UserError(
                f"No model configuration can be read from {name}: {error.strerror}.{did_you_mean_path(name)}"
            ) from error
    if config := model_config(name):
        return config
    known = model_names()
    some = [other for other in known if other.startswith("ViT-B-") and not _why_not(model_config(other) or {})]
    raise UserError(
        f"Unknown model {name!r}: it is neither one of open_clip's models nor the path of a model configuration "
        f"(.json).{did_you_mean(name, known)} Some of open_clip's: {', '.join(some[:12])}; all: "
        "open_clip.list_models()."
    )


def parse_config(text: str | bytes, source: str) -> dict[str, Any]:
    """A model configuration from the text of a file, as ``read_config`` returns it.

    Args:
        source: the origin of the text, with which errors begin.

    Raises:
        UserError: it is not a configuration.
    """
    try:
        config = json.loads(text.decode("utf-8-sig") if isinstance(text, bytes) else text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source} is not a model configuration: it is not valid JSON ({error}).") from error
    if isinstance(config, dict) and isinstance(config.get("model_cfg"), dict):
        # pretrained_cfg is timm's name for it.
        preprocess = config.get("preprocess_cfg") or config.get("pretrained_cfg")
        config = {**config["model_cfg"], "preprocess_cfg": preprocess}
    if (
        not isinstance(config, dict)
        or "embed_dim" not in config
        or not isinstance(config.get("vision_cfg"), dict)
        or not isinstance(config.get("text_cfg"), (dict, type(None)))
    ):
        raise UserError(
            f"{source} is not an open_clip model configuration, which has embed_dim, vision_cfg and text_cfg (in "
            f"model_cfg, if it is an {HUB_CONFIG}). Correct it; or, if it lies beside weights to which it does not "
            "belong, move it away."
        )
    return config


def refuse_repository(flag: str, value: str) -> None:
    """Raises UserError for open_clip's names of Hugging Face repositories and of their folders."""
    if value.startswith(("hf-hub:", "local-dir:")):
        raise UserError(
            f"{flag} {value}: names of repositories are not accepted. Give the path of its {HUB_CONFIG} with --model, "
            "and the path of its weights with --pretrained. (On a machine with network access, `hf download "
            "OWNER/NAME` gets both.)"
        )


def check_trainable(name: str, config: Mapping[str, Any]) -> None:
    """Raises UserError if a configuration is that of an image tower that cannot be trained here."""
    if reason := _why_not(config):
        raise UserError(
            f"The model {name} cannot be trained: {reason}. Relevance needs the class token's row of softmax attention "
            "maps, so the image tower must be open_clip's VisionTransformer with class-token pooling and square "
            "images. Choose such a model, for example ViT-B-32-quickgelu."
        )


def _why_not(config: Mapping[str, Any]) -> str | None:
    vision = config["vision_cfg"]
    if vision.get("timm_model_name"):
        return f"its image tower is timm's {vision['timm_model_name']}"
    if isinstance(vision.get("layers"), (list, tuple)):
        return "its image tower is a ResNet"
    if "multimodal_cfg" in config:
        return "it is a CoCa, whose image tower also feeds a text decoder"
    full = {**VISION_DEFAULTS, **vision}
    if full["attentional_pool"]:
        return "its image tower pools by attention"
    if full["pool_type"] != "tok":
        return f"its image tower pools by {full['pool_type']!r}, not by the class token"
    if full["block_type"] not in (None, "default") or any(full[setting] for setting in _CUSTOM_BLOCKS):
        return "its image tower has blocks with another attention than softmax(q kᵀ/√d)"
    if full["pos_embed_type"] != "learnable":
        return f"its positional embedding is {full['pos_embed_type']!r}, which is not trained"
    if unknown := sorted(set(vision) - set(VISION_DEFAULTS) - set(IDLE_SETTINGS)):
        meant = [f"{name}: {_OF_CONSTRUCTOR[name]}" for name in unknown if name in _OF_CONSTRUCTOR]
        return f"vision_cfg has unknown settings ({'; '.join(meant) or ', '.join(unknown)})"
    return _why_no_geometry(config["embed_dim"], full)


def _why_no_geometry(embed_dim: Any, vision: Mapping[str, Any]) -> str | None:
    """vision: with every default filled in."""
    image, patch = _side(vision["image_size"]), _side(vision["patch_size"])
    for setting, value in (("image_size", image), ("patch_size", patch)):
        if value is None:
            return f"vision_cfg.{setting} is {vision[setting]!r}, not the side of a square"
    sizes = {name: vision[name] for name in ("layers", "width", "head_width")} | {"embed_dim": embed_dim}
    for setting, value in sizes.items():
        if type(value) is not int or value < 1:
            return f"{setting} is {value!r}, not a number above 0"
    if vision["width"] % vision["head_width"]:
        return f"width {vision['width']} is not a multiple of head_width {vision['head_width']}"
    assert image is not None and patch is not None
    if patch > image:
        return f"patches of {patch} pixels do not fit images of {image}"
    return None


def _side(size: Any) -> int | None:
    """The side of a square that is given as a number or as (height, width); None if it is not a square."""
    if isinstance(size, (list, tuple)) and len(size) == 2 and size[0] == size[1]:
        size = size[0]
    return size if type(size) is int and size > 0 else None


def image_size_of(config: Mapping[str, Any]) -> int:
    """Side of a trainable model's images in pixels."""
    return _side_of(config, "image_size")


def patch_size_of(config: Mapping[str, Any]) -> int:
    """Side of a trainable model's patches in pixels."""
    return _side_of(config, "patch_size")


def _side_of(config: Mapping[str, Any], setting: str) -> int:
    side = _side(config["vision_cfg"].get(setting, VISION_DEFAULTS[setting]))
    assert side is not None, "check_trainable has refused it"
    return side


def vision_differences(ours: Mapping[str, Any], theirs: Mapping[str, Any], *, any_size: bool = False) -> list[str]:
    """The settings in which the image towers of two configurations differ, as "vision_cfg.layers (12 and 24)". Missing
    settings have open_clip's defaults.

    Args:
        any_size: images may have different sizes.
    """
    left_out = {"vision_cfg.image_size"} if any_size else set()
    one, other = ({k: v for k, v in _vision_of(each).items() if k not in left_out} for each in (ours, theirs))
    return _differences(one, other)


def _differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    names = dict.fromkeys((*ours, *theirs))
    found = {name: (ours.get(name), theirs.get(name)) for name in names}
    return [f"{name} ({mine} and {other})" for name, (mine, other) in found.items() if mine != other]


def _vision_of(config: Mapping[str, Any]) -> dict[str, Any]:
    full = _with_defaults(config["vision_cfg"], VISION_DEFAULTS, IDLE_SETTINGS)
    for name in ("image_size", "patch_size"):
        full[name] = _side(full[name]) or full[name]
    flat = {f"vision_cfg.{name}": value for name, value in full.items()}
    return {"embed_dim": config["embed_dim"], "quick_gelu": bool(config.get("quick_gelu")), **flat}


def _with_defaults(given: Mapping[str, Any], defaults: Mapping[str, Any], idle: Collection[str]) -> dict[str, Any]:
    """All settings except the idle ones, with defaults filled in. An unknown setting, of a newer open_clip, counts if
    it is on."""
    unknown = {name: value for name, value in given.items() if name not in defaults and name not in idle and value}
    return {**{name: given.get(name, default) for name, default in defaults.items()}, **unknown}


def text_differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """As ``vision_differences``, for text towers and their tokenizers. Imports open_clip."""
    from dataclasses import asdict

    from open_clip import CLIPTextCfg

    idle = ("hf_model_pretrained",)
    defaults = {name: value for name, value in asdict(CLIPTextCfg()).items() if name not in idle}
    full = []
    for config in (ours, theirs):
        given = {_OLD_TEXT_NAMES.get(name, name): value for name, value in (config.get("text_cfg") or {}).items()}
        full.append({f"text_cfg.{k}": value for k, value in _with_defaults(given, defaults, idle).items()})
    return _differences(*full)


def check_activation(
    name: str, config: Mapping[str, Any], pretrained: str, quick_gelu: bool | None, *, remedy: str | None = None
) -> None:
    """Raises UserError if weights were trained with another activation than the model computes.

    Args:
        name, config: of the model.
        quick_gelu: whether the weights were trained with QuickGELU; None if that is unknown.
        remedy: the last sentence of the error; by default, it names the --model to use.
    """
    if quick_gelu is None or quick_gelu == bool(config.get("quick_gelu", False)):
        return
    theirs, ours = ("QuickGELU", "GELU") if quick_gelu else ("GELU", "QuickGELU")
    if remedy is not None:
        raise UserError(f"The weights {pretrained!r} were trained with {theirs} and {name} computes {ours}. {remedy}")
    right = f"{name}-quickgelu" if quick_gelu else name.removesuffix("-quickgelu")
    if right not in model_names():
        right = f'a configuration (.json) with "quick_gelu": {json.dumps(quick_gelu)}'
    raise UserError(
        f"The weights {pretrained!r} were trained with {theirs} and --model {name} computes {ours}, so all results "
        f"would be wrong. Use --model {right}."
    )


def models_like(visual: Mapping[str, Tensor]) -> str:
    """The end of a sentence that names open_clip's models whose image tower has these shapes; "" if there are none.

    Args:
        visual: the tensors of an image tower, by names without ``visual.``.
    """
    if any(name.startswith("layer1.") for name in visual):
        return ": they are a ResNet's, which cannot be trained"
    dimensions = {name: visual[name].dim() for name in ("conv1.weight", "positional_embedding") if name in visual}
    if dimensions != {"conv1.weight": 4, "positional_embedding": 2}:
        return ""
    width, _, patch, _ = visual["conv1.weight"].shape
    blocks = len({name.split(".")[2] for name in visual if name.startswith("transformer.resblocks.")})
    shape = (width, blocks, patch, len(visual["positional_embedding"]))
    near = []
    for name in model_names():
        config = model_config(name)
        if config and not _why_not(config):
            vision = {**VISION_DEFAULTS, **config["vision_cfg"]}
            tokens = (image_size_of(config) // vision["patch_size"]) ** 2 + 1
            if (vision["width"], vision["layers"], vision["patch_size"], tokens) == shape:
                near.append(name)
    return f": its shapes are those of {', '.join(near)}" if near else ""
