#!/usr/bin/env python3
"""A model for other programs: an open_clip checkpoint, a folder for the Hugging Face hub, or ONNX.

    python tools/export.py RUN --format open-clip --pretrained openai --out robust.safetensors    # or .pt
    python tools/export.py RUN --format hub --pretrained openai --out robust/
    python tools/export.py RUN --format onnx --out robust.onnx

open-clip   a whole CLIP: the model's image tower with the text tower of --pretrained, which it was fine-tuned from.
            The lines of Python that load it, with its preprocessing, are printed. A model that open_clip does not have
            gets its configuration beside it, FILE's name with .open_clip.json. The model's own head has no place in it.
hub         the same with its configuration, preprocessing and a model card, and the head in a file of its own. Upload
            the folder, or load it from disk: open_clip.create_model_and_transforms("local-dir:FOLDER").
onnx        pixels (N, 3, H, W), float32, RGB in 0…1 → features (N, D), not normalised, and logits (N, classes). Mean
            and standard deviation are in the graph; resizing (bicubic, of the short side) and cropping are not.

What is written is loaded again by the program that it is for, and given random pixels: features or logits that differ
from the model's by more than a ten-thousandth of the largest are an error, and nothing is left there.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

try:
    from cfmask.errors import UserError
    from cfmask.runtime.command import exits_cleanly
    from cfmask.runtime.files import written_aside
    from cfmask.tool_arguments import MODEL_HELP, load_models
    from tools._progress import stages
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing}. Activate the environment first: source .venv/bin/activate (to create it: README.md).")


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

    from cfmask.models import export

    with written_aside(out) as aside, stages(4) as begin:
        begin("reading the model")
        [model], info = load_models([arguments.model])
        model.eval()
        if kind == "onnx":
            export.export_onnx(model, info, aside, begin)
        elif kind == "hub":
            export.export_hub(model, info, pretrained, aside, begin)
        else:
            export.export_open_clip(model, info, pretrained, aside, begin)
    print(f"written: {out}")
    if kind == "hub":
        print(f"To load it: open_clip.create_model_and_transforms({f'local-dir:{out}'!r})")
    elif kind == "open-clip":
        print(f"To load it:\n{export.how_to_create(info, out)}")


if __name__ == "__main__":
    sys.exit(main())
