"""From the bytes of an image to the pixels of the model's input, for training, evaluation and conversion.

The recipe has no augmentation: bicubic resize of the short side, centre crop (appendix A.1). JPEGs are decoded by
libjpeg-turbo and resized by torch's antialiased uint8 kernel, in less than half the time of Pillow and without Python's
lock. Other formats, and JPEGs with any fault, are decoded by Pillow. Decoded pixels are bitwise those of Pillow;
resized ones differ by at most 2 levels, in fewer than one value of a hundred (tests/test_images.py).

Values of more than 8 bits are scaled by the depth that the file states (Pillow would clip those of grey images). Alpha,
ICC profiles and gamma are ignored, and the first of several pictures in a file is read, as in torchvision. EXIF
orientation is NOT applied, as in CLIP's own evaluation.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from cfmask.data import image_headers
from cfmask.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

Data = bytes | bytearray | memoryview

# Extensions in a shard by format. Other formats are not opened: some of Pillow's readers (EPS, PSD, …) run programs or
# read formats that no data set of photographs has.
EXTENSIONS = {
    "JPEG": "jpg",
    "PNG": "png",
    "WEBP": "webp",
    "BMP": "bmp",
    "GIF": "gif",
    "TIFF": "tif",
}
RAW = "npy"
"""Extension of a raw crop, an .npy file of uint8 (3, S, S), which WebDataset's own decoder reads."""

# Extensions of image members, also in shards of other programs.
MEMBERS = (*EXTENSIONS.values(), "jpeg", "tiff", RAW)

ORIGINAL, CROP_JPEG, CROP_RAW = STORES = ("original", "crop-jpeg", "crop-raw")
JPEG_QUALITY = 95


# --- reading --------------------------------------------------------------------------------------------------------


def pixels(data: Data, extension: str, size: int, *, border: int = 0) -> Tensor:
    """The model's input from an image member of a shard.

    Args:
        extension: of the member, in MEMBERS.
        size: side of the crop.
        border: pixels to cut off each side before anything else (ObjectNet: 2).

    Returns:
        uint8 (3, size, size); of a raw crop it may be a view of ``data``.

    Raises:
        UserError: as ``decode``, or a raw crop of another size.
    """
    if extension == RAW:
        return _raw(data, size)
    decoded = decode(data)
    if border:
        decoded = decoded[:, border:-border, border:-border]
    return crop(decoded, size)


def decode(data: Data) -> Tensor:
    """Decode an image file to RGB (see ``_rgb``).

    Returns:
        uint8 (3, H, W), of any strides.

    Raises:
        UserError: not an image, a truncated one, one that claims an absurd size, or one whose format does not define
            black and white. The message is only the reason; the caller adds the place.
    """
    import torch  # here and below: conversion without a crop does not need it in its many processes

    data = bytes(data)
    decoded = _decode_jpeg(data)
    if decoded is None:
        with opened(data) as image:
            decoded = _rgb(image)
    return torch.from_numpy(decoded).permute(2, 0, 1)


def crop(image: Tensor, size: int) -> Tensor:
    """The recipe's transform: short side resized to ``size`` (bicubic, antialiased), centre crop.

    Args:
        image: uint8 (3, H, W).

    Returns:
        uint8 (3, size, size), not contiguous.

    Raises:
        UserError: one side is more than ``image_headers.MAX_ASPECT`` times the other.
    """
    from torch.nn.functional import interpolate

    scaled, (top, left) = _scaled_and_corner(image.shape[1], image.shape[2], size)
    if scaled != image.shape[1:]:
        image = interpolate(image[None], size=scaled, mode="bicubic", antialias=True)[0]
    return image[:, top : top + size, left : left + size]


def crop_mask(mask: Tensor, size: int) -> Tensor:
    """Resize and crop a mask as ``crop`` does its image. Each pixel takes the value of the nearest one.

    Args:
        mask: (H, W).

    Returns:
        (size, size) of the same dtype.

    Raises:
        UserError: as ``crop``.
    """
    import torch

    scaled, corner = _scaled_and_corner(mask.shape[0], mask.shape[1], size)
    # The centre of pixel i of n lies at (i + ½) · side / n of the source. Integers are exact everywhere.
    rows, columns = (
        (2 * torch.arange(first, first + size) + 1) * side // (2 * n)
        for first, side, n in zip(corner, mask.shape, scaled, strict=True)
    )
    return mask[rows[:, None], columns]


