#!/usr/bin/env python3
"""Make shards of another program (img2dataset, timm, WebDataset's ShardWriter, …) readable: an index beside each, and a
manifest. The tars stay as they are; their headers and their labels are read, no images.

    python tools/index_shards.py DIR                                labels from .cls, or .json, or wnids in the keys
    python tools/index_shards.py DIR --label-field class_id --classes names.tsv
    python tools/index_shards.py DIR --checksums                    reads everything once, so that rot is found later

    DIR/00000.tar   00000.index.safetensors  …  manifest.json  bad_samples.jsonl (samples without an image)

DIR is one split. Shards that have their index already are skipped: stopped at any moment, the same command goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402
from tqdm import tqdm  # noqa: E402

from cfmask.data import imagenet, images, shards, tarscan  # noqa: E402
from cfmask.errors import UserError, exits_cleanly  # noqa: E402
from cfmask.files import write_atomically  # noqa: E402
from tools._array import run_here  # noqa: E402

TOOL = "index_shards"
BAD_SAMPLES = "bad_samples.jsonl"
LABEL_FIELDS = ("label", "cls", "class_id", "class")
# Where a sample has several images, a photograph goes before a mask of it. An .npy is an embedding more often than not.
IMAGES = ("jpg", "jpeg", *(name for name in images.MEMBERS if name not in ("jpg", "jpeg", images.RAW)))
_OPTIONS = (
    "Say where the labels are: --label-from cls (a number in a .cls), --label-from json with --label-field NAME (a "
    "number in the .json), or --label-from key (n01440764_10026, n01440764/10026); captions alone are no labels."
)

Classes = tuple[tuple[str, str], ...]
Fields = dict[str, tarscan.Member]


# --- samples and their labels ---------------------------------------------------------------------------------------


class Label(NamedTuple):
    """Where labels come from: "cls", "json" (then ``field``) or "key"."""

    source: str
    field: str = ""


def group(tar: Path, members: Sequence[tarscan.Member]) -> tuple[dict[str, Fields], int]:
    """Samples in order of first appearance, and how many have members of others between theirs: those WebDataset itself
    would split.

    Raises:
        UserError: a member is there twice.
    """
    samples: dict[str, Fields] = {}
    split: set[str] = set()
    before = None
    for member in members:
        fields = samples.setdefault(member.key, {})
        if member.extension in fields:
            raise UserError(
                f"{tar} holds {member.name} twice: two samples have one key, or the tar was appended to. No reader can "
                f"tell them apart; write the shard again, with keys of its own for each sample."
            )
        if fields and member.key != before:
            split.add(member.key)
        fields[member.extension] = member
        before = member.key
    return samples, len(split)


def image_of(fields: Fields) -> str | None:
    return next((name for name in IMAGES if name in fields), None)


def _read(file: BinaryIO, member: tarscan.Member) -> bytes:
    return os.pread(file.fileno(), member.size, member.offset)


def _json(file: BinaryIO, fields: Fields) -> dict[str, Any]:
    try:
        found = json.loads(_read(file, fields["json"])) if "json" in fields else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _is_label(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _label_of_key(key: str, ids: dict[str, int]) -> int | None:
    """n01440764_10026 and n01440764/10026 both say it; so may both at once, if they agree."""
    parts = key.split("/")
    found = {ids[name] for name in (parts[-1].partition("_")[0], *parts[-2:-1]) if name in ids}
    return found.pop() if len(found) == 1 else None


def label_of(file: BinaryIO, key: str, fields: Fields, label: Label, ids: dict[str, int]) -> int | str:
    """A sample's class id; or why it has none, in words."""
    if label.source == "cls":
        if "cls" not in fields:
            return f"it has no .cls (it has {', '.join(fields)})"
        data = _read(file, fields["cls"])
        found = tarscan.parse_label(data)
        return f"its .cls is {data[:30]!r}, no number" if found is None else found
    if label.source == "json":
        facts = _json(file, fields)
        if not _is_label(facts.get(label.field)):
            return (
                f"its .json's field {label.field!r} is {facts[label.field]!r}, no class number"
                if label.field in facts
                else f"its .json has no field {label.field!r} (it has {', '.join(facts) or 'none'})"
                if "json" in fields
                else f"it has no .json (it has {', '.join(fields)})"
            )
        return facts[label.field]
    found = _label_of_key(key, ids)
    return "its key does not begin with a class of the list (or with two)" if found is None else found


