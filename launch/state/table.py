"""Tables of runs and of a run's starts, and the formats of checkpoints and durations."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from cfmask.runs import RunFolder
from launch.state.facts import RunState, SlurmAnswers
from launch.state.status import Status, explained, when


def table(statuses: Iterable[Status]) -> str:
    header = ("run", "state", "step", "samples/s", "loss", "ETA", "job", "attempts", "next start", "last end")
    return _columns(
        header,
        [
            (
                s.run,
                s.state,
                _steps(s.step, s.total_steps),
                _number(s.samples_per_s, ".0f"),
                _number(s.loss, ".4g"),
                duration(s.eta_s),
                f"{s.job} (+{s.waiting})" if s.waiting else s.job,
                str(s.attempts),
                s.next_start,
                s.last_end,
            )
            for s in statuses
        ],
    )


def attempts_table(run_state: RunState, status: Status, slurm: SlurmAnswers) -> str:
    """A line for each start. Steps after the last one that a start has logged are in the range of the next start."""
    rows = []
    for i, attempt in enumerate(run_state.attempts):
        why: str | None
        if i + 1 < len(run_state.attempts):
            after = run_state.attempts[i + 1]
            until = after.get("last_reached")
            why = explained(str(after.get("why_last_ended")), attempt, slurm)
        else:
            until = run_state.step
            why = None if status.state in ("running", "cancelling") else status.last_end
        rows.append(
            (
                str(attempt.get("attempt", i + 1)),
                when(attempt.get("started")),
                attempt.get("job"),
                _number(attempt.get("nodes"), "d"),
                _number(attempt.get("world_size"), "d"),
                attempt.get("device"),
                _number(attempt.get("from_step"), "d"),
                _number(until, "d"),
                why,
            )
        )
    header = ("attempt", "started", "job", "nodes", "ranks", "device", "from step", "to step", "ended")
    return _columns(header, rows) if rows else "no start yet"


def _columns(header: Sequence[str], rows: Sequence[Sequence[str | None]]) -> str:
    """Padded columns; on a terminal lines are cut to its width."""
    lines = [header, *(["-" if cell is None else " ".join(cell.split()) for cell in row] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header) - 1)]
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    texts = ["  ".join([*(c.ljust(w) for c, w in zip(line, widths, strict=False)), line[-1]]) for line in lines]
    return "\n".join(text if width is None or len(text) <= width else text[: width - 1] + "…" for text in texts)


def latest_checkpoint(run: RunFolder) -> str:
    """Names the newest checkpoint in a sentence."""
    step = run.saved_step()
    return f"the latest checkpoint is {run.checkpoints / f'step-{step:08d}'}" if step else "there is no checkpoint"


def duration(seconds: float | None) -> str | None:
    """1:02:03, or 2 d 03 h."""
    if seconds is None:
        return None
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours // 24} d {hours % 24:02} h" if hours >= 48 else f"{hours}:{minutes:02}:{left:02}"


def _steps(step: int | None, total: int | None) -> str | None:
    return None if step is None else f"{step}/{total}" if total else str(step)


def _number(value: Any, form: str) -> str | None:
    return format(value, form) if isinstance(value, int | float) else None
