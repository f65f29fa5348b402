"""The initial model of a run: checks of its checkpoint, and the model that is made from it.

``check_initial_model`` checks everything that configurations and the headers of files can show. submit.py calls it
before a job is queued, and ``initial_model`` calls it before it reads the weights, so both refuse the same.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfmask.errors import UserError
from cfmask.models.architecture import (
    check_activation,
    check_trainable,
    image_size_of,
    read_config,
    text_differences,
    vision_differences,
)
from cfmask.models.head import ModelInfo, check_architecture, check_head, check_whole, read_info
from cfmask.models.preprocessing import (
    OPENAI,
    Preprocessing,
    Statement,
    config_statement,
    flags_statement,
    of_tags,
    resolve,
)
from cfmask.models.tower_weights import check_finite, check_tower, load_tower, resized_positions
from cfmask.models.weights import (
    Weights,
    config_above,
    config_beside,
    find_weights,
    is_path,
    read_safetensors,
    read_tag,
    read_weights,
)
from cfmask.runtime.files import sha256_of

if TYPE_CHECKING:  # torch takes seconds to import, and the check of a model file does not need it
    from torch import Tensor, nn

    from cfmask.models.tower import Classifier

Rgb = Sequence[float] | None


@dataclass(frozen=True)
class InitialWeights:
    """Initial weights that are not loaded yet."""

    info: ModelInfo
    """Of the model. Classes are those of the head in the file, if it is a cfmask model file."""
    path: Path
    shapes: Weights | None
    """The tensors of the file on the meta device; None for a cfmask model file, whose header has everything."""
    configs: Mapping[str, Mapping[str, Any]]
    """Configurations of the weights by source: open_clip_config.json beside them, or an entry by tools/export.py."""
    resize_positions: bool = False
    """Whether the positional embedding is interpolated to the model's image size."""


def model_info(
    name: str,
    pretrained: str = "",
    classes: Sequence[str] = (),
    provenance: str = "",
    *,
    mean: Rgb = None,
    std: Rgb = None,
    shapes: Weights | None = None,
    any_size: bool = False,
) -> ModelInfo:
    """Describe a model.

    Args:
        name: open_clip's name, or the path of a configuration file.
        pretrained: tag or path of its weights, which decide its preprocessing (preprocessing.py). Without weights, the
            preprocessing is that of the configuration, or OpenAI's.
        mean, std: values of the flags.
        shapes: the tensors of the file ``pretrained``, if they are known already.
        any_size: the weights may have been trained on images of another size than the model's.

    Raises:
        UserError: an unknown model, a file that is not a configuration, a model that cannot be trained here, or a
            preprocessing that is unknown, contradictory or not supported.
    """
    config = read_config(name)
    check_trainable(name, config)
    own = config.pop("preprocess_cfg", None)
    size = image_size_of(config)
    by_config, by_flags = config_statement(f"--model {name}", own, size), flags_statement(mean, std)
    if pretrained:
        what = f"the weights {pretrained!r} of {name}"
        weights_size = None if any_size else size
        by_weights = _of_weights(name, pretrained, weights_size, shapes)
        found = resolve([*by_weights, *by_config, *by_flags], what)
        if not any(said.resize for said in (*by_weights, *by_config)):
            quick_gelu = bool(config.get("quick_gelu"))
            agreed = of_tags(name, what, quick_gelu=quick_gelu, given=found is not None, image_size=weights_size)
            if found is None:
                assert agreed is not None
                resolve(
                    [Statement(f"open_clip's tags of {name}", agreed), *_said_above(pretrained, config, weights_size)],
                    what,
                )
                found = agreed
        assert found is not None
        preprocessing = found
    else:
        preprocessing = resolve([*by_config, *by_flags], f"the model {name}") or OPENAI
    return ModelInfo(name, config, preprocessing.mean, preprocessing.std, tuple(classes), provenance=provenance)


