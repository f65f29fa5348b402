"""A measurement in a process that has run nothing before."""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable
from typing import Any

import torch

from cfmask.errors import UserError

# What takes seconds to import, and runs nothing; optimizers import torch._dynamo when they are made.
SHARED_IMPORTS = ["torch", "torch._dynamo", "torch.utils.tensorboard", "open_clip.transformer"]


class DoesNotFit(UserError):
    """A measurement ran out of memory."""


def fresh(measure: Callable[..., Any], *arguments: Any) -> Any:
    """``measure(*arguments)`` in a process that has run nothing before; imports of torch and open_clip are shared.

    Raises:
        DoesNotFit: it ran out of memory, or was killed, as Linux does then.
        UserError: what it raised.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(SHARED_IMPORTS)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, measure, arguments))
    process.start()
    sender.close()
    try:
        answer = receiver.recv()
    except EOFError:
        process.join()
        if process.exitcode == -signal.SIGKILL:
            raise DoesNotFit("it was killed, most often for lack of memory") from None
        raise UserError(f"{measure.__name__} ended with exit code {process.exitcode}") from None
    finally:
        process.kill()
        process.join()
    if isinstance(answer, Exception):
        raise answer
    return answer


def _answer(sender: Any, measure: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    try:
        answer = measure(*arguments)
    except UserError as error:
        answer = error
    except (MemoryError, RuntimeError) as error:
        if not _of_memory(error):
            traceback.print_exc()
        words = str(error) or type(error).__name__
        answer = (DoesNotFit if _of_memory(error) else UserError)(words.splitlines()[0])
    sender.send(answer)


def _of_memory(error: Exception) -> bool:
    """Whether an allocation failed; on the CPU and in cuBLAS the text alone says so."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return any(words in str(error) for words in ("can't allocate memory", "not enough memory", "ALLOC_FAILED"))
