"""Images other than 8-bit RGB: how they are converted, which are refused, and that refused ones cost no memory."""

from __future__ import annotations

import io
import resource
import struct

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from cfmask.data import image_headers, images
from cfmask.errors import UserError
from made_images import directory_bomb, png, tiff, webp_claiming

W, H = 40, 30
GREY16 = (np.arange(W * H, dtype=np.uint32) * 54).astype(np.uint16).reshape(H, W)
RGB16 = np.stack([GREY16, GREY16[::-1], GREY16[:, ::-1]], -1)
RGB8 = (RGB16 >> 8).astype(np.uint8)


def big(array):
    return array.astype(">u2").tobytes()


def little(array):
    return array.astype("<u2").tobytes()


def twelve(array):
    """12 bits a sample, two samples in three bytes."""
    a, b = (array >> 4).reshape(-1, 2).astype(np.uint32).T
    return np.stack([a >> 4, (a & 15) << 4 | b >> 8, b & 255], -1).astype(np.uint8).tobytes()


def with_alpha(array):
    return np.concatenate([array, np.full((H, W, 1), 0x4000, array.dtype)], -1)


def tiles(array, side=16):
    padded = np.pad(array, [(0, -H % side), (0, -W % side)])
    return [
        little(padded[y : y + side, x : x + side])
        for y in range(0, padded.shape[0], side)
        for x in range(0, padded.shape[1], side)
    ]


def reversed_bits(data):
    return bytes(int(f"{byte:08b}"[::-1], 2) for byte in data)


DEEP_GREY = {
    "PNG": png(W, H, depth=16, colour=0, rows=big(GREY16)),
    "PNG, significant bits": png(W, H, depth=16, colour=0, rows=big(GREY16), chunks=((b"sBIT", b"\x0c"),)),
    "PNG, a transparent level": png(W, H, depth=16, colour=0, rows=big(GREY16), chunks=((b"tRNS", b"\x12\x34"),)),
    "PNG, alpha": png(
        W, H, depth=16, colour=4, rows=big(np.stack([GREY16, np.full_like(GREY16, 77)], -1).reshape(H, -1))
    ),
    "TIFF": tiff(W, H, [little(GREY16)]),
    "TIFF, big-endian": tiff(W, H, [big(GREY16)], order=">"),
    "TIFF, zlib": tiff(W, H, [little(GREY16)], compressed=True),
    "TIFF, big-endian, zlib": tiff(W, H, [big(GREY16)], order=">", compressed=True),
    "TIFF, white is zero": tiff(W, H, [little(65535 - GREY16)], photometric=0),
    "TIFF, white is zero, zlib": tiff(W, H, [little(65535 - GREY16)], photometric=0, compressed=True),
    "TIFF, tiles": tiff(W, H, tiles(GREY16), tile=(16, 16)),
    "TIFF, maximum": tiff(W, H, [little(GREY16)], tag_281=(4095,)),
    "TIFF, bits reversed": tiff(W, H, [reversed_bits(little(GREY16))], tag_266=(2,)),
    "TIFF, 12 bits": tiff(W, H, [twelve(GREY16)], bits=(12,)),
}

DEEP_COLOUR = {
    "PNG": png(W, H, depth=16, colour=2, rows=big(RGB16)),
    "PNG, alpha": png(W, H, depth=16, colour=6, rows=big(with_alpha(RGB16))),
    "TIFF": tiff(W, H, [little(RGB16)], bits=(16,) * 3, photometric=2),
    "TIFF, big-endian, zlib": tiff(W, H, [big(RGB16)], bits=(16,) * 3, photometric=2, order=">", compressed=True),
    "TIFF, alpha": tiff(W, H, [little(with_alpha(RGB16))], bits=(16,) * 4, photometric=2, tag_338=(2,)),
    "TIFF, planes, zlib": tiff(
        W, H, [little(RGB16[..., c]) for c in range(3)], bits=(16,) * 3, photometric=2, compressed=True, tag_284=(2,)
    ),
}


