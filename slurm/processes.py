"""Which processes belong to a cluster, and how they are ended."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

MARK = "CFMASK_SLURM_STATE"  # in the environment of every daemon: tells ours from those of the machine
POLL = 0.2  # seconds between two looks


def end(pids: Iterable[int | None], patience: float) -> None:
    """Send TERM to these processes, and KILL to those that are left after `patience` seconds."""
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
    """Yield the ids of the processes of this machine, without this one."""
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid():
            yield int(entry)


def stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat from the third (the state) on; none if the process is gone, or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [] if fields[0] in "ZX" else fields


def start_time(pid: int) -> str:
    """Return when a process began (clock ticks since boot), which tells it from a later one of the same id; "" if it is
    gone."""
    fields = stat(pid)
    return fields[19] if fields else ""


def runs(state: Path, pid: int | None) -> bool:
    return pid is not None and belongs(state, pid)


def family(state: Path) -> set[int]:
    """Return the daemons of this cluster, the processes of its jobs, and whatever these have started."""
    parents = {pid: int(fields[1]) for pid in processes() if (fields := stat(pid))}
    found = {pid for pid in parents if belongs(state, pid)}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def belongs(state: Path, pid: int) -> bool:
    """Whether a process is a daemon of this cluster or runs in one of its jobs, by what it shows of itself."""
    process = Path(f"/proc/{pid}")
    try:
        # A process that has ended and waits to be reaped shows no environment.
        variables = (process / "environ").read_bytes().split(b"\0")
        if f"{MARK}={state}".encode() in variables:
            return True
        # slurmstepd writes its title over its environment. It stays where slurmd was started.
        if (process / "comm").read_text().startswith("slurm") and Path(os.readlink(process / "cwd")) == state:
            return True
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return False
    in_job = any(variable.startswith(b"SLURM_JOB_ID=") for variable in variables)
    return in_job and any(variable.startswith(f"SLURM_CONF={state}/".encode()) for variable in variables)
