"""Loaders of original JPEGs."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tools.benchmarks.peers.converters import (
    FfcvSamples,
    convert_ffcv,
    convert_litdata,
    convert_mosaic,
    convert_webdataset,
    ffcv_original_field,
    ffcv_write,
    litdata_image,
    litdata_optimize,
)
from tools.benchmarks.peers.shared import SIZE, cores, count, endlessly, ffcv_loader, link, nchw, once, tensor_transform


def webdataset_pil(data: Path, *, batch: int, workers: int) -> Iterator[int]:
    """Plain WebDataset as in its README. Same pixels; float32."""
    import webdataset as wds

    shards = sorted(str(path) for path in data.glob("*.tar"))
    dataset = (
        wds.WebDataset(shards, shardshuffle=len(shards))
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg", "cls")
        .map_tuple(tensor_transform())
    )
    loader = wds.WebLoader(dataset, batch_size=batch, num_workers=workers, persistent_workers=True)
    for images, _ in endlessly(loader):
        yield count(images)


def prepare_webdataset_pil(source_tree: Path, data: Path) -> None:
    once(data, lambda out: convert_webdataset(source_tree, out, store="original", workers=1))


def imagefolder(data: Path, *, batch: int, workers: int) -> Iterator[int]:
    """torchvision's ImageFolder and torch's DataLoader on the files themselves. Same pixels; float32."""
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder

    dataset = ImageFolder(str(data), transform=tensor_transform())
    loader = DataLoader(dataset, batch_size=batch, shuffle=True, num_workers=workers, persistent_workers=True)
    for images, _ in endlessly(loader):
        yield count(images)


prepare_imagefolder = link


def mosaic(data: Path, *, batch: int, workers: int) -> Iterator[int]:
    """MosaicML Streaming on local MDS shards whose `jpeg` column holds the original bytes. Same pixels; float32."""
    from streaming import StreamingDataLoader, StreamingDataset

    transform = tensor_transform()

    class Photographs(StreamingDataset):
        def __getitem__(self, index: int) -> Any:
            sample = super().__getitem__(index)
            return transform(sample["image"].convert("RGB")), sample["label"]

    dataset = Photographs(local=str(data), shuffle=True, batch_size=batch)
    loader = StreamingDataLoader(dataset, batch_size=batch, num_workers=workers, persistent_workers=True)
    for images, _ in endlessly(loader):
        yield count(images)


def prepare_mosaic(source_tree: Path, data: Path) -> None:
    once(data, lambda out: convert_mosaic(source_tree, out, store="original", workers=cores()))


def litdata(data: Path, *, batch: int, workers: int) -> Iterator[int]:
    """LitData's StreamingDataset on chunks that hold the original bytes, decoded by Pillow. Same pixels; float32."""
    from litdata import StreamingDataLoader, StreamingDataset
    from PIL import Image

    transform = tensor_transform()

    def decode(sample: Any) -> Any:
        return transform(Image.open(io.BytesIO(sample["image"])).convert("RGB")), sample["label"]

    # Its default decodes items by the 256; with shuffling, the same ones over and over.
    dataset = StreamingDataset(str(data), shuffle=True, transform=decode, batch_decode=1)
    loader = StreamingDataLoader(dataset, batch_size=batch, num_workers=workers, persistent_workers=True)
    for images, _ in endlessly(loader):
        yield count(images)


def prepare_litdata(source_tree: Path, data: Path) -> None:
    once(data, lambda out: convert_litdata(source_tree, out, store="original", workers=cores()))


def litdata_tensor(data: Path, *, batch: int, workers: int) -> Iterator[int]:
    """LitData as its documentation prefers it: `Image(path=...)` in, a uint8 tensor out, torchvision's v2 transforms.

    NOT the same pixels, though nearly: torchvision decodes, and resizes the tensor (bicubic, antialiased). uint8.
    """
    from litdata import StreamingDataLoader, StreamingDataset
    from torchvision.transforms import InterpolationMode, v2

    transform = v2.Compose(
        [v2.RGB(), v2.Resize(SIZE, InterpolationMode.BICUBIC, antialias=True), v2.CenterCrop(SIZE)],
    )

    def decode(sample: Any) -> Any:
        return transform(sample["image"]), sample["label"]

    dataset = StreamingDataset(str(data), shuffle=True, transform=decode)
    loader = StreamingDataLoader(dataset, batch_size=batch, num_workers=workers, persistent_workers=True)
    for images, _ in endlessly(loader):
        yield count(images)


def prepare_litdata_tensor(source_tree: Path, data: Path) -> None:
    once(data, lambda out: litdata_optimize(litdata_image, source_tree, out, cores()))