@pytest.mark.parametrize("name", DEEP_GREY)
def test_deep_grey_is_scaled_by_its_depth(name):
    expected = np.repeat((GREY16 >> 8).astype(np.uint8)[None], 3, 0)
    assert np.array_equal(images.decode(DEEP_GREY[name]).numpy(), expected)
    assert images.inspect(DEEP_GREY[name]).oddities[0] == ("12-bit" if "12" in name else "16-bit")


@pytest.mark.parametrize("name", DEEP_COLOUR)
def test_deep_colour_is_scaled_by_its_depth(name):
    assert np.array_equal(images.decode(DEEP_COLOUR[name]).permute(1, 2, 0).numpy(), RGB8)
    assert images.inspect(DEEP_COLOUR[name]).oddities[0] == "16-bit"


def planes(array):
    return [np.ascontiguousarray(array[..., c]).tobytes() for c in range(array.shape[-1])]


UNDEFINED = {
    "floats": (tiff(W, H, [GREY16.astype("<f4").tobytes()], bits=(32,), tag_339=(3,)), "32-bit floating-point samples"),
    "floats, white is zero": (
        tiff(W, H, [GREY16.astype("<f4").tobytes()], bits=(32,), tag_339=(3,), photometric=0),
        "floating-point",
    ),
    "signed 16": (tiff(W, H, [little(GREY16)], tag_339=(2,)), "16-bit signed samples"),
    "signed 8": (tiff(W, H, [bytes(W * H)], bits=(8,), tag_339=(2,)), "8-bit signed samples"),
    "32 bits": (tiff(W, H, [GREY16.astype("<u4").tobytes()], bits=(32,)), "32-bit samples"),
    "signed 32": (tiff(W, H, [GREY16.astype("<i4").tobytes()], bits=(32,), tag_339=(2,)), "32-bit signed samples"),
    "no photometric interpretation": (tiff(W, H, [little(GREY16)], photometric=None), "whether 0 is black"),
    "planes of 16 bits": (
        tiff(W, H, [little(RGB16[..., c]) for c in range(3)], bits=(16,) * 3, photometric=2, tag_284=(2,)),
        "separate planes",
    ),
    "a plane, white is zero": (tiff(W, H, [bytes(W * H)], bits=(8,), photometric=0, tag_284=(2,)), "separate planes"),
    "planes of premultiplied colour": (
        tiff(W, H, [bytes(W * H)] * 4, bits=(8,) * 4, photometric=2, tag_284=(2,), tag_338=(1,)),
        "separate planes",
    ),
    "subsampled YCbCr": (tiff(W, H, [bytes(W * H * 3)], bits=(8,) * 3, photometric=6), "subsampled YCbCr"),
    "8-bit palette": (
        tiff(W, H, [bytes(W * H)], bits=(8,), photometric=3, tag_320=tuple(range(256)) * 3),
        "palette has 8 bits",
    ),
    "grey and alpha of 16 bits": (
        tiff(W, H, [bytes(W * H * 4)], bits=(16, 16), tag_338=(2,)),
        "a kind of TIFF that Pillow does not read",
    ),
}


@pytest.mark.parametrize("name", UNDEFINED)
def test_samples_without_a_defined_white_are_refused_with_the_reason(name):
    data, reason = UNDEFINED[name]
    for function in (images.decode, images.inspect):
        with pytest.raises(UserError, match=reason):
            function(data)


def saved(image, kind, **settings):
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def palette_image(mode="RGB"):
    image = Image.fromarray((np.arange(W * H) % 4).astype(np.uint8).reshape(H, W), "P")
    colours = {"RGB": [255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 8, 7], "RGBA": [9, 8, 7, 0, 0, 255, 0, 99, 1, 2, 3, 4] * 2}
    image.putpalette(colours[mode], mode)
    return image


