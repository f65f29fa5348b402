"""What doctor.py makes of what the ranks report. Nothing here asks anybody anything."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import TypeVar

from cfmask.runtime.lock import DEAD_AFTER_S, HEARTBEAT_S
from launch.allocation.resolve import Allocation
from launch.checks.cluster import ADMINISTRATOR
from launch.checks.findings import NOT_CHECKED, OK, PROBLEM, WARNING, Finding
from launch.checks.probe import BYTES, SEEN_WITHIN_S, ProbeReport

T = TypeVar("T", bound=Hashable)

SKEW_S = 1.0
"""Clocks that are farther apart make logs and status.py hard to read."""
SLOW_FILES_S = 5.0
"""Files that another node sees later than this slow down every start."""
SLOW_IMPORT_S = 60.0
"""A start that takes longer than this to import torch and cfmask.training.train reads them from a slow file system."""
ROOM = 10 << 30
"""Free bytes that a run wants on the shared folder: a checkpoint of ViT-B/32 has 1.1 GB, and several are kept."""
RANK_MEMORY = 4 << 30
"""Bytes of memory that a rank needs for itself and its loader."""
SLOW_NETWORK = 1e9
"""Bytes a second of an all-reduce between nodes with GPUs, below which training waits for it."""


def check_ranks(reports: Sequence[ProbeReport], world_size: int, logs: Mapping[int, str]) -> Finding:
    """That every rank came to the end.

    Args:
        logs: of ranks that did not, the last words.
    """
    there = {report.rank: report for report in reports}
    silent = [rank for rank in range(world_size) if rank not in there]
    stopped = [report for report in reports if report.stage != "done" or report.failed]
    if not silent and not stopped:
        nodes = list(dict.fromkeys(report.node for report in reports))
        return Finding("ranks", OK, f"{world_size} of {world_size} on {_some(nodes)} met and came to the end")
    # Whoever has a reason of its own is the cause; the others wait in vain, and are killed or give up.
    failed = [report for report in stopped if report.failed]
    own = [report for report in failed if not report.failed.startswith(("TimeoutError", "DistStore", "DistNetwork"))]
    if not own and silent:
        words = next((logs[rank] for rank in silent if logs.get(rank)), "")
        found = f"{len(silent)} of {_number(world_size, 'rank')} did not start (rank {_some(silent)})"
        return Finding("ranks", PROBLEM, f"{found}: {words}" if words else found, _remedy(words, ""))
    if first := next(iter(own or failed), None):
        found = f"rank {first.rank} on {first.node} failed, {first.stage}: {first.failed}"
        return Finding("ranks", PROBLEM, found, _remedy(first.failed, first.stage))
    last = stopped[0]
    words = logs.get(last.rank, "")
    found = f"rank {last.rank} on {last.node} ended without a word, {last.stage}" + (f": {words}" if words else "")
    return Finding("ranks", PROBLEM, found, _remedy(words, last.stage))


def _remedy(words: str, stage: str) -> str:
    """What to change, by what was said or how far it came."""
    by_words = {
        r"not found|No such file or directory": 'python = "…" in cluster.toml: one that every node has, with what '
        "requirements.txt lists (by default it is the one that runs this command)",
        r"ModuleNotFoundError|ImportError|cannot open shared": "install requirements.txt into the nodes' Python, or "
        'name another one: python = "…" (or setup = ["module load …"]) in cluster.toml',
        r"sees no GPU|CUDA|no NVIDIA driver": "nvidia-smi on that node; a torch that fits its driver; or --exclude it",
        r"no network interface": 'another --interface, or interface = "…" in cluster.toml',
        r"TimeoutError|reached rank 0 at none|timed out": "open TCP between the nodes, or name the interface on which "
        f'they see each other: --interface, or interface = "…" in cluster.toml ({ADMINISTRATOR}, 6)',
        r"[Oo]ut of memory|oom|OOM|Killed": 'more memory: --memory 0 (all of it), or memory = "0" in cluster.toml',
    }
    for pattern, change in by_words.items():
        if re.search(pattern, words):
            return change
    if stage == "all-reduce":
        return (
            'the ranks met, their network carries no data: interface = "…" in cluster.toml; NCCL_DEBUG = "INFO" or '
            f'NCCL_IB_DISABLE = "1" in its [environment] tells more ({ADMINISTRATOR}, 6)'
        )
    return "the logs say more"


def check_software(reports: Sequence[ProbeReport]) -> list[Finding]:
    """The same Python and packages everywhere, and none missing."""
    findings = []
    pythons = _by(reports, lambda report: report.python)
    where = _some(list(dict.fromkeys(report.executable for report in reports)))
    if len(pythons) > 1:
        change = 'one Python for all nodes: python = "/shared/…/bin/python" in cluster.toml'
        findings.append(Finding("python", PROBLEM, f"not the same everywhere: {_groups(pythons)}", change))
    else:
        findings.append(Finding("python", OK, f"{next(iter(pythons))}, {where}"))
    names = list(dict.fromkeys(name for report in reports for name in report.packages))
    differ = {}
    for name in names:
        versions = _by(reports, partial(_version, name))
        if len(versions) > 1:
            differ[name] = versions
    missing = [name for name in names if all(report.packages.get(name) is None for report in reports)]
    change = 'install requirements.txt there, or name another Python: python = "…" in cluster.toml'
    if differ:
        found = "; ".join(f"{name} {_groups(versions)}" for name, versions in differ.items())
        findings.append(Finding("packages", PROBLEM, f"not the same everywhere: {found}", change))
    elif missing:
        findings.append(Finding("packages", PROBLEM, f"not there: {', '.join(missing)}", change))
    elif bad := next((report for report in reports if report.import_error), None):
        findings.append(Finding("packages", PROBLEM, f"on {bad.node}: {bad.import_error}", change))
    elif reports[0].packages:
        shown = ", ".join(f"{name} {version}" for name, version in list(reports[0].packages.items())[:3])
        longest = max(report.import_s or 0.0 for report in reports)
        found = f"{shown}, …, the same on every rank; imported within {_time(longest)}"
        slow = longest > SLOW_IMPORT_S
        change = "Python on a faster file system: a container image, or a copy on the nodes' disks" if slow else ""
        findings.append(Finding("packages", WARNING if slow else OK, found, change))
    return findings


def check_cores(reports: Sequence[ProbeReport], cpus_per_task: int) -> Finding:
    """That each rank can really use as many cores as it is given: its threads and loaders are as many."""
    short = {}
    for node, own in _by(reports, lambda report: report.node).items():
        together = len(set().union(*(report.usable for report in own)))
        fewest = min(len(report.usable) for report in own)
        # Slurm sets no quota of time; where there is one, it is a container's, and all ranks of the node are in there.
        quotas = [report.quota / len(own) for report in own if report.quota is not None]
        have = min([fewest, together / len(own), *quotas])
        if have < cpus_per_task:
            short[node] = have
    if short:
        least = min(short.values())
        found = f"{cpus_per_task} cores asked for, a rank can use {least:.3g} on {_some(list(short))}"
        whole = max(1, int(least))
        change = (
            f"--cpus-per-task {whole}, or cpus_per_task = {whole} in cluster.toml; or ask why there are no more "
            f"({ADMINISTRATOR}, 7)"
        )
        return Finding("cores", PROBLEM, found, change)
    return Finding("cores", OK, f"{cpus_per_task} asked for, and every rank can use as many")


def check_memory(reports: Sequence[ProbeReport]) -> Finding:
    """That a node's ranks have memory enough, where the job has a limit."""
    limited = {
        node: min(report.memory for report in own if report.memory) / len(own)
        for node, own in _by(reports, lambda report: report.node).items()
        if any(report.memory for report in own)
    }
    if not limited:
        return Finding("memory", OK, "the job has no limit")
    node = min(limited, key=lambda name: limited[name])
    found = f"{_size(limited[node])} a rank on {node}"
    if limited[node] < RANK_MEMORY:
        return Finding(
            "memory", WARNING, found, 'more of it: --memory 0 (all of a node\'s), or memory = "0" in cluster.toml'
        )
    return Finding("memory", OK, found)


