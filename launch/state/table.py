"""Tables of runs and of a run's starts, and a line of totals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cfmask.evaluation.model_origin import short_names
from cfmask.runs import RunFolder
from cfmask.runtime.output import clean
from cfmask.runtime.times import duration, when
from launch.state.facts import RunState, SlurmAnswers
from launch.state.status import FAILED, WAITING, Status, explained_starts
from launch.state.terminal import PLAIN, Column, LastColumn, Terminal, draw_table

_ORDER = ("running", "starting", "ending", "cancelling", "requeued", "queued", "failed", "dead", "stopped", "cancelled")
"""States in the line of totals; others come after them, and "finished" last."""
_COLOURS = {
    "running": "green",
    **dict.fromkeys(FAILED, "red"),
    **dict.fromkeys((*WAITING, "starting", "ending", "cancelling"), "yellow"),
    **dict.fromkeys(("stopped", "cancelled", "never started", "unknown"), "grey"),
}
_WIDE = ("nodes", "loss", "starts", "samples/s", "job")
_NARROW = ("step", "ETA", "at epoch", "best", "done")


def table(statuses: Sequence[Status], terminal: Terminal = PLAIN) -> str:
    """A row for each run. On a terminal it has short names and fits the width, and reasons that do not fit are on lines
    of their own."""
    names = [s.run for s in statuses]
    if terminal.width is not None:
        names = short_names(names) if len(names) > 1 else [Path(name).name for name in names]
    sets = _sets(statuses)
    done = Column("done", [_percent(s.step, s.total_steps) for s in statuses], right=True)
    columns = [
        Column("step", [_steps(s.step, s.total_steps) for s in statuses], right=True, narrow=done),
        Column("best", [_best(s, sets) for s in statuses], right=True),
        Column("at epoch", [f"{s.best_epoch} of {s.epochs}" if s.best_epoch else None for s in statuses], right=True),
        Column("ETA", [duration(s.eta_s) for s in statuses], right=True),
        Column("samples/s", [_number(s.samples_per_s, ".0f") for s in statuses], right=True),
        Column("loss", [_number(s.loss, ".4g") for s in statuses], right=True),
        Column("starts", [str(s.attempts) for s in statuses], right=True),
        Column("job", [f"{s.job} (+{s.waiting})" if s.waiting else s.job for s in statuses]),
        Column("nodes", [s.nodes and clean(s.nodes) for s in statuses]),
    ]
    return draw_table(
        Column("run", [clean(name) for name in names]),
        columns,
        LastColumn(
            "state", [clean(s.in_words) or s.state for s in statuses], [s.state for s in statuses], _colours(statuses)
        ),
        terminal,
        optional=_WIDE,
        droppable=_NARROW,
        below=[_below(s) for s in statuses],
        most=3 if len(statuses) > 1 else None,
    )


def _colours(statuses: Sequence[Status]) -> list[str | None]:
    return [_COLOURS.get(s.state) for s in statuses]


def _below(status: Status) -> list[str]:
    return [
        *([f"to do: {status.remedy}"] if status.remedy else []),
        *([f"slowest: {clean(status.straggler)}"] if status.straggler else []),
        *(f"note: {clean(note)}" for note in status.notes),
    ]


def totals(statuses: Sequence[Status], of: int) -> str:
    """The numbers of runs by state, and what the column "best" shows: "12 runs: 3 running, 1 queued, 8 finished; best:
    top-1 on holdout".

    Args:
        of: number of runs before filters.
    """
    counts = Counter(s.state for s in statuses)
    states = [*(state for state in _ORDER if state in counts), *sorted(counts.keys() - {*_ORDER, "finished"})]
    states += ["finished"] if "finished" in counts else []
    number = str(of) if len(statuses) == of else f"{len(statuses)} of {of}"
    parts = ", ".join(f"{counts[state]} {state}" for state in states)
    sets = _sets(statuses)
    best = f"; best: top-1 on {clean(*sets)}" if len(sets) == 1 else ""
    return f"{number} run{'s' if of != 1 else ''}" + (f": {parts}" if parts else "") + best


def attempts_table(run_state: RunState, status: Status, slurm: SlurmAnswers, terminal: Terminal = PLAIN) -> str:
    """A row for each start."""
    starts = explained_starts(run_state, status, slurm)
    attempts = [start.facts for start in starts]
    if not starts:
        return "no start yet"
    whys = [clean(start.why_ended or "–") for start in starts]

    def column(title: str, key: str, form: str = "") -> Column:
        values = [attempt.get(key) for attempt in attempts]
        texts = [_number(v, form) if form else None if v is None else clean(str(v)) for v in values]
        return Column(title, texts, right=bool(form))

    return draw_table(
        Column("attempt", [str(attempt.get("attempt", i)) for i, attempt in enumerate(attempts, 1)]),
        [
            Column("started", [when(attempt.get("started")) for attempt in attempts]),
            column("job", "job"),
            column("nodes", "nodes", "d"),
            column("ranks", "world_size", "d"),
            column("device", "device"),
            column("from step", "from_step", "d"),
            Column("to step", [_number(start.reached, "d") for start in starts], right=True),
        ],
        LastColumn("ended", whys, ["" for _ in whys]),
        terminal,
        optional=("device", "nodes", "ranks", "job"),
        droppable=("started", "from step"),
    )


def latest_checkpoint(run: RunFolder) -> str:
    """Names the newest checkpoint in a sentence."""
    step = run.saved_step()
    return f"the latest checkpoint is {run.checkpoints / f'step-{step:08d}'}" if step else "there is no checkpoint"


def _sets(statuses: Sequence[Status]) -> set[str]:
    """The sets on which the best epochs are best."""
    return {s.best_on for s in statuses if s.best_on}


def _best(status: Status, sets: set[str]) -> str | None:
    if status.best_top1 is None:
        return None
    return f"{status.best_top1:.2f} %" + (f" ({clean(str(status.best_on))})" if len(sets) > 1 else "")


def _steps(step: int | None, total: int | None) -> str | None:
    return None if step is None else f"{step}/{total}" if total else str(step)


def _percent(step: int | None, total: int | None) -> str | None:
    return None if step is None or not total else f"{100 * step // total} %"


def _number(value: Any, form: str) -> str | None:
    try:
        return format(value, form) if isinstance(value, int | float) else None
    except ValueError:  # an integer's format for a number with a fraction
        return str(value)
