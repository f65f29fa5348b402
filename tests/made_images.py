"""Unusual image files, written byte by byte, because no encoder of the tests can write them."""

from __future__ import annotations

import struct
import zlib

import numpy as np

SHORT, LONG = 3, 4
TYPES = {SHORT: "H", LONG: "L"}


def tiff(
    width: int,
    height: int,
    strips: list[bytes],
    *,
    order: str = "<",
    bits: tuple[int, ...] = (16,),
    photometric: int | None = 1,
    compressed: bool = False,
    tile: tuple[int, int] | None = None,
    **more: tuple[int, ...],
) -> bytes:
    """A TIFF of given strips, tiles or planes. ``more``: other tags as shorts, such as ``tag_339=(2,)``."""
    if compressed:
        strips = [zlib.compress(strip) for strip in strips]
    tags: dict[int, tuple[int, tuple[int, ...]]] = {
        256: (LONG, (width,)),
        257: (LONG, (height,)),
        258: (SHORT, bits),
        259: (SHORT, (8 if compressed else 1,)),
        277: (SHORT, (len(bits),)),
        **{int(name.removeprefix("tag_")): (SHORT, values) for name, values in more.items()},
    }
    if photometric is not None:
        tags[262] = (SHORT, (photometric,))
    places, counts = (324, 325) if tile else (273, 279)
    if tile:
        tags[322], tags[323] = (LONG, (tile[0],)), (LONG, (tile[1],))
    else:
        tags[278] = (LONG, (height,))
    tags[counts] = (LONG, tuple(map(len, strips)))
    body = b"".join(strips)
    at = 8 + len(body) + len(body) % 2
    starts = np.cumsum([8, *map(len, strips)])[:-1]
    tags[places] = (LONG, tuple(int(start) for start in starts))
    entries, extra = b"", b""
    after = at + 2 + 12 * len(tags) + 4
    for tag, (kind, values) in sorted(tags.items()):
        value = struct.pack(f"{order}{len(values)}{TYPES[kind]}", *values)
        if len(value) > 4:
            place, extra = after + len(extra), extra + value
            value = struct.pack(f"{order}L", place)
        entries += struct.pack(f"{order}HHL", tag, kind, len(values)) + value.ljust(4, b"\0")
    head = struct.pack(f"{order}2sHL", b"II" if order == "<" else b"MM", 42, at)
    count = struct.pack(f"{order}H", len(tags))
    return head + body + bytes(len(body) % 2) + count + entries + bytes(4) + extra


def png(width: int, height: int, *, depth: int, colour: int, rows: bytes, chunks: tuple[tuple[bytes, bytes], ...] = ()):
    """A PNG of unfiltered rows. ``colour``: its colour type. ``chunks``: additional chunks before the pixels."""
    stride = len(rows) // height
    unfiltered = b"".join(b"\0" + rows[y * stride : (y + 1) * stride] for y in range(height))
    header = struct.pack(">LLBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(unfiltered)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">L", len(data)) + kind + data + struct.pack(">L", zlib.crc32(kind + data)) for kind, data in parts
    )


def webp_claiming(width: int, height: int) -> bytes:
    """An animated WebP with a canvas but without frames."""
    canvas = bytes([2, 0, 0, 0]) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    chunks = b"WEBP" + b"VP8X" + struct.pack("<L", 10) + canvas + b"ANIM" + struct.pack("<L", 6) + bytes(6)
    return b"RIFF" + struct.pack("<L", len(chunks)) + chunks


def directory_bomb(entries: int, size: int, order: str = "<") -> bytes:
    """A TIFF, or EXIF data, whose entries all refer to the same ``size`` bytes."""
    head = struct.pack(f"{order}2sHL", b"II" if order == "<" else b"MM", 42, 8) + struct.pack(f"{order}H", entries)
    return head + b"".join(struct.pack(f"{order}HHLL", 40000 + i, 7, size, 8) for i in range(entries)) + bytes(size)
