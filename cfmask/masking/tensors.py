"""Dataclasses of tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, TypeVar

from torch import Tensor

T = TypeVar("T", bound="TensorFields")


class TensorFields:
    """Base of dataclasses whose fields are tensors, other such dataclasses, or anything else."""

    def map(self: T, function: Callable[[Tensor], Tensor]) -> T:
        """``function`` applied to each tensor (moving to a device, pinning), in the order of fields."""
        changed: dict[str, Any] = {}
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                changed[field.name] = function(value)
            elif isinstance(value, TensorFields):
                changed[field.name] = value.map(function)
        return replace(self, **changed)  # type: ignore[type-var]

    def tensors(self) -> list[Tensor]:
        """All tensors, in the order of ``map``."""
        found: list[Tensor] = []
        self.map(lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
        return found
