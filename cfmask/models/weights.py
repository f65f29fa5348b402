"""Checkpoints that other programs wrote: where they are, and how their tensors are read without running their code.

A checkpoint is a pickle more often than not, and to unpickle is to run whatever it names. Three kinds are read here,
told apart by their content and not by the ending of their name: safetensors; what ``torch.save`` wrote, by torch's own
unpickler for weights only; and TorchScript archives, as OpenAI publishes them, by an unpickler that knows tensors and
plain containers. A pickled module is refused: it cannot be read otherwise.

Names become open_clip's, whatever they were wrapped in:

    module.visual.conv1.weight                 →  visual.conv1.weight       DDP
    image_encoder.model.visual.conv1.weight    →  visual.conv1.weight       WiSE-FT
    model.transformer.resblocks.0.ln_1.weight  →  transformer.resblocks.…   FLYP
    conv1.weight                               →  visual.conv1.weight       an image tower on its own
    classification_head.weight                 →  a head                    WiSE-FT, model soups
"""

from __future__ import annotations

import json
import os
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cfmask.errors import UserError
from cfmask.models.torchscript import check_inflation, read_torchscript

if TYPE_CHECKING:  # torch takes seconds to import, and a launcher that looks for weights needs none of it
    from torch import Tensor

HUB_CONFIG, HUB_WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
"""What open_clip calls them in a Hugging Face repository."""

# In the state dicts that OpenAI published, and in none that open_clip wrote.
_OPENAI_MARKERS = ("input_resolution", "context_length", "vocab_size")
_HEADS = ("classification_head", "head")


class Weights(NamedTuple):
    """What a checkpoint holds. state: a CLIP's tensors, or an image tower's, in open_clip's names. head: weight
    (classes, D) and bias (classes,), of whatever classes. quick_gelu: whether they were trained with it; None: unknown.
    """

    state: dict[str, Tensor]
    head: tuple[Tensor, Tensor] | None = None
    quick_gelu: bool | None = None


# ---------------------------------------------------------------------------------------------------------
# Finding


def find_weights(name: str, pretrained: str) -> Path:
    """The checkpoint file of a tag (downloaded into open_clip's cache, where there is a network) or a path.

    Raises:
        UserError: no such file or tag, weights that need the other activation, as far as that can be known without
            reading them, or no way to get the file; it says which file to put where.
    """
    from open_clip.pretrained import download_pretrained, get_pretrained_cfg, list_pretrained_tags_by_model

    if os.path.isfile(pretrained):
        check_activation(name, read_config(name), pretrained, _claimed_activation(Path(pretrained)))
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
    check_activation(name, read_config(name), pretrained, bool(tag.get("quick_gelu", False)))
    try:
        return Path(download_pretrained(tag))
    except Exception as error:  # whatever the hub's client raises, the user's remedy is the same
        source = tag.get("hf_hub") or tag.get("url")
        raise UserError(
            f"The weights {pretrained!r} of {name} are not in the cache and could not be downloaded "
            f"({type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else 'no details'}). On a "
            f"machine with network access get {source} (for a Hugging Face repository its file "
            f"{HUB_WEIGHTS}), copy it here, and give its path: --pretrained PATH."
        ) from error


def check_activation(name: str, config: Mapping[str, Any], pretrained: str, quick_gelu: bool | None) -> None:
    """Refuse weights that were trained with the other activation than the model computes.

    Args:
        name, config: of the model.
        quick_gelu: what the weights were trained with; None: unknown.

    Raises:
        UserError: naming the model to use.
    """
    if quick_gelu is None or quick_gelu == bool(config.get("quick_gelu", False)):
        return
    import open_clip

    right = f"{name}-quickgelu" if quick_gelu else name.removesuffix("-quickgelu")
    if right not in open_clip.list_models():
        right = f'a configuration (.json) with "quick_gelu": {json.dumps(quick_gelu)}'
    raise UserError(
        f"The weights {pretrained!r} were trained with {'QuickGELU' if quick_gelu else 'GELU'} and --model {name} "
        f"computes {'GELU' if quick_gelu else 'QuickGELU'}: every number would be wrong. Use --model {right}."
    )


