"""doctor.py: its findings from texts of several Slurm versions, from reports of ranks, and on a real Slurm."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch import doctor
from launch.allocation.nodes import chosen_partitions
from launch.allocation.resolve import Allocation
from launch.checks import cluster as _slurm_checks
from launch.checks import login_node
from launch.checks import node as _node
from launch.checks import ranks as _rank_checks
from launch.checks.findings import NOT_CHECKED, OK, PROBLEM, WARNING, Finding
from launch.checks.probe import BYTES, offset_bounds
from launch.checks.probe_job import _last_lines
from launch.checks.report import ProbeReport
from launch.slurm.texts import (
    SlurmNode,
    default_qos,
    gpus_of,
    parse_config,
    parse_nodes,
    parse_qos,
    parse_records,
    seconds,
)
from slurm_fixture import Cluster

REPO = Path(__file__).resolve().parents[1]

# --- Slurm's texts, as three versions write them ------------------------------------------------------------------

CONFIG_22_05 = """\
Configuration data as of 2026-11-24T13:18:32
AccountingStorageType   = accounting_storage/slurmdbd
ClusterName             = cfmask
JobRequeue              = 1
KillWait                = 5 sec
PreemptMode             = REQUEUE
PreemptType             = preempt/partition_prio
PreemptExemptTime       = 00:00:00
SlurmctldParameters     = preempt_send_user_signal
SLURM_VERSION           = 22.05.8

Slurmctld(primary) at localhost is UP
"""
CONFIG_23_11 = """\
Configuration data as of 2026-11-24T13:18:32
AccountingStorageType   = accounting_storage/none
JobRequeue              = 0
KillWait                = 30 sec
PreemptMode             = CANCEL
PreemptParameters       = (null)
PreemptType             = preempt/qos
SlurmctldParameters     = enable_configless,idle_on_node_suspend
SLURM_VERSION           = 23.11.4
Cgroup Support Configuration:
ConstrainCores          = yes
"""
CONFIG_24_05 = """\
Configuration data as of 2026-11-24T13:18:32
AccountingStorageType   = (null)
JobRequeue              = 1
PreemptMode             = GANG,SUSPEND
PreemptParameters       = youngest_first,send_user_signal
PreemptType             = preempt/partition_prio
SlurmctldParameters     = (null)
SLURM_VERSION           = 24.05.3
"""
PARTITIONS_22_05 = """\
PartitionName=low
   AllowGroups=ALL AllowAccounts=ALL AllowQos=ALL
   AllocNodes=ALL Default=YES QoS=N/A
   DefaultTime=NONE DisableRootJobs=NO ExclusiveUser=NO GraceTime=120 Hidden=NO
   MaxNodes=UNLIMITED MaxTime=1-00:00:00 MinNodes=0 LLN=NO MaxCPUsPerNode=UNLIMITED
   Nodes=n[1-2]
   PriorityJobFactor=1 PriorityTier=1 RootOnly=NO ReqResv=NO OverSubscribe=NO
   OverTimeLimit=NONE PreemptMode=REQUEUE
   State=UP TotalCPUs=8 TotalNodes=2 SelectTypeParameters=NONE
   JobDefaults=(null)
   TRES=cpu=8,mem=128G,node=2,billing=8

PartitionName=high
   Default=NO QoS=N/A GraceTime=0 Hidden=NO
   MaxTime=UNLIMITED Nodes=n[1-2] PriorityTier=10 PreemptMode=OFF
   State=UP TotalCPUs=8 TotalNodes=2

PartitionName=elsewhere
   Default=NO QoS=N/A GraceTime=0 MaxTime=UNLIMITED Nodes=m1 PriorityTier=20 PreemptMode=OFF
   State=DRAIN TotalCPUs=4 TotalNodes=1
