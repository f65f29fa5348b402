"""News of a run for ``--notify COMMAND``: the command is run on rank 0, with a JSON object on its standard input.

    {"event": "failed", "run": "/shared/runs/fd-s0", "job": "123", "attempt": 2, "step": 41200, "total_steps": 50000,
     "why": "failed: rank 3: …", "node": "n07", "time": "2026-11-24T12:00:00+0100", "top1": {}}

    finished              top1 has the final accuracies in percent, by set (of an evaluation, by model and set)
    failed                the job does not come back; node is the one of the rank that died first
    given_up              too many starts in a row without progress (restarts.py)
    preempted_too_often   five times within 24 hours; told at the start after the fifth, and then after five others

There is no news of a requeue or a cancellation. The process that waits for rank 0 runs the command (rank_0.py), so
training does not wait for it, and its exit code changes nothing.

The command may hold a secret, such as the URL of a webhook. So it is in no log, and lies in a file of the run folder
that only its owner can read: RUN/jobs/notify.sh. A run that is resumed has it from there.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import re
import select
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from cfmask.curves import top1_of
from cfmask.files import write_atomically
from cfmask.runs import RunFolder
from cfmask.runtime.attempts import now
from cfmask.runtime.jsonl import read_object
from cfmask.runtime.machine import node_name
from cfmask.secrets import MASK, mask_secrets
from launch.restarts.deadline import AT_TIME_LIMIT
from launch.state.facts import RunState

logger = logging.getLogger(__name__)

FINISHED, FAILED, GIVEN_UP, PREEMPTED = "finished", "failed", "given_up", "preempted_too_often"
WITHIN_S = 30.0
"""What a command has, and what Slurm waits between TERM and KILL of a job that it ends (KillWait)."""
_TOO_OFTEN, _WINDOW_S = 5, 24 * 3600.0
_LOOK_S = 0.05
_TAIL = 4096
"""Bytes of a command's output that are kept."""


@dataclass(frozen=True)
class News:
    """What a command is told. attempt: which of the run's starts, from 1. step: the last one that was taken; of an
    evaluation, images."""

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
    def of(cls, event: str, run_state: RunState, attempt: str, why: str, node: str | None = None) -> News:
        """attempt: the start's name, ``restarts.attempt_name``. node: None: this one."""
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


# --- what there is to tell --------------------------------------------------------------------------------------------


def news_of_end(run_state: RunState, attempt: str, *, failed: str | None, node: str | None = None) -> News | None:
    """News of a start that has ended; None if it comes back, was cancelled, or did nothing.

    Args:
        run_state: read after the end.
        attempt: the start's name.
        failed: why it failed, if the run folder does not say; None: it ended as all ranks have agreed to.
        node: of the rank that died first.
    """
    if run_state.cancelled:
        return None
    begun = bool(run_state.attempts) and run_state.attempts[-1].get("job") == attempt
    why = str(run_state.ended["why"]) if begun and run_state.ended else None
    if run_state.finished:
        return News.of(FINISHED, run_state, attempt, FINISHED) if why == FINISHED else None
    if why is not None and (run_state.comes_back or why.startswith("stopped")):
        return None
    if not begun and run_state.owner is not None and run_state.owner.job != attempt:
        return None  # another job is at the folder, and this one was refused
    why = why or failed
    if why is None:
        return None
    return News.of(GIVEN_UP if "given up: " in why else FAILED, run_state, attempt, why, node)


def news_of_preemptions(run_state: RunState, attempt: str) -> News | None:
    """News of a start that has begun, if the job was preempted too often before; None if not, or that was told."""
    count = preemptions_to_tell(run_state.attempts)
    if not count:
        return None
    why = f"Slurm has taken the job's nodes away {count} times within 24 hours, before its time limit"
    return News.of(PREEMPTED, run_state, attempt, why)


def preemptions_to_tell(attempts: Sequence[dict[str, Any]]) -> int:
    """Preemptions within 24 hours, if the latest start comes after the one that makes them too many; otherwise 0.
    Those that were told before do not count again.

    A start counts as preempted if Slurm has started its job again, and it had not failed and was not at its time limit.

    Args:
        attempts: the lines of attempts.jsonl.
    """
    recent: list[float] = []
    told = 0
    for before, line in itertools.pairwise(attempts):
        told = 0
        at = _preempted_at(before, line)
        if at is not None:
            recent = [*(each for each in recent if at - each < _WINDOW_S), at]
            if len(recent) >= _TOO_OFTEN:
                told, recent = len(recent), []
    return told


