"""ImageNet (ILSVRC2012): folders of classes, the official tars with the devkit's labels, or Kaggle's download."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cfmask.convert import tables
from cfmask.convert.sources.files import SPLITS, LabelledImage, Tree, chosen_tree
from cfmask.convert.sources.imagenet_labels import (
    DEVKIT,
    SOLUTION,
    Labels,
    agreed,
    label_files,
    missing_labels,
    parse_solution,
    read_labels,
)
from cfmask.convert.sources.listing import Found, Listing, Tick, is_image
from cfmask.data import imagenet
from cfmask.errors import UserError

TRAIN_TAR, VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
TEST_SET = "of the test set, which has no labels"

_CLASS_TAR = re.compile(r"(n\d{8})\.tar")
_VAL = re.compile(r"ILSVRC2012_val_(\d{8})(?:_n\d{8})?\.(?i:jpe?g)")
_TEST = re.compile(r"ILSVRC2012_test_(\d{8})(?:_n\d{8})?\.(?i:jpe?g)")
_LOOSE_TRAIN = re.compile(r"n\d{8}_\d+_n\d{8}\.(?i:jpe?g)")  # as the Hugging Face hub's archives name them
_WNID = re.compile(r"(?<![0-9A-Za-z])n\d{8}(?!\d)")


def imagenet_tree(source: Path, *, split: str | None, devkit: Path | None, tick: Tick) -> Tree:
    """ImageNet from any layout named at the top of this package.

    Args:
        split: "train" or "val"; None: all that are there.
        devkit: file of labels for a val set that is not sorted into class folders and whose file names do not end with
            a wnid: the official devkit or Kaggle's LOC_val_solution.csv. By default those in the source or beside it.

    Raises:
        UserError: nothing to convert, an unknown wnid, a split that cannot be told, missing labels, labels that
            contradict each other.
    """
    walk = _Walk(Listing(source, tick), split)
    for found in walk.listing:
        walk.add(found, None)
    if split != "train":
        walk.add_validation(devkit)
    known = walk.known
    folders = [(walk.split_of(folder), folder[-1]) for folder in walk.listing.folders if folder[-1] in known]
    return chosen_tree(walk.listing, walk.images, folders, split)


@dataclass
class _Walk:
    """What a walk over a source has met. split: the chosen one. validation: images of the validation set by their
    names. labels: of files of labels that the source holds."""

    listing: Listing
    split: str | None
    images: dict[str, list[LabelledImage]] = field(default_factory=dict)
    validation: list[Found] = field(default_factory=list)
    labels: list[Labels] = field(default_factory=list)
    known: frozenset[str] = field(default_factory=lambda: frozenset(imagenet.wnids()))

    def split_of(self, folder: tuple[str, ...]) -> str | None:
        above = SPLITS.get(folder[-2].lower()) if len(folder) > 1 else None
        return above or SPLITS.get(self.listing.source.name.lower()) or self.split

    def add(self, found: Found, split_of_tar: str | None) -> None:
        """split_of_tar: of the official tar that ``found`` is in."""
        file = found.parts[-1]
        if match := _CLASS_TAR.fullmatch(file):
            if self.split != "val":
                self.listing.folders.add(("train", match[1]))
                for inner in self.listing.archive(found.blob, found.parts):
                    self.add(Found(("train", match[1], inner.parts[-1]), inner.blob), None)
        elif file in (TRAIN_TAR, VAL_TAR):
            of_tar = "train" if file == TRAIN_TAR else "val"
            if self.split in (of_tar, None):
                for inner in self.listing.archive(found.blob, found.parts):
                    self.add(inner, of_tar)
        elif file == SOLUTION:
            if self.split != "train":
                shown = "/".join(found.parts)
                text = tables.decode(found.blob.read(), f"The label file {shown}")
                self.labels.append(parse_solution(text, shown))
        elif _TEST.fullmatch(file):
            self.listing.leave(found, TEST_SET)
        elif not is_image(file):
            if file != DEVKIT:
                self.listing.leave(found)
        else:
            self._add_image(found, split_of_tar)

    def _add_image(self, found: Found, split_of_tar: str | None) -> None:
        file, folder = found.parts[-1], found.parts[-2] if len(found.parts) > 1 else ""
        path = "/".join(found.parts)
        if folder in self.known:
            which = self.split_of(found.parts[:-1]) or split_of_tar or ("val" if _VAL.fullmatch(file) else None)
            if which is None:
                raise UserError(
                    f"{self.listing.source} holds class folders ({folder}, …) but nothing says whether they are the "
                    f"training or the validation set: add --split train or --split val."
                )
        elif _VAL.fullmatch(file):
            which = "val"
        elif _LOOSE_TRAIN.fullmatch(file):
            which = SPLITS.get(folder.lower(), "train")
        else:
            raise UserError(
                f"{path} of {self.listing.source} lies in {folder or 'no folder'!r}, which is not one of ImageNet's "
                f"1000 wnids (such as {imagenet.wnids()[0]}). For another data set use `make_shards.py folder`; "
                f"otherwise move what does not belong to ImageNet out of the source."
            )
        by_name = "val" if _VAL.fullmatch(file) else "train" if _LOOSE_TRAIN.fullmatch(file) else which
        if by_name != which:
            raise UserError(
                f"{path} of {self.listing.source} is an image of the split {by_name} by its name, and lies in the "
                f"split {which}. Move it to where it belongs."
            )
        if which == "val" and _VAL.fullmatch(file):
            self.validation.append(found)
            return
        wnid = agreed(path, self._by_path(found))
        assert wnid is not None
        self.images.setdefault(which, []).append(LabelledImage(wnid, file, found.blob))

    def _by_path(self, found: Found) -> Iterator[tuple[str, str]]:
        """What an image's folder and name say of its class."""
        if len(found.parts) > 1 and found.parts[-2] in self.known:
            yield "its folder", found.parts[-2]
        for wnid in _WNID.findall(found.parts[-1]):
            if wnid in self.known:
                yield "its name", wnid

    def add_validation(self, given: Path | None) -> None:
        """Label the images of the validation set by all that says something of their classes.

        Args:
            given: label file that was named.
        """
        source = self.listing.source
        if given is not None and not given.is_file():
            raise UserError(f"--devkit {given}: there is no such file.")
        labels = list(self.labels)
        if given is not None:
            labels.append(read_labels(given))
        elif any(next(self._by_path(found), None) is None for found in self.validation):
            labels += [read_labels(path) for path in label_files(source) if not labels or path.name != SOLUTION]
        seen: dict[int, str] = {}
        for found in self.validation:
            path = "/".join(found.parts)
            match = _VAL.fullmatch(found.parts[-1])
            number = int(match[1]) if match else 0
            if number in seen:
                raise UserError(
                    f"{source} holds the validation image {number} twice, as {seen[number]} and as {path}: move one of "
                    f"them out of the source."
                )
            seen[number] = path
            if silent := next((file for file in labels if number not in file.wnids), None):
                raise UserError(
                    f"{silent.source} has no label of {path} (it has {len(silent.wnids)} labels): it is cut, or of "
                    f"another copy. Download it again."
                )
            evidence = [*self._by_path(found), *((file.source, file.wnids[number]) for file in labels)]
            wnid = agreed(path, evidence)
            if wnid is None:
                raise missing_labels(source, path)
            self.images.setdefault("val", []).append(LabelledImage(wnid, found.parts[-1], found.blob))
