"""Exit status and error messages of commands."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from cfmask.errors import UserError
from cfmask.runtime.logging import log_to_terminal
from cfmask.runtime.output import escape_unencodable_output


def exits_cleanly(main: Callable[..., int | None]) -> Callable[..., int]:
    """Decorate a command's ``main``. A UserError is shown as ``error: <message>`` on stderr, with exit status 2; Ctrl-C
    gives exit status 130; other exceptions are defects and keep their traceback."""

    @functools.wraps(main)
    def wrapped(*args: Any, **kwargs: Any) -> int:
        escape_unencodable_output()
        try:
            log_to_terminal()
            return main(*args, **kwargs) or 0
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130

    return wrapped
