"""The benchmark's peers: other libraries on the jobs that cfmask's loader and converter do.

Every loader and every converter is one function, written as a user of that library would write it from its
documentation. They run in an interpreter of their own (`tools/peers-requirements.txt`), where cfmask is not needed:

    python tools/_peers.py loader NAME --data DIR --source TREE --batch 64 --workers 2 --seconds 20
    python tools/_peers.py convert NAME --source TREE --out DIR --store original --workers 2
    python tools/_peers.py list

The source is a tree of `class/image.JPEG`. The last line on stdout is one JSON object; what the libraries say goes to
stderr. Machine time is what all processes of a peer used, not only this one.

Loaders never end: they go through their data again and again, in another order each time, and yield the number of
images of each batch as it arrives. What counts as one job:

    photographs   decode the original JPEG, short side to 224 with an antialiased bicubic filter, centre crop 224.
                  "Same pixels" below means: equal to Pillow's to the last bit, which is what CLIP was evaluated on.
    raw           224 x 224 x 3 bytes that somebody has cropped before; every peer gives the same pixels.

A batch is (n, 3, 224, 224), uint8 or float32 in [0, 1], not normalised. What raw loaders yield are views of NHWC memory
("channels last"), which costs nobody anything.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any

SIZE = 224
SHARD = 100  # images in a tar

STORES = ("original", "crop-jpeg", "crop-raw")
"""What a converter writes: the files' bytes untouched; a crop as JPEG of quality 95; a crop as uint8 (224, 224, 3)."""


# ------------------------------------------------------------------------------------------------------ shared parts


def _samples(source_tree: Path) -> list[tuple[str, int]]:
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
def _crop_transform() -> Any:
    """CLIP's evaluation transform on a Pillow image, without what makes a tensor of it."""
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

    return Compose([Resize(SIZE, InterpolationMode.BICUBIC), CenterCrop(SIZE)])


def _tensor_transform() -> Any:
    """CLIP's evaluation transform on a Pillow image, up to float32 in [0, 1]."""
    from torchvision.transforms import Compose, ToTensor

    return Compose([_crop_transform(), ToTensor()])


def _encoded(path: str, store: str) -> Any:
    """What a converter stores of an image: the bytes of a JPEG, or an array."""
    if store == "original":
        return Path(path).read_bytes()
    import numpy as np
    from PIL import Image

    image = _crop_transform()(Image.open(path).convert("RGB"))
    if store == "crop-raw":
        return np.array(image)
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=95)
    return buffer.getvalue()


def _epochs(loader: Iterable[Any]) -> Iterator[Any]:
    """The loader's batches, epoch after epoch."""
    while True:
        batch = None
        for batch in loader:
            yield batch
        if batch is None:
            raise SystemExit("error: the loader gave no batch.")


def _count(images: Any) -> int:
    """The number of images of a batch that is what it should be."""
    assert images.ndim == 4 and tuple(images.shape[1:]) == (3, SIZE, SIZE), images.shape
    return len(images)


def _nchw(images: Any) -> Any:
    return images.permute(0, 3, 1, 2)


