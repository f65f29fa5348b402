"""Model files.

A model file is a safetensors file with ``visual.*`` (open_clip's names), ``head.weight`` (classes, D), ``head.bias``
(classes,), and metadata (``ModelInfo``). The header is read without torch, so that a launcher can refuse a wrong head
before a job is queued.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfmask.errors import UserError, did_you_mean_path
from cfmask.models.architecture import vision_differences
from cfmask.models.preprocessing import Preprocessing, checked_values
from cfmask.models.weights import read_safetensors
from cfmask.runtime.tensor_files import replace_tensors

if TYPE_CHECKING:  # torch takes seconds to import, and a header needs none of it
    from torch import nn

    from cfmask.models.tower import Classifier


@dataclass(frozen=True)
class ModelInfo:
    """Metadata of a model file."""

    name: str
    """open_clip's name of the model, or the path of its configuration."""
    config: dict[str, Any]
    """The open_clip model configuration (``embed_dim``, ``vision_cfg``, ``quick_gelu`` …)."""
    mean: tuple[float, ...]
    """Per channel, for pixels in 0…1, like ``std``."""
    std: tuple[float, ...]
    classes: tuple[str, ...] = ()
    """Class folder names (wnids) in the order of the head's rows; empty without a head."""
    class_names: tuple[str, ...] = ()
    """Display names in the same order; may be empty."""
    provenance: str = ""
    """How the weights were made."""

    def to_metadata(self) -> dict[str, str]:
        return {"format": "pt", "cfmask": json.dumps(self.__dict__, sort_keys=True)}


def read_info(path: str | Path) -> ModelInfo | None:
    """The metadata of a model file; None for other files. Reads the header only.

    Raises:
        UserError: the file cannot be read, or its header has another form than cfmask writes.
    """
    try:
        with open(path, "rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            if length > os.path.getsize(path):
                return None
            meta = json.loads(file.read(length)).get("__metadata__", {})
        values = json.loads(meta["cfmask"])
    except OSError as error:
        raise UserError(
            f"No model can be read from {path}: {error.strerror}.{did_you_mean_path(path) or ' Check the path.'}"
        ) from error
    except (struct.error, ValueError, KeyError, AttributeError):
        return None
    try:
        tuples: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        info = ModelInfo(**tuples)
        for setting in ("embed_dim", "vision_cfg"):
            if setting not in info.config:
                raise TypeError(f"its config has no {setting}")
    except (AttributeError, TypeError) as error:
        raise UserError(
            f"The header of {path} has another form than this version of cfmask writes ({error}). Use the version that "
            "wrote it."
        ) from error
    checked_values(f"The header of {path}", info.mean, info.std)
    return info


def check_whole(path: str | Path) -> None:
    """Raises UserError if the tensors of a model file do not end where the file does. Reads the header only."""
    with open(path, "rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    ends = [entry["data_offsets"][1] for entry in header.values()]
    if 8 + length + max(ends, default=0) != os.path.getsize(path):
        raise UserError(f"{path} is not a whole safetensors file. Copy it again from where it came from.")


def build_tower(info: ModelInfo) -> nn.Module:
    """An image tower with fresh weights. Patch dropout is off: it is a setting of CLIP's pre-training."""
    from open_clip.model import _build_vision_tower

    vision = {**info.config["vision_cfg"], "patch_dropout": 0.0}
    return _build_vision_tower(info.config["embed_dim"], vision, quick_gelu=info.config.get("quick_gelu", False))


def save_model(path: str | Path, model: Classifier, info: ModelInfo) -> None:
    """Write a model file atomically. Raises OSError."""
    path = Path(path)
    if len(info.classes) != model.head.out_features:
        raise ValueError(f"{len(info.classes)} class names for a head of {model.head.out_features} classes")
    replace_tensors(path, model.state_dict(), info.to_metadata())


def load_model(path: str | Path) -> tuple[Classifier, ModelInfo]:
    """The tower and head in a model file, in fp32 on the CPU.

    Raises:
        UserError: a missing file, not a model file, or one without a head.
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
            f"The tensors of {path} do not match its header, a {info.name} with {len(info.classes)} classes: "
            f"{str(error).splitlines()[-1].strip()}"
        ) from error
    return model, info


def check_head(path: str | Path, wnids: Sequence[str], *, than: str = "the shards") -> None:
    """Raises UserError if the head in a file is for other classes than ``wnids``, or in another order. Reads the header
    only.

    Args:
        than: what ``wnids`` are the classes of, for errors.
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
    """Raises UserError if a model file is of another architecture than requested. It names the differences."""
    if different := vision_differences(own.config, asked.config):
        raise UserError(
            f"The weights in {path} belong to {own.name} and not to {asked.name}: they differ in "
            f"{', '.join(different)}. Give --model {own.name}."
        )


def check_same_kind(other: ModelInfo | None, own: ModelInfo | None, path: str, *, than: str = "the shards") -> None:
    """Raises UserError if a file is not a model file with a head, or its model differs from ``own`` in architecture,
    preprocessing or classes.

    Args:
        than: as in ``check_head``.
    """
    if other is None or not other.classes:
        raise UserError(f"{path} is not a cfmask model file with a head.")
    assert own is not None
    check_architecture(other, own, path)
    if not Preprocessing(other.mean, other.std).agrees(Preprocessing(own.mean, own.std)):
        raise UserError(
            f"The model in {path} takes pixels with mean {other.mean} and standard deviation {other.std}, {own.name} "
            f"with {own.mean} and {own.std}. Both must have the same preprocessing."
        )
    check_head(path, own.classes, than=than)


def load_alike(paths: Sequence[str | Path]) -> Iterator[tuple[Classifier, ModelInfo]]:
    """Load models one after the other that have the same architecture, preprocessing and classes, so that their weights
    or outputs can be averaged.

    Raises:
        UserError: a file without a model, or models that differ.
    """
    first = None
    for path in paths:
        model, info = load_model(path)
        if first is not None:
            check_same_kind(info, first, str(path), than=str(paths[0]))
        first = first or info
        yield model, info
