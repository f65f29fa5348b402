"""What doctor.py runs on every rank, started as training is: it looks around, meets the others, and reports.

The folder of a probe, on the file system that runs are to lie on:

    .doctor-20261124-100000-4711/
      code/ jobs/                  as in a run folder (snapshot.py, submitit)
      report-0.json report-1.json  a rank each, written again at every stage: one that hangs or dies leaves its last one
      seen/                        files that one node makes and the others wait for
      requeue.json                 rank 0 has asked Slurm to requeue the job
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfmask.data.remote import cache_folder
from cfmask.files import write_atomically
from cfmask.runtime.machine import node_name
from launch.ranks.health import free_bytes, write_and_look
from launch.restarts.policy import REQUEUE_ME
from launch.slurm.client import SlurmError
from launch.slurm.control import requeue
from launch.state.attempt import attempt_name, restart_of

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

    from cfmask.distributed import DistributedContext

PACKAGES = ("torch", "torchvision", "open_clip_torch", "webdataset", "submitit", "numpy", "safetensors", "simplejpeg")
PATIENCE_MIN = 1.5
"""How long ranks wait for each other here. The probe's time limit is longer than this, twice."""
SEEN_WITHIN_S = 30.0
"""How long a node waits for a file of another's."""
BYTES = 64 << 20
"""Size of the all-reduce whose bandwidth is measured."""

_PINGS = 16
_ROUNDS = 5
_FIRST, _SECOND = "first", "second"  # what a file that another node makes says, before it is replaced and after


@dataclass
class ProbeReport:
    """What a rank has found. None, or nothing: it did not come so far.

    stage: how far it came. failed: why no further. usable: ids of the cores that it may run on; quota: cores' worth of
    time that its control group gets; memory: bytes that its node gives this job, None without a limit. gpus: those it
    sees; gpu: its own one's uuid. free, clock: of the shared folder, bytes and the bounds of (file system's clock - the
    node's), in seconds. missing: of the needed paths, those that it cannot read. offset: the bounds of (the node's
    clock - rank 0's node's). appears, replaced: seconds until a file that another node has renamed into place, or
    replaced, was seen; inf: not at all. link: address and interface by which rank 0 was reached. right, seconds: of an
    all-reduce of BYTES.
    """

    rank: int
    local_rank: int
    node: str
    host: str
    stage: str = "looking around"
    failed: str = ""
    python: str = ""
    executable: str = ""
    packages: dict[str, str | None] = field(default_factory=dict)
    import_error: str = ""
    import_s: float | None = None
    usable: list[int] = field(default_factory=list)
    quota: float | None = None
    memory: int | None = None
    gpus: list[dict[str, Any]] = field(default_factory=list)
    gpu: str = ""
    shared_error: str = ""
    file_system: str = ""
    free: int | None = None
    clock: list[float] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    cache: str = ""
    cache_free: int | None = None
    cache_error: str = ""
    offset: list[float] = field(default_factory=list)
    appears: float | None = None
    replaced: float | None = None
    met_s: float | None = None
    link: list[str] = field(default_factory=list)
    backend: str = ""
    right: bool | None = None
    seconds: float | None = None
    transport: str = ""
    infiniband: list[str] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        write_atomically(folder / f"report-{self.rank}.json", json.dumps(asdict(self)))


def read_reports(folder: Path) -> list[ProbeReport]:
    """Those that are there, by rank."""
    known = {each.name for each in fields(ProbeReport)}
    found = []
    for path in folder.glob("report-*.json"):
        content = json.loads(path.read_text())
        found.append(ProbeReport(**{name: value for name, value in content.items() if name in known}))
    return sorted(found, key=lambda report: report.rank)