def find_label(tars: Sequence[Path], asked: str | None, field: str | None, ids: dict[str, int]) -> Label:
    """Where the labels of all shards come from, from the first samples of the first shard that has any with an image.

    Raises:
        UserError: from nowhere; or the .cls and the .json differ.
    """
    if asked in ("cls", "key"):
        return Label(asked)
    if field is not None:
        return Label("json", field)
    for tar in tars:
        samples, _ = group(tar, tarscan.scan(tar).members)
        kept = [(key, fields) for key, fields in samples.items() if image_of(fields)][:100]
        if not kept:
            continue
        with open(tar, "rb", buffering=0) as file:
            key, fields = kept[0]
            facts = _json(file, fields)
            named = next((name for name in LABEL_FIELDS if _is_label(facts.get(name))), None)
            if asked is None and "cls" in fields:
                for key, fields in kept if named else ():
                    ours = label_of(file, key, fields, Label("cls"), ids)
                    theirs = _json(file, fields).get(str(named))
                    if ours != theirs:
                        raise UserError(
                            f"Sample {key} of {tar} has the label {ours} in its .cls and {theirs} in its .json's field "
                            f"{named!r}. Say which is meant: --label-from cls, or --label-from json."
                        )
                return Label("cls")
            if named:
                return Label("json", named)
            if asked is None and _label_of_key(key, ids) is not None:
                return Label("key")
            raise UserError(
                f"Sample {key} of {tar} has no label: it has {', '.join(fields)}, its .json has the fields "
                f"{', '.join(facts) or '(none)'}, of which none of {', '.join(LABEL_FIELDS)} is a number"
                f"{', and its key does not begin with a wnid' if asked is None else ''}. {_OPTIONS}"
            )
    raise _no_images(tars[0].parent)


def _no_images(folder: Path) -> UserError:
    return UserError(
        f"No sample of {folder} has an image (a member called {', '.join(IMAGES)}): there is nothing to train on."
    )


# --- one shard ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A shard to index. ids: class id by folder (wnid), for labels from keys. settings: what its index depends on."""

    tar: Path
    label: Label
    ids: dict[str, int]
    checksums: bool
    settings: str


def is_indexed(task: Task) -> bool:
    """Whether an index of this very tar and these settings is there."""
    try:
        about = shards.load_index(task.tar).about
        stat = task.tar.stat()
        return (
            (about["bytes"], about["mtime_ns"], about["settings"]) == (stat.st_size, stat.st_mtime_ns, task.settings)
        ) and (bool(about["sha256"]) or not task.checksums)
    except (UserError, OSError, KeyError):
        return False


def index_shard(task: Task) -> int:
    """Scan a shard and write its index; return the tar's size in bytes.

    Raises:
        UserError: it is no whole tar, a label is missing, a member is there twice, or the index cannot be written.
    """
    tar = task.tar
    try:
        with open(tar, "rb", buffering=0) as file:
            stat = os.fstat(file.fileno())
            contents = tarscan.scan(tar)
            index = _index(task, file, contents, stat)
            after = os.stat(tar)
    except OSError as error:
        raise UserError(f"{tar} cannot be read ({error.strerror}).") from None
    if (after.st_size, after.st_mtime_ns) != (stat.st_size, stat.st_mtime_ns):
        raise UserError(f"{tar} changed while it was being read. Wait until its writer is done, then run this again.")
    try:
        shards.write_index(shards.index_path(tar), index)
    except OSError as error:
        raise UserError(f"The index of {tar} cannot be written beside it ({error.strerror}).") from None
    return stat.st_size


