#!/usr/bin/env python3
"""Make a model file from an open_clip checkpoint: its image tower, and a zero-shot head from its text tower, or a head
from the class means of images, for image towers without a text tower.

    python tools/build_head.py --out vit-b32.safetensors                     # OpenAI's ViT-B/32, ImageNet, 80 templates
    python tools/build_head.py --model ViT-L-14 --pretrained laion2b_s32b_b82k --out vit-l14.safetensors
    python tools/build_head.py --classes shards/train --templates templates.txt --out pets.safetensors
    python tools/build_head.py --pretrained soup.pt --keep-head --out soup.safetensors                    # its own head
    python tools/build_head.py --model vit.json --pretrained vit.pt --class-means shards/train --out vit.safetensors

All tools read the file, and a run starts from it: launch/submit.py --pretrained FILE, or --head FILE for the head
alone. --pretrained takes OpenAI's archives, open_clip's checkpoints, and state dicts of WiSE-FT, FLYP and model soups.

The activation, mean and standard deviation come from open_clip's tag, from OpenAI's archive, or from an
open_clip_config.json of a Hugging Face repository beside the file. A --model that contradicts them is refused. A bare
state dict has the same tensors with either activation, so --model alone decides: weights from OpenAI need a -quickgelu
model. --mean and --std are needed where no source gives them. --class-means also prints the scale of the features.

If it is interrupted, the same command resumes after the classes that are done.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

try:
    from cfmask import recipe
    from cfmask.convert.tables import class_list
    from cfmask.data.shards import load_manifest
    from cfmask.errors import UserError
    from cfmask.models.head import read_info, save_model
    from cfmask.models.initial import check_initial_model, describe, initial_model, zero_shot_info
    from cfmask.models.zero_shot import openai_templates, read_templates
    from cfmask.runtime.command import CommandParser, exits_cleanly
    from cfmask.runtime.files import written_aside
    from cfmask.tool_arguments import add_device_argument
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing}. Activate the environment first: source .venv/bin/activate (to create it: README.md).")


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    arguments = parser().parse_args(argv)
    out, name, pretrained = arguments.out, arguments.model, arguments.pretrained
    if out.suffix != ".safetensors":
        raise UserError(f"--out {out}: the name of a model file has to end in .safetensors.")
    if arguments.keep_head and arguments.templates:
        raise UserError("--templates would do nothing with --keep-head: no head is built.")
    start = {setting: getattr(arguments, setting) for setting in ("mean", "std", "resize_positions")}
    if arguments.class_means:
        for flag in ("classes", "templates", "keep_head"):
            if getattr(arguments, flag):
                raise UserError(f"--{flag.replace('_', '-')} would do nothing with --class-means. Leave it out.")
        build_class_means(arguments, start)
        return
    if os.path.isfile(pretrained) and read_info(pretrained) is not None:
        raise UserError(
            f"{pretrained} is a cfmask model file. It has a head already, and no text tower to build another from. "
            "Give the checkpoint of the whole CLIP that it was made from, or --class-means."
        )

    classes = class_list(arguments.classes or "imagenet")
    templates = read_templates(arguments.templates) if arguments.templates else openai_templates()
    kept_rows = out.with_name(f".{out.name}.rows")
    if not arguments.keep_head and out.exists():
        if read_info(out) == zero_shot_info(check_initial_model(name, pretrained, None, classes, **start), templates):
            print(f"up to date: {out}")
            return
    start |= {"keep_head": arguments.keep_head, "templates": templates, "kept_rows": kept_rows}
    with written_aside(out) as aside:
        model, info = initial_model(name, pretrained, None, classes, arguments.device, **start)
        save_model(aside, model, info)
    for leftover in (kept_rows, kept_rows.with_name(f"{kept_rows.name}.part")):
        leftover.unlink(missing_ok=True)
    print(f"written: {out} ({len(classes)} classes; {info.provenance})")


def build_class_means(arguments: argparse.Namespace, preprocessing: dict[str, Any]) -> None:
    start = describe(arguments.model, arguments.pretrained, **preprocessing)
    manifest = load_manifest(Path(arguments.class_means))
    from cfmask.evaluation.class_means import class_means_info, class_means_model

    if arguments.out.exists() and read_info(arguments.out) == class_means_info(start, manifest):
        print(f"up to date: {arguments.out}")
        return
    with written_aside(arguments.out) as aside:
        model, info, scale = class_means_model(start, manifest, arguments.device)
        save_model(aside, model, info)
    print(f"written: {arguments.out} ({len(info.classes)} classes; {info.provenance})")
    print(f"mean square of the features: {scale.mean:.4g} (standard deviation over images {scale.std:.2g})")


def parser() -> CommandParser:
    p = CommandParser(__doc__)
    add = p.add_argument
    settings = {setting.name: setting for setting in dataclasses.fields(recipe.Model)}
    default = settings["name"].default
    add("--model", default=default, metavar="NAME", help=f"{settings['name'].metadata['help']} (default: {default})")
    default = settings["pretrained"].default
    help_of_weights = f"open_clip tag, or the path of a checkpoint (default: {default})"
    add("--pretrained", default=default, metavar="TAG_OR_PATH", help=help_of_weights)
    for setting in ("mean", "std"):
        text = f"{settings[setting].metadata['help']} (default: those of the checkpoint or tag)"
        add(f"--{setting}", type=float, nargs=3, metavar=("R", "G", "B"), help=text)
    add(
        "--resize-positions",
        action="store_true",
        help="interpolate the positional embedding (bicubic) of weights that were trained on images of another size "
        "than the --model's",
    )
    add(
        "--classes",
        metavar="LIST",
        help="classes of the head: `imagenet`, a file with a line `folder<TAB>display name` for each class, class 0 "
        "first, or a folder of shards (default: imagenet)",
    )
    add(
        "--templates",
        type=Path,
        metavar="FILE",
        help="file with a sentence on each line, {} for the class name (default: OpenAI's 80 templates for ImageNet)",
    )
    add(
        "--keep-head",
        action="store_true",
        help="keep the checkpoint's head (classification_head.weight), whose rows are --classes, and build none",
    )
    add(
        "--class-means",
        metavar="DIR",
        help="folder of shards, one set: row c of the head is the mean of the normalised features of its images of "
        "class c; the classes are those of the set",
    )
    add_device_argument(p)
    add("--out", type=Path, required=True, metavar="FILE", help="model file to write (.safetensors)")
    return p


if __name__ == "__main__":
    sys.exit(main())