def check_gpus(reports: Sequence[ProbeReport], gpus_per_node: int) -> list[Finding]:
    """That every rank has a GPU of its own, all are of a kind, free, and can do what the recipe asks of them."""
    if not gpus_per_node:
        return []
    for node, own in _by(reports, lambda report: report.node).items():
        seen = {gpu["uuid"] for report in own for gpu in report.gpus}
        if len(seen) < gpus_per_node:
            found = f"{gpus_per_node} asked for on a node, {node} shows its ranks {len(seen)}"
            change = "nvidia-smi on that node; if it is broken, --exclude it and tell the administrator"
            return [Finding("GPUs", PROBLEM, found, change)]
        if len({report.gpu for report in own}) < len(own):
            found = f"ranks of {node} share a GPU, while others are idle"
            change = "srun_args in cluster.toml: what binds GPUs to tasks (--gpu-bind, --gpus-per-task) has to go"
            return [Finding("GPUs", PROBLEM, found, change)]
    kinds = _by(reports, lambda report: next(gpu["name"] for gpu in report.gpus if gpu["uuid"] == report.gpu))
    findings = [Finding("GPUs", OK, f"{gpus_per_node} a node, {_some([str(kind) for kind in kinds])}")]
    if len(kinds) > 1:
        change = 'one kind: gpus_per_node = "TYPE:N" or constraint = "…" in cluster.toml; the slowest sets the pace'
        findings[0] = Finding("GPUs", WARNING, f"not of a kind: {_groups(kinds)}", change)
    for report in reports:
        gpu = next(each for each in report.gpus if each["uuid"] == report.gpu)
        if gpu["capability"] < [8, 0]:
            change = "--precision fp32, or newer GPUs: constraint in cluster.toml"
            return [*findings, Finding("bf16", WARNING, f"{gpu['name']} cannot do it in hardware", change)]
        if gpu["free"] < 0.9 * gpu["memory"]:
            taken = _size(gpu["memory"] - gpu["free"])
            found = f"{taken} of rank {report.rank}'s on {report.node} is taken: somebody else computes on it"
            change = "nvidia-smi on that node; --exclude it, and tell the administrator"
            return [*findings, Finding("GPU memory", WARNING, found, change)]
    return findings


