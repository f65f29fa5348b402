"""Checkpoints of other programs: finding them, and reading their tensors without running their code.

Most checkpoints are pickles, and unpickling runs the code that a pickle names. Three kinds are read here, recognised by
their content: safetensors; files of ``torch.save``, with torch's ``weights_only`` unpickler; and TorchScript archives,
in which OpenAI publishes its weights, with an unpickler that knows only tensors and plain containers. A pickled module
is refused.

Names become open_clip's, also if the model or a part of it was wrapped:

    module.visual.conv1.weight                 →  visual.conv1.weight       DDP
    visual._orig_mod.conv1.weight              →  visual.conv1.weight       a compiled tower
    image_encoder.model.visual.conv1.weight    →  visual.conv1.weight       WiSE-FT
    model.transformer.resblocks.0.ln_1.weight  →  transformer.resblocks.…   FLYP
    conv1.weight                               →  visual.conv1.weight       an image tower on its own
    classification_head.weight                 →  a head                    WiSE-FT, model soups
"""

from __future__ import annotations

import os
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cfmask.errors import UserError, did_you_mean, did_you_mean_path
from cfmask.models.architecture import (
    HUB_CONFIG,
    check_activation,
    parse_config,
    read_config,
    refuse_repository,
)
from cfmask.models.downloads import HUB_WEIGHTS, cached_weights, weights_of_tag
from cfmask.models.open_clip_tables import tag_config, tags_of_model
from cfmask.models.torchscript import activation_of, check_inflation, read_torchscript

if TYPE_CHECKING:  # torch takes seconds to import, and a launcher does not need it to find weights
    from torch import Tensor

CONFIG_ENTRY = "open_clip_config"
"""An entry by tools/export.py: the text of open_clip_config.json, in the metadata of a safetensors file, or beside the
state dict in a file of torch.save."""

# In the state dicts that OpenAI published, and in none that open_clip wrote.
_OPENAI_MARKERS = ("input_resolution", "context_length", "vocab_size")
_HEADS = ("classification_head", "head")
# Parts of names that wrappers add: DDP and DataParallel, torch.compile, FSDP, and its activation checkpointing.
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


class Weights(NamedTuple):
    """The contents of a checkpoint."""

    state: dict[str, Tensor]
    """The tensors of a CLIP or of an image tower, by open_clip's names."""
    head: tuple[Tensor, Tensor] | None = None
    """Weight (classes, D) and bias (classes,) of a head whose classes are unknown."""
    quick_gelu: bool | None = None
    """Whether the weights were trained with QuickGELU; None if that is unknown."""
    openai: bool = False
    """Whether the weights are known to be OpenAI's."""
    config: dict[str, Any] | None = None
    """The configuration that tools/export.py wrote into the checkpoint (``read_config``)."""


# ---------------------------------------------------------------------------------------------------------
# Finding


def find_weights(name: str, pretrained: str, config: Mapping[str, Any] | None = None) -> Path:
    """The checkpoint file of a path or a tag. The weights of a tag are downloaded into open_clip's cache.

    Args:
        name, config: of the model; by default, the configuration of that name.

    Raises:
        UserError: a missing file, an unknown tag, a tag whose weights need the other activation, or a failed download.
    """
    refuse_repository("--pretrained", pretrained)
    if os.path.isfile(pretrained):
        return Path(pretrained)
    if os.path.isdir(pretrained):
        raise UserError(f"--pretrained {pretrained} is a folder. Give the file of the weights in it.")
    if is_path(pretrained):
        raise UserError(
            f"--pretrained {pretrained}: no such file.{did_you_mean_path(pretrained) or ' Check the path.'}"
        )
    tag = read_tag(name, pretrained)
    check_activation(name, config or read_config(name), pretrained, bool(tag.get("quick_gelu", False)))
    return weights_of_tag(tag, f"The weights {pretrained!r} of {name}")


def in_cache(name: str, pretrained: str) -> bool:
    """Whether ``find_weights`` needs no network: the weights are a file, or open_clip has downloaded them before.

    Raises:
        UserError: an unknown tag.
    """
    if os.path.isfile(pretrained) or is_path(pretrained):
        return os.path.isfile(pretrained)
    return cached_weights(read_tag(name, pretrained)) is not None


def is_path(pretrained: str) -> bool:
    """Whether --pretrained is the path of a file, which need not exist, and not a tag of open_clip's."""
    if pretrained.startswith(("hf-hub:", "local-dir:")):
        return False
    known_endings = (".pt", ".pth", ".bin", ".safetensors")
    return os.path.exists(pretrained) or os.sep in pretrained or Path(pretrained).suffix in known_endings