def _claimed_activation(path: Path) -> bool | None:
    """What can be told of a checkpoint before it is read."""
    if _is_torchscript(path):  # those that there are, are OpenAI's
        return True
    beside = path.with_name(HUB_CONFIG)
    if path.name == HUB_WEIGHTS and beside.is_file():
        return bool(read_config(str(beside)).get("quick_gelu", False))
    return None


def read_config(name: str) -> dict[str, Any]:
    """An open_clip model configuration (``embed_dim``, ``vision_cfg``, ``quick_gelu`` …), by open_clip's name or from a
    .json file: open_clip's own, or the open_clip_config.json of a Hugging Face repository, whose ``preprocess_cfg`` it
    keeps.

    Raises:
        UserError: open_clip knows no such model, or the file is no configuration.
    """
    if name.endswith(".json"):
        try:
            config = json.loads(Path(name).read_text())
        except OSError as error:
            raise UserError(f"No model configuration can be read from {name}: {error.strerror}.") from error
        except ValueError as error:
            raise UserError(f"{name} is not a model configuration: it is not valid JSON ({error}).") from error
        if isinstance(config, dict) and "model_cfg" in config:
            config = {**config["model_cfg"], "preprocess_cfg": config.get("preprocess_cfg")}
    else:
        import open_clip  # takes seconds, and a .json needs none of it

        config = open_clip.get_model_config(name)
    if not isinstance(config, dict) or "vision_cfg" not in config or "embed_dim" not in config:
        import open_clip

        near = [known for known in open_clip.list_models() if known.startswith("ViT-B-")]
        raise UserError(
            f"There is no model {name!r}: it is neither one of open_clip's nor the path of a model configuration "
            f"(.json). Some of open_clip's: {', '.join(near[:12])}; all: open_clip.list_models()."
        )
    return config


# ---------------------------------------------------------------------------------------------------------
# Reading


def read_weights(path: Path) -> Weights:
    """The tensors of a checkpoint, on the CPU, in the precision they were saved in.

    Raises:
        UserError: not a checkpoint, one that would have to be unpickled, or one without an open_clip image tower.
    """
    import torch

    with open(path, "rb") as file:
        begin = file.read(64)
    try:
        if begin[8:9] == b"{" and struct.unpack("<Q", begin[:8])[0] <= path.stat().st_size:
            tensors: Any = read_safetensors(path)
        elif _is_torchscript(path):
            tensors = read_torchscript(path)
        elif zipfile.is_zipfile(path) or begin[:1] == b"\x80":
            if zipfile.is_zipfile(path):
                check_inflation(path)
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        else:
            raise UserError(
                f"{path} cannot be read as a checkpoint: it begins with {begin[:24]!r}. "
                + (
                    "That is a pointer of Git LFS: `git lfs pull` gets the file itself."
                    if begin.startswith(b"version https://git-lfs")
                    else "It must be a safetensors file, a state dict saved by torch.save, or one of OpenAI's "
                    "archives; a download that failed leaves something else."
                )
            )
    except UserError:
        raise
    except Exception as error:  # zip, pickle, struct: whatever a damaged file makes of their readers
        if named := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise UserError(_pickled(path, f"holds a pickled {named[1]}")) from error
        if begin[:1] == b"\x80":
            raise UserError(_pickled(path, "is a pickle that is not made of tensors alone")) from error
        raise UserError(
            f"{path} cannot be read as a checkpoint ({type(error).__name__}: "
            f"{(str(error).splitlines() or [''])[0][:160]}). It must be a safetensors file, a state dict saved by "
            "torch.save, or one of OpenAI's archives."
        ) from error
    flat = dict(_flat(tensors))
    for name, tensor in flat.items():
        if (
            tensor.layout == torch.strided
            and tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes()
        ):
            raise UserError(
                f"{path} cannot be read as a checkpoint: its tensor {name} of {tuple(tensor.shape)} repeats "
                f"{tensor.untyped_storage().nbytes()} bytes, which no weights do. Save it with .contiguous()."
            )
    try:
        return in_open_clips_names(flat, openai=_is_torchscript(path))
    except UserError as error:
        raise UserError(f"{path} {error}") from error


