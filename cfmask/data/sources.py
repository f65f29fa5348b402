"""Where images come from when they are converted: folder trees and tars, the latter read in place.

A labelled image is found by its folder: the folder that holds it is its class, the folder above may be its split.

    train/n01440764/n01440764_10026.JPEG         in a folder or a tar, leading folders are fine
    n01440764/n01440764_10026.JPEG               the split is then named by --split, or by the folder's own name
    ILSVRC2012_img_train.tar                     a tar of one tar a class
    ILSVRC2012_img_val.tar                       flat; labels come from the devkit
"""

from __future__ import annotations

import io
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from cfmask.data import imagenet
from cfmask.errors import UserError

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
TRAIN_TAR, VAL_TAR, DEVKIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"

# Folder names that say by themselves which split is in them.
_SPLITS = {
    **{name: name for name in ("train", "val", "test", "dev", "holdout")},
    "training": "train",
    "valid": "val",
    "validation": "val",
}
_CLASS_TAR = re.compile(r"n\d{8}\.tar")
_FLAT_VAL = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")
_FLAT_TEST = re.compile(r"ILSVRC2012_test_(\d{8})\.JPEG")


class Blob(NamedTuple):
    """``size`` bytes at ``offset`` of a file: a whole file, or a member of a tar (or of a tar in a tar)."""

    path: str
    offset: int
    size: int

    def read(self) -> bytes:
        """The bytes.

        Raises:
            UserError: they cannot be read, or there are fewer than when the source was listed.
        """
        try:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(self.offset)
                parts, left = [], self.size
                while left and (part := file.read(left)):
                    parts.append(part)
                    left -= len(part)
        except OSError as error:
            raise UserError(
                f"The source {self.path} cannot be read ({error.strerror}). Mend that, then run the same command "
                f"again: finished shards are kept."
            ) from None
        if left:
            raise UserError(
                f"The source {self.path} changed while it was being read: {left} of {self.size} bytes at "
                f"{self.offset} are gone. Run the conversion from a source that nobody writes to."
            )
        return b"".join(parts)


class LabelledImage(NamedTuple):
    """folder: the class folder; file: the file's name in it."""

    folder: str
    file: str
    blob: Blob

    @property
    def name(self) -> str:
        return f"{self.folder}/{self.file}"


@dataclass(frozen=True)
class Tree:
    """splits: images by split, each sorted by name, so that they do not depend on how the source lists them.
    folders: sorted class folders of all splits, the ones not chosen too. ignored: paths of files that are no images
    by their names."""

    splits: dict[str, list[LabelledImage]]
    folders: list[str]
    ignored: list[str]


class _Found(NamedTuple):
    parts: tuple[str, ...]
    blob: Blob


Tick = Callable[[], object]


# --- listing --------------------------------------------------------------------------------------------------------


def _list(source: Path, tick: Tick) -> Iterator[_Found]:
    """Every file below a folder or in a tar; hidden ones (macOS's ._name among them) left out."""
    if source.is_dir():
        yield from _list_folder(source, (), tick)
    elif source.is_file():
        yield from _list_tar(Blob(str(source), 0, source.stat().st_size), (source.name,), tick)
    else:
        raise UserError(f"There is no source {source}: --source takes a folder or a tar of images.")


def _list_folder(folder: Path, parts: tuple[str, ...], tick: Tick) -> Iterator[_Found]:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"The folder {folder} cannot be listed ({error.strerror}).") from None
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _list_folder(Path(entry.path), (*parts, entry.name), tick)
        elif entry.is_file():
            tick()
            yield _Found((*parts, entry.name), Blob(entry.path, 0, entry.stat().st_size))


def _list_tar(tar: Blob, shown: tuple[str, ...], tick: Tick) -> Iterator[_Found]:
    """Files in a tar that lies at ``tar`` (a file, or inside another tar). Reads headers only."""
    name = "/".join(shown)
    with open(tar.path, "rb") as file:
        window = _Window(file, tar)
        try:
            with tarfile.open(fileobj=window, mode="r:") as archive:
                while (member := archive.next()) is not None:
                    archive.members = []  # type: ignore[attr-defined]  # 1.3 million of them would stay in memory
                    parts = tuple(part for part in member.name.split("/") if part not in ("", "."))
                    if member.isfile() and not any(part.startswith(".") for part in parts):
                        tick()
                        yield _Found(parts, Blob(tar.path, tar.offset + member.offset_data, member.size))
                end = archive.offset
        except tarfile.TarError as error:
            packed = name.endswith((".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip"))
            raise UserError(
                f"{name} is compressed, and compressed archives cannot be read in place: unpack it first (gunzip "
                f"leaves a .tar, which is enough)."
                if packed
                else f"{name} cannot be read as a tar ({error}): it is cut or damaged. Download or copy it again."
            ) from None
        # A tar that was cut between two members ends like a whole one, but for its end-of-archive mark.
        window.seek(end)
        if window.read(512) != bytes(512):
            raise UserError(
                f"{name} ends without an end-of-archive mark: it was cut, and images are missing from it. Download or "
                f"copy it again."
            )


