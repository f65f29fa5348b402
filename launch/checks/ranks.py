"""Findings from the reports of the probe's ranks. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import TypeVar

from cfmask.runtime.lock import DEAD_AFTER_S, HEARTBEAT_S
from launch.allocation.resolve import Allocation
from launch.checks.cluster import ADMINISTRATOR
from launch.checks.findings import Finding, not_checked, ok, problem, warning
from launch.checks.probe import BYTES, VISIBLE_WITHIN_S
from launch.checks.report import ProbeReport

T = TypeVar("T", bound=Hashable)

SKEW_S = 1.0
"""Clocks that differ by more make logs and status.py misleading."""
SLOW_FILES_S = 5.0
"""Files of other nodes that become visible later than this slow down every start."""
SLOW_IMPORT_S = 60.0
"""Importing torch and cfmask takes longer than this only from a slow file system."""
ROOM = 10 << 30
"""Free bytes that a run needs in the shared folder: a checkpoint of ViT-B/32 takes 1.1 GB, and several are kept."""
RANK_MEMORY = 4 << 30
"""Bytes of memory that a rank and its loader need."""
SLOW_NETWORK = 1e9
"""Bytes per second of an all-reduce between nodes with GPUs, below which the network limits training."""


def check_ranks(reports: Sequence[ProbeReport], world_size: int, logs: Mapping[int, str]) -> Finding:
    """Check that every rank finished.

    Args:
        logs: the last line of each rank's log.
    """
    reporting = {report.rank for report in reports}
    silent = [rank for rank in range(world_size) if rank not in reporting]
    stopped = [report for report in reports if report.stage != "done" or report.failed]
    if not silent and not stopped:
        return ok("ranks", f"{world_size} of {world_size} on {_nodes(reports)} met and finished")
    # A rank that failed by itself is the cause; the others time out waiting for it, or are killed.
    failed = [report for report in stopped if report.failed]
    own = [report for report in failed if not report.failed.startswith(("TimeoutError", "DistStore", "DistNetwork"))]
    if not own and silent:
        line = next((logs[rank] for rank in silent if logs.get(rank)), "")
        found = f"{len(silent)} of {_number(world_size, 'rank')} did not start (rank {_some(silent)})"
        return problem("ranks", f"{found}: {line}" if line else found, _remedy(line, ""))
    if first := next(iter(own or failed), None):
        found = f"rank {first.rank} on {first.node} failed, {first.stage}: {first.failed}"
        return problem("ranks", found, _remedy(first.failed, first.stage))
    last = stopped[0]
    line = logs.get(last.rank, "")
    found = f"rank {last.rank} on {last.node} ended without an error message, {last.stage}"
    return problem("ranks", f"{found}: {line}" if line else found, _remedy(line, last.stage))


_REMEDIES = {
    r"not found|No such file or directory": 'python = "…" in cluster.toml: one that every node has, with the packages '
    "of requirements.txt (default: the Python that runs this command)",
    r"ModuleNotFoundError|ImportError|cannot open shared": "install requirements.txt into the nodes' Python, or "
    'name another one: python = "…" (or setup = ["module load …"]) in cluster.toml',
    r"sees no GPU|CUDA|no NVIDIA driver": "nvidia-smi on that node; a torch that fits its driver; or --exclude it",
    r"no network interface": 'another --interface, or interface = "…" in cluster.toml',
    r"TimeoutError|reached rank 0 at none|timed out": "open TCP between the nodes, or name the interface that connects "
    f'them: --interface, or interface = "…" in cluster.toml ({ADMINISTRATOR}, 6)',
    r"[Oo]ut of memory|oom|OOM|Killed": 'more memory: --memory 0 (all of it), or memory = "0" in cluster.toml',
}
"""What to change, by a pattern of the error."""


def _remedy(error: str, stage: str) -> str:
    for pattern, change in _REMEDIES.items():
        if re.search(pattern, error):
            return change
    if stage == "all-reduce":
        return (
            'the ranks met, but cannot exchange data: interface = "…" in cluster.toml; NCCL_DEBUG = "INFO" or '
            f'NCCL_IB_DISABLE = "1" in its [environment] shows more ({ADMINISTRATOR}, 6)'
        )
    return "read the logs"


def check_software(reports: Sequence[ProbeReport]) -> list[Finding]:
    """Check that Python and packages are complete, and the same on every rank."""
    findings = []
    pythons = _by(reports, lambda report: report.python)
    if len(pythons) > 1:
        change = 'one Python for all nodes: python = "/shared/…/bin/python" in cluster.toml'
        findings.append(problem("python", f"differs between nodes: {_groups(pythons)}", change))
    else:
        where = _some(list(dict.fromkeys(report.executable for report in reports)))
        findings.append(ok("python", f"{next(iter(pythons))}, {where}"))
    names = list(dict.fromkeys(name for report in reports for name in report.packages))
    versions = {name: _by(reports, partial(_version, name)) for name in names}
    differ = [f"{name} {_groups(found)}" for name, found in versions.items() if len(found) > 1]
    missing = [name for name, found in versions.items() if list(found) == [None]]
    change = 'install requirements.txt there, or name another Python: python = "…" in cluster.toml'
    if differ:
        findings.append(problem("packages", f"differ between nodes: {'; '.join(differ)}", change))
    elif missing:
        findings.append(problem("packages", f"missing: {', '.join(missing)}", change))
    elif bad := next((report for report in reports if report.import_error), None):
        findings.append(problem("packages", f"on {bad.node}: {bad.import_error}", change))
    elif names:
        shown = ", ".join(f"{name} {version}" for name, version in list(reports[0].packages.items())[:3])
        longest = max(report.import_s or 0.0 for report in reports)
        found = f"{shown}, …, the same on every rank; imported within {_time(longest)}"
        slow = "Python on a faster file system: a container image, or a copy on the nodes' disks"
        findings.append(warning("packages", found, slow) if longest > SLOW_IMPORT_S else ok("packages", found))
    return findings


def check_cores(reports: Sequence[ProbeReport], cpus_per_task: int) -> Finding:
    """Check that each rank can use as many cores as it requested: it starts as many threads and loaders."""
    short = {}
    for node, own in _by(reports, lambda report: report.node).items():
        together = len(set().union(*(report.usable for report in own)))
        fewest = min(len(report.usable) for report in own)
        # Slurm sets no quota; a container's applies to all ranks of the node together.
        quotas = [report.quota / len(own) for report in own if report.quota is not None]
        have = min([fewest, together / len(own), *quotas])
        if have < cpus_per_task:
            short[node] = have
    if short:
        least = min(short.values())
        whole = max(1, int(least))
        found = f"{cpus_per_task} cores requested, a rank can use {least:.3g} on {_some(list(short))}"
        change = f"--cpus-per-task {whole}, or cpus_per_task = {whole} in cluster.toml; or ask for the missing cores"
        return problem("cores", found, f"{change} ({ADMINISTRATOR}, 7)")
    return ok("cores", f"{cpus_per_task} requested, and every rank can use as many")


def check_memory(reports: Sequence[ProbeReport]) -> Finding:
    """Check that a memory limit leaves each rank enough."""
    limited = {
        node: min(report.memory for report in own if report.memory) / len(own)
        for node, own in _by(reports, lambda report: report.node).items()
        if any(report.memory for report in own)
    }
    if not limited:
        return ok("memory", "the job has no limit")
    node = min(limited, key=lambda name: limited[name])
    found = f"{_size(limited[node])} per rank on {node}"
    change = 'request more: --memory 0 (all of a node\'s), or memory = "0" in cluster.toml'
    return warning("memory", found, change) if limited[node] < RANK_MEMORY else ok("memory", found)


def check_gpus(reports: Sequence[ProbeReport], gpus_per_node: int) -> list[Finding]:
    """Check that every rank has a free GPU of its own, of one kind, that supports the recipe's precision."""
    for node, own in _by(reports, lambda report: report.node).items():
        seen = {gpu["uuid"] for report in own for gpu in report.gpus}
        if len(seen) < gpus_per_node:
            found = f"{gpus_per_node} per node requested, {node} shows its ranks {len(seen)}"
            change = "nvidia-smi on that node; if it is broken, --exclude it and inform the administrator"
            return [problem("GPUs", found, change)]
        if len({report.gpu for report in own}) < len(own):
            change = "srun_args in cluster.toml: remove what binds GPUs to tasks (--gpu-bind, --gpus-per-task)"
            return [problem("GPUs", f"ranks of {node} share a GPU, while others are idle", change)]
    kinds = _by(reports, lambda report: str(_own_gpu(report)["name"]))
    if len(kinds) > 1:
        change = 'one kind: gpus_per_node = "TYPE:N" or constraint = "…" in cluster.toml; the slowest sets the pace'
        findings = [warning("GPUs", f"of different kinds: {_groups(kinds)}", change)]
    else:
        findings = [ok("GPUs", f"{gpus_per_node} per node, {_some(list(kinds))}")]
    for report in reports:
        gpu = _own_gpu(report)
        if gpu["capability"] < [8, 0]:
            change = "--precision fp32, or newer GPUs: constraint in cluster.toml"
            return [*findings, warning("bf16", f"{gpu['name']} does not support it in hardware", change)]
        if gpu["free"] < 0.9 * gpu["memory"]:
            taken = _size(gpu["memory"] - gpu["free"])
            found = f"{taken} of rank {report.rank}'s on {report.node} is in use by another process"
            change = "nvidia-smi on that node; --exclude it, and inform the administrator"
            return [*findings, warning("GPU memory", found, change)]
    return findings


