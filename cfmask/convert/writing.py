"""How one shard is written: its samples are read, checked and converted.

A shard's bytes follow from its Task alone. Whoever makes it, this process, another or a Slurm job (or two of them at
once, by accident), leaves the same file.
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

# Policies: what is done with an image that has an issue. make_shards.py's docstring has the table.
LEFT_OUT = "left out"
_AS_RGB = "kept, read as RGB"
SCALED = "kept, scaled to 8 bits"
_FIRST = "kept, the first one"
_AS_STORED = "kept, orientation not applied"
_TURNED = "kept, orientation applied"
_BY_CONTENT = "kept, under the extension of its content"
_NUMBERED = "kept, its key numbered"
NO_IMAGES = "class has no images"
STAYS_OUT = "stays out"


def preload(tasks: Sequence[ShardTask]) -> tuple[str, ...]:
    """Modules that take seconds to import, and that making these shards needs."""
    return ("torch.nn.functional",) if any(task.store.image_size for task in tasks) else ()


def make_shard(task: ShardTask) -> tuple[int, int]:
    """Read, check and write the samples of one shard, unless it is there.

    Returns:
        How many images, and bytes of the source, that were.

    Raises:
        UserError: the source cannot be read or has changed; the shard cannot be written.
    """
    if is_made(task):
        return len(task.samples), 0
    if task.store.image_size:  # originals need no torch, and importing it takes seconds
        import torch

        torch.set_num_threads(1)  # the processes share the cores already
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
            warnings.simplefilter("ignore")  # Pillow warns of odd metadata, image by image
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
    """The members of a sample, by extension; None for an image that is left out. ``issues`` gets what is odd about
    it."""
    image = sample.image

    def note(issue: str, policy: str) -> None:
        name = printable(image.name)
        issues.append({"name": name, "class": sample.label, "bytes": len(data), "issue": issue, "policy": policy})

    try:
        facts = images.inspect(data)
        if min(facts.width, facts.height) <= 2 * store.border:
            raise UserError(f"nothing is left of its {facts.width}x{facts.height} pixels without the border")
        if store.image_size is None:
            extension, stored = facts.extension, data
        else:
            pixels = images.pixels(data, facts.extension, store.image_size, border=store.border)
            extension, stored = images.encode(pixels, store.name)
    except UserError as reason:
        note(str(reason), LEFT_OUT)
        return None
    for oddity in facts.oddities:
        note(oddity, _policy(oddity))
    suffix = image.file.rpartition(".")[2].lower()
    suffix = {"jpeg": "jpg", "tiff": "tif"}.get(suffix, suffix)
    if suffix != facts.extension:
        note(f"{suffix} by its name, {facts.extension} by its content", _BY_CONTENT)
    if sample.key != key_of(image):
        note("its name makes the key of another image", _NUMBERED)
    about = {
        "key": sample.key,
        "wnid": sample.wnid,
        "class": sample.label,
        "name": printable(image.name),
        "bytes": len(data),
        "width": facts.width,
        "height": facts.height,
    }
    return {extension: stored, "cls": str(sample.label).encode(), "json": json.dumps(about).encode()}


def _policy(oddity: str) -> str:
    if oddity.endswith("-bit"):
        return SCALED
    policies = {"several pictures": _FIRST, "EXIF": _AS_STORED, "TIFF": _TURNED}
    return next((policy for beginning, policy in policies.items() if oddity.startswith(beginning)), _AS_RGB)
