"""The process pool: if any process is killed, the call ends with an error and leaves no process."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import pool_work
from cfmask.errors import UserError
from cfmask.runtime.pool import map_in_processes, worker_number
from slurm_fixture import wait_until

HERE = Path(__file__).resolve().parent
END_S = 240


def pythons() -> list[str]:
    """This Python, and the oldest supported one if it is installed. The pool needs no package."""
    found = [sys.executable]
    if sys.version_info >= (3, 11) and (oldest := shutil.which("python3.10")):
        if subprocess.run([oldest, "-c", ""], capture_output=True).returncode == 0:
            found.append(oldest)
    return found


@pytest.fixture(params=pythons(), ids=lambda path: Path(path).name)
def start(request, tmp_path):
    def run(how: str) -> subprocess.Popen:
        command = [request.param, str(HERE / "pool_work.py"), how, str(tmp_path)]
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)

    return run


def in_group(process: subprocess.Popen) -> dict[int, int]:
    """{pid: parent} of the running processes of the command, without the command itself."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent, group = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(group) == process.pid and state != "Z" and int(stat.parent.name) != process.pid:
            found[int(stat.parent.name)] = int(parent)
    return found


def launcher_of(process: subprocess.Popen) -> int:
    [launcher] = [pid for pid, parent in in_group(process).items() if parent == process.pid]
    return launcher


def ended(process: subprocess.Popen) -> str:
    """Wait until the command and its processes have ended; returns its standard error."""
    _, errors = process.communicate(timeout=END_S)
    wait_until(lambda: not in_group(process), "all of its processes to be gone")
    assert "Traceback" not in errors, errors
    return errors


def test_results_are_in_order_and_progress_is_called_for_each():
    seen: list[int] = []
    assert map_in_processes(pool_work.double, range(50), workers=4, progress=seen.append) == list(range(0, 100, 2))
    assert sorted(seen) == list(range(0, 100, 2))
    assert map_in_processes(pool_work.double, [4], workers=4) == [8] and worker_number() is None


def test_workers_are_numbered_and_end_with_the_call():
    found = map_in_processes(pool_work.number_and_pid, range(20), workers=3)
    assert {number for number, _ in found} == {0, 1, 2} and len({pid for _, pid in found}) == 3
    assert not any(Path(f"/proc/{pid}").exists() for _, pid in found)


def test_workers_killed_after_the_last_result_do_not_matter():
    seen: list[tuple[int | None, int]] = []

    def progress(result: tuple[int | None, int]) -> None:
        seen.append(result)
        for pid in {pid for _, pid in seen} if len(seen) == 20 else ():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    assert len(map_in_processes(pool_work.number_and_pid, range(20), workers=3, progress=progress)) == 20


def test_errors_of_items_are_raised_unchanged():
    with pytest.raises(UserError, match="^three is refused$"):
        map_in_processes(pool_work.refuse_three, range(20), workers=2)
    with pytest.raises(RuntimeError, match=r"Unpicklable: \d and 2") as raised:
        map_in_processes(pool_work.fail_strangely, range(2), workers=2)
    assert "in fail_strangely" in str(raised.value.__cause__)
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        map_in_processes(pool_work.double, range(2), workers=2, preload=["no_such_module"])


def test_an_error_in_the_progress_callback_ends_the_call():
    with pytest.raises(ZeroDivisionError):
        map_in_processes(pool_work.double, range(20), workers=2, progress=lambda result: 1 // 0)


@pytest.mark.parametrize(("how", "item"), [("first", 0), ("middle", 5), ("last", 9), ("last-result", 9), ("large", 0)])
def test_a_killed_worker_raises_an_error_that_names_the_item(start, tmp_path, how, item):
    errors = ended(process := start(how))
    assert process.returncode == 2
    assert errors.startswith(
        f"error: A worker process was killed by signal 9 (SIGKILL) while it worked on item {item}."
    )
    assert len(errors.splitlines()) == 1
    errors = ended(process := start(how))
    assert process.returncode == 0 and not errors


@pytest.mark.parametrize("victim", ["launcher", "worker", "command", "Ctrl-C"])
def test_all_processes_end_when_one_is_killed(start, tmp_path, victim):
    process = start("slow")
    wait_until(lambda: len(list(tmp_path.glob("pid-*"))) == 3, "three workers to work")
    begun = time.monotonic()
    if victim == "launcher":
        os.kill(launcher_of(process), signal.SIGKILL)
    elif victim == "worker":
        os.kill(int(next(tmp_path.glob("pid-*")).name.partition("-")[2]), signal.SIGKILL)
    elif victim == "command":
        process.kill()
    else:
        os.killpg(process.pid, signal.SIGINT)
    errors = ended(process)
    assert time.monotonic() - begun < END_S
    status, said = {
        "launcher": (2, "error: The process that starts the workers was killed by signal 9 (SIGKILL)."),
        "worker": (2, "error: A worker process was killed by signal 9 (SIGKILL) while it worked on item"),
        "command": (-signal.SIGKILL, ""),
        "Ctrl-C": (130, "interrupted"),
    }[victim]
    assert process.returncode == status and errors.startswith(said) and len(errors.splitlines()) == (said != "")
    (tmp_path / "quick").touch()
    assert ended(process := start("slow")) == "" and process.returncode == 0


def test_a_launcher_killed_before_forking_raises_the_same_error(start, tmp_path):
    process = start("slow")
    wait_until(lambda: len(in_group(process)) >= 1, "the launcher to be there")
    os.kill(launcher_of(process), signal.SIGKILL)
    assert "The process that starts the workers was killed" in ended(process) and process.returncode == 2
