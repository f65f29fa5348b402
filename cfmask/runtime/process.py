"""What the processes of a job or a conversion do with signals, and when their parent ends."""

from __future__ import annotations

import ctypes
import os
import signal

# What a cluster, or a terminal, sends to every process of a job. One of them answers.
JOB_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


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