def _pickled(path: Path, what: str) -> str:
    return (
        f"{path} cannot be read: it {what}, and to unpickle that is to run whatever code it names. If you trust "
        "where it comes from, make a state dict of it, with the code that it was made with on the path: "
        f"`model = torch.load({path.name!r}, weights_only=False)` (or, where it was written by pickle.dump, "
        f"`pickle.load(open({path.name!r}, 'rb'))`), then `torch.save(model.state_dict(), 'state.pt')`, or of a "
        "dict the part with the tensors, and give state.pt."
    )


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU.

    Raises:
        UserError: not one, or not a whole one.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(
            f"{path} is not a whole safetensors file ({error}). Copy it again from where it came from."
        ) from error


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Tensors in nested dicts, by their keys joined with dots: a state dict may lie beside an optimizer's."""
    from torch import Tensor

    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))


def in_open_clips_names(tensors: Mapping[str, Tensor], *, openai: bool = False) -> Weights:
    """Tensors under the names of the model that they were wrapped in → under open_clip's.

    Args:
        openai: whether they are known to be OpenAI's, which are trained with QuickGELU.

    Raises:
        UserError: no open_clip image tower, more than one, or more than one head; in words that follow the file's name.
    """
    whole = _prefixes(tensors, "visual.conv1.weight")
    alone = [
        prefix
        for prefix in _prefixes(tensors, "conv1.weight")
        if not whole and prefix + "class_embedding" in tensors and prefix + "positional_embedding" in tensors
    ]
    found = whole or alone
    if not found:
        some = ", ".join(sorted(tensors)[:3])
        raise UserError(
            f"holds no open_clip image tower: there is no visual.conv1.weight among its {len(tensors)} tensors"
            + (f" ({some} …)." if some else ".")
        )
    if len(found) > 1:
        raise UserError(
            f"holds {len(found)} image towers, under {' and '.join(map(repr, found))}: save the one that you mean by "
            "itself."
        )
    [prefix] = found
    inner = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    openai = openai or all(marker in inner for marker in _OPENAI_MARKERS)
    head = _head(tensors, prefix)
    state = {
        name if whole else f"visual.{name}": value
        for name, value in inner.items()
        if name not in _OPENAI_MARKERS and not name.startswith(tuple(f"{head}." for head in _HEADS))
    }
    return Weights(state, head, True if openai else None)


def _prefixes(tensors: Mapping[str, Tensor], name: str) -> list[str]:
    """What stands before a name, wherever it ends a key at a dot."""
    return sorted(key[: -len(name)] for key in tensors if key == name or key.endswith("." + name))


def _head(tensors: Mapping[str, Tensor], prefix: str) -> tuple[Tensor, Tensor] | None:
    """The linear head that stands beside what has this prefix, or around it."""
    parts = prefix.split(".")[:-1]
    around = ["".join(f"{part}." for part in parts[:depth]) for depth in range(len(parts) + 1)]
    found = [f"{outer}{head}" for outer in around for head in _HEADS if f"{outer}{head}.weight" in tensors]
    if not found:
        return None
    if len(found) > 1:
        raise UserError(f"holds {len(found)} heads, {' and '.join(found)}: save the one that you mean by itself.")
    weight = tensors[f"{found[0]}.weight"]
    bias = tensors.get(f"{found[0]}.bias")
    return weight, weight.new_zeros(len(weight)) if bias is None else bias


def _is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(entry.endswith("/constants.pkl") for entry in archive.namelist())
    except zipfile.BadZipFile:
        return False
