"""Export of a model for other programs: an open_clip checkpoint, a folder for the Hugging Face hub, or ONNX.

Each export is loaded by that program, as its documentation says, and run on random pixels. Features or logits that
differ from the model's are an error.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from cfmask.data import images
from cfmask.errors import UserError
from cfmask.models.architecture import HUB_CONFIG, check_activation
from cfmask.models.downloads import HUB_WEIGHTS
from cfmask.models.head import ModelInfo, read_info
from cfmask.models.initial import check_text_settings, configs_of
from cfmask.models.open_clip_tables import model_config
from cfmask.models.preprocessing import INTERPOLATIONS, OPENAI_MEAN, OPENAI_STD, RESIZE_MODE
from cfmask.models.tower import Classifier, Normalise
from cfmask.models.tower_weights import fitting_positions
from cfmask.models.weights import CONFIG_ENTRY, find_weights, is_path, read_tag, read_weights
from cfmask.models.zero_shot import build_clip
from cfmask.runtime.files import write_atomically
from cfmask.runtime.tensor_files import save_tensors

TOLERANCE = 1e-4
"""Largest difference to the other program's results, relative to the largest value: fp32 sums in another order."""
HEAD = "classifier.safetensors"
# protobuf's limit of 2 GiB, minus room for the graph. The weights of larger models go into a file beside it.
_ONNX_BYTES = 2**31 - 2**26


# --- open_clip ------------------------------------------------------------------------------------------------------


def whole_clip(model: Classifier, info: ModelInfo, pretrained: str) -> dict[str, Tensor]:
    """State dict of a CLIP: this model's image tower, fp32, and the text tower of a checkpoint.

    Raises:
        UserError: a checkpoint that is not available, has no text tower, or is that of another model; or a model whose
            configuration has no text tower.
    """
    if not info.config.get("text_cfg"):
        raise UserError(
            f"The model {info.name} is an image tower alone, and open_clip loads a CLIP, with a text tower. Choose "
            "--format onnx."
        )
    remedy = "Give the weights that this model was fine-tuned from."
    if not is_path(pretrained):
        quick_gelu = bool(read_tag(info.name, pretrained).get("quick_gelu"))
        check_activation(info.name, info.config, pretrained, quick_gelu, remedy=remedy)
    path = find_weights(info.name, pretrained, info.config)
    if read_info(path) is not None:
        raise UserError(
            f"{pretrained} is a cfmask model file, which has no text tower. Give the checkpoint from which it was made."
        )
    weights = read_weights(path)
    configs = configs_of(path, weights) if os.path.isfile(pretrained) else {}
    for config in configs.values():
        check_activation(info.name, info.config, pretrained, bool(config.get("quick_gelu")), remedy=remedy)
    check_text_settings(configs, info, pretrained, remedy)
    check_activation(info.name, info.config, pretrained, weights.quick_gelu, remedy=remedy)
    # A whole CLIP is built first, to refuse a checkpoint of another architecture although its image tower is not used.
    state = build_clip(info, fitting_positions(weights.state, info, pretrained)).state_dict()
    return {**state, **{f"visual.{name}": value for name, value in model.visual.state_dict().items()}}


def hub_config(info: ModelInfo) -> str:
    """The text of an open_clip_config.json."""
    preprocess = {
        "mean": info.mean,
        "std": info.std,
        "interpolation": INTERPOLATIONS[0],
        "resize_mode": RESIZE_MODE,
    }
    return json.dumps({"model_cfg": info.config, "preprocess_cfg": preprocess}, indent=2)


def export_open_clip(
    model: Classifier, info: ModelInfo, pretrained: str, out: Path, begin: Callable[[str], object]
) -> list[Path]:
    """Write a checkpoint for open_clip.create_model_and_transforms; and beside it the model's configuration, if
    open_clip does not have it.

    Args:
        begin: called with the name of each stage.

    Returns:
        The files, the checkpoint first.

    Raises:
        UserError: as ``whole_clip``.
    """
    import open_clip

    begin("reading the text tower")
    state = whole_clip(model, info, pretrained)
    begin("writing")
    if out.suffix == ".pt":
        torch.save({"state_dict": state, CONFIG_ENTRY: hub_config(info)}, out)
    else:
        save_tensors(out, state, {"format": "pt", CONFIG_ENTRY: hub_config(info)})
    written = [out]
    if known_name(info) is None:
        written.append(_config_of(out))
        write_atomically(written[1], json.dumps(info.config, indent=2))
    begin("checking")
    with _registry():
        if known_name(info) is None:
            open_clip.add_model_config(written[1])
        loaded, _, preprocess = open_clip.create_model_and_transforms(**creation(info, out))
    _check_pixels(loaded, preprocess, model, info)
    return written


