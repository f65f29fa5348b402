"""What runs beside rank 0, in the process that waits for it (failures.py): news for --notify, and the process that
sends the history to Weights & Biases. Training waits for neither, and neither changes how the job ends."""

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
    """Of one start. On other ranks, and beside what is no run, it does nothing. Made after the rank was forked, which
    would inherit threads and pipes.

    Args:
        attempt: the start's name.
        rank: of the process that is waited for.
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
            logger.warning(f"no news for --notify or W&B from this start: {error}")
        if self._command is not None:
            threading.Thread(target=self._tell_of_preemptions, args=(self._command,), daemon=True).start()

    @property
    def pids(self) -> tuple[int, ...]:
        """Processes that go on after the rank."""
        return (self._sender.pid,) if self._sender is not None else ()

    def end(self, *, failed: str | None, node: str | None = None) -> None:
        """Called when the rank has ended, and why is recorded. Takes ``notify.WITHIN_S`` at most.

        Args:
            failed: why it failed, if the run folder does not say; None: it ended as all ranks have agreed to.
            node: of the rank that died first.
        """
        self._ended.set()
        deadline = time.monotonic() + notify.WITHIN_S
        if self._sender is not None and self._sender.stdin is not None:
            self._sender.stdin.close()
        if self._command is not None:
            _tell_end(self._command, self._run, self._attempt, failed, node)
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

    def _tell_of_preemptions(self, command: str) -> None:
        while not self._has_begun():
            if self._ended.wait(_LOOK_S):
                return
        if news := notify.news_of_preemptions(read_state(self._run), self._attempt):
            notify.tell(command, news)

    def _has_begun(self) -> bool:
        with contextlib.suppress(OSError):  # looked for again
            return self._run.begun_by(self._attempt)
        return False


def tell_end(run: RunFolder, attempt: str, *, failed: str, node: str | None) -> None:
    """News of a start whose process beside rank 0 is gone. The arguments are those of ``BesideRank0``."""
    if (command := notify.kept_command(run)) is not None:
        _tell_end(command, run, attempt, failed, node)


def _tell_end(command: str, run: RunFolder, attempt: str, failed: str | None, node: str | None) -> None:
    try:
        if news := notify.news_of_end(read_state(run), attempt, failed=failed, node=node):
            notify.tell(command, news)
    except Exception as error:
        logger.warning(f"no news for --notify: {type(error).__name__}: {error}")


def _start_sender(run: RunFolder, project: str) -> subprocess.Popen[bytes]:
    """Raises OSError."""
    parent = os.getpid()

    def before_exec() -> None:
        die_with_parent(parent)
        ignore_job_signals()

    program = [sys.executable, "-u", str(Path(wandb_sender.__file__)), wandb_sender.UNTIL_EOF, str(run.root), project]
    return subprocess.Popen(program, stdin=subprocess.PIPE, start_new_session=True, preexec_fn=before_exec)
