"""Apply a function to many items in processes of this machine. Whichever process is killed, the call ends.

    results = map_in_processes(function, items, workers=8, progress=bar.update)

    caller ─── launcher ─┬─ worker 0
       └─ a socket each ─┴─ worker 1 …

The launcher is a fresh interpreter: it imports what the work needs, once, and forks the workers. (The caller cannot
fork them, because it may have threads.) A worker gets one item at a time over a socket of its own. Workers share
nothing: the pools of multiprocessing and concurrent.futures share queues with locks, and a process that is killed while
it holds one blocks the others for ever. Here the end of a socket says which worker died, and on which item.

    a worker is killed      its socket ends, the launcher reports the signal; the call raises, and names the item
    the launcher is killed  the kernel kills the workers (parent-death signal); the call raises
    the caller is killed    the launcher sees the end of its socket, and kills the workers
    Ctrl-C                  is for the caller alone: the others ignore it, and are killed when the call raises
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, NoReturn, TypeVar

from cfmask.errors import UserError
from cfmask.runtime.process import JOB_SIGNALS, die_with_parent, ignore_job_signals

Item = TypeVar("Item")
Result = TypeVar("Result")

_END_S = 10.0
"""How long processes that were sent SIGKILL are waited for. One that hangs in the kernel is left to it."""
_REPORT_S = 5.0
"""How long the launcher is waited for to say how a worker ended."""

_worker_number: int | None = None


def worker_number() -> int | None:
    """From 0 in the workers of ``map_in_processes``; None in any other process."""
    return _worker_number


def ignore(*_: Any) -> None:
    """A progress callback that does nothing."""


def map_in_processes(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    *,
    workers: int,
    preload: Sequence[str] = (),
    describe: Callable[[Item], str] | None = None,
    progress: Callable[[Result], object] = ignore,
) -> list[Result]:
    """The results of ``items``, in their order, computed in ``workers`` processes; in this process if that is 1.

    Args:
        function: can be imported by its name, and not from ``__main__``. Items and results can be pickled.
        preload: modules to import before the workers are forked, so that it is done once (torch takes seconds).
        describe: what an item is called in errors.
        progress: called with each result, as they come.

    Raises:
        UserError: one that ``function`` raised, or a process could not be started, or was killed.
        Exception: any other that ``function`` raised, with the worker's traceback as its cause.
    """
    if workers == 1 or len(items) <= 1:
        results = []
        for item in items:
            results.append(function(item))
            progress(results[-1])
        return results

    def name(index: int | None) -> str:
        return f" while it worked on {describe(items[index])}" if describe and index is not None else ""

    with _started(function, min(workers, len(items)), preload) as (launcher, sockets):
        found: list[Any] = [None] * len(items)
        left = iter(range(len(items)))
        idle_at_end = False
        working: dict[Connection, int | None] = dict.fromkeys(sockets)  # which item; None: not ready yet
        missing = len(items)
        while missing:
            for ready in wait([launcher.control, *working]):
                if ready is launcher.control:
                    launcher.read_report(sockets)
                    continue
                assert isinstance(ready, Connection)
                index = working[ready]
                try:
                    message = ready.recv_bytes()
                except (EOFError, OSError):
                    if index is None and idle_at_end:
                        del working[ready]
                        continue
                    raise launcher.death(sockets, sockets.index(ready), name(index)) from None
                if index is not None:
                    found[index] = _unpacked(message)
                    missing -= 1
                    progress(found[index])
                following = next(left, None)
                if following is None:
                    idle_at_end = True
                    del working[ready]
                    ready.close()  # the worker ends
                    continue
                working[ready] = following
                try:
                    ready.send_bytes(pickle.dumps(items[following]))
                except OSError:
                    raise launcher.death(sockets, sockets.index(ready), name(following)) from None
        return found


# --- in the caller ----------------------------------------------------------------------------------------------------


class _Launcher:
    """The caller's view of the launcher. control: gets (worker, exit code) of each worker that ended, or an error."""

    def __init__(self, process: subprocess.Popen[bytes], control: Connection) -> None:
        self._process = process
        self.control = control
        self._exit_codes: dict[int, int] = {}

    def read_report(self, sockets: Sequence[Connection]) -> None:
        """Read one message of the launcher's.

        Raises:
            UserError: it was killed, or could not fork.
            Exception: what importing the function raised.
        """
        try:
            message = self.control.recv_bytes()
        except (EOFError, OSError):
            self._wait_for_end(sockets)
            raise UserError(
                f"The process that starts the workers {_how(self._process.returncode)}. Nothing that is finished is "
                f"lost: run the same command again."
            ) from None
        number, code = _unpacked(message)
        self._exit_codes[number] = code

    def death(self, sockets: Sequence[Connection], number: int, item: str) -> UserError:
        """The error to raise for a worker whose socket has ended. item: says what it worked on, or is empty.

        Raises:
            UserError: the launcher was killed, and the worker with it.
        """
        deadline = time.monotonic() + _REPORT_S
        while number not in self._exit_codes and self.control.poll(max(0.0, deadline - time.monotonic())):
            self.read_report(sockets)
        code = self._exit_codes.get(number)
        memory = " Most often the cause is lack of memory." if code == -signal.SIGKILL else ""
        return UserError(
            f"A worker process {_how(code)}{item}.{memory} Nothing that is finished is lost: run the same command "
            f"again, with fewer processes if it happens twice."
        )

    def _wait_for_end(self, sockets: Sequence[Connection]) -> None:
        """Wait until the launcher and its workers are gone: they might still write files."""
        deadline = time.monotonic() + _END_S
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_S)
        alive = [each for each in sockets if not each.closed]
        while alive and (left := deadline - time.monotonic()) > 0:
            for ready in wait(alive, left):
                assert isinstance(ready, Connection)
                try:
                    ready.recv_bytes()
                except (EOFError, OSError):
                    alive.remove(ready)