@dataclass(frozen=True)
class Probe:
    """The callable that is pickled. folder: the probe's; needed: paths that have to be there on every node."""

    folder: Path
    gpus_per_node: int
    needed: tuple[str, ...] = ()

    def __call__(self) -> str:
        import submitit

        # Its time limit is short, so the notice before it comes early; and to be cancelled is to end.
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        asked = self.folder / "requeue.json"
        if asked.exists():  # it is back: nothing more is wanted of it
            return "requeued"
        if not self.gpus_per_node:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        for name in ("CFMASK_RENDEZVOUS_TIMEOUT", "CFMASK_COLLECTIVE_TIMEOUT"):  # read when distributed.py is imported
            os.environ[name] = str(PATIENCE_MIN)
        environment = submitit.JobEnvironment()
        report = ProbeReport(
            rank=environment.global_rank,
            local_rank=environment.local_rank,
            node=node_name(),
            host=socket.gethostname(),
        )
        report.write(self.folder)
        try:
            self._examine(report, environment)
        except BaseException as error:
            report.failed = f"{type(error).__name__}: {' '.join(str(error).split())}"
            report.write(self.folder)
            raise
        if environment.cluster == "slurm" and report.rank == 0:
            self._requeue(environment.job_id)
        return "done"

    def _examine(self, report: ProbeReport, environment: Any) -> None:
        def begin(stage: str) -> None:
            report.stage = stage
            report.write(self.folder)

        look_around(report, self.folder, self.needed)
        begin("importing torch and cfmask")
        started = time.monotonic()
        try:
            import cfmask.training.train  # noqa: F401  what training imports, all of it
        except Exception as error:
            report.import_error = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise
        report.import_s = time.monotonic() - started
        from cfmask.distributed import DistributedContext, process_group

        context = DistributedContext(
            rank=environment.global_rank,
            world_size=environment.num_tasks,
            local_rank=environment.local_rank,
            nodes=environment.num_nodes,
            attempt=attempt_name(environment.job_id, restart_of(environment)),
            cpus=max(1, len(report.usable)),
            gpu=self.gpus_per_node > 0,
        )
        if context.gpu:
            begin("finding the GPUs")
            _look_at_gpus(report, context)
        nccl_log = _let_nccl_tell(self.folder, report.rank) if context.gpu else None
        begin("meeting the other ranks")
        started = time.monotonic()
        with process_group(context, self.folder / "meeting") as store:
            report.met_s = time.monotonic() - started
            report.link = _link(store)
            leaders = _leaders(store, context, report.node)
            begin("comparing clocks")
            report.offset = _compare_clocks(store, context, leaders)
            begin("waiting for another node's files")
            _watch_files(report, store, context, leaders, self.folder / "seen")
            begin("all-reduce")
            _all_reduce(report, context)
            report.transport = nccl_transport(nccl_log.read_text()) if nccl_log and nccl_log.exists() else ""
            begin("done")
            _all_there(store, context, "reported")

    def _requeue(self, job_id: str) -> None:
        """As a run does it (launch/restarts/policy.py): scontrol, else the batch script."""
        words: dict[str, Any] = {"scontrol": shutil.which("scontrol"), "code": None, "said": ""}
        asked = self.folder / "requeue.json"
        write_atomically(asked, json.dumps(words))  # before: it may be the last thing that this process does
        if words["scontrol"]:
            try:
                requeue(job_id)
                words["code"] = 0
            except SlurmError as error:
                words |= {"code": 1, "said": str(error)}
            write_atomically(asked, json.dumps(words))
            if words["code"] == 0:
                return
        sys.exit(REQUEUE_ME)


# --- this rank alone ------------------------------------------------------------------------------------------------


def look_around(report: ProbeReport, folder: Path, needed: Sequence[str]) -> None:
    """All that can be seen without the other ranks, and without torch."""
    report.python, report.executable = platform.python_version(), sys.executable
    report.packages = {name: _version(name) for name in PACKAGES}
    report.usable = sorted(os.sched_getaffinity(0))
    report.quota, report.memory = control_group_limits(Path("/proc/self/cgroup").read_text(), _read_control)
    report.missing = [path for path in needed if not os.access(path, os.R_OK)]
    report.infiniband = sorted(path.name for path in Path("/sys/class/infiniband").glob("*"))
    report.shared_error, report.clock = write_and_look(folder, f".rank-{report.rank}")
    report.free = free_bytes(folder)
    report.file_system = file_system_of(folder.resolve(), Path("/proc/mounts").read_text())
    report.cache = str(cache_folder())
    there = next(path for path in (Path(report.cache), *Path(report.cache).absolute().parents) if path.exists())
    report.cache_free = free_bytes(there)
    report.cache_error = "" if os.access(there, os.W_OK) else f"{there} is not writable"


