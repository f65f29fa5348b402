"""A task of an array (array.py): processes the items that have no result yet, in processes of its node."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from cfmask.errors import UserError
from cfmask.runtime.attempts import AttemptLog
from cfmask.runtime.files import write_atomically
from cfmask.runtime.output import escape_unencodable_output
from cfmask.runtime.pool import map_in_processes
from cfmask.secrets import mask_secrets
from launch.restarts.policy import Cause, Restarts

FINISHED = "finished"
"""Recorded at the end of a task that has processed all of its items."""
FUNCTION = "function.pkl"
"""File in the folder work/."""


class _Stopped(BaseException):
    """Raised by a signal handler at any point of the task. Results are written atomically."""

    def __init__(self, cause: Cause) -> None:
        super().__init__(cause)
        self.cause = cause


@dataclass(frozen=True)
class ArrayTask:
    """The callable that submitit pickles. It refers to the array's folder, so a repeated start does what is missing."""

    folder: Path
    """Folder of the array."""
    number: int
    """Index of the task."""
    workers: int
    """Number of processes."""
    time_limit_min: int | None
    """None without a limit, or if only Slurm knows it."""

    def __call__(self) -> None:
        escape_unencodable_output()
        log, restarts = self._log(), self._restarts()
        keyed = self._load(f"{self.number}.pkl")
        missing = self._missing(keyed)
        try:
            with _stopped_by_signals(self._seconds()):
                restarts.check_start(len(keyed) - len(missing))
                restarts.begin(len(keyed) - len(missing), nodes=1, world_size=1)
                self._do(missing)
            log.end_attempt(FINISHED)
        except _Stopped as stop:
            log.end_attempt(f"stopped: {stop.cause.value}")
            try:
                sys.exit(restarts.after_stop(stop.cause, len(keyed) - len(self._missing(keyed))))
            except UserError as error:
                log.end_attempt(str(error))
                raise
        except Exception as error:
            why = str(error) if isinstance(error, UserError) else mask_secrets(repr(error))
            log.end_failed(why, job=restarts.attempt)
            raise

    def checkpoint(self) -> NoReturn:
        """Called by submitit's handler for a signal that arrives before ours is installed. Does not return, because
        submitit would then requeue the job in any case; the restart policy decides."""
        keyed = self._load(f"{self.number}.pkl")
        code = self._restarts().after_stop(Cause.WARNED, len(keyed) - len(self._missing(keyed)))
        sys.stdout.flush()
        os._exit(code)

    def _log(self) -> AttemptLog:
        return AttemptLog(self.folder / "tasks" / str(self.number))

    def _restarts(self) -> Restarts:
        return Restarts.of_this_job(self._log(), resume="give the same command again", unit="item")

    def _missing(self, keyed: list[Any]) -> list[Any]:
        """The (key, item) pairs without a result."""
        there = set(os.listdir(self.folder / "results"))
        return [pair for pair in keyed if f"{pair[0]}.pkl" not in there]

    def _do(self, missing: list[Any]) -> None:
        function, preload = self._load(FUNCTION)

        def keep(done: tuple[str, Any]) -> None:
            path = self.folder / "results" / f"{done[0]}.pkl"
            try:
                write_atomically(path, pickle.dumps(done[1]))
            except OSError as error:
                raise UserError(f"The result {path} cannot be written ({error.strerror}).") from None

        map_in_processes(
            _keyed,
            [(function, key, item) for key, item in missing],
            workers=self.workers,
            preload=preload,
            describe=lambda each: each[1],
            progress=keep,
        )

    def _load(self, name: str) -> Any:
        path = self.folder / "work" / name
        try:
            return pickle.loads(path.read_bytes())
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}).") from None

    def _seconds(self) -> float | None:
        """How long the task runs before it stops by itself, about a minute before its time limit; None: until Slurm's
        warning."""
        if self.time_limit_min is None:
            return None
        return 60 * self.time_limit_min - min(90.0, 6 * self.time_limit_min)


def _keyed(each: tuple[Callable[[Any], Any], str, Any]) -> tuple[str, Any]:
    function, key, item = each
    return key, function(item)


@contextlib.contextmanager
def _stopped_by_signals(seconds: float | None) -> Iterator[None]:
    """Raise _Stopped at the first signal that asks the task to end, or after ``seconds``; ignore later signals."""
    pid = os.getpid()
    causes = {
        signal.SIGUSR2: Cause.WARNED,
        signal.SIGALRM: Cause.WARNED,
        signal.SIGTERM: Cause.TERMINATED,
        signal.SIGINT: Cause.TERMINATED,
    }

    def stop(number: int, frame: object) -> NoReturn | None:
        if os.getpid() != pid:  # a child process inherited this handler
            return None
        for each in causes:
            signal.signal(each, signal.SIG_IGN)
        raise _Stopped(causes[signal.Signals(number)])

    for each in causes:
        signal.signal(each, stop)
    if seconds is not None:
        signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        for each in causes:
            signal.signal(each, signal.SIG_IGN)
