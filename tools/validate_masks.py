#!/usr/bin/env python3
"""Compare what models' CAMs mask with segmentation masks of the objects (appendix A.2 of the paper).

    python tools/validate_masks.py RUN --shards DIR --set train --segmentation MASKS --out mask-validation
    python tools/validate_masks.py RUN --images val2017 --segmentation annotations/panoptic_val2017.json

For each threshold and group of classes, averaged over images, in percent of pixels:

    image masking rate   masked share of the image
    object masking rate  masked share of the object (the image masking rate, if masks are independent of objects)
    IoU                  intersection over union of mask and object

    OUT/table.md  results.json      the numbers; images without a pixel of the object count for the first rate alone
    OUT/curves.png                  the same over thresholds
    OUT/sheet.png                   contact sheet of the last model: image, object, mask, overlap
    OUT/index.html                  a page with all of this, and the models
    OUT/parts.jsonl                 finished parts: if it is interrupted, the same command resumes after them

MASKS is a folder of PNGs or run-length JSONs named by sample key; a folder of shards that tools/segment.py made with
Mask2Former; or a COCO annotation file, with run-length encoded instances or panoptic. The PNGs of panoptic annotations
lie beside the JSON, in a folder or zip of its name.

With --images, the images are the photographs of the COCO annotations. Those have a category (dog) instead of a class of
the model (Chihuahua), so each image's CAM is that of the most probable class of its category.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

try:
    from cfmask import tool_arguments as shared
    from cfmask.errors import UserError
    from cfmask.run_search import find_model
    from cfmask.runtime.command import CommandParser, exits_cleanly
    from launch.allocation.data import add_shards_argument, fill_in_data
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing}. Activate the environment first: source .venv/bin/activate (to create it: README.md).")

# Some modules are imported in functions: torch takes seconds to import, and --help does not need it.


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    arguments = parser().parse_args(argv)
    check_arguments(arguments)
    from cfmask.data.segmentation import open_masks
    from cfmask.evaluation.mask_validation import Validation, method_to_validate, open_images
    from cfmask.report.labels import model_names
    from cfmask.report.mask_page import write_page
    from cfmask.report.masks import MaskReport, write_report

    names = model_names([find_model(path) for path in arguments.models], arguments.names, distinct=True)
    models, info = shared.load_models(arguments.models)
    asked = {"mask": arguments.mask, "cam": arguments.cam, "first_block": arguments.first_block}
    methods = [method_to_validate(shared.recorded_method(path), **asked) for path in arguments.models]
    segmented, groups = open_images(
        info,
        models[0].image_size,
        open_masks(arguments.segmentation, arguments.panoptic_pngs),
        arguments.groups,
        shards=(arguments.shards, arguments.set or "val") if arguments.shards else None,
        photos=arguments.images,
        threads=arguments.loader_workers,
        allow_missing=arguments.allow_missing_masks,
    )
    compute = {"device": arguments.device, "batch_size": arguments.batch_size}
    validation = Validation(arguments.models, models, methods, info, segmented, groups, arguments.thresholds, **compute)
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
        parts = validation.carry_out(arguments.out / "parts.jsonl", allow_missing=arguments.allow_missing_masks)
        report = MaskReport.of(validation, names, parts, arguments.segmentation)
        text, written = write_report(arguments.out, report, count=arguments.count, seed=arguments.seed)
        written.append(write_page(arguments.out, report))
    except OSError as error:
        raise UserError(f"{arguments.out} cannot be written ({error.strerror}). Choose another --out.") from None
    print(text)
    print("\nwritten:", *written)


def parser() -> argparse.ArgumentParser:
    p = CommandParser(__doc__)
    add = p.add_argument
    add("models", nargs="+", metavar="MODEL", help=shared.MODEL_HELP)
    add("--names", nargs="+", metavar="NAME", help=shared.NAMES_HELP)
    add_shards_argument(p, cluster=True)
    add("--set", metavar="SET", help="folder under --shards (default: val)")
    add("--images", type=Path, metavar="DIR_OR_ZIP", help="photographs of COCO annotations, instead of shards")
    add("--segmentation", required=True, metavar="PATH", help="segmentation masks of the images, see above")
    add(
        "--panoptic-pngs",
        type=Path,
        metavar="DIR_OR_ZIP",
        help="PNGs of segment ids of panoptic annotations (default: the folder or zip beside the JSON with its name)",
    )
    add(
        "--groups",
        nargs="+",
        metavar="GROUP",
        help="classes to average over: dog, cat, bird (ImageNet's 118, 5 and 21), all, or a class of the set by folder "
        "or display name (default: those of the first four that the set has; all is then these three together)",
    )
    help_of_thresholds = "CAM thresholds, in 0…1 (default: 0.1 0.2 … 0.9)"
    add("--thresholds", nargs="+", type=float, metavar="X", help=help_of_thresholds)
    add("--mask", choices=("object", "context"), help="what is masked (default: the run's, or object)")
    add("--cam", choices=("relevance", "grad-cam"), help="class activation map (default: the run's, or relevance)")
    add("--first-block", type=int, metavar="N", help="first block that relevance uses (default: the run's, or 0)")
    add(
        "--allow-missing-masks",
        action="store_true",
        help="leave out and count samples without a mask, and annotated images that are not in --images (default: an "
        "error)",
    )
    add("--count", type=int, default=8, metavar="N", help="images on the contact sheet (default: 8)")
    add("--seed", type=int, default=0, metavar="N", help="seed of the choice of these images (default: 0)")
    shared.add_compute_arguments(p, batch_size=64)  # a CAM needs a backward pass, and its memory
    out = Path("mask-validation")
    add("--out", type=Path, default=out, metavar="DIR", help=f"folder for the numbers and pictures (default: {out})")
    return p


def check_arguments(arguments: argparse.Namespace) -> None:
    """Refuse values out of range and flags that contradict each other."""
    if arguments.images is None:
        fill_in_data(arguments)
    elif idle := [f"--{name}" for name in ("shards", "set") if getattr(arguments, name) is not None]:
        raise UserError(f"{' and '.join(idle)} would do nothing with --images, which are not in shards.")
    from cfmask.masking.validation import THRESHOLDS, check_thresholds

    arguments.thresholds = arguments.thresholds or THRESHOLDS
    check_thresholds(arguments.thresholds)
    for flag, least in (("batch_size", 1), ("loader_workers", 0), ("count", 0), ("seed", 0)):
        if getattr(arguments, flag) < least:
            raise UserError(f"--{flag.replace('_', '-')} must be at least {least}.")


if __name__ == "__main__":
    sys.exit(main())
