"""Label files of ImageNet's validation images, for copies that are not sorted into class folders.

ILSVRC2012_devkit_t12.tar.gz    image-net.org's: a class number an image, and a table of these numbers
LOC_val_solution.csv            Kaggle's: `ILSVRC2012_val_00000001,n01751748 111 108 230 366 …`, boxes of one class
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from cfmask.convert import tables
from cfmask.data import imagenet
from cfmask.errors import UserError

DEVKIT, SOLUTION = "ILSVRC2012_devkit_t12.tar.gz", "LOC_val_solution.csv"

_SOLUTION_ID = re.compile(r"ILSVRC2012_val_(\d{8})")


class Labels(NamedTuple):
    """source: name of the file, for messages. wnids: by number of the validation image, from 1."""

    source: str
    wnids: dict[int, str]


def read_labels(path: Path) -> Labels:
    """The labels in the devkit, or in Kaggle's solution file (a ``.csv``)."""
    if path.suffix.lower() == ".csv":
        return parse_solution(tables.read_text(path, "label file"), str(path))
    return Labels(str(path), dict(enumerate(_devkit_truth(path), 1)))


def label_files(source: Path) -> list[Path]:
    """Label files in a source or beside it; for a subfolder of Kaggle's tree also above it."""
    folders = [source if source.is_dir() else source.parent]
    while folders[-1].name in ("val", "CLS-LOC", "Data", "ILSVRC"):
        folders.append(folders[-1].parent)
    return [path for folder in folders for name in (SOLUTION, DEVKIT) if (path := folder / name).is_file()]


def missing_labels(source: Path, example: str) -> UserError:
    return UserError(
        f"The validation images of {source} are not sorted into class folders, and {example} has no label: neither "
        f"{DEVKIT} (from image-net.org) nor {SOLUTION} (from Kaggle) was found. Put one of them beside the images or "
        f"name it with --devkit; or convert the training set alone with --split train."
    )


def parse_solution(text: str, shown: str) -> Labels:
    """Kaggle's LOC_val_solution.csv: an image's id, and for each box its class and four corners."""
    wnids: dict[int, str] = {}
    try:
        rows = tables.parse(text, tables.COMMA)
    except ValueError as error:
        raise UserError(f"{shown}, {error}: it is not a solution file of Kaggle's ImageNet.") from None
    for row in rows:
        if row is rows[0] and row.cells[0].lower() == "imageid":
            continue
        match = _SOLUTION_ID.fullmatch(row.cells[0])
        words = row.cells[1].split() if len(row.cells) == 2 else []
        found = set(words[::5])
        if not match or len(words) % 5 or len(found) != 1 or not found <= imagenet.wnid_set():
            raise UserError(
                f"{shown}, line {row.number}: expected `ILSVRC2012_val_00000001,WNID x y x y …` with boxes of one of "
                f"ImageNet's 1000 classes, got {','.join(row.cells)[:80]!r}. Download {SOLUTION} again."
            )
        if int(match[1]) in wnids:
            raise UserError(f"{shown}, line {row.number}: {row.cells[0]} has an earlier line.")
        wnids[int(match[1])] = found.pop()
    if not wnids:
        raise UserError(f"{shown} has no labels: download {SOLUTION} again.")
    return Labels(shown, wnids)


def _devkit_truth(devkit: Path) -> list[str]:
    """wnid of validation image 1, 2, …

    The ground truth counts classes by ILSVRC2012_ID, whose order is not that of the sorted wnids; meta.mat maps it.
    """
    import scipy.io  # slow to import, and used only here

    try:
        with tarfile.open(devkit, "r:*") as archive:
            files = {Path(member.name).name: member for member in archive.getmembers()}
            meta = archive.extractfile(files["meta.mat"])
            truth = archive.extractfile(files["ILSVRC2012_validation_ground_truth.txt"])
            if meta is None or truth is None:
                raise ValueError("meta.mat or the ground truth is not a file")
            synsets = scipy.io.loadmat(io.BytesIO(meta.read()), squeeze_me=True)["synsets"]
            ids, names = synsets["ILSVRC2012_ID"].tolist(), synsets["WNID"].tolist()
            by_id = {int(i): str(w) for i, w in zip(ids, names, strict=True) if int(i) == i}
            if len(by_id) != len(ids):
                raise ValueError("a class number occurs twice, or is not a whole number")
            numbers = [tables.whole_number(line) for line in truth.read().decode("ascii").split()]
            labels = [by_id[-1 if number is None else number] for number in numbers]
    # scipy's reader raises many kinds of errors for a damaged file.
    except Exception as error:
        raise UserError(f"{devkit} cannot be read as ILSVRC2012's devkit ({error!r}): download it again.") from None
    if unknown := sorted(set(labels) - imagenet.wnid_set()):
        raise UserError(
            f"{devkit} names classes that are not among ImageNet's 1000, such as {unknown[0]}: download it again."
        )
    return labels


def agreed(image: str, evidence: Iterable[tuple[str, str]]) -> str | None:
    """The wnid that all evidence of an image's class names; None without evidence.

    Args:
        evidence: (where it comes from, wnid).
    """
    first: tuple[str, str] | None = None
    for what, wnid in evidence:
        first = first or (what, wnid)
        if wnid != first[1]:
            raise UserError(
                f"The class of {image} is ambiguous: {first[0]} says {first[1]}, {what} says {wnid}. One of them is "
                f"damaged or of another copy. Find out which, and move it out of the source."
            )
    return first[1] if first else None
