"""LitData."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tools.benchmarks.peers.common import CROP_RAW, SIZE, Loader, count, encoded, endlessly, labelled_files, nchw

IMPORTS = ("litdata", "torchvision.transforms.v2", "PIL.Image")


def convert(source_tree: Path, out: Path, workers: int, *, store: str) -> int:
    """LitData's optimize, which starts ``workers`` interpreters; chunks of 64 MB."""
    return _optimize(partial(_sample, store=store), source_tree, out, workers)


def _optimize(function: Callable[[Any], Any], source_tree: Path, out: Path, workers: int) -> int:
    from litdata import optimize

    samples = labelled_files(source_tree)
    optimize(fn=function, inputs=samples, output_dir=str(out), num_workers=workers, chunk_bytes="64MB", verbose=False)
    return len(samples)


def _sample(sample: tuple[str, int], *, store: str) -> Any:
    path, label = sample
    return {"image": encoded(path, store), "label": label}


def _image_sample(sample: tuple[str, int]) -> Any:
    from litdata import Image

    path, label = sample
    return {"image": Image(path=path), "label": label}


def _convert_images(source_tree: Path, out: Path, workers: int) -> int:
    return _optimize(_image_sample, source_tree, out, workers)


def read_photographs(data: Path, *, batch: int, workers: int) -> Iterator[int]:
    """As its documentation recommends: `Image(path=...)`, which is read as a uint8 tensor, and torchvision's v2
    transforms.

    The pixels differ from Pillow's by up to two levels: torchvision decodes, and resizes the tensor. uint8.
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


def read_raw(data: Path, *, batch: int, workers: int) -> Iterator[int]:
    """NumPy arrays."""
    from litdata import StreamingDataLoader, StreamingDataset

    # By default it decodes items in groups of 256, with shuffling the same ones again and again: five times slower
    # here.
    dataset = StreamingDataset(str(data), shuffle=True, batch_decode=1)
    loader = StreamingDataLoader(dataset, batch_size=batch, num_workers=workers, persistent_workers=True)
    for samples in endlessly(loader):
        yield count(nchw(samples["image"]))


LOADERS = {
    "litdata_tensor": Loader(read_photographs, _convert_images),
    "litdata_raw": Loader(read_raw, partial(convert, store=CROP_RAW)),
}
