"""What the peers have in common: the samples of a tree, crops, endless epochs."""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

SIZE = 224
STORES = ("original", "crop-jpeg", "crop-raw")
"""What a converter writes: the files' bytes; a crop as JPEG of quality 95; a crop as uint8 (224, 224, 3)."""
ORIGINAL, CROP_RAW = STORES[0], STORES[2]


@dataclass(frozen=True)
class Loader:
    """A loader and the conversion of its data."""

    read: Callable[..., Iterator[int]]
    """``read(data, batch=, workers=)`` yields the number of images of each batch, without end."""
    convert: Callable[[Path, Path, int], object]
    """``convert(source, out, workers)`` makes its data from a tree of class/image.JPEG."""


def labelled_files(source_tree: Path) -> list[tuple[str, int]]:
    """(path, class number) of every image, shuffled once, which formats that are read in sequence need."""
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
    """CLIP's evaluation transform of a Pillow image, up to the crop."""
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

    return Compose([Resize(SIZE, InterpolationMode.BICUBIC), CenterCrop(SIZE)])


def encoded(path: str, store: str) -> Any:
    """What a converter stores of an image: the bytes of a JPEG, or an array."""
    if store == ORIGINAL:
        return Path(path).read_bytes()
    import numpy as np
    from PIL import Image

    image = crop_transform()(Image.open(path).convert("RGB"))
    if store == CROP_RAW:
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
    """The number of images of a batch, after a check of its shape."""
    assert images.ndim == 4 and tuple(images.shape[1:]) == (3, SIZE, SIZE), images.shape
    return len(images)


def nchw(images: Any) -> Any:
    return images.permute(0, 3, 1, 2)
