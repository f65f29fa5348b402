"""A checkpoint's state.json: what it says, how it is protected, and where checkpoints lie.

    {"version": 2, "step": …, "dataset": …, "consumed": {…}, "skips": {…}, "top1": {…}, "updates": …,
     "inputs": {"run.seed": 0, "initial.safetensors": …, …},
     "sha256": {"model.safetensors": …, "optimizer.safetensors": …}, "digest": …}

digest is the sha256 of the other values in canonical JSON: a changed bit is noticed wherever it changes a value.
Files of version 1 have neither "version" nor "digest"; they are checked as far as types, ranges and the folder's name
go. Older files have no "inputs".
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cfmask.data.receipts import DataProgress
from cfmask.errors import UserError
from cfmask.runtime.files import read_bytes
from cfmask.runtime.patience import patiently

STATE, MODEL, OPTIMIZER = "state.json", "model.safetensors", "optimizer.safetensors"

_VERSION = 2
_VALUES = {"step", "dataset", "consumed", "skips", "top1", "updates", "inputs", "sha256"}
_OPTIONAL = {"top1", "inputs"}

Input = str | int | float | None


@dataclass(frozen=True)
class Skips:
    """Steps left out because a loss or gradient was not finite: in all, and in a row up to now."""

    total: int = 0
    in_a_row: int = 0

    def plus(self, skipped: bool) -> Skips:
        return Skips(self.total + skipped, self.in_a_row + 1 if skipped else 0)


@dataclass(frozen=True)
class CheckpointState:
    """What a run knows beside weights and moments. step: optimizer steps behind it, of all phases. dataset: digest of
    the training set. consumed: of it, so far. skips: steps left out. top1: percent by set, if it was evaluated here.
    inputs: what else decides the weights, by name: settings of the recipe, digests of the models' files."""

    step: int
    dataset: str
    consumed: DataProgress
    skips: Skips = Skips()
    top1: Mapping[str, float] = field(default_factory=dict)
    inputs: Mapping[str, Input] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Checkpoint(CheckpointState):
    """A checkpoint whose state.json is intact. updates: the optimizer's own count, which leaves out what was skipped
    and begins with its phase. sha256: of the other files, by name."""

    path: Path
    updates: int
    sha256: Mapping[str, str]


class CheckpointDamaged(UserError):
    """A checkpoint was read and is not what was written."""

    @classmethod
    def of(cls, path: Path, damage: str) -> CheckpointDamaged:
        """damage: what is wrong, without a full stop."""
        return cls(f"Checkpoint {path} is damaged: {damage}.")


def encode(state: CheckpointState, updates: int, sha256: Mapping[str, str]) -> bytes:
    """The contents of state.json."""
    contents = {
        "version": _VERSION,
        "step": state.step,
        "dataset": state.dataset,
        "consumed": state.consumed.to_json(),
        "skips": asdict(state.skips),
        "top1": dict(state.top1),
        "updates": updates,
        "inputs": dict(state.inputs),
        "sha256": dict(sha256),
    }
    return json.dumps({**contents, "digest": digest_of(contents)}, indent=2).encode()