def _index(task: Task, file: BinaryIO, contents: tarscan.Contents, stat: os.stat_result) -> shards.Index:
    samples, split = group(task.tar, contents.members)
    keys: list[bytes] = []
    labels: list[int] = []
    first = [0]
    members: list[tarscan.Member] = []
    bad: list[dict[str, Any]] = []
    several = wnids = agreeing = 0
    of_wnid = {wnid: i for i, wnid in enumerate(imagenet.wnids())}
    for key, fields in samples.items():
        image = image_of(fields)
        if image is None:
            reason = f"no image among its members ({', '.join(fields)})"
            bad.append({"name": key, "shard": task.tar.name, "reason": reason})
            continue
        found = label_of(file, key, fields, task.label, task.ids)
        if isinstance(found, str):
            raise UserError(f"Sample {key} of {task.tar} has no label: {found}. {_OPTIONS}")
        several += sum(name in fields for name in IMAGES) > 1
        wnid = _label_of_key(key, of_wnid)
        wnids, agreeing = wnids + (wnid is not None), agreeing + (wnid == found)
        keys.append(key.encode())
        labels.append(found)
        # The first image of a row is what readers take for its image.
        members += [fields[image], *(member for name, member in fields.items() if name != image)]
        first.append(len(members))
    extensions = tuple(dict.fromkeys(member.extension for member in members))
    if len(extensions) > 256:
        raise UserError(
            f"{task.tar} has {len(extensions)} kinds of members, such as {members[-1].name}: a key ends at its first "
            f"dot, so names must not have other dots. Write the shards again with keys without dots."
        )
    numbers = {name: i for i, name in enumerate(extensions)}
    crc32, sha256 = _checksums(file, members, stat.st_size) if task.checksums else ([], "")
    return shards.Index(
        keys=np.array(keys, dtype=np.bytes_),
        labels=np.array(labels, np.int32),
        first=np.array(first, np.int64),
        extensions=extensions,
        extension=np.array([numbers[member.extension] for member in members], np.uint8),
        offset=np.array([member.offset for member in members], np.int64),
        size=np.array([member.size for member in members], np.int64),
        crc32=np.array(crc32, np.uint32),
        about={
            "tool": TOOL,
            "settings": task.settings,
            "bytes": stat.st_size,
            "mtime_ns": stat.st_mtime_ns,
            "sha256": sha256,
            "end": contents.end,
            "bad": bad,
            "split": split,
            "several_images": several,
            "wnids": [agreeing, wnids],
        },
    )


def _checksums(file: BinaryIO, members: Sequence[tarscan.Member], size: int) -> tuple[list[int], str]:
    """CRC of each member, sha256 of the whole tar, in one pass."""
    crc32 = [0] * len(members)
    digest = hashlib.sha256()
    at = 0

    def read(until: int) -> Iterator[bytes]:
        nonlocal at
        while at < until and (part := os.pread(file.fileno(), min(until - at, 1 << 22), at)):
            digest.update(part)
            at += len(part)
            yield part

    for i in sorted(range(len(members)), key=lambda i: members[i].offset):
        for _ in read(members[i].offset):
            pass
        for part in read(members[i].offset + members[i].size):
            crc32[i] = zlib.crc32(part, crc32[i])
    for _ in read(size):
        pass
    return crc32, digest.hexdigest()


# --- the set --------------------------------------------------------------------------------------------------------


def find_tars(folder: Path) -> list[Path]:
    """The shards of a folder, by name.

    Raises:
        UserError: there are none, some are compressed, they are of several splits or of make_shards, or the folder
            cannot be written to.
    """
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}.")
    tars = sorted(path for path in folder.glob("*.tar") if not path.name.startswith("."))
    packed = sorted(path for path in folder.iterdir() if re.search(r"\.(tgz|tar\.\w+)$", path.name))
    if packed:
        raise UserError(
            f"{packed[0]} is compressed, and samples of a compressed tar cannot be found by offset. Unpack what is "
            f"compressed there (gunzip leaves a .tar; images do not get smaller by it anyway)."
        )
    if not tars:
        inside = sorted({str(path.parent) for path in folder.glob("*/*.tar")})
        where = f"; there are some in {', '.join(inside)}: index each of these" if inside else ""
        raise UserError(f"{folder} holds no .tar files{where}.")
    by_split: dict[str, str] = {}
    for tar in tars:
        words = set(re.split(r"[^a-z]+", tar.name.lower())) & {"train", "val", "valid", "validation", "test"}
        by_split.setdefault(" ".join(sorted(words)), tar.name)
    if len(by_split) > 1:
        raise UserError(
            f"{folder} holds shards of several splits ({', '.join(sorted(by_split.values()))}), and a set is one split "
            f"in one folder. Move each into a folder of its own, or make such folders of symbolic links (mkdir val; ln "
            f"-s ../NAME*.tar val/) and index those."
        )
    _refuse_own(folder, tars)
    if not os.access(folder, os.W_OK):
        raise UserError(
            f"{folder} cannot be written to, and indexes go beside their tars. Make a folder elsewhere with symbolic "
            f"links to them (ln -s {folder}/*.tar .) and index that."
        )
    return tars


