"""state.json of a checkpoint: its contents and their protection, and the list of checkpoint folders.

    {"version": 2, "step": …, "dataset": …, "consumed": {…}, "skips": {…}, "top1": {…}, "updates": …,
     "inputs": {"run.seed": 0, "initial.safetensors": …, …},
     "sha256": {"model.safetensors": …, "optimizer.safetensors": …}, "digest": …}

digest is the sha256 of the other values in canonical JSON, which reveals every changed value. Files of version 1 have
neither "version" nor "digest": only types, ranges and the folder's name can be checked. Older files have no "inputs".
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from cfmask.data.receipts import DataProgress
from cfmask.errors import UserError
from cfmask.runtime.files import read_bytes
from cfmask.runtime.patience import patiently

STATE, MODEL, OPTIMIZER = "state.json", "model.safetensors", "optimizer.safetensors"

_VERSION = 2
_VALUES = {"step", "dataset", "consumed", "skips", "top1", "updates", "inputs", "sha256"}
_OPTIONAL = {"top1", "inputs"}

Input = str | int | float | None
T = TypeVar("T")


@dataclass(frozen=True)
class Skips:
    """Steps that were skipped because a loss or gradient was not finite.

    total: since the run began.
    in_a_row: immediately before now.
    """

    total: int = 0
    in_a_row: int = 0

    def plus(self, skipped: bool) -> Skips:
        return Skips(self.total + skipped, self.in_a_row + 1 if skipped else 0)


@dataclass(frozen=True)
class CheckpointState:
    """What a run knows beside weights and moments.

    step: optimizer steps so far, over all phases.
    dataset: digest of the training set.
    consumed: samples of the training set so far.
    skips: skipped steps.
    top1: percent by set, if the model was evaluated at this step.
    inputs: what else decides the weights, by name: settings of the recipe, digests of model files.
    """

    step: int
    dataset: str
    consumed: DataProgress
    skips: Skips = Skips()
    top1: Mapping[str, float] = field(default_factory=dict)
    inputs: Mapping[str, Input] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Checkpoint(CheckpointState):
    """A checkpoint whose state.json is intact.

    path: its folder.
    updates: the optimizer's own count, which excludes skipped steps and starts with the phase.
    sha256: of the other files, by name.
    """

    path: Path
    updates: int
    sha256: Mapping[str, str]


class CheckpointDamaged(UserError):
    """A checkpoint was read and differs from what was written."""

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
    """Parse the state.json of the checkpoint folder ``path``.

    Raises:
        CheckpointDamaged: it cannot be parsed, differs from what was written, or is of another step than the folder's
            name.
    """
    try:
        raw = json.loads(data)
        if not isinstance(raw, dict):
            raise ValueError("not an object")
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
            consumed=_progress(raw["consumed"]),
            skips=Skips(**{name: _count(value) for name, value in raw["skips"].items()}),
            top1={_text(name): _percent(value) for name, value in raw.get("top1", {}).items()},
            updates=_count(raw["updates"]),
            inputs={_text(name): _input(value) for name, value in raw.get("inputs", {}).items()},
            sha256={name: _sha256(value) for name, value in raw["sha256"].items()},
        )
        if found.sha256.keys() != {MODEL, OPTIMIZER}:
            raise ValueError(f"it names the files {', '.join(found.sha256)}")
        if found.step != step_of(path):
            raise ValueError(f"it is of step {found.step}")
        if not sealed and found.updates > found.step - found.skips.total:  # the only check without a digest
            raise ValueError(f"{found.updates} updates and {found.skips} contradict {found.step} steps")
        return found
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"no value {error}" if isinstance(error, KeyError) else error
        raise CheckpointDamaged.of(path, f"{STATE} is not what was written ({reason})") from None


def _checked(valid: Callable[[Any], bool], expected: str) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if not valid(value):
            raise ValueError(f"{value!r} instead of {expected}")
        return value

    return check


def is_percent(value: Any) -> bool:
    """Whether a value is a number in 0…100."""
    return type(value) in (int, float) and math.isfinite(value) and 0 <= value <= 100


_count = _checked(lambda value: type(value) is int and value >= 0, "a count")  # isinstance would accept True
_text = _checked(lambda value: isinstance(value, str), "text")
_input = _checked(lambda value: value is None or isinstance(value, (str, int, float)), "a setting or a digest")
_percent = _checked(is_percent, "a percentage")
_sha256 = _checked(lambda value: re.fullmatch("[0-9a-f]{64}", value) is not None, "64 hexadecimal digits")
_receipt = _checked(lambda value: re.fullmatch("[0-9a-f]{32}", value) is not None, "32 hexadecimal digits")


def _progress(raw: dict[str, Any]) -> DataProgress:
    if raw.keys() != {"samples", "receipt", "bad_in_epoch"}:
        raise ValueError(f"its consumed samples are given by {', '.join(sorted(raw))}")
    return DataProgress(_count(raw["samples"]), int(_receipt(raw["receipt"]), 16), _count(raw["bad_in_epoch"]))


def read_state(path: Path) -> Checkpoint:
    """Read the state.json of a checkpoint folder; the other files are not read. I/O errors are retried.

    Raises:
        CheckpointDamaged: state.json is missing, or differs from what was written.
        StorageUnavailable: it could not be read.
    """
    return patiently(lambda: decode(read_member(path, STATE, read_bytes), path), str(path / STATE))


def read_member(path: Path, name: str, read: Callable[[Path], T]) -> T:
    """``read(path / name)`` for a file of a checkpoint. A missing file in an existing folder means damage. If the
    folder is gone as well, its file system may be unmounted, and the read should be retried.

    Raises:
        CheckpointDamaged: the folder exists and the file does not.
        OSError: the file or the folder cannot be read.
    """
    try:
        return read(path / name)
    except FileNotFoundError:
        try:
            names = os.listdir(path)
        except FileNotFoundError:
            raise OSError(errno.ESTALE, f"the folder {path} has just disappeared") from None
        if name not in names:
            raise CheckpointDamaged.of(path, f"{name} is missing") from None
        raise


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders in RUN/checkpoints, newest first, intact or not; empty if the folder does not exist.

    Raises:
        OSError: the folder cannot be listed.
    """
    try:
        # glob would take a folder that cannot be listed for an empty one.
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    steps = [name for name in names if re.fullmatch(r"step-[0-9]+", name)]
    return sorted((folder / name for name in steps), key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """The step in a checkpoint folder's name."""
    return int(path.name.removeprefix("step-"))