def control_group_limits(listed: str, read: Callable[[str, str, str], str | None]) -> tuple[float | None, int | None]:
    """Cores' worth of time and bytes of memory that this process's control group gets, by all limits above it.

    Args:
        listed: /proc/self/cgroup. read: a file of a group: its controller ("" in version 2), its path, the file's name.
    """
    quotas, memories = [math.inf], [math.inf]
    for line in listed.splitlines():
        _, controllers, path = line.split(":", 2)
        parts = [part for part in path.split("/") if part]
        for depth in range(len(parts) + 1):
            group = "/".join(parts[:depth])
            if not controllers:
                if (words := (read("", group, "cpu.max") or "max").split())[0] != "max":
                    quotas.append(int(words[0]) / int(words[1]))
                if (limit := (read("", group, "memory.max") or "max").strip()) != "max":
                    memories.append(int(limit))
            if "cpu" in controllers.split(","):
                quota, period = (read("cpu", group, f"cpu.cfs_{which}_us") for which in ("quota", "period"))
                if quota and period and int(quota) > 0:
                    quotas.append(int(quota) / int(period))
            if "memory" in controllers.split(","):
                limit = read("memory", group, "memory.limit_in_bytes") or ""
                if limit.strip() and int(limit) < 1 << 60:  # without a limit, it is the largest number there is
                    memories.append(int(limit))
    quota_, memory = min(quotas), min(memories)
    return (None if math.isinf(quota_) else quota_), (None if math.isinf(memory) else int(memory))


def _read_control(controller: str, group: str, name: str) -> str | None:
    try:
        return (Path("/sys/fs/cgroup") / controller / group / name).read_text()
    except OSError:
        return None


def file_system_of(path: Path, mounts: str) -> str:
    """Its type, by the longest mount point of /proc/mounts that holds it."""
    best = ("", "")
    for line in mounts.splitlines():
        _, point, kind, *_ = line.split()
        point = re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), point)
        if path.is_relative_to(point) and len(point) >= len(best[0]):
            best = (point, kind)
    return best[1]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _look_at_gpus(report: ProbeReport, context: DistributedContext) -> None:
    import torch

    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        report.gpus.append(
            {
                "name": properties.name,
                "uuid": str(getattr(properties, "uuid", f"{report.node} {number}")),
                "memory": properties.total_memory,
                "capability": list(torch.cuda.get_device_capability(number)),
            }
        )
    own = context.device.index
    report.gpu = report.gpus[own]["uuid"]
    report.gpus[own]["free"] = torch.cuda.mem_get_info(own)[0]  # of its own one: others start a context of theirs now


# --- with the other ranks -------------------------------------------------------------------------------------------


def _all_there(store: dist.Store, context: DistributedContext, word: str) -> None:
    """A barrier, without the network that is yet to be tried."""
    store.set(f"{word} {context.rank}", "")
    store.wait([f"{word} {rank}" for rank in range(context.world_size)])


def _leaders(store: dist.Store, context: DistributedContext, node: str) -> list[int]:
    """The first rank of each node; rank 0 is one."""
    store.set(f"node {context.rank}", node)
    nodes = [store.get(f"node {rank}").decode() for rank in range(context.world_size)]
    return sorted({name: rank for rank, name in reversed(list(enumerate(nodes)))}.values())


def _link(store: Any) -> list[str]:
    """The address under which rank 0 was reached, and the interface here that leads there."""
    from cfmask import distributed

    address = str(getattr(store, "host", ""))
    try:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as asking:
            asking.connect((address, 9))  # sends nothing: the kernel looks up the way
            own = asking.getsockname()[0]
    except OSError:
        return [address, ""]
    return [address, next((name for name, each in distributed.interface_addresses() if each == own), "")]


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
    """What (our clock - theirs) can be, in seconds, by rounds of (ours before, theirs meanwhile, ours after).

    Whatever the ways to them and back took, theirs was read between the two; so each round gives bounds, and the offset
    is within all of them, unless a clock was set meanwhile: then the bounds that come out are of the jump.
    """
    low, high = -math.inf, math.inf
    for before, theirs, after in rounds:
        low, high = max(low, before - theirs), min(high, after - theirs)
    return min(low, high), max(low, high)


