"""Where the labels of shards of another program are: a .cls, a field of the .json, or the key."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from cfmask.convert import tarscan
from cfmask.data import images
from cfmask.errors import UserError

LABEL_FIELDS = ("label", "cls", "class_id", "class")
# Where a sample has several images, a photograph goes before a mask of it. An .npy is an embedding more often than not.
IMAGES = ("jpg", "jpeg", *(name for name in images.MEMBERS if name not in ("jpg", "jpeg", images.RAW)))
LABEL_OPTIONS = (
    "Say where the labels are: --label-from cls (a number in a .cls), --label-from json with --label-field NAME (a "
    "number in the .json), or --label-from key (n01440764_10026, n01440764/10026); captions alone are no labels."
)

Fields = dict[str, tarscan.Member]


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


def class_id_of(data: bytes) -> int | None:
    """The number that a ``.cls`` member is; None for anything else."""
    return int(data) if re.fullmatch(rb"\s*\d{1,9}\s*", data) else None


def _is_label(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def label_of_key(key: str, ids: dict[str, int]) -> int | None:
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
        found = class_id_of(data)
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
    found = label_of_key(key, ids)
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
            if asked is None and label_of_key(key, ids) is not None:
                return Label("key")
            raise UserError(
                f"Sample {key} of {tar} has no label: it has {', '.join(fields)}, its .json has the fields "
                f"{', '.join(facts) or '(none)'}, of which none of {', '.join(LABEL_FIELDS)} is a number"
                f"{', and its key does not begin with a wnid' if asked is None else ''}. {LABEL_OPTIONS}"
            )
    raise no_images(tars[0].parent)


def no_images(folder: Path) -> UserError:
    return UserError(
        f"No sample of {folder} has an image (a member called {', '.join(IMAGES)}): there is nothing to train on."
    )