def _own_gpu(report: ProbeReport) -> dict:
    return next(gpu for gpu in report.gpus if gpu["uuid"] == report.gpu)


def check_shared(reports: Sequence[ProbeReport], folder: str, one_node: str = "") -> list[Finding]:
    """Check that every node can write the shared folder, that it has space, and that nodes soon see each other's files.

    Args:
        one_node: advice if only one node was probed.
    """
    bad = [report for report in reports if report.shared_error]
    if bad:
        found = f"{_nodes(bad)} cannot write to {folder}: {bad[0].shared_error}"
        change = "check permissions and quota there; or use another folder for runs: --run DIR, --shared DIR here"
        return [problem("shared folder", found, change)]
    kinds = _some(list(_by(reports, lambda report: report.file_system)))
    nodes = {report.node for report in reports}
    findings = [ok("shared folder", f"{_number(len(nodes), 'node')} can write to {folder} ({kinds})")]
    free = min((report.free for report in reports if report.free is not None), default=None)
    if free is not None:
        found = f"{_size(free)} free"
        change = f"make room, or use another folder for runs: {_size(ROOM)} or more"
        findings.append(warning("room", found, change) if free < ROOM else ok("room", found))
    times = [time for report in reports for time in (report.appears, report.replaced) if time is not None]
    if len(nodes) > 1 and times:
        worst = max(times)
        change = "mount options of that file system: acregmax, acdirmax, lookupcache=positive (NFS)"
        found = f"a node sees what another has renamed or replaced after {_time(worst)}"
        if math.isinf(worst):
            found = f"a node did not see another's new file within {VISIBLE_WITHIN_S:.0f} s"
            findings.append(problem("files of others", found, change))
        else:
            slow = worst > SLOW_FILES_S
            findings.append(warning("files of others", found, change) if slow else ok("files of others", found))
    elif len(nodes) == 1:
        findings.append(not_checked("files of others", "only one node was probed", one_node))
    return findings


