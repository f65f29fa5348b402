"""Runs a measurement in a process that has run nothing before."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch

from cfmask.errors import UserError
from tools.benchmarks.metering import out_of_memory

SHARED_IMPORTS = ["torch", "torch._dynamo", "torch.utils.tensorboard", "open_clip.transformer"]
"""Modules that take seconds to import and run nothing. Optimizers import torch._dynamo when they are made."""


class DoesNotFit(UserError):
    """A measurement ran out of memory."""


def fresh(measure: Callable[..., Any], *arguments: Any) -> Any:
    """Return ``measure(*arguments)``, called in a fresh process that shares imports with others alone.

    Raises:
        DoesNotFit: it ran out of memory, or was killed, which Linux does when memory runs out.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(SHARED_IMPORTS)
    cores = len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(1, context, initializer=torch.set_num_threads, initargs=(cores,)) as pool:
        try:
            return pool.submit(measure, *arguments).result()
        except BrokenProcessPool:
            raise DoesNotFit("the process was killed, most often for lack of memory") from None
        except (MemoryError, RuntimeError) as error:
            if out_of_memory(error):
                raise DoesNotFit(str(error) or "out of memory") from error
            raise
