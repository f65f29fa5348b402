"""The one kind of error a user can cause, and how a command line shows it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from cfmask.runtime.output import escape_unencodable_output
from cfmask.secrets import mask_secrets


class UserError(ValueError):
    """Something the user can mend. The message is one paragraph: what is wrong, where, and what to do. Secrets of URLs
    in it are masked: it is shown, logged and kept in the run folder."""

    def __init__(self, *words: object) -> None:
        super().__init__(*(mask_secrets(word) if isinstance(word, str) else word for word in words))


def exits_cleanly(main: Callable[..., int | None]) -> Callable[..., int]:
    """Decorate a command's ``main``: a UserError becomes ``error: <message>`` on stderr and exit status 2,
    Ctrl-C exit status 130; anything else keeps its traceback, because it is a defect of ours. Names of files can be
    printed whatever bytes they are of."""

    @functools.wraps(main)
    def wrapped(*args: Any, **kwargs: Any) -> int:
        escape_unencodable_output()
        try:
            return main(*args, **kwargs) or 0
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130

    return wrapped
