"""How data processes (loaders, converters) are started, and what they do with signals."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from multiprocessing import connection, forkserver, resource_tracker
from multiprocessing.context import BaseContext

# What a cluster sends to every process of a job. The training process answers them at a step boundary; a loader
# that died of one would take that answer away.
JOB_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


def ignore_job_signals() -> None:
    """Called in a child. (Children would otherwise inherit the training process's Python handlers.)"""
    for number in JOB_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def die_with_parent() -> None:
    """Called in a child of multiprocessing: end it at once when the process that asked for it ends, however that came
    about.

    A thread waits for the end of a pipe that only that process holds open. Neither the kernel's parent-death signal
    nor torch's watchdog do here: a loader's parent is the fork server, and that lives as long as its loaders.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="die_with_parent", daemon=True).start()


def loader_context() -> BaseContext:
    """The start method of loader processes: a fork server that has imported torch and webdataset.

    Not fork: the training process has threads (gloo or nccl, autograd, the checkpoint writer, pinning) and a CUDA
    context, and a fork copies whatever locks they hold at that moment. Not spawn: every loader of every epoch would
    import torch again, seconds each. The server imports once, has one thread, and forks loaders in milliseconds.

    The first call starts the server and returns at once; call it early, and its imports overlap with building the
    model. The server must outlive the signals of a job just as its loaders do, from its first instruction on: it
    is started with them blocked, and a blocked mask is inherited.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.utils.data", "webdataset", "PIL.Image", "cfmask.data.stream"])
    # Starting the resource tracker unblocks SIGTERM and SIGINT on its way out, so it goes first, on its own.
    for start in (resource_tracker.ensure_running, forkserver.ensure_running):
        before = signal.pthread_sigmask(signal.SIG_BLOCK, JOB_SIGNALS)
        try:
            start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context
