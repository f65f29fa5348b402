#!/usr/bin/env python3
"""Draw a contact sheet of what a model is trained on: image, CAM, mask, donor, counterfactual image.

    python tools/show_masks.py RUN --shards DIR --set val --out masks.png
    python tools/show_masks.py MODEL --images photos/*.jpg --out masks.png

A column is a sample. Donors are drawn as in training, but no image is shown as its own donor.
The CAM is that of the true class where it is known: from the shards, or from a parent folder that is named after a
class. Otherwise it is that of the predicted class.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

try:
    from cfmask.data.shards import load_sets
    from cfmask.errors import UserError
    from cfmask.recipe import Method, Recipe
    from cfmask.run_search import find_model
    from cfmask.runtime.command import CommandParser, exits_cleanly
    from cfmask.runtime.progress import progress_stages
    from cfmask.tool_arguments import MODEL_HELP, load_models, recorded_method
    from launch.allocation.data import add_shards_argument, fill_in_data
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing}. Activate the environment first: source .venv/bin/activate (to create it: README.md).")


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--images", nargs="+", type=Path, metavar="FILE", help="image files, or folders of them")
    add_shards_argument(parser, cluster=True)
    parser.add_argument("--set", default="val", metavar="SET", help="folder under --shards (default: val)")
    parser.add_argument("--count", type=int, default=8, metavar="N", help="images on the contact sheet (default: 8)")
    parser.add_argument(
        "--mask", choices=("object", "context", "random"), help="what is masked (default: the run's, or object)"
    )
    parser.add_argument(
        "--fill",
        choices=("single-fill", "multi-fill", "no-fill"),
        help="what replaces masked patches (default: the run's, or single-fill)",
    )
    parser.add_argument(
        "--threshold", type=float, metavar="X", help="CAM threshold, in 0…1 (default: the run's, or the paper's)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of the choice of images and donors (default: 0)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("masks.png"), metavar="FILE", help="picture to write (default: masks.png)"
    )
    arguments = parser.parse_args(argv)
    if arguments.images and arguments.shards:
        raise UserError("Give either --images or --shards: the images to draw masks of.")
    if not arguments.images:
        fill_in_data(arguments)
    if arguments.count < 1:
        raise UserError("--count must be at least 1.")
    find_model(arguments.model)  # an error in its path comes before seconds of imports
    # Imported here: torch and matplotlib take seconds to import, and --help does not need them.
    from cfmask.report.contact_sheet import draw_contact_sheet, images_of_files, images_of_set, images_to_read

    with progress_stages(3) as begin:
        begin("reading the model")
        [model], info = load_models([arguments.model])
        method = method_of(arguments)
        begin("reading images")
        size, read = model.image_size, images_to_read(arguments.count)
        if arguments.images:
            images, labels = images_of_files(arguments.images, read, size, info.classes)
        else:
            [manifest] = load_sets(arguments.shards, [arguments.set]).values()
            images, labels = images_of_set(manifest, read, size, arguments.seed)
            if tuple(wnid for wnid, _ in manifest.classes) == info.classes:
                info = replace(info, class_names=info.class_names or tuple(name for _, name in manifest.classes))
        begin("drawing")
        draw_contact_sheet(arguments.out, model, info, images, labels, method, arguments.count, arguments.seed)
    print(f"written: {arguments.out}")


def method_of(arguments: argparse.Namespace) -> Method:
    """The method that the model was trained with, changed by the flags."""
    recorded = recorded_method(arguments.model) or Method()
    if not recorded.masked or arguments.mask or arguments.fill:
        method = Method(mask=arguments.mask, fill=arguments.fill, threshold=arguments.threshold)
    elif arguments.threshold is not None:
        method = replace(recorded, threshold=arguments.threshold)
    else:
        method = recorded
    return Recipe(method=method).resolved().method


if __name__ == "__main__":
    sys.exit(main())
