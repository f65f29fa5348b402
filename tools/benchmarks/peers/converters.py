"""Converters: a tree of images → a library's own format."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tools.benchmarks.peers.shared import SHARD, SIZE, crop_transform, encoded, labelled_files


def convert_webdataset(source_tree: Path, out: Path, *, store: str, workers: int) -> int:
    """WebDataset's ShardWriter, 100 images a shard. One process whatever ``workers`` is: it documents no other way."""
    import webdataset as wds

    samples = labelled_files(source_tree)
    out.mkdir(parents=True, exist_ok=True)
    with wds.ShardWriter(str(out / "%06d.tar"), maxcount=SHARD, verbose=0) as shards:
        for number, (path, label) in enumerate(samples):
            member = "npy" if store == "crop-raw" else "jpg"
            shards.write({"__key__": f"{number:08d}", member: encoded(path, store), "cls": label})
    return len(samples)


def convert_mosaic(source_tree: Path, out: Path, *, store: str, workers: int) -> int:
    """MosaicML Streaming's parallel recipe: an MDSWriter a process, each in a folder of its own, indices merged."""
    from multiprocessing import Pool

    from streaming.base.util import merge_index

    samples = labelled_files(source_tree)
    parts = [(samples[k::workers], str(out / f"{k:02d}"), store) for k in range(workers)]
    with Pool(workers) as pool:
        written = pool.map(_mosaic_part, parts, chunksize=1)
    merge_index(str(out), keep_local=True)
    return sum(written)


def _mosaic_part(part: tuple[list[tuple[str, int]], str, str]) -> int:
    from PIL import Image
    from streaming import MDSWriter

    samples, out, store = part
    # A file that Pillow has opened goes into a `jpeg` column as it is; any other image would get Pillow's quality 75.
    column = {"original": "jpeg", "crop-jpeg": "bytes", "crop-raw": f"ndarray:uint8:{SIZE},{SIZE},3"}[store]
    with MDSWriter(out=out, columns={"image": column, "label": "int"}) as writer:
        for path, label in samples:
            if store == "original":
                with Image.open(path) as image:
                    writer.write({"image": image, "label": label})
            else:
                writer.write({"image": encoded(path, store), "label": label})
    return len(samples)


def convert_litdata(source_tree: Path, out: Path, *, store: str, workers: int) -> int:
    """LitData's optimize, which starts ``workers`` fresh interpreters (it spawns), chunks of 64 MB."""
    return litdata_optimize(partial(_litdata_sample, store=store), source_tree, out, workers)


def litdata_optimize(function: Callable[[Any], Any], source_tree: Path, out: Path, workers: int) -> int:
    from litdata import optimize

    samples = labelled_files(source_tree)
    optimize(fn=function, inputs=samples, output_dir=str(out), num_workers=workers, chunk_bytes="64MB", verbose=False)
    return len(samples)


def _litdata_sample(sample: tuple[str, int], *, store: str) -> Any:
    path, label = sample
    return {"image": encoded(path, store), "label": label}


def litdata_image(sample: tuple[str, int]) -> Any:
    from litdata import Image

    path, label = sample
    return {"image": Image(path=path), "label": label}


def convert_ffcv(source_tree: Path, out: Path, *, store: str, workers: int) -> int:
    """FFCV's DatasetWriter with ``workers`` processes, one .beton file.

    "original" takes a field of one's own: FFCV's would decode every file and encode it again.
    """
    from ffcv.fields import RGBImageField

    if store == "original":
        return ffcv_write(source_tree, out, ffcv_original_field()(), labelled_files(source_tree), workers)
    field = RGBImageField(write_mode="raw" if store == "crop-raw" else "jpg", jpeg_quality=95)
    return ffcv_write(source_tree, out, field, FfcvSamples(source_tree, crop=crop_transform()), workers)


def ffcv_write(source_tree: Path, out: Path, field: Any, samples: Any, workers: int) -> int:
    from ffcv.fields import IntField
    from ffcv.writer import DatasetWriter

    out.mkdir(parents=True, exist_ok=True)
    writer = DatasetWriter(str(out / "data.beton"), {"image": field, "label": IntField()}, num_workers=workers)
    writer.from_indexed_dataset(samples)
    return len(samples)


class FfcvSamples:
    """The source as FFCV's writer wants it: something with a length and an index that gives (image, label)."""

    def __init__(self, source_tree: Path, crop: Any) -> None:
        self.samples, self.crop = labelled_files(source_tree), crop

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        from PIL import Image

        path, label = self.samples[index]
        image = Image.open(path).convert("RGB")
        return (self.crop(image) if self.crop else image), label


def ffcv_original_field() -> Any:
    """FFCV's image field (a class) for files that are JPEGs already: given a path, it stores the file's bytes."""
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
