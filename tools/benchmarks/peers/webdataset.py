"""WebDataset."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tools.benchmarks.peers.common import (
    CROP_RAW,
    ORIGINAL,
    Loader,
    count,
    crop_transform,
    encoded,
    endlessly,
    labelled_files,
    nchw,
)

IMPORTS = ("webdataset", "torchvision.transforms", "PIL.Image")
SHARD = 100  # images in a tar


def convert(source_tree: Path, out: Path, workers: int, *, store: str) -> int:
    """WebDataset's ShardWriter. One process: its documentation has no way to use several."""
    import webdataset as wds

    samples = labelled_files(source_tree)
    out.mkdir(parents=True, exist_ok=True)
    with wds.ShardWriter(str(out / "%06d.tar"), maxcount=SHARD, verbose=0) as shards:
        for number, (path, label) in enumerate(samples):
            member = "npy" if store == CROP_RAW else "jpg"
            shards.write({"__key__": f"{number:08d}", member: encoded(path, store), "cls": label})
    return len(samples)


def _read(
    data: Path,
    decode: tuple[str, ...],
    columns: tuple[str, str],
    transform: Callable[[Any], Any],
    batch: int,
    workers: int,
) -> Iterator[Any]:
    import webdataset as wds

    shards = sorted(str(path) for path in data.glob("*.tar"))
    dataset = wds.WebDataset(shards, shardshuffle=len(shards)).shuffle(1000)
    dataset = dataset.decode(*decode).to_tuple(*columns).map_tuple(transform)
    loader = wds.WebLoader(dataset, batch_size=batch, num_workers=workers, persistent_workers=True)
    for images, _ in endlessly(loader):
        yield images


def read_photographs(data: Path, *, batch: int, workers: int) -> Iterator[int]:
    """As in WebDataset's README, with Pillow and torchvision. Pillow's pixels; float32."""
    from torchvision.transforms import Compose, ToTensor

    transform = Compose([crop_transform(), ToTensor()])
    yield from map(count, _read(data, ("pil",), ("jpg", "cls"), transform, batch, workers))


def read_raw(data: Path, *, batch: int, workers: int) -> Iterator[int]:
    """`.npy` members."""
    from torch import from_numpy

    for images in _read(data, (), ("npy", "cls"), from_numpy, batch, workers):
        yield count(nchw(images))


LOADERS = {
    "webdataset_pil": Loader(read_photographs, partial(convert, store=ORIGINAL)),
    "webdataset_raw": Loader(read_raw, partial(convert, store=CROP_RAW)),
}
