"""The zero-shot head: features of class names by the text tower of a CLIP."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfmask.errors import UserError
from cfmask.models.head import ModelInfo, read_info
from cfmask.runtime.progress import progress_bar
from cfmask.runtime.tensor_files import replace_tensors

if TYPE_CHECKING:  # torch takes seconds to import
    from torch import Tensor, nn

logger = logging.getLogger(__name__)


def build_clip(info: ModelInfo, state: Mapping[str, Tensor]) -> nn.Module:
    """An open_clip CLIP with these weights, in fp32. Other tensors in ``state`` are ignored.

    Raises:
        UserError: no text tower, or that of another model.
    """
    model = _fresh_clip(info)
    parts = model.state_dict()
    given = _parts_of_clip(info, parts, state)
    # () or (1,), between versions of open_clip
    model.load_state_dict({key: given[key].float().reshape(parts[key].shape) for key in parts})
    return model.eval()


def check_text_tower(info: ModelInfo, shapes: Mapping[str, Tensor]) -> None:
    """Raises UserError if no zero-shot head can be built from a checkpoint: it has no text tower or that of another
    model, or its tokenizer or package is missing.

    Args:
        shapes: its tensors, which may be on the meta device.
    """
    import torch

    if not _has_text_tower(shapes):
        raise UserError(
            "The checkpoint has an image tower only, so no zero-shot head can be built from it. Give a head with "
            "--head, or a whole CLIP checkpoint with --pretrained. Or make a model file with a head of class means: "
            "python tools/build_head.py --class-means shards/train, with the same --model and --pretrained."
        )
    with torch.device("meta"):
        parts = _fresh_clip(info).state_dict()
    build_tokenizer(info)
    _parts_of_clip(info, parts, shapes)


def _fresh_clip(info: ModelInfo) -> nn.Module:
    from open_clip.model import CLIP, CustomTextCLIP

    config = {key: value for key, value in info.config.items() if key != "custom_text"}
    if not isinstance(config.get("text_cfg"), dict) or "multimodal_cfg" in config:
        raise UserError(
            f"{info.name} is not a CLIP with an image and a text tower, so no zero-shot head can be built from it. "
            "Give a head with --head."
        )
    # Its weights are in the checkpoint and not downloaded.
    config["text_cfg"] = {**config["text_cfg"], "hf_model_pretrained": False}
    try:
        return (CustomTextCLIP if _has_custom_text(info) else CLIP)(**config)
    except Exception as error:  # a text tower of another package, which may be missing or need the network
        raise UserError(
            f"The text tower of {info.name} cannot be built ({type(error).__name__}: "
            f"{(str(error).splitlines() or [''])[0][:160]}). Give a head with --head."
        ) from error


def _has_custom_text(info: ModelInfo) -> bool:
    return bool(info.config.get("custom_text")) or "hf_model_name" in info.config["text_cfg"]


def _parts_of_clip(info: ModelInfo, parts: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a checkpoint by the names in a CLIP, ``parts``.

    Raises:
        UserError: one is missing, or has another shape.
    """
    from open_clip.model import convert_to_custom_text_state_dict

    given = dict(state)
    if _has_custom_text(info):
        given = convert_to_custom_text_state_dict(given)
    elif "positional_embedding" not in given:  # a CLIP that was saved as open_clip's CustomTextCLIP, force_custom_text
        given = {key.removeprefix("text."): value for key, value in given.items()}
    if missing := [key for key in parts if key not in given]:
        raise UserError(
            f"The weights lack {missing[0]} ({len(missing)} of {len(parts)} tensors) of the CLIP {info.name}: "
            + ("they are those of another model. " if _has_text_tower(state) else "they have no text tower. ")
            + "Give the --model that they were made with, or a head with --head."
        )
    for key, part in parts.items():
        if part.is_floating_point() and not given[key].is_floating_point():
            raise UserError(
                f"The weights have {key} as {str(given[key].dtype).removeprefix('torch.')}: the text tower is "
                "quantised, and no zero-shot head can be built from it. Use the weights from which it was made."
            )
        if given[key].shape != part.shape and not part.numel() == given[key].numel() == 1:
            raise UserError(
                f"The weights are not those of the CLIP {info.name}: {key} has the shape {tuple(given[key].shape)}, "
                f"the model's {tuple(part.shape)}."
            )
    return given


def _has_text_tower(state: Mapping[str, Tensor]) -> bool:
    return any(key.startswith(("transformer.", "text.")) for key in state)


