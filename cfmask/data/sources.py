"""Where images come from when they are converted: folder trees and tars, the latter read in place.

A labelled image is found by its folder: the folder that holds it is its class, the folder above may be its split.

    train/n01440764/n01440764_10026.JPEG         in a folder or a tar, leading folders are fine
    n01440764/n01440764_10026.JPEG               the split is then named by --split, or by the folder's own name
    ILSVRC2012_img_train.tar                     a tar of one tar a class
    ILSVRC2012_img_val.tar                       flat; labels come from the devkit
    imagenet-r/n01443537/art_0.jpg               ImageNet-R, -A and -Sketch: a folder a wnid
    …-format-val/12/1e2f….jpeg                   ImageNet-V2: a folder a class NUMBER (or a wnid)
    objectnet-1.0/images/alarm_clock/….png       ObjectNet: names of its own, which objectnet-1.0/mappings/ explains
"""

from __future__ import annotations

import io
import json
import os
import re
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from cfmask.data import benchmarks, imagenet
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
    """``size`` bytes at ``offset`` of a file: a whole file, or a member of a tar (or of a tar in a tar).
    file_size, mtime_ns: of the file when it was listed."""

    path: str
    offset: int
    size: int
    file_size: int
    mtime_ns: int

    def read(self) -> bytes:
        """The bytes.

        Raises:
            UserError: they cannot be read, or the file is not the one that was listed.
        """
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                now = os.fstat(descriptor)
                data = os.pread(descriptor, self.size, self.offset)
                while len(data) < self.size and (
                    more := os.pread(descriptor, self.size - len(data), self.offset + len(data))
                ):
                    data += more  # a file system may give less than was asked for, though most never do
            finally:
                os.close(descriptor)
        except OSError as error:
            raise UserError(
                f"The source {self.path} cannot be read ({error.strerror}). Mend that, then run the same command "
                f"again: finished shards are kept."
            ) from None
        if (now.st_size, now.st_mtime_ns) != (self.file_size, self.mtime_ns) or len(data) < self.size:
            what = "size" if now.st_size != self.file_size else "time of change"
            raise UserError(
                f"The source {self.path} changed since it was listed: its {what} is another. Finished shards are kept, "
                f"and the same command goes on with the rest; convert from a source that nobody writes to."
            )
        return data


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
    folders: sorted class folders of all splits, the ones not chosen too. empty: class folders without an image, by
    split. ignored: paths of files that are no images by their names."""

    splits: dict[str, list[LabelledImage]]
    folders: list[str]
    empty: dict[str, list[str]]
    ignored: list[str]


class _Found(NamedTuple):
    parts: tuple[str, ...]
    blob: Blob


Tick = Callable[[], object]


# --- listing --------------------------------------------------------------------------------------------------------


@dataclass
class _Listing:
    """A walk over a source. folders: every folder that was met, also those in which nothing is."""

    source: Path
    tick: Tick
    folders: set[tuple[str, ...]] = field(default_factory=set)

    def __iter__(self) -> Iterator[_Found]:
        """Every file below a folder or in a tar; hidden ones (macOS's ._name among them) left out."""
        if self.source.is_dir():
            yield from self._folder(self.source, ())
        elif self.source.is_file():
            status = self.source.stat()
            whole = Blob(str(self.source), 0, status.st_size, status.st_size, status.st_mtime_ns)
            yield from self.tar(whole, (self.source.name,))
        else:
            raise UserError(f"There is no source {self.source}: --source takes a folder or a tar of images.")

    def _folder(self, folder: Path, parts: tuple[str, ...]) -> Iterator[_Found]:
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(f"The folder {folder} cannot be listed ({error.strerror}).") from None
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                self.folders.add((*parts, entry.name))
                yield from self._folder(Path(entry.path), (*parts, entry.name))
            elif entry.is_file():
                self.tick()
                status = entry.stat()
                blob = Blob(entry.path, 0, status.st_size, status.st_size, status.st_mtime_ns)
                yield _Found((*parts, entry.name), blob)

    def tar(self, tar: Blob, shown: tuple[str, ...]) -> Iterator[_Found]:
        """Files in a tar that lies at ``tar`` (a file, or inside another tar). Reads headers only."""
        name = "/".join(shown)
        with open(tar.path, "rb") as file:
            window = _Window(file, tar)
            try:
                with tarfile.open(fileobj=window, mode="r:") as archive:
                    while (member := archive.next()) is not None:
                        archive.members = []  # type: ignore[attr-defined]  # 1.3 million of them would stay in memory
                        # One string for each folder, not one for each of its images.
                        parts = tuple(sys.intern(part) for part in member.name.split("/") if part not in ("", "."))
                        if any(part.startswith(".") for part in parts):
                            continue
                        if member.isfile():
                            self.tick()
                            at = tar.offset + member.offset_data
                            yield _Found(parts, Blob(tar.path, at, member.size, tar.file_size, tar.mtime_ns))
                        elif member.isdir():
                            self.folders.add(parts)
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
                    f"{name} ends without an end-of-archive mark: it was cut, and images are missing from it. Download "
                    f"or copy it again."
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


def _is_image(file: str) -> bool:
    return os.path.splitext(file)[1].lower() in IMAGE_SUFFIXES


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
    listing = _Listing(source, tick)
    images: dict[str, list[LabelledImage]] = {}
    unsorted: list[_Found] = []
    ignored: list[str] = []

    def split_of(folder: tuple[str, ...]) -> str | None:
        above = _SPLITS.get(folder[-2].lower()) if len(folder) > 1 else None
        return above or own_name or (split if split != "all" else None)

    def add(found: _Found, split_of_tar: str | None) -> None:
        file = found.parts[-1]
        if _CLASS_TAR.fullmatch(file):
            if split != "val":
                listing.folders.add(("train", file.removesuffix(".tar")))
                for inner in listing.tar(found.blob, found.parts):
                    add(_Found(("train", file.removesuffix(".tar"), inner.parts[-1]), inner.blob), None)
        elif file in (TRAIN_TAR, VAL_TAR) and found.blob.offset == 0:
            of_tar = "train" if file == TRAIN_TAR else "val"
            if split in (of_tar, "all"):
                for inner in listing.tar(found.blob, found.parts):
                    add(inner, of_tar)
        elif _FLAT_TEST.fullmatch(file) or not _is_image(file):
            if file != DEVKIT:
                ignored.append("/".join(found.parts))
        elif len(found.parts) > 1 and found.parts[-2] in known:
            which = split_of(found.parts[:-1]) or split_of_tar
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

    for found in listing:
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
    folders = [(split_of(folder), folder[-1]) for folder in listing.folders if folder[-1] in known]
    return _chosen(source, images, folders, ignored, None if split == "all" else split)


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


# --- the shifted sets -----------------------------------------------------------------------------------------------


def benchmark_tree(source: Path, name: str, *, tick: Tick) -> tuple[Tree, dict[str, int]]:
    """ImageNet-V2, -R, -A or -Sketch: a folder a class, at any depth. One split, called ``name``.

    Returns:
        The tree, and the class id of each class folder.

    Raises:
        UserError: nothing to convert, or a folder that is no class of this set.
    """
    listing = _Listing(source, tick)
    found, ignored = _images(listing)
    folders = {file.parts[-2] for file in found if len(file.parts) > 1}
    class_ids = {wnid: imagenet.wnids().index(wnid) for wnid in benchmarks.wnids(name)}
    what = f"one of the {len(class_ids)} wnids of {name} (such as {next(iter(class_ids))})"
    if name == benchmarks.IMAGENET_V2.name and not folders & set(class_ids):
        # As numbers: sorted as strings, "10" would come before "2", and 988 of 1000 labels be wrong.
        class_ids = {str(number): number for number in range(1000)}
        what = "a class number 0 … 999, nor a wnid"
    images: list[LabelledImage] = []
    for file in found:
        folder = file.parts[-2] if len(file.parts) > 1 else "no folder"
        if folder not in class_ids:
            raise UserError(
                f"{'/'.join(file.parts)} of {source} lies in {folder!r}, which is not {what}. Is this {name}? If so, "
                f"move what does not belong to it out of the source."
            )
        images.append(LabelledImage(folder, file.parts[-1], file.blob))
    seen = [(name, parts[-1]) for parts in listing.folders if parts[-1] in class_ids]
    return _chosen(source, {name: images} if images else {}, seen, ignored, None), class_ids


_MAPPINGS = FOLDERS, OBJECTS, LABELS, NUMBERS = (
    "folder_to_objectnet_label.json",
    "objectnet_to_imagenet_1k.json",
    "imagenet_to_label_2012_v2",
    "pytorch_to_imagenet_2012_id.json",
)


@dataclass(frozen=True)
class ObjectNet:
    """class_ids: of each folder that overlaps with ImageNet, all class ids that are right for it, sorted. left_out:
    images in folders that do not."""

    tree: Tree
    class_ids: dict[str, tuple[int, ...]]
    left_out: int


def objectnet_tree(source: Path, *, mappings: Path | None, tick: Tick) -> ObjectNet:
    """The part of ObjectNet that overlaps with ImageNet. One split, called "objectnet".

    Args:
        mappings: folder of ObjectNet's mapping files; by default they are looked for in the source and beside it.

    Raises:
        UserError: nothing to convert, a folder that is not ObjectNet's, mapping files that are missing or odd.
    """
    listing = _Listing(source, tick)
    found, ignored, contents = [], [], {}
    for file in listing:
        if _is_image(file.parts[-1]):
            found.append(file)
        elif file.parts[-1] in _MAPPINGS:
            contents[file.parts[-1]] = file.blob.read()
        else:
            ignored.append("/".join(file.parts))
    if mappings is not None or not contents:
        mappings = mappings or source.parent / "mappings"
        contents = {name: (mappings / name).read_bytes() for name in _MAPPINGS if (mappings / name).is_file()}
    if missing := [name for name in _MAPPINGS if name not in contents]:
        raise UserError(
            f"ObjectNet's own mapping files say which of its folders are which of ImageNet's classes, and "
            f"{', '.join(missing)} cannot be found in {mappings or source}. They are in the archive, in "
            f"objectnet-1.0/mappings: name that folder with --mappings."
        )
    known, class_ids = _objectnet_classes(contents)
    images, left_out = [], 0
    for file in found:
        folder = file.parts[-2] if len(file.parts) > 1 else "no folder"
        if folder in class_ids:
            images.append(LabelledImage(folder, file.parts[-1], file.blob))
        elif folder in known:
            left_out += 1
        else:
            raise UserError(
                f"{'/'.join(file.parts)} of {source} lies in {folder!r}, which is none of ObjectNet's {len(known)} "
                f"folders (such as {known[0]}). Move what does not belong to ObjectNet out of the source."
            )
    name = benchmarks.OBJECTNET.name
    seen = [(name, parts[-1]) for parts in listing.folders if parts[-1] in class_ids]
    return ObjectNet(_chosen(source, {name: images} if images else {}, seen, ignored, None), class_ids, left_out)


def _objectnet_classes(files: dict[str, bytes]) -> tuple[list[str], dict[str, tuple[int, ...]]]:
    """All folders, and the class ids of each that overlaps with ImageNet.

    FOLDERS: folder → ObjectNet's label. OBJECTS: label → texts of ImageNet classes, joined by "; ". LABELS: a text a
    line; the line's number, from 0, counts as the devkit's ILSVRC2012_ID does. NUMBERS: class id → that number.
    """
    try:
        label_of = {str(folder): str(label) for folder, label in json.loads(files[FOLDERS]).items()}
        texts_of = {str(label): str(texts).split("; ") for label, texts in json.loads(files[OBJECTS]).items()}
        class_id_of = {int(number): int(class_id) for class_id, number in json.loads(files[NUMBERS]).items()}
        lines = [line.strip() for line in files[LABELS].decode().splitlines()]
        ids: dict[str, int] = {text: class_id_of[number] for number, text in enumerate(lines) if text}
        folder_of = {label: folder for folder, label in label_of.items()}
        # Two classes of ImageNet are called "crane"; were one of ObjectNet's too, nobody could say which is meant.
        ambiguous = {text for text, n in Counter(lines).items() if n > 1}
        if unclear := sorted(ambiguous & {text for texts in texts_of.values() for text in texts}):
            raise ValueError(f"{unclear[0]!r} is two classes")
        class_ids = {folder_of[label]: tuple(sorted(ids[text] for text in texts)) for label, texts in texts_of.items()}
        if strange := [i for of_folder in class_ids.values() for i in of_folder if not 0 <= i < 1000]:
            raise ValueError(f"class id {strange[0]}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"ObjectNet's mapping files do not fit together ({error!r}): copy all of objectnet-1.0/mappings from the "
            f"archive again."
        ) from None
    return sorted(label_of), class_ids


def _images(listing: _Listing) -> tuple[list[_Found], list[str]]:
    """Images, and the paths of files that are none by their names."""
    found: list[_Found] = []
    ignored: list[str] = []
    for file in listing:
        found.append(file) if _is_image(file.parts[-1]) else ignored.append("/".join(file.parts))
    return found, ignored


# --- any tree -------------------------------------------------------------------------------------------------------


def folder_tree(source: Path, *, split: str | None, tick: Tick) -> Tree:
    """class/image or split/class/image, below any number of leading folders.

    Args:
        split: chooses one split of several; names the one there is where no folder does.

    Raises:
        UserError: no class folders, folders of different depth, a split that cannot be told.
    """
    listing = _Listing(source, tick)
    found, ignored = _images(listing)
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
    below = [parts for parts in listing.folders if parts[: len(leading)] == leading]
    if 1 in depths:
        for file in found:
            name = file.parts[len(leading)]
            images.setdefault(_SPLITS.get(name.lower(), name), []).append(
                LabelledImage(file.parts[-2], file.parts[-1], file.blob)
            )
        seen = [(parts[-2], parts[-1]) for parts in below if len(parts) == len(leading) + 2]
        return _chosen(source, images, [(_SPLITS.get(s.lower(), s), c) for s, c in seen], ignored, split)
    # Nothing above the classes tells splits apart, unless it is named like one.
    above = leading[-1] if leading else source.name
    which = _SPLITS.get(above.lower()) or split
    if which is None:
        raise UserError(
            f"{source} holds class folders ({found[0].parts[-2]}, …) but nothing says which split they are: add "
            f"--split NAME (train, val, …)."
        )
    images[which] = [LabelledImage(file.parts[-2], file.parts[-1], file.blob) for file in found]
    return _chosen(
        source, images, [(which, parts[-1]) for parts in below if len(parts) == len(leading) + 1], ignored, split
    )


def _common_prefix(paths: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(os.path.commonprefix([list(path) for path in paths]))


def _chosen(
    source: Path,
    images: dict[str, list[LabelledImage]],
    seen: Iterable[tuple[str | None, str]],
    ignored: list[str],
    split: str | None,
) -> Tree:
    """The tree of the chosen split, or of all. seen: (split, class folder) of folders that were met, full or empty."""
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
    full = {(name, image.folder) for name, found in images.items() for image in found}
    without = sorted({(name, folder) for name, folder in seen if name is not None} - full)
    empty = {name: [folder for its_split, folder in without if its_split == name] for name in chosen}
    return Tree(chosen, sorted({folder for _, folder in full}), empty, ignored)
