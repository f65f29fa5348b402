#!/usr/bin/env python3
"""Make a model file from an open_clip checkpoint: its image tower, and a zero-shot head from its text tower.

    python tools/build_head.py --out vit-b32.safetensors                     # OpenAI's ViT-B/32, ImageNet, 80 templates
    python tools/build_head.py --model ViT-L-14 --pretrained laion2b_s32b_b82k --out vit-l14.safetensors
    python tools/build_head.py --classes shards/train --templates templates.txt --out pets.safetensors
    python tools/build_head.py --pretrained soup.pt --keep-head --out soup.safetensors                    # its own head

All tools read the file, and a run starts from it: launch/submit.py --pretrained FILE, or --head FILE for the head
alone. --pretrained takes OpenAI's archives, open_clip's checkpoints, and state dicts of WiSE-FT, FLYP and model soups.

The activation, mean and standard deviation come from open_clip's tag, from OpenAI's archive, or from an
open_clip_config.json of a Hugging Face repository beside the file. A --model that contradicts them is refused. A bare
state dict has the same tensors with either activation, so --model alone decides: weights from OpenAI need a -quickgelu
model. --mean and --std are needed where no source gives them.

If it is interrupted, the same command resumes after the classes that are done.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path

try:
    from cfmask import recipe
    from cfmask.convert.tables import read_classes
    from cfmask.data import imagenet
    from cfmask.data.shards import load_manifest
    from cfmask.errors import UserError
    from cfmask.models.head import read_info, save_model
    from cfmask.models.initial import check_initial_model, initial_model, zero_shot_info
    from cfmask.models.zero_shot import openai_templates, read_templates
    from cfmask.runtime.command import CommandParser, exits_cleanly
    from cfmask.runtime.files import written_aside
    from cfmask.tool_arguments import add_device_argument
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing}. Activate the environment first: source .venv/bin/activate (to create it: README.md).")


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    parser = CommandParser(__doc__)
    settings = {setting.name: setting for setting in dataclasses.fields(recipe.Model)}
    parser.add_argument(
        "--model",
        default=settings["name"].default,
        metavar="NAME",
        help=f"{settings['name'].metadata['help']} (default: {settings['name'].default})",
    )
    parser.add_argument(
        "--pretrained",
        default=settings["pretrained"].default,
        metavar="TAG_OR_PATH",
        help=f"open_clip tag, or the path of a checkpoint (default: {settings['pretrained'].default})",
    )
    for setting in ("mean", "std"):
        parser.add_argument(
            f"--{setting}",
            type=float,
            nargs=3,
            metavar=("R", "G", "B"),
            help=f"{settings[setting].metadata['help']} (default: those of the checkpoint or tag)",
        )
    parser.add_argument(
        "--classes",
        default="imagenet",
        metavar="LIST",
        help="classes of the head: `imagenet`, a file with a line `folder<TAB>display name` for each class, class 0 "
        "first, or a folder of shards (default: imagenet)",
    )
    parser.add_argument(
        "--templates",
        type=Path,
        metavar="FILE",
        help="file with a sentence on each line, {} for the class name (default: OpenAI's 80 templates for ImageNet)",
    )
    parser.add_argument(
        "--keep-head",
        action="store_true",
        help="keep the checkpoint's head (classification_head.weight), whose rows are --classes, and build none",
    )
    add_device_argument(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="model file to write (.safetensors)")
    arguments = parser.parse_args(argv)
    out, name, pretrained = arguments.out, arguments.model, arguments.pretrained
    if out.suffix != ".safetensors":
        raise UserError(f"--out {out}: the name of a model file has to end in .safetensors.")
    if arguments.keep_head and arguments.templates:
        raise UserError("--templates would do nothing with --keep-head: no head is built.")
    if os.path.isfile(pretrained) and read_info(pretrained) is not None:
        raise UserError(
            f"{pretrained} is a cfmask model file. It has a head already, and no text tower to build another from. "
            "Give the checkpoint of the whole CLIP that it was made from."
        )

    classes = class_list(arguments.classes)
    templates = read_templates(arguments.templates) if arguments.templates else openai_templates()
    kept_rows = out.with_name(f".{out.name}.rows")
    settings_given = {"mean": arguments.mean, "std": arguments.std, "keep_head": arguments.keep_head}
    if not arguments.keep_head and out.exists():
        start = check_initial_model(name, pretrained, None, classes, **settings_given)
        if read_info(out) == zero_shot_info(start, templates):
            print(f"up to date: {out}")
            return
    with written_aside(out) as aside:
        model, info = initial_model(
            name,
            pretrained,
            None,
            classes,
            arguments.device,
            templates=templates,
            kept_rows=kept_rows,
            **settings_given,
        )
        save_model(aside, model, info)
    for leftover in (kept_rows, kept_rows.with_name(f"{kept_rows.name}.part")):
        leftover.unlink(missing_ok=True)
    print(f"written: {out} ({len(classes)} classes; {info.provenance})")


def class_list(where: str) -> Sequence[tuple[str, str]]:
    """(folder, display name) by class id, from ``imagenet``, a class list or a folder of shards."""
    if where == "imagenet":
        return imagenet.classes()
    path = Path(where).expanduser()
    return load_manifest(path, check_files=False).classes if path.is_dir() else read_classes(path)


if __name__ == "__main__":
    sys.exit(main())
