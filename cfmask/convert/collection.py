"""Lists a source, checks it against what is known of the set, and takes out the holdout."""

from __future__ import annotations

import hashlib
import logging
import unicodedata
from collections import Counter, defaultdict
from fractions import Fraction
from pathlib import Path

from cfmask.convert.class_order import classes_in_order
from cfmask.convert.request import Request
from cfmask.convert.sources.files import LabelledImage, SourceImages
from cfmask.convert.sources.folder import folder_images
from cfmask.convert.sources.imagenet import imagenet_images
from cfmask.convert.sources.labels_file import labels_file_images
from cfmask.convert.sources.listing import Tick
from cfmask.convert.sources.objectnet import objectnet_images
from cfmask.convert.sources.parquet import parquet_images
from cfmask.convert.sources.parquet_files import holds_parquet
from cfmask.convert.sources.shifted import shifted_images
from cfmask.convert.tables import read_classes
from cfmask.data import benchmarks
from cfmask.errors import UserError
from cfmask.runtime.output import printable
from cfmask.runtime.progress import progress_bar

logger = logging.getLogger(__name__)

_TABLES = (".csv", ".tsv", ".txt")


def collect(request: Request) -> SourceImages:
    """List the source and check it against what is known of the set."""
    with progress_bar(desc="listing the source", unit=" files") as bar:
        found = _list(request, bar.update)
    if unknown := sorted(set(found.folders) - set(found.class_ids)):
        raise UserError(
            f"{request.source} has class folders that {request.classes or request.class_to_idx} does not list: "
            f"{', '.join(map(repr, unknown[:5]))}{' …' if len(unknown) > 5 else ''}. Add them to the list, or move "
            f"them out of the source."
        )
    if request.kind != "folder":
        _check_counts(found, request)
    if request.holdout is not None:
        _take_holdout(found, request.holdout, seed=request.seed)
    return found


def _list(request: Request, tick: Tick) -> SourceImages:
    source = request.source
    classes = read_classes(request.classes) if request.classes else None
    if request.class_to_idx:
        classes = classes_in_order(request.class_to_idx, classes)
    if holds_parquet(source):
        return parquet_images(request, classes, tick)
    if request.image_column or request.label_column:
        raise UserError(f"--image-column and --label-column are for Parquet files, and {source} has none.")
    if request.kind == "imagenet":
        return imagenet_images(request, tick)
    if request.kind == "objectnet":
        return objectnet_images(request, tick)
    if request.kind != "folder":
        return shifted_images(request, tick)
    labels = request.labels or (source if source.suffix.lower() in _TABLES else None)
    found = labels_file_images(request, labels, classes, tick) if labels else folder_images(request, classes, tick)
    if classes is None:
        _refuse_similar_classes(found, source, folders=not labels)
    return found


def _refuse_similar_classes(found: SourceImages, source: Path, *, folders: bool) -> None:
    """Refuse classes whose names differ only in case or in the encoding of accents.

    Args:
        folders: the names are of folders. Two that differ only in case and lie in one split are meant to be two.
    """
    splits = [{image.folder for image in of_split} for of_split in found.splits.values()]
    first: dict[str, str] = {}
    for folder, _ in found.classes:
        composed = unicodedata.normalize("NFC", folder)
        other = first.setdefault(composed.casefold(), folder)
        meant = folders and any({folder, other} <= split for split in splits)
        if other != folder and not (meant and composed != unicodedata.normalize("NFC", other)):
            raise UserError(
                f"{source} has the classes {printable(other)!r} and {printable(folder)!r}, which differ only in case "
                f"or in the encoding of an accent. If they are one class, give them one name; if they are two, list "
                f"all classes with --classes FILE."
            )


def _check_counts(found: SourceImages, request: Request) -> None:
    """Raises: UserError: a known set has other numbers of images or classes than a complete copy."""
    for split, of_split in found.splits.items():
        expected = benchmarks.BENCHMARKS.get(split)
        if expected is None:
            continue
        by_folder = Counter(image.folder for image in of_split)
        labels = {found.class_ids[folder] for folder in by_folder}
        right = {i for label in labels for i in found.accepted.get(label, (label,))}
        deviations = expected.deviations(by_folder, len(right))
        if deviations and not request.allow_count_mismatch:
            raise UserError(
                f"{request.source} has {'; '.join(deviations)} for the set {split}: it is not a complete copy, and "
                f"accuracies on it would not be comparable. Get the missing files, or move out surplus ones; "
                f"--allow-count-mismatch converts it as it is, and records the counts in the manifest."
            )
        if deviations:
            logger.info(f"{split}: {'; '.join(deviations)}, as --allow-count-mismatch allows")
            found.count_mismatch[split] = deviations


def _take_holdout(found: SourceImages, n: int, *, seed: int) -> None:
    """Move ``n`` images from the split train to a split holdout."""
    splits = found.splits
    if "train" not in splits or "holdout" in splits:
        raise UserError(
            f"--holdout moves images from a split called train to a new split called holdout; the source has "
            f"{', '.join(splits)}. Leave --holdout out, or convert the training set with it."
        )
    splits["train"], splits["holdout"] = hold_out(splits["train"], n, seed=seed)
    found.facts["holdout"] = n


def hold_out(found: list[LabelledImage], n: int, *, seed: int) -> tuple[list[LabelledImage], list[LabelledImage]]:
    """Take ``n`` images out, stratified by class: each class gives its share, rounded by the largest-remainder method
    (for equal remainders, the first folder's) so that the sum is n. Images are chosen by their names and the seed.

    Returns:
        (remaining images, images taken out), both in the order of ``found``.
    """
    if not 0 < n < len(found):
        raise UserError(
            f"--holdout {n} would leave one of the two sets empty: the training set has {len(found)} images. Choose a "
            f"smaller number."
        )
    by_class: dict[str, list[int]] = defaultdict(list)
    for i, image in enumerate(found):
        by_class[image.folder].append(i)
    shares = {folder: Fraction(n * len(rows), len(found)) for folder, rows in by_class.items()}
    quota = {folder: int(share) for folder, share in shares.items()}
    by_remainder = sorted(shares, key=lambda folder: (quota[folder] - shares[folder], folder))
    for folder in by_remainder[: n - sum(quota.values())]:
        quota[folder] += 1

    def draw(i: int) -> bytes:
        return hashlib.sha256(f"{seed}\0{found[i].name}".encode(errors="surrogateescape")).digest()

    taken = {i for folder, rows in by_class.items() for i in sorted(rows, key=draw)[: quota[folder]]}
    return (
        [image for i, image in enumerate(found) if i not in taken],
        [image for i, image in enumerate(found) if i in taken],
    )
