"""Failure reports: what a rank that fails leaves for the others, and which rank was the first.

RUN/jobs/failures/
  123-0_1.json   rank 1's, of the first start of job 123: what it raised, which signal killed it, or how it hung
  123-0.txt      that of the rank that failed first, as the log ends with it
  123-0.restart  the job is started again: its node was lost, or a rank has died and may be tried again
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

from cfmask.files import write_atomically
from cfmask.runs import RunFolder
from cfmask.runtime.heartbeat import WAITING
from cfmask.runtime.jsonl import read_object
from cfmask.runtime.machine import node_name
from launch.state.attempt import attempt_name, restart_of

logger = logging.getLogger(__name__)

RAISED, KILLED, HUNG, DEVICE, UNHEALTHY = "raised", "killed", "hung", "device", "unhealthy"
"""Kinds of failures: an exception; a signal, or an end without a word; no progress; an error of the GPU; a node that
has failed its check (health.py)."""
DEATHS = (KILLED, HUNG, DEVICE, UNHEALTHY)
"""Those that another start, or another node, may not meet again."""


@dataclass(frozen=True)
class RankFailure:
    """What a rank that failed has left.

    time: ISO 8601, to the millisecond. error: one line. traceback: of an exception. broken_off: it failed of a
    connection to another rank that broke, so another has failed before it. Of one that hung: the step that it was at,
    what it was doing, the state of its process (a letter, as in ps), and the stacks of its threads.
    """

    rank: int
    node: str
    time: str
    error: str
    traceback: str = ""
    broken_off: bool = False
    kind: str = RAISED
    step: int = -1
    activity: str = ""
    state: str = ""
    stacks: str = ""

    @property
    def why(self) -> str:
        """For ended.json."""
        return f"failed: rank {self.rank}{':' if self.traceback else ''} {self.error}"

    def text(self, log: Path) -> str:
        """As the job's log ends with them. log: the rank's own."""
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

    @classmethod
    def of_local(cls, run: RunFolder, job: str, rank: int, world_size: int, start: int = 0) -> RankStart:
        """For the controller of a local job, which is in no rank's environment. start: counted from 0."""
        return cls(run, attempt_name(job, start), rank, local=True, nodes=1, world_size=world_size)

    @property
    def job(self) -> str:
        return self.attempt.rpartition("-")[0]

    @property
    def file(self) -> Path:
        return folder_of(self.run) / f"{self.attempt}_{self.rank}.json"

    def mark(self, kind: str) -> Path:
        """RUN/jobs/failures/123-0.kind, of all ranks."""
        return folder_of(self.run) / f"{self.attempt}.{kind}"

    def log(self, rank: int) -> Path:
        return self.run.root / "jobs" / f"{self.job}_{rank}_log.out"

    def reports(self) -> list[RankFailure]:
        """All that were left at this start, by any rank. Raises OSError."""
        with contextlib.suppress(FileNotFoundError):
            # Listed, not looked up: NFS asks the server when a folder is opened.
            names = os.listdir(folder_of(self.run))
            mine = [n for n in names if n.startswith(f"{self.attempt}_") and n.endswith(".json")]
            read = [read_object(folder_of(self.run) / name) for name in mine]
            return [RankFailure(**found) for found in read if found]
        return []

    def write_failure(self, error: str, **facts: object) -> None:
        """Only the first report of a rank counts. One that cannot be written is a warning.

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


def report_of(run: RunFolder, job: str) -> str | None:
    """The failure report of the rank that failed first when the job ended last, as text; None if there is none."""
    texts = sorted(folder_of(run).glob(f"{job}-*.txt"), key=lambda path: path.stat().st_mtime)
    return texts[-1].read_text(errors="replace") if texts else None


_PASSING = ("CalledOff", "GivenUp", "StorageUnavailable", "DistNetworkError", "DistStoreError")
"""Exceptions, beside OSError, that say nothing of the next start."""


def would_recur(run: RunFolder, job: str) -> bool:
    """Whether the job ended last because a rank raised an exception, which another start would raise again; unlike a
    death, or an error of a device, it is not restarted after one."""
    texts = sorted(folder_of(run).glob(f"{job}-*.txt"), key=lambda path: path.stat().st_mtime)
    found = [read_object(path) for path in folder_of(run).glob(f"{texts[-1].stem}_*.json")] if texts else []
    left = [RankFailure(**failure) for failure in found if failure]
    first = first_failure(left, len(left))
    if first is None or first.kind != RAISED or first.broken_off or not first.traceback:
        return False
    kind = first.error.partition(":")[0]
    passing = getattr(builtins, kind, None)
    return kind not in _PASSING and not (isinstance(passing, type) and issubclass(passing, OSError))


# --- which was the first ----------------------------------------------------------------------------------------------

_CONNECTION_LOST = (
    *("connection reset by peer", "connection closed by peer", "connection was likely closed", "broken pipe"),
    *("connection timed out", "no route to host", "timed out waiting", "wait timeout after"),
    *("application timeout caused pair closure", "ncclremoteerror", "remote process exited"),
    "watchdog caught collective operation timeout",
)
"""What gloo, torch's store and NCCL say when a peer is gone or silent; their errors have no classes of their own."""
_OWN_FAULT = (
    *("ncclinvalid", "ncclunhandledcuda", "ncclsystemerror", "ncclinternalerror", "duplicate gpu"),
    *("unable to find address", "unable to find interface", "address already in use", "connection refused"),
)
"""What they say when it is this machine, or how it is set up."""
_DEVICE = (
    *("uncorrectable ecc", "unspecified launch failure", "illegal memory access", "illegal instruction"),
    *("hardware stack error", "misaligned address", "launch timed out", "fallen off the bus", "mapping of buffer"),
    *("system not yet initialized", "device is busy or unavailable", "ncclunhandledcuda", "nvlink", "unknown error"),
)
"""What CUDA says of a GPU, or of the link to it, that may be broken. An assertion on the device, and memory that does
not suffice, are the program's."""


