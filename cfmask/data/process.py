"""How data processes (loaders, converters) are started, and what they do with signals."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import BaseContext

# What a cluster sends to every process of a job. The training process answers them at a step boundary; a loader
# that died of one would take that answer away.
JOB_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)

_PR_SET_PDEATHSIG = 1


def ignore_job_signals() -> None:
    """Called in a child. (Children would otherwise inherit the training process's Python handlers.)"""
    for number in JOB_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def die_with_parent() -> None:
    """Called in a child: the kernel kills it when the thread that started it ends, however that came about.

    Linux only; elsewhere nothing happens, and only torch's own watchdog (a poll every few seconds) is left.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        parent = multiprocessing.parent_process()
        if parent is not None and not parent.is_alive():  # it ended before the line above
            os._exit(1)


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
