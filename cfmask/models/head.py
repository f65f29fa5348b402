"""Model files, the zero-shot head, and where a run's first weights come from.

A **model file** is one safetensors file: ``visual.*`` (open_clip's names), ``head.weight`` (classes, D),
``head.bias`` (classes,), and metadata: what it is a model of, and for which classes. Every tool reads and
writes it. The header can be read without torch, so a launcher can refuse a wrong head before a job is queued.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfmask.errors import UserError
from cfmask.files import replace_tensors, sha256_of
from cfmask.models.weights import check_activation, find_weights, read_config, read_safetensors, read_weights

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
    config, preprocess = _config_and_preprocessing(name, pretrained)
    return ModelInfo(
        name=name,
        config=config,
        mean=tuple(preprocess.get("mean") or OPENAI_MEAN),
        std=tuple(preprocess.get("std") or OPENAI_STD),
        classes=tuple(classes),
        provenance=provenance,
    )


def _config_and_preprocessing(name: str, pretrained: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A model's configuration, and how its images are made ready (``mean``, ``std``, ``interpolation``,
    ``resize_mode``), as far as its tag or its file says."""
    preprocess: dict[str, Any] = {}
    if not name.endswith(".json"):
        # Not above: it takes seconds, and submit.py needs it for a name only.
        import open_clip

        preprocess = open_clip.pretrained.get_pretrained_cfg(name, pretrained)
    config = read_config(name)
    own = config.pop("preprocess_cfg", None)
    return config, preprocess or own or {}


def warn_of_preprocessing(name: str, pretrained: str) -> None:
    """Warn of weights that were trained on images made ready in another way than cfmask's, which is the paper's: the
    short side resized bicubically, the centre cropped. Not refused: a model that is fine-tuned gets used to it."""
    _, preprocess = _config_and_preprocessing(name, pretrained)
    how = [
        words
        for key, ours, words in (
            (
                "resize_mode",
                "shortest",
                f"their size changed by {preprocess.get('resize_mode')!r}, not of the short side",
            ),
            ("interpolation", "bicubic", f"{preprocess.get('interpolation')} interpolation, not bicubic"),
        )
        if preprocess.get(key, ours) != ours
    ]
    if how:
        warnings.warn(
            f"The weights {pretrained!r} of {name} were trained on images made ready in another way than cfmask's: "
            f"{'; '.join(how)}. cfmask resizes the short side bicubically and crops the centre, so zero-shot "
            "accuracies will differ from published ones.",
            stacklevel=3,
        )


def build_tower(info: ModelInfo) -> nn.Module:
    """An image tower of this kind with fresh weights."""
    from open_clip.model import _build_vision_tower

    return _build_vision_tower(
        info.config["embed_dim"], info.config["vision_cfg"], quick_gelu=info.config.get("quick_gelu", False)
    )


def save_model(path: str | Path, model: Classifier, info: ModelInfo) -> None:
    """Write a model file: a reader finds a whole one or none. Raises OSError."""
    path = Path(path)
    if len(info.classes) != model.head.out_features:
        raise ValueError(f"{len(info.classes)} class names for a head of {model.head.out_features} classes")
    replace_tensors(path, model.state_dict(), info.to_metadata())


def load_model(path: str | Path) -> tuple[Classifier, ModelInfo]:
    """The tower and head in a model file, in fp32 on the CPU.

    Raises:
        UserError: no such file, not a model file, or one without a head.
    """
    from torch import nn

    from cfmask.models.tower import Classifier

    info = read_info(path)
    if info is None or not info.classes:
        raise UserError(
            f"{path} is not a cfmask model file with a head. cfmask writes one to RUN/model.safetensors and in "
            "every checkpoint folder."
        )
    state = read_safetensors(path)
    try:
        model = Classifier(build_tower(info), nn.Linear(info.config["embed_dim"], len(info.classes)))
        model.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(
            f"{path} is not what its header says, a {info.name} with {len(info.classes)} classes: "
            f"{str(error).splitlines()[-1].strip()}"
        ) from error
    return model, info