def check_shared(reports: Sequence[ProbeReport], folder: str, one_node: str = "") -> list[Finding]:
    """That it can be written from every node, that there is room, and that nodes see each other's files soon."""
    bad = [report for report in reports if report.shared_error]
    if bad:
        found = f"{_nodes(bad)} cannot write to {folder}: {bad[0].shared_error}"
        change = "rights or quota there; or another place for runs: --run DIR, --shared DIR here"
        return [Finding("shared folder", PROBLEM, found, change)]
    findings: list[Finding] = []
    kinds = [str(kind) for kind in _by(reports, lambda report: report.file_system)]
    nodes = {report.node for report in reports}
    findings.append(
        Finding("shared folder", OK, f"{folder} ({_some(kinds)}) is written to from {_number(len(nodes), 'node')}")
    )
    free = min((report.free for report in reports if report.free is not None), default=None)
    if free is not None:
        short = free < ROOM
        change = f"make room, or another place for runs: {_size(ROOM)} or more" if short else ""
        findings.append(Finding("room", WARNING if short else OK, f"{_size(free)} free", change))
    times = [report.appears for report in reports if report.appears is not None]
    times += [report.replaced for report in reports if report.replaced is not None]
    if len(nodes) > 1 and times:
        worst = max(times)
        change = "mount options of that file system: acregmax, acdirmax, lookupcache=positive (NFS)"
        if math.isinf(worst):
            found = f"a node did not see another's new file within {SEEN_WITHIN_S:.0f} s"
            findings.append(Finding("files of others", PROBLEM, found, change))
        else:
            found = f"a node sees what another has renamed or replaced after {_time(worst)}"
            slow = worst > SLOW_FILES_S
            findings.append(Finding("files of others", WARNING if slow else OK, found, change if slow else ""))
    elif len(nodes) == 1:
        findings.append(Finding("files of others", NOT_CHECKED, "there was one node only", one_node))
    return findings