def read_tag(name: str, pretrained: str) -> dict[str, Any]:
    """open_clip's configuration of a pretrained tag: the place of its weights, and their preprocessing. Raises
    UserError for an unknown tag."""
    if tag := tag_config(name, pretrained):
        return tag
    known = list(tags_of_model(name))
    raise UserError(
        f"Unknown weights {pretrained!r}: neither a tag of open_clip's for {name} nor an existing "
        f"file.{did_you_mean(pretrained, known)} "
        + (f"Its tags: {', '.join(known)}." if known else "Give the path of a checkpoint.")
    )


def config_beside(path: Path) -> tuple[Path, dict[str, Any]] | None:
    """Path and contents of the open_clip_config.json in the folder of a checkpoint. If the checkpoint is a link, as in
    the Hugging Face cache, the folders of the link, of its target and of links between them are searched.

    Raises:
        UserError: it cannot be read as a configuration.
    """
    return next((found for folder in _folders_of(path) if (found := _config_in(folder))), None)


def config_above(path: Path) -> tuple[Path, dict[str, Any]] | None:
    """The same in the parent folder. It may belong to another checkpoint."""
    return next((found for folder in _folders_of(path) if (found := _config_in(folder.parent))), None)


def _config_in(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    config = folder / HUB_CONFIG
    return (config, read_config(str(config))) if config.is_file() else None


def _folders_of(path: Path) -> Iterator[Path]:
    """The folders of a file and of each link that leads to it. ".." is kept, because behind a link it is another folder
    than the path suggests."""
    path, seen = path.absolute(), set()
    yield path.parent
    while path.is_symlink() and path not in seen:
        seen.add(path)
        path = path.parent / os.readlink(path)
        yield path.parent


# ---------------------------------------------------------------------------------------------------------
# Reading


def read_weights(path: Path, *, shapes_only: bool = False) -> Weights:
    """The tensors of a checkpoint, on the CPU, in the precision they were saved in.

    Args:
        shapes_only: return tensors on the meta device, from the header alone. (Files of torch.save before PyTorch 1.6
            have to be read for that.)

    Raises:
        UserError: not a checkpoint, one that would have to be unpickled, or one without an open_clip image tower.
    """
    import torch

    if (part := re.search(r"-[0-9]{5}-of-([0-9]{5})\.[a-z]+$", path.name)) and int(part[1]) > 1:
        raise UserError(
            f"{path} is one of {int(part[1])} files of one model. Merge them into a safetensors file, or into a state "
            "dict saved by torch.save."
        )
    with open(path, "rb") as file:
        begin = file.read(64)
    torchscript, config = _is_torchscript(path), None
    try:
        if begin[8:9] == b"{" and struct.unpack("<Q", begin[:8])[0] <= path.stat().st_size:
            tensors: Any = read_safetensors(path)  # mapped: nothing is read before it is used
            config = _metadata(path).get(CONFIG_ENTRY)
        elif torchscript:
            tensors = read_torchscript(path, shapes_only=shapes_only)
        elif zipfile.is_zipfile(path) or begin[:1] == b"\x80":
            zipped = zipfile.is_zipfile(path)
            if zipped:
                check_inflation(path)
            mapped = True if zipped and shapes_only else None
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
            config = tensors.get(CONFIG_ENTRY) if isinstance(tensors, dict) else None
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
    except Exception as error:  # of any type: from the readers of zip, pickle and struct
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
    if shapes_only:
        flat = {name: tensor.to("meta") for name, tensor in flat.items()}
    try:
        weights = in_open_clips_names(flat)
    except UserError as error:
        raise UserError(f"{path} {error}") from error
    if torchscript and weights.quick_gelu is None:
        weights = weights._replace(quick_gelu=activation_of(path))
    return weights._replace(config=_config_inside(path, config))


def _config_inside(path: Path, text: Any) -> dict[str, Any] | None:
    if not isinstance(text, str):
        return None
    return parse_config(text, f"The entry {CONFIG_ENTRY} of {path}")


def _metadata(path: Path) -> dict[str, str]:
    """Of a safetensors file."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def _pickled(path: Path, what: str) -> str:
    return (
        f"{path} cannot be read: it {what}, and unpickling runs the code that a pickle names. If you trust its source, "
        "save a state dict, with the code that it was made with on the path: "
        f"`model = torch.load({path.name!r}, weights_only=False)` (or, if it was written by pickle.dump, "
        f"`pickle.load(open({path.name!r}, 'rb'))`), then `torch.save(model.state_dict(), 'state.pt')`, or the part of "
        "a dict that has the tensors. Then give state.pt."
    )


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU.

    Raises:
        UserError: not a safetensors file, or a truncated one.
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
    """Tensors in nested dicts by their keys, joined with dots: a checkpoint may also have an optimizer's state."""
    from torch import Tensor

    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))


