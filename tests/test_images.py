"""One path from bytes to pixels, equal to torchvision's loader followed by open_clip's transform."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cfmask.data import images
from cfmask.errors import UserError

SAMPLE = Path(__file__).resolve().parents[2] / "shared" / "data" / "imagenet-sample.tar"


def picture(width, height, mode="RGB", seed=0):
    """Smooth colours with some noise, so that resampling has something to get wrong."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    channels = [127 + 100 * np.sin(x / (7 + c) + y / (11 - c)) + rng.normal(0, 20, (height, width)) for c in range(3)]
    return Image.fromarray(np.clip(np.stack(channels, -1), 0, 255).astype(np.uint8)).convert(mode)


def encoded(image, kind="JPEG", **settings):
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def reference(data, size):
    """torchvision's ImageFolder loader, open_clip's evaluation transform, and back to uint8."""
    from open_clip.transform import image_transform

    with Image.open(io.BytesIO(data)) as image:
        rgb = image.convert("RGB")
    transform = image_transform(size, is_train=False, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    return (transform(rgb) * 255).round().to(torch.uint8)


@pytest.mark.parametrize("shape", [(500, 375), (375, 500), (224, 224), (223, 301), (64, 64), (1000, 31), (333, 225)])
def test_pixels_equal_those_of_open_clip(shape):
    data = encoded(picture(*shape))
    mine = images.crop(images.decode(data), 224)
    assert mine.dtype == torch.uint8 and mine.shape == (3, 224, 224) and mine.is_contiguous()
    assert torch.equal(mine, reference(data, 224))


@pytest.mark.skipif(not SAMPLE.exists(), reason="imagenet-sample.tar is not there")
def test_pixels_of_photographs_equal_those_of_open_clip():
    import tarfile

    with tarfile.open(SAMPLE) as tar:
        members = [member for member in tar if member.isfile()][::25]
        for member in members:
            file = tar.extractfile(member)
            assert file is not None
            data = file.read()
            assert torch.equal(images.crop(images.decode(data), 224), reference(data, 224)), member.name


@pytest.mark.parametrize(
    "data",
    [
        encoded(picture(60, 50, "L")),
        encoded(picture(60, 50, "CMYK")),
        encoded(picture(60, 50, "P"), "PNG"),
        encoded(picture(60, 50, "RGBA"), "PNG"),
        encoded(Image.fromarray(np.arange(3000, dtype=np.uint16).reshape(50, 60) * 20), "PNG"),
    ],
    ids=["grey", "CMYK", "palette", "alpha", "16 bit"],
)
def test_other_colour_modes_become_rgb_as_in_torchvision_s_loader(data):
    image = images.decode(data)
    assert image.mode == "RGB"
    assert torch.equal(images.crop(image, 32), reference(data, 32))


def test_exif_orientation_is_not_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees"
    assert images.decode(encoded(picture(60, 40), exif=exif)).size == (60, 40)


def test_the_content_names_the_extension():
    image = picture(20, 20)
    assert [images.decode_as(encoded(image, kind))[1] for kind in ("JPEG", "PNG", "WEBP", "BMP")] == [
        "jpg",
        "png",
        "webp",
        "bmp",
    ]


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_truncation_is_an_error_at_any_length(kind):
    data = encoded(picture(60, 50), kind)
    for length in (0, 1, 20, len(data) // 3, len(data) // 2, len(data) - 40):
        with pytest.raises(UserError, match="not an image|does not decode"):
            images.decode(data[:length])


def test_an_absurd_size_is_an_error(monkeypatch):
    data = encoded(picture(60, 50))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UserError, match="decompression bomb"):
        images.decode(data)
