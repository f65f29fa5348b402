"""Events of a run for ``--notify COMMAND``: the command runs on rank 0, with a JSON object on its standard input.

    {"event": "failed", "run": "/shared/runs/fd-s0", "job": "123", "attempt": 2, "step": 41200, "total_steps": 50000,
     "why": "failed: rank 3: …", "node": "n07", "time": "2026-11-24T12:00:00+0100", "top1": {}}

    finished              top1 has the final accuracies in percent, by set (of an evaluation, by model and set)
    failed                the job does not come back; node is the one of the rank that failed first
    given_up              too many starts in a row without progress (launch/restarts/policy.py)
    preempted_too_often   five times within 24 hours; sent at the start after the fifth, and again after five more

There is no event for a requeue or a cancellation. The supervisor of rank 0 runs the command
(launch/ranks/beside_rank_0.py), so training does not wait for it, and its exit code changes nothing.

The command may contain a secret, such as the URL of a webhook. So it appears in no log, and is kept in a file that only
its owner can read: RUN/jobs/notify.sh. A resumed run takes it from there.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import re
import signal
import subprocess
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from cfmask.log_lines import top1_of
from cfmask.runs import RunFolder
from cfmask.runtime.attempts import now
from cfmask.runtime.files import write_atomically
from cfmask.runtime.jsonl import read_object
from cfmask.runtime.machine import node_name
from cfmask.secrets import MASK, mask_secrets
from launch.state import ends
from launch.state.facts import RunState

logger = logging.getLogger(__name__)

FINISHED, FAILED, GIVEN_UP, PREEMPTED = ends.FINISHED, "failed", "given_up", "preempted_too_often"
WITHIN_S = 30.0
"""Time limit of a command: Slurm's default between TERM and KILL for a job that it ends (KillWait)."""
_TOO_OFTEN, _WINDOW_S = 5, 24 * 3600.0
_DRAIN_S = 2.0
"""How long a command's output is read after its end."""
_TAIL_BYTES = 4096
"""The end of a command's output that is kept."""


@dataclass(frozen=True)
class Event:
    """The JSON object that a command gets.

    attempt: number of the run's start, from 1.
    step: the last step that was taken; images of an evaluation.
    """

    event: str
    run: str
    job: str
    attempt: int
    step: int
    total_steps: int | None
    why: str
    node: str
    top1: dict[str, Any] = field(default_factory=dict)
    time: str = field(default_factory=now)

    @classmethod
    def of(cls, event: str, run_state: RunState, attempt: str, why: str, node: str | None = None) -> Event:
        """
        Args:
            attempt: name of the start.
            node: None: this one.
        """
        results = read_object(run_state.run.results) if event == FINISHED else None
        return cls(
            event=event,
            run=str(run_state.run.root),
            job=attempt.rpartition("-")[0],
            attempt=len(run_state.attempts),
            step=run_state.step or 0,
            total_steps=run_state.last.get("total_steps"),
            why=mask_secrets(why),
            node=node or node_name(),
            top1=top1_of(results) if results else {},
        )


# --- which event there is ---------------------------------------------------------------------------------------------


def event_of_end(run_state: RunState, attempt: str, *, failed: str | None, node: str | None = None) -> Event | None:
    """The event of a start that has ended; None if it comes back, was cancelled, or did nothing.

    Args:
        run_state: read after the end.
        attempt: name of the start.
        failed: why it failed, if the run folder does not say; None: it ended as all ranks have agreed.
        node: of the rank that failed first.
    """
    if run_state.cancelled:
        return None
    begun = bool(run_state.attempts) and run_state.attempts[-1].get("job") == attempt
    why = str(run_state.ended["why"]) if begun and run_state.ended else None
    if run_state.finished:
        return Event.of(FINISHED, run_state, attempt, FINISHED) if why == FINISHED else None
    if why is not None and (ends.comes_back(why) or ends.is_stopped(why)):
        return None
    if not begun and run_state.owner is not None and run_state.owner.job != attempt:
        return None  # another job holds the folder, and this one was refused
    why = why or failed
    if why is None:
        return None
    return Event.of(GIVEN_UP if ends.is_given_up(why) else FAILED, run_state, attempt, why, node)


def event_of_preemptions(run_state: RunState, attempt: str) -> Event | None:
    """The event of a start that begins after too many preemptions; None if there were fewer, or it was sent before."""
    count = preemptions_to_report(run_state.attempts)
    if not count:
        return None
    why = f"Slurm has taken the job's nodes away {count} times within 24 hours, before its time limit"
    return Event.of(PREEMPTED, run_state, attempt, why)


