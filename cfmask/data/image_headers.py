"""Checks of image headers before a decoder allocates memory for them.

The header of a small file can claim gigabytes: of pixels, of tiles, or of metadata whose entries all refer to the same
bytes. Pillow checks the number of pixels only, and only after it has parsed metadata and libwebp has allocated the
image. So headers are read here first.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from cfmask.errors import UserError

MAX_PIXELS = 178_956_970
"""Most pixels of an image: half a gigabyte of RGB. It is Pillow's limit, which other libraries often disable."""

MAX_ASPECT = 100
"""Largest ratio of long side to short side. A line of pixels would be resized to an image of gigabytes."""

LARGE, PIXELS_PER_BYTE = 1 << 24, 1000
"""An image of more than LARGE pixels must have at least one byte for PIXELS_PER_BYTE pixels. Photographs have ten
thousand times as many; blank images, and headers without an image, have fewer."""

MAX_SCANS = 100
"""Most scans of a progressive JPEG; encoders write about ten. Each needs a pass over the image, even if it is a few
bytes long."""

_TYPE_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
"""Bytes of a value, by TIFF type."""

_ORIENTATION, _TILE_WIDTH, _TILE_LENGTH = 274, 322, 323


def check_size(width: int, height: int, num_bytes: int | None) -> None:
    """Refuse an image that is too large to decode.

    Args:
        width, height: in pixels, from the header.
        num_bytes: size of the file; None for images that may have few bytes and many pixels.

    Raises:
        UserError: more pixels than MAX_PIXELS or than the file can hold, or an aspect ratio above MAX_ASPECT.
    """
    check_aspect(width, height)
    most = MAX_PIXELS if num_bytes is None else min(MAX_PIXELS, max(LARGE, PIXELS_PER_BYTE * num_bytes))
    if width * height > most:
        raise UserError(f"a decompression bomb: its header claims {width} × {height} pixels, more than {most}")


def check_aspect(width: int, height: int) -> None:
    """Raises UserError if one side is more than MAX_ASPECT times the other, or 0."""
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise UserError(f"{width} × {height} pixels: one side is more than {MAX_ASPECT} times the other")


def safe_to_open(data: bytes) -> bytes:
    """The same image, which Pillow opens with memory in proportion to the size of the file.

    Raises:
        UserError: the header claims too much.
    """
    if jpeg := read_jpeg(data):
        # Pillow parses EXIF and multi-picture directories when it opens a JPEG. Pixels do not depend on them.
        return jpeg.without_metadata(data)
    if size := _webp_size(data):
        check_size(*size, len(data))
    elif data[:2] in (b"II", b"MM"):
        entries = list(directory(data))
        claimed = sum(entry.num_bytes for entry in entries)
        if claimed > 4 * len(data) + 65536:
            raise UserError(f"a decompression bomb: {len(data)} bytes that claim {claimed} bytes of metadata")
        tags = {entry.tag: entry.number for entry in entries}
        if _TILE_WIDTH in tags and _TILE_LENGTH in tags:
            check_size(tags[_TILE_WIDTH], tags[_TILE_LENGTH], len(data))
    return data


# --- JPEG -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Jpeg:
    """Header of a JPEG."""

    width: int
    """In pixels, like ``height``; 0 without a frame header."""
    height: int
    components: int
    """1 for grey, 3 for colour, 4 for CMYK."""
    common: bool
    """8 bits per value, Huffman-coded, sequential or progressive, which every decoder supports."""
    orientation: int
    """EXIF's, 1 to 8; 1 without EXIF."""
    metadata: tuple[tuple[int, int], ...]
    """Begin and end of segments that do not affect pixels."""

    def without_metadata(self, data: bytes) -> bytes:
        kept, at = [], 0
        for begin, end in self.metadata:
            kept.append(data[at:begin])
            at = end
        return b"".join([*kept, data[at:]]) if kept else data


def read_jpeg(data: bytes) -> Jpeg | None:
    """Header of a JPEG; None for other data.

    Raises:
        UserError: more scans than MAX_SCANS.
    """
    if data[:2] != b"\xff\xd8":
        return None
    width = height = components = 0
    common, orientation = False, 1
    metadata = []
    for marker, begin, end in _segments(data):
        if marker in _FRAMES and not components and end - begin >= 10:
            precision, height, width, components = struct.unpack_from(">BHHB", data, begin + 4)
            common = precision == 8 and marker <= 0xC2
            if marker == 0xC2 and data.count(b"\xff\xda", end) > MAX_SCANS:
                raise UserError(f"a decompression bomb: a progressive JPEG of more than {MAX_SCANS} scans")
        elif marker in _METADATA:
            metadata.append((begin, end))
            if marker == 0xE1 and orientation == 1 and data[begin + 4 : begin + 10] == b"Exif\0\0":
                orientation = exif_orientation(data[begin + 4 : end])
    return Jpeg(width, height, components, common, orientation, tuple(metadata))


_FRAMES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_METADATA = {*range(0xE1, 0xEE), 0xEF, 0xFE}  # not APP0 (JFIF) and APP14 (Adobe), which define the components
_ALONE = {0x00, 0x01, *range(0xD0, 0xD9), *range(0xF0, 0xFE)}


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, begin and end of the segments before the first scan. Junk between them is skipped, as decoders do."""
    at = 2
    while (at := data.find(b"\xff", at)) >= 0 and at + 4 <= len(data):
        marker = data[at + 1]
        if marker == 0xFF:
            at += 1
        elif marker in _ALONE:
            at += 2
        elif marker in (0xD9, 0xDA) or marker < 0xC0:
            return
        else:
            end = at + 2 + max(2, int.from_bytes(data[at + 2 : at + 4], "big"))
            yield marker, at, end
            at = end


# --- WebP -----------------------------------------------------------------------------------------------------------


def _webp_size(data: bytes) -> tuple[int, int] | None:
    """Width and height of the canvas of a WebP; None for other data."""
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP" or len(data) < 30:
        return None
    kind = data[12:16]
    if kind == b"VP8X":
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    if kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    width, height = struct.unpack_from("<HH", data, 26)
    return width & 0x3FFF, height & 0x3FFF


# --- TIFF and EXIF --------------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """An entry of a directory."""

    tag: int
    num_bytes: int
    """Size of its values."""
    number: int
    """Its value if that is a short or long, else 0."""


def directory(data: bytes) -> Iterator[Entry]:
    """Entries of the first directory of a TIFF or of EXIF data, up to the end of the data."""
    order, big = "<" if data[:2] == b"II" else ">", 43 in data[2:4]
    try:
        (at,) = struct.unpack_from(f"{order}{'Q' if big else 'L'}", data, 8 if big else 4)
        (count,) = struct.unpack_from(f"{order}{'Q' if big else 'H'}", data, at)
    except struct.error:
        return
    entry = struct.Struct(f"{order}HH{'Q8s' if big else 'L4s'}")
    at += 8 if big else 2
    whole = data[at : at + (len(data) - at) // entry.size * entry.size]
    for tag, kind, values, value in islice(entry.iter_unpack(whole), count):
        number = struct.unpack_from(f"{order}{'H' if kind == 3 else 'L'}", value)[0] if kind in (3, 4) else 0
        yield Entry(tag, values * _TYPE_SIZES.get(kind, 0), number)


def exif_orientation(exif: bytes) -> int:
    """1 to 8, from EXIF data with or without JPEG's prefix; 1 by default."""
    found = (entry.number for entry in directory(exif.removeprefix(b"Exif\0\0")) if entry.tag == _ORIENTATION)
    orientation = next(found, 1)
    return orientation if orientation in range(1, 9) else 1
