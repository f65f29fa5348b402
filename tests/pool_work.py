"""What the workers of test_pool.py do. Needs no package, so that any Python can run it: `python3.10 pool_work.py …`."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

from cfmask.errors import UserError
from cfmask.runtime import pool


class Unpicklable(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def double(item: int) -> int:
    return 2 * item


def number_and_pid(item: int) -> tuple[int | None, int]:
    time.sleep(0.05)
    return pool.worker_number(), os.getpid()


def refuse_three(item: int) -> int:
    if item == 3:
        raise UserError("three is refused")
    return item


def fail_strangely(item: int) -> int:
    raise Unpicklable(item, 2)


class DiesWhileSent:
    """A result at which the worker dies while it sends it: holding whatever a process holds then."""

    def __reduce__(self):
        def kill():
            time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)

        threading.Thread(target=kill).start()
        return bytes, (bytes(64 << 20),)


def large(item: tuple[str, int, Path, bytes]) -> object:
    """``killed`` with items that fill the buffers between processes."""
    return killed(item[:3])


def killed(item: tuple[str, int, Path]) -> object:
    """Item 0 … of a call whose process is killed at the first, one in the middle, or the last; while it sends the
    result or before; each item leaves a file."""
    how, number, folder = item
    fatal = {"first": 0, "middle": 5, "last": 9, "last-result": 9, "large": 0}[how]
    if number == fatal and not (folder / "once").exists():
        (folder / "once").touch()
        time.sleep(0.3 if how.startswith("last") else 0)  # the others are done, or idle
        if how == "last-result":
            return DiesWhileSent()
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.02)
    (folder / str(number)).touch()
    return number


def slow(item: tuple[str, int, Path]) -> int:
    """Says that it works, and does for ten minutes; the second time it is quick."""
    _, number, folder = item
    (folder / f"pid-{os.getpid()}").touch()
    if not (folder / "quick").exists():
        time.sleep(600)
    (folder / str(number)).touch()
    return number


def main(how: str, folder: Path) -> int:
    items = [(how, number, folder) for number in range(10)]
    function = {"slow": slow, "large": large}.get(how, killed)
    if how == "large":
        items = [(*item, bytes(1 << 20)) for item in items]
    try:
        found = pool.map_in_processes(
            function, items, workers=3, describe=lambda item: f"item {item[1]}", progress=lambda result: None
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    assert found == list(range(10))
    return 0


if __name__ == "__main__":
    # The functions' module is this one, and not __main__.
    import pool_work

    sys.exit(pool_work.main(sys.argv[1], Path(sys.argv[2])))
