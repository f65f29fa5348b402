"""Lists a tar from its headers alone.

    TarWalk(file, name)   every entry, including links and sparse files; refuses a tar that is not complete
    scan(tar)             the members that WebDataset reads, and the images that it skips

Names follow WebDataset's rule: a member's key is its path up to the first dot of the last component; the rest is its
extension, in small letters. WebDataset skips members without a dot, hidden files, and ``__meta__``.
"""

from __future__ import annotations

import enum
import hashlib
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from cfmask.data import images
from cfmask.errors import UserError

_BLOCK = tarfile.BLOCKSIZE
_ENCODING = "utf-8"
"""Of names. tarfile's default is the locale's, with which a tar would have other keys on another machine."""
_NAME = re.compile(r"((?:.*/|)[^./]+)[.]([^/]*)")
_META = re.compile(r"__[^/]*__(/|$)")
_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
    b"LZIP": "lzip",
    b"\x5d\0\0": "lzma",
    b"\x1f\x9d": "compress",
    b"PK\x03\x04": "zip",
    b"7z\xbc\xaf\x27\x1c": "7z",
    b"Rar!": "rar",
}
_IMAGE_SUFFIXES = {*images.MEMBERS, "gif", "tiff"} - {images.RAW}


class Kind(enum.Enum):
    """Type of an entry."""

    FILE = "file"
    FOLDER = "folder"
    HARD_LINK = "hard link"
    SYMBOLIC_LINK = "symbolic link"
    SPARSE = "sparse file"
    OTHER = "special file"


class Entry(NamedTuple):
    """An entry of a tar. ``size`` bytes of data lie at ``offset``, except for links (no data) and sparse files (another
    layout). target: of a link, else ""."""

    name: str
    kind: Kind
    offset: int
    size: int
    target: str


def packing(start: bytes) -> str | None:
    """Name of the compression or archive format whose files begin with these bytes; None for others."""
    return next((name for magic, name in _MAGIC.items() if start.startswith(magic)), None)


class TarWalk:
    """The entries of a tar (ustar, GNU, PAX) in order, from its headers; data is skipped.

    tarfile alone ends silently at a truncated or damaged header, and at an end-of-archive mark that more data follows.
    Iterating raises UserError in these cases, and if the tar is compressed.

    Args:
        file: the tar, open for reading and seeking.
        shown: its name in errors.
    """

    def __init__(self, file: IO[bytes], shown: str):
        self._file, self._shown = file, shown
        self.end = 0
        """Offset of the end-of-archive mark, after the walk."""

    def __iter__(self) -> Iterator[Entry]:
        self._file.seek(0)
        at = 0
        try:
            with tarfile.open(fileobj=self._file, mode="r:", encoding=_ENCODING) as archive:
                while (info := archive.next()) is not None:
                    archive.members = []  # type: ignore[attr-defined]  # they would stay in memory
                    if info.size < 0 or archive.offset <= at:
                        raise tarfile.ReadError("a header has a negative size")
                    at = archive.offset
                    yield Entry(info.name, _kind(info), info.offset_data, info.size, info.linkname)
                self.end = archive.offset
        except (tarfile.TarError, ValueError, OverflowError, MemoryError, RecursionError) as error:
            raise UserError(self._damage(error, at)) from None
        if problem := end_problem(self._file, self.end):
            raise UserError(f"{self._shown} {problem[0]}. {problem[1]}")

    def _damage(self, error: Exception, at: int) -> str:
        self._file.seek(0)
        start = self._file.read(_BLOCK)
        if at:  # there was an entry: it is a tar
            return f"{self._shown} cannot be read after byte {at} ({error}): it is truncated or damaged. {_GET_AGAIN}"
        if kind := packing(start):
            archive = kind in ("zip", "7z", "rar")
            return (
                f"{self._shown} is {'an archive of another kind' if archive else 'compressed'} ({kind}) by its "
                f"content; files in it cannot be read by offset. Unpack it"
                f"{' and write its files to a tar' if archive else '; compression does not make images smaller'}."
            )
        if not start:
            return f"{self._shown} is an empty file. {_GET_AGAIN}"
        if start.startswith(b"version https://git-lfs"):
            return f"{self._shown} is a pointer of Git LFS, not the file itself. Get the file with `git lfs pull`."
        if start.isascii() and b"\0" not in start:
            return f"{self._shown} is not a tar: it begins with the text {start[:40].decode()!r}. {_GET_AGAIN}"
        return f"{self._shown} cannot be read as a tar ({error}): it is truncated or damaged. {_GET_AGAIN}"


def _kind(info: tarfile.TarInfo) -> Kind:
    if info.issparse():
        return Kind.SPARSE
    if info.isreg():
        return Kind.FILE
    kinds = {tarfile.DIRTYPE: Kind.FOLDER, tarfile.LNKTYPE: Kind.HARD_LINK, tarfile.SYMTYPE: Kind.SYMBOLIC_LINK}
    return kinds.get(info.type, Kind.OTHER)


