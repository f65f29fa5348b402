"""The order of classes that torchvision's ImageFolder gave a model: its ``class_to_idx``."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

from cfmask.convert.tables import Classes, read_text
from cfmask.errors import UserError

KEY = "class_to_idx"


def read_class_to_idx(path: Path) -> tuple[str, ...]:
    """Class folders by class id.

    Args:
        path: a JSON object {folder: class id}, or a checkpoint of PyTorch (loaded without running code from it); in
            both, it may be the value of the key ``class_to_idx``.

    Raises:
        UserError: the file is neither, or its class ids are not 0 … n - 1, each once.
    """
    mapping = _load(path)
    if isinstance(mapping, dict) and isinstance(mapping.get(KEY), dict):
        mapping = mapping[KEY]
    if not isinstance(mapping, dict) or not mapping:
        raise UserError(f"{path} holds no {KEY}: expected a JSON object {{folder: class id}} or a checkpoint with one.")
    for folder, number in mapping.items():
        if not isinstance(folder, str) or not isinstance(number, int) or isinstance(number, bool):
            raise UserError(
                f"{path} maps {folder!r} to {str(number)[:40]}: a {KEY} maps names of folders to whole numbers. (In a "
                f"checkpoint it has to be under the key {KEY!r}.)"
            )
    if sorted(mapping.values()) != list(range(len(mapping))):
        raise UserError(
            f"The class ids in {path} are not 0 … {len(mapping) - 1}, each once: it is a part of a {KEY} or was edited."
        )
    return tuple(sorted(mapping, key=mapping.__getitem__))


def classes_in_order(path: Path, listed: Classes | None) -> Classes:
    """The classes of a ``class_to_idx``, compared with the class list if there is one.

    Raises:
        UserError: as ``read_class_to_idx``; or the two differ.
    """
    order = read_class_to_idx(path)
    if listed is None:
        return tuple((folder, folder) for folder in order)
    theirs = tuple(folder for folder, _ in listed)
    if order != theirs:
        at = next((i for i, (a, b) in enumerate(zip(order, theirs, strict=False)) if a != b), None)
        differ = (
            f"{len(order)} and {len(theirs)} classes"
            if at is None
            else f"class {at} is {order[at]!r} in the one and {theirs[at]!r} in the other"
        )
        raise UserError(
            f"{path} and the class list differ: {differ}. Labels of the one would be wrong for the other: leave one of "
            f"them out."
        )
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
                f"{path} cannot be read as a checkpoint without running code from it ({reason}): write its {KEY} to a "
                f"JSON file."
            ) from None
    try:
        return json.loads(read_text(path, KEY))
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path} is neither JSON nor a checkpoint of PyTorch ({error}).") from None
