"""Command-line flags of a conversion, and the Request that they describe."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from cfmask.convert.request import Request
from cfmask.convert.sources.imagenet_labels import DEVKIT, SOLUTION
from cfmask.data import benchmarks, images
from cfmask.errors import UserError
from cfmask.runtime.command import CommandParser

if TYPE_CHECKING:
    SubParsers = argparse._SubParsersAction[CommandParser]

_SETS = {
    "imagenet": "ImageNet (ILSVRC2012), classes in the order of the 1000 sorted wnids",
    "imagenet-v2": "ImageNet-V2, matched frequency; folders are class numbers or wnids",
    **{
        name: f"ImageNet-{name.rpartition('-')[2].title()}; a folder for each wnid"
        for name in (b.name for b in benchmarks.SHIFTED if b not in (benchmarks.OBJECTNET, benchmarks.IMAGENET_V2))
    },
    "objectnet": "the part of ObjectNet that overlaps with ImageNet, from the unpacked archive",
    "folder": "any tree of [split/]class/image, or images that a table of paths and labels names",
}


def add_sets(verbs: SubParsers) -> list[CommandParser]:
    """Add a parser for each kind of set that can be converted; returns them."""
    parsers = []
    for name, about in _SETS.items():
        p = verbs.add_parser(name, help=about, description=about)
        if name == "imagenet":
            _add_imagenet(p)
        elif name == "objectnet":
            _add_objectnet(p)
        elif name == "folder":
            _add_folder(p)
        if name != "folder":
            p.add_argument(
                "--allow-count-mismatch",
                action="store_true",
                help="convert a copy that lacks images or classes of the set; the manifest records it",
            )
        _add_common(p)
        parsers.append(p)
    return parsers


def _add_holdout(p: argparse.ArgumentParser) -> None:
    about = "move N images of train, stratified by class, into a set `holdout` (the paper's: 10240)"
    p.add_argument("--holdout", type=int, metavar="N", help=about)


def _add_imagenet(p: argparse.ArgumentParser) -> None:
    about = "split to convert (default: all that exist)"
    p.add_argument("--split", choices=("train", "val", "all"), default="all", help=about)
    p.add_argument(
        "--devkit",
        type=Path,
        metavar="FILE",
        help=f"labels of a val set that is not sorted into class folders: the official {DEVKIT} or Kaggle's {SOLUTION} "
        "(default: the one in --source or beside it)",
    )
    _add_holdout(p)


def _add_objectnet(p: argparse.ArgumentParser) -> None:
    about = "ObjectNet's mapping files (default: in --source or beside it)"
    p.add_argument("--mappings", type=Path, metavar="DIR", help=about)
    p.add_argument(
        "--border-removed",
        action="store_true",
        help="the red border of this copy has been removed (default: 2 pixels are cut off each side: during the "
        "conversion for crops, by the reader for originals)",
    )


def _add_folder(p: argparse.ArgumentParser) -> None:
    about = "convert only this split; if the source has no split folders, the name of its split"
    p.add_argument("--split", metavar="NAME", help=about)
    for flag, about in {
        "--labels": "CSV or TSV file with a row `path,label` (or path,label,split) for each image, or with a header "
        "that names these columns; paths are relative to --source, labels are class numbers or names (default: folders "
        "are classes)",
        "--classes": "a line `folder<TAB>display name` for each class, class 0 first (default: the folders, sorted as "
        "text, which is torchvision's order)",
        "--class-to-idx": "take class ids from this class_to_idx of torchvision's ImageFolder: a JSON object, or a "
        "checkpoint with such a key; it has to agree with --classes",
    }.items():
        p.add_argument(flag, type=Path, metavar="FILE", help=about)
    _add_holdout(p)


def _add_common(p: argparse.ArgumentParser) -> None:
    about = "folder of images; a tar or zip archive, which is read in place; or Parquet files"
    p.add_argument("--source", type=Path, required=True, metavar="SOURCE", help=about)
    for what in ("image", "label"):
        about = f"Parquet: column of the {what}s, if there are several candidates"
        p.add_argument(f"--{what}-column", metavar="NAME", help=about)
    about = "folder that gets a folder of shards for each set"
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help=about)
    about = "seed of the order of samples and of --holdout (default: 0)"
    p.add_argument("--seed", type=int, default=0, metavar="N", help=about)
    about = "maximum per shard (default: 1000, about 110 MB of ImageNet)"
    p.add_argument("--samples-per-shard", type=int, default=1000, metavar="N", help=about)
    p.add_argument(
        "--store",
        choices=images.STORES,
        default=images.ORIGINAL,
        help="original: the source's bytes; crop-jpeg, crop-raw: the recipe's centre crop, made once; raw crops are "
        "bitwise identical and need no decoder (default: original)",
    )
    p.add_argument("--image-size", type=int, metavar="S", help="side of the crops of a crop store (default: 224)")
    p.add_argument("--dry-run", action="store_true", help="print what would be made and how large it is; write nothing")
    p.add_argument("--workers", type=int, metavar="N", help="processes on this machine (default: all cores)")


def check_arguments(args: argparse.Namespace) -> None:
    """Raises: UserError: values that are too small, or flags that would do nothing."""
    for flag in ("samples_per_shard", "workers", "image_size"):
        if (value := getattr(args, flag)) is not None and value < 1:
            raise UserError(f"--{flag.replace('_', '-')} must be at least 1.")
    if args.image_size and args.store == images.ORIGINAL:
        raise UserError(
            "--image-size is the side of the crops of a crop store, and --store original keeps images as they are. "
            "Leave it out, or choose --store crop-jpeg or crop-raw."
        )
    if args.verb == "imagenet" and args.split == "train" and args.devkit:
        raise UserError("--devkit gives labels of the validation set, which --split train excludes: leave it out.")
    if args.executor == "slurm" and args.workers:
        raise UserError("--workers would do nothing with --executor slurm: --cpus-per-task sets the number there.")


def request_of(args: argparse.Namespace) -> Request:
    """The request that the flags of a parser of ``add_sets`` describe."""
    given = {field.name: getattr(args, field.name) for field in fields(Request) if hasattr(args, field.name)}
    for name, value in given.items():
        if isinstance(value, Path):
            given[name] = value.expanduser().absolute()
    if args.verb == "imagenet" and args.split == "all":
        given["split"] = None
    return Request(kind=args.verb, **given)