def initial_model(
    name: str,
    pretrained: str,
    head: str | None,
    classes: Sequence[tuple[str, str]],
    device: str = "cpu",
    *,
    templates: Sequence[str] = (),
    keep_head: bool = False,
    kept_rows: Path | None = None,
) -> tuple[Classifier, ModelInfo]:
    """The model that a run starts from: pre-trained tower, and a head for these classes. One with a zero-shot head is
    described by ``zero_shot_info``, before it is made.

    Args:
        name, pretrained, head: as the fields of recipe.Model say.
        classes: (wnid, display name) in the order of class ids.
        device: where a zero-shot head is computed; the model comes back on the CPU.
        templates, kept_rows: of a zero-shot head, as in ``zero_shot_weight``; no templates: the 80 of OpenAI.
        keep_head: take the head in a checkpoint that does not say of which classes it is: of these, in this order.

    Raises:
        UserError: weights that cannot be had (it says which file to put where), that belong to another model,
            that need QuickGELU where the model has GELU, or a head for other classes.
    """
    import torch
    from torch import nn

    from cfmask.models.tower import Classifier

    own = read_info(pretrained) if os.path.exists(pretrained) else None
    info = replace(
        own if own is not None else model_info(name, pretrained),
        name=name,
        classes=tuple(wnid for wnid, _ in classes),
        class_names=tuple(display for _, display in classes),
    )
    foreign_head = None
    if own is not None:
        check_architecture(own, model_info(name), pretrained)
        state = read_safetensors(pretrained)
    else:
        warn_of_preprocessing(name, pretrained)
        state, foreign_head, quick_gelu = read_weights(find_weights(name, pretrained))
        check_activation(name, info.config, pretrained, quick_gelu)

    tower = build_tower(info)
    visual = {key.removeprefix("visual."): value for key, value in state.items() if key.startswith("visual.")}
    try:
        tower.load_state_dict({key: value.float() for key, value in visual.items()})
    except RuntimeError as error:
        raise UserError(
            f"The weights in {pretrained} are not those of the image tower of {name}: {str(error).splitlines()[-1]}. "
            f"Choose the --model that they were made with{_models_like(visual)}."
        ) from error

    if head is not None or "head.weight" in state:
        weight, bias = _head_from_file(head or pretrained, info.classes)
        if head is not None:
            tower_from = info.provenance or Path(pretrained).name
            info = replace(info, provenance=f"{tower_from}; head of {Path(head).name}")
    elif keep_head:
        weight, bias = _foreign_head(foreign_head, pretrained, len(classes))
        info = replace(info, provenance=f"{_origin(name, pretrained)}; its own head")
    elif foreign_head is not None:
        raise UserError(
            f"{pretrained} has a head of {len(foreign_head[0])} classes and does not say which they are. Say so: "
            f"python tools/build_head.py --model {name} --pretrained {pretrained} --keep-head --classes LIST --out FILE"
            " makes a model file to start from. Or give another head with --head."
        )
    else:
        templates = templates or openai_templates()
        info = replace(info, provenance=_zero_shot_provenance(name, pretrained, templates))
        weight = zero_shot_weight(info, state, templates, device, kept_rows=kept_rows)
        bias = torch.zeros(len(classes))
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        linear.weight.copy_(weight)
        linear.bias.copy_(bias)
    return Classifier(tower, linear), info


def _foreign_head(head: tuple[Tensor, Tensor] | None, path: str, classes: int) -> tuple[Tensor, Tensor]:
    if head is None:
        raise UserError(f"{path} has no head that could be kept: neither classification_head.weight nor head.weight.")
    weight, bias = head
    if weight.dim() != 2 or bias.shape != weight.shape[:1] or len(weight) != classes:
        raise UserError(
            f"The head in {path} has weights of shape {tuple(weight.shape)} and a bias of shape {tuple(bias.shape)}, "
            f"the class list has {classes} classes. Give the list that the head was trained on, in its order."
        )
    return weight.float(), bias.float()


