"""Files in a folder or a zip archive, found by the end of their path and read in place."""

from __future__ import annotations

import hashlib
import os
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath

from cfmask.errors import UserError


def posix(name: str) -> str:
    """A path in canonical form: with slashes instead of backslashes, and without "./" and double slashes."""
    return str(PurePosixPath(name.replace("\\", "/")))


class FileTree:
    """The files below a folder, or in a zip archive, without hidden ones. Threads may share it.

    Args:
        place: the folder or the archive.

    Raises:
        UserError: it does not exist, cannot be listed, or is a damaged archive.
    """

    def __init__(self, place: Path) -> None:
        self.place = place
        self._zip: zipfile.ZipFile | None = None
        self._paths: dict[str, list[str]] = defaultdict(list)
        try:
            if not place.is_dir():
                self._zip = zipfile.ZipFile(place)
            for path in self._list():
                self._paths[posix(path).rpartition("/")[2]].append(path)
        except (zipfile.BadZipFile, ValueError, RuntimeError) as error:
            raise UserError(
                f"{place} is neither a folder nor a complete zip archive ({error}). Download the archive again."
            ) from None
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
        above = self.place.absolute() if self._zip is None else self.place.absolute().with_suffix("")
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
        try:
            return (self.place / path).read_bytes() if self._zip is None else self._zip.read(path)
        except OSError as error:
            raise UserError(f"{self.place / path} cannot be read ({error.strerror}).") from None
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:  # RuntimeError: encrypted
            raise UserError(
                f"{path} in {self.place} cannot be read ({error}): the archive is damaged, encrypted, or compressed in "
                "a way that Python does not support. Download it again, or unpack it and give the folder."
            ) from None

    def digest(self, paths: Collection[str] | None = None) -> str:
        """A hash of the files' paths, sizes, and times of change (in a zip: checksums).

        Args:
            paths: files that ``find`` returned; by default all.

        Raises:
            UserError: a file was removed since the tree was listed.
        """
        lines: list[tuple[object, ...]]
        if paths is None:
            paths = {path for of_name in self._paths.values() for path in of_name}
        try:
            if self._zip is not None:
                entries = (entry for entry in self._zip.infolist() if entry.filename in paths)
                lines = [(entry.filename, entry.file_size, entry.CRC) for entry in entries]
            else:
                stats = ((path, os.stat(self.place / path)) for path in paths)
                lines = [(path, status.st_size, status.st_mtime_ns) for path, status in stats]
        except OSError as error:
            raise UserError(f"{self.place} cannot be read ({error.strerror}: {error.filename}).") from None
        return hashlib.sha256(repr(sorted(lines, key=repr)).encode(errors="surrogateescape")).hexdigest()

    def _list(self) -> Iterator[str]:
        if self._zip is not None:
            for entry in self._zip.infolist():
                parts = posix(entry.filename).split("/")
                if not entry.is_dir() and "__MACOSX" not in parts and not any(p.startswith(".") for p in parts):
                    yield entry.filename
            return
        for folder, folders, files in os.walk(self.place, onerror=_raise):
            folders[:] = [name for name in folders if not name.startswith(".") and name != "__MACOSX"]
            inner = os.path.relpath(folder, self.place)
            for name in files:
                if not name.startswith("."):
                    yield name if inner == "." else f"{inner}/{name}"


def _raise(error: OSError) -> None:
    """For os.walk, which by default skips folders that it cannot list."""
    raise error
