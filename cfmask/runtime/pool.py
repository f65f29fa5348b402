"""Map a function over items in processes of this machine. The call returns or raises, whichever process is killed.

    results = map_in_processes(function, items, workers=8, progress=bar.update)

    caller ─── launcher ─┬─ worker 0
       └─ a socket each ─┴─ worker 1 …

The launcher is a fresh interpreter that imports the modules for the work once and forks the workers. (The caller cannot
fork them, because it may have threads.) A worker receives one item at a time over its own socket, and a closed socket
shows which worker died and on which item. The pools of multiprocessing and concurrent.futures are not used: their
workers share queues with locks, and a worker that is killed while it holds a lock blocks the others forever.

    a worker is killed      the launcher reports the signal; the call raises an error that names the item
    the launcher is killed  the kernel kills the workers (parent-death signal); the call raises
    the caller is killed    the launcher's socket closes, and it kills the workers
    Ctrl-C                  only the caller handles it; the other processes are killed when the call raises
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
"""How long to wait for processes after SIGKILL. A process that hangs in the kernel is given up."""
_REPORT_S = 5.0
"""How long to wait for the launcher's report on a worker that ended."""

_worker_number: int | None = None


def worker_number() -> int | None:
    """Number of this worker of ``map_in_processes``, from 0; None in other processes."""
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
    """The results for ``items``, in their order, computed in ``workers`` processes; in this process if that is 1.

    Args:
        function: a function of a module other than ``__main__``. Items and results must be picklable.
        preload: modules that are imported before the workers are forked.
        describe: the name of an item in errors.
        progress: called with each result when it is available.

    Raises:
        UserError: ``function`` raised it, or a process could not be started or was killed.
        Exception: ``function`` raised it; the worker's traceback is its cause.
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
        working: dict[Connection, int | None] = dict.fromkeys(sockets)  # item by worker; None: not ready yet
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
    """The launcher, in the caller.

    control: receives (worker, exit code) of each worker that has ended, or an error.
    """

    def __init__(self, process: subprocess.Popen[bytes], control: Connection) -> None:
        self._process = process
        self.control = control
        self._exit_codes: dict[int, int] = {}

    def read_report(self, sockets: Sequence[Connection]) -> None:
        """Read a message of the launcher.

        Raises:
            UserError: the launcher was killed, or could not fork.
            Exception: importing the function raised it.
        """
        try:
            message = self.control.recv_bytes()
        except (EOFError, OSError):
            self._wait_for_end(sockets)
            raise UserError(
                f"The process that starts the workers {_how(self._process.returncode)}. Finished work is kept: run the "
                f"same command again."
            ) from None
        number, code = _unpacked(message)
        self._exit_codes[number] = code

    def death(self, sockets: Sequence[Connection], number: int, item: str) -> UserError:
        """The error for a worker whose socket was closed.

        Args:
            number: of the worker.
            item: " while it worked on …", or empty.

        Raises:
            UserError: the launcher was killed, and the worker with it.
        """
        deadline = time.monotonic() + _REPORT_S
        while number not in self._exit_codes and self.control.poll(max(0.0, deadline - time.monotonic())):
            self.read_report(sockets)
        code = self._exit_codes.get(number)
        memory = " The usual cause is lack of memory." if code == -signal.SIGKILL else ""
        return UserError(
            f"A worker process {_how(code)}{item}.{memory} Finished work is kept: run the same command again, with "
            f"fewer processes if this happens twice."
        )

    def _wait_for_end(self, sockets: Sequence[Connection]) -> None:
        """Wait until the launcher and its workers have ended, because they might still write files."""
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
    """Start the launcher and ``count`` workers; at the end all of them have ended."""
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
                # As multiprocessing's spawn does: by PYTHONPATH, the working directory would come first.
                code = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import _launch; _launch({numbers!r})"
                # The launcher inherits the mask, so that a Ctrl-C cannot reach it before it ignores the signal.
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
    """How a process ended, from its exit code as subprocess gives it."""
    if code is None:
        return "ended"
    if code >= 0:
        return f"ended with exit code {code}"
    return f"was killed by signal {-code} ({signal.Signals(-code).name})"


# --- messages ---------------------------------------------------------------------------------------------------------


class _WorkerTraceback(Exception):
    """The cause of an error that was raised in another process."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def _packed(error: Exception) -> bytes:
    """The message for an error."""
    shown = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    if isinstance(error, MemoryError):
        error = UserError("A worker process has no memory left. Run the same command again, with fewer processes.")
    try:
        message = pickle.dumps((error, shown))
        pickle.loads(message)
        return b"E" + message
    except Exception:  # the error cannot be pickled or unpickled
        return b"E" + pickle.dumps((RuntimeError(f"{type(error).__name__}: {error}"), shown))


def _unpacked(message: bytes) -> Any:
    """The value in a message; raises the error in it."""
    content = pickle.loads(memoryview(message)[1:])
    if message[:1] != b"E":
        return content
    error, shown = content
    raise error from (None if isinstance(error, UserError) else _WorkerTraceback(shown))


# --- in the launcher and the workers ----------------------------------------------------------------------------------


def _launch(numbers: Sequence[int]) -> NoReturn:
    """Main function of the launcher.

    Args:
        numbers: descriptors of its own socket and of the workers' sockets.
    """
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
        while not control.poll(0):  # readable only when the caller has closed it
            wait([control, awake])
            with contextlib.suppress(BlockingIOError):
                os.read(awake, 4096)
            for pid, status in _ended():
                if (worker := alive.pop(pid, None)) is not None:
                    control.send_bytes(b"R" + pickle.dumps((worker, os.waitstatus_to_exitcode(status))))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the caller has ended
    except Exception as error:
        with contextlib.suppress(OSError):
            control.send_bytes(_packed(error))
    for pid in alive:
        os.kill(pid, signal.SIGKILL)  # not waited for yet: the pid is still valid
    deadline = time.monotonic() + _END_S
    while alive and time.monotonic() < deadline:
        for pid, _ in _ended():
            alive.pop(pid, None)
        if alive:
            wait([awake], 0.1)
    os._exit(0)


def _ended() -> Iterator[tuple[int, int]]:
    """(pid, status) of children that have ended: workers, or processes that an import has started."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        yield pid, status


def _work(number: int, own: Connection, function: Callable[[Any], Any], launcher: int) -> NoReturn:
    """Main function of a worker."""
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
        pass  # no item is left, or the caller has ended
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
    os._exit(0)
