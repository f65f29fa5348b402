"""Signals and children of the processes of a job or a conversion."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Collection
from typing import NoReturn

JOB_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
"""Signals that a scheduler or a terminal sends to every process of a job; one process handles them."""

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


def ignore_job_signals() -> None:
    """Ignore them from now on: in a child, which inherits the parent's Python handlers, or at the end of a job."""
    for number in JOB_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def die_with_parent(parent: int) -> None:
    """In a forked child: let the kernel kill this process when the thread that forked it ends.

    Args:
        parent: pid of the parent, which may already have ended.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def exit_without_finalization(code: int) -> NoReturn:
    """End this process with an exit code, without the finalization of the Python interpreter.

    During finalization a torch thread that still has a tensor to release aborts the process ("terminate called without
    an active exception"), threads are joined, and a communicator waits for ranks that hang. Standard output and error
    are flushed; ``atexit`` handlers do not run.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a full disk, or a closed stream
            stream.flush()
    os._exit(code)


def adopt_orphans() -> None:
    """Become the parent of orphaned descendants, so that ``kill_children`` finds them."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def kill_children(within_s: float = 5.0, *, but: Collection[int] = ()) -> None:
    """Send SIGKILL to the children of this process until none is left. With ``adopt_orphans`` this includes their
    descendants.

    Args:
        within_s: after this time, children that hang in the kernel are given up.
        but: pids of children that are spared.
    """
    import psutil  # here, because the workers of ``pool`` need no package

    deadline = time.monotonic() + within_s
    this = psutil.Process()
    while (children := [each for each in this.children() if each.pid not in but]) and time.monotonic() < deadline:
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess, ChildProcessError):
                child.kill()
                os.waitpid(child.pid, os.WNOHANG)
        time.sleep(0.02)
