"""Flags of a conversion, and what they ask for."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from cfmask.convert.collection import Request
from cfmask.convert.sources.imagenet_labels import DEVKIT, SOLUTION
from cfmask.data import benchmarks, images
from cfmask.errors import UserError

if TYPE_CHECKING:
    SubParsers = argparse._SubParsersAction[argparse.ArgumentParser]

_SHIFTED_WITH_WNIDS = [b.name for b in benchmarks.SHIFTED if b not in (benchmarks.OBJECTNET, benchmarks.IMAGENET_V2)]


def add_sets(verbs: SubParsers) -> list[argparse.ArgumentParser]:
    """Add a parser for each kind of set that can be converted; returns them."""

    def add(name: str, about: str) -> argparse.ArgumentParser:
        return verbs.add_parser(name, help=about, description=about, allow_abbrev=False)

    net = add("imagenet", "ImageNet (ILSVRC2012), classes in the order of the 1000 sorted wnids")
    _add_imagenet(net)
    known = [net, add("imagenet-v2", "ImageNet-V2, matched frequency; folders are class numbers or wnids")]
    for name in _SHIFTED_WITH_WNIDS:
        known.append(add(name, f"ImageNet-{name.rpartition('-')[2].title()}; a folder a wnid"))
    objects = add("objectnet", "the part of ObjectNet that overlaps with ImageNet, from the unpacked archive")
    _add_objectnet(objects)
    known.append(objects)
    tree = add("folder", "any tree of [split/]class/image, or images that a table of paths and labels names")
    _add_folder(tree)
    for p in known:
        p.add_argument(
            "--allow-count-mismatch",
            action="store_true",
            help="convert a copy that has not the set's images or classes; the manifest says so",
        )
    for p in (net, tree):
        p.add_argument(
            "--holdout",
            type=int,
            metavar="N",
            help="take N images out of train, stratified by class, into a set `holdout` (the paper's: 10240)",
        )
    parsers = [*known, tree]
    for p in parsers:
        _add_common(p)
    return parsers


def _add_imagenet(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--split", choices=("train", "val", "all"), default="all", help="which to convert (default: all there are)"
    )
    p.add_argument(
        "--devkit",
        type=Path,
        metavar="FILE",
        help=f"labels of a val set that is not sorted into class folders: the official {DEVKIT} or Kaggle's {SOLUTION} "
        "(default: those in --source or beside it)",
    )


def _add_objectnet(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--mappings", type=Path, metavar="DIR", help="ObjectNet's mapping files (default: in --source or beside it)"
    )
    p.add_argument(
        "--border-removed",
        action="store_true",
        help="this copy's red border has been removed (default: 2 pixels are cut off each side, here for crops, by the "
        "reader for originals)",
    )


def _add_folder(p: argparse.ArgumentParser) -> None:
    p.add_argument("--split", metavar="NAME", help="convert this split alone, or name the one that the source is")
    p.add_argument(
        "--labels",
        type=Path,
        metavar="FILE",
        help="CSV or TSV file with a row `path,label` (or path,label,split) an image, or with a header that names "
        "these columns; paths are relative to --source, labels are class numbers or names (default: folders are "
        "classes)",
    )
    p.add_argument(
        "--classes",
        type=Path,
        metavar="FILE",
        help="a line `folder<TAB>display name` a class, class 0 first (default: the folders, sorted as text, "
        "which is torchvision's order)",
    )
    p.add_argument(
        "--class-to-idx",
        type=Path,
        metavar="FILE",
        help="class ids are those of this class_to_idx of torchvision's ImageFolder: a JSON object, or a checkpoint "
        "with such a key; it has to agree with --classes",
    )


def _add_common(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--source",
        type=Path,
        required=True,
        metavar="SOURCE",
        help="folder of images, or a tar or zip archive, which is read in place; or Parquet files",
    )
    for what in ("image", "label"):
        p.add_argument(
            f"--{what}-column", metavar="NAME", help=f"Parquet: column of the {what}s, where several could be meant"
        )
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder that gets a folder of shards a set")
    p.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the order of samples, and of --holdout (default: 0)"
    )
    p.add_argument(
        "--samples-per-shard",
        type=int,
        default=1000,
        metavar="N",
        help="at most so many (default: 1000, about 110 MB of ImageNet)",
    )
    p.add_argument(
        "--store",
        choices=images.STORES,
        default=images.ORIGINAL,
        help="original: the source's bytes; crop-jpeg, crop-raw: the recipe's centre crop, made once; raw ones are "
        "bitwise identical and need no decoder (default: original)",
    )
    p.add_argument("--image-size", type=int, metavar="S", help="side of the crops of a crop store (default: 224)")
    p.add_argument("--dry-run", action="store_true", help="say what would be made and how large it is; write nothing")
    p.add_argument("--workers", type=int, metavar="N", help="processes on this machine (default: all cores)")


def check_arguments(args: argparse.Namespace) -> None:
    """Raises: UserError: values that are too small, or flags that would do nothing."""
    for flag in ("samples_per_shard", "workers", "image_size"):
        if (value := getattr(args, flag)) is not None and value < 1:
            raise UserError(f"--{flag.replace('_', '-')} must be at least 1.")
    if args.image_size and args.store == images.ORIGINAL:
        raise UserError(
            "--image-size is the side of the crops of a crop store, and --store original keeps images as they are: "
            "leave it out, or choose --store crop-jpeg or crop-raw."
        )
    if args.verb == "imagenet" and args.split == "train" and args.devkit:
        raise UserError("--devkit has labels of the validation set, and --split train leaves that out: leave it out.")
    if args.executor == "slurm" and args.workers:
        raise UserError("--workers would do nothing with --executor slurm: --cpus-per-task says how many there are.")


def request_of(args: argparse.Namespace) -> Request:
    """What the flags of a parser of ``add_sets`` ask for."""
    given = {field.name: getattr(args, field.name) for field in fields(Request) if hasattr(args, field.name)}
    for name, value in given.items():
        if isinstance(value, Path):
            given[name] = value.expanduser().absolute()
    if args.verb == "imagenet" and args.split == "all":
        given["split"] = None
    return Request(kind=args.verb, **given)