"""
PARTITIONS_24_05 = (
    "PartitionName=scavenge AllowGroups=ALL AllocNodes=ALL Default=YES QoS=N/A DefaultTime=00:30:00 "
    "DisableRootJobs=NO ExclusiveUser=NO ExclusiveTopo=NO GraceTime=0 Hidden=NO MaxNodes=UNLIMITED MaxTime=04:00:00 "
    "MinNodes=0 LLN=NO MaxCPUsPerNode=UNLIMITED MaxCPUsPerSocket=UNLIMITED Nodes=g[001-128] PriorityTier=1 "
    "PreemptMode=GANG,SUSPEND State=UP TotalCPUs=12288 TotalNodes=128\n"
    "PartitionName=owners Default=NO GraceTime=0 MaxTime=7-00:00:00 Nodes=g[001-128] PriorityTier=5 "
    "PreemptMode=GANG,SUSPEND State=UP TotalCPUs=12288 TotalNodes=128\n"
)
NODES = """\
low|n1|idle|4|(null)|65536
low|n2|mixed|4|(null)|65536
high|n1|idle|4|(null)|65536
high|n2|mixed|4|(null)|65536
elsewhere|m1|drained|4|(null)|65536
"""
QOS = """\
normal||cluster|00:00:00
scavenge||requeue|00:02:00
urgent|normal,scavenge|cluster|00:00:00
"""


def preemption(config: str, partitions: str, nodes: str = "", qos: str = "", own_qos: str | None = None, **own: str):
    """Findings by check, for a job in the default partition; own: fields of that partition."""
    records = parse_records(partitions, "PartitionName")
    chosen = [dict(record) | own for record in chosen_partitions(records, None)]
    findings = _slurm_checks.check_preemption(
        parse_config(config),
        chosen,
        records,
        parse_nodes(nodes),
        parse_qos(qos),
        own_qos,
    )
    return {finding.check: finding for finding in findings}


def test_partition_with_requeue_warning_and_grace_is_ok():
    found = preemption(CONFIG_22_05, PARTITIONS_22_05, NODES)
    assert {name: each.state for name, each in found.items()} == {"preemption": OK, "warning signal": OK, "grace": OK}
    assert "is preempted by high, PreemptMode=REQUEUE" in found["preemption"].found  # and not to one on other nodes
    assert "120 s" in found["grace"].found


def test_without_nodes_any_partition_with_a_higher_tier_may_preempt():
    assert "high, elsewhere" in preemption(CONFIG_22_05, PARTITIONS_22_05)["preemption"].found


@pytest.mark.parametrize(
    ("grace", "state", "said"),
    [
        ("0", WARNING, "KILL 5 sec later"),
        ("30", WARNING, "30 s between"),
        ("00:01:00", OK, "60 s"),
        ("?", NOT_CHECKED, "?"),
    ],
)
def test_grace_has_to_be_enough_for_a_checkpoint(grace, state, said):
    found = preemption(CONFIG_22_05, PARTITIONS_22_05, NODES, GraceTime=grace)["grace"]
    assert found.state == state and said in found.found
    assert state != WARNING or "PartitionName=low … GraceTime=120 (slurm/administrator.md, 3)" in found.change


@pytest.mark.parametrize(
    ("mode", "state", "said"),
    [
        ("CANCEL", PROBLEM, "until it is resumed by hand"),
        ("GANG,SUSPEND", WARNING, "it is suspended"),
        ("OFF", OK, "not preempted: PreemptMode=OFF"),
        ("GANG", OK, "not preempted"),
    ],
)
def test_consequences_of_preemption(mode, state, said):
    found = preemption(CONFIG_22_05, PARTITIONS_22_05, NODES, PreemptMode=mode)["preemption"]
    assert found.state == state and said in found.found
    assert state == OK or "PartitionName=low … PreemptMode=REQUEUE (slurm/administrator.md, 1)" in found.change


def test_suspension_by_gang_scheduling_in_24_05():
    found = preemption(CONFIG_24_05, PARTITIONS_24_05)
    assert found["preemption"].state == WARNING and "owners" in found["preemption"].found
    assert "--collective-timeout" in found["preemption"].change


def test_partition_with_the_highest_tier_is_not_preempted():
    records = [r for r in parse_records(PARTITIONS_22_05, "PartitionName") if r["PartitionName"] != "elsewhere"]
    high = [r for r in records if r["PartitionName"] == "high"]
    config = parse_config(CONFIG_22_05)
    [found] = _slurm_checks.check_preemption(config, [high[0] | {"PreemptMode": "REQUEUE"}], records, [], [], None)
    assert found.state == OK and "nothing has a higher priority" in found.found


@pytest.mark.parametrize("kind", ["preempt/none", "(null)", None])
def test_a_cluster_without_preemption(kind):
    lines = [line for line in CONFIG_22_05.splitlines() if not line.startswith("PreemptType")]
    lines += [f"PreemptType             = {kind}"] if kind else []
    found = preemption("\n".join(lines), PARTITIONS_22_05)
    assert list(found) == ["preemption"] and found["preemption"].state == OK


def test_with_preempt_qos_the_quality_of_service_decides():
    cancelled = preemption(CONFIG_23_11, PARTITIONS_22_05, NODES, QOS, "normal")
    assert cancelled["preemption"].state == PROBLEM, "its mode is the cluster's, CANCEL"
    assert "is preempted by urgent" in cancelled["preemption"].found
    assert "sacctmgr modify qos normal set PreemptMode=REQUEUE" in cancelled["preemption"].change
    assert (
        cancelled["grace"].state == WARNING
        and "sacctmgr modify qos normal set GraceTime=120" in cancelled["grace"].change
    )

    requeued = preemption(CONFIG_23_11, PARTITIONS_22_05, NODES, QOS, "scavenge")
    assert requeued["preemption"].state == OK and requeued["grace"].state == OK
    assert preemption(CONFIG_23_11, PARTITIONS_22_05, NODES, QOS, "urgent")["preemption"].state == OK
    unknown = preemption(CONFIG_23_11, PARTITIONS_22_05, NODES, "", None)["preemption"]
    assert unknown.state == NOT_CHECKED and "--qos" in unknown.change


def user_signal(version: str, **config: str) -> Finding:
    return _slurm_checks.check_user_signal({"SLURM_VERSION": version, **config})


def test_the_warning_signal_has_two_names():
    old, new = {"SlurmctldParameters": "a,preempt_send_user_signal"}, {"PreemptParameters": "send_user_signal,b"}
    assert user_signal("22.05.8", **old).state == OK
    assert user_signal("24.05.3", **old).state == OK, "later versions know the old name, too"
    assert user_signal("24.05.3", **new).state == OK
    unknown = user_signal("22.05.8", **new)
    assert unknown.state == WARNING and "uses another name" in unknown.found
    assert unknown.change.startswith("SlurmctldParameters=preempt_send_user_signal in slurm.conf")
    for version, line in (
        ("22.05.8", "SlurmctldParameters=preempt_send_user_signal"),
        ("23.11.4", "PreemptParameters=send"),
    ):
        missing = user_signal(version)
        assert missing.state == WARNING and missing.change.startswith(line) and "administrator.md, 2" in missing.change


def test_preemptions_count_against_the_requeue_limit_since_24_05():
    def limit(version: str, value: str) -> list:
        return _slurm_checks.check_requeue_limit({"SLURM_VERSION": version, "MaxBatchRequeue": value})

    assert limit("22.05.8", "5") == limit("23.11.4", "5") == []
    [held] = limit("24.05.0", "5")
    assert held.state == WARNING and "preempted 5 times is held" in held.found and "administrator.md, 8" in held.change
    assert [each.state for each in limit("24.11.5", "1000000")] == [OK]


def test_settings_of_requeue_and_accounting():
    config = parse_config
    assert _slurm_checks.check_requeue_setting(config(CONFIG_22_05)).state == OK
    overridden = _slurm_checks.check_requeue_setting(config(CONFIG_23_11))
    assert overridden.state == OK and "submit.py gives --requeue" in overridden.found
    states = [_slurm_checks.check_accounting(config(c)).state for c in (CONFIG_22_05, CONFIG_23_11, CONFIG_24_05)]
    assert states == [OK, WARNING, WARNING]


def test_partition_and_time_limit():
    records = parse_records(PARTITIONS_22_05, "PartitionName")
    assert [f.state for f in _slurm_checks.check_partition(records, None, 1440)] == [OK, OK]
    _, late = _slurm_checks.check_partition(records, "low", 2880)
    assert late.state == PROBLEM and "--time 1440" in late.change
    [none] = _slurm_checks.check_partition(records, "nope", 60)
    assert none.state == PROBLEM and "there are low, high, elsewhere" in none.found
    [down] = _slurm_checks.check_partition(records, "elsewhere", 60)
    assert down.state == PROBLEM and "elsewhere is DRAIN" in down.found
    assert len(_slurm_checks.check_partition(records, "low,high", 60)) == 4
    assert _slurm_checks.check_partition(records[1:], None, 60)[0].found.startswith("Slurm has no default partition")


def allocation(**given: Any) -> Allocation:
    base = {"executor": "slurm", "nodes": 2, "gpus_per_node": 0, "gpu_type": "", "tasks_per_node": 1}
    return Allocation(**(base | {"cpus_per_task": 4, "time": 60} | given))


def gpu_nodes(count: int, state: str = "idle", gres: str = "gpu:a100:8(S:0-1)", cpus: int = 96) -> list[SlurmNode]:
    return [SlurmNode("gpu", f"g{i}", state, cpus, gres) for i in range(count)]


def test_nodes_of_the_size_that_is_asked_for():
    def check(nodes, **given):
        return _slurm_checks.check_nodes(nodes, ["gpu"], allocation(gpus_per_node=8, tasks_per_node=8, **given))

    assert check(gpu_nodes(4), cpus_per_task=12).state == OK
    assert check(gpu_nodes(4), gpu_type="a100").state == OK
    other = check(gpu_nodes(4), gpu_type="h100")
    assert other.state == PROBLEM and "0 of 4 nodes have 8 GPUs (h100)" in other.found and "gpu:a100:8" in other.found
    cores = check(gpu_nodes(4), cpus_per_task=16)
    assert cores.state == PROBLEM and "cpus_per_task = 12" in cores.change
    few = check(gpu_nodes(1))
    assert few.state == PROBLEM and "1 of 1 nodes" in few.found
    broken = check(gpu_nodes(1) + [SlurmNode("gpu", "g9", "drained*", 96, "gpu:8")])
    assert broken.state == PROBLEM and "only 1 of them work (drained*)" in broken.found
    assert check([]).state == NOT_CHECKED


@pytest.mark.parametrize(
    ("gres", "kind", "number"),
    [
        ("(null)", "", 0),
        ("gpu:8", "", 8),
        ("gpu:8", "a100", 0),
        ("gpu:a100:8(S:0-1)", "a100", 8),
        ("gpu:a100:4(S:0),gpu:v100:2(S:1),shard:a100:64", "", 6),
        ("gpu:a100:4(IDX:0,1,2,3),gpu:v100:2", "v100", 2),
    ],
)
def test_gpus_of_a_node(gres, kind, number):
    assert gpus_of(gres, kind) == number


@given(st.integers(0, 400), st.integers(0, 23), st.integers(0, 59), st.integers(0, 59))
def test_durations_as_slurm_shows_them(days, hours, minutes, secs):
    total = ((days * 24 + hours) * 60 + minutes) * 60 + secs
    clock = f"{hours:02}:{minutes:02}:{secs:02}"
    assert seconds(f"{days}-{clock}") == total
    assert seconds(clock) == total - days * 86400
    assert seconds(str(total)) == seconds(f"{total} sec") == total
    assert seconds("UNLIMITED") == math.inf


WORDS = st.text("abcXYZ019[]-.,/()", min_size=1, max_size=8)


@given(st.lists(st.dictionaries(WORDS, WORDS | st.just("a=b"), max_size=4), max_size=4), st.booleans())
def test_records_are_read_in_either_form(records, on_a_line):
    gap = " " if on_a_line else "\n   "
    text = "\n".join(
        gap.join([f"PartitionName=p{i}", *(f"{k}={v}" for k, v in r.items())]) for i, r in enumerate(records)
    )
    assert parse_records(text, "PartitionName") == [{"PartitionName": f"p{i}", **r} for i, r in enumerate(records)]


def test_the_qos_of_a_job_that_names_none():
    text = "vision||normal\nlanguage|long|long,short\n"
    assert default_qos(text, None) == "normal"
    assert default_qos(text, "language") == "long"
    assert default_qos("", None) == "normal"


def test_a_requeue_that_was_seen_or_refused():
    asked = {"scontrol": "/usr/bin/scontrol", "code": 0, "said": ""}
    assert _slurm_checks.check_requeue({"Restarts": "1"}, asked).state == OK
    assert "batch script" in _slurm_checks.check_requeue({"Restarts": "1"}, {"scontrol": None}).found
    refused = _slurm_checks.check_requeue({"Restarts": "0"}, asked | {"code": 1, "said": "Access denied"})
    assert refused.state == PROBLEM and "Access denied" in refused.found and "administrator.md, 4" in refused.change
    assert _slurm_checks.check_requeue({}, None).state == NOT_CHECKED
    assert _slurm_checks.check_job_record({"Requeue": "0"}).state == PROBLEM


# --- the ranks' reports -------------------------------------------------------------------------------------------


def report(rank: int = 0, node: str = "n1", **given: Any) -> ProbeReport:
    """The report of a rank without any problem."""
    good = {
        "stage": "done",
        "python": "3.11.7",
        "packages": {"torch": "2.6.0", "numpy": "2.0"},
        "usable": [0, 1, 2, 3],
        "free": 1 << 40,
        "clock": [-0.001, 0.01],
        "cache_free": 1 << 40,
        "offset": [-0.001, 0.001] if rank else [0.0, 0.0],
        "appears": 0.01,
        "met_s": 0.1,
        "link": ["10.0.0.1", "eth0"],
        "backend": "gloo",
        "right": True,
        "seconds": 0.1,
    }
    return ProbeReport(rank=rank, node=node, **(good | given))


def two(**second: Any) -> list[ProbeReport]:
    return [report(0, "n1"), report(1, "n2", **second)]


def test_good_reports_have_no_problem():
    found = _rank_checks.check_reports(two(), allocation(), "/shared", ["/shards"], [0.0, 0.01])
    assert {finding.state for finding in found} == {OK}
    assert _rank_checks.check_ranks(two(), 2, {}).state == OK


@pytest.mark.parametrize(
    ("second", "check", "state", "said", "change"),
    [
        ({"python": "3.10.2"}, "python", PROBLEM, "3.11.7 on n1, 3.10.2 on n2", "python ="),
        ({"packages": {"torch": "2.5.0"}}, "packages", PROBLEM, "torch 2.6.0 on n1, 2.5.0 on n2", "requirements.txt"),
        ({"import_error": "ImportError: libGL"}, "packages", PROBLEM, "on n2: ImportError: libGL", "requirements.txt"),
        ({"import_s": 130.0}, "packages", WARNING, "within 130 s", "faster file system"),
        ({"usable": [0]}, "cores", PROBLEM, "4 cores requested, a rank can use 1 on n2", "cpus_per_task = 1"),
        ({"quota": 2.5}, "cores", PROBLEM, "can use 2.5 on n2", "administrator.md, 7"),
        ({"memory": 1 << 30}, "memory", WARNING, "1.07 GB per rank on n2", "--memory 0"),
        ({"shared_error": "Read-only file system"}, "shared folder", PROBLEM, "n2 cannot write to /shared", "--shared"),
        ({"free": 1 << 30}, "room", WARNING, "1.07 GB free", "make room"),
        ({"appears": 8.0}, "files of others", WARNING, "after 8 s", "acregmax"),
        ({"replaced": math.inf}, "files of others", PROBLEM, "did not see", "acregmax"),
        ({"missing": ["/shards"]}, "shards", PROBLEM, "n2 cannot read /shards", "cluster.toml"),
        ({"cache_error": "/x is not writable"}, "node's disk", WARNING, "on n2: /x", "CFMASK_CACHE"),
        ({"offset": [2.0, 2.1]}, "clocks", WARNING, "n2 is 2.05 s ± 50 ms ahead of n1's", "NTP"),
        ({"offset": [-90.0, -89.0]}, "clocks", PROBLEM, "89.5 s ± 500 ms behind n1's", "NTP"),
        ({"offset": [-5.0, 5.0]}, "clocks", NOT_CHECKED, "± 5 s", ""),
        ({"clock": [-3.2, -3.1]}, "file times", WARNING, "n2 is 3.15 s ± 50 ms ahead of the file system's", "NTP"),
        ({"right": False}, "all-reduce", PROBLEM, "wrong sum to 1 rank (n2)", "--exclude"),
        ({"right": None, "met_s": None}, "process group", PROBLEM, "1 of 2 ranks met", ""),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_problem_of_a_node_is_reported_with_a_remedy(second, check, state, said, change):
    found = _rank_checks.check_reports(two(**second), allocation(), "/shared", ["/shards"], [0.0, 0.01])
    own = next(finding for finding in found if finding.check == check)
    assert own.state == state, own
    assert said in own.found and change in own.change, own


def test_ranks_of_a_node_that_share_their_cores():
    both = [report(0, usable=[0, 1, 2, 3]), report(1, usable=[0, 1, 2, 3])]
    short = _rank_checks.check_cores(both, 4)
    assert short.state == PROBLEM and "a rank can use 2" in short.found
    assert _rank_checks.check_cores([report(0), report(1, usable=[4, 5, 6, 7])], 4).state == OK


def gpu(uuid: str, **given: Any) -> dict[str, Any]:
    return {"name": "A100", "uuid": uuid, "memory": 80e9, "free": 79e9, "capability": [8, 0]} | given


def test_every_rank_has_a_free_gpu_of_its_own():
    all_of = [gpu("a"), gpu("b")]

    def check(first: dict, second: dict) -> dict[str, Finding]:
        reports = [report(0, **first), report(1, **second)]
        return {finding.check: finding for finding in _rank_checks.check_gpus(reports, 2)}

    assert check({"gpus": all_of, "gpu": "a"}, {"gpus": all_of, "gpu": "b"})["GPUs"].state == OK
    fewer = check({"gpus": all_of[:1], "gpu": "a"}, {"gpus": all_of[:1], "gpu": "a"})["GPUs"]
    assert fewer.state == PROBLEM and "shows its ranks 1" in fewer.found
    same = check({"gpus": all_of, "gpu": "a"}, {"gpus": all_of, "gpu": "a"})["GPUs"]
    assert same.state == PROBLEM and "share a GPU" in same.found
    mixed = check({"gpus": all_of[:1], "gpu": "a"}, {"gpus": [gpu("b", name="V100")], "gpu": "b"})["GPUs"]
    assert mixed.state == WARNING and "A100 on n1, V100 on n1" in mixed.found
    taken = check({"gpus": [gpu("a", free=20e9)], "gpu": "a"}, {"gpus": [gpu("b")], "gpu": "b"})["GPU memory"]
    assert taken.state == WARNING and "60 GB of rank 0's" in taken.found
    old = check({"gpus": [gpu("a", capability=[7, 0])], "gpu": "a"}, {"gpus": [gpu("b")], "gpu": "b"})
    assert old["bf16"].state == WARNING and "--precision fp32" in old["bf16"].change


NCCL_LOG = """\
n1:4711:4711 [0] NCCL INFO NET/Socket : Using [0]eth0:10.0.0.3<0>
n1:4711:4780 [0] NCCL INFO Using network Socket
n1:4711:4780 [0] NCCL INFO Channel 00/0 : 1[1] -> 2[0] [send] via NET/Socket/0
n1:4711:4780 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[1] via P2P/CUMEM
"""


def test_nccl_transport():
    transport = _node.nccl_transport(NCCL_LOG)
    assert transport == "network Socket; eth0:10.0.0.3<0>; channels via NET/Socket, P2P/CUMEM"
    infiniband = _node.nccl_transport(
        "NCCL INFO NET/IB : Using [0]mlx5_0:1/IB [1]mlx5_1:1/RoCE [RO]; OOB ib0:10.1.0.1<0>\n"
    )
    assert infiniband == "mlx5_0:1/IB mlx5_1:1/RoCE [RO]; OOB ib0:10.1.0.1<0>"
    assert _node.nccl_transport("") == ""

    nccl = {"backend": "nccl", "transport": transport, "seconds": 0.02}
    *_, idle = _rank_checks.check_network([report(0, infiniband=["mlx5_0"], **nccl), report(1, "n2", **nccl)], 2, True)
    assert idle.state == WARNING and "mlx5_0, and NCCL does not use it" in idle.change
    nccl["seconds"] = BYTES / 0.5e9
    *_, slow = _rank_checks.check_network([report(0, **nccl), report(1, "n2", **nccl)], 2, True)
    assert slow.state == WARNING and "0.5 GB/s" in slow.found


def test_failed_rank_is_named_before_those_that_wait_for_it():
    waits = {"stage": "waiting for the other ranks", "failed": "TimeoutError: 1 of 2 ranks did not come"}
    fails = {"stage": "finding the GPUs", "failed": "UserError: Rank 1 on n2 sees no GPU."}
    found = _rank_checks.check_ranks([report(0, **waits), report(1, "n2", **fails)], 2, {})
    assert found.state == PROBLEM and "rank 1 on n2 failed, finding the GPUs" in found.found
    assert "nvidia-smi" in found.change

    silent = _rank_checks.check_ranks([report(0, **waits)], 2, {1: "sh: exec: /no/python: not found"})
    assert "1 of 2 ranks did not start (rank 1): sh: exec: /no/python" in silent.found and "python =" in silent.change

    apart = _rank_checks.check_ranks([report(0, **waits), report(1, "n2", **waits)], 2, {})
    assert "administrator.md, 6" in apart.change and "--interface" in apart.change

    hung = _rank_checks.check_ranks(two(stage="all-reduce"), 2, {})
    assert "ended without an error message, all-reduce" in hung.found and "NCCL_IB_DISABLE" in hung.change


# --- what a rank sees ---------------------------------------------------------------------------------------------

MOMENTS = st.floats(0, 10)


@given(st.floats(-1e5, 1e5), st.lists(st.tuples(MOMENTS, MOMENTS, st.floats(0, 100)), min_size=1))
def test_the_true_offset_of_two_clocks_is_within_its_bounds(offset, delays):
    """With any delays in both directions."""
    now, rounds = 1e9, []
    for there, back, pause in delays:
        rounds.append((now + offset, now + there, now + there + back + offset))
        now += there + back + pause
    low, high = offset_bounds(rounds)
    assert low - 1e-5 <= offset <= high + 1e-5
    assert high - low <= min(there + back for there, back, _ in delays) + 1e-5


def test_clock_that_is_set_during_the_measurement_shows_as_a_jump():
    low, high = offset_bounds([(10.0, 10.0, 10.1), (21.0, 11.0, 21.1)])
    assert (low, high) == (pytest.approx(0.1), 10.0)


def test_limits_of_control_groups():
    files = {
        ("", "a", "cpu.max"): "400000 100000\n",
        ("", "a/b", "cpu.max"): "max 100000\n",
        ("", "a", "memory.max"): "max\n",
        ("", "a/b", "memory.max"): "8589934592\n",
        ("cpu", "slurm", "cpu.cfs_quota_us"): "150000\n",
        ("cpu", "slurm", "cpu.cfs_period_us"): "100000\n",
        ("memory", "slurm", "memory.limit_in_bytes"): "9223372036854771712\n",
    }

    def read(*place: str) -> str | None:
        return files.get(place)

    assert _node.control_group_limits("0::/a/b\n", read) == (4.0, 8 << 30)
    assert _node.control_group_limits("4:memory:/slurm\n3:cpu,cpuacct:/slurm\n", read) == (1.5, None)
    assert _node.control_group_limits("0::/\n", read) == (None, None)


def test_folder_that_cannot_be_written(tmp_path):
    error, clock = _node.write_and_compare_clocks(tmp_path, "x")
    assert not error and clock[0] - 1 < 0 < clock[1] + 1
    assert not list(tmp_path.iterdir())
    error, clock = _node.write_and_compare_clocks(tmp_path / "none", "x")
    assert "No such file" in error and clock == []


# --- the command --------------------------------------------------------------------------------------------------


def command(*flags: object) -> list[str]:
    return [sys.executable, str(REPO / "launch/doctor.py"), *map(str, flags)]


def findings(output: str) -> dict[str, dict[str, str]]:
    """Findings by check, the first of a name, from the output of --json."""
    found: dict[str, dict[str, str]] = {}
    for line in output.splitlines():
        finding = json.loads(line)
        assert finding["state"] in (OK, NOT_CHECKED) or finding["change"], "what is not ok says what to change"
        found.setdefault(finding["check"], finding)
    return found


@pytest.fixture
def examine(tmp_path, monkeypatch, capsys):
    """Runs the command in this process, in ``tmp_path``; returns the findings by check."""
    monkeypatch.chdir(tmp_path)
    before, variables = signal.getsignal(signal.SIGTERM), dict(os.environ)

    def examined(*flags: object, code: int = 0) -> dict[str, dict[str, str]]:
        assert doctor.main(["--json", *map(str, flags)]) == code
        return findings(capsys.readouterr().out)

    yield examined
    signal.signal(signal.SIGTERM, before)
    os.environ.clear()
    os.environ.update(variables)


def test_help_does_not_import_torch():
    code = "import sys; sys.argv = ['doctor.py', '--help']; import launch.doctor as d\ntry: d.main()\nfinally: " + (
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0 and "--no-probe" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--shared", "/no/such"), "--shared /no/such is no folder"),
        (("--after", "12", "--executor", "local"), "--after would do nothing here"),
        (("--collective-timeout", "5"), "--collective-timeout would do nothing here"),
        (("--executor", "local", "--nodes", "2"), "--nodes 2 needs Slurm"),
    ],
)
def test_invalid_flags_are_refused(flags, said, examine, capsys):
    assert doctor.main(list(flags)) == 2
    assert said in capsys.readouterr().err


def test_this_machine(tmp_path):
    done = subprocess.run(
        command("--json", "--executor", "local", "--tasks-per-node", 2), cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stdout + done.stderr
    found = findings(done.stdout)
    assert found["Slurm"]["state"] == NOT_CHECKED
    for check in ("ranks", "python", "packages", "shared folder", "process group", "all-reduce", "file times"):
        assert found[check]["state"] in (OK, WARNING), found[check]
    assert "2 of 2" in found["ranks"]["found"] and "gloo, 64 MB: right" in found["all-reduce"]["found"]
    assert not list(tmp_path.iterdir()), "something was left behind"


# --- a real Slurm -------------------------------------------------------------------------------------------------

ON_CPUS = ("--gpus-per-node", 0, "--cpus-per-task", 1, "--time", 30)


def queue(cluster: Cluster) -> str:
    return cluster.call("squeue", "--noheader", "--all").strip()


@pytest.mark.slurm
def test_good_cluster(slurm_cluster: Cluster, tmp_path, examine):
    (tmp_path / "runs").mkdir()
    found = examine("--nodes", 2, *ON_CPUS)
    assert {f["state"] for f in found.values()} <= {OK, WARNING}
    assert found["preemption"]["state"] == OK and found["warning signal"]["state"] == OK
    assert found["grace"]["state"] == WARNING and "GraceTime=120" in found["grace"]["change"]
    assert "Job " in found["sbatch"]["found"] and "to start at" in found["sbatch"]["found"]
    assert "2 of 2 on n1, n2" in found["ranks"]["found"]
    assert "n2 is" in found["clocks"]["found"] and "n1's" in found["clocks"]["found"]
    assert "a node sees what another has renamed" in found["files of others"]["found"]
    assert str(tmp_path / "runs") in found["shared folder"]["found"]
    assert "gloo, 64 MB: right" in found["all-reduce"]["found"]
    assert "the job requeued itself" in found["requeue"]["found"]
    assert not list((tmp_path / "runs").iterdir()) and not queue(slurm_cluster), "something was left behind"


@pytest.mark.slurm
def test_missing_cores_and_a_refused_requeue(slurm_cluster: Cluster, tmp_path, monkeypatch, examine):
    fake = tmp_path / "bin" / "scontrol"
    fake.parent.mkdir()
    real = shutil.which("scontrol")
    fake.write_text(f'#!/bin/sh\n[ "$1" = requeue ] && {{ echo "not for users" >&2; exit 1; }}\nexec {real} "$@"\n')
    fake.chmod(0o755)
    patient = fake.with_name("sleep")  # between the requeues that the batch script tries
    patient.write_text(f"#!/bin/sh\nexec {shutil.which('sleep')} 0.1\n")
    patient.chmod(0o755)
    file = tmp_path / "cluster.toml"
    file.write_text(
        f'gpus_per_node = 0\ncpus_per_task = 3\nshards = "no/such"\npython = "taskset -c 0 {sys.executable}"\n'
    )
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")  # sbatch passes it to ranks and batch script
    found = examine(code=1)
    assert found["cores"]["state"] == PROBLEM and "a rank can use 1 on n" in found["cores"]["found"]
    assert found["requeue"]["state"] == PROBLEM and "not for users" in found["requeue"]["found"]
    assert found["shards"]["state"] == PROBLEM and str(tmp_path / "no/such") in found["shards"]["found"]
    assert not queue(slurm_cluster)
    [kept] = tmp_path.glob(".doctor-*")
    assert (kept / "report-0.json").exists(), "reports of a problem are kept"


@pytest.mark.slurm
def test_folder_that_is_missing_on_nodes(slurm_cluster: Cluster, tmp_path):
    """Only the command sees what is mounted over the folder."""
    if not shutil.which("unshare") or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("no right to mount something for one process")
    inside = subprocess.list2cmdline(command("--json", "--nodes", 2, *ON_CPUS))
    mount = f"mount -t tmpfs none {tmp_path} && cd {tmp_path} && exec {inside}"
    done = subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stdout + done.stderr
    found = findings(done.stdout)["shared folder"]
    assert found["state"] == PROBLEM and "n1 could not create the job's log" in found["found"]
    assert "--shared DIR" in found["change"]
    assert not queue(slurm_cluster)


@pytest.mark.parametrize("node", ["slurmstepd", "slurmstepd-n1"])
def test_the_line_of_a_rank_that_slurm_killed_is_not_taken_for_the_cause(tmp_path, node):
    (tmp_path / "jobs").mkdir()
    killed, cause = f"{node}: error: *** STEP 2.0 ON n1 CANCELLED AT noon ***\n", "sh: exec: /no/python: not found\n"
    for rank, text in enumerate((killed, cause + killed)):
        (tmp_path / f"jobs/7_{rank}_log.out").write_text(text)
    assert _last_lines(tmp_path, "7", SimpleNamespace(world_size=2)) == {1: cause.strip()}
    assert _last_lines(tmp_path, "7", SimpleNamespace(world_size=1)) == {0: killed.strip()}


@pytest.mark.slurm
def test_python_that_is_missing_on_nodes(slurm_cluster: Cluster, tmp_path, examine):
    (tmp_path / "cluster.toml").write_text('nodes = 2\npython = "/no/such/python"\n')
    found = examine(*ON_CPUS, code=1)["ranks"]
    assert found["state"] == PROBLEM and "/no/such/python" in found["found"] and "python =" in found["change"]


@pytest.mark.slurm
def test_job_that_slurm_would_reject_is_not_queued(slurm_cluster: Cluster, tmp_path, examine):
    found = examine("--nodes", 2, "--gpus-per-node", "a100:8", code=1)
    assert "0 of 2 nodes have 8 GPUs (a100)" in found["nodes"]["found"]
    assert found["sbatch"]["state"] == PROBLEM and found["ranks"]["state"] == NOT_CHECKED
    assert examine("--partition", "nope", "--no-probe", code=1)["partition"]["state"] == PROBLEM
    assert not list(tmp_path.iterdir())


@pytest.mark.slurm
def test_probe_leaves_the_queue_after_the_wait_and_after_an_interrupt(slurm_cluster: Cluster, tmp_path, examine):
    blocker = slurm_cluster.sbatch("--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 300", cwd=tmp_path)
    try:
        slurm_cluster.wait_for_state(blocker, "RUNNING")
        found = examine(*ON_CPUS, "--wait", 1)["ranks"]
        assert found["state"] == NOT_CHECKED and "waited 1 s in the queue (" in found["found"]
        process = subprocess.Popen(
            command(*ON_CPUS), cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        assert process.stderr is not None
        assert any("is queued (" in line for line in process.stderr)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=300)
        assert process.returncode == 130
        assert len(queue(slurm_cluster).splitlines()) == 1 and not list(tmp_path.iterdir())
    finally:
        slurm_cluster.call("scancel", blocker)


@pytest.mark.slurm
def test_slurm_that_does_not_answer(tmp_path, monkeypatch, examine):
    bin = tmp_path / "bin"
    bin.mkdir()
    for name in ("srun", "sbatch", "scontrol"):
        (bin / name).write_text("#!/bin/sh\necho 'Unable to contact slurm controller' >&2\nexit 1\n")
        (bin / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin}:{os.environ['PATH']}")
    monkeypatch.setitem(login_node._WAIT, "patience_s", 0.5)
    found = examine(*ON_CPUS, code=1)
    assert found["Slurm"]["state"] == PROBLEM and "Unable to contact slurm controller" in found["Slurm"]["found"]
    assert list(found) == ["Slurm"]
