"""Files in a folder or a zip archive, found by the end of their path and read in place."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath

from cfmask.data import zips
from cfmask.data.blobs import SourceFile, ZipEntry
from cfmask.errors import UserError


def posix(name: str) -> str:
    """A path in a canonical form: Windows' backslashes become slashes, "./" and double slashes are removed."""
    return str(PurePosixPath(name.replace("\\", "/")))


class FileTree:
    """The files below a folder, or in a zip archive. Hidden files are ignored. Threads may share it.

    Args:
        place: the folder or the archive.

    Raises:
        UserError: it does not exist, cannot be listed, or is a damaged archive.
    """

    def __init__(self, place: Path) -> None:
        self.place = place
        self._entries: dict[str, ZipEntry] | None = None
        """Entries of a zip archive by path; None for a folder."""
        self._paths: dict[str, list[str]] = defaultdict(list)
        try:
            if not place.is_dir():
                file = SourceFile.listed(place)
                if not zips.is_zip(file):
                    raise UserError(f"{place} is neither a folder nor a whole zip archive. Download the archive again.")
                self._entries = {entry.name: entry.data for entry in zips.entries(file) if _is_visible(entry)}
            for path in self._list_folder() if self._entries is None else self._entries:
                self._paths[posix(path).rpartition("/")[2]].append(path)
        except OSError as error:
            raise UserError(f"{place} cannot be read ({error.strerror}).") from None

    def find(self, name: str) -> str | None:
        """The path of the file ``name``, in any subfolder; None if there is none.

        ``name`` may begin with the name of ``place``: val2017/1.jpg is 1.jpg in a folder (or zip) val2017.

        Raises:
            UserError: several files match.
        """
        name = posix(name)
        ends = self._paths.get(name.rpartition("/")[2], [])
        above = self.place.absolute() if self._entries is None else self.place.absolute().with_suffix("")
        found = (
            [path for path in ends if posix(path) == name]
            or [path for path in ends if posix(path).endswith(f"/{name}")]
            or [path for path in ends if f"{above}/{posix(path)}".endswith(f"/{name.lstrip('/')}")]
        )
        if len(found) > 1:
            raise UserError(
                f"{self.place} holds {name} {len(found)} times ({', '.join(found[:3])}). Give the folder with the "
                "right one."
            )
        return found[0] if found else None

    def read(self, path: str) -> bytes:
        """The bytes of a file that ``find`` returned.

        Raises:
            UserError: it cannot be read.
        """
        if self._entries is not None:
            try:
                return self._entries[path].read()
            except UserError as error:
                raise UserError(f"{path} in {self.place} cannot be read: {error}") from None
        try:
            return (self.place / path).read_bytes()
        except OSError as error:
            raise UserError(f"{self.place / path} cannot be read ({error.strerror}).") from None

    def digest(self, paths: Collection[str] | None = None) -> str:
        """A hash of the files' paths, sizes and modification times (of a zip: checksums).

        Args:
            paths: files that ``find`` returned; by default all.

        Raises:
            UserError: a file was removed since the tree was listed.
        """
        if paths is None:
            paths = {path for of_name in self._paths.values() for path in of_name}
        try:
            if self._entries is not None:
                lines = [(path, entry.size, entry.crc) for path, entry in self._entries.items() if path in paths]
            else:
                stats = ((path, os.stat(self.place / path)) for path in paths)
                lines = [(path, status.st_size, status.st_mtime_ns) for path, status in stats]
        except OSError as error:
            raise UserError(f"{self.place} cannot be read ({error.strerror}: {error.filename}).") from None
        return hashlib.sha256(repr(sorted(lines, key=repr)).encode(errors="surrogateescape")).hexdigest()

    def _list_folder(self) -> Iterator[str]:
        for folder, folders, files in os.walk(self.place, onerror=_raise):
            folders[:] = [name for name in folders if not name.startswith(".") and name != "__MACOSX"]
            inner = os.path.relpath(folder, self.place)
            for name in files:
                if not name.startswith("."):
                    yield name if inner == "." else f"{inner}/{name}"


def _is_visible(entry: zips.Entry) -> bool:
    parts = posix(entry.name).split("/")
    return not entry.is_folder and "__MACOSX" not in parts and not any(part.startswith(".") for part in parts)


def _raise(error: OSError) -> None:
    """By default, os.walk skips folders that it cannot list."""
    raise error
