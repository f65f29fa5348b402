"""CLIP-benchmark's WebDataset copies (``wds_imagenet-a``, ``wds_objectnet``, …): labels count within their class list.

    wds_imagenet-a/classnames.txt      a class name a line: the label 0 is the first
    wds_imagenet-a/test/nshards.txt    how many tars there are: 0.tar, 1.tar, …
    wds_imagenet-a/test/0.tar          s0000000.cls, s0000000.webp (or .jpg, .png), …

Labels are mapped to ImageNet's class ids by class names, checked at every position of the list.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cfmask.convert.class_names import class_ids_of_names, is_list, normal
from cfmask.convert.sources import objectnet
from cfmask.data import benchmarks, imagenet
from cfmask.errors import UserError

CLASS_NAMES, SHARD_COUNT = "classnames.txt", "nshards.txt"


@dataclass(frozen=True)
class ClassMapping:
    """What the labels of a set mean.

    source: the file that names the classes.
    ids: by label, all class ids of ImageNet that are right for it, sorted; the first one stands for it.
    name: of the benchmark that has just this class list; "" if several have it, or none.
    """

    source: Path
    ids: tuple[tuple[int, ...], ...]
    name: str = ""

    @property
    def accepted(self) -> dict[int, tuple[int, ...]]:
        """As the manifest's."""
        return {ids[0]: ids for ids in self.ids if len(ids) > 1}


def find_mapping(folder: Path, tars: Sequence[Path], mappings: Path | None) -> ClassMapping | None:
    """What the labels of a folder of tars mean, if it is a copy of CLIP-benchmark; None for others.

    Args:
        mappings: folder of ObjectNet's mapping files; by default they are looked for beside the class list.

    Raises:
        UserError: tars or the class list are missing, or the classes are not ImageNet's beyond doubt.
    """
    # The folder may be a link to the copy, or hold links to its tars.
    bases = dict.fromkeys((folder, folder.resolve(), tars[0].resolve().parent))
    counted = next((base / SHARD_COUNT for base in bases if (base / SHARD_COUNT).is_file()), None)
    if counted is not None:
        _check_shard_count(counted, tars)
    places = list(dict.fromkeys(place for base in bases for place in (base, base.parent)))
    lists = [place / CLASS_NAMES for place in places if (place / CLASS_NAMES).is_file()]
    if not lists:
        if counted is None:
            return None
        raise UserError(
            f"{folder} is a copy of CLIP-benchmark ({SHARD_COUNT} says so), whose labels count within a class list of "
            f"its own, and there is no {CLASS_NAMES} in it or above it: copy that file too, into {folder}. If the "
            f"labels count otherwise, take {SHARD_COUNT} out of the folder and give --classes."
        )
    names = _read_names(lists[0])
    if other := next((path for path in lists[1:] if _read_names(path) != names), None):
        raise UserError(f"{lists[0]} and {other} name different classes: leave the one that is of {folder}.")
    return _map(lists[0], names, mappings, places)


def _check_shard_count(path: Path, tars: Sequence[Path]) -> None:
    text = _read_text(path).strip()
    if not re.fullmatch(r"[0-9]{1,6}", text):
        raise UserError(f"{path} says {text[:40]!r}, where a number of tars should be: copy it again.")
    expected, found = {f"{n}.tar" for n in range(int(text))}, {tar.name for tar in tars}
    if expected != found:
        odd = sorted(expected - found) or sorted(found - expected)
        raise UserError(
            f"{path} says that there are {text} tars, 0.tar to {int(text) - 1}.tar, and "
            f"{', '.join(odd[:5])}{' …' if len(odd) > 5 else ''} {'is' if len(odd) == 1 else 'are'} "
            f"{'missing: copy what is missing' if expected - found else 'too much: take them out of the folder'}."
        )


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}).") from None


def _read_names(path: Path) -> list[str]:
    names = [line.strip() for line in _read_text(path).rstrip().split("\n")]
    if not all(names):
        raise UserError(f"{path}, line {names.index('') + 1}: there is no class name on the line.")
    return names


def _map(path: Path, names: list[str], mappings: Path | None, places: Sequence[Path]) -> ClassMapping:
    known = {
        "": range(len(imagenet.wnids())),
        **{
            benchmark.name: [imagenet.wnids().index(wnid) for wnid in benchmarks.wnids(benchmark.name)]
            for benchmark in (benchmarks.IMAGENET_R, benchmarks.IMAGENET_A)
        },
    }
    for name, ids in known.items():
        if is_list(names, ids):
            return ClassMapping(path, tuple((i,) for i in ids), name)
    if (found := _objectnet(names, mappings, places)) is not None:
        return ClassMapping(path, found, benchmarks.OBJECTNET.name)
    remedy = (
        f"Give its class list with --classes FILE (a line `folder<TAB>display name` a class, in {path.name}'s order; "
        f"folders of ImageNet's classes are wnids)."
    )
    return ClassMapping(
        path, tuple((i,) for i in class_ids_of_names(names, wordnet=False, where=str(path), remedy=remedy))
    )


def _objectnet(names: list[str], mappings: Path | None, places: Sequence[Path]) -> tuple[tuple[int, ...], ...] | None:
    """The class ids of ObjectNet's classes, which are sorted by folder; None if the names are not theirs."""
    folders = [mappings] if mappings else [path for place in places for path in (place, place / "mappings")]
    files = next((files for folder in folders if (files := objectnet.read_mappings(folder))), None)
    if files is None:
        if mappings or len(names) == benchmarks.OBJECTNET.classes:
            raise UserError(
                f"The {len(names)} classes are not ImageNet's by their names (the first is {names[0]!r}). If they are "
                f"ObjectNet's, its mapping files ({', '.join(objectnet.MAPPINGS)}) say which classes of ImageNet they "
                f"are: name their folder with --mappings{f'; {mappings} lacks some of them' if mappings else ''}. They "
                f"are in ObjectNet's archive, in objectnet-1.0/mappings."
            )
        return None
    labels, class_ids = objectnet.classes_of(files)
    given = list(map(normal, names))
    theirs = sorted(class_ids)
    if [normal(labels[folder]) for folder in theirs] == given:
        return tuple(class_ids[folder] for folder in theirs)
    if set(given) == set(map(normal, labels.values())):
        raise UserError(
            f"The {len(names)} classes are all of ObjectNet's, and it is evaluated on the {len(theirs)} of them that "
            f"are ImageNet's too: labels of the others have no class id. Convert ObjectNet's own archive with "
            f"`python tools/make_shards.py objectnet`, or write the copy again with these classes alone."
        )
    return None
