"""Base of recipes and evaluations: JSON, digest, and comparison of frozen dataclasses."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any


class Record:
    """Base class for a frozen dataclass whose fields may be dataclasses."""

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON values, nested dataclasses as dictionaries."""
        return dataclasses.asdict(self)  # type: ignore[call-overload, no-any-return]

    def to_json(self) -> str:
        return json.dumps(self.as_dict(), indent=2)

    def digest(self) -> str:
        """8 hexadecimal digits that identify the values."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:8]

    def differences(self, other: Any) -> list[str]:
        """Fields that differ from another record of the same class, as "field: ours → theirs" or "group.field: …"."""
        ours, theirs = _flat(self.as_dict()), _flat(other.as_dict())
        return [f"{name}: {ours[name]} → {theirs[name]}" for name in ours if ours[name] != theirs[name]]


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= {f"{name}.{inner}": each for inner, each in value.items()}
        else:
            found[name] = value
    return found
