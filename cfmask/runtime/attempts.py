"""Records of the starts of a job on a folder, and of the reasons why they ended.

attempts.jsonl   one line per start, with the reason why the previous one ended
ended.json       why the latest start ended; the next start moves it into attempts.jsonl
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfmask.runtime.files import write_atomically
from cfmask.runtime.jsonl import JsonLines, read_lines, read_object

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """A recorded start, and its end."""

    facts: dict[str, Any]
    """Its line of attempts.jsonl."""
    reached: int | None = None
    """The last step that it logged; None: unknown."""
    why_ended: str | None = None
    """None: it has not ended, or has not recorded why."""


@dataclass(frozen=True)
class AttemptLog:
    """The starts that are recorded in a folder (``root``)."""

    root: Path

    @property
    def attempts(self) -> Path:
        return self.root / "attempts.jsonl"

    @property
    def _end(self) -> Path:
        return self.root / "ended.json"

    def logged_step(self) -> int | None:
        """The last step that the latest start has logged; None: unknown. Raises OSError."""
        return None

    def attempt_lines(self) -> list[dict[str, Any]]:
        return read_lines(self.attempts)

    def starts(self) -> list[Start]:
        """All recorded starts, in order."""
        return starts_of(self.attempt_lines(), self.ended())

    def begin_attempt(self, **facts: Any) -> JsonLines:
        """Append a start, with the end of the previous one.

        Args:
            facts: further values of the line.

        Returns:
            attempts.jsonl. If it cannot be written, for example on a full disk, a warning is logged and the line is
            pending.

        Raises:
            OSError: earlier starts cannot be read.
        """
        earlier = self.attempt_lines()
        ended = self.ended()
        why = ended["why"] if ended else "killed without notice" if earlier else None
        line = {"attempt": len(earlier) + 1, "started": now(), **facts, "why_last_ended": why}
        if earlier:
            line |= {"last_ended": ended["ended"] if ended else None, "last_reached": self.logged_step()}
            line |= {"last_died": ended["died"]} if ended and ended.get("died") else {}
        self.root.mkdir(parents=True, exist_ok=True)
        attempts = JsonLines(self.attempts)
        attempts.add(line)
        attempts.write()
        if not attempts.pending:
            try:
                self._end.unlink(missing_ok=True)
            except OSError as error:  # harmless: the file contains the number of its start
                logger.warning(f"{self._end} cannot be removed ({error.strerror})")
        return attempts

    def end_attempt(self, why: str, *, died: dict[str, Any] | None = None) -> None:
        """Record why the latest start ends. If that fails, a warning is logged.

        Args:
            died: which rank has died, and on which node (launch/restarts/retries.py).
        """
        try:
            contents = {"why": why, "ended": now(), "attempt": len(self.attempt_lines())}
            contents |= {"died": died} if died else {}
            write_atomically(self._end, json.dumps(contents))
        except OSError as error:
            logger.warning(f"{self._end} cannot be written ({error.strerror}): {why}")

    def ended(self) -> dict[str, Any] | None:
        """The recorded end of the latest start, with ``why`` and ``ended`` (a time); None without a record."""
        found = read_object(self._end)
        if found is None or not {"why", "ended"} <= found.keys():
            return None
        # A start that was killed between the two writes of ``begin`` leaves the end of the one before.
        attempts, attempt = len(self.attempt_lines()), found.get("attempt")
        return None if isinstance(attempt, int) and attempt < attempts else found

    def begun_by(self, job: str) -> bool:
        """Whether the latest recorded start is this one.

        Args:
            job: name of the start, such as "12-0".
        """
        starts = self.attempt_lines()
        return bool(starts) and starts[-1].get("job") == job

    def deaths(self, job: str, *, before: str) -> list[dict[str, Any]]:
        """``died`` of a job's starts, in order.

        Args:
            job: its number; the names of its starts begin with it, as in "12-0".
            before: name of the current start, which is excluded.
        """
        lines = self.attempt_lines()
        found = [
            line["last_died"]
            for line, earlier in zip(lines[1:], lines, strict=False)
            if line.get("last_died") and _job_of(earlier) == job
        ]
        ended = self.ended()
        if ended and ended.get("died") and lines and _job_of(lines[-1]) == job and lines[-1].get("job") != before:
            found.append(ended["died"])
        return found

    def end_failed(
        self,
        why: str,
        *,
        job: str,
        died: dict[str, Any] | None = None,
        **facts: Any,
    ) -> None:
        """Record why this start of a job ends. If it failed before it was recorded, record it first, with ``facts``, so
        that the end of the previous one is kept."""
        if not self.begun_by(job):
            self.begin_attempt(job=job, **facts, from_step=None)
        self.end_attempt(why, died=died)


def _job_of(line: dict[str, Any]) -> str:
    return str(line.get("job")).rpartition("-")[0]


def now() -> str:
    """Local time, ISO 8601."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def starts_of(lines: Sequence[dict[str, Any]], ended: Mapping[str, Any] | None) -> list[Start]:
    """Starts from the lines of attempts.jsonl and the content of ended.json: each line also says how the start before
    it has ended."""
    ends = [(line.get("last_reached"), line.get("why_last_ended")) for line in lines[1:]]
    ends.append((None, str(ended["why"]) if ended else None))
    return [Start(line, *end) for line, end in zip(lines, ends, strict=False)]