def _scaled_and_corner(height: int, width: int, size: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Height and width after the resize; top and left of the crop."""
    image_headers.check_aspect(width, height)
    short = min(height, width)
    # torchvision's arithmetic: it truncates the long side, and rounds offsets to even.
    height, width = (size if side == short else int(size * side / short) for side in (height, width))
    return (height, width), (round((height - size) / 2.0), round((width - size) / 2.0))


def _raw(data: Data, size: int) -> Tensor:
    import torch

    header = raw_header(size)
    if data[: len(header)] == header and len(data) == len(header) + 3 * size * size:
        array = np.frombuffer(_writable(data), np.uint8, offset=len(header)).reshape(3, size, size)
    else:
        try:
            array = np.load(io.BytesIO(data), allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise UserError(f"not an array ({error})") from None
        if array.dtype != np.uint8 or array.shape != (3, size, size):
            raise UserError(f"a raw crop of {array.dtype} {array.shape} where uint8 {(3, size, size)} is needed")
    return torch.from_numpy(array)


def _writable(data: Data) -> Data:
    """The same bytes in writable memory: torch warns about read-only memory."""
    return bytearray(data) if memoryview(data).readonly else data


@functools.cache
def raw_header(size: int) -> bytes:
    """The .npy header of a raw crop."""
    buffer = io.BytesIO()
    shape = {"descr": "|u1", "fortran_order": False, "shape": (3, size, size)}
    np.lib.format.write_array_header_1_0(buffer, shape)
    return buffer.getvalue()


def _decode_jpeg(data: bytes) -> NDArray[np.uint8] | None:
    """(H, W, 3) of a JPEG of a common kind without any fault; else None."""
    jpeg = image_headers.read_jpeg(data)
    if jpeg is None or not jpeg.common or jpeg.components not in (1, 3):
        return None
    image_headers.check_size(jpeg.width, jpeg.height, len(data))
    try:
        return simplejpeg.decode_jpeg(data, "RGB")
    except ValueError:
        return None  # Pillow tolerates more faults, and has better messages


@contextmanager
def opened(
    data: Data, formats: tuple[str, ...] = tuple(EXTENSIONS), *, is_photograph: bool = True
) -> Iterator[Image.Image]:
    """Open an image file by Pillow: read its header and check its size, without decoding.

    Args:
        is_photograph: False for a mask, which may be large and of few bytes.

    Raises:
        UserError: as ``decode``; also for errors in the ``with`` block.
    """
    data = bytes(data)
    try:
        safe = image_headers.safe_to_open(data)
        with Image.open(io.BytesIO(safe), formats=formats) as image:
            image_headers.check_size(image.width, image.height, len(data) if is_photograph else None)
            yield image
    except (UserError, MemoryError):
        raise
    except Image.UnidentifiedImageError:
        kind = _kind(data)
        what = f"does not decode: damaged, or a kind of {kind} that Pillow does not read" if kind else "not an image"
        raise UserError(f"{what} ({len(data)} bytes)") from None
    except Image.DecompressionBombError as error:
        raise UserError(str(error)) from None
    except Exception as error:  # of any type: Pillow raises many for damaged files
        raise UserError(f"does not decode ({error})") from None


_MAGIC = {
    b"\xff\xd8": "JPEG",
    b"\x89PNG": "PNG",
    b"RIFF": "WebP",
    b"BM": "BMP",
    b"GIF8": "GIF",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
}


def _kind(data: bytes) -> str:
    """The format of an image by its first bytes; "" if they are not those of an image."""
    return next((kind for magic, kind in _MAGIC.items() if data.startswith(magic)), "")


def extension_of(data: bytes) -> str:
    """The extension of an image by its first bytes; "" if they are not those of an image."""
    return EXTENSIONS.get(_kind(data).upper(), "")


def _rgb(image: Image.Image) -> NDArray[np.uint8]:
    """(H, W, 3): the image in RGB, 8 bits per value.

    Grey is repeated, palettes are looked up, CMYK is converted without a profile (JPEG's is inverted, as Adobe writes
    it), and alpha is dropped. Of values of more than 8 bits the highest 8 are kept, as Pillow does for 16-bit colour.
    PNG's sBIT and TIFF's MaxSampleValue are ignored: by their specifications, the former's values are scaled already,
    and the latter does not affect how an image looks.

    Raises:
        UserError: the format does not define which value is black or white.
    """
    bits, inverted = _depth(image)
    image.load()
    if image.mode.startswith("I"):
        grey = (np.asarray(image) >> (bits - 8)).astype(np.uint8)
        return np.repeat((255 - grey if inverted else grey)[:, :, None], 3, axis=2)
    image.info.pop("transparency", None)  # or Pillow would convert the transparent colour
    if image.mode == "La":
        image = image.convert("LA")  # Pillow does not convert La to RGB
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


_BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER, _ORIENTATION, _PLANAR, _COLORMAP = 258, 259, 262, 266, 274, 284, 320
_EXTRA_SAMPLES, _SAMPLE_FORMAT, _SUBSAMPLING = 338, 339, 530
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _COLOURS, _CMYK, _YCBCR, _LAB = 0, 1, 2, 5, 6, 8


def _depth(image: Image.Image) -> tuple[int, bool]:
    """Bits per value, and whether grey values of more than 8 bits have to be inverted because 0 is white.

    Raises:
        UserError: Pillow would read wrong values, or the file does not define their meaning.
    """
    if image.format == "PNG":
        # Pillow reads 16 bits of grey as I;16 or, in older releases, as I.
        return (16 if image.mode.startswith("I") or _png_depth(image) == 16 else 8), False
    if image.format != "TIFF":
        return 8, False
    tags: dict[int, Any] = image.tag_v2  # type: ignore[attr-defined]
    bits, formats = max(tags.get(_BITS, (1,))), set(tags.get(_SAMPLE_FORMAT, (1,)))
    photometric, raw = tags.get(_PHOTOMETRIC), tags.get(_COMPRESSION, 1) == 1
    if formats != {1} or bits > 16:
        kind = {2: "signed ", 3: "floating-point "}.get(max(formats), "")
        raise UserError(f"a TIFF of {bits}-bit {kind}samples, which does not define which value is black or white")
    if photometric is None:
        raise UserError("a TIFF without PhotometricInterpretation, which does not define whether 0 is black or white")
    if photometric == _YCBCR and raw and tuple(tags.get(_SUBSAMPLING, (2, 2))) != (1, 1):
        raise UserError("an uncompressed TIFF of subsampled YCbCr, which Pillow does not read correctly")
    if tags.get(_PLANAR, 1) == 2:
        plain = bits == 8 and tags.get(_FILL_ORDER, 1) == 1 and photometric in (_BLACK_IS_ZERO, _COLOURS, _CMYK)
        if (raw and not plain) or photometric == _LAB or 1 in tags.get(_EXTRA_SAMPLES, ()):
            raise UserError("a TIFF of separate planes of a kind that Pillow does not read correctly")
    if image.mode in ("P", "PA") and 0 < max(tags.get(_COLORMAP, (0,))) < 256:
        raise UserError("a TIFF whose palette has 8 bits instead of 16, which Pillow reads as black")
    return bits, photometric == _WHITE_IS_ZERO


def _png_depth(image: Image.Image) -> int:
    """Bits per value. Pillow does not keep them; its raw mode shows them until the image is loaded."""
    return 16 if any("16" in str(tile[3]) for tile in image.tile) else 8  # type: ignore[attr-defined]


# --- conversion -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageInfo:
    """Facts of an image file."""

    extension: str
    """In a shard, by its content."""
    width: int
    height: int
    oddities: tuple[str, ...]
    """Unusual properties, in words."""


def inspect(data: Data) -> ImageInfo:
    """Facts of an image file from its header, and a check that it is complete.

    A common JPEG with an end marker counts as complete: libjpeg reports no errors between header and end, so decoding
    it would show no more. (``verify_shards.py --full`` decodes everything.) Other files are decoded.

    Raises:
        UserError: as ``decode``.
    """
    data = bytes(data)
    jpeg = image_headers.read_jpeg(data)
    whole = jpeg is not None and jpeg.common and data[-64:].rstrip(b"\0\r\n").endswith(b"\xff\xd9")
    if jpeg and whole and (facts := _plain_jpeg(data, jpeg)):
        return facts
    with opened(data) as image:
        width, height = image.size
        bits, _ = _depth(image)
        # Pillow applies the orientation of a TIFF when it loads the image, and then removes it.
        turned = image.tag_v2.get(_ORIENTATION, 1) if image.format == "TIFF" else 1  # type: ignore[attr-defined]
        if not whole:
            _rgb(image)
        oddities = _oddities(image, bits)
        if turned != 1:
            oddities += (f"TIFF orientation {turned}",)
        elif image.format != "TIFF":
            exif = image.info.get("exif", b"")
            oddities += _exif_oddity(jpeg.orientation if jpeg else image_headers.exif_orientation(exif))
        return ImageInfo(EXTENSIONS[image.format or ""], width, height, oddities)


def _plain_jpeg(data: bytes, jpeg: image_headers.Jpeg) -> ImageInfo | None:
    """The facts of a JPEG in colour or grey, in a tenth of Pillow's time; None for other JPEGs."""
    if jpeg.components not in (1, 3):
        return None
    try:
        simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    image_headers.check_size(jpeg.width, jpeg.height, len(data))
    oddities = ("greyscale",) if jpeg.components == 1 else ()
    return ImageInfo(EXTENSIONS["JPEG"], jpeg.width, jpeg.height, oddities + _exif_oddity(jpeg.orientation))


def _oddities(image: Image.Image, bits: int) -> tuple[str, ...]:
    modes = {"L": "greyscale", "1": "greyscale", "P": "palette", "PA": "palette"}
    modes |= dict.fromkeys(("LA", "La", "RGBA", "RGBa"), "alpha")
    found = [f"{bits}-bit"] if bits > 8 else []
    if image.mode != "RGB" and not image.mode.startswith("I"):
        found.append(modes.get(image.mode, image.mode))
    if _has_several_pictures(image):
        found.append("several pictures")
    return tuple(found)


def _has_several_pictures(image: Image.Image) -> bool:
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # Pillow now reads the second picture of a GIF, which may be damaged
        return True


def _exif_oddity(orientation: int) -> tuple[str, ...]:
    return () if orientation == 1 else (f"EXIF orientation {orientation}",)


def encode(image: Tensor, store: str) -> tuple[str, bytes]:
    """Extension and bytes of a crop in a crop store. uint8 (3, S, S)."""
    if store == CROP_RAW:
        return RAW, raw_header(image.shape[-1]) + image.numpy().tobytes()
    pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
    return EXTENSIONS["JPEG"], simplejpeg.encode_jpeg(pixels, JPEG_QUALITY, "RGB", "420")
