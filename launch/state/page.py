"""The states of runs as a block of a page."""

from __future__ import annotations

from collections.abc import Sequence

from cfmask.report import page
from cfmask.report.page import Html
from launch.state.status import Status
from launch.state.times import duration


def runs_table(caption: str, names: Sequence[str], statuses: Sequence[Status]) -> Html:
    """A line for each run."""
    rows = [
        [
            name,
            s.state,
            _of(s.step, s.total_steps),
            None if s.samples_per_s is None else f"{s.samples_per_s:,.0f}",
            None if s.loss is None else f"{s.loss:.4g}",
            duration(s.eta_s),
            f"{s.job} (+{s.waiting})" if s.waiting else s.job,
            s.attempts,
            s.next_start,
            s.last_end,
        ]
        for name, s in zip(names, statuses, strict=True)
    ]
    header = [
        "run",
        "state",
        "step",
        "samples/s",
        "loss",
        "ETA",
        "job",
        "starts",
        "next start",
        "why the last one ended",
    ]
    return page.table(caption, header, rows)


def _of(step: int | None, total: int | None) -> str | None:
    return None if step is None else f"{step:,} of {total:,}" if total else f"{step:,}"
