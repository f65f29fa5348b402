"""MosaicML Streaming."""

from __future__ import annotations

from pathlib import Path

from tools.benchmarks.peers.common import ORIGINAL, SIZE, Loader, encoded, labelled_files

IMPORTS = ("streaming", "torchvision.transforms", "PIL.Image")
LOADERS: dict[str, Loader] = {}


def convert(source_tree: Path, out: Path, workers: int, *, store: str) -> int:
    """Its recipe for parallel conversion: a process and a folder for each MDSWriter, then the indexes are merged."""
    from multiprocessing import Pool

    from streaming.base.util import merge_index

    samples = labelled_files(source_tree)
    parts = [(samples[k::workers], str(out / f"{k:02d}"), store) for k in range(workers)]
    with Pool(workers) as pool:
        written = pool.map(_convert_part, parts, chunksize=1)
    merge_index(str(out), keep_local=True)
    return sum(written)


def _convert_part(part: tuple[list[tuple[str, int]], str, str]) -> int:
    from PIL import Image
    from streaming import MDSWriter

    samples, out, store = part
    # A `jpeg` column stores the file of an image that Pillow has opened unchanged. It would encode any other image
    # again.
    column = {"original": "jpeg", "crop-jpeg": "bytes", "crop-raw": f"ndarray:uint8:{SIZE},{SIZE},3"}[store]
    with MDSWriter(out=out, columns={"image": column, "label": "int"}) as writer:
        for path, label in samples:
            if store == ORIGINAL:
                with Image.open(path) as image:
                    writer.write({"image": image, "label": label})
            else:
                writer.write({"image": encoded(path, store), "label": label})
    return len(samples)
