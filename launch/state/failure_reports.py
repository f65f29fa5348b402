"""Failure reports: what a rank that fails leaves for the others, and which rank failed first.

RUN/jobs/failures/
  123-0_1.json   of rank 1 at the first start of job 123: its exception, the signal that killed it, or how it hung
  123-0.txt      of the rank that failed first, as text: the end of the job's log
  123-0.restart  the job starts again: its node was lost, or a rank has died and may be tried again
  123-0.exclude  nodes that it must not get then
"""

from __future__ import annotations

import builtins
import contextlib
import json
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from cfmask.runs import RunFolder
from cfmask.runtime.files import write_atomically
from cfmask.runtime.heartbeat import WAITING
from cfmask.runtime.jsonl import read_object
from cfmask.runtime.machine import node_name
from launch.state.attempt import attempt_name, restart_of

logger = logging.getLogger(__name__)

RAISED, KILLED, HUNG, DEVICE, UNHEALTHY = "raised", "killed", "hung", "device", "unhealthy"
"""Kinds of failures: an exception; a signal, or an exit without a report; no progress; a GPU error; a failed node check
(launch/ranks/health.py)."""
DEATHS = (KILLED, HUNG, DEVICE, UNHEALTHY)
"""Kinds that may not occur again at another start or on another node."""
_STOPPED_STATES = ("T", "D", "Z")
"""States of a process that does not run: stopped, waiting in the kernel, ended."""


@dataclass(frozen=True)
class RankFailure:
    """The failure of a rank."""

    rank: int
    node: str
    time: str
    """ISO 8601, to the millisecond."""
    error: str
    """One line."""
    traceback: str = ""
    """Of an exception."""
    broken_off: bool = False
    """Its connection to another rank broke, so that one has failed before it."""
    kind: str = RAISED
    step: int = -1
    """The step at which it hung."""
    activity: str = ""
    """What it was doing when it hung."""
    state: str = ""
    """State of its process when it hung, a letter as in ps."""
    stacks: str = ""
    """Stacks of its threads when it hung."""

    @property
    def why(self) -> str:
        """For ended.json."""
        return f"failed: rank {self.rank}{':' if self.traceback else ''} {self.error}"

    @property
    def is_stopped(self) -> bool:
        return self.state in _STOPPED_STATES

    def text(self, log: Path) -> str:
        """The end of the job's log.

        Args:
            log: the rank's own.
        """
        who, clock = f"rank {self.rank} on {self.node}", self.time[11:19]
        if self.traceback:
            return f"{who} failed first, {clock}:\n{self.traceback.rstrip()}\n"
        if self.kind == HUNG:
            stacks = f"Stacks of its threads:\n{self.stacks.rstrip()}\n" if self.stacks else ""
            return f"{who} {self.error}, {clock}. Its log: {log}\n{stacks}"
        return f"{who} {self.error}, {clock}; it was the first to end. Its log: {log}\n"


@dataclass(frozen=True)
class RankStart:
    """A rank of one start of a job."""

    run: RunFolder
    attempt: str
    rank: int
    local: bool
    nodes: int
    world_size: int

    @classmethod
    def found(cls, run: Path) -> RankStart:
        """Of the rank that this process is, or supervises."""
        import submitit

        environment = submitit.JobEnvironment()
        return cls(
            run=RunFolder(run),
            attempt=attempt_name(environment.job_id, restart_of(environment)),
            rank=environment.global_rank,
            local=environment.cluster != "slurm",
            nodes=environment.num_nodes,
            world_size=environment.num_tasks,
        )

    @property
    def job(self) -> str:
        return self.attempt.rpartition("-")[0]

    @property
    def file(self) -> Path:
        return folder_of(self.run) / f"{self.attempt}_{self.rank}.json"

    def mark(self, kind: str) -> Path:
        """RUN/jobs/failures/123-0.kind, which all ranks share."""
        return folder_of(self.run) / f"{self.attempt}.{kind}"

    def log(self, rank: int) -> Path:
        return self.run.root / "jobs" / f"{self.job}_{rank}_log.out"

    def reports(self) -> list[RankFailure]:
        """The reports of all ranks at this start. Raises OSError."""
        with contextlib.suppress(FileNotFoundError):
            # A listing, because NFS asks the server when a folder is opened, and not for each name.
            names = os.listdir(folder_of(self.run))
            own = [name for name in names if name.startswith(f"{self.attempt}_") and name.endswith(".json")]
            return _read_reports([folder_of(self.run) / name for name in own])
        return []

    def first_failure(self) -> RankFailure | None:
        """The failure of the rank that failed first at this start. Raises OSError."""
        return first_failure(self.reports(), self.world_size)

    def write_failure(self, error: str, **facts: object) -> None:
        """Write this rank's report, unless it has one: the first one counts. If it cannot be written, log a warning.

        Args:
            facts: fields of RankFailure.
        """
        now = time.time()
        clock = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(now)) + f".{int(now * 1000) % 1000:03}"
        report = {"rank": self.rank, "node": node_name(), "time": clock, "error": error, **facts}
        try:
            if self.file.exists():
                return
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.file, json.dumps(asdict(RankFailure(**report))))  # type: ignore[arg-type]
        except OSError as reason:
            logger.warning(f"{self.file} cannot be written: {reason.strerror}")


def folder_of(run: RunFolder) -> Path:
    return run.root / "jobs" / "failures"