def build_tokenizer(info: ModelInfo) -> Any:
    """open_clip's tokenizer for this model's text tower.

    Raises:
        UserError: one of Hugging Face's that is not available here.
    """
    import open_clip

    text = info.config["text_cfg"]
    options = {"context_length": text.get("context_length", 77), **(text.get("tokenizer_kwargs") or {})}
    if not text.get("hf_tokenizer_name"):
        return open_clip.SimpleTokenizer(**options)
    try:
        return open_clip.HFTokenizer(text["hf_tokenizer_name"], tokenizer_mode=text.get("tokenizer_mode"), **options)
    except Exception as error:  # no transformers, no network
        raise UserError(
            f"{info.name} needs the tokenizer {text['hf_tokenizer_name']} of Hugging Face, which is not available "
            f"({type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}). It needs "
            "`pip install transformers` and, the first time, the network."
        ) from error


def openai_templates() -> tuple[str, ...]:
    """OpenAI's 80 templates for ImageNet, with {} for the class name."""
    import open_clip

    return tuple(template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES)


def read_templates(path: Path) -> tuple[str, ...]:
    """Templates from a file: one sentence per line, with {} for the class name.

    Raises:
        UserError: a missing or empty file, or a line that does not have exactly one {}.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The templates {path} cannot be read ({error}).") from error
    for number, line in enumerate(lines, 1):
        if line.strip() and line.count("{}") != 1:
            raise UserError(
                f"{path}, line {number}: a template must have exactly one {{}}, for the class name; this is {line!r}."
            )
    templates = tuple(line.strip() for line in lines if line.strip())
    if not templates:
        raise UserError(f"{path} holds no templates. Write one sentence per line, with {{}} for the class name.")
    return templates


# Batches of fixed size make a head bitwise identical for every interruption.
_CLASSES_AT_A_TIME = 10
_KEEP_EVERY_S = 5


def zero_shot_weight(
    info: ModelInfo,
    state: Mapping[str, Tensor],
    templates: Sequence[str],
    device: str = "cpu",
    *,
    kept_rows: Path | None = None,
) -> Tensor:
    """Rows of the zero-shot head (classes, D), fp32. For each class, the text features of its name in every template
    are normalised, averaged, normalised again, and multiplied by exp(logit_scale). open_clip computes them.

    Args:
        info: with class names, and a provenance that identifies the weights and templates.
        state: of the whole CLIP.
        templates: sentences with {} for the class name.
        kept_rows: a file for finished rows, from which an interrupted call is resumed. The caller removes it once the
            head is saved. No other process may write to it.

    Raises:
        UserError: as ``build_clip``.
    """
    import open_clip
    import torch

    clip: Any = build_clip(info, state).to(device)
    tokenizer = build_tokenizer(info)
    # Not str.format, as open_clip does: in a template from a file, {0.__class__} would be evaluated.
    sentences = [lambda name, template=template: template.replace("{}", name) for template in templates]
    rows = _read_rows(kept_rows, info)
    saved = time.monotonic()
    with progress_bar(total=len(info.classes), initial=len(rows), desc="zero-shot head", unit=" classes") as bar:
        try:
            while len(rows) < len(info.classes):
                names = info.class_names[len(rows) : len(rows) + _CLASSES_AT_A_TIME]
                with torch.no_grad():
                    weight = open_clip.build_zero_shot_classifier(clip, tokenizer, names, sentences, None, device)
                    rows = torch.cat([rows, (weight.T * clip.logit_scale.exp()).float().cpu()])
                bar.update(len(names))
                if kept_rows is not None and time.monotonic() - saved > _KEEP_EVERY_S:
                    _keep_rows(kept_rows, rows, info)
                    saved = time.monotonic()
        finally:
            if kept_rows is not None and len(rows):
                _keep_rows(kept_rows, rows, info)
    return rows


def _keep_rows(path: Path, rows: Tensor, info: ModelInfo) -> None:
    """Save finished rows. A failure is only a warning: the rows can be computed again."""
    try:
        replace_tensors(path, {"rows": rows}, info.to_metadata())
    except OSError as error:
        logger.warning(f"{path} cannot be written ({error.strerror}); building the head continues")


def _read_rows(path: Path | None, info: ModelInfo) -> Tensor:
    """The saved rows of this head; none if the file is missing or that of another head."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    none = torch.empty(0, info.config["embed_dim"])
    if path is None or not path.exists() or read_info(path) != info:
        return none
    try:
        return load_file(path)["rows"]
    except (SafetensorError, KeyError):
        return none
