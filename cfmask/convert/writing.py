"""Makes one shard: reads, checks and converts its samples.

The bytes of a shard depend on its task alone: every process that makes it, here or in a Slurm job, writes the same
file, even two at once.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from cfmask.convert import shard_writer
from cfmask.convert.planning import Sample, ShardTask, Store, is_made, key_of
from cfmask.data import images
from cfmask.errors import UserError
from cfmask.runtime.files import disk_is_full
from cfmask.runtime.output import printable

# What is done with an image that has an issue; make_shards.py's docstring has the table.
LEFT_OUT = "left out"
IGNORED = "ignored"
NO_IMAGES = "class has no images"
SCALED = "kept, scaled to 8 bits"
_AS_RGB = "kept, read as RGB"
_BY_CONTENT = "kept, under the extension of its content"
_NUMBERED = "kept, its key numbered"
_POLICIES = {
    "several pictures": "kept, the first one",
    "EXIF": "kept, orientation not applied",
    "TIFF": "kept, orientation applied",
}
"""By the beginning of the issue."""


def preload(tasks: Sequence[ShardTask]) -> tuple[str, ...]:
    """Modules that these tasks need and that take seconds to import."""
    return ("torch.nn.functional",) if any(task.store.image_size for task in tasks) else ()


def make_shard(task: ShardTask) -> tuple[int, int]:
    """Read, check and write the samples of one shard, unless it exists.

    Returns:
        Numbers of images, and of bytes read from the source.
    """
    if is_made(task.tar, task.plan):
        return len(task.samples), 0
    if task.store.image_size:  # originals need no torch, which takes seconds to import
        import torch

        torch.set_num_threads(1)  # the worker processes already use all cores
    issues: list[dict[str, Any]] = []
    n_bytes = 0

    def samples() -> Iterator[tuple[str, int, dict[str, bytes]]]:
        nonlocal n_bytes
        for sample in task.samples:
            data = sample.image.blob.read()
            n_bytes += len(data)
            members = convert(sample, data, task.store, issues)
            if members is not None:
                yield sample.key, sample.label, members

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's warnings about unusual metadata
            shard_writer.write_shard(task.tar, samples(), about={"plan": task.plan, "issues": issues})
    except OSError as error:
        if disk_is_full(error):
            raise UserError(
                f"The disk of {task.tar.parent} is full. Free some space and run the same command again: finished "
                f"shards are kept."
            ) from None
        raise UserError(f"{task.tar} cannot be written ({error.strerror}).") from None
    return len(task.samples), n_bytes


def convert(sample: Sample, data: bytes, store: Store, issues: list[dict[str, Any]]) -> dict[str, bytes] | None:
    """The members of a sample by extension; None for an image that is left out. Appends to ``issues``."""
    image = sample.image

    def note(issue: str, policy: str) -> None:
        name = printable(image.name)
        issues.append({"name": name, "class": sample.label, "bytes": len(data), "issue": issue, "policy": policy})

    try:
        info = images.inspect(data)
        if min(info.width, info.height) <= 2 * store.border:
            raise UserError(f"nothing is left of its {info.width}x{info.height} pixels without the border")
        if store.image_size is None:
            extension, stored = info.extension, data
        else:
            pixels = images.pixels(data, info.extension, store.image_size, border=store.border)
            extension, stored = images.encode(pixels, store.name)
    except UserError as reason:
        note(str(reason), LEFT_OUT)
        return None
    for issue in info.oddities:
        policy = next((policy for beginning, policy in _POLICIES.items() if issue.startswith(beginning)), _AS_RGB)
        note(issue, SCALED if issue.endswith("-bit") else policy)
    suffix = image.file.rpartition(".")[2].lower()
    suffix = {"jpeg": "jpg", "tiff": "tif"}.get(suffix, suffix)
    if suffix != info.extension:
        note(f"{suffix} by its name, {info.extension} by its content", _BY_CONTENT)
    if sample.key != key_of(image):
        note("its name makes the key of another image", _NUMBERED)
    about = {
        "key": sample.key,
        "wnid": sample.wnid,
        "class": sample.label,
        "name": printable(image.name),
        "bytes": len(data),
        "width": info.width,
        "height": info.height,
    }
    return {extension: stored, "cls": str(sample.label).encode(), "json": json.dumps(about).encode()}