def preemptions_to_report(attempts: Sequence[dict[str, Any]]) -> int:
    """The number of preemptions within 24 hours, if the last one before the latest start made them too many; otherwise
    0. Preemptions that were reported before do not count again.

    A start counts as preempted if Slurm has restarted its job although it had not failed and was not at its time limit.

    Args:
        attempts: the lines of attempts.jsonl.
    """
    recent: list[float] = []
    reported = 0
    for before, line in itertools.pairwise(attempts):
        reported = 0
        at = _preempted_at(before, line)
        if at is not None:
            recent = [*(each for each in recent if at - each < _WINDOW_S), at]
            if len(recent) >= _TOO_OFTEN:
                reported, recent = len(recent), []
    return reported


def _preempted_at(before: dict[str, Any], line: dict[str, Any]) -> float | None:
    """When the start ``before`` was preempted; None if it was not. line: the start after it."""
    (job, _, last), (same, _, restart) = (str(each.get("job")).rpartition("-") for each in (before, line))
    if job != same or not (last.isdigit() and restart.isdigit() and int(restart) > int(last)):
        return None
    why = str(line.get("why_last_ended"))
    stopped = ends.is_stopped(why) and not why.endswith(ends.AT_TIME_LIMIT)
    if not (stopped or why == ends.KILLED):
        return None
    with contextlib.suppress(ValueError):
        when = str(line.get("last_ended") or line.get("started"))
        return datetime.strptime(when, "%Y-%m-%dT%H:%M:%S%z").timestamp()
    return None


# --- the command ------------------------------------------------------------------------------------------------------


def keep_command(command: str | None, run: RunFolder) -> None:
    """Store the command of the run's jobs; None: they have none. Raises OSError."""
    if command is None:
        _file(run).unlink(missing_ok=True)
    else:
        write_atomically(_file(run), command, private=True)


def kept_command(run: RunFolder) -> str | None:
    """The command of the run's jobs; None if they have none, or it cannot be read."""
    try:
        return _file(run).read_text()
    except OSError:
        return None


def kept_setting(run: RunFolder) -> dict[str, str]:
    """The same as a setting that a resumed run gets again (``Allocation.again``)."""
    command = kept_command(run)
    return {} if command is None else {"notify": command}


def _file(run: RunFolder) -> Path:
    return run.root / "jobs" / "notify.sh"


def send(command: str, event: Event) -> None:
    """Run the command, and log a warning if that fails."""
    try:
        folder = Path(event.run)
        complaint = run_command(command, json.dumps(asdict(event)) + "\n", folder if folder.is_dir() else Path("/"))
    except Exception as error:
        complaint = f"cannot be run: {error}"
    if complaint:
        logger.warning(f"--notify {complaint}")


def run_command(command: str, text: str, folder: Path, *, within_s: float = WITHIN_S) -> str | None:
    """Run ``sh -c COMMAND`` in a folder, with a text on its standard input, and kill what it leaves in its session.

    Returns:
        The error, with the last line of the command's output; None if it ended with exit code 0.

    Raises:
        OSError: there is no sh, or no such folder.
    """
    stdin = os.memfd_create("event")  # unlike a pipe, it may stay unread
    try:
        os.write(stdin, text.encode())
        os.lseek(stdin, 0, os.SEEK_SET)
        process = subprocess.Popen(
            ["sh", "-c", command],
            cwd=folder,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            bufsize=0,
        )
    finally:
        os.close(stdin)
    assert process.stdout is not None
    tail = _Tail(process.stdout)
    try:
        code: int | None = process.wait(within_s)
    except subprocess.TimeoutExpired:
        code = None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if code == 0:
        return None
    lines = [line.strip() for line in tail.read().decode(errors="replace").splitlines() if line.strip()]
    last = f": {_masked(lines[-1], command)[-200:]}" if lines else ""
    if code is None:
        return f"did not end within {within_s:g} s and was killed{last}"
    return (f"ended with exit code {code}" if code > 0 else f"was killed by signal {-code}") + last


class _Tail(threading.Thread):
    """Reads a command's output, which may be endless, and keeps its end."""

    def __init__(self, output: IO[bytes]) -> None:
        super().__init__(daemon=True)
        self._output, self._tail = output, b""
        self.start()

    def run(self) -> None:
        with self._output:
            while piece := os.read(self._output.fileno(), 1 << 16):
                self._tail = (self._tail + piece)[-_TAIL_BYTES:]

    def read(self) -> bytes:
        """The end of the output of a command that has ended. Children in another session may keep the pipe open, and
        are not waited for."""
        self.join(_DRAIN_S)
        return self._tail


def _masked(line: str, command: str) -> str:
    """A line of a command's output without the words of the command that may be secret."""
    masked = mask_secrets(f"pipe:{command}")
    urls = re.findall(r"\w+://[^\s\"'<>;|()]+", command)  # the path of a webhook's URL is its secret
    words = re.findall(r"[^\s\"'=;|&<>()]{4,}", command)
    for secret in (*urls, *(word for word in words if masked.count(word) < command.count(word))):
        line = line.replace(secret, MASK)
    return mask_secrets(line)
