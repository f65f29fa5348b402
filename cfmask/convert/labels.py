"""Where the labels of shards of another program are: a .cls, a field of the .json, or the key."""

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


def left_out(samples: dict[str, Fields], unseen: Sequence[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """(name, reason) of each sample without an image, and of each further image that is of no sample.

    Args:
        unseen: as of ``tarscan.Contents``.
    """
    hidden: dict[str, tuple[str, str]] = {}
    for name, reason in unseen:
        key, extension = tarscan.split_name(re.sub(r"[\s/]+$", "", name)) or (name, "")
        # An image and its label may both be links: that is one sample.
        if key not in hidden or extension in IMAGES:
            hidden[key] = name, reason
    yield from (entry for key, entry in hidden.items() if key not in samples)
    links = {key: f"{name} is {reason}" for key, (name, reason) in hidden.items() if key in samples}
    for key, fields in samples.items():
        image = image_of(fields)
        dotted = [member.name for name, member in fields.items() if "." in name and name.rpartition(".")[2] in IMAGES]
        if image is None:
            yield (
                key,
                links.get(key) or (_dots(dotted) if dotted else f"no image among its members ({', '.join(fields)})"),
            )
        else:
            # "1.png" beside "jpg" is a mask of it, as a rule; "2.jpg" may be another sample's image.
            for name in dotted:
                if name.endswith(f".{image}"):
                    yield name, _dots([name])


def _dots(names: Sequence[str]) -> str:
    return (
        f"a key ends at the first dot of a file's name, so that {', '.join(names[:3])}{' …' if len(names) > 3 else ''} "
        f"{'is' if len(names) == 1 else 'are'} no sample's image: write the shard again with names that have one dot"
    )


def image_of(fields: Fields) -> str | None:
    return next((name for name in IMAGES if name in fields), None)


def _read(file: BinaryIO, member: tarscan.Member) -> bytes:
    return os.pread(file.fileno(), member.size, member.offset)


def _json(file: BinaryIO, fields: Fields) -> dict[str, Any] | None:
    """The fields of a sample's .json; None if it is no JSON object."""
    return json_fields(_read(file, fields["json"])) if "json" in fields else {}


def json_fields(data: bytes) -> dict[str, Any] | None:
    """The fields of a JSON object; None if the bytes are not one."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):  # ValueError also for numbers of thousands of digits, and for odd encodings
        return None
    return found if isinstance(found, dict) else None


_MOST = 10**9


def class_id_of(data: bytes) -> int | None:
    """The number that a ``.cls`` member is, in decimal digits; None for anything else."""
    return int(data) if re.fullmatch(rb"\s*\d{1,9}\s*", data) else None


def class_id_in(value: Any) -> int | None:
    """The class id that a value of a ``.json`` is: a whole number, also where it was written as a float (tables with
    missing values make 3.0 of 3); None for anything else, true and false among it."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < _MOST:  # nan compares false
        return None
    return int(value) if value == int(value) else None


def label_of_key(key: str, ids: dict[str, int]) -> int | None:
    """The class of a key that begins with it (n01440764_10026, Faces_easy_0001), or lies in its folder
    (n01440764/10026), or both.

    Of classes whose names begin alike, the longest that the key begins with; None where another reading remains.
    """
    *folders, name = key.split("/")
    ends = [at for at in range(1, len(name) + 1) if name[:at] in ids and not name[at : at + 1].isalpha()]
    found = {ids[folders[-1]]} if folders and folders[-1] in ids else set()
    if ends:
        longest = ends[-1]
        # "Faces_easy-1" may be Faces' or Faces_easy's; "a_1" may be image 1 of the class a, or of the class a_1.
        clear = name[longest : longest + 1] == "_" or (longest == len(name) and len(ends) == 1)
        if clear:
            found.add(ids[name[:longest]])
        elif any(name[at : at + 1] in ("_", "") for at in ends):
            return None
    return found.pop() if len(found) == 1 else None


def _loose(name: str) -> str:
    return re.sub(r"[\W_]", "_", name.lower())


def loosely_longer(ids: dict[str, int]) -> dict[int, tuple[str, ...]]:
    """Of classes that other ones begin with but for case, spaces and punctuation ("Faces" and "faces easy"): the loose
    spellings of the latter, by class id of the former. ``label_of_key`` finds those that begin with it exactly."""
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
    label: Label,
    ids: dict[str, int],
    longer: Mapping[int, tuple[str, ...]] = MappingProxyType({}),
) -> int | str:
    """A sample's class id; or why it has none, in words. longer: of ``loosely_longer``, for labels from keys."""
    if label.source == "cls":
        if "cls" not in fields:
            return f"it has no .cls (it has {', '.join(fields)})"
        data = _read(file, fields["cls"])
        found = class_id_of(data)
        return f"its .cls is {_shown(data)}, no number in decimal digits" if found is None else found
    if label.source == "json":
        if "json" not in fields:
            return f"it has no .json (it has {', '.join(fields)})"
        facts = _json(file, fields)
        if facts is None:
            return f"its .json is no JSON object: {_shown(_read(file, fields['json']))}"
        if label.field not in facts:
            return f"its .json has no field {label.field!r} (it has {', '.join(facts) or 'none'})"
        found = class_id_in(facts[label.field])
        return (
            f"its .json's field {label.field!r} is {_shown(facts[label.field])}, no class number"
            if found is None
            else found
        )
    found = label_of_key(key, ids)
    *folders, name = key.split("/")
    is_in_folder = bool(folders) and folders[-1] in ids
    if found is not None and not is_in_folder and _loose(name).startswith(longer.get(found, ())):
        found = None
    return "its key does not begin with a class of the list, or may begin with two" if found is None else found


def _shown(value: object) -> str:
    try:
        shown = repr(value)
    except ValueError:  # an integer of thousands of digits
        return "a number of thousands of digits"
    return shown if len(shown) <= 40 else f"{shown[:40]}…"


def find_label(tars: Sequence[Path], asked: str | None, field: str | None, ids: dict[str, int]) -> Label:
    """Where the labels of all shards come from, from the first samples of the first shard that has any with an image.

    Raises:
        UserError: from nowhere; or the .cls and the .json differ.
    """
    if asked in ("cls", "key"):
        return Label(asked)
    if field is not None:
        return Label("json", field)
    reason = ""
    for tar in tars:
        contents = tarscan.scan(tar)
        samples, _ = group(tar, contents.members)
        reason = reason or next((why for _, why in left_out(samples, contents.unseen)), "")
        kept = [(key, fields) for key, fields in samples.items() if image_of(fields)][:100]
        if not kept:
            continue
        with open(tar, "rb", buffering=0) as file:
            key, fields = kept[0]
            facts = _json(file, fields) or {}
            named = next((name for name in LABEL_FIELDS if class_id_in(facts.get(name)) is not None), None)
            if asked is None and "cls" in fields:
                for key, fields in kept if named else ():
                    ours = label_of(file, key, fields, Label("cls"), ids)
                    theirs = (_json(file, fields) or {}).get(str(named))
                    if ours != class_id_in(theirs):
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
                f"{', and its key does not begin with a wnid or class' if asked is None else ''}. {LABEL_OPTIONS}"
            )
    raise no_images(tars[0].parent, reason)


def no_images(folder: Path, reason: str) -> UserError:
    """reason: of a sample that is left out, "" if there is no sample."""
    return UserError(
        f"No sample of {folder} has an image (a member called {', '.join(IMAGES)}): there is nothing to train on"
        f"{f'. The first sample: {reason}' if reason else ''}."
    )
