"""open_clip model configurations: how they are read, which of them can be trained here, and when two compute the same.

torch and open_clip are imported only where a function needs them: a launcher checks the configuration of a model file
without the seconds that they take.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfmask.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

HUB_CONFIG = "open_clip_config.json"
"""What open_clip calls the configuration in a Hugging Face repository."""

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
"""Settings without effect on the features of a ViT that pools by its class token. Patch dropout is one of training."""


_OLD_TEXT_NAMES = {"proj": "hf_proj_type", "pooler_type": "hf_pooler_type"}
"""Settings of text_cfg as they were called when the first repositories were written."""


def read_config(name: str) -> dict[str, Any]:
    """An open_clip model configuration (``embed_dim``, ``vision_cfg``, ``quick_gelu`` …).

    Args:
        name: open_clip's name of a model; or the path of a .json file, either a model configuration or the
            open_clip_config.json of a Hugging Face repository, whose ``preprocess_cfg`` is kept.

    Raises:
        UserError: open_clip has no such model, or the file is not a configuration.
    """
    refuse_repository("--model", name)
    if name.endswith(".json"):
        try:
            return parse_config(Path(name).read_bytes(), name)
        except OSError as error:
            raise UserError(f"No model configuration can be read from {name}: {error.strerror}.") from error
    import open_clip  # takes seconds

    if config := open_clip.get_model_config(name):
        return config
    listed = [known for known in open_clip.list_models() if known.startswith("ViT-B-")]
    near = [known for known in listed if not _why_not(open_clip.get_model_config(known))]
    raise UserError(
        f"There is no model {name!r}: it is neither one of open_clip's nor the path of a model configuration "
        f"(.json). Some of open_clip's: {', '.join(near[:12])}; all: open_clip.list_models()."
    )


def parse_config(text: str | bytes, source: str) -> dict[str, Any]:
    """A model configuration from the text of a file, as ``read_config`` returns it.

    Args:
        source: where the text comes from, in words that begin a sentence.

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
            f"model_cfg, if it is an {HUB_CONFIG}). Correct it; or, if it lies beside weights that it is not about, "
            "move it away."
        )
    return config


def refuse_repository(flag: str, value: str) -> None:
    """Refuse open_clip's names of Hugging Face repositories and their folders. Raises UserError."""
    if value.startswith(("hf-hub:", "local-dir:")):
        raise UserError(
            f"{flag} {value}: give the files of the repository in its place: the path of its {HUB_CONFIG} with "
            "--model, and the path of its weights with --pretrained. (On a machine with network access, `hf download "
            "OWNER/NAME` gets both.)"
        )


def check_trainable(name: str, config: Mapping[str, Any]) -> None:
    """Refuse a model whose image tower cannot be trained here, by its configuration alone.

    Raises:
        UserError: one sentence that says why, and what to choose.
    """
    if reason := _why_not(config):
        raise UserError(
            f"The model {name} cannot be trained: {reason}. Relevance is read from the class token's row of softmax "
            "attention maps, so the image tower must be open_clip's VisionTransformer with class-token pooling and "
            "square images: choose one, for example ViT-B-32-quickgelu."
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
        return f"vision_cfg has settings that are not known here ({', '.join(unknown)})"
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
    """Of a square that open_clip gives as a number or as (height, width); None if it is not one."""
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


def vision_differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """In what two configurations' image towers differ, as "vision_cfg.layers (12 and 24)"; empty if they compute the
    same. A setting that is not given has open_clip's default."""
    return _differences(_vision_of(ours), _vision_of(theirs))


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
    """All settings but the idle ones. One that is not known here, of a newer open_clip, counts if it is on."""
    unknown = {name: value for name, value in given.items() if name not in defaults and name not in idle and value}
    return {**{name: given.get(name, default) for name, default in defaults.items()}, **unknown}


def text_differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """The same for the text towers and their tokenizers. Imports open_clip."""
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
    """Refuse weights that were trained with the other activation than the model computes.

    Args:
        name, config: of the model.
        quick_gelu: what the weights were trained with; None: unknown.
        remedy: a sentence, where the model is not a flag's; None: to use another --model.

    Raises:
        UserError: naming the model to use, or with the remedy.
    """
    if quick_gelu is None or quick_gelu == bool(config.get("quick_gelu", False)):
        return
    theirs, ours = ("QuickGELU", "GELU") if quick_gelu else ("GELU", "QuickGELU")
    if remedy is not None:
        raise UserError(f"The weights {pretrained!r} were trained with {theirs} and {name} computes {ours}. {remedy}")
    import open_clip

    right = f"{name}-quickgelu" if quick_gelu else name.removesuffix("-quickgelu")
    if right not in open_clip.list_models():
        right = f'a configuration (.json) with "quick_gelu": {json.dumps(quick_gelu)}'
    raise UserError(
        f"The weights {pretrained!r} were trained with {theirs} and --model {name} computes {ours}: every number would "
        f"be wrong. Use --model {right}."
    )


def models_like(visual: Mapping[str, Tensor]) -> str:
    """Which of open_clip's models have an image tower of these shapes, in words that end a sentence; "" if none has.

    Args:
        visual: an image tower's tensors, without ``visual.``.
    """
    import open_clip

    if any(name.startswith("layer1.") for name in visual):
        return ": they are a ResNet's, which cannot be trained"
    dimensions = {name: visual[name].dim() for name in ("conv1.weight", "positional_embedding") if name in visual}
    if dimensions != {"conv1.weight": 4, "positional_embedding": 2}:
        return ""
    width, _, patch, _ = visual["conv1.weight"].shape
    blocks = len({name.split(".")[2] for name in visual if name.startswith("transformer.resblocks.")})
    shape = (width, blocks, patch, len(visual["positional_embedding"]))
    near = []
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        if not _why_not(config):
            vision = {**VISION_DEFAULTS, **config["vision_cfg"]}
            tokens = (image_size_of(config) // vision["patch_size"]) ** 2 + 1
            if (vision["width"], vision["layers"], vision["patch_size"], tokens) == shape:
                near.append(name)
    return f": its shapes are those of {', '.join(near)}" if near else ""
