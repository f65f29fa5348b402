"""Where log records go: the only place that configures Python's ``logging``.

Library modules log through ``logging.getLogger(__name__)``. Progress bars, tables and what a command was asked to show
are its output, and printed.

    in a job       standard output, which is the rank's log file; every line with its time, level, rank and node:

                       2026-11-27 09:30:12 INFO rank 3 gpu-17 | step 40/9980 loss 1.234 …

    in a command   messages as they are, on standard output; warnings and errors on standard error, with their level

CFMASK_LOG_LEVEL sets the level of this project's own records (default INFO). Those of other packages are shown from
WARNING on.
"""

from __future__ import annotations

import logging
import os
import re
import sys

from cfmask.errors import UserError

LEVEL_VARIABLE = "CFMASK_LOG_LEVEL"
_OWN = ("cfmask", "launch", "slurm", "tools")
_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
_PREFIX = re.compile(rf"\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d ({'|'.join(_LEVELS)}) (rank \d+|controller|batch) \S+ \| ")
"""What ``_JobFormatter`` puts before each line, and so do the batch script and launch/ranks/start.py."""


class _Handler(logging.Handler):
    """Writes to ``sys.stdout`` and ``sys.stderr`` as they are at that moment: a command may have replaced them."""

    def __init__(self, formatter: logging.Formatter, warnings_to_stderr: bool) -> None:
        super().__init__()
        self.setFormatter(formatter)
        self._warnings_to_stderr = warnings_to_stderr

    def emit(self, record: logging.LogRecord) -> None:
        to_stderr = self._warnings_to_stderr and record.levelno >= logging.WARNING
        print(self.format(record), file=sys.stderr if to_stderr else sys.stdout, flush=True)


class _JobFormatter(logging.Formatter):
    """The time, level, rank and node before each line of a message. rank: None: the controller of a local job."""

    def __init__(self, rank: int | None, node: str) -> None:
        who = "controller" if rank is None else f"rank {rank}"
        super().__init__(f"%(asctime)s %(levelname)s {who} {node} | ", "%Y-%m-%d %H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        record.asctime = self.formatTime(record, self.datefmt)
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        prefix = self.formatMessage(record)
        return "\n".join(prefix + line for line in text.split("\n"))


class _CommandFormatter(logging.Formatter):
    """The level before warnings and errors, in lower case."""

    def format(self, record: logging.LogRecord) -> str:
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        return level + super().format(record)


def log_to_job(rank: int | None, node: str) -> None:
    """Called first in each process of a job.

    Args:
        rank: the one that the process is, or works for; None: the controller of a local job.

    Raises:
        UserError: CFMASK_LOG_LEVEL names no level.
    """
    _configure(_Handler(_JobFormatter(rank, node), warnings_to_stderr=False))


def as_logged(text: str, rank: int, node: str) -> str:
    """An error as the rank would log it; for another process that writes it into the rank's log file."""
    record = logging.makeLogRecord({"msg": text, "levelno": logging.ERROR, "levelname": "ERROR"})
    return _JobFormatter(rank, node).format(record) + "\n"


def message_of(line: str) -> str:
    """A line of a job's log without time, level, rank and node."""
    found = _PREFIX.match(line)
    return line[found.end() :] if found else line


def is_job() -> bool:
    """Whether this process logs to a job's log."""
    return any(isinstance(handler.formatter, _JobFormatter) for handler in logging.getLogger().handlers)


def log_to_terminal() -> None:
    """Called first in each command.

    Raises:
        UserError: CFMASK_LOG_LEVEL names no level.
    """
    _configure(_Handler(_CommandFormatter(), warnings_to_stderr=True))


def _configure(handler: logging.Handler) -> None:
    level = (os.environ.get(LEVEL_VARIABLE) or "INFO").upper()
    if level not in _LEVELS:
        raise UserError(f"{LEVEL_VARIABLE}={level} is not a level; choose from {', '.join(_LEVELS)}.")
    root = logging.getLogger()
    for earlier in [each for each in root.handlers if isinstance(each, _Handler)]:
        root.removeHandler(earlier)
    root.addHandler(handler)
    for name in _OWN:
        logging.getLogger(name).setLevel(level)
