"""From bytes to the pixels that the model sees: one path for training, evaluation and conversion.

The recipe has no augmentation: bicubic resize of the short side, centre crop (appendix A.1). JPEGs are decoded by
libjpeg-turbo and resized by torch's antialiased uint8 kernel, in less than half the time that Pillow takes, without
Python's lock; all else, and JPEGs that have any fault, are decoded by Pillow. Decoded pixels are Pillow's to the bit;
resized ones differ from Pillow's by 2 levels at most, in less than one value of a hundred (tests/test_images.py).
As in CLIP's own evaluation, an EXIF orientation is NOT applied: its published accuracies are measured without it.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from cfmask.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

Data = bytes | bytearray | memoryview

# What an image file is called in a shard, by its content. Others are not opened at all: Pillow has readers for
# formats (EPS, PSD, …) that run programs or that no data set of photographs holds.
EXTENSIONS = {
    "JPEG": "jpg",
    "PNG": "png",
    "WEBP": "webp",
    "BMP": "bmp",
    "GIF": "gif",
    "TIFF": "tif",
}
RAW = "npy"
"""A crop's pixels as a .npy file, uint8 (3, S, S): WebDataset's own decoder knows it."""

# By which a member of a shard is known to be its sample's image; shards made by others have these too.
MEMBERS = (*EXTENSIONS.values(), "jpeg", "tiff", RAW)

MAX_ASPECT = 100
"""Long side by short side, at most. A line of pixels would be resized to an image of gigabytes."""

ORIGINAL, CROP_JPEG, CROP_RAW = STORES = ("original", "crop-jpeg", "crop-raw")
JPEG_QUALITY = 95


# --- reading --------------------------------------------------------------------------------------------------------


def pixels(data: Data, extension: str, size: int, *, border: int = 0) -> Tensor:
    """What the model sees of a shard's image member.

    Args:
        extension: of the member, in MEMBERS.
        size: side of the crop.
        border: pixels that are cut off each side before anything else (ObjectNet: 2).

    Returns:
        uint8 (3, size, size); of a raw crop it may be a view of ``data``.

    Raises:
        UserError: as ``decode``; or a raw crop of another size.
    """
    if extension == RAW:
        return _raw(data, size)
    decoded = decode(data)
    if border:
        decoded = decoded[:, border:-border, border:-border]
    return crop(decoded, size)


def decode(data: Data) -> Tensor:
    """Decode an image file completely, in RGB (grey, palette, CMYK and 16-bit are converted by Pillow's rules).

    Returns:
        uint8 (3, H, W), of any strides.

    Raises:
        UserError: the bytes are no image, are truncated, or decode to an absurd size. The message is the reason alone;
            the caller knows where the bytes came from.
    """
    import torch  # here and below, because conversion without a crop has no use for it, in many processes

    decoded = _decode_jpeg(data)
    if decoded is None:
        decoded = np.array(_decode_with_pillow(data))
    return torch.from_numpy(decoded).permute(2, 0, 1)


def crop(image: Tensor, size: int) -> Tensor:
    """The recipe's transform: short side resized to ``size`` (bicubic, antialiased), centre crop.

    Args:
        image: uint8 (3, H, W).

    Returns:
        uint8 (3, size, size), not contiguous.

    Raises:
        UserError: the sides differ by more than MAX_ASPECT.
    """
    from torch.nn.functional import interpolate

    scaled, (top, left) = _scaled_and_corner(image.shape[1], image.shape[2], size)
    if scaled != image.shape[1:]:
        image = interpolate(image[None], size=scaled, mode="bicubic", antialias=True)[0]
    return image[:, top : top + size, left : left + size]


def crop_mask(mask: Tensor, size: int) -> Tensor:
    """What ``crop`` does to an image, to a mask of it: each pixel takes the value of the nearest one.

    Args:
        mask: (H, W).

    Returns:
        (size, size) of the same dtype.

    Raises:
        UserError: as ``crop``.
    """
    import torch

    scaled, corner = _scaled_and_corner(mask.shape[0], mask.shape[1], size)
    # Pixel i of n, its centre at i + ½, lies at (i + ½) · side / n of the source. In integers: the same everywhere.
    rows, columns = (
        (2 * torch.arange(first, first + size) + 1) * side // (2 * n)
        for first, side, n in zip(corner, mask.shape, scaled, strict=True)
    )
    return mask[rows[:, None], columns]


def _scaled_and_corner(height: int, width: int, size: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Height and width after the resize; top and left of the crop in it."""
    _check_aspect(width, height)
    short = min(height, width)
    # torchvision's arithmetic, truncation of the long side and banker's rounding of the offsets included.
    height, width = (size if side == short else int(size * side / short) for side in (height, width))
    return (height, width), (round((height - size) / 2.0), round((width - size) / 2.0))


def _check_aspect(width: int, height: int) -> None:
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise UserError(f"{width} × {height} pixels: one side is more than {MAX_ASPECT} times the other")


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
    """The same bytes where torch may write, because it warns of memory where it may not."""
    return bytearray(data) if memoryview(data).readonly else data


@functools.cache
def raw_header(size: int) -> bytes:
    """What stands before the pixels of a raw crop."""
    buffer = io.BytesIO()
    shape = {"descr": "|u1", "fortran_order": False, "shape": (3, size, size)}
    np.lib.format.write_array_header_1_0(buffer, shape)
    return buffer.getvalue()


def _decode_jpeg(data: Data) -> NDArray[np.uint8] | None:
    """(H, W, 3), if the data is a JPEG of a common kind, without any fault."""
    if data[:2] != b"\xff\xd8":
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if colours not in ("YCbCr", "Gray", "RGB") or height * width > (Image.MAX_IMAGE_PIXELS or 0):
            return None
        return simplejpeg.decode_jpeg(data, "RGB")
    except ValueError:
        return None  # Pillow knows more kinds, bears more faults, and has better words for the rest


def _decode_with_pillow(data: Data) -> Image.Image:
    with _pillow_errors(data), _open(data) as image:
        return image.convert("RGB")


# --- conversion -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Facts:
    """What an image file is. extension: in a shard, by its content. oddities: what a reader may stumble over."""

    extension: str
    width: int
    height: int
    oddities: tuple[str, ...]


def inspect(data: Data) -> Facts:
    """What an image file is, from its header, and that it is whole.

    A JPEG that ends with its end mark is taken as whole: libjpeg reports nothing that goes wrong between header and end
    as an error, so decoding it would tell no more (``verify_shards.py --full`` decodes everything). What has no
    such mark is decoded.

    Raises:
        UserError: as ``decode``.
    """
    if facts := _plain_jpeg(data):
        return facts
    with _pillow_errors(data), _open(data) as image:
        # MPO is what Pillow calls a JPEG that is followed by further pictures (cameras write them).
        kind = "JPEG" if image.format == "MPO" else image.format or ""
        width, height = image.size
        _check_aspect(width, height)
        oddities = _oddities(image)
        if kind != "JPEG" or not _has_end_mark(data):
            image.load()
    return Facts(EXTENSIONS[kind], width, height, oddities)


def _plain_jpeg(data: Data) -> Facts | None:
    """What Pillow would say, in a tenth of its time, of a whole JPEG in colour without EXIF data: of nearly all."""
    data = data if isinstance(data, bytes) else bytes(data)
    if data[:2] != b"\xff\xd8" or data.find(b"Exif\0\0", 0, 65536) >= 0 or not _has_end_mark(data):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    if colours != "YCbCr" or height * width > (Image.MAX_IMAGE_PIXELS or 0):
        return None
    _check_aspect(width, height)
    return Facts(EXTENSIONS["JPEG"], width, height, ())


def _has_end_mark(data: Data) -> bool:
    return bytes(data[-64:]).rstrip(b"\0\r\n").endswith(b"\xff\xd9")


def _oddities(image: Image.Image) -> tuple[str, ...]:
    modes = {"L": "greyscale", "1": "greyscale", "CMYK": "CMYK", "P": "palette", "LA": "alpha", "RGBA": "alpha"}
    found = []
    if image.mode.startswith(("I", "F")):
        found.append("16-bit")
    elif image.mode != "RGB":
        found.append(modes.get(image.mode, image.mode))
    orientation = image.getexif().get(0x0112)
    if orientation in range(2, 9):
        found.append(f"EXIF orientation {orientation}")
    return tuple(found)


def encode(image: Tensor, store: str) -> tuple[str, bytes]:
    """Extension and bytes of a crop in a crop store. uint8 (3, S, S)."""
    if store == CROP_RAW:
        return RAW, raw_header(image.shape[-1]) + image.numpy().tobytes()
    pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
    return EXTENSIONS["JPEG"], simplejpeg.encode_jpeg(pixels, JPEG_QUALITY, "RGB", "420")


def _open(data: Data) -> Image.Image:
    return Image.open(io.BytesIO(data), formats=tuple(EXTENSIONS))


@contextmanager
def _pillow_errors(data: Data) -> Iterator[None]:
    """Pillow's many ways to say that a file is broken, as one."""
    try:
        yield
    except UserError:
        raise
    except Image.UnidentifiedImageError:
        raise UserError(f"not an image ({len(data)} bytes)") from None
    except Image.DecompressionBombError as error:
        raise UserError(str(error)) from None
    except (OSError, SyntaxError, ValueError, EOFError, IndexError) as error:
        raise UserError(f"does not decode ({error})") from None
