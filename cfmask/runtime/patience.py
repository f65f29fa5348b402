"""Reading from a file system that may be away for a moment: a server that fails over, a mount that comes back."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from typing import TypeVar

from cfmask.errors import UserError

logger = logging.getLogger(__name__)

T = TypeVar("T")

PATIENCE_VARIABLE = "CFMASK_READ_PATIENCE"
"""Environment variable: seconds for which a read that fails is repeated."""
_PATIENCE_S = 60.0
_LONGEST_WAIT_S = 5.0


class StorageUnavailable(UserError):
    """A file or folder could not be read for as long as it was tried. What it holds is unknown, not absent."""


def read_patience_s() -> float:
    """Seconds for which a read that fails is repeated: $CFMASK_READ_PATIENCE, or 60."""
    return float(os.environ.get(PATIENCE_VARIABLE) or _PATIENCE_S)


def patiently(read: Callable[[], T], what: str, *, patience_s: float | None = None) -> T:
    """``read()``, repeated while it fails with an I/O error (EIO, ESTALE, EACCES, ENOTCONN, ETIMEDOUT, …).

    Args:
        read: may be called several times. Must not swallow OSError.
        what: is read, for messages: a path, most often.
        patience_s: seconds for which it is tried; None: ``read_patience_s()``.

    Raises:
        FileNotFoundError, NotADirectoryError: at once. The file system has answered; the caller knows what it means.
        StorageUnavailable: it still fails when the time is over.
    """
    patience_s = read_patience_s() if patience_s is None else patience_s
    began = time.monotonic()
    wait = 0.05
    said = False
    while True:
        try:
            return read()
        except (FileNotFoundError, NotADirectoryError):
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
