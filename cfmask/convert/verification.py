"""Compares a shard with its index and its manifest.

quick: sizes, index, end mark, a few headers, every label. full: also every byte, checksum, header and image.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from cfmask.convert import labels, tarscan
from cfmask.convert.shard_writer import has_clipped_images
from cfmask.data import images
from cfmask.data.shard_index import INDEX_AGAIN, Index, frame_digest, index_path, parse_index
from cfmask.data.shards import Shard
from cfmask.errors import UserError

_BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True)
class Check:
    """A shard to check, and what its manifest says about it.

    label_from: place of the labels: "cls", "json", "key"; "" if all members of our own shards agree.
    label_field: of the json.
    class_ids: class id by number in the tar; () if they are equal.
    foreign: the shard was made by another program and indexed.
    full: read everything.
    """

    root: Path
    shard: Shard
    store: str
    image_size: int | None
    num_classes: int
    label_from: str
    label_field: str
    class_ids: tuple[int, ...]
    foreign: bool
    full: bool

    @property
    def again(self) -> str:
        """Remedy for a tar."""
        if self.foreign:
            return INDEX_AGAIN
        return (
            "Delete the tar and its index, then copy both again from where the set came from, or run the conversion "
            "again: it makes the missing shards."
        )

    @property
    def index_again(self) -> str:
        """Remedy for an index."""
        if self.foreign:
            return "Run tools/index_shards.py on the folder."
        return "Copy it again from where the set came from, or delete it and run the conversion again."


@dataclass(frozen=True)
class Problem:
    """A problem of a shard.

    kind: for programs.
    what: for people, without the shard's name.
    remedy: what to do.
    samples: all samples or members concerned.
    """

    kind: str
    what: str
    remedy: str
    samples: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """The result for a shard.

    class_counts: samples by class id; () if the index cannot be trusted.
    bytes: of the shard, for rates.
    """

    name: str
    problems: tuple[Problem, ...]
    class_counts: tuple[int, ...]
    bytes: int


def check(item: Check) -> Verdict:
    """Check one shard. Problems of the shard never raise; they are in the verdict."""
    problems: list[Problem] = []
    index = _check_index(item, problems)
    try:
        with open(item.root / item.shard.name, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if size != item.shard.bytes:
                what = f"has {size} bytes, the manifest says {item.shard.bytes}: it is truncated or was replaced"
                problems.append(Problem("size", what, item.again))
            else:
                if index is not None:
                    checks = (_check_frame, _check_layout) if item.foreign else (_check_layout, _check_labels)
                    problems += checks[0](file, index, item) or checks[1](file, index, item)
                if item.full:
                    problems += _check_contents(file, index, item)
    except FileNotFoundError:
        problems.append(Problem("missing", "is missing", item.again))
    except OSError as error:
        remedy = "Check the file's permissions and the disk, then verify again."
        problems.append(Problem("unreadable", f"cannot be read ({error.strerror})", remedy))
    counts: tuple[int, ...] = ()
    if index is not None and not any(problem.kind == "label-range" for problem in problems):
        counts = tuple(np.bincount(index.labels, minlength=item.num_classes).tolist())
    return Verdict(item.shard.name, tuple(problems), counts, item.shard.bytes)


def _check_index(item: Check, problems: list[Problem]) -> Index | None:
    """The index; None if it is not the one that the manifest names."""
    path, shard = index_path(item.root / item.shard.name), item.shard

    def wrong(kind: str, what: str, names: tuple[str, ...] = ()) -> None:
        problems.append(Problem(kind, what, item.index_again, names))

    try:
        data = path.read_bytes()
    except FileNotFoundError:
        wrong("index-missing", f"its index {path.name} is missing")
        return None
    except OSError as error:
        what = f"its index {path.name} cannot be read ({error.strerror})"
        problems.append(Problem("unreadable", what, "Check the file's permissions and the disk."))
        return None
    if hashlib.sha256(data).hexdigest() != shard.index_sha256:
        wrong("index", f"its index {path.name} is not the one that the manifest names: it is damaged or of another set")
        return None
    try:
        index = parse_index(data, path.name)
    except UserError:
        wrong("index", f"its index {path.name} cannot be read")
        return None
    if len(index) != shard.samples:
        wrong("count", f"its index has {len(index)} samples, the manifest says {shard.samples}")
    if (index.about.get("bytes"), index.about.get("sha256")) != (shard.bytes, shard.sha256):
        wrong("index", "its index was written for a tar of another size or sha256 than the manifest's")
    if len(index) and not (0 <= index.labels.min() and index.labels.max() < item.num_classes):
        found = f"{index.labels.min()} … {index.labels.max()}"
        wrong("label-range", f"its index has labels {found}, but the set has classes 0 … {item.num_classes - 1}")
    if len(set(index.keys.tolist())) != len(index):
        wrong("duplicate", "a key occurs twice in its index")
    if (lacking := np.flatnonzero(index.image < 0)).size:
        names = tuple(index.keys[row].decode() for row in lacking)
        wrong("no-image", f"{_count(names, 'sample')} without an image", names)
    if item.store != images.ORIGINAL and has_clipped_images(index.about):
        what = "holds crops of 16-bit grey images that an earlier release clipped to white"
        problems.append(Problem("clipped", what, "Run the conversion again: the same command replaces this shard."))
    return index


def _check_layout(file: BinaryIO, index: Index, item: Check) -> list[Problem]:
    """Do the index's members fill the tar without a gap, does it end as a tar, and are a few headers correct?"""
    order = np.argsort(index.offset, kind="stable")
    starts, sizes = index.offset[order], index.size[order]
    ends = starts + sizes
    ends += -ends % _BLOCK
    before = np.append(0, ends)[: len(ends)]  # where the headers of each member begin
    gaps = starts - before
    # Our own shards have one header for each member and nothing else; others have PAX headers, folders, …
    fits = bool((gaps >= _BLOCK).all() if item.foreign else (gaps == _BLOCK).all())
    last = int(ends[-1]) if len(ends) else 0
    size, end = item.shard.bytes, int(index.about.get("end", last))
    if max(last, end) > size:
        what = f"has {size} bytes, but its index has members up to byte {last}: it was truncated before it was indexed"
        return [Problem("end", what, item.again)]
    if not fits or end < last:
        what = f"its index has {len(order)} members that do not follow each other as in a tar"
        return [Problem("count", what, item.index_again)]
    problems = []
    if problem := tarscan.end_problem(file, end):
        problems.append(Problem("end", problem[0], item.again))
    for at in sorted({int(at) for at in np.linspace(0, len(order) - 1, 5)} if len(order) else ()):
        name = _member_name(index, int(order[at]))
        found = tarscan.member_at(file, int(before[at]), int(starts[at]))
        if found is None or (found.name, found.size) != (name, sizes[at]):
            there = f"there is {found.name} of {found.size} bytes" if found else "there is no valid header"
            what = f"{name} of {sizes[at]} bytes should be at byte {starts[at]}, but {there}"
            problems.append(Problem("header", what, item.again))
    return problems


