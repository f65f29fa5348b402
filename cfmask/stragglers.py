"""Which rank holds the others up, as log.jsonl has it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_FACTOR = 1.2
"""So many times the median is a straggler."""


def straggler_of(line: Mapping[str, Any]) -> str | None:
    """In words, of a line of log.jsonl; None if no rank takes much longer than the median."""
    seconds, median = line.get("slowest_rank_s"), line.get("median_rank_s")
    if not seconds or not median or seconds < _FACTOR * median:
        return None
    return f"rank {line['slowest_rank']} on {line['slowest_rank_node']} ({seconds / median:.1f} × the median)"
