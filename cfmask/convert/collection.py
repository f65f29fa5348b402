"""What a source holds, checked against what is known of the set, and its holdout."""

from __future__ import annotations

import logging
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cfmask.convert import unpacking
from cfmask.convert.class_order import classes_in_order
from cfmask.convert.parquet_set import parquet_set
from cfmask.convert.planning import hold_out
from cfmask.convert.sources.files import Tree
from cfmask.convert.sources.folder import folder_tree
from cfmask.convert.sources.imagenet import imagenet_tree
from cfmask.convert.sources.labels_file import labels_file_tree
from cfmask.convert.sources.listing import Listing
from cfmask.convert.sources.objectnet import objectnet_tree
from cfmask.convert.sources.parquet import holds_parquet
from cfmask.convert.sources.shifted import benchmark_tree
from cfmask.convert.tables import Classes, read_classes
from cfmask.data import benchmarks, imagenet, images
from cfmask.errors import UserError
from cfmask.runtime.output import printable
from cfmask.runtime.progress import progress_bar

logger = logging.getLogger(__name__)

_TABLES = (".csv", ".tsv", ".txt")


@dataclass(frozen=True)
class Request:
    """What is to be converted, and into what.

    kind: imagenet, imagenet-v2, imagenet-r, imagenet-a, imagenet-sketch, objectnet or folder.
    source: folder or archive. out: gets a folder for each split.
    split: the one to convert; None: all there are. folder: also the name of the one that the source is.
    holdout: images to take out of train into a split of that name.
    allow_count_mismatch: convert a copy of a known set that lacks images or classes.
    devkit: imagenet; file of labels of a validation set that is not sorted into class folders.
    mappings, border_removed: objectnet; its mapping files, and whether this copy has lost its red border.
    classes: folder; class list.
    class_to_idx: folder; file with torchvision's mapping of class folders to class ids.
    labels: folder; table of paths and labels.
    image_column, label_column: of Parquet files of which several columns could be meant.
    """

    kind: str
    source: Path
    out: Path
    seed: int = 0
    samples_per_shard: int = 1000
    store: str = images.ORIGINAL
    image_size: int | None = None
    split: str | None = None
    holdout: int | None = None
    allow_count_mismatch: bool = False
    devkit: Path | None = None
    mappings: Path | None = None
    border_removed: bool = False
    classes: Path | None = None
    class_to_idx: Path | None = None
    labels: Path | None = None
    image_column: str | None = None
    label_column: str | None = None


@dataclass(frozen=True)
class Collection:
    """The images of a source, with what their folders mean.

    class_ids: by class folder. accepted: as the manifest's. facts: for the manifest's ``made``.
    unpack: files of the source whose images have to be unpacked before shards are made of them.
    """

    tree: Tree
    classes: Classes
    class_ids: dict[str, int]
    accepted: dict[int, tuple[int, ...]] = field(default_factory=dict)
    border: int = 0
    facts: dict[str, Any] = field(default_factory=dict)
    unpack: tuple[unpacking.Unpack, ...] = ()


def collect(request: Request) -> Collection:
    """List the source and check it against what is known of the set.

    Raises:
        UserError: nothing to convert, strangers in the source, or counts that deviate.
    """
    listed = read_classes(request.classes) if request.classes else None
    if request.class_to_idx:
        listed = classes_in_order(request.class_to_idx, listed)
    labels = request.labels or (request.source if request.source.suffix.lower() in _TABLES else None)
    with progress_bar(desc="listing the source", unit=" files") as bar:
        if holds_parquet(request.source):
            found = _collect_parquet(request, Listing(request.source, bar.update), listed)
        elif request.image_column or request.label_column:
            raise UserError(f"--image-column and --label-column are for Parquet files, and {request.source} has none.")
        elif request.kind == "folder" and labels:
            tree, classes = labels_file_tree(
                request.source, labels, split=request.split, classes=listed, tick=bar.update
            )
            found = Collection(tree, classes, {folder: i for i, (folder, _) in enumerate(classes)})
        elif request.kind == "folder":
            tree = folder_tree(request.source, split=request.split, tick=bar.update)
            classes = listed or tuple((folder, printable(folder)) for folder in tree.folders)
            found = Collection(tree, classes, {folder: i for i, (folder, _) in enumerate(classes)})
        elif request.kind == "imagenet":
            tree = imagenet_tree(request.source, split=request.split, devkit=request.devkit, tick=bar.update)
            found = Collection(tree, imagenet.classes(), {wnid: i for i, wnid in enumerate(imagenet.wnids())})
        elif request.kind == "objectnet":
            objectnet = objectnet_tree(request.source, mappings=request.mappings, tick=bar.update)
            found = Collection(
                objectnet.tree,
                imagenet.classes(),
                {folder: ids[0] for folder, ids in objectnet.class_ids.items()},
                accepted={ids[0]: ids for ids in objectnet.class_ids.values() if len(ids) > 1},
                border=0 if request.border_removed else 2,
                facts={"border_removed_before": request.border_removed, "left_out_by_design": objectnet.left_out},
            )
        else:
            tree, class_ids = benchmark_tree(request.source, request.kind, tick=bar.update)
            found = Collection(tree, imagenet.classes(), class_ids)
    if strangers := sorted(set(found.tree.folders) - set(found.class_ids)):
        raise UserError(
            f"{request.source} has class folders that {request.classes or request.class_to_idx} does not list: "
            f"{', '.join(map(repr, strangers[:5]))}{' …' if len(strangers) > 5 else ''}. Add them to the list, or move "
            f"them out of the source."
        )
    if request.kind == "folder" and listed is None and not found.unpack:  # Parquet files have a list of their own
        refuse_alike(found, request.source, folders=not labels)
    if request.kind != "folder":
        check_counts(found, request)
    if request.holdout is not None:
        take_holdout(found, request.holdout, seed=request.seed)
    return found