def known_name(info: ModelInfo) -> str | None:
    """open_clip's name of a model of this configuration; None if it has none."""
    return next((name for name in (info.name, Path(info.name).stem) if model_config(name) == info.config), None)


def _config_of(out: Path) -> Path:
    """Path of the configuration of an exported checkpoint; its stem is open_clip's name of the model."""
    return out.with_suffix(".open_clip.json")


def creation(info: ModelInfo, out: Path) -> dict[str, Any]:
    """Arguments of open_clip.create_model_and_transforms for an exported checkpoint. For a file, it assumes OpenAI's
    mean and standard deviation unless they are given."""
    arguments: dict[str, Any] = {"model_name": known_name(info) or _config_of(out).stem, "pretrained": str(out)}
    if (info.mean, info.std) != (OPENAI_MEAN, OPENAI_STD):
        arguments |= {"image_mean": info.mean, "image_std": info.std}
    return arguments


def how_to_create(info: ModelInfo, out: Path) -> str:
    """Python code that loads an exported checkpoint and its preprocessing."""
    arguments = ", ".join(f"{name}={value!r}" for name, value in creation(info, out.absolute()).items())
    register = f"open_clip.add_model_config({str(_config_of(out.absolute()))!r})\n"
    return (
        "import open_clip\n"
        + (register if known_name(info) is None else "")
        + f"model, _, preprocess = open_clip.create_model_and_transforms({arguments})"
    )


@contextlib.contextmanager
def _registry() -> Iterator[None]:
    """Restores open_clip's list of models at the end."""
    from open_clip import factory

    paths, configs = [*factory._MODEL_CONFIG_PATHS], dict(factory._MODEL_CONFIGS)
    try:
        yield
    finally:
        factory._MODEL_CONFIG_PATHS[:], factory._MODEL_CONFIGS = paths, configs


def export_hub(model: Classifier, info: ModelInfo, pretrained: str, out: Path, begin: Callable[[str], object]) -> None:
    """Write the folder of a Hugging Face repository for open_clip:

        open_clip_config.json        model and preprocessing
        open_clip_model.safetensors  the whole CLIP
        classifier.safetensors       the fine-tuned head: weight (classes, D), bias (classes,); metadata: its classes
        README.md                    the model card

    Args:
        begin: called with the name of each stage.

    Raises:
        UserError: as ``whole_clip``; or a model whose tokenizer would have to be in the folder.
    """
    import open_clip

    if tokenizer := (info.config.get("text_cfg") or {}).get("hf_tokenizer_name"):
        raise UserError(
            f"{info.name} uses Hugging Face's tokenizer {tokenizer}, which open_clip expects in the folder. cfmask "
            "does not copy it. Use --format open-clip."
        )
    begin("reading the text tower")
    state = whole_clip(model, info, pretrained)
    begin("writing")
    out.mkdir()
    write_atomically(out / HUB_CONFIG, hub_config(info))
    save_tensors(out / HUB_WEIGHTS, state, {"format": "pt"})
    names = {"classes": json.dumps(info.classes), "class_names": json.dumps(info.class_names)}
    save_tensors(out / HEAD, model.head.state_dict(), {"format": "pt", **names})
    write_atomically(out / "README.md", _card(info))
    begin("checking")
    loaded, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{out}")
    _check_pixels(loaded, preprocess, model, info)


