"""Pixels are those of torchvision's loader followed by open_clip's transform, up to rounding."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cfmask.data import image_headers, images
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


def pillow(data):
    """torchvision's ImageFolder loader."""
    with Image.open(io.BytesIO(data)) as image:
        return image.convert("RGB")


def reference(data, size):
    """torchvision's ImageFolder loader, open_clip's evaluation transform, and back to uint8."""
    from open_clip.transform import image_transform

    rgb = pillow(data)
    transform = image_transform(size, is_train=False, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    return (transform(rgb) * 255).round().to(torch.uint8)


def assert_close(data, size=224):
    """Decoded to the same bits; resized to within 2 levels, and in 99 of 100 values to the same."""
    whole = images.decode(data)
    assert torch.equal(whole, torch.from_numpy(np.array(pillow(data))).permute(2, 0, 1))
    mine, theirs = images.pixels(data, "jpg", size).int(), reference(data, size).int()
    assert mine.shape == theirs.shape == (3, size, size)
    assert (mine - theirs).abs().max() <= 2 and (mine != theirs).float().mean() < 0.01


@pytest.mark.parametrize("shape", [(500, 375), (375, 500), (224, 224), (223, 301), (64, 64), (1000, 231), (333, 225)])
def test_pixels_are_those_of_open_clip_up_to_rounding(shape):
    assert_close(encoded(picture(*shape)))


@pytest.mark.skipif(not SAMPLE.exists(), reason="imagenet-sample.tar is not there")
def test_pixels_of_photographs_are_those_of_open_clip_up_to_rounding():
    import tarfile

    with tarfile.open(SAMPLE) as tar:
        members = [member for member in tar if member.isfile()][::25]
        for member in members:
            file = tar.extractfile(member)
            assert file is not None
            assert_close(file.read())


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_bytes_may_lie_in_any_buffer(kind):
    data = encoded(picture(60, 50), kind)
    expected = images.decode(data)
    for buffer in (bytearray(data), memoryview(data), memoryview(bytearray(data))):
        assert torch.equal(images.decode(buffer), expected)


OTHERS = {
    "greyscale": encoded(picture(60, 50, "L")),
    "CMYK": encoded(picture(60, 50, "CMYK")),
    "palette": encoded(picture(60, 50, "P"), "PNG"),
    "alpha": encoded(picture(60, 50, "RGBA"), "PNG"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_colour_modes_become_rgb_as_in_torchvision_s_loader(name):
    assert_close(OTHERS[name], 32)
    assert images.inspect(OTHERS[name]).oddities == (name,)


def test_exif_orientation_is_not_applied_but_reported():
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees"
    data = encoded(picture(60, 40), exif=exif)
    assert images.decode(data).shape == (3, 40, 60)
    assert images.inspect(data) == images.ImageInfo("jpg", 60, 40, ("EXIF orientation 6",))


def test_the_extension_follows_from_the_content():
    image = picture(20, 20)
    assert [images.inspect(encoded(image, kind)).extension for kind in ("JPEG", "PNG", "WEBP", "BMP")] == [
        "jpg",
        "png",
        "webp",
        "bmp",
    ]


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_truncation_is_an_error_at_any_length(kind):
    data = encoded(picture(60, 50), kind)
    for length in (0, 1, 20, len(data) // 3, len(data) // 2, len(data) - 40):
        for function in (images.decode, images.inspect):
            with pytest.raises(UserError, match="not an image|does not decode"):
                function(data[:length])


def test_an_absurd_size_is_an_error_before_memory_is_allocated(monkeypatch):
    data = encoded(picture(60, 50))
    monkeypatch.setattr(image_headers, "MAX_PIXELS", 1000)
    for function in (images.decode, images.inspect):
        with pytest.raises(UserError, match="decompression bomb"):
            function(data)


@pytest.mark.parametrize("size", [32, 224])
def test_a_raw_crop_is_bitwise_the_crop_and_webdataset_decodes_it(size):
    import webdataset as wds

    crop = images.pixels(encoded(picture(300, 250)), "jpg", size)
    extension, data = images.encode(crop, "crop-raw")
    assert len(data) == 128 + 3 * size * size
    for buffer in (data, memoryview(bytearray(data))):
        assert torch.equal(images.pixels(buffer, extension, size), crop)
    decoded = wds.autodecode.Decoder([wds.autodecode.basichandlers])({"__key__": "a", extension: data})
    assert np.array_equal(decoded[extension], crop.numpy())


def test_a_raw_crop_of_another_size_or_no_array_is_an_error():
    _, data = images.encode(torch.zeros(3, 32, 32, dtype=torch.uint8), "crop-raw")
    with pytest.raises(UserError, match=r"a raw crop of uint8 \(3, 32, 32\) where uint8 \(3, 64, 64\) is needed"):
        images.pixels(data, "npy", 64)
    with pytest.raises(UserError, match="not an array"):
        images.pixels(data[:100], "npy", 32)


def test_a_jpeg_crop_is_close_and_is_read_without_a_resize():
    crop = images.pixels(encoded(picture(300, 250)), "jpg", 64)
    extension, data = images.encode(crop, "crop-jpeg")
    assert extension == "jpg"
    again = images.pixels(data, extension, 64)
    assert torch.equal(again, images.decode(data))
    assert (again.float() - crop.float()).abs().mean() < 12  # of noise; photographs come closer


def test_a_border_is_cut_before_anything_else():
    inner = picture(60, 50)
    framed = Image.new("RGB", (64, 54), "red")
    framed.paste(inner, (2, 2))
    data = encoded(framed, "PNG")
    assert torch.equal(images.pixels(data, "png", 40, border=2), images.pixels(encoded(inner, "PNG"), "png", 40))


def test_a_line_of_pixels_is_refused():
    data = encoded(picture(3000, 20))
    with pytest.raises(UserError, match="3000 × 20 pixels: one side is more than 100 times the other"):
        images.pixels(data, "jpg", 224)
    with pytest.raises(UserError, match="one side is more than 100 times the other"):
        images.inspect(data)
