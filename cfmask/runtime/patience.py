"""Retries of reads, for file systems that are temporarily unavailable: failover of a server, a remount."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from cfmask.errors import UserError

logger = logging.getLogger(__name__)

T = TypeVar("T")

PATIENCE_VARIABLE = "CFMASK_READ_PATIENCE"
"""Environment variable: seconds for which a failing read is retried."""
_PATIENCE_S = 60.0
_LONGEST_WAIT_S = 5.0
_impatient: ContextVar[bool] = ContextVar("_impatient", default=False)


class StorageUnavailable(UserError):
    """A file or folder could not be read, despite retries. Its contents are unknown, not missing."""


def read_patience_s() -> float:
    """Seconds for which a failing read is retried: $CFMASK_READ_PATIENCE, or 60."""
    if _impatient.get():
        return 0.0
    return float(os.environ.get(PATIENCE_VARIABLE) or _PATIENCE_S)


@contextmanager
def impatient() -> Iterator[None]:
    """Do not retry reads, because a user waits for the answer, and a file that cannot be read is part of it."""
    before = _impatient.set(True)
    try:
        yield
    finally:
        _impatient.reset(before)


def patiently(read: Callable[[], T], what: str, *, patience_s: float | None = None) -> T:
    """Call ``read``, and retry while it raises an I/O error (EIO, ESTALE, EACCES, ENOTCONN, ETIMEDOUT, …).

    Args:
        read: may be called several times, and must not suppress OSError.
        what: name of what is read, usually a path, for messages.
        patience_s: seconds for which it is retried; None: ``read_patience_s()``.

    Raises:
        FileNotFoundError, NotADirectoryError, IsADirectoryError: not retried, because they are answers of the file
            system.
        StorageUnavailable: it still fails after this time.
    """
    patience_s = read_patience_s() if patience_s is None else patience_s
    began = time.monotonic()
    wait = 0.05
    said = False
    while True:
        try:
            return read()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise
        except OSError as error:
            reason = error.strerror or str(error)
            waited = time.monotonic() - began
            if waited >= patience_s:
                raise StorageUnavailable(
                    f"{what} cannot be read ({reason}; tried for {waited:.0f} s). Nothing was changed. Check the file "
                    f"system on {os.uname().nodename}, then start again."
                ) from error
            if not said and waited > 1:
                logger.warning(f"{what} cannot be read ({reason}); trying for {patience_s:.0f} s")
                said = True
            time.sleep(min(wait, patience_s - waited))
            wait = min(2 * wait, _LONGEST_WAIT_S)