def in_open_clips_names(wrapped: Mapping[str, Tensor]) -> Weights:
    """Rename tensors to open_clip's names, also if the model was wrapped.

    Raises:
        UserError: no open_clip image tower, more than one, or more than one head. The message follows the file's name.
    """
    tensors = _unwrapped(wrapped)
    whole = _prefixes(tensors, "visual.conv1.weight")
    alone = [
        prefix
        for prefix in _prefixes(tensors, "conv1.weight")
        if not whole and prefix + "class_embedding" in tensors and prefix + "positional_embedding" in tensors
    ]
    found = whole or alone
    if not found:
        raise UserError(f"holds no open_clip image tower: {_what_else(tensors)}")
    if len(found) > 1:
        raise UserError(
            f"holds {len(found)} image towers, under {' and '.join(map(repr, found))}. Save only the one that is meant."
        )
    [prefix] = found
    inner = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    openai = all(marker in inner for marker in _OPENAI_MARKERS)
    head = _head(tensors, prefix)
    state = {
        name if whole else f"visual.{name}": value
        for name, value in inner.items()
        if name not in _OPENAI_MARKERS and not name.startswith(tuple(f"{head}." for head in _HEADS))
    }
    return Weights(state, head, True if openai else None, openai)


def _unwrapped(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by names without the parts that wrappers add, anywhere in the name. Raises UserError if two tensors get
    the same name."""
    found: dict[str, str] = {}
    for name in tensors:
        plain = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
        if plain in found:
            raise UserError(f"holds {plain} twice, as {found[plain]} and {name}. Save only the model that is meant.")
        found[plain] = name
    return {plain: tensors[name] for plain, name in found.items()}


def _what_else(tensors: Mapping[str, Tensor]) -> str:
    if any("vision_model.encoder.layers." in name for name in tensors):
        return (
            "its tensors have the names of Hugging Face's transformers (vision_model.encoder …). Take the "
            "open_clip version of these weights."
        )
    if any(name.endswith("patch_embed.proj.weight") and "visual.trunk." not in name for name in tensors):
        return (
            "its tensors have timm's names (patch_embed …). Take the open_clip version of these weights; in a "
            f"repository of timm's it is {HUB_WEIGHTS}."
        )
    if any("visual.trunk." in name for name in tensors):
        return "its image tower is timm's (visual.trunk …), which cannot be trained. Choose the weights of a ViT."
    some = ", ".join(sorted(tensors)[:3])
    return f"there is no visual.conv1.weight among its {len(tensors)} tensors" + (f" ({some} …)." if some else ".")


def _prefixes(tensors: Mapping[str, Tensor], name: str) -> list[str]:
    """The prefixes of all keys that end with a name."""
    return sorted(key[: -len(name)] for key in tensors if key == name or key.endswith("." + name))


def _head(tensors: Mapping[str, Tensor], prefix: str) -> tuple[Tensor, Tensor] | None:
    """The linear head beside or around the module of this prefix."""
    parts = prefix.split(".")[:-1]
    around = ["".join(f"{part}." for part in parts[:depth]) for depth in range(len(parts) + 1)]
    found = [f"{outer}{head}" for outer in around for head in _HEADS if f"{outer}{head}.weight" in tensors]
    if not found:
        return None
    if len(found) > 1:
        raise UserError(f"holds {len(found)} heads, {' and '.join(found)}. Save only the one that is meant.")
    weight = tensors[f"{found[0]}.weight"]
    if weight.dim() != 2 or not weight.is_floating_point():
        raise UserError(
            f"holds a {found[0]}.weight of shape {tuple(weight.shape)} and type "
            f"{str(weight.dtype).removeprefix('torch.')}; a linear head has the shape (classes, features) and "
            "floating-point numbers."
        )
    bias = tensors.get(f"{found[0]}.bias")
    return weight, weight.new_zeros(len(weight)) if bias is None else bias


def _is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(entry.endswith("/constants.pkl") for entry in archive.namelist())
    except zipfile.BadZipFile:
        return False
