"""Which sample goes into which shard: a function of the images' names and sizes, the classes and the seed."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from cfmask.convert import shard_writer
from cfmask.convert.request import Request
from cfmask.convert.sources.files import LabelledImage, SourceImages
from cfmask.data import images, plan, shards
from cfmask.errors import UserError
from cfmask.runtime.files import write_atomically
from cfmask.runtime.work import Work

logger = logging.getLogger(__name__)

PLAN = "plan.json"
"""In the folder of a set: the identity of the plan that its shards are made by."""


@dataclass(frozen=True)
class Store:
    """What the image members of a set are.

    name: in ``images.STORES``.
    image_size: side of a crop; None for originals.
    border: pixels at each side of a source image that are not part of the picture. They are cut off a crop; for an
        original this is left to the reader.
    """

    name: str = images.ORIGINAL
    image_size: int | None = None
    border: int = 0

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
    """A shard to make, with everything that a process needs for it."""

    tar: Path
    plan: str
    store: Store
    samples: list[Sample]

    @property
    def num_bytes(self) -> int:
        """Estimated size of the shard and its index."""
        return sum(map(self.store.estimate, self.samples))


def plan_split(name: str, source: SourceImages, store: Store, request: Request) -> list[ShardTask]:
    """The shards of the split ``name``."""
    found, class_ids, folder = source.splits[name], source.class_ids, request.out / name
    keys = _unique_keys(found)
    facts: list[Any] = [shards.VERSION, store.name, store.image_size, store.border, name, request.seed]
    facts += [request.samples_per_shard, source.classes]
    digest = hashlib.sha256(json.dumps(facts).encode())
    for image in found:
        line = f"{image.folder}/{image.file}\0{image.blob.size}\0{class_ids[image.folder]}\n"
        digest.update(line.encode(errors="surrogateescape"))
    identity = digest.hexdigest()
    order = plan.permutation(len(found), plan.philox(plan.CONVERSION, request.seed)).tolist()
    count = -(-len(found) // request.samples_per_shard)
    bounds = [n * len(found) // count for n in range(count + 1)]  # sizes differ by at most one

    def sample(i: int) -> Sample:
        label = class_ids[found[i].folder]
        return Sample(keys[i], label, source.classes[label][0], found[i])

    return [
        ShardTask(
            tar=folder / f"{name}-{n:06d}.tar",
            plan=identity,
            store=store,
            samples=[sample(i) for i in order[bounds[n] : bounds[n + 1]]],
        )
        for n in range(count)
    ]


_UNSAFE = re.compile(r"[^A-Za-z0-9_-]")


def key_of(image: LabelledImage) -> str:
    """WebDataset key: folder and file name in characters that are safe in a tar and on any file system, without dots
    (a key ends at its first dot)."""
    stem = image.file.rpartition(".")[0] or image.file
    name = stem if stem.startswith(f"{image.folder}_") else f"{image.folder}_{stem}"
    key = _UNSAFE.sub("_", name)
    if len(key) > 80:  # a tar header holds 100 bytes, the extension included
        key = f"{key[:60]}-{hashlib.sha256(name.encode(errors='surrogateescape')).hexdigest()[:16]}"
    return key


def _unique_keys(found: list[LabelledImage]) -> list[str]:
    """Their keys; equal ones are numbered in order."""
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


def is_made(tar: Path, plan: str) -> bool:
    """Whether the shard exists, complete and made by this plan. Its index is its commit record."""
    about = shard_writer.committed_about(tar)
    return about is not None and about.get("plan") == plan and not shard_writer.has_clipped_images(about)


def work_on_missing(kind: str, tasks: Sequence[Any], function: Callable[[Any], Any], preload: tuple[str, ...]) -> Work:
    """The work of making the shards of one plan that are missing.

    Args:
        tasks: one for each shard of the plan, with its ``tar`` and ``plan``.
        kind, function, preload: of ``Work``.
    """
    missing = [task for task in tasks if not is_made(task.tar, task.plan)]
    folder = tasks[0].tar.parent
    if len(missing) < len(tasks):
        logger.info(f"{folder.name}: {len(tasks) - len(missing)} of {len(tasks)} shards exist already")
    return Work(
        kind=kind,
        identity=f"{folder}{tasks[0].plan}",
        function=function,
        items=missing,
        keys=[task.tar.stem for task in missing],
        preload=preload,
        describe=lambda task: str(task.tar),
    )


def claim(folder: Path, identity: str, facts: dict[str, Any]) -> None:
    """Write the plan's identity into the folder, or check that it is there already."""
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
                f"{folder} holds shards of another plan: it was made with {before}; this command has {now}. (A plan "
                f"also depends on the names and sizes of the images, and on the class list.) {remedy}."
            )
    elif any(folder.glob("*.tar")):
        raise UserError(f"{folder} holds tars of another program. {remedy}.")
    else:
        write_atomically(path, json.dumps({"plan": identity, **facts}, indent=1).encode())
