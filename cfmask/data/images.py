"""From bytes to the pixels that the model sees: one path for training, evaluation and conversion.

The recipe has no augmentation: bicubic resize of the short side, centre crop (appendix A.1). Pixels equal those of
torchvision's ImageFolder followed by open_clip's evaluation transform, up to ToTensor. As there, an EXIF orientation is
NOT applied: CLIP's published accuracies are measured without it.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from cfmask.errors import UserError

if TYPE_CHECKING:
    import torch

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


def decode(data: bytes) -> Image.Image:
    """Decode an image file completely, in RGB (grey, palette, CMYK and 16-bit are converted by Pillow's rules).

    Raises:
        UserError: the bytes are no image, are truncated, or decode to an absurd size. The message is the reason alone;
            the caller knows where the bytes came from.
    """
    return decode_as(data)[0]


def decode_as(data: bytes) -> tuple[Image.Image, str]:
    """``decode``, and the file extension that the content asks for (a PNG named .JPEG gives ``png``)."""
    try:
        with Image.open(io.BytesIO(data), formats=tuple(EXTENSIONS)) as image:
            # MPO is what Pillow calls a JPEG that is followed by further pictures (cameras write them).
            kind = EXTENSIONS["JPEG" if image.format == "MPO" else image.format or ""]
            return image.convert("RGB"), kind
    except Image.UnidentifiedImageError:
        raise UserError(f"not an image ({len(data)} bytes)") from None
    except Image.DecompressionBombError as error:
        raise UserError(str(error)) from None
    except (OSError, SyntaxError, ValueError, EOFError, IndexError) as error:
        # Pillow's decoders report broken files with any of these.
        raise UserError(f"does not decode ({error})") from None


def crop(image: Image.Image, size: int) -> torch.Tensor:
    """The recipe's transform: short side resized to ``size`` (bicubic), centre crop.

    Returns:
        uint8 (3, size, size).
    """
    import torch  # here, because conversion decodes in many processes that have no other use for it

    width, height = image.size
    short = min(width, height)
    # torchvision's arithmetic, truncation of the long side and banker's rounding of the offsets included.
    width, height = (size if side == short else int(size * side / short) for side in (width, height))
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2.0), round((height - size) / 2.0)
    pixels = np.array(image.crop((left, top, left + size, top + size)))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
