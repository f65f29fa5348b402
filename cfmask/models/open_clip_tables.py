"""open_clip's models and pretrained tags by name, without open_clip.

Importing open_clip takes seconds (torch, transformers). A command that only looks a name up should not take them, so
these functions read open_clip's files. If it has been imported already, they ask it: it also knows models that were
registered since.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any


def model_names() -> list[str]:
    """As ``open_clip.list_models``, in any order."""
    if "open_clip" in sys.modules:
        return sys.modules["open_clip"].list_models()
    return list(_configs())


def model_config(name: str) -> dict[str, Any] | None:
    """As ``open_clip.get_model_config``; None for an unknown model."""
    if "open_clip" in sys.modules:
        return sys.modules["open_clip"].get_model_config(name)
    return copy.deepcopy(_configs().get(name))


def tags_of_model(name: str) -> dict[str, Mapping[str, Any]]:
    """The pretrained tags of a model, each with the place of its weights and their preprocessing."""
    table = _pretrained()
    return {tag: table.get_pretrained_cfg(name, tag) for tag in table.list_pretrained_tags_by_model(name)}


def tag_config(name: str, tag: str) -> dict[str, Any] | None:
    """The same of one tag, in any spelling that open_clip accepts; None for an unknown tag."""
    return _pretrained().get_pretrained_cfg(name, tag) or None


def _folder() -> Path:
    spec = importlib.util.find_spec("open_clip")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'open_clip'", name="open_clip")
    return Path(spec.submodule_search_locations[0])


@cache
def _configs() -> dict[str, dict[str, Any]]:
    found = {path.stem: json.loads(path.read_bytes()) for path in _folder().glob("model_configs/*.json")}
    required = {"embed_dim", "vision_cfg", "text_cfg"}
    return {name: found[name] for name in sorted(found) if required <= found[name].keys()}


def _pretrained() -> ModuleType:
    """open_clip/pretrained.py; its functions that look names up need nothing else of open_clip."""
    return sys.modules.get("open_clip.pretrained") or _pretrained_alone()


@cache
def _pretrained_alone() -> ModuleType:
    package = ModuleType("_open_clip_tables")
    package.__path__ = [str(_folder())]
    # It only notes whether safetensors is there, for downloads; importing that would import torch.
    block = "safetensors.torch" not in sys.modules
    sys.modules[package.__name__] = package
    if block:
        sys.modules["safetensors.torch"] = None  # type: ignore[assignment]
    try:
        return importlib.import_module(f"{package.__name__}.pretrained")
    finally:
        if block:
            del sys.modules["safetensors.torch"]