def check_paths(reports: Sequence[ProbeReport], needed: Sequence[str]) -> list[Finding]:
    """That the shards are there."""
    if not needed:
        return []
    bad = [report for report in reports if report.missing]
    if bad:
        found = f"{_nodes(bad)} cannot read {', '.join(bad[0].missing)}"
        return [
            Finding("shards", PROBLEM, found, "shards in cluster.toml: a path that every node (and the container) has")
        ]
    return [Finding("shards", OK, f"{', '.join(needed)} can be read on every node")]


def check_cache(reports: Sequence[ProbeReport]) -> Finding:
    """The node's own disk, for shards that come by URL."""
    bad = next((report for report in reports if report.cache_error), None)
    change = f"CFMASK_CACHE in cluster.toml's [environment] ({ADMINISTRATOR}, 5); it matters for shards by URL only"
    if bad:
        return Finding("node's disk", WARNING, f"on {bad.node}: {bad.cache_error}", change)
    frees = {report.node: report.cache_free for report in reports if report.cache_free is not None}
    if not frees:
        return Finding("node's disk", NOT_CHECKED, "no node told")
    node = min(frees, key=lambda name: frees[name])
    return Finding("node's disk", OK, f"{_size(frees[node])} free for {reports[0].cache} on {node}")


def check_clocks(reports: Sequence[ProbeReport], one_node: str = "") -> Finding:
    """Clocks of nodes against rank 0's, as measured between them."""
    if len({report.node for report in reports}) < 2:
        return Finding("clocks", NOT_CHECKED, "there was one node only", one_node)
    bounds = {report.node: report.offset for report in reports if report.offset and report.rank}
    if not bounds:
        return _unknown("clocks")
    return judge_offsets("clocks", bounds, f"{reports[0].node}'s")


def check_file_clock(reports: Sequence[ProbeReport], here: Sequence[float]) -> Finding:
    """The shared file system's clock against those of the nodes, and of this machine.

    Args:
        here: the bounds of (file system's clock - this machine's), or nothing.
    """
    bounds = {report.node: report.clock for report in reports if report.clock}
    if here:
        bounds["this machine"] = list(here)
    if not bounds:
        return _unknown("file times")
    return judge_offsets("file times", bounds, "the file system's", sign=-1)


def judge_offsets(check: str, bounds: Mapping[str, Sequence[float]], whose: str, sign: int = 1) -> Finding:
    """By the bounds in which each offset certainly lies, in seconds."""
    least = {name: max(low, -high, 0.0) for name, (low, high) in bounds.items()}
    name = max(least, key=lambda each: (least[each], max(map(abs, bounds[each]))))
    low, high = bounds[name]
    middle, width = (low + high) / 2, (high - low) / 2
    ahead = "ahead of" if middle * sign >= 0 else "behind"
    shown = f"{name} is {_time(abs(middle))} ± {_time(width)} {ahead} {whose}"
    change = "NTP or chrony on that machine (timedatectl; ask the administrator)"
    if least[name] >= DEAD_AFTER_S - HEARTBEAT_S:
        return Finding(check, PROBLEM, f"{shown}: a run that lives may look dead from there, and be taken over", change)
    if least[name] >= SKEW_S:
        return Finding(check, WARNING, f"{shown}: times in logs and in status.py mislead", change)
    if width > SKEW_S:
        return Finding(check, NOT_CHECKED, f"{shown}: too slow an answer to say more")
    return Finding(check, OK, shown + (f", the farthest of {len(bounds)}" if len(bounds) > 1 else ""))