def _collect_parquet(request: Request, listing: Listing, listed: Classes | None) -> Collection:
    for flag in ("labels", "devkit", "mappings"):
        if getattr(request, flag):
            raise UserError(
                f"--{flag} would do nothing: {request.source} holds Parquet files, which have their labels."
            )
    found = parquet_set(
        listing,
        unpacking.folder_of(request.out, request.kind, request.source),
        kind=request.kind,
        split=request.split,
        classes=listed,
        image_column=request.image_column,
        label_column=request.label_column,
        partial=request.allow_count_mismatch,
    )
    return Collection(found.tree, found.classes, found.class_ids, unpack=found.unpack)


def refuse_alike(found: Collection, source: Path, *, folders: bool) -> None:
    """Refuse classes whose names differ in case or in the spelling of accents alone.

    Args:
        folders: the names are of folders, which may differ in case if they lie in one split: that was meant.

    Raises:
        UserError: there are two.
    """
    splits = [{image.folder for image in of_split} for of_split in found.tree.splits.values()]
    first: dict[str, str] = {}
    for folder, _ in found.classes:
        composed = unicodedata.normalize("NFC", folder)
        other = first.setdefault(composed.casefold(), folder)
        meant = folders and any({folder, other} <= split for split in splits)
        if other != folder and not (meant and composed != unicodedata.normalize("NFC", other)):
            raise UserError(
                f"{source} has the classes {printable(other)!r} and {printable(folder)!r}, which differ in case or in "
                f"the spelling of an accent alone. If they are one class, give them one name; if they are two, list "
                f"all classes with --classes FILE."
            )


def check_counts(found: Collection, request: Request) -> None:
    """Raises: UserError: a set has other numbers of images or classes than a whole copy of it."""
    for split, of_split in found.tree.splits.items():
        expected = benchmarks.BENCHMARKS.get(split)
        if expected is None:
            continue
        by_folder = Counter(image.folder for image in of_split)
        labels = {found.class_ids[folder] for folder in by_folder}
        right = {i for label in labels for i in found.accepted.get(label, (label,))}
        deviations = expected.deviations(by_folder, len(right))
        if deviations and not request.allow_count_mismatch:
            raise UserError(
                f"{request.source} has {'; '.join(deviations)} for the set {split}: it is not a whole copy of it, and "
                f"accuracies on it would not be comparable. Get the missing part or move out what is too much; "
                f"--allow-count-mismatch converts it as it is, and says so in the manifest."
            )
        if deviations:
            logger.info(f"{split}: {'; '.join(deviations)}, as --allow-count-mismatch allows")
            found.facts.setdefault("count_mismatch", {})[split] = deviations


def take_holdout(found: Collection, n: int, *, seed: int) -> None:
    """Move ``n`` images from the split train to a split holdout.

    Raises:
        UserError: there is no split train, or a split holdout already.
    """
    splits = found.tree.splits
    if "train" not in splits or "holdout" in splits:
        raise UserError(
            f"--holdout takes images out of a split called train and makes a split called holdout of them; the source "
            f"has {', '.join(splits)}. Leave --holdout out, or convert the training set with it."
        )
    splits["train"], splits["holdout"] = hold_out(splits["train"], n, seed=seed)
    found.facts["holdout"] = n
