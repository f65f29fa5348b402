"""Finds the labels of shards of other programs: in a .cls, a field of the .json, or the key."""

from __future__ import annotations

import bisect
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, NamedTuple

from cfmask.convert import tarscan
from cfmask.data import images
from cfmask.errors import UserError

LABEL_FIELDS = ("label", "cls", "class_id", "class")
# If a sample has several images, a photograph goes before a mask of it. An .npy is usually an embedding.
IMAGES = ("jpg", "jpeg", *(name for name in images.MEMBERS if name not in ("jpg", "jpeg", images.RAW)))
LABEL_OPTIONS = (
    "Choose the place of the labels: --label-from cls (a number in a .cls), --label-from json with --label-field NAME "
    "(a number in the .json), or --label-from key (n01440764_10026, n01440764/10026). Captions are not labels."
)

Fields = dict[str, tarscan.Member]
"""Members of a sample by extension."""


class LabelSource(NamedTuple):
    """place: "cls", "json" or "key". field: of the json."""

    place: str
    field: str = ""


def group(tar: Path, members: Sequence[tarscan.Member]) -> tuple[dict[str, Fields], int]:
    """Samples in order of first appearance, and the number of samples whose members are interleaved with those of
    others (WebDataset's readers would split them).
    """
    samples: dict[str, Fields] = {}
    split: set[str] = set()
    before = None
    for member in members:
        fields = samples.setdefault(member.key, {})
        if member.extension in fields:
            raise UserError(
                f"{tar} holds {member.name} twice: two samples have the same key, or the tar was appended to. Write "
                f"the shard again, with a unique key for each sample."
            )
        if fields and member.key != before:
            split.add(member.key)
        fields[member.extension] = member
        before = member.key
    return samples, len(split)


