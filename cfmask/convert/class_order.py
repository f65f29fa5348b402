"""The class order of a model trained with torchvision's ImageFolder: its ``class_to_idx``."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

from cfmask.convert.tables import Classes, read_text
from cfmask.errors import UserError

KEY = "class_to_idx"


def classes_in_order(path: Path, listed: Classes | None) -> Classes:
    """The classes of a ``class_to_idx``, checked against the class list if there is one.

    Args:
        path: a JSON object {folder: class id}, or a PyTorch checkpoint (loaded without running code from it). Either
            may have the mapping under the key ``class_to_idx``.
    """
    mapping = _load(path)
    if isinstance(mapping, dict) and isinstance(mapping.get(KEY), dict):
        mapping = mapping[KEY]
    if not isinstance(mapping, dict) or not mapping:
        raise UserError(f"{path} has no {KEY}: expected a JSON object {{folder: class id}} or a checkpoint with one.")
    for folder, number in mapping.items():
        if not isinstance(folder, str) or not isinstance(number, int) or isinstance(number, bool):
            raise UserError(
                f"{path} maps {folder!r} to {str(number)[:40]}, but a {KEY} maps folder names to whole numbers. (In a "
                f"checkpoint it has to be under the key {KEY!r}.)"
            )
    if sorted(mapping.values()) != list(range(len(mapping))):
        raise UserError(
            f"The class ids in {path} are not 0 … {len(mapping) - 1}, each once: the {KEY} is incomplete or was edited."
        )
    order = sorted(mapping, key=mapping.__getitem__)
    if listed is None:
        return tuple((folder, folder) for folder in order)
    theirs = [folder for folder, _ in listed]
    if order != theirs:
        differ = f"{len(order)} and {len(theirs)} classes"
        if at := [i for i, (a, b) in enumerate(zip(order, theirs, strict=False)) if a != b]:
            differ = f"class {at[0]} is {order[at[0]]!r} in the former and {theirs[at[0]]!r} in the latter"
        raise UserError(f"{path} and the class list differ: {differ}. Labels of one are wrong for the other: use one.")
    return listed


def _load(path: Path) -> Any:
    try:
        with open(path, "rb") as file:
            start = file.read(4)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from None
    if start.startswith(b"PK\3\4") or start.startswith(b"\x80"):  # torch.save's zip, and what it wrote before 1.6
        import torch

        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
            reason = str(error).partition("\n")[0][:200]
            raise UserError(
                f"{path} cannot be read as a checkpoint without running code from it ({reason}). Write its {KEY} to a "
                f"JSON file."
            ) from None
    try:
        return json.loads(read_text(path, KEY))
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path} is neither JSON nor a PyTorch checkpoint ({error}).") from None