def check_network(reports: Sequence[ProbeReport], world_size: int, gpus: bool) -> list[Finding]:
    """How ranks met, and what an all-reduce between them is worth."""
    findings = []
    met = [report for report in reports if report.met_s is not None]
    nodes = list(dict.fromkeys(report.node for report in reports))
    if len(met) == world_size:
        links = list(
            dict.fromkeys(" on ".join(filter(None, report.link)) for report in met if report.link and report.rank)
        )
        via = f", rank 0 at {_some(links)}" if links else ""
        longest = max(report.met_s or 0.0 for report in met)
        findings.append(Finding("process group", OK, f"{_number(world_size, 'rank')} met within {_time(longest)}{via}"))
    else:
        findings.append(
            Finding(
                "process group",
                PROBLEM if met or reports else NOT_CHECKED,
                f"{len(met)} of {world_size} ranks met",
                "see ranks",
            )
        )
    done = [report for report in reports if report.right is not None]
    if len(done) < world_size:
        findings.append(Finding("all-reduce", NOT_CHECKED, "the ranks did not come so far"))
        return findings
    backend = done[0].backend
    if wrong := [report for report in done if not report.right]:
        found = f"{backend} gave a wrong sum to {_number(len(wrong), 'rank')} ({_nodes(wrong)})"
        change = "a broken GPU, link or driver: try other nodes (--exclude), and tell the administrator"
        findings.append(Finding("all-reduce", PROBLEM, found, change))
        return findings
    if world_size == 1:
        findings.append(Finding("all-reduce", OK, f"{backend}, with one rank: right, and nothing was sent"))
        return findings
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
        findings.append(Finding("all-reduce", WARNING, found, change))
    elif gpus and len(nodes) > 1 and rate < SLOW_NETWORK:
        change = (
            'a faster network: interface = "…" in cluster.toml; NCCL_DEBUG = "INFO" in its [environment] tells more'
        )
        findings.append(Finding("all-reduce", WARNING, f"{found}: training waits for it", change))
    else:
        findings.append(Finding("all-reduce", OK, found))
    return findings


def check_reports(
    reports: Sequence[ProbeReport], allocation: Allocation, folder: str, needed: Sequence[str], here: Sequence[float]
) -> list[Finding]:
    """All that reports of ranks tell, whatever they came to; `check_ranks` is beside this."""
    looked = [report for report in reports if report.stage != "looking around"]
    if not looked:
        found = "software, cores, memory, GPUs, folders, clocks, network: no rank came so far"
        return [Finding("the rest", NOT_CHECKED, found)]
    one_node = "--nodes 2" if allocation.on_slurm else ""
    findings = [
        *check_software(looked),
        check_cores(looked, allocation.cpus_per_task),
        check_memory(looked),
    ]
    with_gpus = [report for report in looked if report.gpu]
    if allocation.gpus_per_node and len(with_gpus) == len(looked):
        findings += check_gpus(with_gpus, allocation.gpus_per_node)
    elif allocation.gpus_per_node:
        findings.append(_unknown("GPUs"))
    findings += [
        *check_shared(looked, folder, one_node),
        *check_paths(looked, needed),
        check_cache(looked),
        check_clocks(looked, one_node),
        check_file_clock(looked, here),
        *check_network(looked, allocation.world_size, allocation.gpus_per_node > 0),
    ]
    return findings


def _version(package: str, report: ProbeReport) -> str | None:
    return report.packages.get(package)


# --- words ---


def _unknown(check: str) -> Finding:
    return Finding(check, NOT_CHECKED, "the probe did not come so far")


def _by(reports: Sequence[ProbeReport], key: Callable[[ProbeReport], T]) -> dict[T, list[ProbeReport]]:
    groups: dict[T, list[ProbeReport]] = {}
    for report in reports:
        groups.setdefault(key(report), []).append(report)
    return groups


def _nodes(reports: Sequence[ProbeReport]) -> str:
    return _some(list(dict.fromkeys(report.node for report in reports)))


def _groups(groups: Mapping[T, Sequence[ProbeReport]]) -> str:
    return ", ".join(f"{value} on {_nodes(own)}" for value, own in groups.items())


def _some(words: Sequence[object]) -> str:
    shown = ", ".join(map(str, words[:4]))
    return f"{shown} and {len(words) - 4} more" if len(words) > 4 else shown


def _number(count: int, what: str) -> str:
    return f"{count} {what}{'s' if count != 1 else ''}"


def _size(count: float) -> str:
    return f"{count / 1e9:.3g} GB"


def _time(value: float) -> str:
    """In the unit that fits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value * 1e6:.0f} µs"
