"""A function and the items that it is applied to, in processes of this machine or in the tasks of a Slurm array."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Work(Generic[Item, Result]):
    """What is done to each of many items.

    kind: for the array's name.
    identity: what the results depend on; with ``kind`` it names the array's folder and jobs.
    function: item → result; importable from a copy of cfmask/ and launch/.
    keys: a file name for each item, all different.
    preload: modules that the function needs and that take seconds to import, as in ``map_in_processes``.
    describe: an item for messages, for example the path of the file that is made of it.
    """

    kind: str
    identity: str
    function: Callable[[Item], Result]
    items: Sequence[Item]
    keys: Sequence[str]
    preload: tuple[str, ...] = ()
    describe: Callable[[Item], str] = repr

    @property
    def name(self) -> str:
        return f"cfmask-{self.kind}-{hashlib.sha256(os.fsencode(self.identity)).hexdigest()[:12]}"


Run = Callable[[Work[Any, Any], Callable[[Any], object]], list[Any]]
"""Does the work: ``results = run(work, progress)``. ``progress`` gets each result as it comes."""
