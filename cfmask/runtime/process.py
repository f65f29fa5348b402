"""What the processes of a job or a conversion do with signals, and when their parent ends."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Collection
from pathlib import Path
from typing import NoReturn

# What a cluster, or a terminal, sends to every process of a job. One of them answers.
JOB_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


def ignore_job_signals() -> None:
    """Called in a child, which would otherwise inherit the main process's Python handlers; or when all is over."""
    for number in JOB_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def die_with_parent(parent: int) -> None:
    """Called in a forked child: the kernel kills it when the thread that forked it ends, however that comes about.

    Args:
        parent: pid of the process that forked it, which may have ended before this is called.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def exit_without_finalization(code: int) -> NoReturn:
    """End this process with an exit code, without the finalization of the Python interpreter.

    During finalization a thread of torch that still has a tensor to release aborts the process ("terminate called
    without an active exception"), threads are joined, and a communicator waits for ranks that hang. Handlers registered
    with ``atexit`` do not run; standard output and error are flushed.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a full disk; closed
            stream.flush()
    os._exit(code)


def adopt_orphans() -> None:
    """Become the parent of what descendants leave behind when they end, so that ``kill_children`` finds it."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def kill_children(within_s: float = 5.0, *, but: Collection[int] = ()) -> None:
    """SIGKILL to every child of this process, and to theirs where orphans are adopted, until none is left.

    Args:
        within_s: after which those that hang in the kernel are left to it.
        but: pids of children that are left alone.
    """
    deadline = time.monotonic() + within_s
    while (children := [pid for pid in _children() if pid not in but]) and time.monotonic() < deadline:
        for pid in children:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, os.WNOHANG)
        time.sleep(0.02)


def _children() -> list[int]:
    """Of this process, those included that wait for it to notice their end."""
    own, found = str(os.getpid()), []
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError, IndexError):
            # pid (command) state parent …
            if process.name.isdigit() and (process / "stat").read_text().rpartition(")")[2].split()[1] == own:
                found.append(int(process.name))
    return found
