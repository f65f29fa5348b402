"""Labels of ImageNet's validation images that do not lie in class folders: files that come with the images.

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
    """source: for people. wnids: by number of the validation image, from 1."""

    source: str
    wnids: dict[int, str]


def read_labels(path: Path) -> Labels:
    """The labels in the devkit, or in Kaggle's solution file (a ``.csv``).

    Raises:
        UserError: it cannot be read, or names other classes.
    """
    if path.suffix.lower() == ".csv":
        return parse_solution(tables.read_text(path, "label file"), str(path))
    return Labels(str(path), dict(enumerate(_devkit_truth(path), 1)))


def label_files(source: Path) -> list[Path]:
    """Label files in a source or beside it; for a part of Kaggle's tree also above it."""
    folder = source if source.is_dir() else source.parent
    folders = [folder]
    while folders[-1].name in ("val", "CLS-LOC", "Data", "ILSVRC"):
        folders.append(folders[-1].parent)
    return [path for folder in folders for name in (SOLUTION, DEVKIT) if (path := folder / name).is_file()]


def missing_labels(source: Path, example: str) -> UserError:
    return UserError(
        f"The validation images of {source} are not sorted into class folders and {example} has no label: neither "
        f"{DEVKIT} (from image-net.org, where the images are) nor {SOLUTION} (from Kaggle) is there. Put one of them "
        f"beside the images or name it with --devkit; or convert the training set alone with --split train."
    )


def parse_solution(text: str, shown: str) -> Labels:
    """Kaggle's LOC_val_solution.csv: an image's id and, five words a box, its class and corners.

    Raises:
        UserError: a row of another form, an image that is there twice, or with boxes of several classes.
    """
    known = set(imagenet.wnids())
    wnids: dict[int, str] = {}
    try:
        rows = tables.parse(text, tables.COMMA)
    except ValueError as error:
        raise UserError(f"{shown}, {error}: it is no solution file of Kaggle's ImageNet.") from None
    for row in rows:
        if row is rows[0] and row.cells[0].lower() == "imageid":
            continue
        match = _SOLUTION_ID.fullmatch(row.cells[0])
        words = row.cells[1].split() if len(row.cells) == 2 else []
        found = set(words[::5])
        if not match or len(words) % 5 or len(found) != 1 or not found <= known:
            raise UserError(
                f"{shown}, line {row.number}: expected `ILSVRC2012_val_00000001,WNID x y x y …` with boxes of one of "
                f"ImageNet's 1000 classes, got {','.join(row.cells)[:80]!r}. Download {SOLUTION} again."
            )
        if int(match[1]) in wnids:
            raise UserError(f"{shown}, line {row.number}: {row.cells[0]} has a line before this one.")
        wnids[int(match[1])] = found.pop()
    if not wnids:
        raise UserError(f"{shown} has no labels: download {SOLUTION} again.")
    return Labels(shown, wnids)


def _devkit_truth(devkit: Path) -> list[str]:
    """wnid of validation image 1, 2, …

    The ground truth counts classes by ILSVRC2012_ID, whose order is not that of the sorted wnids; meta.mat maps it.
    """
    import scipy.io  # for this one file

    try:
        with tarfile.open(devkit, "r:*") as archive:
            files = {Path(member.name).name: member for member in archive.getmembers()}
            meta = archive.extractfile(files["meta.mat"])
            truth = archive.extractfile(files["ILSVRC2012_validation_ground_truth.txt"])
            if meta is None or truth is None:
                raise ValueError("meta.mat or the ground truth is no file")
            synsets = scipy.io.loadmat(io.BytesIO(meta.read()), squeeze_me=True)["synsets"]
            ids, names = synsets["ILSVRC2012_ID"].tolist(), synsets["WNID"].tolist()
            by_id = {int(i): str(w) for i, w in zip(ids, names, strict=True) if int(i) == i}
            if len(by_id) != len(ids):
                raise ValueError("a class number is there twice, or is no whole number")
            numbers = [tables.whole_number(line) for line in truth.read().decode("ascii").split()]
            labels = [by_id[-1 if number is None else number] for number in numbers]
    except KeyError as error:
        raise _odd_devkit(devkit, f"it has no {error}" if isinstance(error.args[0], str) else "odd numbers") from None
    # scipy's reader raises whatever a damaged file makes it stumble over.
    except Exception as error:
        raise _odd_devkit(devkit, repr(error)) from None
    if strangers := sorted(set(labels) - set(imagenet.wnids())):
        raise UserError(
            f"{devkit} names classes that are not ImageNet's 1000, {strangers[0]} for one: download it again."
        )
    return labels


def _odd_devkit(devkit: Path, why: str) -> UserError:
    return UserError(f"{devkit} cannot be read as ILSVRC2012's devkit ({why}): download it again.")


def agreed(image: str, evidence: Iterable[tuple[str, str]]) -> str | None:
    """The wnid that all evidence of an image's class names; None without any.

    Args:
        evidence: (what says so, wnid).

    Raises:
        UserError: it differs.
    """
    first: tuple[str, str] | None = None
    for what, wnid in evidence:
        if first is None:
            first = (what, wnid)
        elif wnid != first[1]:
            raise UserError(
                f"The class of {image} is not clear: {first[0]} says {first[1]}, {what} says {wnid}. One of them is of "
                f"another copy or damaged: find out which, and take it out of the source."
            )
    return first[1] if first else None