@contextlib.contextmanager
def _started(
    function: Callable[..., Any], count: int, preload: Sequence[str]
) -> Iterator[tuple[_Launcher, list[Connection]]]:
    """Start the launcher and ``count`` workers; no process is left at the end."""
    ours: list[Connection] = []
    process: subprocess.Popen[bytes] | None = None
    try:
        with contextlib.ExitStack() as theirs:
            try:
                numbers = []
                for _ in range(1 + count):
                    one, other = socket.socketpair()
                    ours.append(Connection(one.detach()))
                    numbers.append(theirs.enter_context(other).fileno())
                code = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import _launch; _launch({numbers!r})"
                # A Ctrl-C must not reach the launcher before it ignores it. The mask is inherited.
                before = signal.pthread_sigmask(signal.SIG_BLOCK, JOB_SIGNALS)
                try:
                    process = subprocess.Popen([sys.executable, "-c", code], pass_fds=numbers, stdin=subprocess.DEVNULL)
                finally:
                    signal.pthread_sigmask(signal.SIG_SETMASK, before)
            except OSError as error:
                raise _cannot_start(count, error) from None
        launcher = _Launcher(process, ours[0])
        with contextlib.suppress(OSError):  # it was killed, and read_report says so
            ours[0].send((list(preload), pickle.dumps(function)))
        yield launcher, ours[1:]
    finally:
        for each in ours:
            each.close()
        if process is not None:
            try:
                process.wait(2 * _END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _cannot_start(count: int, error: OSError) -> UserError:
    return UserError(
        f"{count} worker processes cannot be started ({error.strerror}). Ask for fewer (--workers), or raise the limit "
        f"(ulimit -u, ulimit -n)."
    )


def _how(code: int | None) -> str:
    """How a process ended, by subprocess's exit code."""
    if code is None:
        return "ended"
    if code >= 0:
        return f"ended with exit code {code}"
    return f"was killed by signal {-code} ({signal.Signals(-code).name})"


# --- messages ---------------------------------------------------------------------------------------------------------


class _WorkerTraceback(Exception):
    """Shown as the cause of an error that was raised in another process."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def _packed(error: Exception) -> bytes:
    """A message that says what was raised."""
    shown = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    if isinstance(error, MemoryError):
        error = UserError("A worker process has no memory left. Run the same command again, with fewer processes.")
    try:
        message = pickle.dumps((error, shown))
        pickle.loads(message)
        return b"E" + message
    except Exception:  # an exception may refuse either
        return b"E" + pickle.dumps((RuntimeError(f"{type(error).__name__}: {error}"), shown))


def _unpacked(message: bytes) -> Any:
    """The value in a message, or the error in it, raised."""
    content = pickle.loads(memoryview(message)[1:])
    if message[:1] != b"E":
        return content
    error, shown = content
    raise error from (None if isinstance(error, UserError) else _WorkerTraceback(shown))


# --- in the launcher and the workers ----------------------------------------------------------------------------------


def _launch(numbers: Sequence[int]) -> NoReturn:
    """The launcher's main function. numbers: of the sockets' descriptors, its own before the workers'."""
    ignore_job_signals()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, JOB_SIGNALS)
    control, *sockets = (Connection(number) for number in numbers)
    awake, wake = os.pipe()
    os.set_blocking(awake, False)
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, ignore)
    alive: dict[int, int] = {}  # number of the worker, by pid
    launcher = os.getpid()
    try:
        preload, pickled = control.recv()
        for module in preload:
            importlib.import_module(module)
        function = pickle.loads(pickled)
        for number, own in enumerate(sockets):
            try:
                pid = os.fork()
            except OSError as error:
                raise _cannot_start(len(sockets), error) from None
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for other in (control, *sockets[number + 1 :]):
                    other.close()
                _work(number, own, function, launcher)
            own.close()
            alive[pid] = number
        while not control.poll(0):  # the caller sends no more: what comes is the end
            wait([control, awake])
            with contextlib.suppress(BlockingIOError):
                os.read(awake, 4096)
            for pid, status in _ended():
                if (worker := alive.pop(pid, None)) is not None:
                    control.send_bytes(b"R" + pickle.dumps((worker, os.waitstatus_to_exitcode(status))))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the caller is gone
    except Exception as error:
        with contextlib.suppress(OSError):
            control.send_bytes(_packed(error))
    for pid in alive:
        os.kill(pid, signal.SIGKILL)  # none has been waited for: its number is still its own
    deadline = time.monotonic() + _END_S
    while alive and time.monotonic() < deadline:
        for pid, _ in _ended():
            alive.pop(pid, None)
        if alive:
            wait([awake], 0.1)
    os._exit(0)


def _ended() -> Iterator[tuple[int, int]]:
    """(pid, status) of children that have ended: workers, or what an import has started."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        yield pid, status


def _work(number: int, own: Connection, function: Callable[[Any], Any], launcher: int) -> NoReturn:
    """A worker's main function."""
    global _worker_number
    _worker_number = number
    die_with_parent(launcher)
    try:
        own.send_bytes(b"R")  # ready
        while True:
            data = own.recv_bytes()
            try:
                message = b"R" + pickle.dumps(function(pickle.loads(data)))
            except Exception as error:
                message = _packed(error)
            own.send_bytes(message)
    except (EOFError, OSError):
        pass  # no item is left, or the caller is gone
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
    os._exit(0)