def list_left_out(samples: dict[str, Fields], unseen: Sequence[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """(name, reason) of each sample without an image, and of each image that belongs to no sample.

    Args:
        unseen: of ``tarscan.Contents``.
    """
    hidden: dict[str, tuple[str, str]] = {}
    for name, reason in unseen:
        key, extension = tarscan.split_name(re.sub(r"[\s/]+$", "", name)) or (name, "")
        # If an image and its label are both links, they are one sample.
        if key not in hidden or extension in IMAGES:
            hidden[key] = name, reason
    yield from (entry for key, entry in hidden.items() if key not in samples)
    for key, fields in samples.items():
        image = image_of(fields)
        dotted = [member.name for name, member in fields.items() if "." in name and name.rpartition(".")[2] in IMAGES]
        if image is None:
            if key in hidden:
                reason = "{} is {}".format(*hidden[key])
            else:
                reason = _dots(dotted) if dotted else f"no image among its members ({', '.join(fields)})"
            yield key, reason
        else:
            # "1.png" beside "jpg" is usually a mask of it; "2.jpg" may be the image of another sample.
            for name in dotted:
                if name.endswith(f".{image}"):
                    yield name, _dots([name])


def _dots(names: Sequence[str]) -> str:
    return (
        f"a key ends at the first dot of a file's name, so {', '.join(names[:3])}{' …' if len(names) > 3 else ''} "
        f"cannot be the image of a sample: write the shard again with names that have one dot"
    )


def image_of(fields: Fields) -> str | None:
    return next((name for name in IMAGES if name in fields), None)


def _read(file: BinaryIO, member: tarscan.Member) -> bytes:
    return os.pread(file.fileno(), member.size, member.offset)


def _json(file: BinaryIO, fields: Fields) -> dict[str, Any] | None:
    """The content of a sample's .json; {} without a .json, None if it is not a JSON object."""
    return json_object(_read(file, fields["json"])) if "json" in fields else {}


def json_object(data: bytes) -> dict[str, Any] | None:
    """The JSON object in ``data``; None if there is none."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):  # ValueError also for numbers of thousands of digits and for other encodings
        return None
    return found if isinstance(found, dict) else None


def class_id_of(data: bytes) -> int | None:
    """The class id in a ``.cls`` member, in decimal digits; None for other contents."""
    return int(data) if re.fullmatch(rb"\s*\d{1,9}\s*", data) else None


def class_id_in(value: Any) -> int | None:
    """The class id in a value of a ``.json``: a whole number, also as a float (tables with missing values turn 3 into
    3.0); None for other values, including true and false."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 10**9:  # false for nan
        return None
    return int(value) if value == int(value) else None


def label_of_key(key: str, ids: dict[str, int]) -> int | None:
    """The class of a key that begins with a class name (n01440764_10026, Faces_easy_0001), lies in the folder of one
    (n01440764/10026), or both.

    If the key begins with several class names, the longest counts. None if the class is ambiguous.
    """
    *folders, name = key.split("/")
    ends = [at for at in range(1, len(name) + 1) if name[:at] in ids and not name[at : at + 1].isalpha()]
    found = {ids[folders[-1]]} if folders and folders[-1] in ids else set()
    if ends:
        longest = ends[-1]
        # "Faces_easy-1" may be of Faces or of Faces_easy; "a_1" may be image 1 of the class a, or of the class a_1.
        clear = name[longest : longest + 1] == "_" or (longest == len(name) and len(ends) == 1)
        if clear:
            found.add(ids[name[:longest]])
        elif any(name[at : at + 1] in ("_", "") for at in ends):
            return None
    return found.pop() if len(found) == 1 else None


def _loose(name: str) -> str:
    return re.sub(r"[\W_]", "_", name.lower())


def loosely_longer(ids: dict[str, int]) -> dict[int, tuple[str, ...]]:
    """For each class whose name begins another one except for case, spaces and punctuation ("Faces" and "faces easy"):
    loose spellings of the longer names, by class id. ``label_of_key`` handles exact beginnings."""
    spellings = sorted((_loose(name), name) for name in ids)
    found = {}
    for name, class_id in ids.items():
        begin = _loose(name) + "_"
        at, longer = bisect.bisect_left(spellings, (begin, "")), []
        while at < len(spellings) and spellings[at][0].startswith(begin):
            longer += [spellings[at][0]] if not spellings[at][1].startswith(f"{name}_") else []
            at += 1
        if longer:
            found[class_id] = tuple(longer)
    return found


def label_of(
    file: BinaryIO,
    key: str,
    fields: Fields,
    source: LabelSource,
    ids: dict[str, int],
    longer: Mapping[int, tuple[str, ...]] = MappingProxyType({}),
) -> int | str:
    """A sample's class id, or the reason why it has none. longer: from ``loosely_longer``, for labels from keys."""
    if source.place == "key":
        label = label_of_key(key, ids)
        *folders, name = key.split("/")
        is_in_folder = bool(folders) and folders[-1] in ids
        if label is None or (not is_in_folder and _loose(name).startswith(longer.get(label, ()))):
            return "its key does not begin with exactly one class of the list"
        return label
    if source.place not in fields:
        return f"it has no .{source.place} (it has {', '.join(fields)})"
    data = _read(file, fields[source.place])
    if source.place == "cls":
        found, problem = class_id_of(data), f"its .cls is {_shown(data)}, not a number in decimal digits"
    else:
        content = json_object(data)
        if content is None:
            return f"its .json is not a JSON object: {_shown(data)}"
        if source.field not in content:
            return f"its .json has no field {source.field!r} (it has {', '.join(content) or 'none'})"
        value = content[source.field]
        found, problem = class_id_in(value), f"its .json's field {source.field!r} is {_shown(value)}, not a class id"
    return problem if found is None else found


def _shown(value: object) -> str:
    try:
        shown = repr(value)
    except ValueError:  # an integer of thousands of digits
        return "a number of thousands of digits"
    return shown if len(shown) <= 40 else f"{shown[:40]}…"


def find_label_source(tars: Sequence[Path], asked: str | None, field: str | None, ids: dict[str, int]) -> LabelSource:
    """The place of the labels of all shards, from the first samples of the first shard with images.

    Args:
        asked, field: by flags.
    """
    if asked in ("cls", "key"):
        return LabelSource(asked)
    if field is not None:
        return LabelSource("json", field)
    reason = ""
    for tar in tars:
        contents = tarscan.scan(tar)
        samples, _ = group(tar, contents.members)
        reason = reason or next((why for _, why in list_left_out(samples, contents.unseen)), "")
        if kept := [(key, fields) for key, fields in samples.items() if image_of(fields)][:100]:
            return _label_source(tar, kept, asked, ids)
    raise no_images(tars[0].parent, reason)


def _label_source(tar: Path, samples: list[tuple[str, Fields]], asked: str | None, ids: dict[str, int]) -> LabelSource:
    with open(tar, "rb", buffering=0) as file:
        key, fields = samples[0]
        content = _json(file, fields) or {}
        named = next((name for name in LABEL_FIELDS if class_id_in(content.get(name)) is not None), None)
        if asked is None and "cls" in fields:
            for key, fields in samples if named else ():
                ours = label_of(file, key, fields, LabelSource("cls"), ids)
                theirs = (_json(file, fields) or {}).get(str(named))
                if ours != class_id_in(theirs):
                    raise UserError(
                        f"Sample {key} of {tar} has the label {ours} in its .cls and {theirs} in its .json's field "
                        f"{named!r}. Choose one: --label-from cls, or --label-from json."
                    )
            return LabelSource("cls")
        if named:
            return LabelSource("json", named)
        if asked is None and label_of_key(key, ids) is not None:
            return LabelSource("key")
        raise UserError(
            f"Sample {key} of {tar} has no label: it has {', '.join(fields)}; its .json has the fields "
            f"{', '.join(content) or '(none)'}, and none of {', '.join(LABEL_FIELDS)} is a number"
            f"{'; its key does not begin with a wnid or class' if asked is None else ''}. {LABEL_OPTIONS}"
        )


def no_images(folder: Path, reason: str) -> UserError:
    """reason: of a sample that is left out, "" if there is no sample."""
    return UserError(
        f"No sample of {folder} has an image (a member called {', '.join(IMAGES)})"
        f"{f'. The first sample: {reason}' if reason else ''}."
    )