_RGB = Image.fromarray(RGB8)
_GREY = _RGB.convert("L")
_RGBA = Image.fromarray(np.concatenate([RGB8, np.full((H, W, 1), 99, np.uint8)], -1))

PLANES = ((255, 0, 0, 9), (0, 255, 0, 8), (0, 0, 255, 7))  # of the palette, as TIFF stores it

# Files, and their pictures in RGB; None: the result of Pillow's convert.
KINDS = {
    "1, PNG": (saved(_GREY.convert("1"), "PNG"), None),
    "1, TIFF, white is zero": (
        tiff(W, H, [np.packbits(GREY16 > 9000, axis=1).tobytes()], bits=(1,), photometric=0),
        Image.fromarray(np.where(GREY16 > 9000, 0, 255).astype(np.uint8)),
    ),
    "2 bits, PNG": (
        png(W, H, depth=2, colour=0, rows=bytes([0b00011011] * (W * H // 4))),
        Image.fromarray(np.tile(np.array([0, 85, 170, 255], np.uint8), W * H // 4).reshape(H, W)),
    ),
    "L, white is zero": (tiff(W, H, [(255 - np.array(_GREY)).tobytes()], bits=(8,), photometric=0), _GREY),
    "LA, PNG": (saved(_RGBA.convert("LA"), "PNG"), None),
    "La, TIFF": (
        tiff(
            W, H, [np.stack([np.array(_GREY) // 2, np.full((H, W), 128)], -1).astype(np.uint8).tobytes()],
            bits=(8, 8), tag_338=(1,),
        ),
        Image.fromarray((np.array(_GREY) // 2 * 255.0 / 128).astype(np.uint8)),
    ),
    "P, GIF": (saved(palette_image(), "GIF"), palette_image()),
    "P, a transparent colour": (saved(palette_image(), "PNG", transparency=1), palette_image()),
    "P, alpha by colour": (saved(palette_image(), "PNG", transparency=b"\0\x80\xff"), palette_image()),
    "P, RGBA palette": (saved(palette_image("RGBA"), "PNG"), palette_image("RGBA")),
    "PA, TIFF": (
        tiff(
            W, H, [np.stack([np.array(palette_image()), np.full((H, W), 9)], -1).astype(np.uint8).tobytes()],
            bits=(8, 8), photometric=3, tag_338=(2,),
            tag_320=sum(((257 * r, 257 * g, 257 * b, 257 * last, *[0] * 252) for r, g, b, last in PLANES), ()),
        ),
        palette_image(),
    ),
    "RGB, a transparent colour": (saved(_RGB, "PNG", transparency=(1, 2, 3)), _RGB),
    "RGBA, WebP": (saved(_RGBA, "WEBP", lossless=True), _RGB),
    "RGBX, TIFF": (tiff(W, H, [np.array(_RGBA).tobytes()], bits=(8,) * 4, photometric=2, tag_338=(0,)), _RGB),
    "RGB planes, TIFF": (tiff(W, H, planes(RGB8), bits=(8,) * 3, photometric=2, tag_284=(2,)), _RGB),
    "CMYK, TIFF": (saved(_RGB.convert("CMYK"), "TIFF"), _RGB.convert("CMYK")),
    "CMYK, JPEG": (saved(_RGB.convert("CMYK"), "JPEG", quality=95), None),
    "YCbCr, TIFF": (
        tiff(W, H, [np.array(_RGB.convert("YCbCr")).tobytes()], bits=(8,) * 3, photometric=6, tag_530=(1, 1)),
        _RGB.convert("YCbCr"),
    ),
    "BMP, 15 bits": (
        b"BM" + struct.pack("<LLL", 0, 0, 54) + struct.pack("<LllHHLLllLL", 40, W, H, 1, 16, 0, 0, 0, 0, 0, 0)
        + np.full((H, W), 0x7C1F, "<u2").tobytes(),
        Image.new("RGB", (W, H), (255, 0, 255)),
    ),
    "BMP, bit fields": (
        b"BM" + struct.pack("<LLL", 0, 0, 66) + struct.pack("<LllHHLLllLL", 40, W, H, 1, 16, 3, 0, 0, 0, 0, 0)
        + struct.pack("<LLL", 0xF800, 0x7E0, 0x1F) + np.full((H, W), 0xF81F, "<u2").tobytes(),
        Image.new("RGB", (W, H), (255, 0, 255)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_every_mode_becomes_the_rgb_that_it_means(name):
    data, picture = KINDS[name]
    with Image.open(
        io.BytesIO(data) if picture is None else io.BytesIO(saved(picture.convert("RGB"), "PNG"))
    ) as reference:
        expected = np.array(reference.convert("RGB"))
    decoded = images.decode(data).permute(1, 2, 0).numpy().astype(int)
    assert np.abs(decoded - expected).max() <= (1 if name.startswith("La") else 0)
    assert images.inspect(data).width == W


def test_lab_is_converted_through_its_colour_space():
    lab = ImageCms.profileToProfile(
        _RGB, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    assert lab is not None
    decoded = images.decode(saved(lab, "TIFF")).permute(1, 2, 0).numpy().astype(int)
    assert np.abs(decoded - RGB8).mean() < 3


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_several_pictures_the_first_is_read_and_reported(kind):
    first, second = (Image.new("RGB", (W, H), colour) for colour in ("#ff0000", "#00ff00"))
    data = saved(first, kind, save_all=True, append_images=[second], **({"lossless": True} if kind == "WEBP" else {}))
    assert np.array_equal(images.decode(data).permute(1, 2, 0).numpy(), np.array(first))
    assert "several pictures" in images.inspect(data).oddities


def test_the_first_picture_of_a_jpeg_is_read():
    data = saved(_RGB, "MPO", save_all=True, append_images=[Image.new("RGB", (W, H))])
    assert np.array_equal(images.decode(data), images.decode(saved(_RGB, "JPEG")))
    assert images.inspect(data) == images.ImageInfo("jpg", W, H, ())
    assert images.inspect(data[:-40] + b"junk").extension == "jpg"  # the first is complete


def test_the_orientation_of_a_tiff_is_applied_and_reported():
    data = tiff(W, H, [RGB8.tobytes()], bits=(8,) * 3, photometric=2, tag_274=(6,))
    assert np.array_equal(images.decode(data).permute(1, 2, 0).numpy(), np.rot90(RGB8, -1))
    assert images.inspect(data) == images.ImageInfo("tif", H, W, ("TIFF orientation 6",))


def test_a_jpeg_of_12_bits_is_refused_at_conversion_as_in_training():
    data = bytearray(saved(_RGB, "JPEG"))
    data[data.find(b"\xff\xc0") + 4] = 12
    for function in (images.decode, images.inspect):
        with pytest.raises(UserError, match="kind of JPEG that Pillow does not read"):
            function(bytes(data))


# --- claims ---------------------------------------------------------------------------------------------------------


def jpeg_claiming(width, height, **settings):
    data = bytearray(saved(_RGB, "JPEG", **settings))
    at = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))
    struct.pack_into(">HH", data, at + 5, height, width)
    return bytes(data)


def gif_claiming(width, height, frame=(1, 1)):
    screen = struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6)
    return b"GIF89a" + screen + b"," + struct.pack("<HHHHB", 0, 0, *frame, 0) + b"\x02\x02\x44\x01\0;"


def bmp_claiming(width, height):
    return b"BM" + struct.pack("<LLL", 0, 0, 54) + struct.pack("<LllHHLLllLL", 40, width, height, 1, 24, 0, *[0] * 5)


SIZES = {"pixels": (16000, 16000), "pixels for its bytes": (9000, 9000), "aspect": (65000, 20)}
CLAIMS = {
    "WebP": webp_claiming,
    "JPEG": jpeg_claiming,
    "progressive JPEG": lambda w, h: jpeg_claiming(w, h, progressive=True),
    "CMYK JPEG": lambda w, h: saved(_RGB.convert("CMYK"), "JPEG").replace(
        struct.pack(">HH", H, W), struct.pack(">HH", h, w)
    ),
    "PNG": lambda w, h: png(w, h, depth=8, colour=2, rows=b""),
    "GIF": gif_claiming,
    "GIF frame": lambda w, h: gif_claiming(1, 1, (w, h)),
    "BMP": bmp_claiming,
    "TIFF": lambda w, h: tiff(w, h, [b"\0"], compressed=True),
    "TIFF tile": lambda w, h: tiff(W, H, [b"\0"], compressed=True, tile=(w, h)),
    "BigTIFF": lambda w, h: (
        b"II+\0\x08\0\0\0"
        + struct.pack("<QQ", 16, 8)
        + b"".join(
            struct.pack("<HHQQ", tag, 4, 1, value)
            for tag, value in ((256, w), (257, h), (258, 8), (259, 8), (262, 1), (273, 0), (278, h), (279, 1))
        )
        + bytes(8)
    ),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", CLAIMS)
def test_a_claimed_size_is_refused_before_memory_is_allocated(kind, size):
    data = CLAIMS[kind](*SIZES[size])
    assert len(data) < 10_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for function in (images.decode, images.inspect):
        with pytest.raises(UserError, match="100 times the other" if size == "aspect" else "decompression bomb"):
            function(data)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # kB


def test_the_webp_that_claims_eight_million_by_twenty_is_not_opened(monkeypatch):
    monkeypatch.setattr(Image, "open", None)
    with pytest.raises(UserError, match="8388632 × 20 pixels: one side is more than 100 times the other"):
        images.decode(webp_claiming(8_388_632, 20))


def test_metadata_that_claims_the_same_bytes_many_times_is_not_read(monkeypatch):
    bomb = directory_bomb(500, 50_000)
    with pytest.raises(UserError, match="claim 25000000 bytes of metadata"):
        images.decode(bomb)
    # Of the metadata of JPEG, PNG and WebP, only the orientation is read.
    monkeypatch.setattr(Image.Exif, "load", None)
    exif = b"Exif\0\0" + bomb
    segment = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
    jpegs = [saved(_RGB, "JPEG"), saved(_RGB.convert("CMYK"), "JPEG")]
    for data in [jpeg[:2] + segment + jpeg[2:] for jpeg in jpegs] + [saved(_RGB, "PNG", exif=exif)]:
        assert images.decode(data).shape == (3, H, W)
        assert images.inspect(data).width == W


def test_png_text_that_inflates_to_megabytes_is_refused():
    import zlib

    text = b"Comment\0\0" + zlib.compress(bytes(4 << 20))
    with pytest.raises(UserError, match="does not decode"):
        images.decode(png(W, H, depth=8, colour=0, rows=bytes(W * H), chunks=((b"zTXt", text),)))


def test_a_progressive_jpeg_of_very_many_scans_is_refused():
    data = saved(_RGB, "JPEG", progressive=True)
    at = data.find(b"\xff\xda")
    last = data.rfind(b"\xff\xda")
    bomb = data[:-2] + data[last:-2] * image_headers.MAX_SCANS + data[-2:]
    assert 0 < at < last
    with pytest.raises(UserError, match="more than 100 scans"):
        images.decode(bomb)


def test_a_large_photograph_is_accepted():
    assert image_headers.check_size(11648, 8736, 30_000_000) is None
    assert torch.equal(images.decode(saved(_RGB, "PNG")), torch.from_numpy(RGB8).permute(2, 0, 1))