class _Window(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, file: io.BufferedReader, part: Blob):
        self._file, self._part, self._at = file, part, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._part.size)[whence]
        return self._at

    def readinto(self, buffer) -> int:
        self._file.seek(self._part.offset + self._at)
        data = self._file.read(max(0, min(len(buffer), self._part.size - self._at)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


# --- ImageNet -------------------------------------------------------------------------------------------------------


def imagenet_tree(source: Path, *, split: str, devkit: Path | None, tick: Tick) -> Tree:
    """ImageNet from any layout named at the top of this module.

    Args:
        split: "train", "val", or "all" that are there.
        devkit: ILSVRC2012_devkit_t12.tar.gz; by default the one beside the source or in it. Only a val set that is
            not sorted into class folders needs it.

    Raises:
        UserError: nothing to convert, an unknown wnid, a split that cannot be told, a missing devkit.
    """
    known = set(imagenet.wnids())
    own_name = _SPLITS.get(source.name.lower())
    images: dict[str, list[LabelledImage]] = {}
    unsorted: list[_Found] = []
    ignored: list[str] = []

    def add(found: _Found, split_of_tar: str | None) -> None:
        file = found.parts[-1]
        if _CLASS_TAR.fullmatch(file):
            if split != "val":
                for inner in _list_tar(found.blob, found.parts, tick):
                    add(_Found(("train", file.removesuffix(".tar"), inner.parts[-1]), inner.blob), None)
        elif file in (TRAIN_TAR, VAL_TAR) and found.blob.offset == 0:
            of_tar = "train" if file == TRAIN_TAR else "val"
            if split in (of_tar, "all"):
                for inner in _list_tar(found.blob, found.parts, tick):
                    add(inner, of_tar)
        elif _FLAT_TEST.fullmatch(file) or Path(file).suffix.lower() not in IMAGE_SUFFIXES:
            if file != DEVKIT:
                ignored.append("/".join(found.parts))
        elif len(found.parts) > 1 and found.parts[-2] in known:
            above = _SPLITS.get(found.parts[-3].lower()) if len(found.parts) > 2 else None
            which = above or split_of_tar or own_name or (split if split != "all" else None)
            if which is None:
                raise UserError(
                    f"{source} holds class folders ({found.parts[-2]}, …) but nothing says whether they are the "
                    f"training or the validation set: add --split train or --split val."
                )
            images.setdefault(which, []).append(LabelledImage(found.parts[-2], file, found.blob))
        elif _FLAT_VAL.fullmatch(file):
            unsorted.append(found)
        else:
            folder = found.parts[-2] if len(found.parts) > 1 else "no folder"
            raise UserError(
                f"{'/'.join(found.parts)} of {source} lies in {folder!r}, which is not one of ImageNet's 1000 wnids "
                f"(such as {imagenet.wnids()[0]}). For another data set use `make_shards.py folder`; otherwise move "
                f"what does not belong to ImageNet out of the source."
            )

    for found in _list(source, tick):
        add(found, None)
    if unsorted and split != "train":
        truth = _validation_truth(_find_devkit(source, devkit))
        for found in unsorted:
            match = _FLAT_VAL.fullmatch(found.parts[-1])
            number = int(match[1]) if match else 0
            if not 1 <= number <= len(truth):
                raise UserError(
                    f"{'/'.join(found.parts)}: the devkit's ground truth has {len(truth)} lines, not {number}."
                )
            images.setdefault("val", []).append(LabelledImage(truth[number - 1], found.parts[-1], found.blob))
    return _chosen(source, images, ignored, None if split == "all" else split)


def _find_devkit(source: Path, given: Path | None) -> Path:
    candidates = [given] if given else [(source if source.is_dir() else source.parent) / DEVKIT]
    for path in candidates:
        if path.is_file():
            return path
    raise UserError(
        f"The validation images of {source} are not sorted into class folders, and {candidates[0]}, which has their "
        f"labels, is not there. Put {DEVKIT} (from image-net.org, where the images are) beside the images or name "
        f"it with --devkit; or convert the training set alone with --split train."
    )


def _validation_truth(devkit: Path) -> list[str]:
    """wnid of validation image 1, 2, …

    The ground truth counts classes by ILSVRC2012_ID, whose order is not that of the sorted wnids; meta.mat maps it.
    """
    import scipy.io  # for this one file

    try:
        with tarfile.open(devkit, "r:*") as archive:
            files = {Path(member.name).name: member for member in archive.getmembers()}
            meta = archive.extractfile(files["meta.mat"])
            truth = archive.extractfile(files["ILSVRC2012_validation_ground_truth.txt"])
            assert meta is not None and truth is not None
            synsets = scipy.io.loadmat(io.BytesIO(meta.read()), squeeze_me=True)["synsets"]
            by_id = {int(i): str(w) for i, w in zip(synsets["ILSVRC2012_ID"], synsets["WNID"], strict=True)}
            labels = [by_id[int(line)] for line in truth.read().split()]
    except (tarfile.TarError, OSError, EOFError, KeyError, ValueError, TypeError, AssertionError) as error:
        raise UserError(f"{devkit} cannot be read as ILSVRC2012's devkit ({error!r}): download it again.") from None
    if strangers := sorted(set(labels) - set(imagenet.wnids())):
        raise UserError(
            f"{devkit} names classes that are not ImageNet's 1000, {strangers[0]} for one: download it again."
        )
    return labels


# --- any tree -------------------------------------------------------------------------------------------------------


def folder_tree(source: Path, *, split: str | None, tick: Tick) -> Tree:
    """class/image or split/class/image, below any number of leading folders.

    Args:
        split: chooses one split of several; names the one there is where no folder does.

    Raises:
        UserError: no class folders, folders of different depth, a split that cannot be told.
    """
    found, ignored = [], []
    for file in _list(source, tick):
        is_image = Path(file.parts[-1]).suffix.lower() in IMAGE_SUFFIXES
        found.append(file) if is_image else ignored.append("/".join(file.parts))
    loose = next((file for file in found if len(file.parts) < 2), None)
    if loose or not found:
        raise UserError(
            f"{source} holds no class folders{f' ({loose.parts[-1]} lies at its top)' if loose else ' with images'}: "
            f"it has to look like <class>/<image> or <split>/<class>/<image>."
        )
    leading = _common_prefix({file.parts[:-2] for file in found})
    depths = {len(file.parts) - len(leading) - 2: file for file in found}
    if set(depths) - {0, 1} or len(depths) > 1:
        examples = " and ".join("/".join(file.parts) for _, file in sorted(depths.items())[:2])
        raise UserError(
            f"The images of {source} do not lie at one depth of <class>/<image> or <split>/<class>/<image>: "
            f"{examples}. Move what does not belong out of the source, or name a folder further down as --source."
        )
    images: dict[str, list[LabelledImage]] = {}
    if 1 in depths:
        for file in found:
            name = file.parts[len(leading)]
            images.setdefault(_SPLITS.get(name.lower(), name), []).append(
                LabelledImage(file.parts[-2], file.parts[-1], file.blob)
            )
        return _chosen(source, images, ignored, split)
    # Nothing above the classes tells splits apart, unless it is named like one.
    above = leading[-1] if leading else source.name
    which = _SPLITS.get(above.lower()) or split
    if which is None:
        raise UserError(
            f"{source} holds class folders ({found[0].parts[-2]}, …) but nothing says which split they are: add "
            f"--split NAME (train, val, …)."
        )
    images[which] = [LabelledImage(file.parts[-2], file.parts[-1], file.blob) for file in found]
    return _chosen(source, images, ignored, split)


def _common_prefix(paths: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(os.path.commonprefix([list(path) for path in paths]))


def _chosen(source: Path, images: dict[str, list[LabelledImage]], ignored: list[str], split: str | None) -> Tree:
    if not images:
        raise UserError(
            f"{source} holds no class folders with images{f' ({len(ignored)} other files)' if ignored else ''}."
        )
    if split is not None and split not in images:
        raise UserError(f"{source} has no split {split!r}; it has: {', '.join(sorted(images))}.")
    chosen = {name: images[name] for name in sorted(images) if split in (None, name)}
    for name, found in chosen.items():
        found.sort(key=lambda image: (image.folder, image.file))
        for a, b in zip(found, found[1:], strict=False):
            if (a.folder, a.file) == (b.folder, b.file):
                raise UserError(
                    f"{a.name} of the split {name} is there twice, in {a.blob.path} and in {b.blob.path}: the source "
                    f"holds the split twice or one file twice. Move one of them out of the source."
                )
    return Tree(chosen, sorted({image.folder for found in images.values() for image in found}), ignored)
