#!/usr/bin/env python3
"""Export a model for other programs: an open_clip checkpoint, a folder for the Hugging Face hub, or ONNX.

    python tools/export.py RUN --format open-clip --pretrained openai --out robust.safetensors    # or .pt
    python tools/export.py RUN --format hub --pretrained openai --out robust/
    python tools/export.py RUN --format onnx --out robust.onnx

open-clip   a whole CLIP: the model's image tower, and the text tower of --pretrained, which it was fine-tuned from. The
            command prints the Python lines that load it with its preprocessing. For a model that open_clip does not
            know, the configuration is written beside it (.open_clip.json). The classification head is left out.
hub         the same with configuration, preprocessing and a model card, and the head in a file of its own. Upload the
            folder, or load it from disk: open_clip.create_model_and_transforms("local-dir:FOLDER").
onnx        pixels (N, 3, H, W), float32, RGB in 0…1 → features (N, D), not normalised, and logits (N, classes). The
            graph normalises by mean and standard deviation. It does not resize (bicubic, the short side) or crop.

The exported file is loaded by its target program and compared with the model on random pixels. If features or logits
differ by more than a ten-thousandth of the largest, the command fails and leaves no file.
"""

from __future__ import annotations

import sys
from pathlib import Path

try:
    from cfmask.errors import UserError
    from cfmask.runtime.command import CommandParser, exits_cleanly
    from cfmask.runtime.files import written_aside
    from cfmask.runtime.progress import progress_stages
    from cfmask.tool_arguments import MODEL_HELP, load_models
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing}. Activate the environment first: source .venv/bin/activate (to create it: README.md).")


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--format", required=True, choices=("open-clip", "hub", "onnx"), help="output format, see above"
    )
    parser.add_argument(
        "--pretrained",
        metavar="TAG_OR_PATH",
        help="open_clip tag or checkpoint that the model was fine-tuned from, for its text tower",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="PATH", help="file or folder to write")
    arguments = parser.parse_args(argv)
    out, kind, pretrained = arguments.out, arguments.format, arguments.pretrained
    endings = {"open-clip": (".safetensors", ".pt"), "onnx": (".onnx",), "hub": ("",)}[kind]
    if out.suffix not in endings and kind != "hub":
        raise UserError(f"--out {out}: with --format {kind} the name has to end in {' or '.join(endings)}.")
    if kind == "hub" and out.exists():
        raise UserError(f"--out {out} exists already. Remove it, or choose another folder.")
    if kind == "onnx" and pretrained:
        raise UserError("--pretrained would do nothing with --format onnx, which has no text tower. Leave it out.")
    if kind != "onnx" and not pretrained:
        raise UserError(
            f"--format {kind} needs --pretrained TAG_OR_PATH, because a fine-tuned model has no text tower and "
            "open_clip needs one. Give the checkpoint that the model was fine-tuned from, or choose --format onnx."
        )

    from cfmask.models import export

    with written_aside(out) as aside, progress_stages(4) as begin:
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