def _of_weights(name: str, pretrained: str, size: int | None, shapes: Weights | None) -> list[Statement]:
    """What is stated about weights without the user's help; nothing for a file that does not exist."""
    if not is_path(pretrained):
        source = f"open_clip's pretrained {pretrained!r} of {name}"
        return config_statement(source, read_tag(name, pretrained), size)
    path = Path(pretrained)
    if not path.is_file():
        return []
    shapes = shapes or read_weights(path, shapes_only=True)
    said = [Statement(f"{pretrained} is OpenAI's", OPENAI, resize=True)] if shapes.openai else []
    for source, config in configs_of(path, shapes).items():
        said += config_statement(source, config.get("preprocess_cfg"), size)
    return said


def _said_above(pretrained: str, config: Mapping[str, Any], size: int | None) -> list[Statement]:
    """The statement of the configuration in the parent folder, if it is that of this image tower: a repository may keep
    its weights in a subfolder."""
    above = config_above(Path(pretrained))
    if above is None or vision_differences(above[1], config, any_size=size is None):
        return []
    return config_statement(str(above[0]), above[1].get("preprocess_cfg"), size)


def configs_of(path: Path, shapes: Weights) -> dict[str, Mapping[str, Any]]:
    """Configurations of the weights in a file by source: in the file itself, and beside it. Raises UserError if one
    cannot be read."""
    configs: dict[str, Mapping[str, Any]] = {} if shapes.config is None else {str(path): shapes.config}
    if beside := config_beside(path):
        configs[str(beside[0])] = beside[1]
    return configs


def describe(
    name: str, pretrained: str, *, mean: Rgb = None, std: Rgb = None, resize_positions: bool = False
) -> InitialWeights:
    """Describe weights and their model, checked by configurations and the header of the file.

    Args:
        name, pretrained, mean, std: the fields of recipe.Model.
        resize_positions: interpolate the positional embedding of weights that were trained on images of another size
            than the model's.

    Raises:
        UserError: as ``model_info``; or weights that are not available, have other shapes than the model, or are of
            another model according to a configuration.
    """
    if own := read_info(pretrained) if os.path.isfile(pretrained) else None:
        if resize_positions:
            raise UserError(
                f"--resize-positions would do nothing: {pretrained} is a cfmask model file. Give the weights that it "
                "was made from."
            )
        info = described(own, name, pretrained, mean=mean, std=std)
        check_whole(pretrained)
        return InitialWeights(info, Path(pretrained), None, {})
    config = read_config(name)
    check_trainable(name, config)
    path = find_weights(name, pretrained, config)
    shapes = read_weights(path, shapes_only=True)
    check_activation(name, config, pretrained, shapes.quick_gelu)
    configs = configs_of(path, shapes) if os.path.isfile(pretrained) else {}
    for source, other in configs.items():
        check_activation(name, config, pretrained, bool(other.get("quick_gelu")))
        if different := vision_differences(other, config, any_size=resize_positions):
            raise UserError(
                f"According to {source}, the weights {pretrained} are of another model than --model {name}: they "
                f"differ in {', '.join(different)}. Give the model that they were made with"
                + (f": --model {source}." if source.endswith(".json") else ".")
            )
    architecture = ModelInfo(name, config, OPENAI.mean, OPENAI.std)
    if resize_positions:
        shapes = shapes._replace(state=resized_positions(shapes.state, architecture, pretrained))
    check_tower(architecture, shapes.state, pretrained)
    info = model_info(name, pretrained, mean=mean, std=std, shapes=shapes, any_size=resize_positions)
    return InitialWeights(info, path, shapes, configs, resize_positions)