def _check_frame(file: BinaryIO, index: Index, item: Check) -> list[Problem]:
    """Are headers and labels of another program's tar those that were indexed?"""
    if "frame" not in index.about:
        what = "was indexed by an earlier version, which recorded no digest of its labels"
        return [Problem("old-index", what, item.index_again)]
    if frame_digest(file.fileno(), index) != index.about["frame"]:
        return [Problem("changed", "has other headers or labels than when it was indexed", item.again)]
    return []


def _check_labels(file: BinaryIO, index: Index, item: Check) -> list[Problem]:
    """Do the labels in our own tar agree with the index? A changed label need not change size and layout."""
    if item.full:
        return []  # _check_contents compares them
    found = _MemberProblems()
    rows = np.repeat(np.arange(len(index)), np.diff(index.first))
    number = index.extensions.index("cls") if "cls" in index.extensions else -1
    for member in np.flatnonzero(index.extension == number).tolist():
        data = os.pread(file.fileno(), int(index.size[member]), int(index.offset[member]))
        if reason := _label_problem(data, "cls", int(index.labels[rows[member]]), item):
            found.add("label", _member_name(index, member), reason)
    return found.problems(item)


def _member_name(index: Index, member: int) -> str:
    row = int(np.searchsorted(index.first, member, side="right")) - 1
    return f"{index.keys[row].decode()}.{index.extensions[int(index.extension[member])]}"


# --- every byte -----------------------------------------------------------------------------------------------------