def says_connection_lost(text: str) -> bool:
    """Whether this is what gloo, torch's store or NCCL say when a peer is gone or silent."""
    text = text.lower()
    return any(part in text for part in _CONNECTION_LOST) and not any(part in text for part in _OWN_FAULT)


def is_connection_loss(error: BaseException, *, group_formed: bool) -> bool:
    """Whether a rank failed only because another one is gone. What goes wrong while ranks come together is a failure of
    its own: an interface that a node does not have, or a GPU that two ranks share, would be so again.

    Args:
        group_formed: the process group had been made.
    """
    return group_formed and isinstance(error, RuntimeError) and says_connection_lost(str(error))


def is_device_error(error: BaseException) -> bool:
    """Whether a rank failed because its GPU, or the link to it, may be broken."""
    text = str(error).lower()
    return isinstance(error, RuntimeError) and "cuda" in text and any(part in text for part in _DEVICE)


def first_failure(left: Sequence[RankFailure], world_size: int) -> RankFailure | None:
    """Which rank failed first; None if none has left a report.

    A rank that was killed is heard of later than the connections that break with it, also before there is a process
    group. What several ranks raise alike, because they know the same, the lowest of them says. Of ranks that make no
    progress, the one that the others wait for.
    """
    if not left:
        return None
    killed = any(failure.kind == KILLED and not failure.broken_off for failure in left)

    def order(failure: RankFailure) -> tuple[bool, str]:
        cut_off = killed and says_connection_lost(failure.error)
        return failure.broken_off or cut_off, failure.time

    first = min(left, key=order)
    hung = [failure for failure in left if failure.kind == HUNG]
    if hung and (first.kind == HUNG or first.broken_off or first.time > min(failure.time for failure in hung)):
        return _awaited(hung, left, world_size)
    alike = [failure for failure in left if failure.traceback and failure.error == first.error]
    return min(alike, key=lambda failure: failure.rank, default=first)


def _awaited(hung: Sequence[RankFailure], left: Sequence[RankFailure], world_size: int) -> RankFailure:
    """Of ranks that make no progress, the one that the others wait for: a process that is stopped; a rank that has left
    no report, if all others wait; else the one that is farthest behind."""

    def order(failure: RankFailure) -> tuple[bool, int, bool, str]:
        return failure.state not in tuple("TDZ"), failure.step, failure.activity == WAITING, failure.time

    first = min(hung, key=order)
    silent = sorted(set(range(world_size)) - {failure.rank for failure in left})
    if silent and all(failure.activity == WAITING and failure.state not in tuple("TDZ") for failure in hung):
        error = f"hung: it has left no report, and {len(left)} of {world_size} ranks wait for it at step {first.step}"
        return RankFailure(silent[0], "", first.time, error, kind=HUNG, step=first.step)
    return first
