"""Maps a list of class names to ImageNet's class ids: wnids, WordNet's names, open_clip's, or ImageNet-V2's numbers."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

from cfmask.data import imagenet
from cfmask.errors import UserError

_OTHER_NAMES = 0.1
"""Share of names that may be spelled differently: versions of WordNet's and OpenAI's names differ."""


def normal(name: str) -> str:
    """A name for comparison: its words in lower case."""
    return " ".join(re.findall(r"[^\W_]+", name.casefold()))


def is_list(names: Sequence[str], ids: Sequence[int]) -> bool:
    """Whether these are the names of these classes in this order. A few may be spelled differently."""
    if len(names) != len(ids):
        return False
    unlike = [name for name, i in zip(names, ids, strict=True) if i not in _called(name) and i not in _with(name)]
    # A name of another class proves another order.
    return len(unlike) <= _OTHER_NAMES * len(ids) and not any(map(_called, unlike))


def class_ids_of_names(
    names: Sequence[str], *, wordnet: bool, numbers: bool = False, where: str, remedy: str
) -> tuple[int, ...]:
    """ImageNet's class ids of a list of class names in any order.

    Two classes have the name "missile". Which one is meant follows from the order, if the list is in ImageNet's order.

    Args:
        wordnet: names may also be wnids and WordNet's names. Otherwise they are open_clip's, which differ from the
            names in other sets that have some of ImageNet's classes.
        numbers: names may be class ids in decimal, as ImageNet-V2's folders are.
        where: name of the list in errors.
        remedy: advice in errors.
    """
    candidates = [_called(name) if wordnet else tuple(_open_clip().get(normal(name), ())) for name in names]
    if numbers and all(name.isdecimal() and int(name) < len(imagenet.wnids()) for name in names):
        candidates = [(int(name),) for name in names]
    if unknown := [name for name, ids in zip(names, candidates, strict=True) if not ids]:
        raise UserError(
            f"{where} has {len(unknown)} of {len(names)} class names that are not open_clip's{' or WordNet' * wordnet} "
            f"names of ImageNet's classes, such as {unknown[0]!r}, so the class ids of its labels are unknown. {remedy}"
        )
    first, last = _lowest(candidates), _lowest([[-i for i in reversed(ids)] for ids in reversed(candidates)])
    if first and last and first == [-i for i in reversed(last)]:
        return tuple(first)
    if unclear := [name for name, ids in zip(names, candidates, strict=True) if len(ids) > 1]:
        raise UserError(
            f"{where} has the class name {unclear[0]!r}, which two classes of ImageNet share, and the order of the "
            f"list does not resolve it. {remedy}"
        )
    ids = [ids[0] for ids in candidates]
    if len(set(ids)) < len(ids):
        raise UserError(f"{where} names a class twice, so that two labels would be one class. Copy it again.")
    return tuple(ids)


def _lowest(candidates: Sequence[Sequence[int]]) -> list[int] | None:
    """The lowest strictly increasing ids, one of each candidate; None if there are none."""
    found: list[int] = []
    for ids in candidates:
        following = [i for i in ids if not found or i > found[-1]]
        if not following:
            return None
        found.append(following[0])
    return found


@functools.cache
def _names() -> tuple[dict[str, list[int]], list[set[str]]]:
    """Class ids by full name (wnid, all of WordNet's names, open_clip's); the single names of each class."""
    whole: dict[str, list[int]] = {}
    single = []
    for i, (wnid, name) in enumerate(imagenet.classes()):
        lemmas = imagenet.lemmas()[i]
        for text in {normal(wnid), normal(", ".join(lemmas)), normal(name)}:
            whole.setdefault(text, []).append(i)
        single.append({normal(lemma) for lemma in lemmas} | {normal(name)})
    return whole, single


@functools.cache
def _called(name: str) -> tuple[int, ...]:
    """The classes with this full name; if there are none, those with this single name."""
    return tuple(_names()[0].get(normal(name), ())) or _with(name)


@functools.cache
def _open_clip() -> dict[str, list[int]]:
    """Class ids by open_clip's name."""
    ids: dict[str, list[int]] = {}
    for i, name in enumerate(imagenet.class_names()):
        ids.setdefault(normal(name), []).append(i)
    return ids


@functools.cache
def _with(name: str) -> tuple[int, ...]:
    """Classes that have this single name, or all of several names separated by commas."""
    parts = {normal(part) for part in name.split(",")}
    return tuple(i for i, names in enumerate(_names()[1]) if parts <= names)
