#!/usr/bin/env python3
"""Make shards of another program (img2dataset, timm, WebDataset's ShardWriter, …) readable: an index beside each, and a
manifest. The tars stay as they are; their headers and their labels are read, no images.

    python tools/index_shards.py DIR                                labels from .cls, or .json, or wnids in the keys
    python tools/index_shards.py DIR --label-field class_id --classes names.tsv
    python tools/index_shards.py DIR --checksums                    reads everything once, so that rot is found later

    python tools/index_shards.py DIR --split imagenet-a             CLIP-benchmark's wds_imagenet-a, -r, v2, …: labels
                                                                    mapped by its classnames.txt

    DIR/00000.tar   00000.index.safetensors  …  manifest.json  bad_samples.jsonl (what is left out)

DIR is one split. Shards that have their index already, and did not change since, are skipped: stopped at any moment,
the same command indexes the others. After a tar was changed, run it again: an old index is refused.
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
    from cfmask.runtime.command import exits_cleanly
    from cfmask.runtime.files import sole_writer
    from cfmask.runtime.pool import map_in_processes
    from cfmask.runtime.progress import progress_bar
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing}. Activate the environment first: source .venv/bin/activate (to create it: README.md).")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("folder", type=Path, metavar="DIR", help="folder with the tars of one split")
    p.add_argument("--split", metavar="NAME", help="what the split is called (default: the folder's name)")
    p.add_argument(
        "--label-from",
        choices=("cls", "json", "key"),
        help="where labels are (default: the first of these that the first sample has)",
    )
    p.add_argument(
        "--label-field",
        metavar="NAME",
        help=f"the json's field that is the label (default: the first of {', '.join(LABEL_FIELDS)} that is a number)",
    )
    p.add_argument(
        "--classes",
        metavar="FILE",
        help="a line `folder<TAB>display name` a class, class 0 first; or `imagenet` (default: ImageNet, where the "
        "keys' wnids or all of the labels 0 … 999 say so)",
    )
    p.add_argument(
        "--mappings",
        type=Path,
        metavar="DIR",
        help="folder of ObjectNet's mapping files, for CLIP-benchmark's wds_objectnet (default: looked for beside its "
        "classnames.txt)",
    )
    p.add_argument(
        "--allow-count-mismatch",
        action="store_true",
        help="take a set that has a benchmark's name (imagenet-v2, …) and other numbers of images or classes than it",
    )
    p.add_argument(
        "--checksums", action="store_true", help="read everything, and record CRC and sha256 for verify_shards --full"
    )
    p.add_argument("--workers", type=int, metavar="N", help="processes on this machine (default: all cores)")
    return p


@exits_cleanly
def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.workers is not None and args.workers < 1:
        raise UserError("--workers must be at least 1.")
    if args.label_field is not None and args.label_from not in (None, "json"):
        raise UserError(f"--label-field is of the json, and --label-from is {args.label_from}: leave one of them out.")
    folder = args.folder.expanduser().absolute()
    tars = find_tars(folder)
    classes: Classes | None = None
    if args.classes == "imagenet":
        classes = imagenet.classes()
    elif args.classes:
        classes = read_classes(Path(args.classes).expanduser())
    # A class list that is given goes before the set's own.
    mapping = None if args.classes not in (None, "imagenet") else find_mapping(folder, tars, args.mappings)
    if args.mappings and mapping is None:
        raise UserError("--mappings goes with a classnames.txt of CLIP-benchmark, and none is used: leave it out.")
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
            print("\nFinished indexes are kept; the same command makes those that are missing.", file=sys.stderr)
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
