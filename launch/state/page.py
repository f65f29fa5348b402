"""Runs as blocks of a page: their states, and all of their starts with the reasons why they ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cfmask.report import page
from cfmask.report.page import Html
from cfmask.runtime.attempts import Start, starts_of
from launch.state.facts import RunState, SlurmAnswers
from launch.state.status import Status, explained
from launch.state.table import duration


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


def explained_starts(run_state: RunState, status: Status, slurm: SlurmAnswers) -> list[Start]:
    """All recorded starts. Where one has not recorded why it ended, Slurm's reason is given. Steps after the last one
    that a start has logged are in the range of the next start."""
    starts = starts_of(run_state.attempts, run_state.ended)
    found = [replace(each, why_ended=explained(str(each.why_ended), each.facts, slurm)) for each in starts[:-1]]
    runs = status.state in ("running", "cancelling")
    return found + [
        replace(each, reached=run_state.step, why_ended=None if runs else status.last_end) for each in starts[-1:]
    ]


def _of(step: int | None, total: int | None) -> str | None:
    return None if step is None else f"{step:,} of {total:,}" if total else f"{step:,}"