def _preempted_at(before: dict[str, Any], line: dict[str, Any]) -> float | None:
    """When a start was preempted; None if it was not. line: the start after it."""
    (job, _, last), (same, _, restart) = (str(each.get("job")).rpartition("-") for each in (before, line))
    if job != same or not (last.isdigit() and restart.isdigit() and int(restart) > int(last)):
        return None
    why = str(line.get("why_last_ended"))
    stopped = why.startswith("stopped") and not why.endswith(AT_TIME_LIMIT)
    if not (stopped or why == "killed without notice"):
        return None
    with contextlib.suppress(ValueError):
        when = str(line.get("last_ended") or line.get("started"))
        return datetime.strptime(when, "%Y-%m-%dT%H:%M:%S%z").timestamp()
    return None


# --- the command ------------------------------------------------------------------------------------------------------


def keep_command(command: str | None, run: RunFolder) -> None:
    """Write the command that a job of the run gets; None: it gets none. Raises OSError."""
    if command is None:
        _file(run).unlink(missing_ok=True)
    else:
        write_atomically(_file(run), command, private=True)


def kept_command(run: RunFolder) -> str | None:
    """The command that the run's jobs get; None if they get none, or it cannot be read."""
    try:
        return _file(run).read_text()
    except OSError:
        return None


def kept_setting(run: RunFolder) -> dict[str, str]:
    """The same as a setting that a run gets again when it is resumed (``Allocation.again``)."""
    command = kept_command(run)
    return {} if command is None else {"notify": command}


def _file(run: RunFolder) -> Path:
    return run.root / "jobs" / "notify.sh"


def tell(command: str, news: News) -> None:
    """Run the command. If that goes wrong, it is a line of the log; otherwise the log ends with what the job said."""
    try:
        folder = Path(news.run)
        complaint = run_command(command, json.dumps(asdict(news)) + "\n", folder if folder.is_dir() else Path("/"))
    except Exception as error:
        complaint = f"cannot be run: {error}"
    if complaint:
        logger.warning(f"--notify {complaint}")


def run_command(command: str, text: str, folder: Path, *, within_s: float = WITHIN_S) -> str | None:
    """``sh -c COMMAND`` in a folder, with a text on its standard input. What it leaves in its session is killed.

    Returns:
        What went wrong, with the last line of its output; None if it ended with exit code 0.

    Raises:
        OSError: there is no sh, or no such folder.
    """
    given = os.memfd_create("news")  # unlike a pipe, it does not care whether anybody reads it
    try:
        os.write(given, text.encode())
        os.lseek(given, 0, os.SEEK_SET)
        process = subprocess.Popen(
            ["sh", "-c", command],
            cwd=folder,
            stdin=given,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            bufsize=0,
        )
    finally:
        os.close(given)
    assert process.stdout is not None
    with process.stdout as output:
        tail, ended = _read_until_end(process, output.fileno(), time.monotonic() + within_s)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
    if ended and code == 0:
        return None
    lines = [line.strip() for line in tail.decode(errors="replace").splitlines() if line.strip()]
    said = f": {_masked(lines[-1], command)[-200:]}" if lines else ""
    if not ended:
        return f"did not end within {within_s:g} s and was killed{said}"
    return (f"ended with exit code {code}" if code > 0 else f"was killed by signal {-code}") + said


def _read_until_end(process: subprocess.Popen[bytes], output: int, deadline: float) -> tuple[bytes, bool]:
    """The end of what a process prints until it ends, and whether it did in time. Children that it leaves behind may
    have its output still, and are not waited for."""
    os.set_blocking(output, False)
    tail = b""
    while True:
        ended = process.poll() is not None
        tail, is_open = _read_available(output, tail, deadline)
        if ended or time.monotonic() > deadline:
            return tail, ended
        if is_open:
            select.select([output], [], [], _LOOK_S)
        else:
            time.sleep(_LOOK_S)


def _read_available(output: int, tail: bytes, deadline: float) -> tuple[bytes, bool]:
    """The end of what was printed, after ``tail``, and whether more may come."""
    while time.monotonic() < deadline:
        try:
            piece = os.read(output, 1 << 16)
        except BlockingIOError:
            return tail, True
        if not piece:
            return tail, False
        tail = (tail + piece)[-_TAIL:]
    return tail, True


def _masked(line: str, command: str) -> str:
    """A line of a command's output without what may be secret in the command."""
    masked = mask_secrets(f"pipe:{command}")
    urls = re.findall(r"\w+://[^\s\"'<>;|()]+", command)  # of a webhook's, the path is the secret
    words = re.findall(r"[^\s\"'=;|&<>()]{4,}", command)
    for secret in (*urls, *(word for word in words if masked.count(word) < command.count(word))):
        line = line.replace(secret, MASK)
    return mask_secrets(line)