def ffcv_jpeg(data: Path, *, batch: int, workers: int) -> Iterator[int]:
    """FFCV with `RGBImageField(write_mode="jpg")` and its centre crop decoder.

    NOT the same pixels, and not the original JPEGs either: FFCV's writer decodes every image and encodes it again
    (here at quality 95, always with 4:2:0 chroma, so that there is less to decode than in the source). It decodes with
    the fast, less exact DCT and resizes the centre square with OpenCV's INTER_AREA. uint8.
    """
    yield from _ffcv_photographs(data, batch, workers)


def prepare_ffcv_jpeg(source_tree: Path, data: Path) -> None:
    from ffcv.fields import RGBImageField

    field = RGBImageField(write_mode="jpg", jpeg_quality=95)
    once(data, lambda out: ffcv_write(source_tree, out, field, FfcvSamples(source_tree, crop=None), cores()))


def ffcv_original(data: Path, *, batch: int, workers: int) -> Iterator[int]:
    """``ffcv_jpeg`` on the original JPEGs, which takes a field of one's own (``ffcv_original_field``).

    NOT the same pixels: the fast, less exact DCT; the centre square is resized with OpenCV's INTER_AREA. uint8.
    """
    yield from _ffcv_photographs(data, batch, workers, custom_fields={"image": ffcv_original_field()})


def prepare_ffcv_original(source_tree: Path, data: Path) -> None:
    once(data, lambda out: convert_ffcv(source_tree, out, store="original", workers=cores()))


def _ffcv_photographs(data: Path, batch: int, workers: int, **fields: Any) -> Iterator[int]:
    from ffcv.fields.rgb_image import CenterCropRGBImageDecoder

    decoder = CenterCropRGBImageDecoder((SIZE, SIZE), ratio=1)
    for images, _ in endlessly(ffcv_loader(data, batch, workers, decoder, **fields)):
        yield count(images)


def spdl(data: Path, *, batch: int, workers: int) -> Iterator[int]:
    """SPDL's DataLoader: threads, FFmpeg on the CPU, files read as they are.

    NOT the same pixels: FFmpeg decodes, scales (bicubic, antialiased) and converts to RGB with roundings of its own,
    and the crop may lie up to a pixel off. uint8.
    """
    import spdl.io
    from spdl.dataloader import DataLoader
    from spdl.source.local_directory import LocalDirectory
    from spdl.source.utils import embed_shuffle

    crop = spdl.io.get_video_filter_desc(
        scale_width=SIZE, scale_height=SIZE, scale_algo="bicubic", scale_mode="crop", pix_fmt="rgb24"
    )

    def decode(path: Path) -> Any:
        return spdl.io.decode_packets(spdl.io.demux_image(str(path)), filter_desc=crop)

    def collate(frames: list[Any]) -> Any:
        return nchw(spdl.io.to_torch(spdl.io.convert_frames(frames)))

    loader = DataLoader(
        embed_shuffle(LocalDirectory(data, "*/*")),
        preprocessor=decode,
        batch_size=batch,
        aggregator=collate,
        num_threads=workers,
    )
    for images in endlessly(loader):
        yield count(images)


prepare_spdl = link


def dali(data: Path, *, batch: int, workers: int) -> Iterator[int]:
    """A DALI pipeline without a GPU: threads, libjpeg-turbo, files read as they are.

    NOT the same pixels: the resize rounds the long side where torchvision truncates it, so that the crop may lie up to
    a pixel off; its filter is close to Pillow's; and an EXIF orientation is applied. uint8.
    """
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.plugin.pytorch import DALIGenericIterator, LastBatchPolicy

    @pipeline_def(batch_size=batch, num_threads=workers, device_id=None)
    def photographs() -> Any:
        encoded, label = fn.readers.file(file_root=str(data), random_shuffle=True, name="reader")
        images = fn.decoders.image(encoded, device="cpu")
        images = fn.resize(images, resize_shorter=SIZE, interp_type=types.INTERP_CUBIC, antialias=True)
        images = fn.crop_mirror_normalize(
            images, crop=(SIZE, SIZE), dtype=types.UINT8, mean=[0.0], std=[1.0], output_layout="CHW"
        )
        return images, label

    loader = DALIGenericIterator(
        photographs(),
        ["images", "labels"],
        reader_name="reader",
        last_batch_policy=LastBatchPolicy.PARTIAL,
        auto_reset=True,
    )
    for (outputs,) in endlessly(loader):
        yield count(outputs["images"])


prepare_dali = link
