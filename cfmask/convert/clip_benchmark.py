"""CLIP-benchmark's WebDataset copies (``wds_imagenet-a``, ``wds_objectnet``, …): labels index a class list of the copy.

    wds_imagenet-a/classnames.txt      a class name a line, label 0 first
    wds_imagenet-a/test/nshards.txt    number of tars: 0.tar, 1.tar, …
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
    """The class ids of a set's labels.

    source: the file that names the classes.
    ids: by label, all correct class ids of ImageNet, sorted; the first one represents them.
    name: of the benchmark with this class list; "" if none or several have it.
    """

    source: Path
    ids: tuple[tuple[int, ...], ...]
    name: str = ""

    @property
    def accepted(self) -> dict[int, tuple[int, ...]]:
        """As the manifest's."""
        return {ids[0]: ids for ids in self.ids if len(ids) > 1}


def find_mapping(folder: Path, tars: Sequence[Path], mappings: Path | None) -> ClassMapping | None:
    """The class ids of the labels in a copy of CLIP-benchmark; None for other folders of tars.

    Args:
        mappings: folder of ObjectNet's mapping files; by default they are searched beside the class list.
    """
    # The folder may be a link to the copy, or contain links to its tars.
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
            f"{folder} is a copy of CLIP-benchmark (it has {SHARD_COUNT}), whose labels index a class list of its own, "
            f"but there is no {CLASS_NAMES} in it or above it: copy that file into {folder} as well. If the labels are "
            f"class ids of another list, remove {SHARD_COUNT} and give --classes."
        )
    names = _read_names(lists[0])
    if other := next((path for path in lists[1:] if _read_names(path) != names), None):
        raise UserError(f"{lists[0]} and {other} name different classes: remove the one that is not of {folder}.")
    return _map(lists[0], names, mappings, places)


def _check_shard_count(path: Path, tars: Sequence[Path]) -> None:
    text = _read_text(path).strip()
    if not re.fullmatch(r"[0-9]{1,6}", text):
        raise UserError(f"{path} contains {text[:40]!r} instead of a number of tars: copy it again.")
    expected, found = {f"{n}.tar" for n in range(int(text))}, {tar.name for tar in tars}
    if expected != found:
        wrong = sorted(expected - found) or sorted(found - expected)
        raise UserError(
            f"{path} says that there are {text} tars, 0.tar to {int(text) - 1}.tar. "
            f"{'Missing' if expected - found else 'Surplus'}: {', '.join(wrong[:5])}{' …' if len(wrong) > 5 else ''}. "
            f"{'Copy the missing tars.' if expected - found else 'Move the surplus tars out of the folder.'}"
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
    ids_of = imagenet.wnids().index
    known = {"": list(range(len(imagenet.wnids())))}
    for benchmark in (benchmarks.IMAGENET_R, benchmarks.IMAGENET_A):
        known[benchmark.name] = [ids_of(wnid) for wnid in benchmarks.wnids(benchmark.name)]
    for name, ids in known.items():
        if is_list(names, ids):
            return ClassMapping(path, tuple((i,) for i in ids), name)
    if (found := _objectnet(names, mappings, places)) is not None:
        return ClassMapping(path, found, benchmarks.OBJECTNET.name)
    remedy = (
        f"Give its class list with --classes FILE (a line `folder<TAB>display name` for each class, in {path.name}'s "
        f"order; folders of ImageNet's classes are wnids)."
    )
    class_ids = class_ids_of_names(names, wordnet=False, where=str(path), remedy=remedy)
    return ClassMapping(path, tuple((i,) for i in class_ids))


def _objectnet(names: list[str], mappings: Path | None, places: Sequence[Path]) -> tuple[tuple[int, ...], ...] | None:
    """The class ids of ObjectNet's classes, which are sorted by folder; None if the names are not ObjectNet's."""
    folders = [mappings] if mappings else [path for place in places for path in (place, place / "mappings")]
    complete = len(objectnet.MAPPINGS)
    files = next((files for folder in folders if len(files := objectnet.read_mappings(folder)) == complete), None)
    if files is None:
        if mappings or len(names) == benchmarks.OBJECTNET.classes:
            raise UserError(
                f"The {len(names)} classes are not ImageNet's by their names (the first is {names[0]!r}). If they are "
                f"ObjectNet's, its mapping files ({', '.join(objectnet.MAPPINGS)}) relate them to ImageNet's classes: "
                f"name their folder with --mappings{f'; {mappings} lacks some of them' if mappings else ''}. They are "
                f"in ObjectNet's archive, in objectnet-1.0/mappings."
            )
        return None
    labels, class_ids = objectnet.classes_of(files)
    given = list(map(normal, names))
    theirs = sorted(class_ids)
    if [normal(labels[folder]) for folder in theirs] == given:
        return tuple(class_ids[folder] for folder in theirs)
    if set(given) == set(map(normal, labels.values())):
        raise UserError(
            f"The {len(names)} classes are all of ObjectNet's, but it is evaluated on the {len(theirs)} that it shares "
            f"with ImageNet: labels of the others have no class id. Convert ObjectNet's own archive with "
            f"`python tools/make_shards.py objectnet`, or write the copy again with the shared classes alone."
        )
    return None
