"""Which classes of ImageNet a list of names means: wnids, WordNet's names, open_clip's, or ImageNet-V2's numbers."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from itertools import pairwise

from cfmask.data import imagenet
from cfmask.errors import UserError

_MOST_UNKNOWN = 0.05
"""Share of a list of all 1000 classes in ImageNet's order whose names may be spelled as nobody else does ("crane2")."""


def class_ids_of_names(names: Sequence[str], *, numbers: bool, where: str) -> tuple[int, ...]:
    """ImageNet's class ids of the classes of a list, which may have any order.

    Args:
        numbers: names may be class ids in decimal, as ImageNet-V2's folders are.
        where: what the list is called in errors.

    Raises:
        UserError: a name is no class of ImageNet, or is two and the order of the list does not tell which; two names
            are one class.
    """
    if numbers and all(name.isdecimal() and int(name) < len(imagenet.wnids()) for name in names):
        candidates: list[tuple[int, ...]] = [(int(name),) for name in names]
    else:
        candidates = [_classes_called(name) for name in names]
    unknown = [name for name, ids in zip(names, candidates, strict=True) if not ids]
    if len(names) == len(imagenet.wnids()) and len(unknown) <= _MOST_UNKNOWN * len(names):
        # A name of another class would mean that the order is another one.
        places = enumerate(zip(names, candidates, strict=True))
        if all(not ids or i in ids or i in _classes_with(name) for i, (name, ids) in places):
            return tuple(range(len(names)))
    if unknown:
        raise UserError(
            f"{where} has {len(unknown)} class names of {len(names)} that are not ImageNet's, {unknown[0]!r} for one: "
            f"nothing says which classes its labels are. Is it another set? `make_shards.py folder` converts those."
        )
    ids = _by_order(candidates)
    if None in ids:
        raise UserError(
            f"{where} has the class name {names[ids.index(None)]!r}, which two classes of ImageNet have, and the order "
            f"of the list does not tell which is meant. Use a copy whose labels are named by wnids."
        )
    found = [i for i in ids if i is not None]
    if len(set(found)) < len(found):
        twice = next(name for name, i in zip(names, found, strict=True) if found.count(i) > 1)
        raise UserError(f"{where} names one class of ImageNet twice, as {twice!r} for one: it is damaged.")
    return tuple(found)


def _by_order(candidates: list[tuple[int, ...]]) -> list[int | None]:
    """The one class of each name; of several the one that the order tells, in a list in ImageNet's order; else None."""
    ids = [only[0] if len(only) == 1 else None for only in candidates]
    known = [i for i in ids if i is not None]
    if any(a >= b for a, b in pairwise(known)):
        return ids
    for at, several in enumerate(candidates):
        if ids[at] is None:
            before = max((i for i in ids[:at] if i is not None), default=-1)
            after = min((i for i in ids[at + 1 :] if i is not None), default=len(imagenet.wnids()))
            between = [i for i in several if before < i < after]
            ids[at] = between[0] if len(between) == 1 else None
    return ids


def _normal(name: str) -> str:
    return " ".join(re.findall(r"[^\W_]+", name.casefold()))


@functools.cache
def _names() -> tuple[dict[str, list[int]], list[set[str]]]:
    """Class ids by whole name (wnid, all of WordNet's names, open_clip's); the single names of each class."""
    whole: dict[str, list[int]] = {}
    single = []
    for i, (wnid, name) in enumerate(imagenet.classes()):
        lemmas = imagenet.lemmas()[i]
        for text in {_normal(wnid), _normal(", ".join(lemmas)), _normal(name)}:
            whole.setdefault(text, []).append(i)
        single.append({_normal(lemma) for lemma in lemmas} | {_normal(name)})
    return whole, single


@functools.cache
def _classes_called(name: str) -> tuple[int, ...]:
    """The classes of that whole name; if there is none, those that it is among the names of."""
    return tuple(_names()[0].get(_normal(name), ())) or _classes_with(name)


@functools.cache
def _classes_with(name: str) -> tuple[int, ...]:
    """Classes that have a name, or all of several that are separated by commas."""
    parts = {_normal(part) for part in name.split(",")}
    return tuple(i for i, names in enumerate(_names()[1]) if parts <= names)
