"""Model files.

A **model file** is one safetensors file: ``visual.*`` (open_clip's names), ``head.weight`` (classes, D),
``head.bias`` (classes,), and metadata: what it is a model of, and for which classes. Every tool reads and
writes it. The header can be read without torch, so a launcher can refuse a wrong head before a job is queued.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfmask.errors import UserError
from cfmask.models.architecture import vision_differences
from cfmask.models.preprocessing import Preprocessing, checked_values
from cfmask.models.weights import read_safetensors
from cfmask.runtime.tensor_files import replace_tensors

if TYPE_CHECKING:  # torch takes seconds to import, and a header needs none of it
    from torch import nn

    from cfmask.models.tower import Classifier


@dataclass(frozen=True)
class ModelInfo:
    """Metadata of a model file.

    name: open_clip's name of the model, or the path of the configuration that it was made with.
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
        UserError: there is no such file, or its header is not as cfmask writes it.
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
    try:
        tuples: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        info = ModelInfo(**tuples)
        for setting in ("embed_dim", "vision_cfg"):
            if setting not in info.config:
                raise TypeError(f"its config has no {setting}")
    except (AttributeError, TypeError) as error:
        raise UserError(
            f"The header of {path} is not as this version of cfmask writes it ({error}). Use the version that wrote it."
        ) from error
    checked_values(f"The header of {path}", info.mean, info.std)
    return info


def check_whole(path: str | Path) -> None:
    """Refuse a model file that was cut, or has bytes that it should not have. Reads the header only.

    Raises:
        UserError: its tensors do not end where the file does.
    """
    with open(path, "rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    ends = [entry["data_offsets"][1] for entry in header.values()]
    if 8 + length + max(ends, default=0) != os.path.getsize(path):
        raise UserError(f"{path} is not a whole safetensors file. Copy it again from where it came from.")


def build_tower(info: ModelInfo) -> nn.Module:
    """An image tower of this kind with fresh weights. Without patch dropout: that is a setting of the training that
    its configuration was written for, and no tower here drops patches of its own accord."""
    from open_clip.model import _build_vision_tower

    vision = {**info.config["vision_cfg"], "patch_dropout": 0.0}
    return _build_vision_tower(info.config["embed_dim"], vision, quick_gelu=info.config.get("quick_gelu", False))


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
    if different := vision_differences(own.config, asked.config):
        raise UserError(
            f"The weights in {path} belong to {own.name}, not to {asked.name}: they differ in {', '.join(different)}. "
            f"Give --model {own.name}."
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
    if not Preprocessing(other.mean, other.std).agrees(Preprocessing(own.mean, own.std)):
        raise UserError(
            f"The model in {path} takes pixels with mean {other.mean} and standard deviation {other.std}, {own.name} "
            f"with {own.mean} and {own.std}: the same images would not be the same to both."
        )
    check_head(path, own.classes, than=than)


def load_alike(paths: Sequence[str | Path]) -> Iterator[tuple[Classifier, ModelInfo]]:
    """Models whose weights or outputs may be compared and averaged: one architecture, preprocessing and class list.
    Each is loaded when it is asked for.

    Raises:
        UserError: a file without a model, or models that differ in one of these.
    """
    first = None
    for path in paths:
        model, info = load_model(path)
        if first is not None:
            check_same_kind(info, first, str(path), than=str(paths[0]))
        first = first or info
        yield model, info
