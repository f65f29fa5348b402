"""A line that shows the progress of a run, and is redrawn on a terminal."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TextIO

from cfmask.runtime.output import cells, clean
from cfmask.runtime.times import duration
from launch.state.terminal import Terminal, pad, shorten

_BAR = 24
"""The longest bar, in cells."""
_SHORTEST_BAR = 8
_NAME = 16
"""Cells that the name keeps at least."""
_EIGHTHS = " ▏▎▍▌▋▊▉"


@dataclass(frozen=True)
class Progress:
    """What the line shows.

    name: of the run.
    state: a phrase, unless it trains.
    step, total: optimizer steps or images; None before the first.
    loss, samples_per_s, eta_s: None if unknown. eta_s is counted from the steps of the latest start.
    """

    name: str
    state: str = ""
    step: int | None = None
    total: int | None = None
    loss: float | None = None
    samples_per_s: float | None = None
    eta_s: float | None = None


def progress_line(progress: Progress, width: int | None) -> str:
    """The line, of at most ``width`` cells: name, state, bar, ETA, step, loss and rate, as far as they fit. Without a
    ``width``, everything but the bar."""
    p, facts = progress, list[str]()
    fraction = min(1.0, p.step / p.total) if p.step is not None and p.total else None
    if p.state:
        facts.append(clean(p.state))
    if fraction is not None:
        facts.append(f"{int(100 * fraction):3} %")
    if p.eta_s is not None and p.step != p.total:
        facts.append(f"ETA {duration(p.eta_s)}")
    if fraction is not None:
        facts.append(f"{p.step:{len(str(p.total))}}/{p.total}")  # of constant width, so that the line does not jump
    if p.loss is not None:
        facts.append(f"loss {p.loss:.3f}")
    if p.samples_per_s is not None:
        facts.append(f"{p.samples_per_s:.0f} samples/s")
    name = clean(p.name)
    if width is None:
        return "  ".join([name, *facts])
    least = min(cells(name), _NAME)
    bar_width = _SHORTEST_BAR + 2 if fraction is not None and not p.state else 0
    while len(facts) > 1 and least + bar_width + sum(cells(fact) + 2 for fact in facts) > width:
        if len(facts) == 2 and bar_width:
            bar_width = 0  # rather than the ETA
        else:
            facts.pop()
    text = shorten("".join(f"  {fact}" for fact in facts), max(0, width - least))
    name = shorten(name, max(least, width - cells(text) - bar_width))
    left = width - cells(name) - cells(text) - 2
    bar = f"  {_bar(fraction, min(_BAR, left))}" if fraction is not None and left >= _SHORTEST_BAR else ""
    return shorten(name + bar + text, width)


def _bar(fraction: float, width: int) -> str:
    """A bar with a resolution of an eighth of a cell."""
    whole, rest = divmod(round(fraction * width * 8), 8)
    return pad("█" * whole + (_EIGHTHS[rest] if rest else ""), width).replace(" ", "░")


class ProgressLine:
    """Shows the progress on a stream: on a terminal in place, elsewhere as a new line every ``pace_s`` seconds."""

    def __init__(self, stream: TextIO, *, pace_s: float = 15) -> None:
        self._stream, self._pace_s = stream, pace_s
        self._last, self._at = "", 0.0

    def show(self, progress: Progress, *, final: bool = False) -> None:
        """Raises OSError if the terminal was closed."""
        terminal = Terminal.of(self._stream)  # it may have been resized
        if terminal.width is None:
            line = progress_line(progress, None)
            if line != self._last and (final or not self._last or time.monotonic() - self._at >= self._pace_s):
                self._stream.write(line + "\n")
                self._last, self._at = line, time.monotonic()
        else:
            line = progress_line(progress, terminal.width - 1)  # a full line would wrap on some terminals
            self._stream.write("\r" + pad(line, cells(self._last)) + ("\n" if final else ""))
            self._last = line
        self._stream.flush()
