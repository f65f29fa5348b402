"""What runs beside rank 0, in its supervisor: --notify, and the process that sends the history to Weights & Biases.
Training waits for neither, and neither changes how the job ends."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from cfmask.runs import RunFolder
from cfmask.runtime.process import die_with_parent, ignore_job_signals, kill_children
from launch.notification import notify, wandb_sender
from launch.state.facts import read_state

logger = logging.getLogger(__name__)

_LOOK_S = 2.0
"""Between two looks whether the start was recorded."""


class BesideRank0:
    """What runs beside rank 0 during one start; nothing for other ranks, and in folders that are no runs. Create it
    after the rank was forked, because the rank would inherit threads and pipes.

    Args:
        attempt: name of the start.
        rank: the supervised one.
    """

    def __init__(self, run: RunFolder, attempt: str, rank: int) -> None:
        self._run, self._attempt = run, attempt
        self._command: str | None = None
        self._sender: subprocess.Popen[bytes] | None = None
        self._ended = threading.Event()
        try:
            if rank == 0 and run.has_work():
                self._command = notify.kept_command(run)
                if project := os.environ.get(wandb_sender.VARIABLE):
                    self._sender = _start_sender(run, project)
        except OSError as error:
            logger.warning(f"nothing of this start is sent to --notify or W&B: {error}")
        if self._command is not None:
            threading.Thread(target=self._notify_of_preemptions, args=(self._command,), daemon=True).start()

    @property
    def pids(self) -> tuple[int, ...]:
        """Processes that outlive the rank."""
        return (self._sender.pid,) if self._sender is not None else ()

    def end(self, *, failed: str | None, node: str | None = None) -> None:
        """Called when the rank has ended and the reason is recorded. Takes ``notify.WITHIN_S`` at most.

        Args:
            failed: why it failed, if the run folder does not say; None: it ended as all ranks have agreed.
            node: of the rank that failed first.
        """
        self._ended.set()
        deadline = time.monotonic() + notify.WITHIN_S
        if self._sender is not None and self._sender.stdin is not None:
            self._sender.stdin.close()
        if self._command is not None:
            _notify_of_end(self._command, self._run, self._attempt, failed, node)
        if self._sender is not None:
            try:
                self._sender.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                logger.warning(
                    f"W&B: the end of the history was not sent within {notify.WITHIN_S:g} s. The next start "
                    f"sends it, or: python launch/notification/wandb_sender.py {self._run.root} "
                    f"{os.environ[wandb_sender.VARIABLE]}"
                )
        if self._command is not None or self._sender is not None:
            kill_children()

    def _notify_of_preemptions(self, command: str) -> None:
        while not self._has_begun():
            if self._ended.wait(_LOOK_S):
                return
        if event := notify.event_of_preemptions(read_state(self._run), self._attempt):
            notify.send(command, event)

    def _has_begun(self) -> bool:
        with contextlib.suppress(OSError):  # looked for again
            return self._run.begun_by(self._attempt)
        return False


def notify_of_end(run: RunFolder, attempt: str, *, failed: str, node: str | None) -> None:
    """The same as ``BesideRank0.end`` for a start whose supervisor of rank 0 was killed."""
    if (command := notify.kept_command(run)) is not None:
        _notify_of_end(command, run, attempt, failed, node)


def _notify_of_end(command: str, run: RunFolder, attempt: str, failed: str | None, node: str | None) -> None:
    try:
        if event := notify.event_of_end(read_state(run), attempt, failed=failed, node=node):
            notify.send(command, event)
    except Exception as error:
        logger.warning(f"--notify gets no event: {type(error).__name__}: {error}")


def _start_sender(run: RunFolder, project: str) -> subprocess.Popen[bytes]:
    """Raises OSError."""
    parent = os.getpid()

    def before_exec() -> None:
        die_with_parent(parent)
        ignore_job_signals()

    program = [sys.executable, "-u", str(Path(wandb_sender.__file__)), wandb_sender.UNTIL_EOF, str(run.root), project]
    return subprocess.Popen(program, stdin=subprocess.PIPE, start_new_session=True, preexec_fn=before_exec)
