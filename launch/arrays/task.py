"""What submitit runs in a task of an array (array.py): the items that have no result yet, in processes of the node."""

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
from cfmask.files import write_atomically
from cfmask.runtime.attempts import AttemptLog
from cfmask.runtime.output import escape_unencodable_output
from cfmask.runtime.pool import map_in_processes
from cfmask.secrets import mask_secrets
from launch.restarts.policy import Cause, Restarts

FINISHED = "finished"
"""Recorded at the end of a task that has done all of its items."""
FUNCTION = "function.pkl"
"""In the folder work/."""


class _Stopped(BaseException):
    """Raised by a signal, wherever the task is: a result is a whole file or none."""

    def __init__(self, cause: Cause) -> None:
        super().__init__(cause)
        self.cause = cause


@dataclass(frozen=True)
class ArrayTask:
    """The callable that is pickled: where the work is. Started again, it does what is missing."""

    folder: Path
    number: int
    workers: int
    time_limit_min: int | None

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
            log.end(FINISHED)
        except _Stopped as stop:
            log.end(f"stopped: {stop.cause.value}")
            try:
                sys.exit(restarts.after_stop(stop.cause, len(keyed) - len(self._missing(keyed))))
            except UserError as error:
                log.end(str(error))
                raise
        except Exception as error:
            why = str(error) if isinstance(error, UserError) else mask_secrets(repr(error))
            log.end_failed(why, job=restarts.attempt)
            raise

    def checkpoint(self) -> NoReturn:
        """Called by submitit's own handler, for a signal that comes before ours is installed. It would requeue the job
        whatever the restart policy says, and so does not get control back."""
        keyed = self._load(f"{self.number}.pkl")
        code = self._restarts().after_stop(Cause.WARNED, len(keyed) - len(self._missing(keyed)))
        sys.stdout.flush()
        os._exit(code)

    def _log(self) -> AttemptLog:
        return AttemptLog(self.folder / "tasks" / str(self.number))

    def _restarts(self) -> Restarts:
        return Restarts.of_this_job(self._log(), resume="give the same command again", unit="item")

    def _missing(self, keyed: list[Any]) -> list[Any]:
        """Items without a result, of (key, item)."""
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
        """Until it stops by itself, with a minute or so left of its time limit; None: Slurm warns it."""
        if self.time_limit_min is None:
            return None
        return 60 * self.time_limit_min - min(90.0, 6 * self.time_limit_min)


def _keyed(each: tuple[Callable[[Any], Any], str, Any]) -> tuple[str, Any]:
    function, key, item = each
    return key, function(item)


@contextlib.contextmanager
def _stopped_by_signals(seconds: float | None) -> Iterator[None]:
    """Raise _Stopped at the first signal that asks for an end, or when the time is nearly up; ignore those after it."""
    pid = os.getpid()
    causes = {
        signal.SIGUSR2: Cause.WARNED,
        signal.SIGALRM: Cause.WARNED,
        signal.SIGTERM: Cause.TERMINATED,
        signal.SIGINT: Cause.TERMINATED,
    }

    def stop(number: int, frame: object) -> NoReturn | None:
        if os.getpid() != pid:  # a child inherited this handler
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
