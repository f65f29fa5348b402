"""Exit status, error messages and argument parser of commands."""

from __future__ import annotations

import argparse
import errno
import functools
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from cfmask.errors import UserError, did_you_mean
from cfmask.runtime.logging import log_to_terminal
from cfmask.runtime.output import escape_unencodable_output, output_is_lost, printable, silence_output
from cfmask.secrets import mask_secrets


def exits_cleanly(main: Callable[..., int | None]) -> Callable[..., int]:
    """Decorate a command's ``main``. A UserError is shown as ``error: <message>`` on stderr, with exit status 2, and so
    is a file that permissions, a full disk or the like put out of reach. Ctrl-C gives exit status 130, and the end of
    the output's reader (``| head``) 141. Other exceptions are defects and keep their traceback."""

    @functools.wraps(main)
    def wrapped(*args: Any, **kwargs: Any) -> int:
        escape_unencodable_output()
        # Pictures are files. With an unknown backend in its environment, matplotlib could not even be imported.
        os.environ["MPLBACKEND"] = "agg"
        try:
            _check_checkout(Path(main.__code__.co_filename))
            log_to_terminal()
            code = main(*args, **kwargs) or 0
            sys.stdout.flush()
            return code
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        except OSError as error:
            if output_is_lost():
                if error.errno != errno.EPIPE:
                    print(f"error: The output cannot be written: {error.strerror}.", file=sys.stderr)
                silence_output()
                return 128 + signal.SIGPIPE if error.errno == errno.EPIPE else 2
            if error.filename is None or error.errno not in _OUT_OF_REACH:
                raise
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            remedy = "Free space there, or choose another folder." if full else "Check the path."
            print(f"error: {printable(str(error.filename))}: {error.strerror}. {remedy}", file=sys.stderr)
            return 2

    return wrapped


_OUT_OF_REACH = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE),
    *(errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP),
}
"""Errors of a file system or of a path, which are none of the code."""


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


_SBATCH_OPTIONS = {
    **{"-A": "--account", "-C": "--constraint", "-N": "--nodes", "-c": "--cpus-per-task", "-d": "--dependency"},
    **{"-n": "--tasks-per-node", "-p": "--partition", "-q": "--qos", "-t": "--time", "-x": "--exclude"},
}
"""sbatch's one-letter options, which people give out of habit, with the nearest flags."""


class CommandParser(argparse.ArgumentParser):
    """A parser whose errors are one line, ``error: …``, with exit status 2, and suggest what a misspelt flag or choice
    may have meant. Flags cannot be abbreviated: an abbreviation breaks when another flag is added. The description
    keeps its line breaks.

    Args:
        see_also: Flags that the command takes in addition to those of this parser; they are suggested, too.
    """

    def __init__(self, description: str | None = None, *, see_also: Iterable[str] = (), **settings: Any) -> None:
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(description=description, allow_abbrev=False, **settings)
        self._see_also = tuple(see_also)

    @property
    def flags(self) -> list[str]:
        return [flag for flag in self._option_string_actions if flag.startswith("--")]

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        words = sys.argv[1:] if args is None else list(args)
        self._refuse_unknown_flags(words)  # first, because a misspelt flag that is required would count as missing
        parsed, rest = self.parse_known_args(words, namespace)
        if rest:
            self.error(f"Unexpected on the command line: {' '.join(rest)}")
        return parsed

    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ")
        if missing := re.fullmatch(r"the following arguments are required: (.*)", message, re.DOTALL):
            message = f"Missing: {missing[1]}. `{self.prog} --help` lists all flags."
        self.exit(2, f"error: {mask_secrets(message)}\n")

    def _refuse_unknown_flags(self, words: Sequence[str]) -> None:
        if {"-h", "--help"} & set(words):
            return
        parser, unknown = self, list[str]()
        for word in words:
            if word == "--":
                break
            flag = word.partition("=")[0]
            if parser._looks_like_a_flag(word) and flag not in parser._option_string_actions:
                known = [*parser.flags, *parser._see_also]
                near = did_you_mean(flag, known)
                if not near and (long := _SBATCH_OPTIONS.get(flag[:2])) in known:
                    near = f" Did you mean {long}?"
                unknown.append(f"There is no flag {flag}.{near}")
            elif (commands := parser._commands()) and word not in commands and not unknown:
                return  # the flags of an unknown command are unknown; argparse refuses the command
            parser = parser._commands().get(word, parser)
        if unknown:
            parser.error(" ".join(unknown))

    def _looks_like_a_flag(self, word: str) -> bool:
        """By argparse's own rules: numbers, and words with spaces, are values."""
        return word.startswith("-") and word != "-" and " " not in word and not re.fullmatch(r"-\d+|-\d*\.\d+", word)

    def _commands(self) -> dict[str, CommandParser]:
        actions = [action for action in self._actions if isinstance(action, argparse._SubParsersAction)]
        return {name: parser for action in actions for name, parser in action.choices.items()}

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        known = list(map(str, action.choices))
        flag = "/".join(action.option_strings) or str(action.metavar or action.dest)
        what = "command" if isinstance(action, argparse._SubParsersAction) else f"value of {flag}"
        near = did_you_mean(str(value), known)
        all_of_them = f" Choose from {', '.join(known)}."
        raise argparse.ArgumentError(None, f"Unknown {what}: {str(value)!r}.{near or all_of_them}")