class _MemberProblems:
    """Members by kind of problem; one Problem for each kind."""

    def __init__(self) -> None:
        self._names: dict[str, list[str]] = {}

    def add(self, kind: str, name: str, reason: str = "") -> None:
        self._names.setdefault(kind, []).append(f"{name} ({reason})" if reason else name)

    def problems(self, item: Check) -> list[Problem]:
        problems = []
        for kind, names in self._names.items():
            remedy = item.again
            if kind == "decode":
                remedy = (
                    "Get the shard again from where it came from, or write it without these samples; then run "
                    "tools/index_shards.py on the folder."
                    if item.foreign
                    else "If checksums agree, copying again does not help: remove or repair the image in the source, "
                    "and make the shard again."
                )
            what = {"crc": "with other bytes than were written", "decode": "that cannot be used"}
            noun = {"crc": "member", "decode": "image", "label": "label"}[kind]
            about = what.get(kind, "other than the index's")
            problems.append(Problem(kind, f"{_count(names, noun)} {about}: {_some(names)}", remedy, tuple(names)))
        return problems


def _check_contents(file: BinaryIO, index: Index | None, item: Check) -> list[Problem]:
    """One pass over the bytes, in the order of the tar; then the headers, which are in the page cache by now."""
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # Pillow's warnings about unusual metadata
    digest = hashlib.sha256() if item.shard.sha256 else None
    found = _MemberProblems()
    places, rows, image_members = [], np.array([], np.int64), set()
    if index is not None:
        places = list(zip(index.offset.tolist(), index.size.tolist(), strict=True))
        rows = np.repeat(np.arange(len(index)), np.diff(index.first))
        image_members = set(index.image.tolist())
    for member, data in tarscan.read_members(file, places, item.shard.bytes, digest):
        assert index is not None
        name, extension = _member_name(index, member), index.extensions[int(index.extension[member])]
        if len(data) < places[member][1] or (len(index.crc32) and zlib.crc32(data) != int(index.crc32[member])):
            found.add("crc", name)
        elif member in image_members:
            if reason := _image_problem(data, extension, item):
                found.add("decode", name, reason)
        elif reason := _label_problem(data, extension, int(index.labels[rows[member]]), item):
            found.add("label", name, reason)
    problems = found.problems(item)
    if digest and digest.hexdigest() != item.shard.sha256:
        problems.append(Problem("sha256", "its sha256 is not the manifest's", item.again))
    return problems + _check_headers(index, item)


def _check_headers(index: Index | None, item: Check) -> list[Problem]:
    """Every header, against the index."""
    try:
        contents = tarscan.scan(item.root / item.shard.name)
    except UserError as error:
        return [Problem("headers", f"cannot be scanned: {str(error).removesuffix('.')}", item.again)]
    if index is None:
        return []
    places = zip(index.offset.tolist(), index.size.tolist(), strict=True)
    named = {offset: (_member_name(index, i), size) for i, (offset, size) in enumerate(places)}
    left_out = {entry.get("name") for entry in index.about.get("bad", ())}
    there = {member.offset: (member.name, member.size) for member in contents.members if member.key not in left_out}
    if named == there:
        return []
    differing = sorted(offset for offset in named.keys() | there.keys() if named.get(offset) != there.get(offset))
    names = tuple((named.get(offset) or there[offset])[0] for offset in differing)
    what = f"{_count(names, 'member')} of the tar and its index differ in name, place or size: {_some(names)}"
    return [Problem("table", what, item.again, names)]


def _image_problem(data: bytes, extension: str, item: Check) -> str:
    try:
        if extension == images.RAW:
            images.pixels(data, extension, item.image_size or 0)
            return ""
        height, width = images.decode(data).shape[1:]
    except UserError as error:
        return str(error)
    if item.store != images.ORIGINAL and (height, width) != (item.image_size, item.image_size):
        return f"a crop of {width}×{height}, not {item.image_size}×{item.image_size}"
    return ""


def _label_problem(data: bytes, extension: str, label: int, item: Check) -> str:
    """How a member with a label differs from the index; "" if it agrees, or is not the place of the labels."""
    if extension not in ("cls", "json") or item.label_from not in ("", extension):
        return ""
    if extension == "cls":
        number, shown = labels.class_id_of(data), repr(data[:20])
    else:
        content = labels.json_object(data)
        if content is None:
            return "not a JSON object"
        value = content.get(item.label_field)
        if value is None and not item.label_from:
            return ""
        number, shown = labels.class_id_in(value), f"{value!r}"[:40]
    if number is not None and item.class_ids:
        number = item.class_ids[number] if number < len(item.class_ids) else None
    return "" if number == label else f"{shown}, index {label}"


def _count(names: Sequence[str], noun: str) -> str:
    return f"{len(names)} {noun}{'s' * (len(names) != 1)}"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
