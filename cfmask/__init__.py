"""cfmask: fine-tunes CLIP on ImageNet so that it stays robust, on Slurm clusters.

For notebooks, ``import cfmask`` offers the names in ``__all__``; docs/notebook.md has an example. They are loaded at
first use, because torch takes seconds to import.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cfmask.api import Method, Model, batches, counterfactuals, evaluate, load_model, load_set

__version__ = "0.1.0"
"""The only place that states the version. pyproject.toml reads it here; CHANGELOG.md lists the changes."""

__all__ = ["Method", "Model", "batches", "counterfactuals", "evaluate", "load_model", "load_set"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("cfmask.api"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
