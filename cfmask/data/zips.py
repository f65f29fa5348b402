"""Lists zip archives. Entries are then read by offset (see blobs.py)."""

from __future__ import annotations

import stat
import zipfile
from collections.abc import Iterator
from typing import NamedTuple

from cfmask.data.blobs import DEFLATED, STORED, SourceFile, ZipEntry
from cfmask.errors import UserError

_MAGIC = (b"PK\3\4", b"PK\5\6", b"PK\7\x08")


def is_zip(file: SourceFile) -> bool:
    """Whether a file is a zip archive by its first bytes, or by its name and its end (self-extracting archives)."""
    return file.read(0, min(4, file.size)) in _MAGIC or (
        file.path.lower().endswith(".zip") and zipfile.is_zipfile(file.path)
    )


class Entry(NamedTuple):
    """An entry of a zip archive. The data of a symbolic link is its target."""

    name: str
    data: ZipEntry
    is_folder: bool
    is_link: bool


def entries(file: SourceFile) -> Iterator[Entry]:
    """All entries of an archive (zip64 included), from its directory.

    Raises:
        UserError: the archive is damaged, truncated or a part of a split archive, or has entries that are encrypted or
            compressed by a method other than deflate.
    """
    again = "it is truncated or damaged. Download it again."
    try:
        _refuse_parts(file)
        with zipfile.ZipFile(file.path) as archive:
            infos = archive.infolist()
            archive.NameToInfo.clear()  # saves the memory of ImageNet's 1.4 million entries
    except (zipfile.BadZipFile, UnicodeDecodeError, ValueError, EOFError) as error:
        raise UserError(f"{file.path} cannot be read as a zip archive ({error}): {again}") from None
    except NotImplementedError as error:  # another version of the format
        raise UserError(f"{file.path} cannot be read in place ({error}): unpack it first.") from None
    except OSError as error:
        raise UserError(f"{file.path} cannot be read ({error.strerror}).") from None
    for info in infos:
        name = _name(info)
        mode = info.external_attr >> 16 if info.create_system == 3 else 0
        is_folder = name.endswith("/") or stat.S_ISDIR(mode)
        if not is_folder:
            if info.flag_bits & 0x41:
                raise UserError(f"{name} in {file.path} is encrypted: unpack the archive with its password first.")
            if info.compress_type not in (STORED, DEFLATED):
                raise UserError(
                    f"{name} in {file.path} is compressed by method {info.compress_type}; only stored and deflated "
                    f"entries can be read in place. Unpack the archive first."
                )
            if info.header_offset < 0 or info.header_offset + info.compress_size > file.size:
                raise UserError(f"The data of {name} lies beyond the end of {file.path}: {again}")
        data = ZipEntry(file, info.header_offset, info.compress_size, info.file_size, info.compress_type, info.CRC)
        yield Entry(name, data, is_folder, stat.S_ISLNK(mode))


def _refuse_parts(file: SourceFile) -> None:
    """Python's zipfile reads the last part of a split archive as if it were complete."""
    tail = file.read(max(0, file.size - (1 << 16) - 22), min(file.size, (1 << 16) + 22))
    at = tail.rfind(b"PK\5\6")
    if at >= 0 and int.from_bytes(tail[at + 4 : at + 6], "little") not in (0, 0xFFFF):
        raise UserError(
            f"{file.path} is the last of several parts of a zip archive. Join them first: zip -s 0 PART.zip --out "
            f"WHOLE.zip"
        )


def _name(info: zipfile.ZipInfo) -> str:
    name = info.filename
    if not info.flag_bits & 0x800 and not name.isascii():
        try:  # many programs write UTF-8 without setting its flag; zipfile then decodes by the default, cp437
            name = name.encode("cp437").decode()
        except UnicodeError:
            pass
    return name.replace("\\", "/") if info.create_system == 0 else name