def _refuse_own(folder: Path, tars: Sequence[Path]) -> None:
    path = folder / shards.MANIFEST
    try:
        tool = json.loads(path.read_text())["made"].get("tool")
    except FileNotFoundError:
        try:
            tool = shards.load_index(tars[0]).about.get("tool", "make_shards")
        except UserError:
            return
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        raise UserError(f"{path} cannot be read. If it belongs to nobody, delete it and run this again.") from None
    if tool != TOOL:
        raise UserError(
            f"The shards in {folder} have their indexes from {tool}, and labels, classes and checksums with them: use "
            f"them as they are. If they have no manifest, run their conversion again: it makes what is missing."
        )


def choose_classes(given: Classes | None, label: Label, indexes: dict[Path, shards.Index]) -> Classes:
    """The class list that goes into the manifest.

    ImageNet's without being asked for only where something says so: wnids in the keys that agree with the labels, or a
    sample of each of the labels 0 … 999.

    Raises:
        UserError: nothing says which classes the labels are, or a label is outside the list.
    """
    classes = given or imagenet.classes()
    every: set[int] = set()
    for tar, index in indexes.items():
        every.update(np.unique(index.labels).tolist())
        if (outside := np.flatnonzero(index.labels >= len(classes))).size and given:
            row = int(outside[0])
            raise UserError(
                f"Sample {index.keys[row].decode()} of {tar} has the label {index.labels[row]}, and --classes has "
                f"classes 0 … {len(classes) - 1}: it is another list, or the labels count from 1."
            )
    if not every:
        raise _no_images(next(iter(indexes)).parent)
    agreeing, wnids = np.sum([index.about["wnids"] for index in indexes.values()], axis=0)
    if given or label.source == "key":
        return classes
    if wnids and agreeing == wnids and max(every) < len(classes):
        return classes
    if not wnids and every == set(range(len(classes))):
        print("There is a sample of each label 0 … 999: they are taken for ImageNet's classes.")
        return classes
    why = (
        f"{wnids - agreeing} of {wnids} keys have a wnid whose place in ImageNet's list is another than the label"
        if agreeing != wnids
        else "nothing says which classes they are"
    )
    raise UserError(
        f"The labels are {min(every)} … {max(every)}, and {why}. Give a class list with --classes FILE (a line "
        f"`folder<TAB>display name` a class, class 0 first), or --classes imagenet if they are ImageNet's in its "
        f"order; the indexes are kept, so it takes a moment."
    )


def commit(folder: Path, split: str, tars: Sequence[Path], given: Classes | None, label: Label) -> shards.Manifest:
    """The list of bad samples and the manifest, from the indexes."""
    entries = {tar: shards.shard_and_index(tar) for tar in tars}
    indexes = {tar: index for tar, (_, index) in entries.items()}
    bad = [entry for index in indexes.values() for entry in index.about["bad"]]
    classes = choose_classes(given, label, indexes)
    checksums = all(shard.sha256 for shard, _ in entries.values())
    manifest = shards.Manifest(
        root=folder,
        split=split,
        store=images.ORIGINAL,
        classes=classes,
        class_counts=shards.class_counts_of(indexes.values(), len(classes)),
        shards=tuple(shard for shard, _ in entries.values()),
        bad_samples=len(bad),
        made={"tool": TOOL, "label_from": label.source, "label_field": label.field, "checksums": checksums},
    )
    try:
        if bad:
            write_atomically(folder / BAD_SAMPLES, "".join(json.dumps(entry) + "\n" for entry in bad))
        else:
            (folder / BAD_SAMPLES).unlink(missing_ok=True)
        shards.write_manifest(manifest)
    except OSError as error:
        raise UserError(f"The manifest of {folder} cannot be written ({error.strerror}).") from None
    for what, entry in (
        ("samples are split by others in the tar: our reader puts them together, WebDataset itself would not", "split"),
        (f"samples have several images: the first of {', '.join(IMAGES)} is used", "several_images"),
    ):
        if count := sum(index.about[entry] for index in indexes.values()):
            print(f"{count} {what}")
    if bad:
        print(f"{len(bad)} samples have no image and are left out; {folder / BAD_SAMPLES} lists them")
    return manifest


