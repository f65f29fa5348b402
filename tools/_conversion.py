"""Conversion without its command line: which sample goes where, and how one shard is made.

A shard's bytes follow from its Task alone. Whoever makes it, in this process, a pool or a Slurm job (or two of them at
once, by accident), leaves the same file.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from cfmask.data import images, plan, shards
from cfmask.data.sources import LabelledImage
from cfmask.errors import UserError
from tools._array import ignore, run_here

Classes = tuple[tuple[str, str], ...]

# Policies: what is done with an image that has an issue. make_shards.py's docstring has the table.
LEFT_OUT = "left out"
_AS_RGB = "kept, read as RGB"
_AS_STORED = "kept, orientation not applied"
_BY_CONTENT = "kept, under the extension of its content"
_NUMBERED = "kept, its key numbered"
NO_IMAGES = "class has no images"


# --- the plan: which sample goes where ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Store:
    """What the image members are. name: in images.STORES; image_size: side of a crop; border: pixels of the source
    image that are not part of the picture, on each side: cut off a crop, left to the reader of an original."""

    name: str = images.ORIGINAL
    image_size: int | None = None
    border: int = 0

    @property
    def border_left(self) -> int:
        return 0 if self.image_size else self.border

    def estimate(self, sample: Sample) -> int:
        """Bytes of a sample in a shard: exact for originals and raw crops, a guess for JPEG crops."""
        size = sample.image.blob.size
        if self.image_size:
            raw = 128 + 3 * self.image_size**2
            size = raw if self.name == images.CROP_RAW else raw // 5  # 30 kB at 224
        return 5 * 512 + -(-size // 512) * 512 + 100  # three headers, a short .cls and .json; its rows in the index


class Sample(NamedTuple):
    key: str
    label: int
    wnid: str
    image: LabelledImage


@dataclass(frozen=True)
class Task:
    """One shard to make; everything that a process needs for it."""

    tar: Path
    plan: str
    store: Store
    samples: list[Sample]

    @property
    def num_bytes(self) -> int:
        """Estimated size of the shard and its index."""
        return sum(map(self.store.estimate, self.samples))


def plan_split(
    folder: Path,
    found: list[LabelledImage],
    *,
    classes: Classes,
    class_ids: Mapping[str, int],
    store: Store,
    seed: int,
    samples_per_shard: int,
) -> list[Task]:
    """The table of samples to shards: a function of the images' names and sizes, the classes, the store and the seed.

    Args:
        folder: where the shards will be; its name is the split's.
        found: sorted by name.
        class_ids: by class folder.
    """
    keys = unique_keys(found)
    facts = [shards.VERSION, store.name, store.image_size, store.border, folder.name, seed, samples_per_shard, classes]
    digest = hashlib.sha256(json.dumps(facts).encode())
    for image in found:
        line = f"{image.folder}/{image.file}\0{image.blob.size}\0{class_ids[image.folder]}\n"
        digest.update(line.encode(errors="surrogateescape"))
    identity = digest.hexdigest()
    order = plan.permutation(len(found), plan.philox(plan.CONVERSION, seed)).tolist()
    count = -(-len(found) // samples_per_shard)
    bounds = [n * len(found) // count for n in range(count + 1)]  # sizes differ by one at most

    def sample(i: int) -> Sample:
        label = class_ids[found[i].folder]
        return Sample(keys[i], label, classes[label][0], found[i])

    return [
        Task(
            tar=folder / f"{folder.name}-{n:06d}.tar",
            plan=identity,
            store=store,
            samples=[sample(i) for i in order[bounds[n] : bounds[n + 1]]],
        )
        for n in range(count)
    ]


_UNSAFE = re.compile(r"[^A-Za-z0-9_-]")


def key_of(image: LabelledImage) -> str:
    """WebDataset key: folder and file name in characters that are safe in a tar, on any system, and in a key (which
    ends at its first dot)."""
    stem = image.file.rpartition(".")[0] or image.file
    name = stem if stem.startswith(f"{image.folder}_") else f"{image.folder}_{stem}"
    key = _UNSAFE.sub("_", name)
    if len(key) > 80:  # the tar header has room for 100 bytes, extension included
        key = f"{key[:60]}-{hashlib.sha256(name.encode(errors='surrogateescape')).hexdigest()[:16]}"
    return key


def unique_keys(found: list[LabelledImage]) -> list[str]:
    """Their keys; those that become equal are numbered in order."""
    taken: dict[str, int] = {}
    keys = []
    for image in found:
        key = base = key_of(image)
        number = taken.get(key, 0)
        while key in taken:
            number += 1
            key = f"{base}-{number}"
        taken[base] = number
        taken.setdefault(key, 0)
        keys.append(key)
    return keys


def hold_out(found: list[LabelledImage], n: int, *, seed: int) -> tuple[list[LabelledImage], list[LabelledImage]]:
    """Take ``n`` images out, stratified by class: each class gives its share of them, rounded so that the sum is n
    (largest remainder; of equal ones the first folder's). Which, follows from their names and the seed.

    Returns:
        (the rest, those taken out), both in the order of ``found``.

    Raises:
        UserError: n is not smaller than the number of images.
    """
    if not 0 < n < len(found):
        raise UserError(
            f"--holdout {n} does not leave both sets an image: the training set has {len(found)}. Choose a smaller "
            f"number."
        )
    by_class: dict[str, list[int]] = defaultdict(list)
    for i, image in enumerate(found):
        by_class[image.folder].append(i)
    shares = {folder: Fraction(n * len(rows), len(found)) for folder, rows in by_class.items()}
    quota = {folder: int(share) for folder, share in shares.items()}
    by_remainder = sorted(shares, key=lambda folder: (quota[folder] - shares[folder], folder))
    for folder in by_remainder[: n - sum(quota.values())]:
        quota[folder] += 1

    def lot(i: int) -> bytes:
        return hashlib.sha256(f"{seed}\0{found[i].name}".encode(errors="surrogateescape")).digest()

    taken = {i for folder, rows in by_class.items() for i in sorted(rows, key=lot)[: quota[folder]]}
    return (
        [image for i, image in enumerate(found) if i not in taken],
        [image for i, image in enumerate(found) if i in taken],
    )


def is_made(task: Task) -> bool:
    """Whether a shard of this very plan is there, whole: its index is its commit record."""
    about = shards.vouched_for(task.tar)
    return about is not None and about.get("plan") == task.plan


# --- one shard ------------------------------------------------------------------------------------------------------


def make_all(tasks: list[Task], *, workers: int, progress: Callable[[tuple[int, int]], object] = ignore) -> None:
    """Make shards in processes of this machine. ``progress`` gets what ``make_shard`` returns of each.

    Raises:
        UserError: the first that a process met. What is finished stays.
    """
    crops = any(task.store.image_size for task in tasks)
    preload = ("torch.nn.functional", "tools._conversion") if crops else ()
    run_here(make_shard, tasks, workers=workers, preload=preload, progress=progress)


def make_shard(task: Task) -> tuple[int, int]:
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
            shards.write_shard(task.tar, samples(), about={"plan": task.plan, "issues": issues})
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
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
        name = image.name.encode(errors="replace").decode()
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
        note(oddity, _AS_STORED if oddity.startswith("EXIF") else _AS_RGB)
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
        "name": image.name.encode(errors="replace").decode(),
        "bytes": len(data),
        "width": facts.width,
        "height": facts.height,
    }
    return {extension: stored, "cls": str(sample.label).encode(), "json": json.dumps(about).encode()}
