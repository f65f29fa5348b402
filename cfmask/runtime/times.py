"""Times and durations as people read them."""

from __future__ import annotations

from datetime import datetime
from typing import Any


def duration(seconds: float | None) -> str | None:
    """45 s, 12 min, 3 h 12 min, or 2 d 4 h."""
    if seconds is None:
        return None
    if round(seconds) < 60:
        return f"{round(max(0.0, seconds))} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min" if minutes % 60 else f"{minutes // 60} h"
    hours = round(minutes / 60)
    return f"{hours // 24} d {hours % 24} h" if hours % 24 else f"{hours // 24} d"


def local_time(text: Any) -> datetime | None:
    """Parses 2026-01-31T12:00:00 with or without a time zone; None if it is something else."""
    for form in ("%Y-%m-%dT%H:%M:%S%z", "%Y-%m-%dT%H:%M:%S"):
        try:
            return datetime.strptime(str(text), form).astimezone().replace(tzinfo=None)
        except (ValueError, OverflowError):
            continue
    return None


def date_and_time(text: Any) -> str | None:
    """A recorded time in this machine's time zone, to the minute; None if it is none."""
    moment = local_time(text)
    return None if moment is None else moment.strftime("%Y-%m-%d %H:%M")


def when(text: Any) -> str:
    """A recorded time on a terminal: to the second without its date if that is today; "-" if it is none."""
    moment = local_time(text)
    if moment is not None and moment.date() == datetime.now().date():
        return moment.strftime("%H:%M:%S")
    return date_and_time(text) or "-"
