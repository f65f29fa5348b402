#!/usr/bin/env python3
"""Segment the objects in a set's images (dogs, cats, birds) with Mask2Former, for tools/validate_masks.py.

    python tools/segment.py --shards DIR --set train --out masks
    python tools/segment.py --shards DIR --set train --out masks --executor slurm --array 16

    OUT/train/manifest.json  train-000000.tar  train-000000.index.safetensors  …  plan.json

The masks are stored in shards: a PNG for each image of the groups' classes, in the image's size and under its key,
white where the model finds the category of the image's class. There is a shard of masks for each shard of images with
such classes. After any interruption, the same command makes the missing shards.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

try:
    from cfmask.convert.mask2former import DEFAULT
    from cfmask.convert.planning import claim, work_on_missing
    from cfmask.data.shards import load_sets
    from cfmask.errors import UserError
    from cfmask.runtime.command import CommandParser, exits_cleanly
    from cfmask.runtime.files import sole_writer
    from cfmask.runtime.progress import progress_bar
    from cfmask.tool_arguments import add_device_argument, resolve_device
    from launch.allocation.data import add_shards_argument, fill_in_data
    from launch.arrays.arguments import Array, add_array_arguments, resolve_array
    from launch.arrays.run import check_with_slurm, runner
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing}. Activate the environment first: source .venv/bin/activate (to create it: README.md).")


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    arguments = parser().parse_args(argv)
    for flag in ("batch_size", "workers"):
        if (value := getattr(arguments, flag)) is not None and value < 1:
            raise UserError(f"--{flag.replace('_', '-')} must be at least 1.")
    # Imported here: torch takes seconds to import, and --help does not need it.
    import torch

    from cfmask.convert.segmentation import commit_masks, plan_masks, segment_shard

    fill_in_data(arguments)
    array = resolve_array(arguments)
    if array is not None and arguments.workers:
        raise UserError("--workers would do nothing with --executor slurm: --gpus-per-task sets the number there.")
    check_with_slurm(array)
    [manifest] = load_sets(_absolute(arguments.shards), [arguments.set]).values()
    folder = arguments.out.absolute() / arguments.set
    tasks, facts = plan_masks(
        manifest,
        source=_absolute(arguments.shards),
        groups=arguments.groups,
        segmenter=str(Path(arguments.segmenter).absolute())
        if Path(arguments.segmenter).is_dir()
        else arguments.segmenter,
        device=device_of(arguments, array),
        batch_size=arguments.batch_size,
        folder=folder,
    )
    with sole_writer(folder):
        claim(folder, tasks[0].plan, facts)
        preload = ("transformers.models.mask2former.modeling_mask2former",)
        work = work_on_missing("segment", tasks, segment_shard, preload)
        total, to_do = (sum(len(task.ids) for task in some) for some in (tasks, work.items))
        gpus = torch.cuda.device_count() if tasks[0].device == "cuda" else 1
        run = runner(array, workers=arguments.workers or max(1, gpus), paths=[folder, tasks[0].where])
        with progress_bar(total=total, initial=total - to_do, desc=arguments.set, unit=" images") as bar:
            run(work, bar.update)
        made = commit_masks(folder, manifest, tasks, facts)
    empty = made.made["without_object"]
    print(f"{arguments.set}: {made.num_samples} masks, {empty} of them without a pixel of the object, in {folder}")


def device_of(arguments: argparse.Namespace, array: Array | None) -> str:
    """The device to compute on. For an array it depends on the tasks' GPUs, not on this machine's."""
    if array is None or arguments.device != "auto":
        return resolve_device(arguments.device)
    return "cuda" if array.allocation.gpus_per_node else "cpu"


def parser() -> argparse.ArgumentParser:
    p = CommandParser(__doc__)
    add_shards_argument(p, cluster=False)
    p.add_argument("--set", default="train", metavar="SET", help="folder under --shards (default: train)")
    p.add_argument(
        "--groups",
        nargs="+",
        metavar="GROUP",
        help="classes whose images are segmented: dog, cat, bird (118, 5 and 21 classes of ImageNet), all, or a class "
        "of the set by folder or display name, if COCO has it (default: those of the first three that the set has)",
    )
    p.add_argument(
        "--segmenter",
        default=DEFAULT,
        metavar="NAME_OR_DIR",
        help=f"a Mask2Former on the Hugging Face hub, or a folder with its files (default: {DEFAULT})",
    )
    p.add_argument("--batch-size", type=int, default=4, metavar="N", help="images at a time (default: 4)")
    add_device_argument(p, resolve=False)
    p.add_argument("--workers", type=int, metavar="N", help="processes on this machine (default: one for each GPU)")
    add_array_arguments(p, with_gpus=True)
    p.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder that gets a folder of masks with the name of the set",
    )
    return p


def _absolute(where: str) -> str:
    return where if "://" in where or where.startswith("pipe:") else str(Path(where).absolute())


if __name__ == "__main__":
    sys.exit(main())
