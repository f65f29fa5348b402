"""Starts of a job on a folder, each with why the one before it ended.

attempts.jsonl   one line a start
ended.json       why the latest start ended, until the next one takes it over into attempts.jsonl
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfmask.files import write_atomically
from cfmask.runtime.jsonl import JsonLines, read_lines, read_object

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AttemptLog:
    """The starts that are recorded in a folder."""

    folder: Path

    @property
    def path(self) -> Path:
        return self.folder / "attempts.jsonl"

    @property
    def _end(self) -> Path:
        return self.folder / "ended.json"

    def lines(self) -> list[dict[str, Any]]:
        return read_lines(self.path)

    def begin(self, *, reached: int | None = None, **facts: Any) -> JsonLines:
        """Append a start, with why and when the last one ended, and what it had reached.

        Returns:
            attempts.jsonl. Where it cannot be written, on a full disk say, that is a warning, and the line waits there.

        Raises:
            OSError: earlier starts cannot be read.
        """
        earlier = self.lines()
        ended = self.ended()
        why = ended["why"] if ended else "killed without notice" if earlier else None
        line = {"attempt": len(earlier) + 1, "started": now(), **facts, "why_last_ended": why}
        if earlier:
            line |= {"last_ended": ended["ended"] if ended else None, "last_reached": reached}
            line |= {"last_died": ended["died"]} if ended and ended.get("died") else {}
        self.folder.mkdir(parents=True, exist_ok=True)
        attempts = JsonLines(self.path)
        attempts.add(line)
        attempts.write()
        if not attempts.pending:
            try:
                self._end.unlink(missing_ok=True)
            except OSError as error:  # it says which start it is of
                logger.warning(f"{self._end} cannot be removed ({error.strerror})")
        return attempts

    def end(self, why: str, *, died: dict[str, Any] | None = None) -> None:
        """Record why the latest start ends. On a full disk that is a warning: the end has its own reason.

        Args:
            died: which rank has died, and where (launch/restarts/retries.py).
        """
        try:
            contents = {"why": why, "ended": now(), "attempt": len(self.lines())}
            contents |= {"died": died} if died else {}
            write_atomically(self._end, json.dumps(contents))
        except OSError as error:
            logger.warning(f"{self._end} cannot be written ({error.strerror}): {why}")

    def ended(self) -> dict[str, Any] | None:
        """Why and when the latest start ended, if it has recorded that: ``why``, ``ended``."""
        found = read_object(self._end)
        if found is None or not {"why", "ended"} <= found.keys():
            return None
        # Killed between the two writes of ``begin``, the start before this one has left it.
        attempts = len(self.lines())
        return found if found.get("attempt", attempts) >= attempts else None

    def begun_by(self, job: str) -> bool:
        """Whether the latest start is this one of a job."""
        starts = self.lines()
        return bool(starts) and starts[-1].get("job") == job

    def deaths(self, job: str, *, before: str) -> list[dict[str, Any]]:
        """The ``died`` of a job's starts, the latest last.

        Args:
            job: its number; starts are named after it, "12-0". before: this start's is not among them.
        """
        lines = self.lines()
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
        reached: int | None = None,
        died: dict[str, Any] | None = None,
        **facts: Any,
    ) -> None:
        """End this start of a job. If it failed before it was recorded, record it first, with ``facts``, so that the
        end of the one before it stays known."""
        if not self.begun_by(job):
            self.begin(job=job, reached=reached, **facts, from_step=None)
        self.end(why, died=died)


def _job_of(line: dict[str, Any]) -> str:
    return str(line.get("job")).rpartition("-")[0]


def now() -> str:
    """Local time, ISO 8601."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
