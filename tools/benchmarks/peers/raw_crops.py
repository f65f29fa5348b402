"""Loaders of 224 × 224 × 3 bytes that were cropped before."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tools.benchmarks.peers.converters import convert_ffcv, convert_litdata, convert_mosaic, convert_webdataset
from tools.benchmarks.peers.shared import cores, count, endlessly, ffcv_loader, nchw, once


def webdataset_raw(data: Path, *, batch: int, workers: int) -> Iterator[int]:
    """WebDataset with `.npy` members."""
    import webdataset as wds
    from torch import from_numpy

    shards = sorted(str(path) for path in data.glob("*.tar"))
    dataset = (
        wds.WebDataset(shards, shardshuffle=len(shards))
        .shuffle(1000)
        .decode()
        .to_tuple("npy", "cls")
        .map_tuple(from_numpy)
    )
    loader = wds.WebLoader(dataset, batch_size=batch, num_workers=workers, persistent_workers=True)
    for images, _ in endlessly(loader):
        yield count(nchw(images))


def prepare_webdataset_raw(source_tree: Path, data: Path) -> None:
    once(data, lambda out: convert_webdataset(source_tree, out, store="crop-raw", workers=1))


def mosaic_raw(data: Path, *, batch: int, workers: int) -> Iterator[int]:
    """MosaicML Streaming with an `ndarray:uint8:224,224,3` column."""
    from streaming import StreamingDataLoader, StreamingDataset

    dataset = StreamingDataset(local=str(data), shuffle=True, batch_size=batch)
    loader = StreamingDataLoader(dataset, batch_size=batch, num_workers=workers, persistent_workers=True)
    for samples in endlessly(loader):
        yield count(nchw(samples["image"]))


def prepare_mosaic_raw(source_tree: Path, data: Path) -> None:
    once(data, lambda out: convert_mosaic(source_tree, out, store="crop-raw", workers=cores()))


def litdata_raw(data: Path, *, batch: int, workers: int) -> Iterator[int]:
    """LitData with NumPy arrays."""
    from litdata import StreamingDataLoader, StreamingDataset

    # Its default decodes items by the 256; with shuffling, the same ones over and over: five times slower here.
    dataset = StreamingDataset(str(data), shuffle=True, batch_decode=1)
    loader = StreamingDataLoader(dataset, batch_size=batch, num_workers=workers, persistent_workers=True)
    for samples in endlessly(loader):
        yield count(nchw(samples["image"]))


def prepare_litdata_raw(source_tree: Path, data: Path) -> None:
    once(data, lambda out: convert_litdata(source_tree, out, store="crop-raw", workers=cores()))


def ffcv_raw(data: Path, *, batch: int, workers: int) -> Iterator[int]:
    """FFCV with `RGBImageField(write_mode="raw")`: one copy, out of the mapped file, into buffers that are reused."""
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder

    for images, _ in endlessly(ffcv_loader(data, batch, workers, SimpleRGBImageDecoder())):
        yield count(images)


def prepare_ffcv_raw(source_tree: Path, data: Path) -> None:
    once(data, lambda out: convert_ffcv(source_tree, out, store="crop-raw", workers=cores()))
