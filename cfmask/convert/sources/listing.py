"""Walks over a source: the files of a folder, a tar or a zip archive, and what is ignored there."""

from __future__ import annotations

import errno
import io
import os
import posixpath
import stat
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from cfmask.convert.tarscan import Kind, TarWalk
from cfmask.data import zips
from cfmask.data.blobs import Absent, Blob, SourceBytes, SourceFile
from cfmask.errors import UserError, did_you_mean_path

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}

# Why files are ignored or have no bytes.
HIDDEN = "hidden by its name"
NO_IMAGE = "no image by its name"
ARCHIVE = "an archive inside the source, not read"
DANGLING = "a link to a file or folder that does not exist"
LOOP = "a link to itself or to a folder that contains it"

_MAX_DEPTH = 100
_ARCHIVE_SUFFIXES = (".tar", ".tgz", ".tbz", ".tbz2", ".txz", ".gz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".rar")

Parts = tuple[str, ...]
Tick = Callable[[], object]


def is_image(file: str) -> bool:
    return os.path.splitext(file)[1].lower() in IMAGE_SUFFIXES


class FoundFile(NamedTuple):
    """parts: of the path below the source."""

    parts: Parts
    blob: SourceBytes


@dataclass
class _Group:
    """Ignored files of one reason and one suffix. common: the folders that contain all of them."""

    first: str
    common: Parts
    files: int = 0


class IgnoredFiles:
    """Ignored files, counted by reason and suffix: Kaggle's ImageNet has half a million annotations."""

    def __init__(self) -> None:
        self._groups: dict[tuple[str, str], _Group] = {}

    def add(self, parts: Parts, why: str) -> None:
        suffix = ".*" if why == HIDDEN else f"*{os.path.splitext(parts[-1])[1]}"
        group = self._groups.setdefault((why, suffix), _Group("/".join(parts), parts[:-1]))
        group.files += 1
        group.common = tuple(os.path.commonprefix([group.common, parts[:-1]]))

    def count(self, reason: str | None = None) -> int:
        """How many files are ignored for this reason, or for any."""
        return sum(group.files for (why, _), group in self._groups.items() if reason in (None, why))

    def issues(self) -> list[dict[str, Any]]:
        """A line of bad_samples.jsonl for each group, without the policy."""
        return [
            {
                "name": group.first if group.files == 1 else "/".join((*group.common, "**", suffix)),
                "files": group.files,
                "issue": why,
            }
            for (why, suffix), group in sorted(self._groups.items())
        ]

    def lines(self) -> list[str]:
        """A line of text for each reason."""
        first: dict[str, str] = {}
        for (why, _), group in self._groups.items():
            first.setdefault(why, group.first)
        return [f"Ignored ({why}): {self.count(why)} files, such as {name}" for why, name in first.items()]


@dataclass
class Listing:
    """A walk over a source.

    tick: called for each file.
    folders: every folder seen, empty ones included.
    ignored: files that the walk does not yield. The caller adds those that it does not use.
    """

    source: Path
    tick: Tick
    folders: set[Parts] = field(default_factory=set)
    ignored: IgnoredFiles = field(default_factory=IgnoredFiles)

    def __iter__(self) -> Iterator[FoundFile]:
        """Every file in the folder or archive, except hidden ones (macOS's ._name among them)."""
        try:
            status = os.stat(self.source)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(
                f"The source {self.source} cannot be read ({reason}): --source takes a folder of images, or a tar or "
                f"zip archive.{did_you_mean_path(self.source)}"
            ) from None
        if stat.S_ISDIR(status.st_mode):
            yield from self._folder(str(self.source), (), ((status.st_dev, status.st_ino),))
        elif stat.S_ISREG(status.st_mode):
            yield from self.archive(Blob.whole(SourceFile.of(self.source, status)), (self.source.name,))
        else:
            raise UserError(f"The source {self.source} is {_kind(status.st_mode)}, not a folder, tar or zip archive.")

    def images(self) -> Iterator[FoundFile]:
        """The files that are images by their names; others are ignored."""
        for found in self:
            if is_image(found.parts[-1]):
                yield found
            else:
                self.ignore(found)

    def ignore(self, found: FoundFile, why: str | None = None) -> None:
        """Count a file as ignored, by default because its name is not that of an image."""
        packed = found.parts[-1].lower().endswith(_ARCHIVE_SUFFIXES)
        self.ignored.add(found.parts, why or (ARCHIVE if packed else NO_IMAGE))

    def _absent(self, parts: Parts, path: str, why: str) -> Iterator[FoundFile]:
        if is_image(parts[-1]):
            yield FoundFile(parts, Absent(path, why))
        elif why == DANGLING and not os.path.splitext(parts[-1])[1]:
            raise UserError(
                f"{'/'.join(parts)} of {self.source} is {why}. If its target is a folder, an unknown number of images "
                "is missing: copy the folder as well, or delete the link."
            )
        else:
            self.ignored.add(parts, why)

    def _folder(self, folder: str, parts: Parts, above: tuple[tuple[int, int], ...]) -> Iterator[FoundFile]:
        """above: device and inode of the folder and of all folders that contain it."""
        if len(parts) > _MAX_DEPTH:
            raise UserError(f"The folders of {self.source} are nested more than {_MAX_DEPTH} deep: {folder}.")
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(f"The folder {folder} cannot be listed ({error.strerror}).") from None
        for entry in entries:
            # Decoded by the locale, the same bytes would be another name, and another plan, on another machine.
            here = (*parts, os.fsencode(entry.name).decode("utf-8", "surrogateescape"))
            if entry.name.startswith("."):
                self.ignored.add(here, HIDDEN)
                continue
            try:
                status = entry.stat()
            except OSError as error:
                if not entry.is_symlink() or error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                    raise UserError(f"{entry.path} cannot be read ({error.strerror}).") from None
                yield from self._absent(here, entry.path, LOOP if error.errno == errno.ELOOP else DANGLING)
                continue
            if stat.S_ISDIR(status.st_mode):
                identity = (status.st_dev, status.st_ino)
                if identity in above:
                    self.ignored.add(here, LOOP)
                else:
                    self.folders.add(here)
                    yield from self._folder(entry.path, here, (*above, identity))
            elif stat.S_ISREG(status.st_mode):
                self.tick()
                yield FoundFile(here, Blob.whole(SourceFile.of(entry.path, status)))
            else:
                yield from self._absent(here, entry.path, _kind(status.st_mode))

    # --- archives ---

    def archive(self, archive: SourceBytes, shown: Parts) -> Iterator[FoundFile]:
        """Files of a tar or zip archive: the source itself, or a tar in it. Reads no data of files.

        Links are followed, to files and to folders.
        """
        name = "/".join(shown)
        if not isinstance(archive, Blob):
            raise UserError(f"{self.source} holds the archive {name}, which cannot be read in place: unpack it first.")
        is_zip = archive.offset == 0 and zips.is_zip(archive.file)

        def entries() -> Iterator[_Entry]:
            return _zip_entries(archive.file) if is_zip else _tar_entries(archive, name)

        links: dict[Parts, Parts | None] = {}
        for parts, kind, blob, target in entries():
            if _is_hidden(parts):
                if kind is not Kind.FOLDER:
                    self.ignored.add(parts, HIDDEN)
            elif kind is Kind.FILE:
                self.tick()
                yield FoundFile(parts, blob)
            elif kind is Kind.FOLDER:
                self.folders.add(parts)
            elif kind in (Kind.HARD_LINK, Kind.SYMBOLIC_LINK):
                links[parts] = _target(parts, target, from_top=kind is Kind.HARD_LINK)
            elif kind is Kind.SPARSE:
                raise UserError(
                    f"{name} holds {'/'.join(parts)} as a sparse file, which cannot be read in place. Write the tar "
                    f"again without --sparse, or unpack it."
                )
            else:
                yield from self._absent(parts, archive.path, "a named pipe, a device or another special file")
        if links:
            yield from self._linked(entries(), links, archive.path)

    def _linked(self, entries: Iterator[_Entry], links: dict[Parts, Parts | None], path: str) -> Iterator[FoundFile]:
        """The targets of an archive's links, under the links' names. links: target by link; None: outside."""
        by_target: dict[Parts, list[Parts]] = {}
        for link, target in links.items():
            if target is not None and link[: len(target)] != target:
                by_target.setdefault(target, []).append(link)
        followed: set[Parts] = set()
        for parts, kind, blob, _ in entries:
            if kind not in (Kind.FILE, Kind.FOLDER):
                continue
            paths: list[tuple[Parts, tuple[Parts, ...]]] = [(parts, ())]
            for there, via in paths:  # grows: the target of a link may be, or lie in, the target of another one
                for n in range(1, len(there) + 1):
                    onward = [link for link in by_target.get(there[:n], ()) if link not in via]
                    paths += [((*link, *there[n:]), (*via, link)) for link in onward]
            for alias, via in paths[1:]:
                followed.update(via)
                if kind is Kind.FOLDER:
                    self.folders.add(alias)
                elif _is_hidden(alias):
                    self.ignored.add(alias, HIDDEN)
                else:
                    self.tick()
                    yield FoundFile(alias, blob)
        for link in sorted(links.keys() - followed):
            target = links[link]
            chain = {link}
            while target in links and target not in chain:
                chain.add(target)
                target = links[target]
            loops = target is not None and (target in chain or link[: len(target)] == target)
            yield from self._absent(link, path, LOOP if loops else DANGLING)


_Entry = tuple[Parts, Kind, SourceBytes, str]
"""Path, kind, bytes and (of a link) target of an entry of an archive."""


def _tar_entries(tar: Blob, name: str) -> Iterator[_Entry]:
    try:
        with open(tar.path, "rb") as file:
            for entry in TarWalk(cast(IO[bytes], _Window(file, tar)), name):
                if parts := _parts(entry.name):
                    yield parts, entry.kind, Blob(tar.file, tar.offset + entry.offset, entry.size), entry.target
    except OSError as error:
        raise UserError(f"The source {tar.path} cannot be read ({error.strerror}).") from None


def _zip_entries(file: SourceFile) -> Iterator[_Entry]:
    for entry in zips.entries(file):
        if parts := _parts(entry.name):
            kind = Kind.FOLDER if entry.is_folder else Kind.SYMBOLIC_LINK if entry.is_link else Kind.FILE
            yield parts, kind, entry.data, os.fsdecode(entry.data.read()) if entry.is_link else ""


def _parts(name: str) -> Parts:
    # Interned: one string for each folder, not one for each of its images.
    return tuple(sys.intern(part) for part in name.split("/") if part not in ("", "."))


def _is_hidden(parts: Parts) -> bool:
    return any(part.startswith(".") and part != ".." for part in parts)


def _target(link: Parts, target: str, *, from_top: bool) -> Parts | None:
    """The target of a link in an archive; None if it is outside the archive."""
    if target.startswith("/") and not from_top:
        return None
    above = () if from_top else link[:-1]
    parts = _parts(posixpath.normpath("/".join((*above, target.lstrip("/")))))
    return None if ".." in parts else parts


def _kind(mode: int) -> str:
    kinds = {stat.S_ISFIFO: "a named pipe", stat.S_ISSOCK: "a socket", stat.S_ISDIR: "a folder", stat.S_ISREG: "a file"}
    return next((name for test, name in kinds.items() if test(mode)), "a device")


class _Window(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, file: io.BufferedReader, part: Blob):
        self._file, self._part, self._at = file, part, 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._part.size)[whence]
        return self._at

    def readinto(self, buffer) -> int:
        self._file.seek(self._part.offset + self._at)
        data = self._file.read(max(0, min(len(buffer), self._part.size - self._at)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)
