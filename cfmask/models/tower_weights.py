"""The weights of an image tower: whether they are those of a model, and loading them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING

from cfmask.errors import UserError
from cfmask.models.architecture import image_size_of, models_like, patch_size_of
from cfmask.models.head import ModelInfo, build_tower

if TYPE_CHECKING:  # torch takes seconds to import
    from torch import Tensor, nn

POSITIONS = "visual.positional_embedding"


def check_tower(info: ModelInfo, state: Mapping[str, Tensor], pretrained: str) -> None:
    """Raises UserError if a state dict is not that of this image tower."""
    visual = _visual(state)
    if wrong := difference_in_shapes(_shapes_of(info), visual):
        remedy = f"Choose the --model that they were made with{models_like(visual)}."
        if _trained_grid(state) not in (None, _grid(info)) and not difference_in_shapes(
            _shapes_of(info), _visual(resized_positions(state, info, pretrained))
        ):
            remedy = (
                "They were trained on images of another size. Choose the --model that they were made with, or "
                "interpolate their positional embedding: python tools/build_head.py --resize-positions makes a model "
                "file, which --pretrained takes."
            )
        raise UserError(
            f"The weights in {pretrained} are not those of the image tower of {info.name}: {wrong}. {remedy}"
        )


def _shapes_of(info: ModelInfo) -> dict[str, Tensor]:
    import torch

    try:
        with torch.device("meta"):
            return build_tower(info).state_dict()
    except Exception as error:  # of any type: open_clip's constructors do not check settings
        raise UserError(
            f"The image tower of {info.name} cannot be built ({type(error).__name__}: "
            f"{(str(error).splitlines() or [''])[0][:160]}). Correct its configuration."
        ) from error


def difference_in_shapes(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str | None:
    """The first difference between the tensors of a model and those that are given, in words; None if they fit."""
    for key, tensor in expected.items():
        if key not in given:
            return f"{key} is missing ({sum(key not in given for key in expected)} of {len(expected)} tensors)"
        if given[key].shape != tensor.shape:
            return f"{key} has the shape {tuple(given[key].shape)}, the model's {tuple(tensor.shape)}"
        if not given[key].is_floating_point():
            return f"{key} is {str(given[key].dtype).removeprefix('torch.')}: quantised weights cannot be trained"
    if unknown := sorted(set(given) - set(expected)):
        return f"{unknown[0]} is unknown to the model ({len(unknown)} tensors)"
    return None


def resized_positions(state: Mapping[str, Tensor], info: ModelInfo, pretrained: str) -> dict[str, Tensor]:
    """A state dict whose positional embedding is interpolated to the model's image size, as open_clip does it
    (bicubic, with antialiasing), in fp32. The class token's row is kept.

    Args:
        state: tensors by open_clip's names; may be on the meta device.

    Raises:
        UserError: the embedding has the model's size already, or is not that of a square grid of patches.
    """
    from open_clip.model import resize_pos_embed

    grid, trained = _grid(info), _trained_grid(state)
    if trained is None:
        raise UserError(
            f"--resize-positions: {pretrained} has no positional embedding of a class token and a square grid of "
            "patches. Leave it out."
        )
    if trained == grid:
        raise UserError(
            f"--resize-positions would do nothing: the weights {pretrained} were trained on {grid} × {grid} patches, "
            f"as many as {info.name} has. Leave it out."
        )
    resized = {**state, POSITIONS: state[POSITIONS].float()}
    resize_pos_embed(resized, SimpleNamespace(visual=SimpleNamespace(grid_size=(grid, grid))))
    return resized


def fitting_positions(state: Mapping[str, Tensor], info: ModelInfo, pretrained: str) -> Mapping[str, Tensor]:
    """The state dict, with its positional embedding interpolated if it has another size than the model's."""
    return state if _trained_grid(state) in (None, _grid(info)) else resized_positions(state, info, pretrained)


def _grid(info: ModelInfo) -> int:
    return image_size_of(info.config) // patch_size_of(info.config)


def _trained_grid(state: Mapping[str, Tensor]) -> int | None:
    """Patches along a side of the images that weights were trained on; None if that is not a square."""
    positions = state.get(POSITIONS)
    if positions is None or positions.dim() != 2 or not positions.is_floating_point():
        return None
    side = math.isqrt(max(0, len(positions) - 1))
    return side if side and side**2 + 1 == len(positions) else None


def load_tower(info: ModelInfo, state: Mapping[str, Tensor], pretrained: str) -> nn.Module:
    """The image tower with the weights of a state dict, in fp32 on the CPU.

    Raises:
        UserError: the weights are another tower's.
    """
    tower = build_tower(info)
    try:
        tower.load_state_dict({key: value.float() for key, value in _visual(state).items()})
    except RuntimeError as error:  # a model file that does not match its header
        raise UserError(
            f"The weights in {pretrained} are not those of the image tower of {info.name}: "
            f"{str(error).splitlines()[-1]}."
        ) from error
    return tower


def check_finite(parts: Mapping[str, Tensor], pretrained: str) -> None:
    """Raises UserError if a tensor has values that are not finite, and names it."""
    for part, tensor in parts.items():
        if not tensor.isfinite().all():
            raise UserError(
                f"The {part} of the model that {pretrained} gives is not finite: the weights have diverged, or the "
                "file is damaged. Take other weights, or copy the file again."
            )


def _visual(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix("visual."): value for key, value in state.items() if key.startswith("visual.")}
