"""ImageNet's classes: 1000 wnids in class-id order and two subsets from timm, display names from open_clip.

The data files of the packages are read without importing the packages, which would import torch.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path


def _package_folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"{package} is not installed: pip install -r requirements.txt")
    return Path(spec.submodule_search_locations[0])


@functools.cache
def wnids() -> tuple[str, ...]:
    """The 1000 wnids, sorted: a class id is an index into them."""
    return _wnids("imagenet_synsets.txt")


@functools.cache
def wnid_set() -> frozenset[str]:
    """The 1000 wnids as a set."""
    return frozenset(wnids())


@functools.cache
def r_wnids() -> tuple[str, ...]:
    """The 200 wnids of ImageNet-R."""
    return _wnids("imagenet_r_synsets.txt")


@functools.cache
def a_wnids() -> tuple[str, ...]:
    """The 200 wnids of ImageNet-A."""
    return _wnids("imagenet_a_synsets.txt")


def _wnids(file: str) -> tuple[str, ...]:
    return tuple((_package_folder("timm") / "data" / "_info" / file).read_text().split())


@functools.cache
def lemmas() -> tuple[tuple[str, ...], ...]:
    """WordNet's names of the 1000 classes, by class id: ("tench", "Tinca tinca"), …"""
    lines = (_package_folder("timm") / "data" / "_info" / "imagenet_synset_to_lemma.txt").read_text().splitlines()
    of_wnid = dict(line.split("\t", 1) for line in lines)
    return tuple(tuple(of_wnid[wnid].split(", ")) for wnid in wnids())


@functools.cache
def class_names() -> tuple[str, ...]:
    """open_clip's (OpenAI's) 1000 class names, by class id."""
    path = _package_folder("open_clip") / "zero_shot_metadata.py"
    spec = importlib.util.spec_from_file_location("_zero_shot_metadata", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return tuple(module.IMAGENET_CLASSNAMES)


@functools.cache
def classes() -> tuple[tuple[str, str], ...]:
    """(wnid, name) by class id."""
    return tuple(zip(wnids(), class_names(), strict=True))


SUPER_CLASSES = {"dog": range(151, 269), "cat": range(281, 286), "bird": range(80, 101)}
"""Class ids of three of Restricted ImageNet's super-classes: 144 classes, each with a category of its name in COCO.

Source: Tsipras et al., "Robustness May Be at Odds with Accuracy", ICLR 2019, appendix A. (Other birds are not in it.)
"""


@functools.cache
def super_class_of() -> dict[str, str]:
    """The super-class of each of these 144 wnids."""
    return {wnids()[i]: name for name, ids in SUPER_CLASSES.items() for i in ids}
