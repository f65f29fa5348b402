"""Model files, the zero-shot head, and where a run's first weights come from.

A **model file** is one safetensors file: ``visual.*`` (open_clip's names), ``head.weight`` (classes, D),
``head.bias`` (classes,), and metadata: what it is a model of, and for which classes. Every tool reads and
writes it. The header can be read without torch, so a launcher can refuse a wrong head before a job is queued.
"""

from __future__ import annotations

import json
import os
import struct
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfmask.errors import UserError
from cfmask.files import save_tensors
from cfmask.models.torchscript import read_torchscript

if TYPE_CHECKING:  # torch takes seconds to import, and a header needs none of it
    from torch import Tensor, nn

    from cfmask.models.tower import Classifier

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
"""open_clip.OPENAI_DATASET_MEAN and _STD, without the seconds that open_clip takes to import."""


@dataclass(frozen=True)
class ModelInfo:
    """Metadata of a model file.

    config: the open_clip model configuration (``embed_dim``, ``vision_cfg``, ``quick_gelu`` …).
    mean, std: of the tower's input, per channel, for pixels in 0…1.
    classes: class folder names (wnids) in the order of the head's rows; empty when there is no head.
    class_names: what people call them, in the same order; may be empty.
    provenance: how the weights came to be.
    """

    name: str
    config: dict[str, Any]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()
    provenance: str = ""

    def to_metadata(self) -> dict[str, str]:
        return {"format": "pt", "cfmask": json.dumps(self.__dict__, sort_keys=True)}


