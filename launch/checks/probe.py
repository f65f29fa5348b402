"""The probe: doctor.py runs it on every rank, started like training. It inspects the node, forms a process group with
the other ranks, and reports.

The folder of a probe, on the file system that runs are to lie on:

    .doctor-20261124-100000-4711/
      code/ jobs/                  as in a run folder (snapshot.py, submitit)
      report-0.json report-1.json  one per rank, rewritten at every stage: a rank that hangs or dies leaves its last one
      visible/                     files that one node creates and the others wait for
      requeue.json                 written when rank 0 asks Slurm to requeue the job
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfmask.runtime.files import write_atomically
from cfmask.runtime.machine import node_name
from launch.checks.node import enable_nccl_log, inspect_gpus, inspect_node, nccl_transport
from launch.checks.report import ProbeReport
from launch.restarts.policy import REQUEUE_ME
from launch.slurm.client import SlurmError
from launch.slurm.control import requeue
from launch.state.attempt import attempt_name, restart_of

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

    from cfmask.runtime.distributed import DistributedContext

PATIENCE_MIN = 1.5
"""How long ranks wait for each other. The probe's time limit is more than twice as long."""
VISIBLE_WITHIN_S = 30.0
"""How long a node waits for a file of another node."""
BYTES = 64 << 20
"""Size of the all-reduce whose bandwidth is measured."""

_PINGS = 16
_ROUNDS = 5


@dataclass(frozen=True)
class Probe:
    """The callable that submitit pickles and runs on every rank."""

    folder: Path
    gpus_per_node: int
    needed: tuple[str, ...] = ()
    """Paths that have to be readable on every node."""

    def __call__(self) -> str:
        import submitit

        # The time limit is short, so Slurm's warning signal comes early; a cancelled probe has nothing to save.
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if (self.folder / "requeue.json").exists():
            return "requeued"  # all checks were done before
        if not self.gpus_per_node:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        for name in ("CFMASK_RENDEZVOUS_TIMEOUT", "CFMASK_COLLECTIVE_TIMEOUT"):  # read at import
            os.environ[name] = str(PATIENCE_MIN)
        job = submitit.JobEnvironment()
        report = ProbeReport(job.global_rank, node_name())
        report.write(self.folder)
        try:
            self._examine(report, job)
        except BaseException as error:
            report.failed = _one_line(error)
            report.write(self.folder)
            raise
        if job.cluster == "slurm" and report.rank == 0:
            self._requeue(job.job_id)
        return "done"

    def _examine(self, report: ProbeReport, job: Any) -> None:
        folder = self.folder
        inspect_node(report, folder, self.needed)
        report.begin("importing torch and cfmask", folder)
        started = time.monotonic()
        try:
            import cfmask.training.train  # noqa: F401  everything that training imports
        except Exception as error:
            report.import_error = _one_line(error)
            raise
        report.import_s = time.monotonic() - started
        from cfmask.runtime.distributed import DistributedContext, process_group

        context = DistributedContext(
            rank=job.global_rank,
            world_size=job.num_tasks,
            local_rank=job.local_rank,
            nodes=job.num_nodes,
            attempt=attempt_name(job.job_id, restart_of(job)),
            cpus=max(1, len(report.usable)),
            gpu=self.gpus_per_node > 0,
        )
        nccl_log = folder / f"nccl-{report.rank}.txt"
        if context.gpu:
            report.begin("finding the GPUs", folder)
            inspect_gpus(report, context)
            enable_nccl_log(nccl_log)
        report.begin("waiting for the other ranks", folder)
        started = time.monotonic()
        with process_group(context, folder / "rendezvous") as store:
            report.met_s = time.monotonic() - started
            # process_group sets the variable to the interface that reached rank 0, if it is no loopback.
            report.link = [str(getattr(store, "host", "")), os.environ.get("GLOO_SOCKET_IFNAME", "")]
            leaders = _leaders(store, context, report.node)
            report.begin("comparing clocks", folder)
            report.offset = _compare_clocks(store, context, leaders)
            report.begin("waiting for another node's files", folder)
            _exchange_files(report, store, context, leaders, folder / "visible")
            report.begin("all-reduce", folder)
            _all_reduce(report, context)
            report.transport = nccl_transport(nccl_log.read_text()) if nccl_log.exists() else ""
            report.begin("done", folder)
            _barrier(store, context.rank, range(context.world_size), "reported")

    def _requeue(self, job_id: str) -> None:
        """Requeue the job as a run does (launch/restarts/policy.py): with scontrol, else through the batch script."""
        asked: dict[str, Any] = {"scontrol": shutil.which("scontrol"), "code": None, "said": ""}
        path = self.folder / "requeue.json"
        write_atomically(path, json.dumps(asked))  # first: a successful requeue may end this process
        if asked["scontrol"]:
            try:
                requeue(job_id)
                asked["code"] = 0
            except SlurmError as error:
                asked |= {"code": 1, "said": str(error)}
            write_atomically(path, json.dumps(asked))
            if asked["code"] == 0:
                return
        sys.exit(REQUEUE_ME)


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _barrier(store: dist.Store, rank: int, ranks: Sequence[int], name: str) -> None:
    """A barrier of these ranks through the store, independent of the backend that is yet to be tested."""
    store.set(f"{name} {rank}", "")
    store.wait([f"{name} {each}" for each in ranks])