def _card(info: ModelInfo) -> str:
    return f"""---
library_name: open_clip
pipeline_tag: zero-shot-image-classification
tags:
- clip
---
A CLIP whose image tower was fine-tuned with cfmask.

    model, _, preprocess = open_clip.create_model_and_transforms("local-dir:FOLDER")    # or hf-hub:OWNER/NAME

The head that it was fine-tuned with, for {len(info.classes)} classes, is in `{HEAD}`: logits are `weight @ f + bias` of
the L2-normalised feature f. The text tower is the pre-trained one.

Weights: {info.provenance}
"""


@torch.no_grad()
def _check_pixels(clip: Any, preprocess: Callable[[Image.Image], Tensor], model: Classifier, info: ModelInfo) -> None:
    """Compare features of random images. Raises RuntimeError if they differ."""
    size = model.image_size
    # The images need no resize, in which programs differ by rounding.
    pixels = np.random.default_rng(0).integers(0, 256, (2, size, size + 2 * (size // 4), 3), dtype=np.uint8)
    resize = {key: clip.visual.preprocess_cfg[key] for key in ("resize_mode", "interpolation")}
    if resize != {"resize_mode": RESIZE_MODE, "interpolation": INTERPOLATIONS[0]}:
        raise RuntimeError(f"open_clip resizes images in another way than cfmask: {resize}. Nothing was written.")
    theirs = torch.stack([preprocess(Image.fromarray(image)) for image in pixels])
    ours = torch.stack([images.crop(torch.from_numpy(image).permute(2, 0, 1), size) for image in pixels])
    features = clip.eval().encode_image(theirs)
    _compare("open_clip", {"features": (features, model.encode(Normalise(info.mean, info.std)(ours)))})


def _compare(program: str, results: dict[str, tuple[Tensor, Tensor]]) -> None:
    for name, (theirs, ours) in results.items():
        off = float((theirs - ours).abs().max() / ours.abs().max())
        if not off <= TOLERANCE:
            raise RuntimeError(
                f"With the exported file, {program} computes other {name} than cfmask: they differ by {off:.1e} of the "
                f"largest value, and {TOLERANCE:.0e} is allowed for rounding. Nothing was written."
            )


# --- ONNX -----------------------------------------------------------------------------------------------------------


class Deployed(nn.Module):
    """Normalisation, tower and head: (N, 3, H, W) in 0…1 → features (N, D), logits (N, classes)."""

    def __init__(self, model: Classifier, info: ModelInfo) -> None:
        super().__init__()
        self.normalise, self.model = Normalise(info.mean, info.std), model

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        features = self.model.encode(self.normalise(pixels))
        return features, self.model.classify(features)


@torch.no_grad()
def export_onnx(model: Classifier, info: ModelInfo, out: Path, begin: Callable[[str], object]) -> None:
    """Write an ONNX graph with weights. The weights of models of 2 GB and more are in OUT.data beside it.

    Args:
        begin: called with the name of each stage.

    Raises:
        UserError: packages that write and check ONNX are missing.
    """
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--format onnx needs {' and '.join(missing)}, not installed: pip install {' '.join(missing)}")
    import onnx

    deployed = Deployed(model, info).eval()
    size = sum(value.numel() * value.element_size() for value in deployed.state_dict().values())
    begin("writing the graph")
    torch.onnx.export(
        deployed,
        (torch.rand(2, 3, *model.visual.image_size),),
        str(out),
        input_names=["pixels"],
        output_names=["features", "logits"],
        dynamic_shapes={"pixels": {0: torch.export.Dim("batch")}},
        dynamo=True,
        external_data=size > _ONNX_BYTES,
        verbose=False,
    )
    begin("naming its classes")
    proto = onnx.load(out, load_external_data=False)
    onnx.helper.set_model_props(proto, {"cfmask": info.to_metadata()["cfmask"]})
    onnx.save(proto, out)
    begin("checking")
    onnx.checker.check_model(out)
    _check_onnx(out, deployed, model)


def _check_onnx(graph: Path, deployed: Deployed, model: Classifier) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        pixels = torch.rand(batch, 3, *model.visual.image_size)
        theirs = session.run(["features", "logits"], {"pixels": pixels.numpy()})
        features, logits = deployed(pixels)
        _compare(
            "onnxruntime",
            {"features": (torch.from_numpy(theirs[0]), features), "logits": (torch.from_numpy(theirs[1]), logits)},
        )