def described(own: ModelInfo, name: str, pretrained: str, *, mean: Rgb = None, std: Rgb = None) -> ModelInfo:
    """Describe a cfmask model file, whose header is ``own``, as the start of a model of this name.

    Raises:
        UserError: another architecture, or another preprocessing than --model or the flags state.
    """
    config = read_config(name)
    preprocess = config.pop("preprocess_cfg", None)
    check_architecture(own, replace(own, name=name, config=config), pretrained)
    said = Statement(f"The header of {pretrained}", Preprocessing(own.mean, own.std))
    given = config_statement(f"--model {name}", preprocess, image_size_of(config)) + flags_statement(mean, std)
    resolve([said, *given], f"the model in {pretrained}")
    return replace(own, name=name)


def check_initial_model(
    name: str,
    pretrained: str,
    head: str | None,
    classes: Sequence[tuple[str, str]],
    *,
    mean: Rgb = None,
    std: Rgb = None,
    keep_head: bool = False,
    resize_positions: bool = False,
) -> InitialWeights:
    """Check that ``initial_model``, which has the same arguments, can make a model.

    Returns:
        The initial weights, with an info that has these classes.

    Raises:
        UserError: as ``describe``; a head for other classes or of another size; or no head, and none can be built.
    """
    from cfmask.models.zero_shot import check_text_tower

    start = describe(name, pretrained, mean=mean, std=std, resize_positions=resize_positions)
    info = replace(
        start.info,
        classes=tuple(wnid for wnid, _ in classes),
        class_names=tuple(display for _, display in classes),
    )
    if head is not None:
        check_head(head, info.classes)
        given = read_info(head)
        assert given is not None
        if given.config["embed_dim"] != info.config["embed_dim"]:
            raise UserError(
                f"The head in {head} takes {given.config['embed_dim']}-d features, {name} gives "
                f"{info.config['embed_dim']}-d ones: they belong to different models. Build the head with the tower's "
                "own model."
            )
        if different := vision_differences(given.config, info.config):
            raise UserError(
                f"The head in {head} is for the features of {given.name} and not of {name}: they differ in "
                f"{', '.join(different)}. Build the head with the tower's own model."
            )
    elif start.info.classes:
        check_head(pretrained, info.classes)
    elif start.shapes is None:
        raise UserError(f"{pretrained} is a model file without a head or text tower. Give a head with --head.")
    elif keep_head:
        _check_foreign_head(start.shapes.head, pretrained, len(classes), info.config["embed_dim"])
    elif start.shapes.head is not None:
        raise UserError(
            f"{pretrained} has a head of {len(start.shapes.head[0])} classes and does not state which they are. Make a "
            f"model file that does: python tools/build_head.py --model {name} --pretrained {pretrained} --keep-head "
            "--classes LIST --out FILE. Or give another head with --head."
        )
    else:
        check_text_settings(
            start.configs, info, pretrained, "Give the model that they were made with, or a head with --head."
        )
        check_text_tower(info, start.shapes.state)
    return replace(start, info=info)


def check_text_settings(
    configs: Mapping[str, Mapping[str, Any]], info: ModelInfo, pretrained: str, remedy: str
) -> None:
    """Raises UserError if a text tower has other settings than in its training, although its shapes fit.

    Args:
        configs: of the weights (``configs_of``).
        remedy: the last sentence of the error.
    """
    for source, config in configs.items():
        if different := text_differences(config, info.config):
            raise UserError(
                f"According to {source}, the weights {pretrained} have another text tower than {info.name}: they "
                f"differ in {', '.join(different)}. Its features would be wrong. {remedy}"
            )


def _check_foreign_head(head: tuple[Tensor, Tensor] | None, path: str, classes: int, width: int) -> None:
    if head is None:
        raise UserError(f"{path} has no head to keep: neither classification_head.weight nor head.weight.")
    weight, bias = head
    if weight.dim() != 2 or bias.shape != weight.shape[:1] or len(weight) != classes:
        raise UserError(
            f"The head in {path} has weights of shape {tuple(weight.shape)} and a bias of shape {tuple(bias.shape)}, "
            f"the class list has {classes} classes. Give the list that the head was trained on, in its order."
        )
    if weight.shape[1] != width:
        raise UserError(f"The head in {path} takes {weight.shape[1]}-d features, the tower gives {width}-d ones.")