def check_paths(reports: Sequence[ProbeReport], needed: Sequence[str]) -> list[Finding]:
    """Check that every node can read the shards."""
    bad = [report for report in reports if report.missing]
    if bad:
        found = f"{_nodes(bad)} cannot read {', '.join(bad[0].missing)}"
        change = "shards in cluster.toml: a path that every node (and the container) has"
        return [problem("shards", found, change)]
    return [ok("shards", f"every node can read {', '.join(needed)}")] if needed else []


def check_cache(reports: Sequence[ProbeReport]) -> Finding:
    """Check the node's local disk, where remote shards are cached."""
    bad = next((report for report in reports if report.cache_error), None)
    if bad:
        change = f"CFMASK_CACHE in cluster.toml's [environment] ({ADMINISTRATOR}, 5); only remote shards need it"
        return warning("node's disk", f"on {bad.node}: {bad.cache_error}", change)
    frees = {report.node: report.cache_free for report in reports if report.cache_free is not None}
    if not frees:
        return not_checked("node's disk")
    node = min(frees, key=lambda name: frees[name])
    return ok("node's disk", f"{_size(frees[node])} free for {reports[0].cache} on {node}")


def check_clocks(reports: Sequence[ProbeReport], one_node: str = "") -> Finding:
    """Compare the nodes' clocks with rank 0's, as measured between them."""
    if len({report.node for report in reports}) < 2:
        return not_checked("clocks", "only one node was probed", one_node)
    bounds = {report.node: report.offset for report in reports if report.offset and report.rank}
    return judge_offsets("clocks", bounds, f"{reports[0].node}'s")


