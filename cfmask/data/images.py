"""From bytes to the pixels that the model sees: one path for training, evaluation and conversion.

The recipe has no augmentation: bicubic resize of the short side, centre crop (appendix A.1). JPEGs are decoded by
libjpeg-turbo and resized by torch's antialiased uint8 kernel, in less than half the time that Pillow takes, without
Python's lock; all else, and JPEGs that have any fault, are decoded by Pillow. Decoded pixels are Pillow's, bitwise;
resized ones differ from Pillow's by 2 levels at most, in less than one value of a hundred (tests/test_images.py).
Samples of more than 8 bits are scaled by the depth that the file states (Pillow would clip those of grey images).
Alpha, ICC profiles and gamma are dropped, and of several pictures in a file the first is read, as torchvision does.
As in CLIP's own evaluation, an EXIF orientation is NOT applied: its published accuracies are measured without it.
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
    """Decode an image file completely, in RGB (``_rgb`` says how other kinds become RGB).

    Returns:
        uint8 (3, H, W), of any strides.

    Raises:
        UserError: the bytes are no image, are truncated, claim an absurd size, or hold samples whose black and white
            the format does not define. The message is the reason alone; the caller knows where the bytes came from.
    """
    import torch  # here and below, because conversion without a crop has no use for it, in many processes

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
    image_headers.check_aspect(width, height)
    short = min(height, width)
    # torchvision's arithmetic, truncation of the long side and banker's rounding of the offsets included.
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
    """The same bytes where torch may write, because it warns of memory where it may not."""
    return bytearray(data) if memoryview(data).readonly else data


@functools.cache
def raw_header(size: int) -> bytes:
    """What stands before the pixels of a raw crop."""
    buffer = io.BytesIO()
    shape = {"descr": "|u1", "fortran_order": False, "shape": (3, size, size)}
    np.lib.format.write_array_header_1_0(buffer, shape)
    return buffer.getvalue()


def _decode_jpeg(data: bytes) -> NDArray[np.uint8] | None:
    """(H, W, 3), if the data is a JPEG of a common kind, without any fault."""
    jpeg = image_headers.read_jpeg(data)
    if jpeg is None or not jpeg.common or jpeg.components not in (1, 3):
        return None
    image_headers.check_size(jpeg.width, jpeg.height, len(data))
    try:
        return simplejpeg.decode_jpeg(data, "RGB")
    except ValueError:
        return None  # Pillow bears more faults, and has better words for the rest


@contextmanager
def opened(
    data: Data, formats: tuple[str, ...] = tuple(EXTENSIONS), *, is_photograph: bool = True
) -> Iterator[Image.Image]:
    """An image file as Pillow opens it: its header is read and its size is checked, nothing is decoded.

    Args:
        is_photograph: as opposed to a mask, which may be large and of few bytes.

    Raises:
        UserError: as ``decode``; also of what goes wrong while the image is used.
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
    except Exception as error:  # damaged files make Pillow raise nearly every kind
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
    """By its first bytes; "" if they are no image's."""
    return next((kind for magic, kind in _MAGIC.items() if data.startswith(magic)), "")


def extension_of(data: bytes) -> str:
    """What an image is to be called by its first bytes; "" if they are no image's."""
    return EXTENSIONS.get(_kind(data).upper(), "")


def _rgb(image: Image.Image) -> NDArray[np.uint8]:
    """(H, W, 3): the picture in RGB, 8 bits a sample.

    Grey is repeated; palettes are looked up; CMYK is converted without a profile (JPEG's is inverted, as Adobe writes
    it); alpha is dropped. Of samples of more than 8 bits the highest 8 are kept, which is what Pillow does to 16-bit
    colour and TIFF's and PNG's readers do by default: white stays 255, black 0. PNG's sBIT and TIFF's MaxSampleValue
    change nothing: by their specifications, the former's samples are scaled already and the latter does not matter to
    how an image looks.

    Raises:
        UserError: the format does not say which sample is black or white.
    """
    bits, inverted = _depth(image)
    image.load()
    if image.mode.startswith("I"):
        grey = (np.asarray(image) >> (bits - 8)).astype(np.uint8)
        return np.repeat((255 - grey if inverted else grey)[:, :, None], 3, axis=2)
    image.info.pop("transparency", None)  # alpha is dropped; Pillow would look for a colour that can stand for it
    if image.mode == "La":
        image = image.convert("LA")  # Pillow has no direct way
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


_BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER, _ORIENTATION, _PLANAR, _COLORMAP = 258, 259, 262, 266, 274, 284, 320
_EXTRA_SAMPLES, _SAMPLE_FORMAT, _SUBSAMPLING = 338, 339, 530
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _COLOURS, _CMYK, _YCBCR, _LAB = 0, 1, 2, 5, 6, 8


def _depth(image: Image.Image) -> tuple[int, bool]:
    """Bits a sample, and whether grey samples of more than 8 bits are to be inverted because 0 is white.

    Raises:
        UserError: Pillow would read other values than the file means, or nothing says what the values mean.
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
        raise UserError(f"a TIFF of {bits}-bit {kind}samples: nothing says which of them is black and which is white")
    if photometric is None:
        raise UserError("a TIFF without PhotometricInterpretation: nothing says whether 0 is black or white")
    if photometric == _YCBCR and raw and tuple(tags.get(_SUBSAMPLING, (2, 2))) != (1, 1):
        raise UserError("an uncompressed TIFF of subsampled YCbCr, which Pillow does not read right")
    if tags.get(_PLANAR, 1) == 2:
        plain = bits == 8 and tags.get(_FILL_ORDER, 1) == 1 and photometric in (_BLACK_IS_ZERO, _COLOURS, _CMYK)
        if (raw and not plain) or photometric == _LAB or 1 in tags.get(_EXTRA_SAMPLES, ()):
            raise UserError("a TIFF of separate planes of a kind that Pillow does not read right")
    if image.mode in ("P", "PA") and 0 < max(tags.get(_COLORMAP, (0,))) < 256:
        raise UserError("a TIFF whose palette is of 8 bits, where the format has 16: Pillow reads it as black")
    return bits, photometric == _WHITE_IS_ZERO


def _png_depth(image: Image.Image) -> int:
    """Bits a sample. Pillow does not keep them; its raw mode tells until the image is loaded."""
    return 16 if any("16" in str(tile[3]) for tile in image.tile) else 8  # type: ignore[attr-defined]


# --- conversion -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageInfo:
    """What an image file is. extension: in a shard, by its content. oddities: what a reader may stumble over."""

    extension: str
    width: int
    height: int
    oddities: tuple[str, ...]


def inspect(data: Data) -> ImageInfo:
    """What an image file is, from its header, and that it is whole.

    A common JPEG that ends with its end mark is taken as whole: libjpeg reports nothing that goes wrong between header
    and end as an error, so decoding it would tell no more (``verify_shards.py --full`` decodes everything). All else
    is decoded.

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
        # Of TIFF, the orientation is a field that Pillow applies and then forgets.
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
    """What Pillow would say, in a tenth of its time, of a JPEG in colour or grey: of nearly all."""
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
    except Exception:  # of a GIF, Pillow looks for the second picture now, which may be damaged
        return True


def _exif_oddity(orientation: int) -> tuple[str, ...]:
    return () if orientation == 1 else (f"EXIF orientation {orientation}",)


def encode(image: Tensor, store: str) -> tuple[str, bytes]:
    """Extension and bytes of a crop in a crop store. uint8 (3, S, S)."""
    if store == CROP_RAW:
        return RAW, raw_header(image.shape[-1]) + image.numpy().tobytes()
    pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
    return EXTENSIONS["JPEG"], simplejpeg.encode_jpeg(pixels, JPEG_QUALITY, "RGB", "420")
