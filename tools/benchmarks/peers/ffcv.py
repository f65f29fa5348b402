"""FFCV."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tools.benchmarks.peers.common import (
    CROP_RAW,
    ORIGINAL,
    SIZE,
    Loader,
    count,
    crop_transform,
    endlessly,
    labelled_files,
)

IMPORTS = ("ffcv", "ffcv.loader", "ffcv.writer", "torchvision.transforms", "PIL.Image")


def convert(source_tree: Path, out: Path, workers: int, *, store: str) -> int:
    """FFCV's DatasetWriter, one .beton file.

    "original" needs a field class of its own, because FFCV's decodes every file and encodes it again.
    """
    from ffcv.fields import RGBImageField

    if store == ORIGINAL:
        return _write(out, _original_field()(), labelled_files(source_tree), workers)
    field = RGBImageField(write_mode="raw" if store == CROP_RAW else "jpg", jpeg_quality=95)
    return _write(out, field, _Samples(source_tree, crop=crop_transform()), workers)


def _convert_again(source_tree: Path, out: Path, workers: int) -> int:
    """FFCV's own image field, which decodes every image and encodes it again."""
    from ffcv.fields import RGBImageField

    return _write(out, RGBImageField(write_mode="jpg", jpeg_quality=95), _Samples(source_tree, crop=None), workers)


def _write(out: Path, field: Any, samples: Any, workers: int) -> int:
    from ffcv.fields import IntField
    from ffcv.writer import DatasetWriter

    out.mkdir(parents=True, exist_ok=True)
    writer = DatasetWriter(str(out / "data.beton"), {"image": field, "label": IntField()}, num_workers=workers)
    writer.from_indexed_dataset(samples)
    return len(samples)


class _Samples:
    """A source for FFCV's writer: it needs a length, and (image, label) by index."""

    def __init__(self, source_tree: Path, crop: Any) -> None:
        self.samples, self.crop = labelled_files(source_tree), crop

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        from PIL import Image

        path, label = self.samples[index]
        image = Image.open(path).convert("RGB")
        return (self.crop(image) if self.crop else image), label


def _original_field() -> Any:
    """FFCV's image field (a class) that stores the bytes of a JPEG file, given its path."""
    import numpy as np
    from ffcv.fields import RGBImageField
    from ffcv.fields.rgb_image import IMAGE_MODES
    from PIL import Image

    class OriginalJpegField(RGBImageField):
        def encode(self, destination: Any, image: str, malloc: Any) -> None:
            data = np.fromfile(image, np.uint8)
            with Image.open(image) as header:
                destination["width"], destination["height"] = header.size
            destination["mode"] = IMAGE_MODES["jpg"]
            destination["data_ptr"], storage = malloc(data.nbytes)
            storage[:] = data

    return OriginalJpegField


def read_photographs(data: Path, *, batch: int, workers: int, original: bool) -> Iterator[int]:
    """FFCV's centre crop decoder, on original JPEGs or on those that FFCV has encoded again. uint8.

    Other pixels than Pillow's: the fast, less exact DCT, and OpenCV's INTER_AREA on the centre square. Encoded again
    (at quality 95), images also have 4:2:0 chroma, so there is less to decode than in the source.
    """
    from ffcv.fields.rgb_image import CenterCropRGBImageDecoder

    fields = {"custom_fields": {"image": _original_field()}} if original else {}
    decoder = CenterCropRGBImageDecoder((SIZE, SIZE), ratio=1)
    for images, _ in endlessly(_loader(data, batch, workers, decoder, **fields)):
        yield count(images)


def read_raw(data: Path, *, batch: int, workers: int) -> Iterator[int]:
    """`RGBImageField(write_mode="raw")`: one copy out of the mapped file, into buffers that are used again."""
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder

    for images, _ in endlessly(_loader(data, batch, workers, SimpleRGBImageDecoder())):
        yield count(images)


def _loader(data: Path, batch: int, workers: int, decoder: Any, **fields: Any) -> Any:
    from ffcv.fields.basics import IntDecoder
    from ffcv.loader import Loader as FfcvLoader
    from ffcv.loader import OrderOption
    from ffcv.transforms import Squeeze, ToTensor, ToTorchImage

    return FfcvLoader(
        str(data / "data.beton"),
        batch_size=batch,
        num_workers=workers,
        order=OrderOption.RANDOM,
        os_cache=True,
        drop_last=False,
        pipelines={
            "image": [decoder, ToTensor(), ToTorchImage()],
            "label": [IntDecoder(), ToTensor(), Squeeze()],
        },
        **fields,
    )


LOADERS = {
    "ffcv_jpeg": Loader(partial(read_photographs, original=False), _convert_again),
    "ffcv_original": Loader(partial(read_photographs, original=True), partial(convert, store=ORIGINAL)),
    "ffcv_raw": Loader(read_raw, partial(convert, store=CROP_RAW)),
}
