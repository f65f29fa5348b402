"""Comparison of files and software over all ranks before training. A node with an old copy of a file or with other
library versions would silently train a different model."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist

from cfmask.errors import UserError
from cfmask.runtime.machine import node_name

_PACKAGES = ("torch", "torchvision", "open_clip_torch", "numpy", "safetensors", "simplejpeg", "pillow")


def check_agreement(facts: Mapping[str, str]) -> list[str]:
    """Compare facts, the code, and library versions over all ranks.

    Args:
        facts: digests of what this rank has read, by name.

    Returns:
        The node of each rank.

    Raises:
        UserError: on all ranks, if ranks differ.
    """
    node = node_name()
    gathered: list[tuple[str, dict[str, str]]] = [("", {})] * dist.get_world_size()
    dist.all_gather_object(gathered, (node, {**facts, **_software()}))
    nodes = [each for each, _ in gathered]
    first = gathered[0][1]
    for name in first:
        others = [rank for rank, (_, found) in enumerate(gathered) if found.get(name) != first[name]]
        if others:
            rank = others[0]
            raise UserError(
                f"Ranks differ in {name}: rank 0 on {nodes[0]} has {first[name]}, rank {rank} on {nodes[rank]} has "
                f"{gathered[rank][1].get(name)}"
                + (f" ({len(others)} ranks differ)" if len(others) > 1 else "")
                + ". The node may see an old copy of a file, or have another environment: start again, or exclude the "
                f"node with --exclude {nodes[rank]}."
            )
    return nodes


def _software() -> dict[str, str]:
    code = Path(__file__).resolve().parents[2]
    found = {"code": code.name if code.parent.name == "code" else "(a repository)"}  # a snapshot's name is its digest
    for package in _PACKAGES:
        try:
            found[f"the version of {package}"] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[f"the version of {package}"] = "none"
    if torch.cuda.is_available():
        found["the kind of GPU"] = torch.cuda.get_device_name()
    return found
