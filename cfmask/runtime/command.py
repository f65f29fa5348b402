"""Exit status and error messages of commands."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
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
            _check_checkout(Path(main.__code__.co_filename))
            log_to_terminal()
            return main(*args, **kwargs) or 0
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130

    return wrapped


def _check_checkout(command: Path) -> None:
    """Refuse a command of one checkout with the library of another.

    Raises:
        UserError: the environment has another checkout installed (``pip install -e``) than the command's.
    """
    installed, own = Path(__file__).resolve().parents[2], command.resolve().parents[1]
    if own != installed and (own / "cfmask/runtime/command.py").exists():
        raise UserError(
            f"{command} is of another checkout than the installed cfmask, {installed}. Run `pip install -e {own}`, or "
            f"set PYTHONPATH={own}."
        )
