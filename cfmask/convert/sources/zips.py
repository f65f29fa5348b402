"""Zip archives, listed once; their entries are then read by offset (see blobs.py)."""

from __future__ import annotations

import stat
import zipfile
from collections.abc import Iterator
from typing import NamedTuple

from cfmask.convert.sources.blobs import DEFLATED, STORED, SourceFile, ZipEntry
from cfmask.errors import UserError

MAGIC = (b"PK\3\4", b"PK\5\6", b"PK\7\x08")
_END = b"PK\5\6"


def is_zip(file: SourceFile) -> bool:
    """Whether a file is a zip archive by its first bytes; or by its name and its end, where other bytes precede it."""
    return file.read(0, min(4, file.size)) in MAGIC or (
        file.path.lower().endswith(".zip") and zipfile.is_zipfile(file.path)
    )


class Entry(NamedTuple):
    """name: as the archive has it. is_link: a symbolic link; its data is the target."""

    name: str
    data: ZipEntry
    is_folder: bool
    is_link: bool


def entries(file: SourceFile) -> Iterator[Entry]:
    """All entries, from the archive's directory; zip64 too.

    Raises:
        UserError: the archive is damaged, cut, one of several parts, or has entries that are encrypted or compressed
            by another method than deflate.
    """
    again = "it is cut or damaged. Download or copy it again."
    try:
        _refuse_parts(file)
        with zipfile.ZipFile(file.path) as archive:
            infos = archive.infolist()
            archive.NameToInfo.clear()  # of 1.4 million entries, before as many more objects are made
    except (zipfile.BadZipFile, UnicodeDecodeError, ValueError, EOFError) as error:
        raise UserError(f"{file.path} cannot be read as a zip archive ({error}): {again}") from None
    except NotImplementedError as error:  # another version of the format
        raise UserError(f"{file.path} cannot be read in place ({error}): unpack it first.") from None
    except OSError as error:
        raise UserError(f"The source {file.path} cannot be read ({error.strerror}).") from None
    for info in infos:
        name = _name(info)
        mode = info.external_attr >> 16 if info.create_system == 3 else 0
        is_folder = name.endswith("/") or stat.S_ISDIR(mode)
        if not is_folder:
            if info.flag_bits & 0x41:
                raise UserError(f"{name} in {file.path} is encrypted: unpack the archive with its password first.")
            if info.compress_type not in (STORED, DEFLATED):
                raise UserError(
                    f"{name} in {file.path} is compressed by method {info.compress_type}, and only stored and deflated "
                    f"entries can be read in place: unpack the archive first."
                )
            if info.header_offset < 0 or info.header_offset + info.compress_size > file.size:
                raise UserError(f"{file.path} names bytes for {name} that it does not have: {again}")
        data = ZipEntry(file, info.header_offset, info.compress_size, info.file_size, info.compress_type, info.CRC)
        yield Entry(name, data, is_folder, stat.S_ISLNK(mode))


def _refuse_parts(file: SourceFile) -> None:
    """Python's zipfile reads the last part of a split archive as if it were whole."""
    tail = file.read(max(0, file.size - (1 << 16) - 22), min(file.size, (1 << 16) + 22))
    at = tail.rfind(_END)
    if at >= 0 and int.from_bytes(tail[at + 4 : at + 6], "little") not in (0, 0xFFFF):
        raise UserError(
            f"{file.path} is the last of several parts of a zip archive: join them first (zip -s 0 PART.zip --out "
            f"WHOLE.zip)."
        )


def _name(info: zipfile.ZipInfo) -> str:
    name = info.filename
    if not info.flag_bits & 0x800 and not name.isascii():
        try:  # many programs write UTF-8 without the flag that says so; the format's own code page is cp437
            name = name.encode("cp437").decode()
        except UnicodeError:
            pass
    return name.replace("\\", "/") if info.create_system == 0 else name