def _watch_files(
    report: ProbeReport, store: dist.Store, context: DistributedContext, leaders: Sequence[int], folder: Path
) -> None:
    """Rank 0's node makes a file and replaces it, the others look when they see it; then the other way round."""
    if len(leaders) > 1 and context.rank in leaders:
        folder.mkdir(exist_ok=True)
        others = leaders[1:]
        common = folder / "of-rank-0"
        if context.rank == 0:
            store.wait([f"looked {rank}" for rank in others])
            for step, content in enumerate((_FIRST, _SECOND)):
                write_atomically(common, content)
                store.set(f"made {step}", "")
                store.wait([f"saw {step} {rank}" for rank in others])
            store.wait([f"made {rank}" for rank in others])
            report.appears = max(_seen_after(folder / f"of-rank-{rank}", _FIRST) for rank in others)
        else:
            common.exists()  # that it is not there may be kept in mind, and be what is found for a while
            store.set(f"looked {context.rank}", "")
            times = []
            for step, content in enumerate((_FIRST, _SECOND)):
                store.wait([f"made {step}"])
                times.append(_seen_after(common, content))
                store.set(f"saw {step} {context.rank}", "")
            report.appears, report.replaced = times
            write_atomically(folder / f"of-rank-{context.rank}", _FIRST)
            store.set(f"made {context.rank}", "")
    _all_there(store, context, "watched")


def _seen_after(path: Path, content: str) -> float:
    """Seconds until the file says so; inf if it does not within SEEN_WITHIN_S."""
    started = time.monotonic()
    while True:
        try:
            if path.read_text() == content:
                return time.monotonic() - started
        except OSError:
            pass
        if time.monotonic() - started > SEEN_WITHIN_S:
            return math.inf
        time.sleep(0.01)


def _all_reduce(report: ProbeReport, context: DistributedContext) -> None:
    """One of BYTES whose sum is known: right in every element, and how long it takes."""
    import torch
    import torch.distributed as dist

    report.backend = dist.get_backend()
    # Small whole numbers: their sum has no rounding, in whatever order it is taken.
    pattern = torch.arange(BYTES // 4, device=context.device, dtype=torch.float32).remainder_(251)
    values = pattern * (context.rank + 1)
    dist.all_reduce(values)
    report.right = bool(torch.equal(values, pattern * (context.world_size * (context.world_size + 1) // 2)))
    report.seconds = min(_timed(values, context.device) for _ in range(_ROUNDS))


def _timed(values: torch.Tensor, device: torch.device) -> float:
    import torch
    import torch.distributed as dist

    def settle() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    values.zero_()
    dist.barrier()
    settle()
    started = time.monotonic()
    dist.all_reduce(values)
    settle()
    return time.monotonic() - started


def _let_nccl_tell(folder: Path, rank: int) -> Path:
    """Let NCCL write down what it uses; where to."""
    path = folder / f"nccl-{rank}.txt"
    os.environ.update(NCCL_DEBUG="INFO", NCCL_DEBUG_SUBSYS="INIT,NET", NCCL_DEBUG_FILE=str(path))
    return path


def nccl_transport(log: str) -> str:
    """What NCCL says it uses: its network, devices and interfaces, and the ways of its channels."""

    def all_of(pattern: str) -> Iterator[str]:
        return (match.strip() for match in dict.fromkeys(re.findall(pattern, log)))

    parts = [
        *(f"network {name}" for name in all_of(r"Using network (.+)")),
        *(re.sub(r"\[\d+\]", "", using) for using in all_of(r"NET/\w+ ?: Using (.+)")),
    ]
    ways = sorted(set(re.sub(r"/\d+", "", way) for way in all_of(r" via ([A-Z0-9]+(?:/[\w()-]+)*)")))
    return "; ".join([*parts, *([f"channels via {', '.join(ways)}"] if ways else [])])
