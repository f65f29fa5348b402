"""ImageNet (ILSVRC2012): folders of classes, the official tars with the devkit's labels, or Kaggle's download."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cfmask.convert import tables
from cfmask.convert.request import Request
from cfmask.convert.sources.files import SPLITS, LabelledImage, SourceImages, source_images
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
from cfmask.convert.sources.listing import FoundFile, Listing, Tick, is_image
from cfmask.data import imagenet
from cfmask.errors import UserError

TRAIN_TAR, VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
TEST_SET = "of the test set, which has no labels"

_CLASS_TAR = re.compile(r"(n\d{8})\.tar")
_VAL = re.compile(r"ILSVRC2012_val_(\d{8})(?:_n\d{8})?\.(?i:jpe?g)")
_TEST = re.compile(r"ILSVRC2012_test_(\d{8})(?:_n\d{8})?\.(?i:jpe?g)")
_LOOSE_TRAIN = re.compile(r"n\d{8}_\d+_n\d{8}\.(?i:jpe?g)")  # the names in the Hugging Face hub's archives
_WNID = re.compile(r"(?<![0-9A-Za-z])n\d{8}(?!\d)")


def wnids_in(text: str) -> list[str]:
    """The wnids of ImageNet's 1000 classes that a path or name contains."""
    return [wnid for wnid in _WNID.findall(text) if wnid in imagenet.wnid_set()]


def imagenet_images(request: Request, tick: Tick) -> SourceImages:
    """ImageNet in any layout listed at the top of this package."""
    walk = _Walk(Listing(request.source, tick), request.split)
    for found in walk.listing:
        walk.add(found, None)
    if request.split != "train":
        walk.add_validation(request.devkit)
    folders = [folder for folder in walk.listing.folders if folder[-1] in imagenet.wnid_set()]
    seen = [(walk.split_of(folder), folder[-1]) for folder in folders]
    return source_images(walk.listing, walk.images, seen, split=request.split, classes=imagenet.classes())


@dataclass
class _Walk:
    """State of a walk over a source.

    split: the chosen one.
    images: labelled images by split.
    validation: images named like those of the validation set, not yet labelled.
    labels: of label files in the source.
    """

    listing: Listing
    split: str | None
    images: dict[str, list[LabelledImage]] = field(default_factory=dict)
    validation: list[FoundFile] = field(default_factory=list)
    labels: list[Labels] = field(default_factory=list)

    def split_of(self, folder: tuple[str, ...]) -> str | None:
        above = SPLITS.get(folder[-2].lower()) if len(folder) > 1 else None
        return above or SPLITS.get(self.listing.source.name.lower()) or self.split

    def add(self, found: FoundFile, split_of_tar: str | None) -> None:
        """split_of_tar: of the official tar that contains the file."""
        file = found.parts[-1]
        if match := _CLASS_TAR.fullmatch(file):
            if self.split != "val":
                self.listing.folders.add(("train", match[1]))
                for inner in self.listing.archive(found.blob, found.parts):
                    self.add(FoundFile(("train", match[1], inner.parts[-1]), inner.blob), None)
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
            self.listing.ignore(found, TEST_SET)
        elif not is_image(file):
            if file != DEVKIT:
                self.listing.ignore(found)
        else:
            self._add_image(found, split_of_tar)

    def _add_image(self, found: FoundFile, split_of_tar: str | None) -> None:
        file, folder = found.parts[-1], found.parts[-2] if len(found.parts) > 1 else ""
        path = "/".join(found.parts)
        by_name = "val" if _VAL.fullmatch(file) else "train" if _LOOSE_TRAIN.fullmatch(file) else None
        if folder in imagenet.wnid_set():
            which = self.split_of(found.parts[:-1]) or split_of_tar or ("val" if by_name == "val" else None)
            if which is None:
                raise UserError(
                    f"{self.listing.source} holds class folders ({folder}, …), but whether they are the training or "
                    f"the validation set is unknown: add --split train or --split val."
                )
        elif by_name == "val":
            which = "val"
        elif by_name == "train":
            which = SPLITS.get(folder.lower(), "train")
        else:
            raise UserError(
                f"{path} of {self.listing.source} lies in {folder or 'no folder'!r}, which is not one of ImageNet's "
                f"1000 wnids (such as {imagenet.wnids()[0]}). For another data set use `make_shards.py folder`; "
                f"otherwise move files that do not belong to ImageNet out of the source."
            )
        if by_name not in (None, which):
            raise UserError(
                f"{path} of {self.listing.source} lies in the split {which}, but its name is that of an image of the "
                f"split {by_name}. Move it to the split that it belongs to."
            )
        if by_name == "val":
            self.validation.append(found)
            return
        wnid = agreed(path, self._by_path(found))
        assert wnid is not None
        self.images.setdefault(which, []).append(LabelledImage(wnid, file, found.blob))

    def _by_path(self, found: FoundFile) -> Iterator[tuple[str, str]]:
        """The wnids in an image's folder and name, as ``agreed`` takes them."""
        if len(found.parts) > 1 and found.parts[-2] in imagenet.wnid_set():
            yield "its folder", found.parts[-2]
        for wnid in wnids_in(found.parts[-1]):
            yield "its name", wnid

    def add_validation(self, given: Path | None) -> None:
        """Label the images of the validation set by their folders, names and label files.

        Args:
            given: label file named by the user.
        """
        source = self.listing.source
        if given is not None and not given.is_file():
            raise UserError(f"--devkit {given}: no such file.")
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
            if lacking := next((file for file in labels if number not in file.wnids), None):
                raise UserError(
                    f"{lacking.source} has no label for {path} (it has {len(lacking.wnids)} labels): it is truncated, "
                    f"or of another copy. Download it again."
                )
            wnid = agreed(path, [*self._by_path(found), *((file.source, file.wnids[number]) for file in labels)])
            if wnid is None:
                raise missing_labels(source, path)
            self.images.setdefault("val", []).append(LabelledImage(wnid, found.parts[-1], found.blob))