def _once(data: Path, convert: Callable[[Path], Any]) -> None:
    """``convert`` into a new folder that becomes ``data``, unless that exists. Delete it to have it made again."""
    if data.exists():
        return
    part = data.with_name(data.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    convert(part)
    part.rename(data)


def _link(source_tree: Path, data: Path) -> None:
    """For loaders that read the source as it is."""
    if not data.exists():
        data.parent.mkdir(parents=True, exist_ok=True)
        data.symlink_to(source_tree.resolve(), target_is_directory=True)


def _cores() -> int:
    return os.cpu_count() or 1


# ------------------------------------------------------------------------------------------------- loaders: photographs


def webdataset_pil(data: Path, *, batch: int, workers: int) -> Iterator[int]:
    """Plain WebDataset as in its README. Same pixels; float32."""
    import webdataset as wds

    shards = sorted(str(path) for path in data.glob("*.tar"))
    dataset = (
        wds.WebDataset(shards, shardshuffle=len(shards))
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg", "cls")
        .map_tuple(_tensor_transform())
    )
    loader = wds.WebLoader(dataset, batch_size=batch, num_workers=workers, persistent_workers=True)
    for images, _ in _epochs(loader):
        yield _count(images)


def prepare_webdataset_pil(source_tree: Path, data: Path) -> None:
    _once(data, lambda out: convert_webdataset(source_tree, out, store="original", workers=1))


def imagefolder(data: Path, *, batch: int, workers: int) -> Iterator[int]:
    """torchvision's ImageFolder and torch's DataLoader on the files themselves. Same pixels; float32."""
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder

    dataset = ImageFolder(str(data), transform=_tensor_transform())
    loader = DataLoader(dataset, batch_size=batch, shuffle=True, num_workers=workers, persistent_workers=True)
    for images, _ in _epochs(loader):
        yield _count(images)


prepare_imagefolder = _link


def mosaic(data: Path, *, batch: int, workers: int) -> Iterator[int]:
    """MosaicML Streaming on local MDS shards whose `jpeg` column holds the original bytes. Same pixels; float32."""
    from streaming import StreamingDataLoader, StreamingDataset

    transform = _tensor_transform()

    class Photographs(StreamingDataset):
        def __getitem__(self, index: int) -> Any:
            sample = super().__getitem__(index)
            return transform(sample["image"].convert("RGB")), sample["label"]

    dataset = Photographs(local=str(data), shuffle=True, batch_size=batch)
    loader = StreamingDataLoader(dataset, batch_size=batch, num_workers=workers, persistent_workers=True)
    for images, _ in _epochs(loader):
        yield _count(images)


def prepare_mosaic(source_tree: Path, data: Path) -> None:
    _once(data, lambda out: convert_mosaic(source_tree, out, store="original", workers=_cores()))


def litdata(data: Path, *, batch: int, workers: int) -> Iterator[int]:
    """LitData's StreamingDataset on chunks that hold the original bytes, decoded by Pillow. Same pixels; float32."""
    from litdata import StreamingDataLoader, StreamingDataset
    from PIL import Image

    transform = _tensor_transform()

    def decode(sample: Any) -> Any:
        return transform(Image.open(io.BytesIO(sample["image"])).convert("RGB")), sample["label"]

    # Its default decodes items by the 256; with shuffling, the same ones over and over.
    dataset = StreamingDataset(str(data), shuffle=True, transform=decode, batch_decode=1)
    loader = StreamingDataLoader(dataset, batch_size=batch, num_workers=workers, persistent_workers=True)
    for images, _ in _epochs(loader):
        yield _count(images)


def prepare_litdata(source_tree: Path, data: Path) -> None:
    _once(data, lambda out: convert_litdata(source_tree, out, store="original", workers=_cores()))


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
    for images, _ in _epochs(loader):
        yield _count(images)


def prepare_litdata_tensor(source_tree: Path, data: Path) -> None:
    _once(data, lambda out: _litdata_optimize(_litdata_image, source_tree, out, _cores()))


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
    _once(data, lambda out: _ffcv_write(source_tree, out, field, _FfcvSamples(source_tree, crop=None), _cores()))


def ffcv_original(data: Path, *, batch: int, workers: int) -> Iterator[int]:
    """``ffcv_jpeg`` on the original JPEGs, which takes a field of one's own (``_ffcv_original_field``).

    NOT the same pixels: the fast, less exact DCT; the centre square is resized with OpenCV's INTER_AREA. uint8.
    """
    yield from _ffcv_photographs(data, batch, workers, custom_fields={"image": _ffcv_original_field()})


def prepare_ffcv_original(source_tree: Path, data: Path) -> None:
    _once(data, lambda out: convert_ffcv(source_tree, out, store="original", workers=_cores()))


def _ffcv_photographs(data: Path, batch: int, workers: int, **fields: Any) -> Iterator[int]:
    from ffcv.fields.rgb_image import CenterCropRGBImageDecoder

    decoder = CenterCropRGBImageDecoder((SIZE, SIZE), ratio=1)
    for images, _ in _epochs(_ffcv_loader(data, batch, workers, decoder, **fields)):
        yield _count(images)


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
        return _nchw(spdl.io.to_torch(spdl.io.convert_frames(frames)))

    loader = DataLoader(
        embed_shuffle(LocalDirectory(data, "*/*")),
        preprocessor=decode,
        batch_size=batch,
        aggregator=collate,
        num_threads=workers,
    )
    for images in _epochs(loader):
        yield _count(images)


prepare_spdl = _link


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
    for (outputs,) in _epochs(loader):
        yield _count(outputs["images"])


prepare_dali = _link


# --------------------------------------------------------------------------------------------------------- loaders: raw


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
    for images, _ in _epochs(loader):
        yield _count(_nchw(images))


def prepare_webdataset_raw(source_tree: Path, data: Path) -> None:
    _once(data, lambda out: convert_webdataset(source_tree, out, store="crop-raw", workers=1))


def mosaic_raw(data: Path, *, batch: int, workers: int) -> Iterator[int]:
    """MosaicML Streaming with an `ndarray:uint8:224,224,3` column."""
    from streaming import StreamingDataLoader, StreamingDataset

    dataset = StreamingDataset(local=str(data), shuffle=True, batch_size=batch)
    loader = StreamingDataLoader(dataset, batch_size=batch, num_workers=workers, persistent_workers=True)
    for samples in _epochs(loader):
        yield _count(_nchw(samples["image"]))


def prepare_mosaic_raw(source_tree: Path, data: Path) -> None:
    _once(data, lambda out: convert_mosaic(source_tree, out, store="crop-raw", workers=_cores()))


def litdata_raw(data: Path, *, batch: int, workers: int) -> Iterator[int]:
    """LitData with NumPy arrays."""
    from litdata import StreamingDataLoader, StreamingDataset

    # Its default decodes items by the 256; with shuffling, the same ones over and over: five times slower here.
    dataset = StreamingDataset(str(data), shuffle=True, batch_decode=1)
    loader = StreamingDataLoader(dataset, batch_size=batch, num_workers=workers, persistent_workers=True)
    for samples in _epochs(loader):
        yield _count(_nchw(samples["image"]))


def prepare_litdata_raw(source_tree: Path, data: Path) -> None:
    _once(data, lambda out: convert_litdata(source_tree, out, store="crop-raw", workers=_cores()))


def ffcv_raw(data: Path, *, batch: int, workers: int) -> Iterator[int]:
    """FFCV with `RGBImageField(write_mode="raw")`: one copy, out of the mapped file, into buffers that are reused."""
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder

    for images, _ in _epochs(_ffcv_loader(data, batch, workers, SimpleRGBImageDecoder())):
        yield _count(images)


def prepare_ffcv_raw(source_tree: Path, data: Path) -> None:
    _once(data, lambda out: convert_ffcv(source_tree, out, store="crop-raw", workers=_cores()))


# ----------------------------------------------------------------------------------------------------------- converters


def convert_webdataset(source_tree: Path, out: Path, *, store: str, workers: int) -> int:
    """WebDataset's ShardWriter, 100 images a shard. One process whatever ``workers`` is: it documents no other way."""
    import webdataset as wds

    samples = _samples(source_tree)
    out.mkdir(parents=True, exist_ok=True)
    with wds.ShardWriter(str(out / "%06d.tar"), maxcount=SHARD, verbose=0) as shards:
        for number, (path, label) in enumerate(samples):
            member = "npy" if store == "crop-raw" else "jpg"
            shards.write({"__key__": f"{number:08d}", member: _encoded(path, store), "cls": label})
    return len(samples)


def convert_mosaic(source_tree: Path, out: Path, *, store: str, workers: int) -> int:
    """MosaicML Streaming's parallel recipe: an MDSWriter a process, each in a folder of its own, indices merged."""
    from multiprocessing import Pool

    from streaming.base.util import merge_index

    samples = _samples(source_tree)
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
                writer.write({"image": _encoded(path, store), "label": label})
    return len(samples)


def convert_litdata(source_tree: Path, out: Path, *, store: str, workers: int) -> int:
    """LitData's optimize, which starts ``workers`` fresh interpreters (it spawns), chunks of 64 MB."""
    return _litdata_optimize(partial(_litdata_sample, store=store), source_tree, out, workers)


def _litdata_optimize(function: Callable[[Any], Any], source_tree: Path, out: Path, workers: int) -> int:
    from litdata import optimize

    samples = _samples(source_tree)
    optimize(fn=function, inputs=samples, output_dir=str(out), num_workers=workers, chunk_bytes="64MB", verbose=False)
    return len(samples)


def _litdata_sample(sample: tuple[str, int], *, store: str) -> Any:
    path, label = sample
    return {"image": _encoded(path, store), "label": label}


def _litdata_image(sample: tuple[str, int]) -> Any:
    from litdata import Image

    path, label = sample
    return {"image": Image(path=path), "label": label}


def convert_ffcv(source_tree: Path, out: Path, *, store: str, workers: int) -> int:
    """FFCV's DatasetWriter with ``workers`` processes, one .beton file.

    "original" takes a field of one's own: FFCV's would decode every file and encode it again.
    """
    from ffcv.fields import RGBImageField

    if store == "original":
        return _ffcv_write(source_tree, out, _ffcv_original_field()(), _samples(source_tree), workers)
    field = RGBImageField(write_mode="raw" if store == "crop-raw" else "jpg", jpeg_quality=95)
    return _ffcv_write(source_tree, out, field, _FfcvSamples(source_tree, crop=_crop_transform()), workers)


def _ffcv_write(source_tree: Path, out: Path, field: Any, samples: Any, workers: int) -> int:
    from ffcv.fields import IntField
    from ffcv.writer import DatasetWriter

    out.mkdir(parents=True, exist_ok=True)
    writer = DatasetWriter(str(out / "data.beton"), {"image": field, "label": IntField()}, num_workers=workers)
    writer.from_indexed_dataset(samples)
    return len(samples)


class _FfcvSamples:
    """The source as FFCV's writer wants it: something with a length and an index that gives (image, label)."""

    def __init__(self, source_tree: Path, crop: Any) -> None:
        self.samples, self.crop = _samples(source_tree), crop

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        from PIL import Image

        path, label = self.samples[index]
        image = Image.open(path).convert("RGB")
        return (self.crop(image) if self.crop else image), label


def _ffcv_original_field() -> Any:
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


def _ffcv_loader(data: Path, batch: int, workers: int, decoder: Any, **fields: Any) -> Any:
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


# --------------------------------------------------------------------------------------------------------- command line

_WEBDATASET = ("webdataset", "torchvision.transforms", "PIL.Image")
_TORCHVISION = ("torchvision", "torchvision.datasets", "torch.utils.data", "PIL.Image")
_MOSAIC = ("streaming", "torchvision.transforms", "PIL.Image")
_LITDATA = ("litdata", "torchvision.transforms.v2", "PIL.Image")
_FFCV = ("ffcv", "ffcv.loader", "ffcv.writer", "torchvision.transforms", "PIL.Image")
_SPDL = ("spdl.io", "spdl.dataloader", "spdl.source.local_directory", "spdl.source.utils")
_DALI = ("nvidia.dali", "nvidia.dali.fn", "nvidia.dali.plugin.pytorch")

# name: (loader, how its data is made, modules that it imports)
LOADERS: dict[str, tuple[Callable[..., Iterator[int]], Callable[[Path, Path], None], tuple[str, ...]]] = {
    "webdataset_pil": (webdataset_pil, prepare_webdataset_pil, _WEBDATASET),
    "imagefolder": (imagefolder, prepare_imagefolder, _TORCHVISION),
    "mosaic": (mosaic, prepare_mosaic, _MOSAIC),
    "litdata": (litdata, prepare_litdata, _LITDATA),
    "litdata_tensor": (litdata_tensor, prepare_litdata_tensor, _LITDATA),
    "ffcv_jpeg": (ffcv_jpeg, prepare_ffcv_jpeg, _FFCV),
    "ffcv_original": (ffcv_original, prepare_ffcv_original, _FFCV),
    "spdl": (spdl, prepare_spdl, _SPDL),
    "dali": (dali, prepare_dali, _DALI),
    "webdataset_raw": (webdataset_raw, prepare_webdataset_raw, _WEBDATASET),
    "mosaic_raw": (mosaic_raw, prepare_mosaic_raw, _MOSAIC),
    "litdata_raw": (litdata_raw, prepare_litdata_raw, _LITDATA),
    "ffcv_raw": (ffcv_raw, prepare_ffcv_raw, _FFCV),
}

# name: (converter, modules that it imports)
CONVERTERS: dict[str, tuple[Callable[..., int], tuple[str, ...]]] = {
    "webdataset": (convert_webdataset, _WEBDATASET),
    "mosaic": (convert_mosaic, _MOSAIC),
    "litdata": (convert_litdata, _LITDATA),
    "ffcv": (convert_ffcv, _FFCV),
}


def _load(modules: tuple[str, ...]) -> str | None:
    """Import what a peer needs, so that no clock counts it.

    Returns:
        The peer's version; None if it does not say.
    """
    for module in modules:
        importlib.import_module(module)
    if modules is _SPDL:
        # Its FFmpeg libraries are looked for only when they are used first.
        importlib.import_module("spdl.io.utils").get_ffmpeg_versions()
    if modules is _FFCV:
        return metadata.version("ffcv")  # its module has another number than its package
    return getattr(sys.modules[modules[0]], "__version__", None)


def _problem(modules: tuple[str, ...]) -> str | None:
    try:
        _load(modules)
    except Exception as error:
        return " ".join(f"{type(error).__name__}: {error}".split())
    return None


def cpu_seconds() -> float:
    """User and system time of this process and all its descendants: those that have ended, and those that still run."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    seconds = sum(usage.ru_utime + usage.ru_stime for usage in usages)
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has just ended
        pid = int(stat.parent.name)
        parents[pid] = int(fields[1])
        ticks[pid] = sum(int(field) for field in fields[11:15])  # its own, and of its children that have ended
    family = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    return seconds + sum(ticks[pid] for pid in family - {os.getpid()}) / os.sysconf("SC_CLK_TCK")


def run_loader(name: str, data: Path, *, batch: int, workers: int, seconds: float) -> dict[str, Any]:
    """Images in about ``seconds`` after the first batch has arrived. The clock stops when a batch arrives."""
    loader, _, modules = LOADERS[name]
    version = _load(modules)
    start = time.perf_counter()
    with closing(loader(data, batch=batch, workers=workers)) as batches:  # type: ignore[type-var]
        next(batches)
        first, cpu, images, elapsed = time.perf_counter(), cpu_seconds(), 0, 0.0
        for count in batches:
            images += count
            elapsed = time.perf_counter() - first
            if elapsed >= seconds:
                break
        cpu = cpu_seconds() - cpu
    return {
        "name": name,
        "version": version,
        "images": images,
        "seconds": round(elapsed, 3),
        "images_per_s": round(images / elapsed, 1),
        "cpu_seconds": round(cpu, 3),
        "cpu_ms_per_image": round(1000 * cpu / images, 3),
        "first_batch_s": round(first - start, 3),
        "batch": batch,
        "workers": workers,
    }


def run_convert(name: str, source: Path, out: Path, *, store: str, workers: int) -> dict[str, Any]:
    """The whole conversion, without this process's own imports."""
    converter, modules = CONVERTERS[name]
    start = time.perf_counter()
    version = _load(modules)
    imported, cpu = time.perf_counter(), cpu_seconds()
    images = converter(source, out, store=store, workers=workers)
    elapsed, cpu = time.perf_counter() - imported, cpu_seconds() - cpu
    return {
        "name": name,
        "version": version,
        "store": store,
        "images": images,
        "seconds": round(elapsed, 3),
        "images_per_s": round(images / elapsed, 1),
        "cpu_seconds": round(cpu, 3),
        "cpu_ms_per_image": round(1000 * cpu / images, 3),
        "import_s": round(imported - start, 3),
        "bytes": sum(path.stat().st_size for path in out.rglob("*") if path.is_file()),
        "workers": workers,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("loader", help="images per second of a loader")
    one.add_argument("name", choices=LOADERS)
    one.add_argument("--data", type=Path, required=True, help="folder for the peers' own formats, one folder each")
    one.add_argument("--source", type=Path, required=True, help="tree of class/image.JPEG")
    one.add_argument("--batch", type=int, default=64)
    one.add_argument("--workers", type=int, default=2)
    one.add_argument("--seconds", type=float, default=20)
    one.add_argument("--prepare-only", action="store_true", help="make the peer's data and stop")
    one = commands.add_parser("convert", help="time of a conversion")
    one.add_argument("name", choices=CONVERTERS)
    one.add_argument("--source", type=Path, required=True, help="tree of class/image.JPEG")
    one.add_argument("--out", type=Path, required=True, help="folder that is made; it may not exist")
    one.add_argument("--store", choices=STORES, default="original")
    one.add_argument("--workers", type=int, default=2)
    commands.add_parser("list", help="which peers can be imported here, and what keeps the others from it")
    arguments = parser.parse_args()

    # Libraries print; the answer alone belongs on stdout. (The file descriptor: their processes inherit it.)
    sys.stdout.flush()
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # LitData would ask the package registry for a newer version of itself before every job.
    os.environ.setdefault("LITDATA_DISABLE_VERSION_CHECK", "1")

    if arguments.command == "list":
        needs = {name: modules for name, (_, _, modules) in LOADERS.items()}
        needs |= {name: modules for name, (_, modules) in CONVERTERS.items()}
        result: dict[str, Any] = {name: _problem(modules) for name, modules in needs.items()}
    elif arguments.command == "loader":
        data = arguments.data / arguments.name
        if arguments.prepare_only:
            LOADERS[arguments.name][1](arguments.source, data)
            result = {"name": arguments.name, "data": str(data)}
        else:
            if not data.exists():
                # In a process of its own: LitData's writer, for one, changes how processes are started from then on.
                subprocess.run([sys.executable, *sys.argv, "--prepare-only"], check=True)
            result = run_loader(
                arguments.name,
                data,
                batch=arguments.batch,
                workers=arguments.workers,
                seconds=arguments.seconds,
            )
    else:
        if arguments.out.exists():
            raise SystemExit(f"error: {arguments.out} exists already.")
        result = run_convert(
            arguments.name, arguments.source, arguments.out, store=arguments.store, workers=arguments.workers
        )
    print(json.dumps(result), file=answer, flush=True)


if __name__ == "__main__":
    main()