# --- command line ---------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("folder", type=Path, metavar="DIR", help="folder with the tars of one split")
    p.add_argument("--split", metavar="NAME", help="what the split is called (default: the folder's name)")
    p.add_argument(
        "--label-from",
        choices=("cls", "json", "key"),
        help="where labels are (default: the first of these that the first sample has)",
    )
    p.add_argument(
        "--label-field",
        metavar="NAME",
        help=f"the json's field that is the label (default: the first of {', '.join(LABEL_FIELDS)} that is a number)",
    )
    p.add_argument(
        "--classes",
        metavar="FILE",
        help="a line `folder<TAB>display name` a class, class 0 first; or `imagenet` (default: ImageNet, where the "
        "keys' wnids or all of the labels 0 … 999 say so)",
    )
    p.add_argument(
        "--checksums", action="store_true", help="read everything, and record CRC and sha256 for verify_shards --full"
    )
    p.add_argument("--workers", type=int, metavar="N", help="processes on this machine (default: all cores)")
    return p


@exits_cleanly
def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.workers is not None and args.workers < 1:
        raise UserError("--workers must be at least 1.")
    if args.label_field is not None and args.label_from not in (None, "json"):
        raise UserError(f"--label-field is of the json, and --label-from is {args.label_from}: leave one of them out.")
    folder = args.folder.expanduser().absolute()
    tars = find_tars(folder)
    classes: Classes | None = None
    if args.classes == "imagenet":
        classes = imagenet.classes()
    elif args.classes:
        from tools.make_shards import read_classes

        classes = read_classes(Path(args.classes).expanduser())
    ids = {name: i for i, (name, _) in enumerate(classes or imagenet.classes())}
    label = find_label(tars, args.label_from, args.label_field, ids)
    # Of the class list, only labels from keys depend.
    listed = hashlib.sha256(json.dumps(list(ids)).encode()).hexdigest()[:16] if label.source == "key" else ""
    settings = json.dumps([*label, listed])
    tasks = [Task(tar, label, ids if listed else {}, args.checksums, settings) for tar in tars]
    missing = [task for task in tasks if not is_indexed(task)]
    if len(missing) < len(tasks):
        print(f"{len(tasks) - len(missing)} of {len(tasks)} shards have their index already")
    try:
        index_all(missing, args.workers or len(os.sched_getaffinity(0)))
    except KeyboardInterrupt:
        print("\nFinished indexes are kept; the same command goes on from here.", file=sys.stderr)
        raise
    manifest = commit(folder, args.split or folder.name, tars, classes, label)
    source = f"the json's {label.field!r}" if label.source == "json" else f"the {label.source}"
    print(
        f"{folder}: {manifest.num_samples} samples of {sum(n > 0 for n in manifest.class_counts)} classes (of "
        f"{manifest.num_classes}), labels from {source}, shards: {len(tars)}, {tarscan.shown_size(manifest.num_bytes)}"
    )
    return 0


def index_all(tasks: list[Task], workers: int) -> None:
    begun, done = time.monotonic(), 0
    pace = 0.1 if sys.stderr.isatty() else 10
    with tqdm(
        total=len(tasks), desc="indexing", unit=" shards", mininterval=pace, dynamic_ncols=True, disable=not tasks
    ) as bar:

        def progress(size: int) -> None:
            nonlocal done
            done += size
            bar.set_postfix_str(f"{done / 1e6 / (time.monotonic() - begun):.0f} MB/s", refresh=False)
            bar.update()

        run_here(index_shard, tasks, workers=workers, progress=progress)


if __name__ == "__main__":
    sys.exit(main())
