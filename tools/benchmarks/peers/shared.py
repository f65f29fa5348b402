"""What loaders and converters of all peers share: the samples of a tree, crops, endless epochs, made data."""

from __future__ import annotations

import io
import os
import random
import shutil
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

SIZE = 224
SHARD = 100  # images in a tar

STORES = ("original", "crop-jpeg", "crop-raw")
"""What a converter writes: the files' bytes untouched; a crop as JPEG of quality 95; a crop as uint8 (224, 224, 3)."""


def labelled_files(source_tree: Path) -> list[tuple[str, int]]:
    """(path, class number) of every image, shuffled once: formats that are read in sequence want it so."""
    classes = sorted(entry.name for entry in source_tree.iterdir() if entry.is_dir())
    samples = [
        (str(path), label)
        for label, name in enumerate(classes)
        for path in sorted((source_tree / name).iterdir())
        if path.suffix.lower() in (".jpeg", ".jpg")
    ]
    if not samples:
        raise SystemExit(f"error: {source_tree} has no class/image.JPEG in it.")
    random.Random(0).shuffle(samples)
    return samples


@cache
def crop_transform() -> Any:
    """CLIP's evaluation transform on a Pillow image, without what makes a tensor of it."""
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

    return Compose([Resize(SIZE, InterpolationMode.BICUBIC), CenterCrop(SIZE)])


def tensor_transform() -> Any:
    """CLIP's evaluation transform on a Pillow image, up to float32 in [0, 1]."""
    from torchvision.transforms import Compose, ToTensor

    return Compose([crop_transform(), ToTensor()])


def encoded(path: str, store: str) -> Any:
    """What a converter stores of an image: the bytes of a JPEG, or an array."""
    if store == "original":
        return Path(path).read_bytes()
    import numpy as np
    from PIL import Image

    image = crop_transform()(Image.open(path).convert("RGB"))
    if store == "crop-raw":
        return np.array(image)
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=95)
    return buffer.getvalue()


def endlessly(loader: Iterable[Any]) -> Iterator[Any]:
    """The loader's batches, epoch after epoch."""
    while True:
        batch = None
        for batch in loader:
            yield batch
        if batch is None:
            raise SystemExit("error: the loader gave no batch.")


def count(images: Any) -> int:
    """The number of images of a batch that is what it should be."""
    assert images.ndim == 4 and tuple(images.shape[1:]) == (3, SIZE, SIZE), images.shape
    return len(images)


def nchw(images: Any) -> Any:
    return images.permute(0, 3, 1, 2)


def once(data: Path, convert: Callable[[Path], Any]) -> None:
    """``convert`` into a new folder that becomes ``data``, unless that exists. Delete it to have it made again."""
    if data.exists():
        return
    part = data.with_name(data.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    convert(part)
    part.rename(data)


def link(source_tree: Path, data: Path) -> None:
    """For loaders that read the source as it is."""
    if not data.exists():
        data.parent.mkdir(parents=True, exist_ok=True)
        data.symlink_to(source_tree.resolve(), target_is_directory=True)


def cores() -> int:
    return os.cpu_count() or 1


def ffcv_loader(data: Path, batch: int, workers: int, decoder: Any, **fields: Any) -> Any:
    from ffcv.fields.basics import IntDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import Squeeze, ToTensor, ToTorchImage

    return Loader(
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