def end_problem(file: IO[bytes], end: int) -> tuple[str, str] | None:
    """The problem with the end of a tar whose headers stop at ``end``, and its remedy; None if there is no problem.

    A tar that was truncated between two members only lacks the end-of-archive mark.
    """
    file.seek(end)
    block = file.read(_BLOCK)
    if len(block) < _BLOCK:
        return "has no end-of-archive mark: it was truncated between two members", _GET_AGAIN
    if any(block):
        return f"has a damaged header at byte {end}", _GET_AGAIN
    while block := file.read(1 << 20):  # a tar may be padded with zeros, to any size
        if any(block):
            at = (len(block) - len(block.lstrip(b"\0"))) // _BLOCK * _BLOCK
            try:
                tarfile.TarInfo.frombuf(block[at : at + _BLOCK], "utf-8", "surrogateescape")
            except tarfile.TarError:
                return "has data after its end-of-archive mark: it was overwritten or damaged", _GET_AGAIN
            return (
                "has another tar after its end-of-archive mark, where readers stop: tars were joined by `cat`",
                "Extract it with `tar --extract --ignore-zeros` and write one tar of all its files, or join the "
                "original tars with `tar --concatenate`.",
            )
    return None


_GET_AGAIN = "Download it again: readers would skip the missing samples without an error."


# --- as WebDataset reads it -----------------------------------------------------------------------------------------


class Member(NamedTuple):
    """A file in a tar: ``size`` bytes of data at ``offset``."""

    key: str
    extension: str
    offset: int
    size: int

    @property
    def name(self) -> str:
        return f"{self.key}.{self.extension}"


class Contents(NamedTuple):
    """Contents of a tar.

    members: in the order of the tar.
    unseen: names of images that WebDataset's readers skip, with the reason.
    end: offset of the end-of-archive mark.
    """

    members: list[Member]
    unseen: list[tuple[str, str]]
    end: int


def scan(tar: Path) -> Contents:
    """The members of a tar.

    Raises:
        UserError: the tar is compressed, truncated or damaged, or has data after its end.
        OSError: it cannot be read.
    """
    members: list[Member] = []
    unseen: list[tuple[str, str]] = []
    with open(tar, "rb", buffering=0) as file:
        walk = TarWalk(file, str(tar))
        for entry in walk:
            name = split_name(entry.name)
            if name is not None and entry.kind is Kind.FILE:
                members.append(Member(*name, entry.offset, entry.size))
            elif reason := _unseen(entry, name is not None):
                unseen.append((_escaped(entry.name), reason))
    return Contents(members, unseen, walk.end)


def _unseen(entry: Entry, has_key: bool) -> str | None:
    """Why WebDataset skips an image, or the label of one; None for members that are neither or are read."""
    file = entry.name.rstrip("/").rpartition("/")[2]
    suffix = file.rpartition(".")[2].strip().lower()
    if file.startswith(".") or suffix not in {*_IMAGE_SUFFIXES, "cls", "json"} or _META.match(entry.name):
        return None
    if entry.kind is Kind.FILE:
        if has_key or suffix not in _IMAGE_SUFFIXES:
            return None
        return f"a file with {'a slash at its end' if entry.name.endswith('/') else 'white space in its extension'}"
    if entry.kind is Kind.FOLDER:
        return None
    if entry.kind is Kind.SPARSE:
        return "a sparse file, which cannot be read in place: write the tar without --sparse"
    return f"a {entry.kind.value}{f' to {_escaped(entry.target)}' if entry.target else ''}, which readers skip"


def split_name(name: str) -> tuple[str, str] | None:
    """(key, extension) of a file; None if WebDataset skips it. Bytes that are not UTF-8 are escaped."""
    if _META.match(name):
        return None
    match = _NAME.fullmatch(_escaped(name))
    # Readers ask for members by extension, and no extension has a space.
    return (match[1], match[2].lower()) if match and not re.search(r"\s", match[2]) else None


def member_at(file: IO[bytes], start: int, offset: int) -> Member | None:
    """The member whose data is at ``offset``, by its headers, which begin at ``start``; None if there is none."""
    file.seek(start)
    try:
        with tarfile.open(fileobj=file, mode="r:", encoding=_ENCODING) as archive:
            for info in archive:
                if info.offset_data >= offset:
                    name = split_name(info.name)
                    return Member(*name, offset, info.size) if name and info.offset_data == offset else None
    except (tarfile.TarError, ValueError, OverflowError, MemoryError, RecursionError):
        pass
    return None


def read_members(
    file: IO[bytes], places: Sequence[tuple[int, int]], size: int, digest: hashlib._Hash | None = None
) -> Iterator[tuple[int, bytes]]:
    """Number and data of each member, in the order of the tar. Stops at a member that overlaps the one before.

    Args:
        places: offset and size of the members.
        size: of the tar.
        digest: gets every byte of the tar.
    """

    def read(begin: int, end: int) -> bytes:
        """Short only at the end of the file."""
        parts = []
        while begin < end and (part := os.pread(file.fileno(), min(end - begin, 1 << 22), begin)):
            parts.append(part)
            begin += len(part)
        return b"".join(parts)

    at = 0
    for number in sorted(range(len(places)), key=places.__getitem__):
        offset, length = places[number]
        if offset < at:
            break
        data = read(offset, offset + length)
        if digest:
            digest.update(read(at, offset))
            digest.update(data)
        at = offset + length
        yield number, data
    while digest and at < size and (rest := read(at, min(size, at + (1 << 22)))):
        digest.update(rest)
        at += len(rest)


def _escaped(name: str) -> str:
    return name.encode(errors="backslashreplace").decode()
