"""The error class for everything that the user can correct, and suggestions for misspelt names."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from cfmask.secrets import mask_secrets


class UserError(ValueError):
    """An error that the user can correct. The message is one paragraph: what is wrong, where, and what to do. Secrets
    in it are masked, because it is shown, logged, and kept in the run folder."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*(mask_secrets(word) if isinstance(word, str) else word for word in arguments))


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """ " Did you mean X?", to follow a sentence about an unknown name; "" if no known name resembles it."""
    names = list(dict.fromkeys(known))
    by_key = {name.casefold().replace("_", "-"): name for name in names}
    word = given.casefold().replace("_", "-")
    near = (
        difflib.get_close_matches(word, by_key, 1)
        or [key for key in by_key if key.startswith(word[:3]) and word in key and len(word) > 1][:3]
    )
    return f" Did you mean {' or '.join(by_key[key] for key in near)}?" if near else ""


def did_you_mean_path(given: str | Path) -> str:
    """``did_you_mean`` among what is beside a path that does not exist; "" if it exists, or its folder cannot be
    read."""
    path, names = Path(given).absolute(), list[str]()
    with suppress(OSError):
        if not path.exists():
            names = sorted(os.listdir(path.parent))
    return did_you_mean(path.name, names)