def _leaders(store: dist.Store, context: DistributedContext, node: str) -> list[int]:
    """The first rank of each node; rank 0 is one of them."""
    store.set(f"node {context.rank}", node)
    nodes = [store.get(f"node {rank}").decode() for rank in range(context.world_size)]
    return sorted({name: rank for rank, name in reversed(list(enumerate(nodes)))}.values())


def _compare_clocks(store: dist.Store, context: DistributedContext, leaders: Sequence[int]) -> list[float]:
    """The bounds of (this node's clock - rank 0's node's), in seconds."""
    if context.rank == 0:
        for leader in leaders[1:]:
            for i in range(_PINGS):
                store.wait([f"ping {leader} {i}"])
                store.set(f"pong {leader} {i}", repr(time.time()))
        return [0.0, 0.0]
    if context.rank not in leaders:
        return []
    rounds = []
    for i in range(_PINGS):
        before = time.time()
        store.set(f"ping {context.rank} {i}", "")
        theirs = float(store.get(f"pong {context.rank} {i}"))
        rounds.append((before, theirs, time.time()))
    return list(offset_bounds(rounds))


def offset_bounds(rounds: Iterable[tuple[float, float, float]]) -> tuple[float, float]:
    """The bounds of (our clock - theirs), in seconds.

    Their clock is read between our two readings, so each round gives bounds, and the offset lies within all of them.
    If a clock was set between rounds, no offset does: then the result spans the jump.

    Args:
        rounds: (our time before, their time, our time after).
    """
    low, high = -math.inf, math.inf
    for before, theirs, after in rounds:
        low, high = max(low, before - theirs), min(high, after - theirs)
    return min(low, high), max(low, high)


def _exchange_files(
    report: ProbeReport, store: dist.Store, context: DistributedContext, leaders: Sequence[int], folder: Path
) -> None:
    """Each node creates a file and then replaces it, and measures when it sees the files of the others."""
    if len(leaders) > 1 and context.rank in leaders:
        folder.mkdir(exist_ok=True)
        others = [folder / str(rank) for rank in leaders if rank != context.rank]
        for path in others:
            path.exists()  # a network file system may cache that the file does not exist
        times = []
        for content in ("first", "second"):
            _barrier(store, context.rank, leaders, f"before {content}")
            write_atomically(folder / str(context.rank), content)
            _barrier(store, context.rank, leaders, f"after {content}")
            times.append(max(_visible_after(path, content) for path in others))
        report.appears, report.replaced = times
    _barrier(store, context.rank, range(context.world_size), "exchanged")


def _visible_after(path: Path, content: str) -> float:
    """Seconds until the file has this content; inf after VISIBLE_WITHIN_S."""
    started = time.monotonic()
    while True:
        try:
            if path.read_text() == content:
                return time.monotonic() - started
        except OSError:
            pass
        if time.monotonic() - started > VISIBLE_WITHIN_S:
            return math.inf
        time.sleep(0.01)


def _all_reduce(report: ProbeReport, context: DistributedContext) -> None:
    """Check every element of an all-reduce of BYTES, and measure its time."""
    import torch
    import torch.distributed as dist

    report.backend = dist.get_backend()
    # Small integers: their sum is exact in any order.
    pattern = torch.arange(BYTES // 4, device=context.device, dtype=torch.float32).remainder_(251)
    values = pattern * (context.rank + 1)
    dist.all_reduce(values)
    report.right = bool(torch.equal(values, pattern * (context.world_size * (context.world_size + 1) // 2)))
    report.seconds = min(_timed(values, context.device) for _ in range(_ROUNDS))


def _timed(values: torch.Tensor, device: torch.device) -> float:
    import torch
    import torch.distributed as dist

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    values.zero_()
    dist.barrier()
    synchronize()
    started = time.monotonic()
    dist.all_reduce(values)
    synchronize()
    return time.monotonic() - started