def _models_like(visual: Mapping[str, Tensor]) -> str:
    """Which of open_clip's models have a tower of these shapes, in words that end a sentence."""
    import open_clip

    if "conv1.weight" not in visual or "positional_embedding" not in visual:
        return ""
    width, _, patch, _ = visual["conv1.weight"].shape
    blocks = len({key.split(".")[2] for key in visual if key.startswith("transformer.resblocks.")})
    shape = (width, blocks, patch, len(visual["positional_embedding"]))
    near = []
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)["vision_cfg"]
        if "timm_model_name" not in config and isinstance(size := config.get("image_size", 224), int):
            size_of_patch = config.get("patch_size") or 16
            tokens = (size // size_of_patch) ** 2 + 1
            if (config.get("width", 768), config.get("layers", 12), size_of_patch, tokens) == shape:
                near.append(name)
    return f": its shapes are those of {', '.join(near)}" if near else ""


def check_head(path: str | Path, wnids: Sequence[str], *, than: str = "the shards") -> None:
    """Refuse a head for other classes than the data's, or another model's. Reads the file's header only.

    Args:
        than: whose classes ``wnids`` are.

    Raises:
        UserError: another number of classes, or the same in another order.
    """
    info = read_info(path)
    if info is None or not info.classes:
        raise UserError(f"{path} holds no head: it is not a cfmask model file. Leave --head out to build one.")
    if len(info.classes) != len(wnids):
        raise UserError(
            f"The head in {path} has {len(info.classes)} classes, {than} {len(wnids)}. Use the head that was built for "
            "this class list, or leave --head out to build one."
        )
    for row, (ours, theirs) in enumerate(zip(info.classes, wnids, strict=True)):
        if ours != theirs:
            raise UserError(
                f"The head in {path} has another class order than {than}: row {row} is {ours}, class {row} of {than} "
                f"is {theirs}. Use the head that was built for this class list."
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


def check_same_kind(other: ModelInfo | None, own: ModelInfo | None, path: str, *, than: str = "the shards") -> None:
    """Refuse a model whose features, logits or input would not mean what another one's do (``own``: a run's).

    Args:
        than: as in ``check_head``.

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
    check_head(path, own.classes, than=than)


def _head_from_file(path: str, wnids: Sequence[str]) -> tuple[Tensor, Tensor]:
    check_head(path, wnids)
    state = read_safetensors(path)
    return state["head.weight"].float(), state["head.bias"].float()


# ---------------------------------------------------------------------------------------------------------
# The zero-shot head


def build_clip(info: ModelInfo, state: Mapping[str, Tensor]) -> nn.Module:
    """An open_clip CLIP of this kind with these weights, in fp32; what else is in ``state`` is left out.

    Raises:
        UserError: no text tower, or another model's.
    """
    from open_clip.model import CLIP, CustomTextCLIP, convert_to_custom_text_state_dict

    config = {key: value for key, value in info.config.items() if key != "custom_text"}
    if "text_cfg" not in config or "multimodal_cfg" in config:
        raise UserError(
            f"{info.name} is no CLIP with an image and a text tower: no zero-shot head can be built from it."
        )
    custom = info.config.get("custom_text") or "hf_model_name" in config["text_cfg"]
    try:
        model = (CustomTextCLIP if custom else CLIP)(**config)
    except Exception as error:  # a text tower of another package, which may be missing, or want the network
        raise UserError(
            f"The text tower of {info.name} cannot be built ({type(error).__name__}: "
            f"{(str(error).splitlines() or [''])[0][:160]})."
        ) from error
    given: dict[str, Tensor] = convert_to_custom_text_state_dict(dict(state)) if custom else dict(state)
    parts = model.state_dict()
    if missing := [key for key in parts if key not in given]:
        raise UserError(
            f"The weights lack {missing[0]} ({len(missing)} of {len(parts)} tensors) of the CLIP {info.name}: "
            + ("they are another model's." if _has_text_tower(given) else "they hold no text tower.")
        )
    try:
        # () or (1,), between versions of open_clip
        given["logit_scale"] = given["logit_scale"].reshape(parts["logit_scale"].shape)
        model.load_state_dict({key: given[key].float() for key in parts})
    except RuntimeError as error:
        raise UserError(
            f"The weights are not those of the CLIP {info.name}: {str(error).splitlines()[-1].strip()}"
        ) from error
    return model.eval()


def _has_text_tower(state: Mapping[str, Tensor]) -> bool:
    return any(key.startswith(("transformer.", "text.")) for key in state)


def build_tokenizer(info: ModelInfo) -> Any:
    """open_clip's tokenizer for this model's text tower.

    Raises:
        UserError: one of Hugging Face's, which cannot be had here.
    """
    import open_clip

    text = info.config["text_cfg"]
    options = {"context_length": text.get("context_length", 77), **text.get("tokenizer_kwargs", {})}
    if not text.get("hf_tokenizer_name"):
        return open_clip.SimpleTokenizer(**options)
    try:
        return open_clip.HFTokenizer(text["hf_tokenizer_name"], tokenizer_mode=text.get("tokenizer_mode"), **options)
    except Exception as error:  # no transformers, no network
        raise UserError(
            f"{info.name} needs the tokenizer {text['hf_tokenizer_name']} of Hugging Face, which cannot be had "
            f"({type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}). It takes "
            "`pip install transformers` and, the first time, the network."
        ) from error


def openai_templates() -> tuple[str, ...]:
    """The 80 templates that OpenAI chose on ImageNet, with {} for the class's name."""
    import open_clip

    return tuple(template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES)


def read_templates(path: Path) -> tuple[str, ...]:
    """Templates from a file: a sentence a line, with {} where the class's name goes.

    Raises:
        UserError: no such file, none in it, or a line without {} or with two.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The templates {path} cannot be read ({error}).") from error
    for number, line in enumerate(lines, 1):
        if line.strip() and line.count("{}") != 1:
            raise UserError(
                f"{path}, line {number}: a template has one {{}} where the class's name goes, not {line!r}."
            )
    templates = tuple(line.strip() for line in lines if line.strip())
    if not templates:
        raise UserError(f"{path} holds no templates: a sentence a line, with {{}} where the class's name goes.")
    return templates


def zero_shot_info(
    name: str, pretrained: str, classes: Sequence[tuple[str, str]], templates: Sequence[str]
) -> ModelInfo:
    """What ``initial_model`` says of a model whose head is zero-shot: two that say the same are the same.

    Raises:
        UserError: as ``model_info`` and ``find_weights``.
    """
    return replace(
        model_info(name, pretrained),
        classes=tuple(wnid for wnid, _ in classes),
        class_names=tuple(display for _, display in classes),
        provenance=_zero_shot_provenance(name, pretrained, templates),
    )


def _origin(name: str, pretrained: str) -> str:
    return f"{Path(pretrained).name} (sha256 {sha256_of(find_weights(name, pretrained))[:16]})"


def _zero_shot_provenance(name: str, pretrained: str, templates: Sequence[str]) -> str:
    import open_clip

    digest = hashlib.sha256("\n".join(templates).encode()).hexdigest()[:16]
    return (
        f"{_origin(name, pretrained)}; zero-shot head, {len(templates)} templates (sha256 {digest}), by open_clip "
        f"{open_clip.__version__}"
    )


# How many go through the text tower together; a head is the same to the bit wherever it was interrupted.
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
    """Rows of the zero-shot head (classes, D), fp32: each class's name in every template through the text tower, each
    text normalised, averaged, normalised again, times exp(logit_scale). The computation is open_clip's own.

    Args:
        info: with the classes' names, and a provenance that tells these weights and templates from others.
        state: of the whole CLIP.
        templates: sentences with a {} for the name.
        kept_rows: a file in which finished rows are kept, so that the same call goes on after being stopped. It is
            left there, to be removed when the head is safe. Nobody else may write to it.

    Raises:
        UserError: the checkpoint has no text tower, or another model's.
    """
    import open_clip
    import torch
    from tqdm import tqdm

    if not _has_text_tower(state):
        raise UserError(
            "The checkpoint has an image tower only, so no zero-shot head can be built from it. Give a head with "
            "--head, or a whole CLIP checkpoint with --pretrained."
        )
    clip: Any = build_clip(info, state).to(device)
    tokenizer = build_tokenizer(info)
    # Not str.format, which open_clip would use: a template is data, and {0.__class__} is code.
    sentences = [lambda name, template=template: template.replace("{}", name) for template in templates]
    rows = _read_rows(kept_rows, info)
    saved = time.monotonic()
    with tqdm(
        total=len(info.classes), initial=len(rows), desc="zero-shot head", unit="class", dynamic_ncols=True
    ) as bar:
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
    """Where that fails it is a warning: they are computed again if they are needed again."""
    try:
        replace_tensors(path, {"rows": rows}, info.to_metadata())
    except OSError as error:
        print(f"warning: {path} cannot be written ({error.strerror}); the head is built on", flush=True)


def _read_rows(path: Path | None, info: ModelInfo) -> Tensor:
    """The rows of this very head that are in a file; none if there is no such file, or it is another head's."""
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
