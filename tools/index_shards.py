#!/usr/bin/env python3
"""Make shards of another program (img2dataset, timm, WebDataset's ShardWriter, …) readable: write an index beside each,
and a manifest. The tars are not changed; their headers and labels are read, no images.

    python tools/index_shards.py DIR                                labels from .cls, or .json, or wnids in the keys
    python tools/index_shards.py DIR --label-field class_id --classes names.tsv
    python tools/index_shards.py DIR --checksums                    reads everything once; later damage is then found
    python tools/index_shards.py DIR --split imagenet-a             CLIP-benchmark's wds_imagenet-a, -r, v2, …: labels
                                                                    mapped by its classnames.txt

    DIR/00000.tar   00000.index.safetensors  …  manifest.json  bad_samples.jsonl (samples that are left out)

DIR is one split. Shards with an index that have not changed since are skipped: after an interruption, the same command
indexes the others. Run it again after a tar was changed: an outdated index is refused.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

try:
    from cfmask.convert.clip_benchmark import find_mapping
    from cfmask.convert.indexed_set import commit, find_tars
    from cfmask.convert.indexing import index_shard, is_indexed, plan_tasks
    from cfmask.convert.labels import LABEL_FIELDS, find_label_source
    from cfmask.convert.tables import Classes, read_classes
    from cfmask.data import imagenet
    from cfmask.errors import UserError
    from cfmask.runtime.command import CommandParser, exits_cleanly
    from cfmask.runtime.files import sole_writer
    from cfmask.runtime.throughput import format_bytes, throughput_bar
    from cfmask.runtime.work import Work
    from launch.arrays.run import runner
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing}. Activate the environment first: source .venv/bin/activate (to create it: README.md).")


def parser() -> argparse.ArgumentParser:
    p = CommandParser(__doc__)
    p.add_argument("folder", type=Path, metavar="DIR", help="folder with the tars of one split")
    p.add_argument("--split", metavar="NAME", help="what the split is called (default: the folder's name)")
    p.add_argument(
        "--label-from",
        choices=("cls", "json", "key"),
        help="place of the labels (default: the first of these that the first sample has)",
    )
    p.add_argument(
        "--label-field",
        metavar="NAME",
        help=f"field of the json with the label (default: the first of {', '.join(LABEL_FIELDS)} that is a number)",
    )
    p.add_argument(
        "--classes",
        metavar="FILE",
        help="a line `folder<TAB>display name` for each class, class 0 first; or `imagenet` (default: ImageNet, if the "
        "keys' wnids agree or all of the labels 0 … 999 occur)",
    )
    p.add_argument(
        "--mappings",
        type=Path,
        metavar="DIR",
        help="folder of ObjectNet's mapping files, for CLIP-benchmark's wds_objectnet (default: searched beside its "
        "classnames.txt)",
    )
    p.add_argument(
        "--allow-count-mismatch",
        action="store_true",
        help="accept a set with a benchmark's name (imagenet-v2, …) but other numbers of images or classes",
    )
    p.add_argument(
        "--checksums",
        action="store_true",
        help="read everything, and record CRC and sha256 for verify_shards.py --full",
    )
    p.add_argument("--workers", type=int, metavar="N", help="processes on this machine (default: all cores)")
    return p


@exits_cleanly
def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.workers is not None and args.workers < 1:
        raise UserError("--workers must be at least 1.")
    if args.label_field is not None and args.label_from not in (None, "json"):
        raise UserError(f"--label-field is for --label-from json, which is {args.label_from}: use one of them.")
    folder = args.folder.expanduser().absolute()
    tars = find_tars(folder)
    classes: Classes | None = None
    if args.classes == "imagenet":
        classes = imagenet.classes()
    elif args.classes:
        classes = read_classes(Path(args.classes).expanduser())
    # --classes overrides the set's own class list.
    mapping = None if args.classes not in (None, "imagenet") else find_mapping(folder, tars, args.mappings)
    if args.mappings and mapping is None:
        raise UserError("--mappings is for a classnames.txt of CLIP-benchmark, but none is used: leave it out.")
    keyed = classes or imagenet.classes()
    ids = {name: i for i, (name, _) in enumerate(keyed)}
    labels = find_label_source(tars, args.label_from, args.label_field, ids)
    tasks = plan_tasks(tars, labels, keyed, mapping, checksums=args.checksums)
    missing = [task for task in tasks if not is_indexed(task)]
    if len(missing) < len(tasks):
        print(f"{len(tasks) - len(missing)} of {len(tasks)} shards are indexed already")
    with sole_writer(folder):
        try:
            work = Work(
                kind="index",
                identity=str(folder),
                function=index_shard,
                items=missing,
                keys=[task.tar.stem for task in missing],
                describe=lambda task: str(task.tar),
            )
            with throughput_bar(total=len(missing), desc="indexing", unit=" shards", disable=not missing) as advance:
                runner(None, workers=args.workers)(work, lambda size: advance(1, size))
        except KeyboardInterrupt:
            print("\nFinished indexes are kept; the same command makes the missing ones.", file=sys.stderr)
            raise
        manifest = commit(
            folder,
            args.split or folder.name,
            tars,
            classes,
            labels,
            mapping=mapping,
            label_asked=args.label_from is not None or args.label_field is not None,
            allow_count_mismatch=args.allow_count_mismatch,
        )
    source = f"the json's {labels.field!r}" if labels.place == "json" else f"the {labels.place}"
    print(
        f"{folder}: {manifest.num_samples} samples of {sum(n > 0 for n in manifest.class_counts)} classes (of "
        f"{manifest.num_classes}), labels from {source}, shards: {len(tars)}, {format_bytes(manifest.num_bytes)}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
