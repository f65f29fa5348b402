"""Which sample goes into which shard: a function of the images' names and sizes, the classes and the seed."""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from cfmask.convert import shard_writer
from cfmask.convert.sources.files import LabelledImage
from cfmask.convert.tables import Classes
from cfmask.data import images, plan, shards
from cfmask.errors import UserError
from cfmask.runtime.files import write_atomically

PLAN = "plan.json"
"""In the folder of a set: the plan that its shards are of."""


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
class ShardTask:
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
) -> list[ShardTask]:
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
        ShardTask(
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


class Planned(Protocol):
    """A shard to make: where, and by which plan."""

    @property
    def tar(self) -> Path: ...

    @property
    def plan(self) -> str: ...


def is_made(task: Planned) -> bool:
    """Whether a shard of this very plan is there, whole: its index is its commit record."""
    about = shard_writer.committed_about(task.tar)
    return about is not None and about.get("plan") == task.plan and not shard_writer.has_clipped_images(about)


def claim(folder: Path, identity: str, facts: dict[str, Any]) -> None:
    """Write the plan's identity into the folder, or see that it is there already.

    Raises:
        UserError: the folder holds shards of another plan.
    """
    path = folder / PLAN
    remedy = f"Choose another --out, or delete {folder} if nothing there is needed"
    if path.exists():
        try:
            there = json.loads(path.read_text())
            digest = there["plan"]
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise UserError(f"{path} cannot be read ({error!r}). {remedy}.") from None
        if digest != identity:
            before = ", ".join(f"{name} {there.get(name)}" for name in facts)
            now = ", ".join(f"{name} {value}" for name, value in facts.items())
            raise UserError(
                f"{folder} holds shards of another plan: it was begun with {before}; now it is {now}. (A plan also "
                f"changes with the names and sizes of what it is made from, and with the class list.) {remedy}."
            )
    elif any(folder.glob("*.tar")):
        raise UserError(f"{folder} holds tars that this program did not begin there. {remedy}.")
    else:
        write_atomically(path, json.dumps({"plan": identity, **facts}, indent=1).encode())