def digest_of(contents: Mapping[str, Any]) -> str:
    """sha256 of values in canonical JSON."""
    return hashlib.sha256(json.dumps(contents, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def decode(data: bytes, path: Path) -> Checkpoint:
    """What the state.json of the checkpoint folder ``path`` says.

    Raises:
        CheckpointDamaged: it cannot be parsed, is not what was written, or is of another step than the folder's name
            says.
    """
    try:
        raw = json.loads(data)
        if not isinstance(raw, dict):
            raise ValueError("no object")
        digest = raw.pop("digest", None)
        sealed = digest is not None or "version" in raw
        if sealed:
            if raw.get("version") != _VERSION or digest != digest_of(raw):
                raise ValueError("its digest is not that of its values")
            del raw["version"]
        if raw.keys() | _OPTIONAL != _VALUES:
            raise ValueError(f"its values are {', '.join(sorted(raw))}")
        found = Checkpoint(
            path=path,
            step=_count(raw["step"]),
            dataset=_text(raw["dataset"]),
            consumed=_consumed(raw["consumed"]),
            skips=Skips(**{name: _count(value) for name, value in raw["skips"].items()}),
            top1={_text(name): _percent(value) for name, value in raw.get("top1", {}).items()},
            updates=_count(raw["updates"]),
            inputs={_text(name): _input(value) for name, value in raw.get("inputs", {}).items()},
            sha256={name: _hex(value, 64) for name, value in raw["sha256"].items()},
        )
        if found.sha256.keys() != {MODEL, OPTIMIZER}:
            raise ValueError(f"it names the files {', '.join(found.sha256)}")
        if found.step != step_of(path):
            raise ValueError(f"it is of step {found.step}")
        # All that there is to check where there is no digest.
        if not sealed and found.updates > found.step - found.skips.total:
            raise ValueError(f"{found.updates} updates and {found.skips} do not make {found.step} steps")
        return found
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"no value {error}" if isinstance(error, KeyError) else error
        raise CheckpointDamaged.of(path, f"{STATE} is not what was written ({reason})") from None


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:  # True is an int to isinstance
        raise ValueError(f"{value!r} where a count belongs")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} where text belongs")
    return value


def _hex(value: Any, digits: int) -> str:
    if not isinstance(value, str) or not re.fullmatch(f"[0-9a-f]{{{digits}}}", value):
        raise ValueError(f"{value!r} where {digits} hexadecimal digits belong")
    return value


def is_percent(value: Any) -> bool:
    """Whether a value is a number in 0…100."""
    return type(value) in (int, float) and math.isfinite(value) and 0 <= value <= 100


def _percent(value: Any) -> float:
    if not is_percent(value):
        raise ValueError(f"{value!r} where a percentage belongs")
    return float(value)


def _input(value: Any) -> Input:
    if value is not None and not isinstance(value, (str, int, float)):
        raise ValueError(f"{value!r} where a setting or a digest belongs")
    return value


def _consumed(raw: dict[str, Any]) -> DataProgress:
    if raw.keys() != {"samples", "receipt", "bad_in_epoch"}:
        raise ValueError(f"what it consumed is {', '.join(sorted(raw))}")
    return DataProgress(_count(raw["samples"]), int(_hex(raw["receipt"], 32), 16), _count(raw["bad_in_epoch"]))


def read_state(path: Path) -> Checkpoint:
    """What a checkpoint folder's state.json says; the other files are not looked at. An I/O error is waited out.

    Raises:
        CheckpointDamaged: state.json is missing, or not what was written.
        StorageUnavailable: it could not be read.
    """
    return patiently(lambda: decode(_read_member(path, STATE), path), str(path / STATE))


def _read_member(path: Path, name: str) -> bytes:
    """A small file of a checkpoint. Raises OSError, or CheckpointDamaged if it is missing."""
    try:
        return read_bytes(path / name)
    except FileNotFoundError:
        check_missing(path, name)
        raise


def check_missing(path: Path, name: str) -> None:
    """Tell apart a checkpoint that lacks a file from one whose folder has just gone, with its file system say.

    Raises:
        CheckpointDamaged: the folder is there and the file is not.
        OSError: the folder cannot be looked at, or is gone: to be tried again.
    """
    try:
        names = os.listdir(path)
    except FileNotFoundError:
        raise OSError(errno.ESTALE, f"the folder {path} was there a moment ago and is gone") from None
    if name not in names:
        raise CheckpointDamaged.of(path, f"{name} is missing")


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders in RUN/checkpoints, the newest first, whole or not; none if there is no such folder.

    Raises:
        OSError: the folder cannot be listed.
    """
    try:
        # Not glob, which takes a folder that may not be listed for an empty one.
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    steps = [name for name in names if re.fullmatch(r"step-[0-9]+", name)]
    return sorted((folder / name for name in steps), key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """The step that a checkpoint folder's name says."""
    return int(path.name.removeprefix("step-"))
