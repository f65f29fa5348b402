"""What the processes of a job do with signals, and those of a conversion or a check when their parent ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from multiprocessing import connection

# What a cluster, or a terminal, sends to every process of a job. One of them answers.
JOB_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


def ignore_job_signals() -> None:
    """Called in a child, which would otherwise inherit the main process's Python handlers; or when all is over."""
    for number in JOB_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def die_with_parent() -> None:
    """Called in a child of multiprocessing: end it at once when the process that asked for it ends, however that came
    about.

    A thread waits for the end of a pipe that only that process holds open: unlike the kernel's parent-death signal it
    does not depend on which thread of the parent, or which process on its behalf, did the forking.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="die_with_parent", daemon=True).start()