def check_file_clock(reports: Sequence[ProbeReport], here: Sequence[float]) -> Finding:
    """Compare the shared file system's clock with those of the nodes and of this machine.

    Args:
        here: the bounds of (file system's clock - this machine's), or nothing.
    """
    bounds = {report.node: report.clock for report in reports if report.clock}
    if here:
        bounds["this machine"] = list(here)
    return judge_offsets("file times", bounds, "the file system's", sign=-1)


def judge_offsets(check: str, bounds: Mapping[str, Sequence[float]], whose: str, sign: int = 1) -> Finding:
    """The finding on clock offsets.

    Args:
        bounds: the bounds of each offset, in seconds.
        whose: the clock that they are compared with.
        sign: -1 if the offsets are of that clock against the others.
    """
    if not bounds:
        return not_checked(check)
    least = {name: max(low, -high, 0.0) for name, (low, high) in bounds.items()}
    name = max(least, key=lambda each: (least[each], max(map(abs, bounds[each]))))
    low, high = bounds[name]
    middle, width = (low + high) / 2, (high - low) / 2
    shown = f"{name} is {_time(abs(middle))} ± {_time(width)} {'ahead of' if middle * sign >= 0 else 'behind'} {whose}"
    change = "NTP or chrony on that machine (timedatectl; ask the administrator)"
    if least[name] >= DEAD_AFTER_S - HEARTBEAT_S:
        return problem(check, f"{shown}: a live run may look dead from there, and be taken over", change)
    if least[name] >= SKEW_S:
        return warning(check, f"{shown}: times in logs and in status.py are misleading", change)
    if width > SKEW_S:
        return not_checked(check, f"{shown}: the answers were too slow for a better measurement")
    return ok(check, shown + (f", the farthest of {len(bounds)}" if len(bounds) > 1 else ""))