def initial_model(
    name: str,
    pretrained: str,
    head: str | None,
    classes: Sequence[tuple[str, str]],
    device: str = "cpu",
    *,
    mean: Rgb = None,
    std: Rgb = None,
    templates: Sequence[str] = (),
    keep_head: bool = False,
    kept_rows: Path | None = None,
    resize_positions: bool = False,
) -> tuple[Classifier, ModelInfo]:
    """The initial model of a run: a pre-trained tower, and a head for these classes.

    Args:
        name, pretrained, head, mean, std: the fields of recipe.Model.
        classes: (wnid, display name) in the order of class ids.
        device: where a zero-shot head is computed. The model is returned on the CPU.
        templates, kept_rows: for a zero-shot head, as in ``zero_shot_weight``; by default the 80 templates of OpenAI.
        keep_head: use the head of a checkpoint that does not state its classes; they are ``classes``.
        resize_positions: as in ``describe``.

    Raises:
        UserError: as ``check_initial_model``.
    """
    import torch
    from torch import nn

    from cfmask.models.tower import Classifier
    from cfmask.models.zero_shot import openai_templates, zero_shot_weight

    start = check_initial_model(
        name, pretrained, head, classes, mean=mean, std=std, keep_head=keep_head, resize_positions=resize_positions
    )
    info = start.info
    own = start.shapes is None
    tower, weights = initial_tower(start)
    if head is not None or own:
        state = read_safetensors(head) if head is not None else weights.state
        weight, bias = state["head.weight"].float(), state["head.bias"].float()
        if head is not None:
            info = replace(info, provenance=f"{info.provenance or start.path.name}; head of {Path(head).name}")
    elif keep_head:
        assert weights.head is not None
        weight, bias = (value.float() for value in weights.head)
        info = replace(info, provenance=f"{origin_of(start)}; its own head")
    else:
        templates = templates or openai_templates()
        info = replace(info, provenance=_zero_shot_provenance(start, templates))
        weight = zero_shot_weight(info, weights.state, templates, device, kept_rows=kept_rows)
        bias = torch.zeros(len(classes))
    check_finite({"head": weight, "head's bias": bias}, pretrained)
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        linear.weight.copy_(weight)
        linear.bias.copy_(bias)
    return Classifier(tower, linear), info


def initial_tower(start: InitialWeights) -> tuple[nn.Module, Weights]:
    """The image tower of initial weights, in fp32 on the CPU, and all that their file holds.

    Raises:
        UserError: the weights are another tower's, or are not finite.
    """
    own = start.shapes is None
    weights = Weights(read_safetensors(start.path)) if own else read_weights(start.path)
    if start.resize_positions:
        weights = weights._replace(state=resized_positions(weights.state, start.info, str(start.path)))
    tower = load_tower(start.info, weights.state, str(start.path))
    check_finite(dict(tower.named_parameters()), str(start.path))
    return tower, weights


def zero_shot_info(start: InitialWeights, templates: Sequence[str]) -> ModelInfo:
    """The info of ``initial_model`` for a zero-shot head, before it is made; equal infos mean equal models.

    Args:
        start: as returned by ``check_initial_model``.
    """
    return replace(start.info, provenance=_zero_shot_provenance(start, templates))


def origin_of(start: InitialWeights) -> str:
    """The beginning of a provenance: which weights."""
    resized = ", positional embedding interpolated" if start.resize_positions else ""
    return f"{start.path.name} (sha256 {sha256_of(start.path)[:16]}{resized})"


def _zero_shot_provenance(start: InitialWeights, templates: Sequence[str]) -> str:
    import open_clip

    digest = hashlib.sha256("\n".join(templates).encode()).hexdigest()[:16]
    return (
        f"{origin_of(start)}; zero-shot head, {len(templates)} templates (sha256 {digest}), by open_clip "
        f"{open_clip.__version__}"
    )