def _read_reports(paths: Sequence[Path]) -> list[RankFailure]:
    return [RankFailure(**found) for found in map(read_object, paths) if found]


# --- after the end of a job -------------------------------------------------------------------------------------------

_PASSING = ("CalledOff", "GivenUp", "StorageUnavailable", "DistNetworkError", "DistStoreError")
"""Exceptions, beside OSError, that another start need not raise again."""


def report_of(run: RunFolder, job: str) -> str | None:
    """The failure report of the job's latest end, as text; None if there is none."""
    text = _latest_text(run, job)
    return text.read_text(errors="replace") if text else None


def would_recur(run: RunFolder, job: str) -> bool:
    """Whether the job's latest end was an exception that another start would raise again."""
    text = _latest_text(run, job)
    reports = _read_reports(sorted(folder_of(run).glob(f"{text.stem}_*.json"))) if text else []
    first = first_failure(reports, len(reports))
    if first is None or first.kind != RAISED or first.broken_off or not first.traceback:
        return False
    name = first.error.partition(":")[0]
    built_in = getattr(builtins, name, None)
    return name not in _PASSING and not (isinstance(built_in, type) and issubclass(built_in, OSError))


def _latest_text(run: RunFolder, job: str) -> Path | None:
    return max(folder_of(run).glob(f"{job}-*.txt"), key=lambda path: path.stat().st_mtime, default=None)


# --- which rank failed first ------------------------------------------------------------------------------------------

_CONNECTION_LOST = (
    *("connection reset by peer", "connection closed by peer", "connection was likely closed", "broken pipe"),
    *("connection timed out", "no route to host", "timed out waiting", "wait timeout after"),
    *("application timeout caused pair closure", "ncclremoteerror", "remote process exited"),
    "watchdog caught collective operation timeout",
)
"""Messages of gloo, torch's store and NCCL when a peer is gone or silent. They have no exception classes."""
_OWN_FAULT = (
    *("ncclinvalid", "ncclunhandledcuda", "ncclsystemerror", "ncclinternalerror", "duplicate gpu"),
    *("unable to find address", "unable to find interface", "address already in use", "connection refused"),
)
"""Their messages for a fault of this machine or its set-up."""
_DEVICE = (
    *("uncorrectable ecc", "unspecified launch failure", "illegal memory access", "illegal instruction"),
    *("hardware stack error", "misaligned address", "launch timed out", "fallen off the bus", "mapping of buffer"),
    *("system not yet initialized", "device is busy or unavailable", "ncclunhandledcuda", "nvlink", "unknown error"),
)
"""CUDA's messages when a GPU, or the link to it, may be broken. Failed assertions on the device and exhausted memory
are faults of the program."""


def says_connection_lost(text: str) -> bool:
    """Whether this is a message of gloo, torch's store or NCCL about a peer that is gone or silent."""
    text = text.lower()
    return any(part in text for part in _CONNECTION_LOST) and not any(part in text for part in _OWN_FAULT)


def is_connection_loss(error: BaseException, *, group_formed: bool) -> bool:
    """Whether a rank failed only because another one is gone.

    Args:
        group_formed: whether the process group existed. Before that, an error is the rank's own: an interface that the
            node lacks, or a GPU that two ranks share.
    """
    return group_formed and isinstance(error, RuntimeError) and says_connection_lost(str(error))


def is_device_error(error: BaseException) -> bool:
    """Whether a rank failed because its GPU, or the link to it, may be broken."""
    text = str(error).lower()
    return isinstance(error, RuntimeError) and "cuda" in text and any(part in text for part in _DEVICE)


def first_failure(reports: Sequence[RankFailure], world_size: int) -> RankFailure | None:
    """The failure of the rank that failed first; None without reports.

    The report of a killed rank may come later than those of ranks whose connections to it broke, also before there is a
    process group. Of ranks that raised the same error, the lowest counts. Of ranks that hang, the one that the others
    wait for counts.
    """
    if not reports:
        return None
    killed = any(failure.kind == KILLED and not failure.broken_off for failure in reports)

    def order(failure: RankFailure) -> tuple[bool, str]:
        cut_off = killed and says_connection_lost(failure.error)
        return failure.broken_off or cut_off, failure.time

    first = min(reports, key=order)
    hung = [failure for failure in reports if failure.kind == HUNG]
    if hung and (first.kind == HUNG or first.broken_off or first.time > min(failure.time for failure in hung)):
        return _awaited(hung, reports, world_size)
    alike = [failure for failure in reports if failure.traceback and failure.error == first.error]
    return min(alike, key=lambda failure: failure.rank, default=first)


def _awaited(hung: Sequence[RankFailure], reports: Sequence[RankFailure], world_size: int) -> RankFailure:
    """Of ranks that hang, the one that the others wait for: one whose process is stopped; a rank without a report, if
    all others wait; otherwise the one that is farthest behind."""

    def order(failure: RankFailure) -> tuple[bool, int, bool, str]:
        return not failure.is_stopped, failure.step, failure.activity == WAITING, failure.time

    first = min(hung, key=order)
    silent = sorted(set(range(world_size)) - {failure.rank for failure in reports})
    if silent and all(failure.activity == WAITING and not failure.is_stopped for failure in hung):
        waiting = f"{len(reports)} of {world_size} ranks wait for it at step {first.step}"
        return RankFailure(
            silent[0], "", first.time, f"hung: it has left no report, and {waiting}", kind=HUNG, step=first.step
        )
    return first
