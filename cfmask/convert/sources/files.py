"""The files of a source: a walk over a folder or a tar, and what is found there."""

from __future__ import annotations

import io
import os
import sys
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from cfmask.convert.sources.blobs import Blob, SourceBytes, SourceFile
from cfmask.errors import UserError

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}

# Folder names that say by themselves which split is in them.
SPLITS = {
    **{name: name for name in ("train", "val", "test", "dev", "holdout")},
    "training": "train",
    "valid": "val",
    "validation": "val",
}


class LabelledImage(NamedTuple):
    """folder: the class folder; file: the file's name in it."""

    folder: str
    file: str
    blob: SourceBytes

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


class Found(NamedTuple):
    parts: tuple[str, ...]
    blob: SourceBytes


Tick = Callable[[], object]


@dataclass
class Listing:
    """A walk over a source. folders: every folder that was met, also those in which nothing is."""

    source: Path
    tick: Tick
    folders: set[tuple[str, ...]] = field(default_factory=set)

    def __iter__(self) -> Iterator[Found]:
        """Every file below a folder or in a tar; hidden ones (macOS's ._name among them) left out."""
        if self.source.is_dir():
            yield from self._folder(self.source, ())
        elif self.source.is_file():
            yield from self.tar(Blob.whole(SourceFile.listed(self.source)), (self.source.name,))
        else:
            raise UserError(f"There is no source {self.source}: --source takes a folder or a tar of images.")

    def _folder(self, folder: Path, parts: tuple[str, ...]) -> Iterator[Found]:
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
                yield Found((*parts, entry.name), Blob.whole(SourceFile.of(entry.path, entry.stat())))

    def tar(self, tar: Blob, shown: tuple[str, ...]) -> Iterator[Found]:
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
                            yield Found(parts, Blob(tar.file, tar.offset + member.offset_data, member.size))
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


def is_image(file: str) -> bool:
    return os.path.splitext(file)[1].lower() in IMAGE_SUFFIXES


def find_images(listing: Listing) -> tuple[list[Found], list[str]]:
    """Images, and the paths of files that are none by their names."""
    found: list[Found] = []
    ignored: list[str] = []
    for file in listing:
        found.append(file) if is_image(file.parts[-1]) else ignored.append("/".join(file.parts))
    return found, ignored


def chosen_tree(
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
