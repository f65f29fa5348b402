"""The processes of a cluster, found in /proc, and how they are ended. (The standard library only: no psutil.)"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

MARK = "CFMASK_SLURM_STATE"  # in the environment of every daemon of a cluster
POLL = 0.2  # seconds between two looks


def end(pids: Iterable[int | None], patience: float) -> None:
    """Send TERM to these processes, and KILL to those that still run after ``patience`` seconds."""
    mine = {(pid, start) for pid in pids if pid is not None and (start := start_time(pid))}
    for number, wait in ((signal.SIGTERM, patience), (signal.SIGKILL, 5.0)):
        for pid, _ in mine:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        deadline = time.monotonic() + wait
        while mine and time.monotonic() < deadline:
            time.sleep(POLL / 2)
            mine = {(pid, start) for pid, start in mine if start_time(pid) == start}


def processes() -> Iterator[int]:
    """Yields the ids of all processes of this machine except this one."""
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid():
            yield int(entry)


def stat(pid: int) -> list[str]:
    """Returns the fields of /proc/PID/stat from the third (the state) on; none if the process has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [] if fields[0] in "ZX" else fields


def start_time(pid: int) -> str:
    """Returns when a process started (clock ticks since boot), which identifies it together with its id; "" if it has
    ended."""
    fields = stat(pid)
    return fields[19] if fields else ""


def runs(state: Path, pid: int | None) -> bool:
    return pid is not None and belongs(state, pid)


def family(state: Path) -> set[int]:
    """Returns the daemons of this cluster, the processes of its jobs, and their descendants."""
    parents = {pid: int(fields[1]) for pid in processes() if (fields := stat(pid))}
    found = {pid for pid in parents if belongs(state, pid)}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def belongs(state: Path, pid: int) -> bool:
    """Whether a process is a daemon of this cluster or belongs to one of its jobs, by its environment and title."""
    process = Path(f"/proc/{pid}")
    try:
        # A zombie has no environment.
        variables = (process / "environ").read_bytes().split(b"\0")
        if f"{MARK}={state}".encode() in variables:
            return True
        # slurmstepd writes its title over its environment; its working directory is slurmd's.
        if (process / "comm").read_text().startswith("slurm") and Path(os.readlink(process / "cwd")) == state:
            return True
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return False
    in_job = any(variable.startswith(b"SLURM_JOB_ID=") for variable in variables)
    return in_job and any(variable.startswith(f"SLURM_CONF={state}/".encode()) for variable in variables)
