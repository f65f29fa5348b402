#!/usr/bin/env python3
"""Index the shards of another program (img2dataset, timm, WebDataset's ShardWriter, …): write an index beside each tar,
and a manifest. The tars are not changed. Their headers and labels are read, but no images.

    python tools/index_shards.py DIR                                labels from .cls, or .json, or wnids in the keys
    python tools/index_shards.py DIR --label-field class_id --classes names.tsv
    python tools/index_shards.py DIR --checksums                    reads everything once, for verification later

    python tools/index_shards.py DIR --split imagenet-a             CLIP-benchmark's wds_imagenet-a, -r, v2, …: labels
                                                                    mapped by its classnames.txt

    DIR/00000.tar   00000.index.safetensors  …  manifest.json  bad_samples.jsonl (what is left out)

DIR holds one split. Shards with an up-to-date index are skipped, so after an interruption the same command indexes the
others. Run it again after a tar has changed, because an outdated index is refused.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

try:
    from cfmask.convert import tarscan
    from cfmask.convert.clip_benchmark import find_mapping
    from cfmask.convert.indexed_set import commit, find_tars
    from cfmask.convert.indexing import IndexTask, index_shard, is_indexed, plan_tasks
    from cfmask.convert.labels import LABEL_FIELDS, find_label
    from cfmask.convert.tables import Classes, read_classes
    from cfmask.data import imagenet
    from cfmask.errors import UserError
    from cfmask.files import sole_writer
    from cfmask.runtime.command import exits_cleanly
    from cfmask.runtime.pool import map_in_processes
    from cfmask.runtime.progress import progress_bar
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing}. Activate the environment first: source .venv/bin/activate (to create it: README.md).")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("folder", type=Path, metavar="DIR", help="folder with the tars of one split")
    p.add_argument("--split", metavar="NAME", help="name of the split (default: the folder's name)")
    p.add_argument(
        "--label-from",
        choices=("cls", "json", "key"),
        help="source of labels (default: the first of these that the first sample has)",
    )
    p.add_argument(
        "--label-field",
        metavar="NAME",
        help=f"JSON field of the label (default: the first of {', '.join(LABEL_FIELDS)} that is a number)",
    )
    p.add_argument(
        "--classes",
        metavar="FILE",
        help="file with a line `folder<TAB>display name` for each class, class 0 first; or `imagenet` (default: "
        "ImageNet if keys begin with wnids or labels are 0 … 999)",
    )
    p.add_argument(
        "--mappings",
        type=Path,
        metavar="DIR",
        help="folder of ObjectNet's mapping files, for CLIP-benchmark's wds_objectnet (default: the folder of "
        "classnames.txt)",
    )
    p.add_argument(
        "--allow-count-mismatch",
        action="store_true",
        help="accept a set with the name of a benchmark (imagenet-v2, …) and other numbers of images or classes",
    )
    p.add_argument(
        "--checksums",
        action="store_true",
        help="read everything, and record CRC-32 and sha256 for verify_shards.py --full",
    )
    p.add_argument("--workers", type=int, metavar="N", help="processes on this machine (default: all cores)")
    return p


@exits_cleanly
def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.workers is not None and args.workers < 1:
        raise UserError("--workers must be at least 1.")
    if args.label_field is not None and args.label_from not in (None, "json"):
        raise UserError(
            f"--label-field names a JSON field, but --label-from is {args.label_from}: leave one of them out."
        )
    folder = args.folder.expanduser().absolute()
    tars = find_tars(folder)
    classes: Classes | None = None
    if args.classes == "imagenet":
        classes = imagenet.classes()
    elif args.classes:
        classes = read_classes(Path(args.classes).expanduser())
    # --classes takes precedence over the set's own classes.
    mapping = None if args.classes not in (None, "imagenet") else find_mapping(folder, tars, args.mappings)
    if args.mappings and mapping is None:
        raise UserError("--mappings needs a classnames.txt of CLIP-benchmark, and none is used here. Leave it out.")
    keyed = classes or imagenet.classes()
    label = find_label(tars, args.label_from, args.label_field, {name: i for i, (name, _) in enumerate(keyed)})
    tasks = plan_tasks(tars, label, keyed, mapping, checksums=args.checksums)
    missing = [task for task in tasks if not is_indexed(task)]
    if len(missing) < len(tasks):
        print(f"{len(tasks) - len(missing)} of {len(tasks)} shards have their index already")
    with sole_writer(folder):
        try:
            index_all(missing, args.workers or len(os.sched_getaffinity(0)))
        except KeyboardInterrupt:
            print("\nFinished indexes are kept. The same command makes the missing ones.", file=sys.stderr)
            raise
        manifest = commit(
            folder,
            args.split or folder.name,
            tars,
            classes,
            label,
            mapping=mapping,
            label_asked=args.label_from is not None or args.label_field is not None,
            allow_count_mismatch=args.allow_count_mismatch,
        )
    source = f"the json's {label.field!r}" if label.source == "json" else f"the {label.source}"
    print(
        f"{folder}: {manifest.num_samples} samples of {sum(n > 0 for n in manifest.class_counts)} classes (of "
        f"{manifest.num_classes}), labels from {source}, shards: {len(tars)}, {tarscan.shown_size(manifest.num_bytes)}"
    )
    return 0


def index_all(tasks: list[IndexTask], workers: int) -> None:
    begun, done = time.monotonic(), 0
    with progress_bar(total=len(tasks), desc="indexing", unit=" shards", disable=not tasks) as bar:

        def progress(size: int) -> None:
            nonlocal done
            done += size
            bar.set_postfix_str(f"{done / 1e6 / (time.monotonic() - begun):.0f} MB/s", refresh=False)
            bar.update()

        map_in_processes(index_shard, tasks, workers=workers, describe=lambda task: str(task.tar), progress=progress)


if __name__ == "__main__":
    sys.exit(main())
