#!/usr/bin/env python3
"""A model for other programs: an open_clip checkpoint, a folder for the Hugging Face hub, or ONNX.

    python tools/export.py RUN --format open-clip --pretrained openai --out robust.safetensors    # or .pt
    python tools/export.py RUN --format hub --pretrained openai --out robust/
    python tools/export.py RUN --format onnx --out robust.onnx

open-clip   a whole CLIP: the model's image tower with the text tower of --pretrained, which it was fine-tuned from.
            open_clip.create_model(NAME, pretrained=FILE) loads it. The model's own head has no place in it.
hub         the same with its configuration, preprocessing and a model card, and the head in a file of its own. Upload
            the folder, or load it from disk: open_clip.create_model_and_transforms("local-dir:FOLDER").
onnx        pixels (N, 3, H, W), float32, RGB in 0…1 → features (N, D), not normalised, and logits (N, classes). Mean
            and standard deviation are in the graph; resizing (bicubic, of the short side) and cropping are not.

What is written is loaded again by the program that it is for, and given a random batch: features or logits that differ
from the model's by more than a ten-thousandth of the largest are an error, and nothing is left there.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cfmask.errors import UserError, exits_cleanly  # noqa: E402
from cfmask.files import save_tensors, write_atomically, written_aside  # noqa: E402
from cfmask.models.head import ModelInfo, build_clip, read_info  # noqa: E402
from cfmask.models.tower import Classifier, Normalise  # noqa: E402
from cfmask.models.weights import HUB_CONFIG, HUB_WEIGHTS, check_activation, find_weights, read_weights  # noqa: E402
from tools._progress import stages  # noqa: E402
from tools._shared import MODEL_HELP, load_models  # noqa: E402

TOLERANCE = 1e-4
"""How far what the other program computes may be off, in parts of the largest value: fp32 in another order."""
HEAD = "classifier.safetensors"
# protobuf's limit of 2 GiB, and room for the graph: a larger model's weights get a file beside it.
_ONNX_BYTES = 2**31 - 2**26


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--format", required=True, choices=("open-clip", "hub", "onnx"), help="what to write; see above"
    )
    parser.add_argument(
        "--pretrained",
        metavar="TAG_OR_PATH",
        help="open_clip tag, or the path of a checkpoint: what the model was fine-tuned from, for its text tower",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="PATH", help="file or folder to write")
    arguments = parser.parse_args(argv)
    out, kind, pretrained = arguments.out, arguments.format, arguments.pretrained
    endings = {"open-clip": (".safetensors", ".pt"), "onnx": (".onnx",), "hub": ("",)}[kind]
    if out.suffix not in endings and kind != "hub":
        raise UserError(f"--out {out}: for --format {kind} its name ends in {' or '.join(endings)}.")
    if kind == "hub" and out.exists():
        raise UserError(f"--out {out} is there already, and a folder is written whole. Remove it, or choose another.")
    if kind == "onnx" and pretrained:
        raise UserError("--pretrained would do nothing with --format onnx: it has no text tower.")
    if kind != "onnx" and not pretrained:
        raise UserError(
            f"--format {kind} needs --pretrained TAG_OR_PATH: a fine-tuned model has no text tower, and open_clip "
            "loads none without. Give the checkpoint that the model was fine-tuned from; --format onnx needs none."
        )

    with written_aside(out) as aside, stages(4) as begin:
        begin("reading the model")
        [model], info = load_models([arguments.model])
        model.eval()
        if kind == "onnx":
            export_onnx(model, info, aside, begin)
        elif kind == "hub":
            export_hub(model, info, pretrained, aside, begin)
        else:
            export_open_clip(model, info, pretrained, aside, begin)
    how = {
        "open-clip": f", for {_how_to_create(info, out)}",
        "hub": f', for open_clip.create_model_and_transforms("local-dir:{out}")',
        "onnx": "",
    }[kind]
    print(f"written: {out}{how}")


# --- open_clip ------------------------------------------------------------------------------------------------------


def whole_clip(model: Classifier, info: ModelInfo, pretrained: str) -> dict[str, Tensor]:
    """State dict of a CLIP: this model's image tower, fp32, with the text tower of a checkpoint.

    Raises:
        UserError: weights that cannot be had, have no text tower, or are another model's.
    """
    if os.path.isfile(pretrained):
        if read_info(pretrained) is not None:
            raise UserError(
                f"{pretrained} is a cfmask model file, which has no text tower. Give the checkpoint that it was made "
                "from."
            )
        path = Path(pretrained)
    else:
        path = find_weights(info.name, pretrained)
    weights = read_weights(path)
    check_activation(info.name, info.config, pretrained, weights.quick_gelu)
    # Whole first, so that a checkpoint of another architecture is refused although its image tower goes.
    state = build_clip(info, weights.state).state_dict()
    return {**state, **{f"visual.{name}": value for name, value in model.visual.state_dict().items()}}


def export_open_clip(
    model: Classifier, info: ModelInfo, pretrained: str, out: Path, begin: Callable[[str], object]
) -> None:
    """Write a checkpoint that open_clip.create_model loads.

    Args:
        begin: told what comes next.

    Raises:
        UserError: as ``whole_clip``.
    """
    import open_clip

    begin("reading the text tower")
    state = whole_clip(model, info, pretrained)
    begin("writing")
    if out.suffix == ".pt":
        torch.save(state, out)
    else:
        save_tensors(out, state, {"format": "pt"})
    begin("checking")
    loaded = build_clip(info, {name: torch.zeros_like(value) for name, value in state.items()})
    open_clip.load_checkpoint(loaded, str(out))
    _check_features(loaded, model)


def _how_to_create(info: ModelInfo, out: Path) -> str:
    import open_clip

    if open_clip.get_model_config(info.name) == info.config:
        return f'open_clip.create_model("{info.name}", pretrained="{out}")'
    name = Path(info.name).stem
    return f'open_clip.add_model_config("{info.name}"); open_clip.create_model("{name}", pretrained="{out}")'


def export_hub(model: Classifier, info: ModelInfo, pretrained: str, out: Path, begin: Callable[[str], object]) -> None:
    """Write the folder of a Hugging Face repository for open_clip:

        open_clip_config.json        model and preprocessing
        open_clip_model.safetensors  the whole CLIP
        classifier.safetensors       the fine-tuned head: weight (classes, D), bias (classes,); metadata: its classes
        README.md                    the model card

    Args:
        begin: told what comes next.

    Raises:
        UserError: as ``whole_clip``; or a model whose tokenizer would have to be in the folder.
    """
    import open_clip

    if tokenizer := info.config.get("text_cfg", {}).get("hf_tokenizer_name"):
        raise UserError(
            f"{info.name} takes Hugging Face's tokenizer {tokenizer}, which open_clip looks for in the folder, and "
            "cfmask does not copy it there. Use --format open-clip."
        )
    begin("reading the text tower")
    state = whole_clip(model, info, pretrained)
    preprocess = {"mean": info.mean, "std": info.std, "interpolation": "bicubic", "resize_mode": "shortest"}
    begin("writing")
    out.mkdir()
    config = json.dumps({"model_cfg": info.config, "preprocess_cfg": preprocess}, indent=2)
    write_atomically(out / HUB_CONFIG, config)
    save_tensors(out / HUB_WEIGHTS, state, {"format": "pt"})
    names = {"classes": json.dumps(info.classes), "class_names": json.dumps(info.class_names)}
    save_tensors(out / HEAD, model.head.state_dict(), {"format": "pt", **names})
    write_atomically(out / "README.md", _card(info))
    begin("checking")
    loaded = open_clip.create_model(f"local-dir:{out}")
    if (tuple(loaded.visual.image_mean), tuple(loaded.visual.image_std)) != (info.mean, info.std):
        raise RuntimeError("open_clip reads another preprocessing out of the folder than was written into it")
    _check_features(loaded.eval(), model)


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
def _check_features(clip: nn.Module, model: Classifier) -> None:
    pixels = torch.rand(2, 3, *model.visual.image_size) * 4 - 2
    _compare("open_clip", {"features": (clip.encode_image(pixels), model.encode(pixels))})  # type: ignore[operator]


def _compare(program: str, results: dict[str, tuple[Tensor, Tensor]]) -> None:
    for name, (theirs, ours) in results.items():
        off = float((theirs - ours).abs().max() / ours.abs().max())
        if not off <= TOLERANCE:
            raise RuntimeError(
                f"{program} computes other {name} from what was exported than cfmask does: they differ by {off:.1e} of "
                f"the largest, and {TOLERANCE:.0e} is rounding. Nothing was written."
            )


# --- ONNX -----------------------------------------------------------------------------------------------------------


class Deployed(nn.Module):
    """(N, 3, H, W) in 0…1 → features (N, D), logits (N, classes): preprocessing from there on, tower and head."""

    def __init__(self, model: Classifier, info: ModelInfo) -> None:
        super().__init__()
        self.normalise, self.model = Normalise(info.mean, info.std), model

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        features = self.model.encode(self.normalise(pixels))
        return features, self.model.classify(features)


@torch.no_grad()
def export_onnx(model: Classifier, info: ModelInfo, out: Path, begin: Callable[[str], object]) -> None:
    """Write an ONNX graph with weights; those of a model of 2 GB and more in OUT.data beside it.

    Args:
        begin: told what comes next.

    Raises:
        UserError: the packages that write and check ONNX are missing.
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


if __name__ == "__main__":
    sys.exit(main())