def check_network(reports: Sequence[ProbeReport], world_size: int, gpus: bool) -> list[Finding]:
    """Check how ranks met, and the bandwidth of an all-reduce between them."""
    met = [report for report in reports if report.met_s is not None]
    nodes = {report.node for report in reports}
    if len(met) < world_size:
        findings = [problem("process group", f"{len(met)} of {_number(world_size, 'rank')} met", "see ranks")]
    else:
        links = [" on ".join(filter(None, report.link)) for report in met if report.link and report.rank]
        via = f", rank 0 at {_some(list(dict.fromkeys(links)))}" if links else ""
        longest = max(report.met_s or 0.0 for report in met)
        findings = [ok("process group", f"{_number(world_size, 'rank')} met within {_time(longest)}{via}")]
    done = [report for report in reports if report.right is not None]
    if len(done) < world_size:
        return [*findings, not_checked("all-reduce")]
    backend = done[0].backend
    if wrong := [report for report in done if not report.right]:
        found = f"{backend} gave a wrong sum to {_number(len(wrong), 'rank')} ({_nodes(wrong)})"
        change = "a broken GPU, link or driver: try other nodes (--exclude), and inform the administrator"
        return [*findings, problem("all-reduce", found, change)]
    if world_size == 1:
        return [*findings, ok("all-reduce", f"{backend}, with one rank: right, and nothing was sent")]
    taken = max(report.seconds or 0.0 for report in done)
    # What each rank sends and receives, as nccl-tests counts it: 2 (n - 1) / n of the bytes.
    rate = 2 * (world_size - 1) / world_size * BYTES / taken if taken else math.inf
    transport = f"; {done[0].transport}" if done[0].transport else ""
    found = f"{backend}, {BYTES >> 20} MB: right, {_time(taken)}, {rate / 1e9:.3g} GB/s (bus){transport}"
    sockets = backend == "nccl" and len(nodes) > 1 and "network Socket" in done[0].transport
    if sockets and done[0].infiniband:
        change = (
            f"the nodes have {', '.join(done[0].infiniband)}, and NCCL does not use it: look for NCCL_IB_DISABLE or "
            "NCCL_NET in the environment, and for libibverbs in the container"
        )
        return [*findings, warning("all-reduce", found, change)]
    if gpus and len(nodes) > 1 and rate < SLOW_NETWORK:
        change = 'a faster network: interface = "…" in cluster.toml; NCCL_DEBUG = "INFO" in its [environment]'
        return [*findings, warning("all-reduce", f"{found}: the network limits training", f"{change} shows more")]
    return [*findings, ok("all-reduce", found)]


def check_reports(
    reports: Sequence[ProbeReport], allocation: Allocation, folder: str, needed: Sequence[str], here: Sequence[float]
) -> list[Finding]:
    """All findings from the reports except ``check_ranks``, also of ranks that failed.

    Args:
        folder: the shared folder.
        needed: paths that every rank needs.
        here: as in ``check_file_clock``.
    """
    inspected = [report for report in reports if report.stage != ProbeReport.stage]
    if not inspected:
        return [not_checked("all other checks", "no rank inspected its node")]
    one_node = "--nodes 2" if allocation.on_slurm else ""
    findings = [*check_software(inspected), check_cores(inspected, allocation.cpus_per_task), check_memory(inspected)]
    if allocation.gpus_per_node and all(report.gpu for report in inspected):
        findings += check_gpus(inspected, allocation.gpus_per_node)
    elif allocation.gpus_per_node:
        findings.append(not_checked("GPUs"))
    return [
        *findings,
        *check_shared(inspected, folder, one_node),
        *check_paths(inspected, needed),
        check_cache(inspected),
        check_clocks(inspected, one_node),
        check_file_clock(inspected, here),
        *check_network(inspected, allocation.world_size, allocation.gpus_per_node > 0),
    ]


def _version(package: str, report: ProbeReport) -> str | None:
    return report.packages.get(package)


# --- formatting -------------------------------------------------------------------------------------------------------


def _by(reports: Sequence[ProbeReport], key: Callable[[ProbeReport], T]) -> dict[T, list[ProbeReport]]:
    groups: dict[T, list[ProbeReport]] = {}
    for report in reports:
        groups.setdefault(key(report), []).append(report)
    return groups


def _nodes(reports: Sequence[ProbeReport]) -> str:
    return _some(list(dict.fromkeys(report.node for report in reports)))


def _groups(groups: Mapping[T, Sequence[ProbeReport]]) -> str:
    return ", ".join(f"{value} on {_nodes(own)}" for value, own in groups.items())


def _some(items: Sequence[object]) -> str:
    shown = ", ".join(map(str, items[:4]))
    return f"{shown} and {len(items) - 4} more" if len(items) > 4 else shown


def _number(count: int, what: str) -> str:
    return f"{count} {what}{'s' if count != 1 else ''}"


def _size(count: float) -> str:
    return f"{count / 1e9:.3g} GB"


def _time(value: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value * 1e6:.0f} µs"