def read_info(path: str | Path) -> ModelInfo | None:
    """The metadata of a model file; None for a file that is not one of ours. Reads the header only.

    Raises:
        UserError: there is no such file.
    """
    try:
        with open(path, "rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            if length > os.path.getsize(path):
                return None
            meta = json.loads(file.read(length)).get("__metadata__", {})
        values = json.loads(meta["cfmask"])
    except OSError as error:
        raise UserError(f"No model can be read from {path}: {error.strerror}. Check the path.") from error
    except (struct.error, ValueError, KeyError, AttributeError):
        return None
    tuples: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return ModelInfo(**tuples)


def model_info(name: str, pretrained: str = "", classes: Sequence[str] = (), provenance: str = "") -> ModelInfo:
    """What a model of this name is: an open_clip name, or the path of a configuration file.

    Mean and standard deviation are those of the ``pretrained`` tag where it has its own, as in open_clip.

    Raises:
        UserError: open_clip knows no such model, or the file is no configuration.
    """
    if name.endswith(".json"):
        config = _read_config(Path(name))
        preprocess: dict[str, Any] = {}
    else:
        # Not above: it takes seconds, and submit.py needs it for a name only.
        import open_clip

        config = open_clip.get_model_config(name)
        preprocess = open_clip.pretrained.get_pretrained_cfg(name, pretrained)
    if config is None or "vision_cfg" not in config:
        import open_clip

        near = [known for known in open_clip.list_models() if known.startswith("ViT-B-")]
        raise UserError(
            f"There is no model {name!r}: it is neither one of open_clip's nor the path of a model configuration "
            f"(.json). Some of open_clip's: {', '.join(near[:12])}; all: open_clip.list_models()."
        )
    preprocess = preprocess or config.get("preprocess_cfg") or {}
    return ModelInfo(
        name=name,
        config=config,
        mean=tuple(preprocess.get("mean") or OPENAI_MEAN),
        std=tuple(preprocess.get("std") or OPENAI_STD),
        classes=tuple(classes),
        provenance=provenance,
    )


def _read_config(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"No model configuration can be read from {path}: {error.strerror}.") from error
    except ValueError as error:
        raise UserError(f"{path} is not a model configuration: it is not valid JSON ({error}).") from error


def build_tower(info: ModelInfo) -> nn.Module:
    """An image tower of this kind with fresh weights."""
    from open_clip.model import _build_vision_tower

    return _build_vision_tower(
        info.config["embed_dim"], info.config["vision_cfg"], quick_gelu=info.config.get("quick_gelu", False)
    )


def save_model(path: str | Path, model: Classifier, info: ModelInfo) -> None:
    """Write a model file: aside first, then renamed, so that a reader finds a whole one or none."""
    path = Path(path)
    if len(info.classes) != model.head.out_features:
        raise ValueError(f"{len(info.classes)} class names for a head of {model.head.out_features} classes")
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_tensors(aside, model.state_dict(), info.to_metadata())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def load_model(path: str | Path) -> tuple[Classifier, ModelInfo]:
    """The tower and head in a model file, in fp32 on the CPU.

    Raises:
        UserError: no such file, not a model file, or one without a head.
    """
    from safetensors.torch import load_file
    from torch import nn

    from cfmask.models.tower import Classifier

    info = read_info(path)
    if info is None or not info.classes:
        raise UserError(
            f"{path} is not a cfmask model file with a head. cfmask writes one to RUN/model.safetensors and in "
            "every checkpoint folder."
        )
    state = load_file(path)
    classes, width = state["head.weight"].shape
    model = Classifier(build_tower(info), nn.Linear(width, classes))
    model.load_state_dict(state)
    return model, info


def initial_model(
    name: str,
    pretrained: str,
    head: str | None,
    classes: Sequence[tuple[str, str]],
    device: str = "cpu",
) -> tuple[Classifier, ModelInfo]:
    """The model that a run starts from: pre-trained tower, and a head for these classes.

    Args:
        name, pretrained, head: as the fields of recipe.Model say.
        classes: (wnid, display name) in the order of class ids.
        device: where a zero-shot head is computed; the model comes back on the CPU.

    Raises:
        UserError: weights that cannot be had (it says which file to put where), that belong to another model,
            that need QuickGELU where the model has GELU, or a head for other classes.
    """
    import torch
    from torch import nn

    from cfmask.models.tower import Classifier

    wnids = tuple(wnid for wnid, _ in classes)
    own = read_info(pretrained) if os.path.exists(pretrained) else None
    info = own if own is not None else model_info(name, pretrained)
    if own is not None:
        check_architecture(own, model_info(name), pretrained)
        from safetensors.torch import load_file

        state = load_file(pretrained)
    else:
        state = _image_and_text_state(name, pretrained)

    tower = build_tower(info)
    visual = {key.removeprefix("visual."): value for key, value in state.items() if key.startswith("visual.")}
    try:
        tower.load_state_dict({key: value.float() for key, value in visual.items()})
    except RuntimeError as error:
        raise UserError(
            f"The weights in {pretrained} are not those of the image tower of {name}: {str(error).splitlines()[-1]}. "
            "Choose the --model that they were made with."
        ) from error

    if head is not None or "head.weight" in state:
        weight, bias, origin = _head_from_file(head or pretrained, wnids)
    else:
        weight = zero_shot_weight(info, state, [display for _, display in classes], device)
        bias, origin = torch.zeros(len(classes)), "zero-shot head from the model's text tower"
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        linear.weight.copy_(weight)
        linear.bias.copy_(bias)
    model = Classifier(tower, linear)
    return model, replace(
        info,
        name=name,
        classes=wnids,
        class_names=tuple(display for _, display in classes),
        provenance=f"{pretrained}; {origin}",
    )


def check_head(path: str | Path, wnids: Sequence[str]) -> None:
    """Refuse a head for other classes than the data's. Reads the file's header only.

    Raises:
        UserError: another number of classes, or the same in another order.
    """
    info = read_info(path)
    if info is None or not info.classes:
        raise UserError(f"{path} holds no head: it is not a cfmask model file. Leave --head out to build one.")
    if len(info.classes) != len(wnids):
        raise UserError(
            f"The head in {path} has {len(info.classes)} classes, the shards have {len(wnids)}. Use the head that "
            "was built for this class list, or leave --head out to build one."
        )
    for row, (ours, theirs) in enumerate(zip(info.classes, wnids, strict=True)):
        if ours != theirs:
            raise UserError(
                f"The head in {path} has another class order than the shards: row {row} is {ours}, class {row} of "
                f"the shards is {theirs}. Use the head that was built for this class list."
            )


def check_architecture(own: ModelInfo, asked: ModelInfo, path: str) -> None:
    """Refuse a model file of another architecture than the one asked for.

    Raises:
        UserError: naming what differs.
    """
    for key in ("embed_dim", "vision_cfg", "quick_gelu"):
        ours, theirs = own.config.get(key) or False, asked.config.get(key) or False
        if ours != theirs:
            raise UserError(
                f"The weights in {path} belong to {own.name}, not to {asked.name}: they differ in {key} "
                f"({ours} and {theirs}). Give --model {own.name}."
            )


def check_same_kind(other: ModelInfo | None, own: ModelInfo | None, path: str) -> None:
    """Refuse a model whose features, logits or input would not mean what the run's own do.

    Raises:
        UserError: no model file with a head, another architecture, preprocessing or class list.
    """
    if other is None or not other.classes:
        raise UserError(f"{path} is not a cfmask model file with a head.")
    assert own is not None
    check_architecture(other, own, path)
    if (other.mean, other.std) != (own.mean, own.std):
        raise UserError(
            f"The model in {path} takes pixels with mean {other.mean} and standard deviation {other.std}, {own.name} "
            f"with {own.mean} and {own.std}: the same images would not be the same to both."
        )
    check_head(path, own.classes)


def _head_from_file(path: str, wnids: Sequence[str]) -> tuple[Tensor, Tensor, str]:
    from safetensors.torch import load_file

    check_head(path, wnids)
    state = load_file(path)
    return state["head.weight"].float(), state["head.bias"].float(), f"head of {path}"


# ---------------------------------------------------------------------------------------------------------
# open_clip's weights


def find_weights(name: str, pretrained: str) -> Path:
    """The checkpoint file of a tag (downloaded into open_clip's cache, where there is a network) or a path.

    Raises:
        UserError: no such file or tag, QuickGELU weights for a GELU model, or no way to get the file; it says
            which file to put where.
    """
    import open_clip
    from open_clip.pretrained import download_pretrained, get_pretrained_cfg, list_pretrained_tags_by_model

    if os.path.isfile(pretrained):
        return Path(pretrained)
    if os.sep in pretrained or Path(pretrained).suffix in (".pt", ".pth", ".bin", ".safetensors"):
        raise UserError(f"--pretrained {pretrained}: there is no such file. Check the path.")
    tag = get_pretrained_cfg(name, pretrained)
    if not tag:
        known = list_pretrained_tags_by_model(name)
        raise UserError(
            f"open_clip has no weights {pretrained!r} for {name}, and there is no such file. "
            + (f"Its tags: {', '.join(known)}." if known else "Give the path of a checkpoint.")
        )
    asked_quick = bool((open_clip.get_model_config(name) or {}).get("quick_gelu", False))
    if bool(tag.get("quick_gelu", False)) != asked_quick:
        _refuse_activation(name, pretrained, quick_weights=not asked_quick)
    try:
        return Path(download_pretrained(tag))
    except Exception as error:  # whatever the hub's client raises, the user's remedy is the same
        source = tag.get("hf_hub") or tag.get("url")
        raise UserError(
            f"The weights {pretrained!r} of {name} are not in the cache and could not be downloaded "
            f"({type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else 'no details'}). On a "
            f"machine with network access get {source} (for a Hugging Face repository its file "
            "open_clip_model.safetensors), copy it here, and give its path: --pretrained PATH."
        ) from error


def _refuse_activation(name: str, pretrained: str, *, quick_weights: bool) -> None:
    right = f"{name}-quickgelu" if quick_weights else name.removesuffix("-quickgelu")
    raise UserError(
        f"The weights {pretrained!r} were trained with {'QuickGELU' if quick_weights else 'GELU'} and --model {name} "
        f"computes {'GELU' if quick_weights else 'QuickGELU'}: every number would be wrong. Use --model {right}."
    )


def _image_and_text_state(name: str, pretrained: str) -> dict[str, Tensor]:
    """State dict of a whole CLIP, or of an image tower, in open_clip's names."""
    import torch

    path = find_weights(name, pretrained)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        elif _is_torchscript(path):  # OpenAI's own archives
            if not name.endswith("-quickgelu"):
                _refuse_activation(name, pretrained, quick_weights=True)
            state = read_torchscript(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{path} cannot be read as a checkpoint ({type(error).__name__}: {str(error).splitlines()[0][:160]}). "
            "It must be a safetensors file, a state dict saved by torch.save, or one of OpenAI's archives."
        ) from error
    state = state.get("state_dict", state)
    state = {key.removeprefix("module."): value for key, value in state.items()}
    if "conv1.weight" in state:  # an image tower on its own
        state = {f"visual.{key}": value for key, value in state.items()}
    if "visual.conv1.weight" not in state:
        raise UserError(
            f"{path} holds no open_clip image tower: there is no visual.conv1.weight among its {len(state)} tensors."
        )
    return state


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(entry.endswith("/constants.pkl") for entry in archive.namelist())


def zero_shot_weight(
    info: ModelInfo, state: dict[str, Tensor], display_names: Sequence[str], device: str = "cpu"
) -> Tensor:
    """Rows of the zero-shot head (classes, D): the 80 OpenAI ImageNet templates of each class through the text
    tower, each normalised, averaged, normalised again, times exp(logit_scale).

    Raises:
        UserError: the checkpoint has no text tower.
    """
    import open_clip
    import torch
    from open_clip.model import CLIP

    if not any(key.startswith("transformer.") for key in state):
        raise UserError(
            "The checkpoint has an image tower only, so no zero-shot head can be built from it. Give a head with "
            "--head, or a whole CLIP checkpoint with --pretrained."
        )
    config = {key: info.config[key] for key in ("embed_dim", "vision_cfg", "text_cfg")}
    model = CLIP(**config, quick_gelu=info.config.get("quick_gelu", False))
    kept = {key: value.float() for key, value in state.items() if key in model.state_dict()}
    missing = model.load_state_dict(kept, strict=False).missing_keys
    if [key for key in missing if not key.endswith("attn_mask")]:
        raise UserError(f"The checkpoint lacks {missing[0]} of the text tower of {info.name}: it is another model's.")
    model = model.eval().to(device)
    tokenizer = (
        open_clip.get_tokenizer(info.name)
        if not info.name.endswith(".json")
        else open_clip.SimpleTokenizer(context_length=info.config["text_cfg"].get("context_length", 77))
    )
    weight = open_clip.build_zero_shot_classifier(
        model,
        tokenizer,
        classnames=list(display_names),
        templates=open_clip.OPENAI_IMAGENET_TEMPLATES,
        num_classes_per_batch=10,
        device=device,
        use_tqdm=True,
    )
    with torch.no_grad():
        return (weight.T * model.logit_scale.exp()).float().cpu().contiguous()
