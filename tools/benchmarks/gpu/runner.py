"""Runs parts of a measurement, each in a process of its own with its own limit, and reports on them while they run.

    OUT/report.md       a section for each part, rewritten while parts run
    OUT/results.json    {part: {"status", "seconds", "reason", "result"}}, rewritten whenever a part ends
    OUT/log.txt         stdout and stderr of the parts and of the programs that they start

A part is forked from a process that has imported everything but has not initialised CUDA, so it starts at once. A part
that raises, crashes or exceeds its limit affects no other part. The parts of a stage run side by side.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from cfmask.report.tables import table
from cfmask.runtime.files import write_atomically
from tools.benchmarks.gpu.setting import Setting

RAN = "ran"
CANNOT_RUN = "cannot run here"
FAILED = "failed"
DIED = "died"
TIMED_OUT = "exceeded its limit"
LEFT_OUT = "left out"
UNDER_WAY = "under way"

GRACE = 30.0
"""Seconds by which a part may exceed the budget, if it began within it."""

POLL = 1.0
"""Seconds between two updates of the report while parts run."""

MARK = "CFMASK_BENCH_PART"
"""Environment variable with the part that started a program. It marks programs in other sessions too."""


class CannotRun(Exception):
    """The part cannot run on this machine. The message has the reason."""


class Section:
    """A part's text in the report. Each call appends to it at once, so the results of a killed part are kept."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def note(self, text: str) -> None:
        with open(self._path, "a") as file:
            file.write(text.rstrip() + "\n\n")

    def table(self, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        self.note(table(header, [[str(cell) for cell in row] for row in rows]))


@dataclass(frozen=True)
class Part:
    """One measurement."""

    name: str
    function: Callable[[Setting, Section], dict[str, Any]]
    """Writes its section of the report, and returns its entry of results.json."""
    expected: float
    """Seconds on an H100. A part that would exceed the budget is left out."""
    limit: float | None = None
    """Seconds until it is killed; by default twice the expected time and 20 s, more with a larger budget."""


@dataclass
class Outcome:
    """How a part ended."""

    status: str
    seconds: float = 0.0
    reason: str = ""
    """Empty for RAN."""
    result: dict[str, Any] | None = None
    """What its function returned."""


@dataclass
class _Running:
    part: Part
    process: Any
    receiver: Connection
    begun: float
    limit: float
    log: Path

    @property
    def deadline(self) -> float:
        return self.begun + self.limit


@dataclass
class Runner:
    """Runs stages of parts within a budget of seconds from ``start`` (time.monotonic)."""

    setting: Setting
    budget: float
    heading: str
    start: float = field(default_factory=time.monotonic)
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    def run(self, stages: Iterable[Sequence[Part]]) -> dict[str, Outcome]:
        """Run the stages one after the other, the parts of a stage side by side."""
        for stage in stages:
            self._run_stage(stage)
        return self.outcomes

    def _run_stage(self, stage: Sequence[Part]) -> None:
        running: list[_Running] = []
        try:
            for part in stage:
                spent = time.monotonic() - self.start
                if spent + part.expected > self.budget:
                    reason = f"{spent:.0f} s of {self.budget:.0f} s are spent, and it takes {part.expected:.0f} s"
                    self._end(part, Outcome(LEFT_OUT, reason=reason))
                else:
                    running.append(self._begin(part, spent))
            while running:
                nearest = min(one.deadline for one in running) - time.monotonic()
                wait([one.receiver for one in running], max(0.0, min(POLL, nearest)))
                for one in list(running):
                    outcome = _outcome(one)
                    if outcome is not None:
                        running.remove(one)
                        self._clean_up(one)
                        self._end(one.part, outcome)
                self.write_report()
        finally:  # in case this process is stopped
            for one in running:
                self._clean_up(one)

    def _begin(self, part: Part, spent: float) -> _Running:
        limit = part.limit or (2 * part.expected + 20) * max(1.0, self.budget / 480)
        limit = min(limit, self.budget + GRACE - spent)
        print(f"[{spent:6.1f}] {part.name}: expected {part.expected:.0f} s, limit {limit:.0f} s", file=sys.stderr)
        sys.stderr.flush()
        self.outcomes[part.name] = Outcome(UNDER_WAY, reason=f"expected {part.expected:.0f} s, limit {limit:.0f} s")
        self.write_report()
        log = self.setting.work / f"{_file_name(part)}.log"
        context = multiprocessing.get_context("fork")
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(
            target=_answer, args=(sender, part, self.setting, self._section(part), log, _mark(part))
        )
        begun = time.monotonic()
        process.start()
        sender.close()
        return _Running(part, process, receiver, begun, limit, log)

    def _clean_up(self, one: _Running) -> None:
        """Kill the part's process and all programs that it started, and keep its output."""
        for _ in range(3):  # again, for programs that were being started
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(one.process.pid, signal.SIGKILL)
            for pid in _started_by(one.part):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
        one.process.join(5)
        one.receiver.close()
        with open(self.setting.out / "log.txt", "a") as file:
            file.write(f"==== {one.part.name}\n{_read(one.log)}\n")

    def _end(self, part: Part, outcome: Outcome) -> None:
        self.outcomes[part.name] = outcome
        results = {name: vars(of) for name, of in self.outcomes.items() if of.status != UNDER_WAY}
        write_atomically(self.setting.out / "results.json", json.dumps(results, indent=1, default=str))
        self.write_report()
        print(f"[{time.monotonic() - self.start:6.1f}] {self._text(part.name, outcome)}", file=sys.stderr, flush=True)

    def write_report(self, *more: str) -> None:
        """Write report.md: the heading, a section for each part that has begun or was left out, and ``more``."""
        sections = [self._text(name, outcome) for name, outcome in self.outcomes.items()]
        write_atomically(self.setting.out / "report.md", "\n\n".join([self.heading, *sections, *more]) + "\n")

    def _section(self, part: Part) -> Section:
        return Section(self.setting.work / f"{_file_name(part)}.md")

    def _text(self, name: str, outcome: Outcome) -> str:
        lines = [f"## {name}"]
        found = _read(self.setting.work / f"{name.replace('/', '-')}.md").strip()
        if found:
            lines.append(found)
        if outcome.status == RAN:
            lines.append(f"({name}: {outcome.seconds:.1f} s)")
        elif outcome.status in (LEFT_OUT, UNDER_WAY):
            lines.append(f"**{name}: {outcome.status}**: {outcome.reason}")
        else:
            lines.append(f"**{name}: {outcome.status}** after {outcome.seconds:.1f} s: {outcome.reason}")
        return "\n\n".join(lines)


def _file_name(part: Part) -> str:
    return part.name.replace("/", "-")


def _outcome(one: _Running) -> Outcome | None:
    """How the part ended; None while it runs."""
    seconds = round(time.monotonic() - one.begun, 1)
    if one.receiver.poll():
        try:
            status, reason, result = one.receiver.recv()
        except EOFError:
            one.process.join(5)
            reason = f"exit code {one.process.exitcode}; its last output:\n{_quoted(_read(one.log)[-1500:])}"
            return Outcome(DIED, seconds, reason)
        return Outcome(status, seconds, reason, result)
    if time.monotonic() >= one.deadline:
        return Outcome(TIMED_OUT, seconds, f"{one.limit:.0f} s; its last output:\n{_quoted(_read(one.log)[-1500:])}")
    return None


def _answer(sender: Connection, part: Part, setting: Setting, section: Section, log: Path, mark: str) -> None:
    """Run the part in this forked process, and send its outcome."""
    os.setsid()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(output, stream)
    sys.stdout, sys.stderr = (open(stream, "w", buffering=1, closefd=False) for stream in (1, 2))
    os.environ[MARK] = mark
    try:
        answer: tuple[str, str, Any] = (RAN, "", part.function(setting, section))
    except CannotRun as error:
        answer = (CANNOT_RUN, str(error), None)
    except AssertionError as error:
        answer = (FAILED, str(error) or "an assertion without a message; see log.txt", None)
        traceback.print_exc()
    except BaseException:
        answer = (FAILED, f"it raised\n{_quoted(traceback.format_exc()[-2500:])}", None)
        traceback.print_exc()
    sender.send(answer)
    sender.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # the outcome is sent, and finalization of NCCL and of profilers may hang


def _mark(part: Part) -> str:
    """The value of MARK in programs of a part."""
    return f"{os.getpid()}:{part.name}"


def _started_by(part: Part) -> Iterator[int]:
    """Process ids of the programs that a part has started, in any session."""
    wanted = f"{MARK}={_mark(part)}".encode()
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if wanted in path.read_bytes().split(b"\0"):
                yield int(path.parent.name)


def _quoted(text: str) -> str:
    return f"```\n{text.strip()}\n```"


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
